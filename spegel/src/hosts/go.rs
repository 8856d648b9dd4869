//! What the Go program leaves below `config_path`, and taking it back.
//!
//! It moves everything that it finds there into `_backup`, whole, and then makes a directory with a `hosts.toml` for each registry. Its
//! files have no mark: they are known by their shape, and only beside a `_backup` that is not ours. What is in a `_backup` that was once
//! known as its is marked by a hidden file, so that an interrupted run is gone on with when its files are gone already.

use std::path::{Path, PathBuf};

use super::disk::{self, Content};
use super::{BACKUP, HOSTS, HostsError, MADE, Run, render};

/// Stands in a `_backup` of the Go program whose content is being put back.
const TAKEN: &str = ".taken-over-by-spegel";

/// Its `_backup`, if there is one.
pub(super) fn backup(root: &Path) -> Result<Option<PathBuf>, HostsError> {
    let backup = root.join(BACKUP);
    if !disk::is_real_directory(&backup) || disk::is_there(&backup.join(MADE)) {
        return Ok(None);
    }
    if disk::is_there(&backup.join(TAKEN)) {
        return Ok(Some(backup));
    }
    for name in disk::directories(root)? {
        if let Content::Bytes(content) = disk::read(&root.join(&name).join(HOSTS))?
            && render::read_marker(&content).is_none()
            && render::is_of_go(&content, None).is_some()
        {
            return Ok(Some(backup));
        }
    }
    Ok(None)
}

/// Takes its files away, and puts back everything that it had moved into `backup`.
pub(super) fn take_back(run: &mut Run<'_>, backup: &Path) -> Result<(), HostsError> {
    run.disk.create_file(&backup.join(TAKEN))?;
    for name in disk::directories(run.root)? {
        if name != Path::new(BACKUP) {
            remove_file(run, backup, &name)?;
        }
    }
    for entry in disk::entries(backup)? {
        if entry != TAKEN {
            restore(run, &backup.join(&entry), &run.root.join(&entry))?;
        }
    }
    if disk::entries(backup)?.iter().eq([TAKEN]) {
        run.disk.remove_with_directory(backup, TAKEN)?;
    }
    Ok(())
}

/// Takes its file in one directory away, if it is one.
fn remove_file(run: &mut Run<'_>, backup: &Path, name: &Path) -> Result<(), HostsError> {
    let (directory, place) = (run.root.join(name), run.root.join(name).join(HOSTS));
    let Content::Bytes(content) = disk::read(&place)? else { return Ok(()) };
    if render::read_marker(&content).is_some() {
        return Ok(());
    }
    let before = match disk::read_kept(&backup.join(name).join(HOSTS), &place)? {
        Content::Bytes(before) => Some(before),
        _ => None,
    };
    let Some(pristine) = render::is_of_go(&content, before.as_deref()) else { return Ok(()) };
    if !pristine {
        run.set_aside(name)?;
    }
    run.disk.remove_with_directory(&directory, HOSTS)?;
    run.report.removed.push(place);
    Ok(())
}

/// Moves an entry back to where it was, with all that is in it. What has come in its place meanwhile stays there.
fn restore(run: &mut Run<'_>, from: &Path, to: &Path) -> Result<(), HostsError> {
    if !disk::is_there(to) {
        run.disk.rename(from, to)?;
        run.report.restored.push(to.to_owned());
    } else if disk::is_real_directory(from) && to.is_dir() {
        for entry in disk::entries(from)? {
            restore(run, &from.join(&entry), &to.join(&entry))?;
        }
        run.disk.remove_empty_directory(from)?;
    } else {
        run.report.left_in_backup.push(from.to_owned());
    }
    Ok(())
}
