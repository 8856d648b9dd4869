//! Changes of files such that an interruption leaves the old or the new state, each of which can be made to fail by tests.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::HostsError;

/// Called before each change with what it is; an error stops there.
pub(super) type Hook<'a> = &'a mut dyn FnMut(&'static str) -> io::Result<()>;

/// The name under which a file is written before it takes its place.
const LEFTOVER: &str = ".hosts.toml.spegel";

/// The largest file that is read, in bytes: far beyond any configuration.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// How long another run is waited for; one takes milliseconds, on a busy disk seconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether it has ended.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// The file system, for changes.
pub(super) struct Disk<'a> {
    hook: Hook<'a>,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostsError {
    let path = path.to_owned();
    move |source| HostsError::Io { action, path, source }
}

/// Turns "not there" into nothing.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file's content; nothing if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, HostsError> {
    let Some(found) = if_there(fs::metadata(path)).map_err(failed("read", path))? else {
        return match fs::symlink_metadata(path) {
            // What it stands for may come back, and must not be forgotten.
            Ok(_) => {
                Err(failed("read", path)(io::Error::new(io::ErrorKind::NotFound, "a link whose target is not there")))
            }
            Err(_) => Ok(None),
        };
    };
    // Reading a pipe would wait for a writer.
    if !found.is_file() {
        return Err(failed("read", path)(io::Error::new(io::ErrorKind::InvalidInput, "not a file")));
    }
    if found.len() > MAX_FILE_BYTES {
        return Err(failed("read", path)(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB")));
    }
    if_there(fs::read(path)).map_err(failed("read", path))
}

/// The names in a directory, sorted; none if it is not there.
pub(super) fn entries(directory: &Path) -> Result<BTreeSet<OsString>, HostsError> {
    let Some(entries) = if_there(fs::read_dir(directory)).map_err(failed("list", directory))? else {
        return Ok(BTreeSet::new());
    };
    entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()
        .map_err(failed("list", directory))
}

/// The names of the directories in a directory.
pub(super) fn directories(directory: &Path) -> Result<BTreeSet<PathBuf>, HostsError> {
    let entries = entries(directory)?;
    Ok(entries.into_iter().filter(|name| directory.join(name).is_dir()).map(PathBuf::from).collect())
}

/// The names of the files in a directory.
pub(super) fn files(directory: &Path) -> Result<BTreeSet<OsString>, HostsError> {
    let entries = entries(directory)?;
    Ok(entries.into_iter().filter(|name| directory.join(name).is_file()).collect())
}

/// Whether nothing but what an interrupted [`replace`](Disk::replace) left is in a directory.
pub(super) fn has_leftover_only(directory: &Path) -> Result<bool, HostsError> {
    Ok(entries(directory)?.iter().eq([LEFTOVER]))
}

/// Keeps other runs out of a directory while the file lives that is returned; nothing if the directory is not there.
///
/// The lock is flock(2)'s on the directory itself, which pods that mount it share, and which ends with its process.
pub(super) fn lock(directory: &Path) -> Result<Option<File>, HostsError> {
    lock_within(directory, LOCK_PATIENCE)
}

pub(super) fn lock_within(directory: &Path, patience: Duration) -> Result<Option<File>, HostsError> {
    let end = Instant::now() + patience;
    loop {
        let Some(file) = if_there(File::open(directory)).map_err(failed("open", directory))? else { return Ok(None) };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                thread::sleep(LOCK_POLL);
                continue;
            }
            Err(Errno::WOULDBLOCK) => return Err(HostsError::Busy(directory.to_owned())),
            Err(error) => return Err(failed("lock", directory)(error.into())),
        }
        let locked = file.metadata().map_err(failed("read", directory))?;
        match if_there(fs::metadata(directory)).map_err(failed("read", directory))? {
            Some(now) if (now.dev(), now.ino()) == (locked.dev(), locked.ino()) => return Ok(Some(file)),
            // What was locked is no longer there.
            _ => {}
        }
    }
}

fn sync(directory: &Path) -> Result<(), HostsError> {
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("sync", directory))
}

fn sync_parent(path: &Path) -> Result<(), HostsError> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync)
}

// === impl Disk ===

impl<'a> Disk<'a> {
    pub(super) fn new(hook: Hook<'a>) -> Self {
        Self { hook }
    }

    fn step(&mut self, action: &'static str, path: &Path) -> Result<(), HostsError> {
        (self.hook)(action).map_err(failed(action, path))
    }

    /// Makes a directory and those above it, where they are not there.
    pub(super) fn create_directory(&mut self, path: &Path) -> Result<(), HostsError> {
        if path.is_dir() {
            return Ok(());
        }
        self.step("create", path)?;
        fs::create_dir_all(path).map_err(failed("create", path))?;
        sync_parent(path)
    }

    /// Makes an empty file. Others may have made it, or taken its directory away: what counts is looked at under the lock.
    pub(super) fn create_file(&mut self, path: &Path) -> Result<(), HostsError> {
        self.step("create", path)?;
        match if_there(File::create_new(path)) {
            Ok(Some(_)) => sync_parent(path),
            Ok(None) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed("create", path)(error)),
        }
    }

    /// Gives a file a new content, at once. A secret one is for its owner only.
    pub(super) fn replace(&mut self, path: &Path, content: &[u8], secret: bool) -> Result<(), HostsError> {
        let beside = path.with_file_name(LEFTOVER);
        self.step("write", &beside)?;
        // A new file, so that its mode is the one asked for and a link is not followed.
        if_there(fs::remove_file(&beside)).map_err(failed("remove", &beside))?;
        let mode = if secret { 0o600 } else { 0o644 };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)
            .map_err(failed("create", &beside))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write", &beside))?;
        self.rename(&beside, path)
    }

    /// Moves a file over another.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> Result<(), HostsError> {
        self.step("move", from)?;
        fs::rename(from, to).map_err(failed("move", from))?;
        sync_parent(to)?;
        sync_parent(from)
    }

    /// Gives a file a second name, under which it outlasts what replaces it.
    pub(super) fn link(&mut self, from: &Path, to: &Path) -> Result<(), HostsError> {
        self.step("link", from)?;
        match fs::read_link(from) {
            // A relative link would mean another file at another place.
            Ok(target) => std::os::unix::fs::symlink(from.parent().unwrap_or(Path::new("")).join(target), to),
            Err(_) => fs::hard_link(from, to),
        }
        .map_err(failed("link", from))?;
        sync_parent(to)
    }

    /// Removes a file.
    pub(super) fn remove(&mut self, path: &Path) -> Result<(), HostsError> {
        self.step("remove", path)?;
        if_there(fs::remove_file(path)).map_err(failed("remove", path))?;
        sync_parent(path)
    }

    /// Removes what an interrupted [`replace`](Self::replace) left, and says whether there was anything.
    pub(super) fn remove_leftover(&mut self, directory: &Path) -> Result<bool, HostsError> {
        let path = directory.join(LEFTOVER);
        let is_there = path.symlink_metadata().is_ok();
        if is_there {
            self.remove(&path)?;
        }
        Ok(is_there)
    }

    /// Removes a directory if nothing is in it.
    pub(super) fn remove_empty_directory(&mut self, path: &Path) -> Result<(), HostsError> {
        if !path.is_dir() || !entries(path)?.is_empty() {
            return Ok(());
        }
        self.step("remove", path)?;
        match fs::remove_dir(path) {
            // Somebody was faster, and put something in; or it is mounted, as in a pod.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => {
                Ok(())
            }
            result => result.map_err(failed("remove", path)).and_then(|()| sync_parent(path)),
        }
    }
}
