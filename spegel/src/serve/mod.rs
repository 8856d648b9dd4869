//! Listeners and the runtimes that serve their connections. Knows no OCI.
