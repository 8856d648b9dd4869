//! A file that somebody is still writing as the source of a body.

use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::watch;
use tokio_util::sync::ReusableBoxFuture;

use super::error::BodyError;
use super::file::FileSource;
use super::ops::{Client, Push, Settings};

/// How far a file has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are there, from the file's beginning on.
    pub position: u64,
    /// No more will come: the file is complete, or its writer gave up.
    pub ended: bool,
}

/// A file that is written from front to back by somebody else, and how far that is. Bytes that were written stay as they are.
#[derive(Clone, Debug)]
pub struct Growing {
    file: Arc<File>,
    progress: watch::Receiver<Progress>,
    /// True once no more of it is to be given.
    away: Option<watch::Receiver<bool>>,
}

// === impl Growing ===

impl Growing {
    /// A file with the news of its writer. The end of the news is the end of the file.
    #[must_use]
    pub fn new(file: Arc<File>, progress: watch::Receiver<Progress>) -> Self {
        Self { file, progress, away: None }
    }

    /// A file of this length that is all there.
    #[must_use]
    pub fn whole(file: Arc<File>, len: u64) -> Self {
        let (_, progress) = watch::channel(Progress { position: len, ended: true });
        Self::new(file, progress)
    }

    /// The same, of which no more is given once `away` is true: a body of it then ends as if the writer gave up.
    #[must_use]
    pub fn until(self, away: watch::Receiver<bool>) -> Self {
        Self { away: Some(away), ..self }
    }

    /// How far it is now.
    #[must_use]
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    pub(super) fn into_source(self, offset: u64, len: u64, settings: &Settings) -> GrowingSource {
        let Self { file, progress, away } = self;
        let news = News { waiting: ReusableBoxFuture::new(changed(progress.clone(), away.clone())), progress, away };
        GrowingSource { file: FileSource::new(file, offset, len, settings), end: offset + len, news }
    }
}

/// What is left of a range of a growing file.
pub(super) struct GrowingSource {
    file: FileSource,
    end: u64,
    news: News,
}

// === impl GrowingSource ===

impl GrowingSource {
    pub(super) fn left(&self) -> u64 {
        self.file.left()
    }

    /// Whether bytes are there now; else the task is woken once they are.
    pub(super) fn at_hand(&mut self, cx: &mut Context<'_>) -> bool {
        matches!(self.poll_there(cx), Poll::Ready(Ok(_))) && self.file.at_hand(cx)
    }

    pub(super) fn push(&mut self, cx: &mut Context<'_>, client: &Client<'_>, max: usize) -> io::Result<Push> {
        match self.poll_there(cx) {
            Poll::Ready(Ok(there)) => self.file.push(cx, client, usize::try_from(there).unwrap_or(usize::MAX).min(max)),
            Poll::Ready(Err(error)) => Err(error.into()),
            Poll::Pending => Ok(Push::Waiting),
        }
    }

    /// How many bytes can be sent, at least one.
    fn poll_there(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64, BodyError>> {
        let next = self.end - self.file.left();
        loop {
            let Progress { position, ended } = *self.news.progress.borrow();
            if self.news.is_sent_away() {
                return Poll::Ready(Err(BodyError::Abandoned { missing: self.file.left() }));
            }
            if position > next {
                return Poll::Ready(Ok(position - next));
            }
            if ended || ready!(self.news.poll(cx)).is_err() {
                return Poll::Ready(Err(BodyError::Abandoned { missing: self.file.left() }));
            }
        }
    }
}

/// What is told of the file. The future has receivers of its own, which have seen no more than the others.
struct News {
    progress: watch::Receiver<Progress>,
    away: Option<watch::Receiver<bool>>,
    waiting: ReusableBoxFuture<'static, Told>,
}

type Told = (watch::Receiver<Progress>, Option<watch::Receiver<bool>>, Result<(), watch::error::RecvError>);

async fn changed(mut progress: watch::Receiver<Progress>, mut away: Option<watch::Receiver<bool>>) -> Told {
    let sent_away = async {
        let is_sent = match &mut away {
            Some(away) => away.wait_for(|is_away| *is_away).await.is_ok(),
            None => false,
        };
        // Who could send it away may have ended: nobody does any more.
        if !is_sent {
            std::future::pending::<()>().await;
        }
    };
    let told = tokio::select! {
        told = progress.changed() => told,
        () = sent_away => Ok(()),
    };
    (progress, away, told)
}

impl News {
    fn is_sent_away(&self) -> bool {
        self.away.as_ref().is_some_and(|away| *away.borrow())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), watch::error::RecvError>> {
        let (progress, away, told) = ready!(Pin::new(&mut self.waiting).poll(cx));
        self.waiting.set(changed(progress, away));
        Poll::Ready(told)
    }
}
