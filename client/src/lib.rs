//! The Rust SDK of Verdict.
//!
//! A [`Client`] knows the addresses of some nodes, finds one that answers, and asks again when an answer is lost. What makes
//! that safe is the batch's id: it is made before the first try and never changes, so a batch takes effect at most once,
//! however often it is sent.
//!
//! What this crate promises, beyond what the servers promise:
//! - It says [`Outcome::Committed`] or [`Outcome::Aborted`] only if a server said so, about this id.
//! - A [`ClientError`] means that no try of this call was proposed. If any try may have been, the answer is
//!   [`Outcome::Unknown`], whatever went wrong after it.
//! - Every try of one call carries the same id.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use verdict_client::{BatchBuilder, Client, Options, Outcome};
//!
//! let client = Client::connect(["127.0.0.1:7400"], Options::default())?;
//! let batch = BatchBuilder::new()
//!     .zero_sum()
//!     .add("user:1", "USDT", -500)
//!     .add("user:2", "USDT", 500)
//!     .insert("payment:77", "record", "user:1 pays user:2")
//!     .build();
//! match client.submit(&batch).await? {
//!     Outcome::Committed { stamp } => println!("settled at {stamp}"),
//!     Outcome::Aborted { reason, message, .. } => println!("refused: {reason:?}: {message}"),
//!     Outcome::Unknown { message, .. } => println!("ask again for {}: {message}", batch.id),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Many batches at once go through a [`Submitter`], which keeps a window of them in flight on one stream.

mod batch;
mod client;
mod failure;
mod nodes;
mod outcome;
mod retry;
mod submitter;
#[cfg(test)]
mod tests;
mod tries;

pub use batch::{BatchBuilder, row};
pub use client::{Client, Options};
pub use failure::{ClientError, no_connection};
pub use outcome::Outcome;
pub use submitter::{Answer, Pending, Slot, Submitter, SubmitterStats};
pub use verdict_proto::{
    connect,
    v1::{AbortReason, Batch, Row, UndecidedState, Value, value},
};
