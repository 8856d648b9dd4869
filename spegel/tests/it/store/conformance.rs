//! The checks that every store passes.

use super::*;

/// Runs all checks, each with images of its own.
pub(super) async fn conforms(host: &mut impl Host) {
    what_was_there_before(host).await;
    what_comes_and_goes(host).await;
    partial_image(host).await;
    shared_content(host).await;
    filtered(host).await;
    unread_changes_cancel_out(host).await;
    the_end(host).await;
}

async fn what_was_there_before(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/before:v1", 1);
    host.put(&image);
    let store = host.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&image)).await;

    assert_eq!(store.resolve(&tag(&image)).unwrap().as_str(), image.root().digest);
    assert_eq!(store.resolve(&"registry.test/before:v2".parse().unwrap()), None);
    for content in image.contents() {
        let bytes = bytes(&store, &content.digest.parse().unwrap()).await.expect("served");
        assert_eq!(bytes.len() as u64, content.size);
    }
    let absent: Digest = digest_of(b"nobody has this").parse().unwrap();
    assert!(store.open(&absent, None).await.unwrap().is_none());
    assert!(store.open(&absent, Some(&repository(&image))).await.unwrap().is_none());
    assert_eq!(store.referrers(&absent).await.unwrap(), []);
    let offered = &store.offered()["registry.test"];
    assert_eq!((offered.image_tags, offered.image_digests, offered.content_digests), (1, 1, 4));
    host.remove(&image);
}

async fn what_comes_and_goes(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test:5000/team/later:v1", 2);
    let store = host.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    assert_eq!(store.resolve(&tag(&image)), None);

    host.put(&image);
    follower.until_all(&keys(&image)).await;
    assert_eq!(store.resolve(&tag(&image)).unwrap().as_str(), image.root().digest);

    let held = store.open(&image.contents()[0].digest.parse().unwrap(), None).await.unwrap().expect("served");
    host.remove(&image);
    follower.until_none(&keys(&image)).await;
    assert_eq!(store.resolve(&tag(&image)), None);
    for digest in digests(&image) {
        assert_eq!(bytes(&store, &digest).await, None, "{digest}");
    }
    assert_eq!(held.file.metadata().unwrap().len(), held.size, "who has it open keeps it");
}

async fn partial_image(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let whole = multi_platform(&folder, "registry.test/partial:v1", 3);
    let part = whole.only(spegel_benches::image::host_platform()).unwrap();
    host.put(&part);
    let store = host.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&part)).await;
    assert_eq!(store.resolve(&tag(&whole)).unwrap().as_str(), whole.root().digest);
    for absent in digests(&whole).difference(&digests(&part)) {
        assert!(!follower.held.contains(&absent.clone().into()));
        assert_eq!(bytes(&store, absent).await, None);
    }

    host.put(&whole);
    follower.until_all(&keys(&whole)).await;
    host.remove(&whole);
    follower.until_none(&keys(&whole)).await;
}

async fn shared_content(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let one = image(&folder, "registry.test/one:v1", 4);
    let two = one.renamed("registry.test/two:v1").unwrap();
    let store = host.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    host.put(&one);
    host.put(&two);
    follower.until_all(&keys(&one)).await;
    follower.until_all(&keys(&two)).await;
    host.remove(&one);
    follower.until("the tag removed", |held| !held.contains(&tag(&one).into())).await;
    follower.until_all(&keys(&two)).await;
    for digest in digests(&two) {
        assert!(bytes(&store, &digest).await.is_some(), "{digest}");
    }
    host.remove(&two);
    follower.until_none(&keys(&two)).await;
}

async fn filtered(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let secret = image(&folder, "registry.test/secret:v1", 5);
    let open = image(&folder, "registry.test/open:v1", 6);
    host.put(&secret);
    host.put(&open);
    let store = host.store(without("^registry\\.test/secret"));
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&open)).await;
    assert!(keys(&secret).is_disjoint(&follower.held));
    assert_eq!(store.resolve(&tag(&secret)), None);
    for digest in digests(&secret) {
        assert_eq!(bytes(&store, &digest).await, None);
        assert_eq!(bytes_for(&store, &digest, Some(&repository(&open))).await, None, "whatever name it is asked by");
    }
    host.remove(&secret);
    host.remove(&open);
    follower.until_none(&keys(&open)).await;
}

async fn unread_changes_cancel_out(host: &mut impl Host) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/brief:v1", 7);
    let store = host.store(everything());
    until_ready(&store).await;
    // Subscribers are told in the order in which they came: what the second knows, the first was told.
    let (mut idle, mut busy) = (Follower::new(&store), Follower::new(&store));
    host.put(&image);
    busy.until_all(&keys(&image)).await;
    host.remove(&image);
    busy.until_none(&keys(&image)).await;
    if let Some(change) = idle.told() {
        panic!("nothing is different, but told {change:?}");
    }
}

async fn the_end(host: &mut impl Host) {
    let store = host.store(everything());
    until_ready(&store).await;
    let mut changes = store.subscribe();
    drop(store);
    let end = async { while changes.next().await.is_some() {} };
    assert!(tokio::time::timeout(DEADLINE, end).await.is_ok(), "subscriptions end with the store");
}
