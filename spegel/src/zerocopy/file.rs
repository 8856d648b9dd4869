//! A range of a file as the source of a body.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

use super::error::BodyError;
use super::ops::{Client, Push, Transfer};
use super::stage::Stage;
use super::traffic::Way;

/// What is left of a file's range.
pub(super) struct FileSource {
    file: Arc<File>,
    offset: u64,
    left: u64,
    transfer: Transfer,
    stage: Option<Stage>,
}

impl FileSource {
    pub(super) fn new(file: Arc<File>, offset: u64, len: u64, transfer: Transfer) -> Self {
        Self { file, offset, left: len, transfer, stage: None }
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn push(&mut self, client: &Client<'_>, max: usize) -> io::Result<Push> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX).min(max);
        let moved = match self.transfer {
            Transfer::Zerocopy => match self.sendfile(client, max) {
                // A file system that sendfile(2) does not know, or a sandbox that refuses it.
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::NOSYS)) => {
                    self.transfer = Transfer::Copy;
                    self.copy(client, max)
                }
                other => other,
            },
            Transfer::Copy => self.copy(client, max),
        };
        match moved {
            Ok(n) => {
                self.offset += n as u64;
                self.left -= n as u64;
                Ok(Push::Moved(n))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Push::ClientFull),
            Err(error) => Err(error),
        }
    }

    fn sendfile(&self, client: &Client<'_>, max: usize) -> io::Result<usize> {
        let mut offset = self.offset;
        let n = client.io(|stream| Ok(rustix::fs::sendfile(stream, &*self.file, Some(&mut offset), max)?))?;
        if n == 0 {
            return Err(BodyError::Truncated { missing: self.left }.into());
        }
        client.traffic.add(Way::Sendfile, n);
        Ok(n)
    }

    fn copy(&mut self, client: &Client<'_>, max: usize) -> io::Result<usize> {
        let stage = self.stage.get_or_insert_with(Stage::new);
        if stage.held().is_empty() && stage.fill(max as u64, |buf| self.file.read_at(buf, self.offset))? == 0 {
            return Err(BodyError::Truncated { missing: self.left }.into());
        }
        let n = client.send(&stage.held()[..stage.held().len().min(max)])?;
        stage.take(n);
        client.traffic.add(Way::FileCopy, n);
        Ok(n)
    }
}
