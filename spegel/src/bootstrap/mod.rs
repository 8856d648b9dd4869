//! Whom to call first when joining the network of peers.
