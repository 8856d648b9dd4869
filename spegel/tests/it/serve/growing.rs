//! Bodies from files that are still being written.

use std::os::unix::fs::FileExt;

use spegel::zerocopy::{Growing, Progress};
use tokio::sync::watch;

use super::*;

const MIB: usize = 1 << 20;

/// A file of which more and more is there.
struct Writer {
    bytes: Vec<u8>,
    file: Arc<File>,
    progress: watch::Sender<Progress>,
}

impl Writer {
    fn new(bytes: Vec<u8>) -> Self {
        let progress = watch::Sender::new(Progress { position: 0, ended: false });
        Self { bytes, file: file_of(&[]), progress }
    }

    fn body(&self, from: usize, len: usize) -> Body {
        Body::growing(Growing::new(self.file.clone(), self.progress.subscribe()), from as u64, len as u64)
    }

    fn write_to(&self, end: usize) {
        let from = usize::try_from(self.file.metadata().unwrap().len()).unwrap();
        self.file.write_all_at(&self.bytes[from..end], from as u64).unwrap();
        self.progress.send_replace(Progress { position: end as u64, ended: end == self.bytes.len() });
    }

    fn give_up(&self) {
        self.progress.send_modify(|progress| progress.ended = true);
    }
}

#[tokio::test]
async fn bytes_come_as_they_are_written() {
    for mode in modes() {
        let (fixture, writer) = (Fixture::new(mode), Writer::new(noise(9 * MIB + 3)));
        let mut client = fixture.connect().await;
        fixture.then(writer.body(0, writer.bytes.len()));
        client.get().await;
        assert_eq!(client.head().await.length(), writer.bytes.len() as u64, "before the first byte");
        let mut had = 0;
        for end in [1, 4096, 5000, MIB, 6 * MIB + 1, writer.bytes.len()] {
            writer.write_to(end);
            same(&client.exactly(end - had).await, &writer.bytes[had..end]);
            assert!(client.buf.is_empty(), "nothing that is not written");
            had = end;
        }
        // The connection is at the next response then.
        fixture.then(text("next"));
        assert_eq!(client.fetch().await.1, b"next");
    }
}

#[tokio::test]
async fn a_commit_by_rename_is_not_noticed() {
    for mode in modes() {
        let folder = tempfile::tempdir().unwrap();
        let (data, blob) = (folder.path().join("data"), folder.path().join("blob"));
        let file = Arc::new(File::options().create(true).truncate(true).read(true).write(true).open(&data).unwrap());
        let writer = Writer { file, ..Writer::new(noise(3 * MIB)) };
        let fixture = Fixture::new(mode);
        fixture.then(writer.body(0, writer.bytes.len()));
        let mut client = fixture.connect().await;
        client.get().await;
        client.head().await;
        writer.write_to(MIB);
        same(&client.exactly(MIB).await, &writer.bytes[..MIB]);
        std::fs::rename(&data, &blob).unwrap();
        writer.write_to(writer.bytes.len());
        same(&client.exactly(2 * MIB).await, &writer.bytes[MIB..]);
        std::fs::remove_file(&blob).unwrap();
    }
}

#[tokio::test]
async fn ranges_wait_for_their_bytes_and_need_no_others() {
    for mode in modes() {
        let (fixture, writer) = (Fixture::new(mode), Writer::new(noise(3 * MIB)));
        writer.write_to(MIB);
        let mut client = fixture.connect().await;
        for (from, len) in [(0, 0), (10, 1000), (MIB - 1, 1)] {
            fixture.then(writer.body(from, len));
            same(&client.fetch().await.1, &writer.bytes[from..from + len]);
        }
        let (from, len) = (2 * MIB + 7, 1000);
        fixture.then(writer.body(from, len));
        client.get().await;
        client.head().await;
        writer.write_to(2 * MIB);
        fixture.then(writer.body(MIB, 5));
        same(&fixture.connect().await.fetch().await.1, &writer.bytes[MIB..MIB + 5]);
        assert!(client.buf.is_empty());
        writer.write_to(from + len);
        same(&client.exactly(len).await, &writer.bytes[from..from + len]);
    }
}

#[tokio::test]
async fn a_writer_that_gives_up_ends_in_an_orderly_close_after_what_came() {
    for mode in modes() {
        for before in [0, 2 * MIB] {
            let (fixture, writer) = (Fixture::new(mode), Writer::new(noise(3 * MIB)));
            fixture.then(writer.body(0, writer.bytes.len()));
            let mut client = fixture.connect().await;
            client.get().await;
            client.head().await;
            writer.write_to(before);
            writer.give_up();
            let (got, ended) = client.rest().await;
            assert_eq!(ended, Ended::Fin);
            same(&got, &writer.bytes[..before]);
            fixture.quiet().await;
        }
    }
}

#[tokio::test]
async fn news_that_end_without_a_word_end_the_body() {
    let (fixture, writer) = (Fixture::new(modes()[0]), Writer::new(noise(3 * MIB)));
    fixture.then(writer.body(0, writer.bytes.len()));
    let mut client = fixture.connect().await;
    client.get().await;
    client.head().await;
    drop(writer);
    assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
}

#[tokio::test]
async fn a_file_that_starts_over_ends_the_body() {
    for mode in modes() {
        let (fixture, writer) = (Fixture::new(mode), Writer::new(noise(30 * MIB)));
        writer.write_to(20 * MIB);
        fixture.then(writer.body(0, writer.bytes.len()));
        let mut client = fixture.connect_narrow().await;
        client.get().await;
        client.head().await;
        let start = client.exactly(100_000).await;
        writer.file.set_len(0).unwrap();
        let (rest, ended) = client.rest().await;
        assert_eq!(ended, Ended::Fin);
        let got = [start, rest].concat();
        assert!(got.len() < 20 * MIB);
        same(&got, &writer.bytes[..got.len()]);
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_nothing_comes_is_noticed() {
    let (fixture, writer) = (Fixture::new(modes()[0]), Writer::new(noise(3 * MIB)));
    fixture.then(writer.body(0, writer.bytes.len()));
    let mut client = fixture.connect().await;
    client.get().await;
    client.head().await;
    drop(client);
    writer.write_to(MIB);
    // A reset answers what is sent to it.
    until("the server sees that", || fixture.server.metrics().open() == 0 || writer.progress.receiver_count() == 0)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_clients_follow_one_file() {
    let (fixture, writer) = (Fixture::with(Options { runtimes: 2, ..Options::default() }), Writer::new(noise(4 * MIB)));
    let mut clients = Vec::new();
    for _ in 0..64 {
        fixture.then(writer.body(0, writer.bytes.len()));
        let mut client = fixture.connect().await;
        clients.push(tokio::spawn(async move { client.fetch().await.1 }));
    }
    for end in 1..=64 {
        writer.write_to(end * MIB / 16);
        tokio::task::yield_now().await;
    }
    for client in clients {
        same(&client.await.unwrap(), &writer.bytes);
    }
}
