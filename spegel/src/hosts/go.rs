//! What the Go program leaves below `config_path`, and taking it back.
//!
//! It moves everything that it finds there into `_backup`, whole, and then makes a directory with a `hosts.toml` for each registry. Its
//! files have no mark: they are known by their shape, and only beside a `_backup`, which is never ours. Hidden files in it say how far an
//! interrupted run had come.

use std::path::{Path, PathBuf};

use super::disk::{self, Content};
use super::{HOSTS, HostsError, Run, is_backup, render};

/// Its directory of what was there before.
pub(super) const BACKUP: &str = "_backup";
/// Stands in it once its files are known as the Go program's, and are being removed.
const TAKEN: &str = ".taken-over-by-spegel";
/// Stands in it once they are removed, and what is in it is being put back: what looks like them from then on is an administrator's.
pub(super) const RESTORING: &str = ".restored-by-spegel";

/// Its `_backup`, if there is one.
pub(super) fn backup(root: &Path) -> Result<Option<PathBuf>, HostsError> {
    let backup = root.join(BACKUP);
    if !disk::is_real_directory(&backup) {
        return Ok(None);
    }
    if [TAKEN, RESTORING].iter().any(|mark| disk::is_there(&backup.join(mark))) {
        return Ok(Some(backup));
    }
    for name in disk::directories(root)? {
        let path = root.join(&name).join(HOSTS);
        if !path.is_symlink()
            && let Content::Bytes(content) = disk::read(&path)?
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
    if !disk::is_there(&backup.join(RESTORING)) {
        run.disk.create_file(&backup.join(TAKEN))?;
        for name in disk::directories(run.root)? {
            if !is_backup(&name) {
                remove_file(run, backup, &name)?;
            }
        }
        run.disk.create_file(&backup.join(RESTORING))?;
    }
    run.disk.remove(&backup.join(TAKEN))?;
    for entry in disk::entries(backup)? {
        if entry != RESTORING {
            restore(run, &backup.join(&entry), &run.root.join(&entry))?;
        }
    }
    if disk::entries(backup)?.iter().eq([RESTORING]) {
        run.disk.remove_with_directory(backup, RESTORING)?;
    }
    Ok(())
}

/// Takes its file in one directory away, if it is one.
fn remove_file(run: &mut Run<'_>, backup: &Path, name: &Path) -> Result<(), HostsError> {
    let (directory, place) = (run.root.join(name), run.root.join(name).join(HOSTS));
    let Content::Bytes(content) = disk::read(&place)? else { return Ok(()) };
    if place.is_symlink() || render::read_marker(&content).is_some() {
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
