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

/// How the names of hidden directories end.
const HIDDEN: &str = ".made-by-spegel";

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

/// What is found at a path.
#[derive(Debug)]
pub(super) enum Content {
    /// Nothing is there.
    Nothing,
    /// A file.
    Bytes(Vec<u8>),
    /// Something that is no file, or one that cannot be read, and why: none of ours is.
    Opaque(HostsError),
}

/// What is at a path. Whatever an administrator has put there is an answer; an error is a disk that fails.
pub(super) fn read(path: &Path) -> Result<Content, HostsError> {
    let opaque = |kind, what: &str| Ok(Content::Opaque(failed("read", path)(io::Error::new(kind, what))));
    let found = match if_there(fs::metadata(path)) {
        Ok(Some(found)) => found,
        Ok(None) => {
            return match fs::symlink_metadata(path) {
                // In a pod that is any link out of the directory that it sees.
                Ok(_) => opaque(io::ErrorKind::NotFound, "a link whose target is not there"),
                Err(_) => Ok(Content::Nothing),
            };
        }
        Err(error) => return unreadable(path, error),
    };
    // Reading a pipe would wait for a writer.
    if !found.is_file() {
        return opaque(io::ErrorKind::InvalidInput, "not a file");
    }
    if found.len() > MAX_FILE_BYTES {
        return opaque(io::ErrorKind::FileTooLarge, "larger than 1 MiB");
    }
    match if_there(fs::read(path)) {
        Ok(content) => Ok(content.map_or(Content::Nothing, Content::Bytes)),
        Err(error) => unreadable(path, error),
    }
}

fn unreadable(path: &Path, error: io::Error) -> Result<Content, HostsError> {
    match Errno::from_io_error(&error) {
        Some(Errno::ACCESS | Errno::PERM | Errno::LOOP) => Ok(Content::Opaque(failed("read", path)(error))),
        _ => Err(failed("read", path)(error)),
    }
}

/// What is kept at a path for another place, to which a relative link belongs.
pub(super) fn read_kept(kept: &Path, place: &Path) -> Result<Content, HostsError> {
    match fs::read_link(kept) {
        Ok(target) => read(&place.parent().unwrap_or(Path::new("")).join(target)),
        Err(_) => read(kept),
    }
}

/// Whether anything is there, a link to nothing included.
pub(super) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Whether a directory is there, and no link to one.
pub(super) fn is_real_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}

/// Whether others than its owner may read a file.
pub(super) fn is_readable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.mode() & 0o044 != 0)
}

/// Whether two paths have the same: the same file, the same link, or the same bytes.
pub(super) fn is_same(one: &Path, other: &Path) -> Result<bool, HostsError> {
    let (Ok(first), Ok(second)) = (one.symlink_metadata(), other.symlink_metadata()) else { return Ok(false) };
    if (first.dev(), first.ino()) == (second.dev(), second.ino()) {
        return Ok(true);
    }
    if first.is_symlink() || second.is_symlink() {
        return Ok(matches!((fs::read_link(one), fs::read_link(other)), (Ok(one), Ok(other)) if one == other));
    }
    Ok(matches!((read(one)?, read(other)?), (Content::Bytes(one), Content::Bytes(other)) if one == other))
}

/// What is no directory cannot be a configuration path.
pub(super) fn check_directory(path: &Path) -> Result<(), HostsError> {
    if path.is_dir() { Ok(()) } else { Err(failed("list", path)(io::ErrorKind::NotADirectory.into())) }
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

/// The name under which a directory is made and goes, so that it is never there without its file. containerd does not look at it.
fn hidden(directory: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(directory.file_name().unwrap_or_default());
    name.push(HIDDEN);
    directory.with_file_name(name)
}

/// The directory that a hidden one was, or would have become.
fn unhidden(hidden: &Path) -> Option<PathBuf> {
    let name = hidden.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(HIDDEN)?;
    (!name.is_empty()).then(|| hidden.with_file_name(name))
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

    /// Gives what is at a path a second name, under which it outlasts what replaces it. What can have none is moved there.
    pub(super) fn keep(&mut self, from: &Path, to: &Path) -> Result<(), HostsError> {
        self.step("link", from)?;
        let kept = match (fs::read_link(from), is_real_directory(from)) {
            // With the same text, so that it is the same link when it comes back.
            (Ok(target), _) => std::os::unix::fs::symlink(target, to),
            (Err(_), true) => return self.rename(from, to),
            (Err(_), false) => fs::hard_link(from, to),
        };
        match kept {
            // The file is another user's (fs.protected_hardlinks), or the file system knows no second names.
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                self.rename(from, to)
            }
            kept => kept.map_err(failed("link", from)).and_then(|()| sync_parent(to)),
        }
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

    /// Makes a directory that has one file from its first moment on.
    pub(super) fn create_directory_with(
        &mut self,
        directory: &Path,
        name: &str,
        content: &[u8],
        secret: bool,
    ) -> Result<(), HostsError> {
        let hidden = hidden(directory);
        self.create_directory(&hidden)?;
        self.replace(&hidden.join(name), content, secret)?;
        self.rename(&hidden, directory)
    }

    /// Removes a file, and its directory with it if nothing else is in that.
    pub(super) fn remove_with_directory(&mut self, directory: &Path, name: &str) -> Result<(), HostsError> {
        if !is_real_directory(directory) || !entries(directory)?.iter().eq([name]) {
            return self.remove(&directory.join(name));
        }
        let hidden = hidden(directory);
        if is_there(&hidden) {
            // Another's, since ours are gone by now.
            self.remove(&directory.join(name))?;
            return self.remove_empty_directory(directory);
        }
        self.rename(directory, &hidden)?;
        self.finish(&hidden, &[name])
    }

    /// Ends what an interrupted run had begun with directories in `parent`; `names` are the files that they may have of ours.
    pub(super) fn finish_all(&mut self, parent: &Path, names: &[&str]) -> Result<(), HostsError> {
        for entry in entries(parent)? {
            let hidden = parent.join(entry);
            if unhidden(&hidden).is_some() && is_real_directory(&hidden) {
                self.finish(&hidden, names)?;
            }
        }
        Ok(())
    }

    /// A hidden directory goes; if somebody put something in it just before it was hidden, it comes back with that.
    fn finish(&mut self, hidden: &Path, names: &[&str]) -> Result<(), HostsError> {
        self.remove_leftover(hidden)?;
        for name in names.iter().filter(|name| is_there(&hidden.join(name))) {
            self.remove(&hidden.join(name))?;
        }
        self.remove_empty_directory(hidden)?;
        match unhidden(hidden) {
            Some(directory) if is_there(hidden) && !is_there(&directory) => self.rename(hidden, &directory),
            _ => Ok(()),
        }
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
