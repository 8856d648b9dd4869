//! The store of OCI image layouts.

use std::fs;
use std::path::Path;

use spegel::store::{OciLayout, StoreError};
use spegel_benches::image::remove_from_layout;

use super::*;

/// Layouts of which the first gets the images, and the others are empty.
struct Layouts {
    dirs: Vec<TempDir>,
}

impl Layouts {
    fn new(count: usize) -> Self {
        let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
        dirs.iter().for_each(|dir| make_empty(dir.path()));
        Self { dirs }
    }

    fn dir(&self) -> &Path {
        self.dirs[0].path()
    }

    fn open(&self, filters: Filters) -> Result<Arc<OciLayout>, StoreError> {
        OciLayout::open(self.dirs.iter().map(|dir| dir.path().to_owned()).collect(), filters)
    }

    /// The digests that the first layout's images name.
    fn named(&self) -> BTreeSet<String> {
        let text = fs::read_to_string(self.dir().join("index.json")).unwrap();
        let mut open: Vec<String> = digests_in(&text);
        let mut named = BTreeSet::new();
        while let Some(digest) = open.pop() {
            // Only manifests are JSON with digests in them.
            if let Ok(text) = fs::read_to_string(self.dir().join("blobs").join(digest.replace(':', "/"))) {
                open.extend(digests_in(&text));
            }
            named.insert(digest);
        }
        named
    }
}

fn digests_in(text: &str) -> Vec<String> {
    let candidates = text.match_indices("sha256:").filter_map(|(at, _)| text.get(at..at + 71));
    candidates.filter(|text| text.parse::<Digest>().is_ok()).map(str::to_owned).collect()
}

fn make_empty(dir: &Path) {
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(dir.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
}

impl Host for Layouts {
    fn put(&mut self, image: &Image) {
        image.write_layout(self.dir()).unwrap();
    }

    fn remove(&mut self, image: &Image) {
        remove_from_layout(self.dir(), image.reference()).unwrap();
        let named = self.named();
        for content in image.contents().iter().filter(|content| !named.contains(&content.digest)) {
            fs::remove_file(self.dir().join("blobs").join(content.digest.replace(':', "/"))).unwrap();
        }
    }

    fn store(&self, filters: Filters) -> Arc<dyn Store> {
        self.open(filters).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oci_layout_conforms() {
    conformance::conforms(&mut Layouts::new(1)).await;
    conformance::conforms(&mut Layouts::new(2)).await;
}

#[tokio::test]
async fn what_is_no_layout_is_refused_with_the_reason() {
    let error_after = |damage: fn(&Path)| {
        let layouts = Layouts::new(1);
        damage(layouts.dir());
        let error = layouts.open(everything()).unwrap_err().to_string();
        assert!(error.contains(&layouts.dir().display().to_string()), "names the directory: {error}");
        error
    };
    assert!(error_after(|dir| fs::remove_dir_all(dir).unwrap()).contains("No such file"));
    assert!(error_after(|dir| fs::remove_file(dir.join("oci-layout")).unwrap()).contains("oci-layout"));
    assert!(error_after(|dir| fs::remove_file(dir.join("index.json")).unwrap()).contains("index.json"));
    assert!(error_after(|dir| fs::write(dir.join("index.json"), "{").unwrap()).contains("does not belong to"));

    fn other_version(dir: &Path) {
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    }
    assert!(error_after(other_version).contains("version 1"));
}

#[tokio::test]
async fn a_layout_that_breaks_keeps_its_last_state_and_heals() {
    let mut layouts = Layouts::new(1);
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (image(&folder, "registry.test/first:v1", 1), image(&folder, "registry.test/second:v1", 2));
    layouts.put(&first);
    let store = layouts.store(everything());
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&first)).await;

    let index = layouts.dir().join("index.json");
    let good = fs::read(&index).unwrap();
    fs::write(&index, "{").unwrap();
    // What is written next to it is noticed, so the broken index was too.
    let extra: Digest =
        first.layers_for(spegel_benches::image::host_platform()).next().unwrap().digest.parse().unwrap();
    fs::remove_file(layouts.dir().join("blobs/sha256").join(extra.hex())).unwrap();
    follower.until("the blob noticed", |held| !held.contains(&extra.clone().into())).await;
    assert!(follower.held.contains(&Key::from(first.root().digest.parse::<Digest>().unwrap())), "kept");

    fs::write(&index, good).unwrap();
    layouts.put(&first);
    layouts.put(&second);
    follower.until_all(&keys(&first)).await;
    follower.until_all(&keys(&second)).await;
}

#[tokio::test]
async fn images_without_a_full_name_are_there_by_digest() {
    let mut layouts = Layouts::new(1);
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/app:v1", 1);
    layouts.put(&image);
    let index = layouts.dir().join("index.json");
    let text = fs::read_to_string(&index).unwrap();
    for name in ["v1", "app:v1", "", "registry.test/app"] {
        fs::write(&index, text.replace("registry.test/app:v1", name)).unwrap();
        let store = layouts.store(everything());
        let mut follower = Follower::new(&store);
        let digests = digests(&image).into_iter().map(Key::from).collect();
        follower.until_all(&digests).await;
        assert_eq!(follower.held, digests, "{name:?} makes no tag");
    }
}

#[tokio::test]
async fn content_that_no_image_names_is_served_unless_its_repository_is_filtered() {
    let layouts = Layouts::new(1);
    let digest: Digest = digest_of(b"loose").parse().unwrap();
    fs::write(layouts.dir().join("blobs/sha256").join(digest.hex()), b"loose").unwrap();
    let store = layouts.store(without("^registry\\.test/secret$"));
    let repository = |name| Repository::new("registry.test", name).unwrap();
    assert_eq!(bytes(&store, &digest).await.unwrap(), b"loose");
    assert!(bytes_for(&store, &digest, Some(&repository("app"))).await.is_some());
    assert_eq!(bytes_for(&store, &digest, Some(&repository("secret"))).await, None);
}
