//! Properties of `oci`: what is written reads back, and no input, however hostile, gets past the rules.

#![allow(clippy::unwrap_used)]

use http::Method;
use proptest::prelude::*;
use spegel::oci::{
    ContentRange, Digest, Key, Manifest, RangeOutcome, RangeSpec, Reference, Repository, Request, TagName, parse_range,
};

/// The distribution specification's grammar of names, beside which our own reading is held.
const NAME: &str = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*";
const TAG: &str = "[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}";

fn registry() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{1,8}\\.[a-zA-Z0-9]{1,8}(:[1-9][0-9]{0,3})?",
        Just("localhost".to_owned()),
        any::<(u128, u16)>().prop_map(|(ip, port)| format!("[{}]:{}", std::net::Ipv6Addr::from(ip), port.max(1))),
    ]
}

fn name() -> impl Strategy<Value = String> {
    let component = "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}";
    prop::collection::vec(component, 1..5).prop_map(|parts| parts.join("/"))
}

fn hex(len: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(b"0123456789abcdef".to_vec()), len)
        .prop_map(|bytes| String::from_utf8(bytes).unwrap())
}

fn digest() -> impl Strategy<Value = String> {
    prop_oneof![hex(64).prop_map(|hex| format!("sha256:{hex}")), hex(128).prop_map(|hex| format!("sha512:{hex}"))]
}

proptest! {
    #[test]
    fn names_are_those_of_the_grammar(text in "[a-z0-9._/A-]{0,16}") {
        let grammar = regex::Regex::new(&format!("^{NAME}$")).unwrap();
        prop_assert_eq!(Repository::new("registry.test", &text).is_ok(), grammar.is_match(&text));
    }

    #[test]
    fn tags_are_those_of_the_grammar(text in "[a-z._:/A-]{0,130}") {
        let grammar = regex::Regex::new(&format!("^{TAG}$")).unwrap();
        let repository = Repository::new("registry.test", "app").unwrap();
        prop_assert_eq!(TagName::new(repository, &text).is_ok(), grammar.is_match(&text));
    }

    #[test]
    fn references_read_back(registry in registry(), name in name(), tag in TAG, digest in digest()) {
        for text in [format!("{registry}/{name}:{tag}"), format!("{registry}/{name}@{digest}"), format!("{registry}/{name}:{tag}@{digest}")] {
            let image: Reference = text.parse().unwrap();
            prop_assert_eq!(image.repository.registry(), &registry);
            prop_assert_eq!(image.repository.name(), &name);
            prop_assert_eq!(image.to_string(), text);
        }
        let key: Key = format!("{registry}/{name}:{tag}").parse().unwrap();
        prop_assert_eq!(key.to_string().parse(), Ok(key));
        prop_assert_eq!(digest.parse::<Digest>().unwrap().to_string(), digest);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,64}") {
        if let Ok(image) = text.parse::<Reference>() {
            prop_assert_eq!(image.to_string(), text.clone());
        }
        if let Ok(digest) = text.parse::<Digest>() {
            prop_assert!(!digest.as_str().contains(['/', '\\', '.']));
        }
        let _ = text.parse::<ContentRange>();
        let _ = Manifest::parse(text.as_bytes());
        let _ = Request::parse(&Method::GET, &format!("/v2/{text}"), Some(&text));
    }

    #[test]
    fn requests_carry_valid_names_only(path in "(a|/|%2e|%2F|\\.|%00|%|manifests|blobs|:|sha256){0,12}", query in "(ns|=|&|a|%2e|%|:|/){0,8}") {
        if let Ok(request) = Request::parse(&Method::GET, &format!("/v2/{path}"), Some(&query)) {
            let name = match &request {
                Request::Base => return Ok(()),
                Request::Manifest { name, .. } | Request::Blob { name, .. } | Request::Referrers { name, .. } => name,
            };
            prop_assert!(Repository::new(request.ns().unwrap_or("registry.test"), name).is_ok());
        }
    }

    #[test]
    fn requests_read_back(name in name(), tag in TAG, registry in registry(), digest in digest()) {
        let encoded = percent_encoding::utf8_percent_encode(&registry, percent_encoding::NON_ALPHANUMERIC).to_string();
        let query = format!("ns={encoded}");
        let request = Request::parse(&Method::GET, &format!("/v2/{name}/manifests/{tag}"), Some(&query)).unwrap();
        prop_assert_eq!(request.repository(), Some(Repository::new(&registry, &name).unwrap()));
        let blob = Request::parse(&Method::HEAD, &format!("/v2/{name}/blobs/{digest}"), None).unwrap();
        prop_assert_eq!(blob, Request::Blob { name, digest: digest.parse().unwrap(), ns: None });
    }

    #[test]
    fn parts_lie_within_the_content(first in any::<u64>(), length in any::<u64>(), size in any::<u64>(), form in 0..3) {
        let header = match form {
            0 => format!("bytes={first}-"),
            1 => format!("bytes=-{length}"),
            _ => format!("bytes={first}-{}", first.saturating_add(length)),
        };
        prop_assert_eq!(RangeSpec::parse(&header).unwrap().to_string(), header.clone());
        match parse_range(Some(&header), size) {
            RangeOutcome::Part { start, end_exclusive } => {
                prop_assert!(start < end_exclusive && end_exclusive <= size);
                prop_assert!(form == 1 || start == first);
            }
            RangeOutcome::Unsatisfiable => prop_assert!((form == 1 && length == 0) || (form != 1 && first >= size)),
            RangeOutcome::Whole => prop_assert!(form == 1 && size == 0),
        }
    }

    #[test]
    fn content_ranges_read_back(start in 0..u64::MAX - 2, more in 1..=1_000_000_u64, known in any::<bool>()) {
        let end_exclusive = start.saturating_add(more).min(u64::MAX - 1);
        let range = ContentRange::Part { start, end_exclusive, total: known.then_some(end_exclusive) };
        prop_assert_eq!(range.to_string().parse(), Ok(range));
        let none = ContentRange::Unsatisfied { total: start };
        prop_assert_eq!(none.to_string().parse(), Ok(none));
    }

    #[test]
    fn manifests_name_what_was_written(children in prop::collection::vec((digest(), any::<u64>()), 0..8)) {
        let entries: Vec<_> = children.iter().map(|(digest, size)| serde_json::json!({"digest": digest, "size": size})).collect();
        let text = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
        let index = Manifest::parse(text.as_bytes()).unwrap();
        let named: Vec<_> = index.children.iter().map(|child| (child.digest.to_string(), child.size)).collect();
        prop_assert!(index.is_index);
        prop_assert_eq!(named, children);
    }
}
