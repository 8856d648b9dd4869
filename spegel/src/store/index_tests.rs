#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use sha2::Digest as _;

use super::*;
use crate::store::tree::Contents;

/// Blobs in memory, and the images made of them.
#[derive(Default)]
struct Blobs(HashMap<Digest, Vec<u8>>);

impl Contents for Blobs {
    fn size(&self, digest: &Digest, expected: Option<u64>) -> Option<u64> {
        let size = self.0.get(digest)?.len() as u64;
        expected.is_none_or(|expected| expected == size).then_some(size)
    }

    fn manifest(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.0.get(digest).cloned()
    }
}

impl Blobs {
    fn add(&mut self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest: Digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(&bytes))).parse().unwrap();
        self.0.insert(digest.clone(), bytes);
        digest
    }

    fn descriptor(&self, digest: &Digest, media_type: &str) -> serde_json::Value {
        let size = self.0.get(digest).map_or(1, Vec::len);
        serde_json::json!({ "mediaType": media_type, "digest": digest.as_str(), "size": size })
    }

    /// A manifest with a config and one layer for each text.
    fn image(&mut self, layers: &[&str]) -> Digest {
        self.make(layers, "application/vnd.oci.image.layer.v1.tar", None)
    }

    fn make(&mut self, layers: &[&str], media_type: &str, subject: Option<&Digest>) -> Digest {
        let config = self.add(format!("config of {layers:?}"));
        let layers: Vec<_> = layers.iter().map(|&text| self.add(text)).collect();
        let layers: Vec<_> = layers.iter().map(|layer| self.descriptor(layer, media_type)).collect();
        let subject = subject.map(|subject| self.descriptor(subject, "application/vnd.oci.image.manifest.v1+json"));
        let config = self.descriptor(&config, "application/vnd.oci.image.config.v1+json");
        let mut manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers });
        if let Some(subject) = subject {
            manifest["subject"] = subject;
        }
        self.add(manifest.to_string())
    }

    fn index(&mut self, manifests: &[&Digest]) -> Digest {
        let manifests: Vec<_> = manifests.iter().map(|digest| self.descriptor(digest, "")).collect();
        self.add(serde_json::json!({ "schemaVersion": 2, "manifests": manifests }).to_string())
    }

    fn without(mut self, digest: &Digest) -> Self {
        self.0.remove(digest).unwrap();
        self
    }

    fn walk(&self, top: &Digest) -> Tree {
        Tree::walk(top, None, self)
    }
}

fn digest_of(text: &str) -> Digest {
    Blobs::default().add(text)
}

fn index() -> Index {
    index_without(&[])
}

fn index_without(patterns: &[&str]) -> Index {
    let patterns: Vec<_> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
    Index::new(Filters::new(&[], &patterns).unwrap())
}

fn tag(name: &str) -> TagName {
    name.parse().unwrap()
}

fn tags(keys: &[Key]) -> Vec<String> {
    keys.iter().filter(|key| matches!(key, Key::Tag(_))).map(Key::to_string).collect()
}

fn repository(name: &str) -> Repository {
    let (registry, name) = name.split_once('/').unwrap();
    Repository::new(registry, name).unwrap()
}

const APP: &str = "registry.test/app:v1";

#[test]
fn an_image_brings_its_tag_and_all_beneath() {
    let mut blobs = Blobs::default();
    let manifest = blobs.image(&["a", "b"]);
    let top = blobs.index(&[&manifest]);
    let mut index = index();
    let delta = index.put(APP, blobs.walk(&top));
    assert_eq!(delta.added.len(), 6, "tag, index, manifest, config, two layers");
    assert_eq!(tags(&delta.added), [APP]);
    assert_eq!(delta.removed, []);
    assert_eq!(index.resolve(&tag(APP)), Some(&top));
    assert_eq!(index.offered_keys().collect::<HashSet<_>>(), delta.added.into_iter().collect());
}

#[test]
fn the_same_again_changes_nothing() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["a"]);
    let mut index = index();
    index.put(APP, blobs.walk(&top));
    assert_eq!(index.put(APP, blobs.walk(&top)), Delta::default());
    assert_eq!(index.replace(vec![(APP.to_owned(), blobs.walk(&top))]), Delta::default());
}

#[test]
fn what_two_images_share_goes_with_the_last() {
    let mut blobs = Blobs::default();
    let (first, second) = (blobs.image(&["shared", "first"]), blobs.image(&["shared", "second"]));
    let mut index = index();
    index.put("registry.test/app:v1", blobs.walk(&first));
    index.put("registry.test/app:v2", blobs.walk(&second));
    let delta = index.remove("registry.test/app:v1");
    assert_eq!(delta.removed.len(), 4, "{:?}", delta.removed);
    assert!(!delta.removed.contains(&digest_of("shared").into()));
    let delta = index.remove("registry.test/app:v2");
    assert!(delta.removed.contains(&digest_of("shared").into()));
    assert_eq!(index.offered_keys().count(), 0);
    assert!(index.contents.is_empty() && index.images.is_empty(), "nothing is left behind");
}

#[test]
fn a_tag_that_moves_keeps_its_key_and_what_both_have() {
    let mut blobs = Blobs::default();
    let (old, new) = (blobs.image(&["base", "old"]), blobs.image(&["base", "new"]));
    let mut index = index();
    index.put(APP, blobs.walk(&old));
    let delta = index.put(APP, blobs.walk(&new));
    assert_eq!(tags(&delta.added), Vec::<String>::new());
    assert_eq!(tags(&delta.removed), Vec::<String>::new());
    assert!(!delta.removed.contains(&digest_of("base").into()));
    assert_eq!((delta.added.len(), delta.removed.len()), (3, 3));
    assert_eq!(index.resolve(&tag(APP)), Some(&new));
}

#[test]
fn one_whole_platform_is_enough_for_the_tag() {
    let mut blobs = Blobs::default();
    let (here, absent) = (blobs.image(&["here"]), blobs.image(&["absent"]));
    let top = blobs.index(&[&absent, &here]);
    let blobs = blobs.without(&absent).without(&digest_of("absent"));
    let mut index = index();
    let delta = index.put(APP, blobs.walk(&top));
    assert_eq!(tags(&delta.added), [APP]);
    assert!(!delta.added.contains(&absent.clone().into()));
    assert_eq!(index.verdict(&absent, None), Verdict::Unknown);
}

#[test]
fn no_tag_without_a_whole_platform() {
    let mut blobs = Blobs::default();
    let manifest = blobs.image(&["a", "b"]);
    let top = blobs.index(&[&manifest]);
    let partial = blobs.without(&digest_of("b"));
    let mut index = index();
    let delta = index.put(APP, partial.walk(&top));
    assert_eq!(tags(&delta.added), Vec::<String>::new());
    assert_eq!(delta.added.len(), 4, "what is here is offered by digest");
    assert_eq!(index.resolve(&tag(APP)), None);

    let mut whole = partial;
    whole.add("b");
    let delta = index.put(APP, whole.walk(&top));
    assert_eq!(delta.added, [digest_of("b").into(), tag(APP).into()]);
}

#[test]
fn an_attestation_is_not_a_platform() {
    let mut blobs = Blobs::default();
    let attestation = blobs.make(&["proof"], "application/vnd.in-toto+json", None);
    let image = blobs.image(&["a"]);
    let top = blobs.index(&[&image, &attestation]);
    let blobs = blobs.without(&digest_of("a"));
    let mut index = index();
    assert_eq!(tags(&index.put(APP, blobs.walk(&top)).added), Vec::<String>::new());
}

#[test]
fn layers_that_no_registry_has_need_not_be_here() {
    let mut blobs = Blobs::default();
    let top = blobs.make(&["windows"], "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", None);
    let blobs = blobs.without(&digest_of("windows"));
    assert_eq!(tags(&index().put(APP, blobs.walk(&top)).added), [APP]);
}

#[test]
fn half_a_file_is_absent() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["whole"]);
    blobs.0.insert(digest_of("whole"), b"who".to_vec());
    let mut index = index();
    let delta = index.put(APP, blobs.walk(&top));
    assert!(!delta.added.contains(&digest_of("whole").into()));
    assert_eq!(tags(&delta.added), Vec::<String>::new());
    assert_eq!(index.expected_size(&digest_of("whole")), Some(5));
}

#[test]
fn content_that_vanishes_takes_the_tag_with_it() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["a"]);
    let mut index = index();
    index.put(APP, blobs.walk(&top));
    let delta = index.set_absent(&digest_of("a"));
    assert_eq!(delta.removed, [digest_of("a").into(), tag(APP).into()]);
    assert_eq!(index.set_absent(&digest_of("a")), Delta::default(), "told once");
    assert_eq!(index.set_absent(&digest_of("never seen")), Delta::default());
    assert_eq!(index.images_that_name(&digest_of("a")), [(APP.to_owned(), top.clone())]);
    assert_eq!(index.put(APP, blobs.walk(&top)).added, [digest_of("a").into(), tag(APP).into()]);
}

#[test]
fn content_that_another_image_brings_completes_this_one() {
    let mut blobs = Blobs::default();
    let (one, two) = (blobs.image(&["shared"]), blobs.image(&["shared", "more"]));
    let before = Blobs(blobs.0.clone()).without(&digest_of("shared"));
    let mut index = index();
    index.put("registry.test/one:v1", before.walk(&one));
    assert_eq!(index.outdated_images(), []);
    let delta = index.put("registry.test/two:v1", blobs.walk(&two));
    assert_eq!(tags(&delta.added), ["registry.test/one:v1", "registry.test/two:v1"]);
    assert_eq!(index.outdated_images(), [("registry.test/one:v1".to_owned(), one)]);
}

#[test]
fn names_that_are_no_tags_make_no_tag_keys() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["a"]);
    let config = digest_of("config of [\"a\"]");
    for name in [
        config.to_string(),
        format!("registry.test/app@{top}"),
        format!("registry.test/app:v1@{top}"),
        "app:v1".to_owned(),
        "import-2024-01-01".to_owned(),
        String::new(),
    ] {
        let mut index = index();
        let delta = index.put(&name, blobs.walk(&top));
        assert_eq!((tags(&delta.added).len(), delta.added.len()), (0, 3), "{name:?}");
        assert_eq!(index.verdict(&top, None), Verdict::Serve, "{name:?}");
    }
}

#[test]
fn filtered_content_is_neither_offered_nor_served() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["a"]);
    let mut index = index_without(&["^registry\\.test/secret"]);
    assert_eq!(index.put("registry.test/secret:v1", blobs.walk(&top)), Delta::default());
    assert_eq!(index.resolve(&tag("registry.test/secret:v1")), None);
    assert_eq!(index.verdict(&top, None), Verdict::Refuse);
    assert_eq!(index.verdict(&top, Some(&repository("registry.test/open"))), Verdict::Refuse);

    // The CRI records every image a second time under its config's digest: that must not open the door.
    assert_eq!(index.put(digest_of("config").as_str(), blobs.walk(&top)), Delta::default());
    assert_eq!(index.verdict(&top, None), Verdict::Refuse);

    assert_eq!(index.put("registry.test/open:v1", blobs.walk(&top)).added.len(), 4);
    assert_eq!(index.verdict(&top, Some(&repository("registry.test/secret"))), Verdict::Serve);
    assert_eq!(index.remove("registry.test/open:v1").removed.len(), 4);
    assert_eq!(index.verdict(&top, None), Verdict::Refuse);
}

#[test]
fn a_filtered_tag_is_not_resolved() {
    let mut blobs = Blobs::default();
    let top = blobs.image(&["a"]);
    let mut index = index_without(&[":latest$"]);
    assert_eq!(index.put("registry.test/app:latest", blobs.walk(&top)), Delta::default());
    let delta = index.put(&format!("registry.test/app@{top}"), blobs.walk(&top));
    assert_eq!((tags(&delta.added).len(), delta.added.len()), (0, 3), "by digest it is offered");
}

#[test]
fn the_repository_asked_for_decides_where_no_image_does() {
    let index = index_without(&["^registry\\.test/secret"]);
    let digest = digest_of("not recorded yet");
    assert_eq!(index.verdict(&digest, None), Verdict::Unknown);
    assert_eq!(index.verdict(&digest, Some(&repository("registry.test/open"))), Verdict::Unknown);
    assert_eq!(index.verdict(&digest, Some(&repository("registry.test/secret"))), Verdict::Refuse);
}

#[test]
fn a_list_tells_only_differences() {
    let mut blobs = Blobs::default();
    let (kept, gone, new) = (blobs.image(&["kept"]), blobs.image(&["gone"]), blobs.image(&["new"]));
    let mut index = index();
    index.put("registry.test/kept:v1", blobs.walk(&kept));
    index.put("registry.test/gone:v1", blobs.walk(&gone));
    let list = [("registry.test/kept:v1", &kept), ("registry.test/new:v1", &new)];
    let delta = index.replace(list.map(|(name, top)| (name.to_owned(), blobs.walk(top))).into());
    assert_eq!(tags(&delta.added), ["registry.test/new:v1"]);
    assert_eq!(tags(&delta.removed), ["registry.test/gone:v1"]);
    assert_eq!((delta.added.len(), delta.removed.len()), (4, 4));
}

#[test]
fn referrers_are_the_offered_manifests_with_that_subject() {
    let mut blobs = Blobs::default();
    let image = blobs.image(&["a"]);
    let signature = blobs.make(&["signature"], "application/x.signature", Some(&image));
    let mut index = index();
    index.put(APP, blobs.walk(&image));
    assert_eq!(index.referrers(&image), []);
    index.put(signature.as_str(), blobs.walk(&signature));
    let referrers = index.referrers(&image);
    assert_eq!(referrers.len(), 1);
    assert_eq!(referrers[0].digest, signature.to_string());
    assert_eq!(referrers[0].artifact_type.as_deref(), Some("application/vnd.oci.image.config.v1+json"));
    index.remove(signature.as_str());
    assert_eq!(index.referrers(&image), []);
    assert!(index.referrers.is_empty());
}

#[test]
fn figures_by_registry() {
    let mut blobs = Blobs::default();
    let (one, two) = (blobs.image(&["shared", "one"]), blobs.image(&["shared", "two"]));
    let mut index = index_without(&["^secret\\.test/"]);
    for name in ["a.test/one:v1", "a.test/one:v2", "secret.test/one:v1"] {
        index.put(name, blobs.walk(&one));
    }
    index.put(&format!("a.test/one@{one}"), blobs.walk(&one));
    index.put("b.test:5000/two:v1", blobs.walk(&two));
    index.put(digest_of("config").as_str(), blobs.walk(&two));
    let figures = |image_tags, image_digests, content_digests| Offered { image_tags, image_digests, content_digests };
    let expected = [("a.test", figures(2, 1, 4)), ("b.test:5000", figures(1, 1, 4))];
    assert_eq!(index.offered(), expected.map(|(name, figures)| (name.to_owned(), figures)).into());
}

#[test]
fn bytes_that_lie_about_their_digest_cannot_trap_the_walk() {
    let mut blobs = Blobs::default();
    let top = digest_of("not its digest");
    let inner = blobs.index(&[&top]);
    let looped = serde_json::json!({ "manifests": [blobs.descriptor(&inner, ""), blobs.descriptor(&top, "")] });
    blobs.0.insert(top.clone(), looped.to_string().into_bytes());
    assert_eq!(tags(&index().put(APP, blobs.walk(&top)).added), Vec::<String>::new());

    let own_layer = digest_of("names itself as a layer");
    let config = blobs.add("config");
    let looped = serde_json::json!({
        "config": blobs.descriptor(&config, ""),
        "layers": [{ "mediaType": "", "digest": own_layer.as_str(), "size": 1 }],
    });
    blobs.0.insert(own_layer.clone(), looped.to_string().into_bytes());
    assert_eq!(index().put(APP, blobs.walk(&own_layer)).added.len(), 3);
}

#[test]
fn many_ways_to_one_child_cost_one() {
    let mut blobs = Blobs::default();
    let mut top = blobs.image(&["a"]).clone();
    let absent = blobs.image(&["b"]);
    let mut blobs = blobs.without(&digest_of("b"));
    for _ in 0..6 {
        top = blobs.index(&[[&top; 100].as_slice(), &[&absent; 100]].concat());
    }
    assert_eq!(tags(&index().put(APP, blobs.walk(&top)).added), [APP]);
}

#[test]
fn nesting_ends() {
    let mut blobs = Blobs::default();
    let mut top = blobs.image(&["a"]);
    for _ in 0..40 {
        top = blobs.index(&[&top]);
    }
    assert_eq!(blobs.walk(&top).nodes().len(), 9);
}

#[test]
fn a_manifest_that_cannot_be_read_is_content_all_the_same() {
    let mut blobs = Blobs::default();
    let top = blobs.add("no JSON");
    let delta = index().put(APP, blobs.walk(&top));
    assert_eq!(delta.added, [top.into()]);
}

#[test]
fn what_is_being_received_is_offered_until_it_is_not() {
    let mut index = index();
    let layer = digest_of("a layer");
    assert_eq!(index.set_receiving(&layer, true).added, [layer.clone().into()]);
    assert_eq!(index.set_receiving(&layer, true), Delta::default());
    assert_eq!(index.offered_keys().count(), 1);
    assert_eq!(index.verdict(&layer, None), Verdict::Unknown, "it is not here");
    assert_eq!(index.set_receiving(&layer, false).removed, [layer.clone().into()]);
    assert_eq!(index.set_receiving(&layer, false), Delta::default());
    assert!(index.contents.is_empty());
}

#[test]
fn what_arrived_is_offered_until_its_image_speaks_for_it() {
    let mut blobs = Blobs::default();
    let image = blobs.image(&["a layer"]);
    let layer = digest_of("a layer");
    let mut index = index();
    index.set_receiving(&layer, true);
    assert_eq!(index.set_arrived(&layer), Delta::default(), "offered all along");
    assert_eq!(index.set_receiving(&layer, false), Delta::default());
    assert_eq!(index.arrived(), std::slice::from_ref(&layer));

    let delta = index.put("registry.test/app:v1", blobs.walk(&image));
    assert!(!delta.added.contains(&layer.clone().into()), "offered all along");
    assert!(index.arrived().is_empty());
    assert!(index.remove("registry.test/app:v1").removed.contains(&layer.clone().into()));

    index.set_arrived(&layer);
    assert_eq!(index.set_absent(&layer).removed, [layer.clone().into()]);
    assert!(index.contents.is_empty());
}

#[test]
fn what_the_filters_keep_back_is_not_offered_while_it_comes_again() {
    let mut blobs = Blobs::default();
    let image = blobs.image(&["a layer"]);
    let layer = digest_of("a layer");
    let mut index = index_without(&["^registry\\.test/secret"]);
    index.set_arrived(&layer);
    index.set_receiving(&layer, true);
    let open = repository("registry.test/open");
    assert_eq!(index.pulls(&open, &TagOrDigest::Digest(layer.clone()), Instant::now()).added, [layer.clone().into()]);
    let delta = index.put("registry.test/secret:v1", blobs.walk(&image));
    assert_eq!(delta.removed, [layer.clone().into()]);
    assert_eq!(index.verdict(&layer, Some(&open)), Verdict::Refuse);
}

/// Nothing but the question of our own containerd tells whose content it is before its image is there.
#[test]
fn with_filters_what_is_received_is_offered_only_if_it_is_known_to_pass_them() {
    let mut blobs = Blobs::default();
    let image = blobs.image(&["a layer", "another"]);
    let (layer, another) = (digest_of("a layer"), digest_of("another"));
    let now = Instant::now();
    let (open, secret) = (repository("registry.test/open"), repository("registry.test/secret"));
    for filters in [
        Filters::new(&[], &["^registry\\.test/secret".into()]).unwrap(),
        Filters::new(&["https://registry.test".into()], &["/secret".into()]).unwrap(),
    ] {
        let mut index = Index::new(filters);
        assert_eq!(index.set_receiving(&layer, true), Delta::default(), "nobody said whose it is");
        assert_eq!(index.pulls(&secret, &TagOrDigest::Digest(layer.clone()), now), Delta::default());
        assert_eq!(index.set_arrived(&layer), Delta::default());
        let delta = index.pulls(&open, &TagOrDigest::Digest(layer.clone()), now);
        assert_eq!(delta.added, [layer.clone().into()]);
        assert_eq!(index.set_receiving(&layer, false), Delta::default(), "it is here");

        // As it is in fact: first the question, then the bytes.
        index.pulls(&open, &TagOrDigest::Digest(another.clone()), now);
        assert_eq!(index.set_receiving(&another, true).added, [another.clone().into()]);
        let delta = index.put("registry.test/open:v1", blobs.walk(&image));
        assert!(delta.removed.is_empty() && !delta.added.contains(&another.clone().into()));
        index.set_receiving(&another, false);
        index.remove("registry.test/open:v1");
        assert!(index.contents.is_empty());
    }
}

#[test]
fn memory_of_what_arrived_is_bounded() {
    let mut index = index();
    let digest = |n: usize| -> Digest { format!("sha256:{n:064x}").parse().unwrap() };
    let mut removed = Vec::new();
    for n in 0..=MAX_ARRIVED {
        removed.extend(index.set_arrived(&digest(n)).removed);
    }
    assert_eq!(removed, [digest(0).into()]);
    assert_eq!((index.arrivals.len(), index.contents.len()), (MAX_ARRIVED, MAX_ARRIVED));
}

#[test]
fn the_inventory_is_bounded_and_counts_what_is_shared_once() {
    let mut blobs = Blobs::default();
    let (first, second) = (blobs.image(&["a", "shared"]), blobs.image(&["bb", "shared"]));
    let lacking = blobs.image(&["c", "gone"]);
    let mut index = index();
    index.put(APP, blobs.walk(&first));
    index.put("registry.test/app:also", blobs.walk(&first));
    // As the CRI names what it has named already.
    index.put("sha256:0000", blobs.walk(&first));
    index.put("registry.test/other:v1", blobs.walk(&second));
    index.put("registry.test/some:v1", blobs.without(&digest_of("gone")).walk(&lacking));
    let all = index.inventory(10);
    let names: Vec<_> = all.images.iter().map(|image| image.names.join(" ")).collect();
    assert_eq!(
        names,
        ["registry.test/app:also registry.test/app:v1 sha256:0000", "registry.test/other:v1", "registry.test/some:v1"]
    );
    let counts: Vec<_> = all.images.iter().map(|image| (image.named, image.present, image.is_whole)).collect();
    assert_eq!(counts, [(4, 4, true), (4, 4, true), (4, 3, false)]);
    assert!(all.images[0].is_offered && all.images[0].bytes > 7);
    assert_eq!((all.blobs, all.more_images), (4 + 3 + 3, 0));
    let sum: u64 = all.images.iter().map(|image| image.bytes).sum();
    assert_eq!(all.bytes, sum - "shared".len() as u64);
    let few = index.inventory(1);
    assert_eq!((few.images.as_slice(), few.more_images, few.bytes), (&all.images[..1], 2, all.bytes));
}
