//! What is here, as it is shown to people: bounded, and taken at one moment.

use crate::oci::Digest;

/// Images and what is being received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Images, in the order of their first names.
    pub images: Vec<HeldImage>,
    /// How many more there are.
    pub more_images: usize,
    /// Manifests, configs and layers that are here, each counted once.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is being received, the largest first.
    pub arriving: Vec<Arriving>,
    /// How much more there is.
    pub more_arriving: usize,
}

/// An image, by its top digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldImage {
    /// Its top digest.
    pub digest: Digest,
    /// What names it, [`HeldImage::MAX_NAMES`] at the most.
    pub names: Vec<String>,
    /// How many names more.
    pub more_names: usize,
    /// All of it is here, for one platform at least.
    pub is_whole: bool,
    /// Its top digest is offered to peers.
    pub is_offered: bool,
    /// How many manifests, configs and layers it names, for all platforms.
    pub named: usize,
    /// How many of them are here.
    pub present: usize,
    /// The bytes of these.
    pub bytes: u64,
}

/// A blob that containerd is receiving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arriving {
    /// Its digest.
    pub digest: Digest,
    /// How many bytes have come.
    pub position: u64,
    /// How many there will be, where that is known.
    pub total: Option<u64>,
    /// It is given to peers meanwhile.
    pub is_offered: bool,
}

impl HeldImage {
    /// How many names of an image are told.
    pub const MAX_NAMES: usize = 8;
}
