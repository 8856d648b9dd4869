//! containerd's registry host configuration: writing it, and taking back what was written.
