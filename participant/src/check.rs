//! Keeps out of a shard's log what a coordinator of this cluster can't have meant.
//!
//! An entry is applied by all replicas: what can't be applied would stop them all. A coordinator has checked each batch whole; here
//! is checked again, in one pass and without any lookup, what a shard relies upon.

use tonic::Status;
use verdict_protocol::{
    batch::{Batch, BatchError, BatchLimits, OperationKind, Part, Placement, RowKey},
    ids::{BatchId, ShardId},
    messages::{ShardQuery, ShardRead, ToShard},
};

/// Whether the parts of a message can be read, their rows live in the shard, and their deltas add up.
pub fn check_message(placement: Placement, shard: ShardId, message: &ToShard) -> Result<(), Status> {
    if !message.is_empty() && message.placement != placement {
        return Err(Status::failed_precondition(format!(
            "this node is configured for {} shards and the coordinator for {}: correct the configuration of one of them",
            placement.shards, message.placement.shards
        )));
    }
    for prepare in &message.prepares {
        let part = prepare.part.decode().map_err(|error| malformed(prepare.id, &error))?;
        for (_, operation) in &part {
            operation.row.check().map_err(|error| malformed(prepare.id, &error))?;
            check_row(placement, shard, &operation.row)?;
        }
        check_deltas(placement, prepare.id, part)?;
    }
    Ok(())
}

/// Whether the rows of a read live in the shard.
pub fn check_read(placement: Placement, shard: ShardId, read: &ShardRead) -> Result<(), Status> {
    match &read.query {
        ShardQuery::Rows(rows) => rows.iter().try_for_each(|row| check_row(placement, shard, row)),
        ShardQuery::History { row, .. } => check_row(placement, shard, row),
    }
}

fn check_row(placement: Placement, shard: ShardId, row: &RowKey) -> Result<(), Status> {
    let owner = placement.shard_of(row.partition());
    if owner == shard {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "row {row:?} was sent to shard {shard}, but it lives in shard {owner} of {}: the coordinator was set up with another \
         number of shards",
        placement.shards
    )))
}

/// Deltas on one row must not leave 128 bits together. Only deltas that are huge are looked at row by row.
fn check_deltas(placement: Placement, id: BatchId, part: Part) -> Result<(), Status> {
    let sum = part.iter().try_fold(0_i128, |sum, (_, operation)| match &operation.kind {
        OperationKind::Add { delta, .. } => sum.checked_add(delta.checked_abs()?),
        OperationKind::Put(_)
        | OperationKind::Insert(_)
        | OperationKind::Delete
        | OperationKind::Require(_) => Some(sum),
    });
    if sum.is_some() {
        return Ok(());
    }
    let adds = part.into_iter().map(|(_, operation)| operation);
    let operations = adds.filter(|operation| matches!(operation.kind, OperationKind::Add { .. })).collect();
    let limits =
        BatchLimits { operations_max: usize::MAX, participants_max: usize::MAX, bytes_max: usize::MAX };
    let part = Batch { id, timeout_ms: 0, operations, zero_sum: false };
    part.check(&limits, placement).map_err(|error| malformed(id, &error))
}

fn malformed(id: BatchId, error: &BatchError) -> Status {
    Status::invalid_argument(format!("the part of batch {id} is malformed: {error}"))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use verdict_protocol::{
        batch::Operation,
        ids::{BatchId, ContentHash, Millis, Number},
        messages::Prepare,
        wire::EncodedPart,
    };

    use super::*;

    fn message(rows: &[(&str, i128)]) -> ToShard {
        let add = |(partition, delta): &(&str, i128)| {
            let kind = OperationKind::Add { delta: *delta, floor: Some(i128::MIN), ceiling: None };
            Operation { row: RowKey::new(partition, "USD").unwrap(), kind }
        };
        let prepare = Prepare {
            number: Number::default(),
            id: BatchId::from_parts(Millis(1), [0; 10]),
            hash: ContentHash([0; 32]),
            shards: vec![],
            gives_up: vec![],
            sole: None,
            part: EncodedPart::new(
                rows.iter().map(add).collect::<Vec<_>>().iter().map(|operation| (0, operation)),
            ),
        };
        ToShard { placement: Placement { shards: 4 }, prepares: vec![prepare], ..Default::default() }
    }

    #[test]
    fn a_row_of_another_shard_is_refused_by_name() {
        let placement = Placement { shards: 4 };
        let owner = placement.shard_of("user:1");
        check_message(placement, owner, &message(&[("user:1", 1)])).unwrap();
        let other = ShardId(owner.0 % 4 + 1);
        let status = check_message(placement, other, &message(&[("user:1", 1)])).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("row user:1#USD"), "{status}");
    }

    #[test]
    fn deltas_that_would_stop_the_replicas_are_refused() {
        let placement = Placement { shards: 1 };
        let check = |rows: &[(&str, i128)]| {
            check_message(placement, ShardId(1), &ToShard { placement, ..message(rows) })
        };
        check(&[("a", i128::MAX), ("b", i128::MAX), ("c", i128::MIN)]).unwrap();
        check(&[("a", i128::MAX), ("a", -1)]).unwrap();
        assert_eq!(check(&[("a", i128::MAX), ("a", 1)]).unwrap_err().code(), Code::InvalidArgument);
    }

    /// It would stop the replicas.
    #[test]
    fn a_part_that_is_none_is_refused() {
        let mut message = message(&[("a", 1)]);
        message.prepares[0].part = EncodedPart::from_wire(b"\x0a\x02\x12\x00".as_slice().into());
        let mut refused = |bytes: &'static [u8]| {
            message.prepares[0].part = EncodedPart::from_wire(bytes.into());
            let status = check_message(message.placement, ShardId(1), &message).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            status.message().to_owned()
        };
        assert!(refused(b"\x0a\x02\x30\x01").ends_with("part.operations[0].row: is missing"));
        assert!(
            refused(b"\x0a\x06\x12\x02ax\x30\x01")
                .ends_with("row: is not a partition, a zero byte and a name")
        );
        assert!(
            refused(b"\x0a\x07\x12\x03a\0\xff\x30\x01")
                .ends_with("row: is not a partition, a zero byte and a name")
        );
        assert!(refused(b"\x0a\x06\x12\x02a\0\x30\x01").ends_with("row.name: must not be empty"));
    }
}
