//! The fuzz targets over the corpus that is kept of them, findings among it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

#[test]
fn the_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, check) in spegel::fuzz::TARGETS {
        let entries: Vec<_> = fs::read_dir(corpus.join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!entries.is_empty(), "{name} has no corpus");
        for path in entries {
            println!("{}", path.display());
            check(&fs::read(path).unwrap());
        }
    }
}

/// Every target is one that `cargo fuzz` knows.
#[test]
fn every_check_is_a_target() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/Cargo.toml")).unwrap();
    for (name, _) in spegel::fuzz::TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}
