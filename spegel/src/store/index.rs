//! Which images are here, what they reach, and so what is offered. Pure: what is in files comes in as [`Tree`]s.

mod inventory;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Instant;

use foldhash::quality::RandomState;

use super::pulls::Pulls;
use super::tree::{Node, Tree};
use super::{Change, Offered, Referrer};
use crate::oci::{Digest, Filters, Key, Reference, Repository, TagName, TagOrDigest};

/// How much content is remembered that came and that no image reaches yet: a pull records its image when it ends.
const MAX_ARRIVED: usize = 4096;

/// What an image's name says. Names that are no qualified references, such as the bare config digests that the CRI
/// records beside each image, say nothing: their content counts, but for no repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Name {
    repository: Option<Repository>,
    /// Of names without a digest only: with one, it is the digest that counts and the tag is a comment.
    tag: Option<TagName>,
}

#[derive(Debug)]
struct Image {
    name: Name,
    origin: Origin,
    tree: Tree,
}

/// How an image stands to the filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Allowed,
    Excluded,
    Unnamed,
}

/// A digest that at least one image names.
#[derive(Debug, Default)]
struct Content {
    /// Its length if it is here.
    size: Option<u64>,
    /// How long it has to be, where something says so.
    expected_size: Option<u64>,
    /// How many images of each [`Origin`] reach it.
    reached_by: [u32; 3],
    is_offered: bool,
    /// It is being received.
    receiving: bool,
    /// It was received, and no image speaks for it yet.
    arrived: bool,
    /// It may be offered before an image speaks for it, as far as is known of its pull.
    is_open: bool,
    /// The subject of a manifest that has one, and how the referrers API describes the manifest.
    referrer: Option<Box<(Digest, Referrer)>>,
}

/// Whether a digest may be served, as far as the images tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// An image that is not filtered has it.
    Serve,
    /// The filters keep it back.
    Refuse,
    /// No image has it, or was seen to have it: serve it if it is there and ours.
    Unknown,
}

/// What changed, from one settled state to the next.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Delta {
    pub(super) removed: Vec<Key>,
    pub(super) added: Vec<Key>,
}

/// Hashed with a random seed, as everywhere, and faster: each request looks into these.
type Tags = HashMap<TagName, Digest, RandomState>;

/// The images of a node.
#[derive(Debug)]
pub(super) struct Index {
    filters: Filters,
    images: BTreeMap<Box<str>, Image>,
    contents: HashMap<Digest, Content, RandomState>,
    /// The tags that are offered, and what they name.
    tags: Tags,
    /// The manifests that name a subject, by subject.
    referrers: HashMap<Digest, BTreeSet<Digest>>,
    /// Digests that may have changed since the last settled state.
    touched: HashSet<Digest>,
    /// What arrived, the oldest first; some of it may have gone or got an image since.
    arrivals: VecDeque<Digest>,
    pulls: Pulls,
}

// === impl Name ===

impl Name {
    fn parse(name: &str) -> Self {
        let Ok(Reference { repository, tag, digest }) = name.parse::<Reference>() else { return Self::default() };
        let tag = tag.filter(|_| digest.is_none()).and_then(|tag| TagName::new(repository.clone(), &tag).ok());
        Self { repository: Some(repository), tag }
    }

    fn origin(&self, filters: &Filters) -> Origin {
        match (&self.tag, &self.repository) {
            (Some(tag), _) if filters.excludes_tag(tag) => Origin::Excluded,
            (None, Some(repository)) if filters.excludes_repository(repository) => Origin::Excluded,
            (None, None) => Origin::Unnamed,
            _ => Origin::Allowed,
        }
    }
}

// === impl Content ===

impl Content {
    /// An image without a name says nothing of where content is from, so it counts only where no named one does: the CRI
    /// records one beside every image, filtered or not.
    fn may_be_offered(&self) -> bool {
        let reached = |origin: Origin| self.reached_by[origin as usize] > 0;
        reached(Origin::Allowed) || (reached(Origin::Unnamed) && !reached(Origin::Excluded))
    }

    /// Whether it counts before it is here, or without an image. What images of ours say of it goes before what is known of its pull.
    fn may_be_offered_early(&self) -> bool {
        let may_be_offered = if self.reached_by == [0; 3] { self.is_open } else { self.may_be_offered() };
        (self.receiving || self.arrived) && may_be_offered
    }

    fn is_needed(&self) -> bool {
        self.receiving || self.arrived || self.reached_by != [0; 3]
    }
}

// === impl Delta ===

impl Delta {
    pub(super) fn into_changes(self) -> impl Iterator<Item = Change> {
        let removed = (!self.removed.is_empty()).then_some(Change::Removed(self.removed));
        let added = (!self.added.is_empty()).then_some(Change::Added(self.added));
        removed.into_iter().chain(added)
    }
}

// === impl Index: changes ===

impl Index {
    pub(super) fn new(filters: Filters) -> Self {
        Self {
            filters,
            images: BTreeMap::new(),
            contents: HashMap::default(),
            tags: Tags::default(),
            referrers: HashMap::new(),
            touched: HashSet::new(),
            arrivals: VecDeque::new(),
            pulls: Pulls::default(),
        }
    }

    /// These are all the images there are.
    pub(super) fn replace(&mut self, images: Vec<(String, Tree)>) -> Delta {
        let names: HashSet<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
        let gone: Vec<Box<str>> = self.images.keys().filter(|name| !names.contains(&***name)).cloned().collect();
        for name in gone {
            self.forget(&name);
        }
        for (name, tree) in images {
            self.insert(&name, tree);
        }
        self.settle()
    }

    /// An image is there, or is another than before, or was walked again.
    pub(super) fn put(&mut self, name: &str, tree: Tree) -> Delta {
        self.insert(name, tree);
        self.settle()
    }

    /// An image is gone.
    pub(super) fn remove(&mut self, name: &str) -> Delta {
        self.forget(name);
        self.settle()
    }

    /// Content that an image may still name turned out not to be there.
    pub(super) fn set_absent(&mut self, digest: &Digest) -> Delta {
        if let Some(content) = self.contents.get_mut(digest) {
            content.size = None;
            content.arrived = false;
            self.touched.insert(digest.clone());
        }
        self.settle()
    }

    /// Content is being received, or is not any more.
    pub(super) fn set_receiving(&mut self, digest: &Digest, receiving: bool) -> Delta {
        if receiving || self.contents.contains_key(digest) {
            self.early(digest).receiving = receiving;
        }
        self.settle()
    }

    /// Our containerd asks for something of a repository, by a tag or a digest.
    pub(super) fn pulls(&mut self, repository: &Repository, reference: &TagOrDigest, now: Instant) -> Delta {
        match self.pulls.asked(repository, reference, &self.filters, now) {
            Some(digest) if self.contents.contains_key(digest) => {
                self.early(digest);
                self.settle()
            }
            _ => Delta::default(),
        }
    }

    /// Content that may have no image yet.
    fn early(&mut self, digest: &Digest) -> &mut Content {
        self.touched.insert(digest.clone());
        let is_open = self.filters.exclude_nothing() || self.pulls.allow(digest);
        let content = self.contents.entry(digest.clone()).or_default();
        content.is_open |= is_open;
        content
    }

    /// Content came that may have no image yet.
    pub(super) fn set_arrived(&mut self, digest: &Digest) -> Delta {
        if !std::mem::replace(&mut self.early(digest).arrived, true) {
            self.arrivals.push_back(digest.clone());
        }
        while self.arrivals.len() > MAX_ARRIVED
            && let Some(oldest) = self.arrivals.pop_front()
        {
            if let Some(content) = self.contents.get_mut(&oldest) {
                content.arrived = false;
            }
            self.touched.insert(oldest);
        }
        self.settle()
    }

    fn insert(&mut self, name: &str, tree: Tree) {
        let parsed = Name::parse(name);
        let origin = parsed.origin(&self.filters);
        // Before what it replaces is forgotten, so that what both reach is not lost in between.
        for node in tree.nodes() {
            self.reach(node, origin);
        }
        self.forget(name);
        self.images.insert(name.into(), Image { name: parsed, origin, tree });
    }

    fn reach(&mut self, node: &Node, origin: Origin) {
        let content = self.contents.entry(node.digest.clone()).or_default();
        content.reached_by[origin as usize] += 1;
        content.size = node.size;
        content.expected_size = node.expected_size.or(content.expected_size);
        if let Some(referrer) = node.referrer.as_ref().filter(|_| content.referrer.is_none()) {
            self.referrers.entry(referrer.0.clone()).or_default().insert(node.digest.clone());
            content.referrer = Some(referrer.clone());
        }
        self.touched.insert(node.digest.clone());
    }

    fn forget(&mut self, name: &str) {
        let Some(image) = self.images.remove(name) else { return };
        for Node { digest, .. } in image.tree.nodes() {
            if let Some(content) = self.contents.get_mut(digest) {
                content.reached_by[image.origin as usize] -= 1;
                self.touched.insert(digest.clone());
            }
        }
    }

    /// Brings what is offered in line with what is there, and says how it changed.
    fn settle(&mut self) -> Delta {
        let mut delta = Delta::default();
        for digest in std::mem::take(&mut self.touched) {
            let Some(content) = self.contents.get_mut(&digest) else { continue };
            // From here on the images say how it stands to the filters.
            content.arrived &= content.size.is_none() || content.reached_by == [0; 3];
            let is_offered = (content.size.is_some() && content.may_be_offered()) || content.may_be_offered_early();
            let was_offered = std::mem::replace(&mut content.is_offered, is_offered);
            if !content.is_needed() {
                self.drop_content(&digest);
            }
            match (was_offered, is_offered) {
                (false, true) => delta.added.push(digest.into()),
                (true, false) => delta.removed.push(digest.into()),
                _ => {}
            }
        }
        self.settle_tags(&mut delta);
        delta.added.sort_unstable();
        delta.removed.sort_unstable();
        delta
    }

    fn drop_content(&mut self, digest: &Digest) {
        let Some((subject, _)) = self.contents.remove(digest).and_then(|content| content.referrer).map(|r| *r) else {
            return;
        };
        if let Some(referrers) = self.referrers.get_mut(&subject) {
            referrers.remove(digest);
            if referrers.is_empty() {
                self.referrers.remove(&subject);
            }
        }
    }

    fn settle_tags(&mut self, delta: &mut Delta) {
        let is_present = |digest: &Digest| self.contents.get(digest).is_some_and(|content| content.size.is_some());
        let offered: Tags = self
            .images
            .values()
            .filter(|image| image.origin == Origin::Allowed)
            .filter_map(|image| Some((image.name.tag.as_ref()?, &image.tree)))
            .filter(|(_, tree)| tree.is_whole(is_present))
            .map(|(tag, tree)| (tag.clone(), tree.top().clone()))
            .collect();
        let missing_in = |there: &Tags, here: &Tags| {
            let missing = here.keys().filter(|tag| !there.contains_key(tag));
            missing.cloned().map(Key::from).collect::<Vec<_>>()
        };
        delta.removed.extend(missing_in(&offered, &self.tags));
        delta.added.extend(missing_in(&self.tags, &offered));
        self.tags = offered;
    }
}

// === impl Index: questions ===

impl Index {
    /// The digest that an offered tag names.
    pub(super) fn resolve(&self, tag: &TagName) -> Option<&Digest> {
        self.tags.get(tag)
    }

    /// Whether a digest may be served to who asks in the name of `asked`.
    pub(super) fn verdict(&self, digest: &Digest, asked: Option<&Repository>) -> Verdict {
        let content = self.contents.get(digest);
        let reached = |origin: Origin| content.is_some_and(|content| content.reached_by[origin as usize] > 0);
        let is_refused = match (reached(Origin::Allowed), reached(Origin::Excluded)) {
            (true, _) => false,
            (false, true) => true,
            (false, false) => asked.is_some_and(|repository| self.filters.excludes_repository(repository)),
        };
        match content {
            _ if is_refused => Verdict::Refuse,
            Some(content) if content.size.is_some() => Verdict::Serve,
            _ => Verdict::Unknown,
        }
    }

    /// How long this content has to be, if an image says so.
    pub(super) fn expected_size(&self, digest: &Digest) -> Option<u64> {
        self.contents.get(digest)?.expected_size
    }

    /// Content that came and that no image speaks for yet.
    pub(super) fn arrived(&self) -> Vec<Digest> {
        let arrived = self.arrivals.iter().filter(|digest| self.has_arrived(digest));
        arrived.cloned().collect()
    }

    /// Whether it came, and no image speaks for it yet.
    pub(super) fn has_arrived(&self, digest: &Digest) -> bool {
        self.contents.get(digest).is_some_and(|content| content.arrived)
    }

    /// Everything that is offered.
    pub(super) fn offered_keys(&self) -> impl Iterator<Item = Key> {
        let digests = self.contents.iter().filter(|(_, content)| content.is_offered);
        let digests = digests.map(|(digest, _)| Key::from(digest.clone()));
        digests.chain(self.tags.keys().cloned().map(Key::from))
    }

    /// How much is offered, by registry. What only images without a name reach stands under the empty name.
    pub(super) fn offered(&self) -> BTreeMap<String, Offered> {
        let mut all: BTreeMap<&str, (usize, HashSet<&Digest>, HashSet<&Digest>)> = BTreeMap::new();
        let is_offered = |digest: &Digest| self.contents.get(digest).is_some_and(|content| content.is_offered);
        for image in self.images.values() {
            let registry = match (image.origin, &image.name.repository) {
                (Origin::Allowed, Some(repository)) => repository.registry(),
                (Origin::Unnamed, _) => "",
                _ => continue,
            };
            let counts = |node: &&Node| {
                let is_named = self.contents.get(&node.digest).is_some_and(|content| content.reached_by[0] > 0);
                is_offered(&node.digest) && !(registry.is_empty() && is_named)
            };
            let digests: Vec<&Digest> = image.tree.nodes().iter().filter(counts).map(|node| &node.digest).collect();
            if digests.is_empty() {
                continue;
            }
            let (tags, tops, contents) = all.entry(registry).or_default();
            *tags += usize::from(image.name.tag.as_ref().is_some_and(|tag| self.tags.contains_key(tag)));
            tops.extend(digests.iter().filter(|&&digest| digest == image.tree.top()));
            contents.extend(digests);
        }
        let figures = |(tags, tops, contents): (usize, HashSet<_>, HashSet<_>)| Offered {
            image_tags: tags,
            image_digests: tops.len(),
            content_digests: contents.len(),
        };
        all.into_iter().map(|(registry, counts)| (registry.to_owned(), figures(counts))).collect()
    }

    /// Whether an image of this registry is here.
    pub(super) fn knows_registry(&self, registry: &str) -> bool {
        let mut repositories = self.images.values().filter_map(|image| image.name.repository.as_ref());
        repositories.any(|repository| repository.registry() == registry)
    }

    /// The manifests that are offered and whose subject this is, in the order of their digests.
    pub(super) fn referrers(&self, subject: &Digest) -> Vec<Referrer> {
        let contents = self.referrers.get(subject).into_iter().flatten().filter_map(|digest| self.contents.get(digest));
        let offered = contents.filter(|content| content.is_offered);
        offered.filter_map(|content| content.referrer.as_ref().map(|referrer| referrer.1.clone())).collect()
    }

    /// The images that name this digest, with their top digests.
    pub(super) fn images_that_name(&self, digest: &Digest) -> Vec<(String, Digest)> {
        self.images_where(|tree| tree.names(digest))
    }

    /// The images of which something has come since they were walked.
    pub(super) fn outdated_images(&self) -> Vec<(String, Digest)> {
        let is_present = |digest: &Digest| self.is_present(digest);
        self.images_where(|tree| tree.is_outdated(is_present))
    }

    fn images_where(&self, which: impl Fn(&Tree) -> bool) -> Vec<(String, Digest)> {
        let images = self.images.iter().filter(|(_, image)| which(&image.tree));
        images.map(|(name, image)| (name.to_string(), image.tree.top().clone())).collect()
    }

    /// Whether an image names it and it was here at the last look.
    pub(super) fn is_present(&self, digest: &Digest) -> bool {
        self.contents.get(digest).is_some_and(|content| content.size.is_some())
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
