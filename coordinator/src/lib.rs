//! The coordinator group of one node, and everything that clients and operators call.
//!
//! A batch comes in through the `Settlement` service ([`settlement`](SettlementService)), is checked by the gateway, and is handed by
//! the submitter to the node that leads the coordinators: to the driver in this process, or over one long-lived stream to that of
//! another node. The driver steps the protocol's core ([`verdict_protocol::leader::Leader`]), proposes what the core wants recorded to
//! the coordinator's Raft group, and speaks to the shards through the router. Nothing here decides anything about batches: that is the
//! core's, and what stands in the log.
//!
//! Invariants:
//! - A decision is told only after the log has answered that it stands.
//! - What the leader keeps in memory ends with its epoch (rule R6).
//! - Once a batch is handed over, a caller who hangs up changes nothing.
//! - An error says that nothing was decided; what isn't known is told as a value (UNKNOWN).
//! - All queues are bounded; what is full refuses at once, or isn't read any further.
//!
//! This crate and `verdict-participant` don't know each other: a node brings them together by [`LocalStatus`], and the driver reaches
//! shards only through the wire contract, those of its own node included.

mod admin;
mod admission;
mod caller;
mod clock;
mod directory;
mod driver;
mod failure;
mod forward;
mod gateway;
mod leaders;
mod membership;
mod node;
mod router;
mod routes;
mod settlement;
mod spread;
mod submitter;

pub use admin::{AdminService, LocalStatus, NoShards, group_status_to_wire};
pub use failure::message_too_large;
pub use forward::ForwardService;
pub use node::{CoordinatorConfig, CoordinatorError, CoordinatorNode};
pub use settlement::SettlementService;
