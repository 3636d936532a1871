//! Keeps out of a shard's log what a coordinator of this cluster can't have meant.
//!
//! An entry is applied by all replicas: what can't be applied would stop them all. A coordinator has checked each batch whole; here
//! is checked again, in one pass and without any lookup, what a shard relies upon.

use tonic::Status;
use verdict_protocol::{
    batch::{PartError, Placement, check_owner, check_part},
    ids::ShardId,
    messages::{ShardQuery, ShardRead, ToShard},
};

/// Whether the shard can take the parts of a message.
pub fn check_message(placement: Placement, shard: ShardId, message: &ToShard) -> Result<(), Status> {
    if !message.is_empty() && message.placement != placement {
        return Err(Status::failed_precondition(format!(
            "this node is configured for {} shards and the coordinator for {}: correct the configuration of one of them",
            placement.shards, message.placement.shards
        )));
    }
    message.prepares.iter().try_for_each(|prepare| {
        check_part(placement, shard, &prepare.part).map_err(|error| match error {
            PartError::Malformed(error) => {
                Status::invalid_argument(format!("the part of batch {} is malformed: {error}", prepare.id))
            }
            PartError::Elsewhere { .. } => elsewhere(placement, &error),
        })
    })
}

/// Whether the rows of a read live in the shard.
pub fn check_read(placement: Placement, shard: ShardId, read: &ShardRead) -> Result<(), Status> {
    let rows = match &read.query {
        ShardQuery::Rows(rows) => rows.as_slice(),
        ShardQuery::History { row, .. } => std::slice::from_ref(row),
    };
    let owned = rows.iter().try_for_each(|row| check_owner(placement, shard, row));
    owned.map_err(|error| elsewhere(placement, &error))
}

fn elsewhere(placement: Placement, error: &PartError) -> Status {
    Status::failed_precondition(format!(
        "{error} of {}: the coordinator was set up with another number of shards",
        placement.shards
    ))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use verdict_protocol::{
        batch::{Operation, OperationKind, RowKey},
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
        message.placement = Placement { shards: 1 };
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
