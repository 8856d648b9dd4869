//! A disk that fails on command: a read-only file system over a folder of files, by FUSE.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, Request,
};
use rustix::mount::UnmountFlags;

use super::DiskFault;

/// How long the kernel may believe what it is told of names and sizes.
const LIFETIME: Duration = Duration::from_secs(1);
/// The longest that a read that hangs is held; it would keep its process from ending.
const HELD: Duration = Duration::from_secs(120);
/// The number of the first file; before it comes the folder's.
const FIRST: u64 = 2;

/// A mounted folder. Unmounted when dropped.
#[derive(Debug)]
pub(super) struct Disk {
    at: PathBuf,
    fault: Arc<Mutex<DiskFault>>,
    session: Option<BackgroundSession>,
}

/// The files of a folder, which does not change.
struct Folder {
    files: Vec<(String, PathBuf, u64)>,
    fault: Arc<Mutex<DiskFault>>,
}

/// Whether there can be such a disk.
///
/// # Errors
/// What is missing.
pub(super) fn available() -> Result<(), String> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map(|_| ())
        .map_err(|error| format!("no file systems of our own: /dev/fuse: {error}"))
}

fn get(fault: &Mutex<DiskFault>) -> DiskFault {
    *fault.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Disk ===

impl Disk {
    /// Mounts what is in `files` over the folder `at`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn mount(files: &Path, at: &Path) -> Result<Self> {
        let fault = Arc::new(Mutex::new(DiskFault::None));
        let mut entries = Vec::new();
        for entry in fs::read_dir(files)? {
            let entry = entry?;
            entries.push((entry.file_name().to_string_lossy().into_owned(), entry.path(), entry.metadata()?.len()));
        }
        let folder = Folder { files: entries, fault: Arc::clone(&fault) };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("spegel-faults".into())];
        let session = fuser::spawn_mount(folder, at, &config).with_context(|| format!("mount {}", at.display()))?;
        Ok(Self { at: at.to_owned(), fault, session: Some(session) })
    }

    /// Does this from now on.
    pub(super) fn set(&self, fault: DiskFault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever waits for a read must not wait for ever.
        self.set(DiskFault::Error);
        // A process that is being started elsewhere has our open files until it runs its program; they must not keep the folder.
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).ok();
        if let Some(session) = self.session.take() {
            session.umount_and_join().ok();
        }
    }
}

// === impl Folder ===

impl Folder {
    fn file(&self, ino: INodeNo) -> Option<&(String, PathBuf, u64)> {
        self.files.get(usize::try_from(u64::from(ino).checked_sub(FIRST)?).ok()?)
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, size, perm) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0, 0o755),
            ino => (FileType::RegularFile, self.file(ino)?.2, 0o444),
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Folder {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.files.iter().position(|(known, ..)| parent == INodeNo::ROOT && OsStr::new(known) == name);
        let attributes = found.and_then(|number| self.attributes(INodeNo(FIRST + number as u64)));
        match attributes {
            Some(attributes) => reply.entry(&LIFETIME, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&LIFETIME, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let own = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = self.files.iter().enumerate();
        let files = files.map(|(n, (name, ..))| (INodeNo(FIRST + n as u64), FileType::RegularFile, name.as_str()));
        for (number, (ino, kind, name)) in own.into_iter().chain(files).enumerate().skip(offset as usize) {
            if reply.add(ino, number as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some((_, path, _)) = self.file(ino) else { return reply.error(Errno::ENOENT) };
        let (path, fault) = (path.clone(), Arc::clone(&self.fault));
        // Each by itself, so that none waits for another's.
        thread::spawn(move || {
            let pause = match get(&fault) {
                DiskFault::Slow(rate) => Duration::from_secs_f64(f64::from(size) / rate as f64),
                DiskFault::Hangs => HELD,
                DiskFault::None | DiskFault::Error => Duration::ZERO,
            };
            let since = Instant::now();
            while since.elapsed() < pause && matches!(get(&fault), DiskFault::Slow(_) | DiskFault::Hangs) {
                thread::sleep(Duration::from_millis(20));
            }
            if matches!(get(&fault), DiskFault::Error | DiskFault::Hangs) {
                return reply.error(Errno::EIO);
            }
            let mut bytes = vec![0; size as usize];
            match File::open(path).and_then(|file| file.read_at(&mut bytes, offset)) {
                Ok(length) => reply.data(&bytes[..length]),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_disk_gives_what_is_there_until_it_is_told_to_fail() {
        if let Err(reason) = available() {
            println!("skipped: {reason}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (files, at) = (folder.path().join("files"), folder.path().join("at"));
        fs::create_dir(&files).unwrap();
        fs::create_dir(&at).unwrap();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n >> 3) as u8).collect();
        fs::write(files.join("one"), &bytes).unwrap();
        let disk = match Disk::mount(&files, &at) {
            Ok(disk) => disk,
            Err(error) => {
                println!("skipped: {error:#}");
                return;
            }
        };
        assert_eq!(fs::read_dir(&at).unwrap().count(), 1);
        let file = File::open(at.join("one")).unwrap();
        let mut some = vec![0; 1000];
        file.read_exact_at(&mut some, 500_000).unwrap();
        assert_eq!(some, bytes[500_000..501_000]);
        disk.set(DiskFault::Error);
        assert!(file.read_at(&mut some, 2_900_000).is_err());
        disk.set(DiskFault::None);
        assert_eq!(file.read_at(&mut some, 2_900_000).unwrap(), 1000);
        drop(disk);
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0, "an open file keeps the folder");
        assert!(file.read_at(&mut some, 1_500_000).is_err());
    }
}
