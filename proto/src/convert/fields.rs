//! Single fields.

use std::fmt::Display;

use bytes::Bytes;
use verdict_protocol::{
    batch::BatchError,
    ids::{BatchId, ContentHash},
};

/// A field that can't be understood: its name, as the wire contract has it, and the problem.
pub type FieldError = BatchError;

pub(super) type Field<T> = Result<T, FieldError>;

/// Names the message that the field is in.
pub(super) fn inside(outer: impl Display) -> impl FnOnce(FieldError) -> FieldError {
    move |error| {
        let dot = if error.field.is_empty() || error.field.starts_with('[') { "" } else { "." };
        BatchError { field: format!("{outer}{dot}{}", error.field), problem: error.problem }
    }
}

/// A field that must be there.
pub(super) fn required<T>(field: &str, value: Option<T>) -> Field<T> {
    value.ok_or_else(|| BatchError::new(field, "is missing"))
}

/// The id of a batch as nodes send it to each other: 16 bytes. Its version isn't looked at: the coordinator did.
pub fn batch_id_bytes(field: &str, bytes: &[u8]) -> Result<BatchId, FieldError> {
    exact(field, bytes).map(BatchId)
}

/// The hash of a batch's contents: 32 bytes.
pub fn content_hash(field: &str, bytes: &[u8]) -> Result<ContentHash, FieldError> {
    exact(field, bytes).map(ContentHash)
}

fn exact<const N: usize>(field: &str, bytes: &[u8]) -> Field<[u8; N]> {
    bytes.try_into().map_err(|_| BatchError::new(field, format!("is {} bytes long, not {N}", bytes.len())))
}

pub(super) fn id_to_wire(id: BatchId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}
