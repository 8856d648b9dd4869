//! Bytes from a file or a peer's socket to a client's socket without passing through user space. Knows no OCI.
