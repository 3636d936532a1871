//! A seeded simulator of whole Verdict clusters.
//!
//! The shipped state machines ([`verdict_protocol`]'s `Shard`, `Coordinator` and `Leader`, merged and applied by its own code) run in one
//! queue of events with virtual time: nodes with one disk each, a small Raft of our own ([`raft`]) as a model of what the `raft` crate
//! promises, the drivers ([`driver`], [`shard`]) and the gateway ([`gateway`]) as the product has them, clients that retry ([`client`]),
//! and faults of many kinds ([`plan`], [`faults`]). Every promise is an [`invariants::Invariant`] that sees everything.
//!
//! - A run follows from its [`plan::Plan`], and a plan from its seed. There is no other source of chance ([`random`]), no clock and no
//!   unordered map, so the same seed gives the same [`trace::Trace`] hash, always.
//! - A plan that fails is made smaller while it still fails ([`shrink`]), and kept as a file.

pub mod client;
pub mod context;
pub mod driver;
pub mod faults;
pub mod gateway;
pub mod host;
pub mod invariants;
pub mod messages;
pub mod node;
pub mod plan;
pub mod raft;
pub mod random;
pub mod run;
pub mod shard;
pub mod shrink;
pub mod trace;
pub mod witness;
pub mod world;

/// The coordinators' routes to the shards' leaders: the product's own file, which knows nothing but ids and time.
#[allow(dead_code)] // the members of a simulated cluster never change
#[path = "../../coordinator/src/routes.rs"]
mod routes;
