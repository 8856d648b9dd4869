//! What is remembered of the images that our containerd pulls, beyond those of their parts that are under way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::oci::Digest;
use crate::storm::GAP;

/// How many images are remembered, and how many registries.
const IMAGES: usize = 1024;
const REGISTRIES: usize = 64;
/// How many manifests of an image that nobody has read here yet are remembered: an index and one for each of some platforms.
const UNREAD: usize = 4;
/// A part of an image of which bytes came within this time is arriving: containerd writes whole MiB.
const ARRIVING: Duration = Duration::from_secs(1);

/// Images and registries, by name.
#[derive(Debug, Default)]
pub(super) struct Images {
    images: Mutex<HashMap<Arc<str>, Image>>,
    /// What each registry's first byte takes, smoothed.
    usual: Mutex<HashMap<Box<str>, Duration>>,
}

#[derive(Debug)]
struct Image {
    /// The parts of which bytes came last, each once.
    came: [Option<(Digest, Instant)>; 2],
    /// Manifests of it that were asked for and not read.
    unread: Vec<Digest>,
    /// Another node takes part in its pull.
    is_shared: bool,
    /// It was waited in vain for another node to pull a part of it.
    was_in_vain: bool,
    used: Instant,
}

// === impl Images ===

impl Images {
    /// Bytes of a part came.
    pub(super) fn came(&self, image: &Arc<str>, part: &Digest, now: Instant) {
        self.with(image, now, |image| {
            let [last, before] = &mut image.came;
            if last.as_ref().is_some_and(|(last, _)| last != part) {
                *before = last.take();
            }
            *last = Some((part.clone(), now));
        });
    }

    /// Whether bytes of other parts of the image have come a moment ago, complete ones by now or not.
    pub(super) fn is_arriving(&self, image: &Arc<str>, besides: &Digest, now: Instant) -> bool {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < ARRIVING;
        let images = self.images();
        let came = images.get(image).into_iter().flat_map(|image| image.came.iter().flatten());
        came.into_iter().any(|(part, at)| part != besides && is_recent(*at))
    }

    /// This manifest of it is asked for.
    pub(super) fn is_described_by(&self, image: &Arc<str>, manifest: &Digest, now: Instant) {
        self.with(image, now, |image| {
            if image.unread.len() < UNREAD && !image.unread.contains(manifest) {
                image.unread.push(manifest.clone());
            }
        });
    }

    /// Those of its manifests that were not read.
    pub(super) fn unread(&self, image: &str) -> Vec<Digest> {
        self.images().get(image).map(|image| image.unread.clone()).unwrap_or_default()
    }

    /// This manifest of it was read.
    pub(super) fn was_read(&self, image: &str, manifest: &Digest) {
        if let Some(image) = self.images().get_mut(image) {
            image.unread.retain(|unread| unread != manifest);
        }
    }

    /// Another node gives a part of it, or waits for one here.
    pub(super) fn is_shared(&self, image: &Arc<str>, now: Instant) {
        self.with(image, now, |image| image.is_shared = true);
    }

    /// Nobody else came to pull a part that was left for others.
    pub(super) fn was_in_vain(&self, image: &Arc<str>, now: Instant) {
        self.with(image, now, |image| image.was_in_vain = true);
    }

    /// Whether parts of it may be left for others to pull for a moment: there are others, and one has come whenever that was done.
    pub(super) fn may_leave(&self, image: &Arc<str>, now: Instant) -> bool {
        let images = self.images();
        images.get(image).is_some_and(|image| !image.is_over(now) && image.is_shared && !image.was_in_vain)
    }

    /// How long its registry's first byte usually takes, if that was seen.
    pub(super) fn usual(&self, image: &str) -> Option<Duration> {
        self.registries().get(registry(image)).copied()
    }

    /// Its registry's first byte took so long.
    pub(super) fn learn(&self, image: &str, took: Duration) {
        let mut usual = self.registries();
        let name = registry(image);
        if let Some(known) = usual.get_mut(name) {
            *known = (*known * 3 + took) / 4;
        } else if usual.len() < REGISTRIES {
            usual.insert(name.into(), took);
        }
    }

    fn with(&self, name: &Arc<str>, now: Instant, change: impl FnOnce(&mut Image)) {
        let mut images = self.images();
        if images.len() >= IMAGES && !images.contains_key(name) {
            images.retain(|_, image| !image.is_over(now));
            if images.len() >= IMAGES {
                return;
            }
        }
        let image = images.entry(Arc::clone(name)).or_insert_with(|| Image::new(now));
        if image.is_over(now) {
            *image = Image::new(now);
        }
        image.used = now;
        change(image);
    }

    fn images(&self) -> MutexGuard<'_, HashMap<Arc<str>, Image>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registries(&self) -> MutexGuard<'_, HashMap<Box<str>, Duration>> {
        self.usual.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    fn new(now: Instant) -> Self {
        Self { came: [None, None], unread: Vec::new(), is_shared: false, was_in_vain: false, used: now }
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.used) >= GAP
    }
}

/// An image's name begins with its registry.
fn registry(image: &str) -> &str {
    image.split_once('/').map_or(image, |(registry, _)| registry)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn digest(n: u8) -> Digest {
        format!("sha256:{n:064x}").parse().unwrap()
    }

    #[test]
    fn a_part_that_is_complete_has_arrived_all_the_same() {
        let (images, start, image) = (Images::default(), Instant::now(), Arc::<str>::from("registry.test/app"));
        assert!(!images.is_arriving(&image, &digest(1), start));
        images.came(&image, &digest(1), start);
        assert!(images.is_arriving(&image, &digest(2), start) && !images.is_arriving(&image, &digest(1), start));
        images.came(&image, &digest(2), start + ARRIVING / 2);
        images.came(&image, &digest(2), start + ARRIVING / 2);
        assert!(images.is_arriving(&image, &digest(2), start + ARRIVING / 2), "of the one before");
        assert!(!images.is_arriving(&image, &digest(2), start + ARRIVING));
        assert!(images.is_arriving(&image, &digest(1), start + ARRIVING));
        assert!(!images.is_arriving(&"registry.test/other".into(), &digest(1), start));
    }

    #[test]
    fn parts_are_left_for_others_where_there_are_some_until_none_came() {
        let (images, start, image) = (Images::default(), Instant::now(), Arc::<str>::from("registry.test/app"));
        images.came(&image, &digest(1), start);
        assert!(!images.may_leave(&image, start), "alone");
        images.is_shared(&image, start);
        assert!(images.may_leave(&image, start) && !images.may_leave(&image, start + GAP));
        images.was_in_vain(&image, start);
        assert!(!images.may_leave(&image, start));
        images.is_shared(&image, start + GAP);
        assert!(images.may_leave(&image, start + GAP), "another pull");
    }

    #[test]
    fn some_manifests_are_remembered_until_they_are_read() {
        let (images, start, image) = (Images::default(), Instant::now(), Arc::<str>::from("registry.test/app"));
        for n in [1, 1, 2, 3, 4, 5] {
            images.is_described_by(&image, &digest(n), start);
        }
        images.was_read(&image, &digest(2));
        assert_eq!(images.unread(&image), [1, 3, 4].map(digest));
        assert!(images.unread("registry.test/other").is_empty());
    }

    #[test]
    fn each_registry_has_what_is_usual_of_its_own() {
        let images = Images::default();
        images.learn("slow.test/app", Duration::from_secs(2));
        images.learn("quick.test/app", Duration::from_millis(100));
        images.learn("quick.test/other/app", Duration::from_millis(500));
        assert_eq!(images.usual("slow.test/x"), Some(Duration::from_secs(2)));
        assert_eq!(images.usual("quick.test/x"), Some(Duration::from_millis(200)));
        assert_eq!(images.usual("new.test/x"), None);
    }

    #[test]
    fn memory_is_bounded() {
        let (images, start) = (Images::default(), Instant::now());
        for n in 0..2 * IMAGES {
            images.is_shared(&format!("registry{n}.test/app").into(), start);
            images.learn(&format!("registry{n}.test/app"), ARRIVING);
        }
        assert_eq!((images.images().len(), images.registries().len()), (IMAGES, REGISTRIES));
        images.is_shared(&"late.test/app".into(), start + GAP);
        assert_eq!(images.images().len(), 1);
    }
}
