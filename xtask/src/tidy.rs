//! `cargo xtask tidy`: the repository's own rules, which no compiler checks.

mod code;
mod levels;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use levels::Levels;

/// A file that has more lines has become two things.
const MAX_LINES: usize = 600;

/// The only files that may hold `unsafe`; each block says why it is sound. Of the program itself it is one, with one call to the kernel.
const UNSAFE_FILES: [&str; 7] = [
    "spegel-common/src/lib.rs",
    "spegel-ebpf/src/main.rs",
    "spegel-ebpf/src/maps.rs",
    "spegel-ebpf/src/sockets.rs",
    "spegel-ebpf/src/track.rs",
    "spegel/benches/micro.rs",
    "spegel/src/zerocopy/tcp_info.rs",
];

/// What is not finished must not be committed.
const UNFINISHED: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];

/// Where the Rust sources are.
const FOLDERS: [&str; 5] = ["spegel", "spegel-common", "spegel-ebpf", "xtask", "benches"];

/// Prints every breach; false if there is one.
///
/// # Errors
/// A source file that cannot be read, or no table of levels.
pub(crate) fn run() -> Result<bool> {
    let root = crate::root();
    let lib = root.join("spegel/src/lib.rs");
    let levels = Levels::parse(&fs::read_to_string(&lib).with_context(|| format!("read {}", lib.display()))?)?;
    let mut files = Vec::new();
    for folder in FOLDERS {
        rust_files(&root.join(folder), &mut files)?;
    }
    files.sort();
    let mut breaches = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let path = file.strip_prefix(root).unwrap_or(file).display().to_string();
        breaches.extend(check(&path, &text, &levels));
    }
    for breach in &breaches {
        println!("{breach}");
    }
    println!("tidy: {} files, {} breaches", files.len(), breaches.len());
    Ok(breaches.is_empty())
}

/// All breaches of one file, each with its path and line.
fn check(path: &str, text: &str, levels: &Levels) -> Vec<String> {
    let mut breaches = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        breaches.push(format!("{path}: {lines} lines; the limit is {MAX_LINES}"));
    }
    let code = code::without_comments_and_text(text);
    for (number, line) in code.lines().enumerate() {
        let at = format!("{path}:{}", number + 1);
        if code::has_word(line, "unsafe") && !UNSAFE_FILES.contains(&path) {
            breaches.push(format!("{at}: unsafe code outside the files that may have it (UNSAFE_FILES in xtask)"));
        }
        for word in UNFINISHED {
            if code::has_word(line, word) {
                breaches.push(format!("{at}: {word} is left in"));
            }
        }
    }
    if let Some(room) = levels::room_of(path) {
        for (line, edge) in levels::imports(&code) {
            if let Err(why) = levels.check(room, &edge) {
                breaches.push(format!("{path}:{line}: {why}"));
            }
        }
    }
    // Several items of one room in one statement are one breach.
    breaches.dedup();
    breaches
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const TABLE: &str = "\
        //! | 0 | [`oci`], [`metrics`] | nothing of ours |\n\
        //! | 1 | [`zerocopy`] | level 0 |\n\
        //! | 2 | [`store`], [`router`] | below; `router` takes `store`'s [`store::Change`] only |\n\
        //! | 3 | [`mirror`] | below |\n\
        //! | 6 | [`app`], [`cli`] | all |\n";

    #[track_caller]
    fn check_one(path: &str, text: &str, breach: &str) {
        let breaches = check(path, text, &Levels::parse(TABLE).unwrap());
        match breach {
            "" => assert_eq!(breaches, [""; 0]),
            _ => assert!(breaches.len() == 1 && breaches[0].contains(breach), "{breaches:?}"),
        }
    }

    #[test]
    fn imports_may_go_down_but_not_up() {
        check_one("spegel/src/mirror/mod.rs", "use crate::oci::Digest;\nuse crate::{store::Blob, router};", "");
        check_one("spegel/src/store/mod.rs", "use crate::mirror::Mirror;", "store (level 2) uses mirror (level 3)");
        check_one("spegel/src/store/a/b.rs", "use crate::{oci::Digest, mirror::Mirror};", "b.rs:1: store");
        check_one("spegel/src/oci/key.rs", "fn f(x: &crate::store::Blob) {}", "oci (level 0) uses store");
        check_one(
            "spegel/src/oci/key.rs",
            "use crate::{\n    oci::Digest,\n    zerocopy::{Body, File},\n};",
            "key.rs:1: oci (level 0)",
        );
        check_one("spegel/src/store/mod.rs", "// use crate::mirror::Mirror;\nlet x = \"crate::mirror\";", "");
    }

    #[test]
    fn rooms_of_one_level_are_strangers_but_for_what_the_table_says() {
        check_one("spegel/src/router/mod.rs", "use crate::store::Change;", "");
        check_one("spegel/src/router/mod.rs", "use crate::store::{Change};", "");
        check_one("spegel/src/router/mod.rs", "use crate::store::Store;", "router (level 2) uses store");
        check_one("spegel/src/router/mod.rs", "use crate::store::{Change, Store};", "router (level 2) uses store");
        check_one("spegel/src/store/mod.rs", "use crate::router::Peer;", "store (level 2) uses router");
        check_one("spegel/src/app.rs", "use crate::cli::Settings;", "");
    }

    #[test]
    fn a_room_must_be_in_the_table() {
        check_one("spegel/src/attic/mod.rs", "use crate::oci::Digest;", "attic is not in the table");
        check_one("spegel/src/store/mod.rs", "use crate::attic::Box;", "attic is not in the table");
    }

    #[test]
    fn long_unsafe_and_unfinished_files_are_found() {
        check_one("spegel/src/oci/mod.rs", &"\n".repeat(MAX_LINES), "");
        check_one("spegel/src/oci/mod.rs", &"\n".repeat(MAX_LINES + 1), "601 lines");
        check_one("benches/src/lib.rs", "fn f() { unsafe { g() } }", "lib.rs:1: unsafe");
        check_one("benches/src/lib.rs", "#![deny(unsafe_code)] // unsafe", "");
        check_one("xtask/src/main.rs", "fn f() {\n    todo!()\n}", "main.rs:2: todo!");
        check_one("xtask/src/main.rs", "/* dbg!(x) */ let s = r#\"todo!\"#; let c = '\"'; // \"", "");
    }
}
