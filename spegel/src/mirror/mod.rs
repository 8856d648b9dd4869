//! Getting content from a peer.
