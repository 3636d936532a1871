//! Checks what clients saw for strict serializability.
//!
//! Clients record each transaction with the moments at which they sent it and heard of its end ([`Recorder`]). Three checks that
//! know nothing of each other look at such a history:
//!
//! - [`appends::check`]: of transactions that read lists and append to them it infers who came before whom, and looks for a cycle,
//!   as Elle does (Kingsbury, Alvaro: Elle: Inferring Isolation Anomalies from Experimental Observations, VLDB 2020). It needs no
//!   help from the database and takes transactions of unknown fate into account.
//! - [`elle::check`]: the same by the `adya` crate, a second implementation by other people.
//! - [`witness::check`]: takes the order that Verdict itself claims (stamps and read positions), runs the history through a plain
//!   sequential model in that order, and compares every value; and compares that order with real time. It works for balances
//!   too, which tell less of the past than lists.

pub mod appends;
pub mod elle;
mod graph;
mod record;
pub mod witness;

pub use record::{Cell, Fate, Key, List, Recorder, Transaction};
