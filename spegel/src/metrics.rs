//! The metrics registry that every room adds its own figures to, and its text form.
