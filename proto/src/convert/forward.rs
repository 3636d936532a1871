//! Batches on their way from the node that took them to the leader.

use bytes::BytesMut;
use verdict_protocol::{
    batch::{BatchError, Placement, SplitBatch},
    ids::ShardId,
    wire::EncodedPart,
};

use super::fields::{Field, FieldError, batch_id_bytes, content_hash, id_to_wire, inside};
use crate::v1;

/// A batch that is forwarded.
pub fn split_to_wire(batch: &SplitBatch) -> v1::SplitBatch {
    let part =
        |(shard, part): &(ShardId, EncodedPart)| v1::ShardPart { shard: shard.0, part: part.bytes().clone() };
    v1::SplitBatch {
        batch_id: id_to_wire(batch.id),
        hash: bytes::Bytes::copy_from_slice(&batch.hash.0),
        timeout_ms: batch.timeout_ms,
        parts: batch.parts.iter().map(part).collect(),
    }
}

/// The opposite of [`split_to_wire`]. Parts are not looked into ([`SplitBatch::check`]). They are copied into memory of their own: a batch
/// that takes long must not keep all of the message that it came with.
pub fn split_from_wire(batch: v1::SplitBatch, placement: Placement) -> Result<SplitBatch, FieldError> {
    let bytes = batch.parts.iter().map(|part| part.part.len()).sum();
    let mut all = BytesMut::with_capacity(bytes);
    let mut last = 0;
    let part = |(place, part): (usize, v1::ShardPart)| -> Field<_> {
        let follows = part.shard > last && part.shard <= placement.shards;
        last = part.shard;
        if !follows {
            let problem =
                format!("is {}: there are {} shards, in ascending order", part.shard, placement.shards);
            return Err(BatchError::new("shard", problem)).map_err(inside(format_args!("parts[{place}]")));
        }
        all.extend_from_slice(&part.part);
        Ok((ShardId(part.shard), EncodedPart::from_wire(all.split().freeze())))
    };
    let parts = batch.parts.into_iter().enumerate().map(part).collect::<Field<Vec<_>>>()?;
    if parts.is_empty() {
        return Err(BatchError::new("parts", "is empty"));
    }
    Ok(SplitBatch {
        id: batch_id_bytes("batch_id", &batch.batch_id)?,
        hash: content_hash("hash", &batch.hash)?,
        timeout_ms: batch.timeout_ms,
        parts,
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use verdict_protocol::{
        batch::{Batch, Operation, OperationKind, RowKey},
        ids::{BatchId, Millis},
    };

    use super::*;

    const PLACEMENT: Placement = Placement { shards: 4 };

    fn batch() -> SplitBatch {
        let operation = |user: u32| Operation {
            row: RowKey::new(&format!("user:{user}"), "USD").unwrap(),
            kind: OperationKind::Delete,
        };
        let id = BatchId::from_parts(Millis(1), [3; 10]);
        let operations = (0..20).map(operation).collect();
        Batch { id, timeout_ms: 7, operations, zero_sum: false }.split(PLACEMENT)
    }

    #[test]
    fn a_forwarded_batch_comes_back() {
        let batch = batch();
        assert_eq!(batch.parts.len(), 4);
        let wire = split_to_wire(&batch);
        let came = split_from_wire(wire.clone(), PLACEMENT).unwrap();
        assert_eq!(came, batch);
        let keeps_it = came
            .parts
            .iter()
            .zip(&wire.parts)
            .any(|(one, other)| one.1.bytes().as_ptr() == other.part.as_ptr());
        assert!(!keeps_it, "it keeps the message that it came with");
    }

    /// The leader relies on it.
    #[test]
    fn shards_that_there_are_not_or_that_come_twice_are_refused() {
        let field = |change: fn(&mut v1::SplitBatch)| {
            let mut wire = split_to_wire(&batch());
            change(&mut wire);
            split_from_wire(wire, PLACEMENT).unwrap_err().field
        };
        assert_eq!(field(|wire| wire.parts[3].shard = 5), "parts[3].shard");
        assert_eq!(field(|wire| wire.parts[0].shard = 0), "parts[0].shard");
        assert_eq!(field(|wire| wire.parts[2].shard = 2), "parts[2].shard");
        assert_eq!(field(|wire| wire.parts.swap(0, 1)), "parts[1].shard");
        assert_eq!(field(|wire| wire.parts.clear()), "parts");
        assert_eq!(field(|wire| wire.hash = Bytes::from_static(b"short")), "hash");
        assert_eq!(field(|wire| wire.batch_id = Bytes::new()), "batch_id");
    }
}
