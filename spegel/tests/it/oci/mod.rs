//! Tests of `oci`.
