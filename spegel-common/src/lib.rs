//! Types shared by kernel and user side.
