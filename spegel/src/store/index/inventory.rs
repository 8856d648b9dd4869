//! The index as it is shown to people.

use std::collections::BTreeMap;

use super::{Image, Index};
use crate::oci::Digest;
use crate::store::{HeldImage, Inventory};

impl Index {
    /// The first `limit` images by name, with what is here of them, and the sum of all.
    pub(in crate::store) fn inventory(&self, limit: usize) -> Inventory {
        let mut by_top: BTreeMap<&Digest, Vec<(&str, &Image)>> = BTreeMap::new();
        for (name, image) in &self.images {
            by_top.entry(image.tree.top()).or_default().push((name, image));
        }
        let mut images: Vec<_> = by_top.into_iter().collect();
        // The CRI records each image once more under its config's digest, which tells people nothing.
        for (_, named) in &mut images {
            named.sort_by_key(|(name, image)| (image.name.repository.is_none(), *name));
        }
        images.sort_by_key(|(top, named)| (named[0].1.name.repository.is_none(), named[0].0, *top));
        let more_images = images.len().saturating_sub(limit);
        images.truncate(limit);
        let present = self.contents.values().filter_map(|content| content.size);
        Inventory {
            images: images.into_iter().map(|(top, named)| self.held(top, &named)).collect(),
            more_images,
            blobs: present.clone().count(),
            bytes: present.sum(),
            ..Inventory::default()
        }
    }

    fn held(&self, top: &Digest, named: &[(&str, &Image)]) -> HeldImage {
        let tree = &named[0].1.tree;
        let size = |digest: &Digest| self.contents.get(digest).and_then(|content| content.size);
        let sizes = || tree.nodes().iter().filter_map(|node| size(&node.digest));
        let names = named.iter().map(|(name, _)| (*name).to_owned());
        HeldImage {
            digest: top.clone(),
            names: names.take(HeldImage::MAX_NAMES).collect(),
            more_names: named.len().saturating_sub(HeldImage::MAX_NAMES),
            is_whole: tree.is_whole(|digest| size(digest).is_some()),
            is_offered: self.contents.get(top).is_some_and(|content| content.is_offered),
            named: tree.nodes().len(),
            present: sizes().count(),
            bytes: sizes().sum(),
        }
    }
}
