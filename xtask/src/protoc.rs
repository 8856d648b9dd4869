//! Hands the protobuf compiler of a crate over to build scripts, which find it through `xtask/protoc`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

/// Unpacks protoc and the protobuf files that come with it to `target/protoc`, if they are not there.
///
/// # Errors
/// The crate has no protoc for this machine, and none is installed.
pub(crate) fn hand_over() -> Result<()> {
    let folder = crate::root().join("target/protoc");
    let program = match protoc_bin_vendored::protoc_bin_path() {
        Ok(program) => program,
        Err(_) if ["/usr/bin/protoc", "/usr/local/bin/protoc"].iter().any(|path| Path::new(path).exists()) => {
            return Ok(());
        }
        Err(error) => return Err(anyhow!("{error}: install the package protobuf-compiler")),
    };
    let target = folder.join("bin/protoc");
    if same_size(&program, &target) {
        return Ok(());
    }
    copy_folder(&protoc_bin_vendored::include_path()?, &folder.join("include"))?;
    fs::create_dir_all(folder.join("bin"))?;
    // Beside and renamed: a build that runs at the same time sees all of it or nothing.
    let part = tempfile::NamedTempFile::new_in(folder.join("bin"))?;
    fs::copy(&program, part.path()).with_context(|| format!("copy {}", program.display()))?;
    fs::set_permissions(part.path(), fs::Permissions::from_mode(0o755))?;
    part.persist(&target)?;
    Ok(())
}

fn same_size(a: &Path, b: &Path) -> bool {
    matches!((fs::metadata(a), fs::metadata(b)), (Ok(a), Ok(b)) if a.len() == b.len())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
