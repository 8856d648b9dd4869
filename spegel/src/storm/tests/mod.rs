//! Tests of the machines together, and of what must hold whatever the network does.
//!
//! They are no part of the room's own tree, which the simulator of xtask includes.

mod coordinator;
mod machines;
mod messages;
mod net;
mod properties;
