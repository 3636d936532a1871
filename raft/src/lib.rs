//! Hosts any replicated state machine as a Raft group.

mod api;
mod group;
mod host;

pub use api::*;
pub use group::Group;
pub use host::{Host, Service};
