//! The distribution API: a request in, a response out. Touches no socket.
