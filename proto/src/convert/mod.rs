//! Translates between the wire types ([`crate::v1`]) and the types of the protocol ([`verdict_protocol`]).
//!
//! This crate depends on `verdict-protocol` for its types alone, so that all who speak the contract (coordinator, participant,
//! tools, tests) translate in one place and the same way.
//!
//! Invariants:
//! - Whatever comes from the wire is checked here: a message that can't be understood is a [`FieldError`] with the field's name
//!   in the words of the contract (`batch.operations[3].add.delta`), never a panic and never a guess.
//! - Amounts are exact: decimal text to `i128` and back.
//! - What is translated to the wire and back is the same value. The exceptions stand with their functions.
//!
//! Names: `x_to_wire` and `x_from_wire`. A field's name is made only when there is an error to tell.

mod answer;
mod batch;
mod exchange;
mod fields;
mod forward;

pub use answer::{
    abort_from_wire, abort_to_wire, history_from_wire, history_to_wire, outcome_to_wire,
    part_change_from_wire, part_change_to_wire, row_value_to_wire, value_from_wire, value_to_wire,
};
pub use batch::{encoded, row_from_wire, row_to_wire};
pub use exchange::{
    Assembler, EXCHANGE_MESSAGE_BYTES_MAX, ITEMS_PER_MESSAGE_MAX, ShardTold, ToldShard, from_shard_to_wire,
    not_leader_to_wire, number_from_wire, number_to_wire, read_answer_from_wire, read_answer_to_wire,
    read_from_wire, read_to_wire, to_shard_from_wire, to_shard_to_wire,
};
pub use fields::{FieldError, batch_id_bytes, content_hash};
pub use forward::{split_from_wire, split_to_wire};
pub use verdict_protocol::wire::{amount, batch_id};
