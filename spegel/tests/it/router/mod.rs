//! Tests of `router`.
