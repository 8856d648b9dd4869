//! What the binary is made of, as cargo knows it: the list of its parts and their licences.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use spegel_benches::daemon::output;

/// The targets that are shipped: what only another one needs is not listed.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

/// The packages that are linked into the binary, by name and version.
pub(super) struct Dependencies(BTreeMap<(String, String), Package>);

struct Package {
    licence: String,
    repository: Option<String>,
    checksum: Option<String>,
    folder: PathBuf,
}

// === impl Dependencies ===

impl Dependencies {
    /// Asks cargo, without the network where its cache has all.
    pub(super) fn read(root: &Path) -> Result<Self> {
        let mut found = BTreeMap::new();
        let checksums = checksums(&fs::read_to_string(root.join("Cargo.lock"))?);
        for target in TARGETS {
            let mut command = Command::new(env!("CARGO"));
            command.current_dir(root).args([
                "metadata",
                "--format-version",
                "1",
                "--locked",
                "--filter-platform",
                target,
            ]);
            let metadata: Value = serde_json::from_str(&output(&mut command)?)?;
            add(&mut found, &metadata, &checksums)?;
        }
        ensure!(!found.is_empty(), "cargo knows of no dependency");
        Ok(Self(found))
    }

    /// The parts in CycloneDX 1.5.
    pub(super) fn sbom(&self) -> Result<String> {
        let components = self.0.iter().map(|((name, version), package)| {
            let mut component = json!({
                "type": "library",
                "name": name,
                "version": version,
                "purl": format!("pkg:cargo/{name}@{version}"),
                "bom-ref": format!("pkg:cargo/{name}@{version}"),
                // Old manifests write "MIT/Apache-2.0", which SPDX writes with OR.
                "licenses": [{ "expression": package.licence.replace('/', " OR ") }],
            });
            if let Some(checksum) = &package.checksum {
                component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
            }
            if let Some(url) = &package.repository {
                component["externalReferences"] = json!([{ "type": "vcs", "url": url }]);
            }
            component
        });
        let sbom = json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": { "component": {
                "type": "application",
                "name": "spegel",
                "version": env!("CARGO_PKG_VERSION"),
                "bom-ref": "spegel",
                "licenses": [{ "expression": "MIT" }],
            } },
            "components": components.collect::<Vec<_>>(),
        });
        Ok(serde_json::to_string_pretty(&sbom)? + "\n")
    }

    /// Every package with its licence and the texts that it comes with; a text that several share stands once.
    pub(super) fn licences(&self) -> Result<String> {
        let mut text = "spegel contains the packages below, under these licences. The texts follow.\n\n".to_owned();
        let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for ((name, version), package) in &self.0 {
            writeln!(text, "{name} {version}: {}", package.licence)?;
            for found in licence_texts(&package.folder)? {
                texts.entry(found).or_default().insert(format!("{name} {version}"));
            }
        }
        for (licence, packages) in texts {
            let packages: Vec<String> = packages.into_iter().collect();
            write!(text, "\n{}\n{}\n\n{}\n", "=".repeat(80), packages.join(", "), licence.trim_end())?;
        }
        Ok(text)
    }
}

/// Adds what spegel links in: its normal dependencies and theirs, without those that build or test it.
fn add(
    found: &mut BTreeMap<(String, String), Package>,
    metadata: &Value,
    checksums: &BTreeMap<(String, String), String>,
) -> Result<()> {
    let by_id = |list: &Value| -> BTreeMap<String, Value> {
        let items = list.as_array().into_iter().flatten();
        items.map(|item| (item["id"].as_str().unwrap_or_default().to_owned(), item.clone())).collect()
    };
    let (packages, nodes) = (by_id(&metadata["packages"]), by_id(&metadata["resolve"]["nodes"]));
    let start =
        packages.iter().find(|(_, package)| package["name"] == "spegel").context("spegel is not in the workspace")?;
    let (mut todo, mut seen) = (vec![start.0.clone()], BTreeSet::new());
    while let Some(id) = todo.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        for dependency in nodes.get(&id).and_then(|node| node["deps"].as_array()).into_iter().flatten() {
            let kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
            if kinds.into_iter().any(|kind| kind["kind"].is_null()) {
                todo.push(dependency["pkg"].as_str().unwrap_or_default().to_owned());
            }
        }
        let package = packages.get(&id).with_context(|| format!("cargo does not describe {id}"))?;
        // The workspace's own packages have no source, and are spegel itself.
        if package["source"].is_null() {
            continue;
        }
        let text = |key: &str| package[key].as_str().map(str::to_owned);
        let (name, version) = (text("name").unwrap_or_default(), text("version").unwrap_or_default());
        let manifest = PathBuf::from(text("manifest_path").unwrap_or_default());
        let package = Package {
            licence: text("license").with_context(|| format!("{name} {version} does not name its licence"))?,
            repository: text("repository"),
            checksum: checksums.get(&(name.clone(), version.clone())).cloned(),
            folder: manifest.parent().unwrap_or(&manifest).to_owned(),
        };
        found.insert((name, version), package);
    }
    Ok(())
}

/// The checksums in Cargo.lock, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))?;
        Some(line.trim_matches('"').to_owned())
    };
    let blocks = lock.split("[[package]]");
    let entry = |block| Some(((value(block, "name")?, value(block, "version")?), value(block, "checksum")?));
    blocks.filter_map(entry).collect()
}

fn licence_texts(folder: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file()
            && ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"].iter().any(|kind| name.starts_with(kind))
        {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_parts_are_those_of_the_binary() {
        let dependencies = Dependencies::read(crate::root()).unwrap();
        let names: BTreeSet<&str> = dependencies.0.keys().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains("hyper") && names.contains("libp2p"), "{names:?}");
        // A tool of the tests, one of the build, and one of another system.
        for absent in ["proptest", "tonic-prost-build", "windows-sys", "spegel"] {
            assert!(!names.contains(absent), "{absent}");
        }
        let sbom: Value = serde_json::from_str(&dependencies.sbom().unwrap()).unwrap();
        let components = sbom["components"].as_array().unwrap();
        assert_eq!(components.len(), dependencies.0.len());
        assert!(components.iter().all(|component| component["hashes"][0]["content"].as_str().unwrap().len() == 64));
        let licences = dependencies.licences().unwrap();
        assert!(licences.contains("hyper 1.") && licences.contains("Permission is hereby granted"));
    }
}
