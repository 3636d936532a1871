//! Hosts any replicated state machine as a Raft group.
//!
//! A node opens one [`Host`]: one database, one log writer, one stream to each other node. On it run any number of groups,
//! each a [`Group`] around a [`verdict_protocol::machine::Machine`]. Nothing but this crate names openraft, and nothing but
//! [`OnDisk`] names RocksDB: all else sees a [`storage::Storage`].
//!
//! The way of a proposal: [`Group::start_propose`] queues it; the sequencer (`group`) hands it to openraft; the log (`log`)
//! keeps it in memory and passes it to the writer (`writer`), which syncs it together with all else that waits, while it
//! travels to the followers (`network`, `peer`, `service`); once a majority has it on disk it is applied (`replica`), and
//! the machine's answer goes back to whoever proposed.
//!
//! Invariants:
//! - Votes, entries, truncations and purges are on disk before anybody is told (R9), and the first error on that way stops
//!   the node for good.
//! - A state change, the applied index and the running hash are one atomic write (R5).
//! - Everything has a bound: queues, messages in flight, memory for recent entries, the log on disk.
//! - No lock is held across an await.
//! - A node is who its disk says it is: another disk under the same id is refused by all who knew the first, and so is an older copy
//!   of the same disk. Until the others have looked at it, a replica doesn't vote.
//!
//! The formats on disk are described in `docs/storage.md`.

mod acknowledged;
mod api;
pub mod counters;
mod disk;
mod fatal;
mod gate;
mod group;
mod heard;
mod host;
mod log;
mod members;
mod network;
mod node;
mod on_disk;
mod peer;
#[cfg(test)]
mod power;
mod replica;
mod service;
mod snapshot;
mod standing;
mod state;
pub mod storage;
#[cfg(test)]
mod suite;
mod types;
mod wal;
mod writer;

pub use api::*;
pub use group::Group;
pub use host::Host;
pub use members::{Members, Progress};
pub use on_disk::OnDisk;
pub use service::Service;

/// A directive for the log's filter: the library below warns of every message that a dead peer doesn't take, many times a second.
pub const QUIET: &str = "openraft=error";
