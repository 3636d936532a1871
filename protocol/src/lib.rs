//! The commit protocol of Verdict as pure state machines.
//!
//! Two-phase commit with presumed abort, in which every party is a replicated state machine: a *coordinator* group records one
//! decision for each batch, *shards* replicate their votes before they leave. This crate holds all that decides anything about
//! batches, and nothing else: no IO, no clock, no async, no randomness. The same code runs in the product, in the simulator
//! and under the model checker.
//!
//! - What is replicated implements [`machine::Machine`]: [`shard::Shard`] and [`coordinator::Coordinator`].
//! - What a coordinator's leader keeps in memory is [`leader::Leader`]: `step(event) -> effects`.
//! - Durable state is reached through [`store::Store`], which the host provides.

pub mod batch;
pub mod coordinator;
pub mod ids;
pub mod leader;
pub mod machine;
pub mod merge;
pub mod messages;
pub mod plain;
mod point_map;
mod recent;
pub mod roster;
pub mod shard;
pub mod show;
pub mod store;
pub mod wire;
