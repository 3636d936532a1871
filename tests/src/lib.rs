//! Clusters of real processes on real disks, and what a client needs that knows nothing but the wire contract.
//!
//! - [`cluster`]: node processes that are started, killed, stopped, frozen, and watched from outside;
//! - [`api`]: calls and values, by the generated types alone;
//! - [`failpoints`]: kills at named places, and how soon the others go on;
//! - [`proxy`]: a way to a node on which replies get lost;
//! - [`ledger`]: a load of transfers, and the account of what was answered;
//! - [`bank`]: a load of all kinds of batches and of reads; [`promises`] judges what it was told;
//! - [`syncs`]: the synced writes of a node, as strace sees them.
//!
//! Only processes that were started here are ever ended, by their handles. Every wait has a bound.

pub mod api;
pub mod bank;
pub mod cluster;
pub mod failpoints;
pub mod ledger;
pub mod promises;
pub mod proxy;
pub mod random;
pub mod syncs;
pub mod wait;
