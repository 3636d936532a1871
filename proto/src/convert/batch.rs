//! Batches and what they are made of.

use verdict_protocol::{
    batch::{Batch, BatchError, Condition, Operation, OperationKind, RowKey},
    ids::Stamp,
};

use super::fields::{Field, FieldError, amount, batch_id, inside, required};
use crate::v1::{self, operation::Kind, require};

/// A batch as a client sent it. Its fields are named from `batch` on. What concerns the batch as a whole (limits, clashes,
/// `zero_sum`) is left to [`Batch::check`].
pub fn batch_from_wire(batch: v1::Batch) -> Result<Batch, FieldError> {
    let id = batch_id("batch.id", &batch.id)?;
    let operations = batch.operations.into_iter().enumerate().map(|(place, operation)| {
        operation_from_wire(operation).map_err(inside(format_args!("batch.operations[{place}]")))
    });
    let operations = operations.collect::<Result<_, _>>()?;
    Ok(Batch { id, timeout_ms: batch.timeout_ms, operations, zero_sum: batch.zero_sum })
}

/// The opposite of [`batch_from_wire`].
pub fn batch_to_wire(batch: &Batch) -> v1::Batch {
    v1::Batch {
        id: batch.id.to_string(),
        timeout_ms: batch.timeout_ms,
        operations: batch.operations.iter().map(operation_to_wire).collect(),
        zero_sum: batch.zero_sum,
    }
}

/// An operation. Its fields are named from within it (`add.delta`, `row.partition`).
pub fn operation_from_wire(operation: v1::Operation) -> Result<Operation, FieldError> {
    let row = row_from_wire(required("row", operation.row)?).map_err(inside("row"))?;
    let kind = match operation.kind {
        None => {
            let problem =
                "is missing: one of add, put, insert, delete, require (or a newer one, unknown here)";
            return Err(BatchError::new("kind", problem));
        }
        Some(Kind::Add(add)) => OperationKind::Add {
            delta: amount("add.delta", &add.delta)?,
            floor: add.floor.map(|floor| amount("add.floor", &floor)).transpose()?,
            ceiling: add.ceiling.map(|ceiling| amount("add.ceiling", &ceiling)).transpose()?,
        },
        Some(Kind::Put(put)) => OperationKind::Put(put.value),
        Some(Kind::Insert(insert)) => OperationKind::Insert(insert.value),
        Some(Kind::Delete(v1::Delete {})) => OperationKind::Delete,
        Some(Kind::Require(require)) => OperationKind::Require(condition_from_wire(require)?),
    };
    Ok(Operation { row, kind })
}

fn condition_from_wire(require: v1::Require) -> Field<Condition> {
    use require::Condition as Wire;
    Ok(match required("require.condition", require.condition)? {
        Wire::Exists(exists) => Condition::Exists(exists),
        Wire::Version(version) => Condition::VersionIs(Stamp(version)),
        Wire::Value(value) => Condition::RecordIs(value),
        Wire::BalanceAtLeast(least) => Condition::AtLeast(amount("require.balance_at_least", &least)?),
        Wire::BalanceAtMost(most) => Condition::AtMost(amount("require.balance_at_most", &most)?),
        Wire::BalanceEquals(equal) => Condition::BalanceIs(amount("require.balance_equals", &equal)?),
    })
}

/// The opposite of [`operation_from_wire`].
pub fn operation_to_wire(operation: &Operation) -> v1::Operation {
    let kind = match &operation.kind {
        OperationKind::Add { delta, floor, ceiling } => Kind::Add(v1::Add {
            delta: delta.to_string(),
            floor: floor.map(|floor| floor.to_string()),
            ceiling: ceiling.map(|ceiling| ceiling.to_string()),
        }),
        OperationKind::Put(value) => Kind::Put(v1::Put { value: value.clone() }),
        OperationKind::Insert(value) => Kind::Insert(v1::Insert { value: value.clone() }),
        OperationKind::Delete => Kind::Delete(v1::Delete {}),
        OperationKind::Require(condition) => Kind::Require(condition_to_wire(condition)),
    };
    v1::Operation { row: Some(row_to_wire(&operation.row)), kind: Some(kind) }
}

fn condition_to_wire(condition: &Condition) -> v1::Require {
    use require::Condition as Wire;
    let condition = match condition {
        Condition::Exists(exists) => Wire::Exists(*exists),
        Condition::VersionIs(stamp) => Wire::Version(stamp.0),
        Condition::RecordIs(value) => Wire::Value(value.clone()),
        Condition::AtLeast(least) => Wire::BalanceAtLeast(least.to_string()),
        Condition::AtMost(most) => Wire::BalanceAtMost(most.to_string()),
        Condition::BalanceIs(equal) => Wire::BalanceEquals(equal.to_string()),
    };
    v1::Require { condition: Some(condition) }
}

/// The key of a row. An error names `partition` or `name`.
pub fn row_from_wire(row: v1::Row) -> Result<RowKey, FieldError> {
    RowKey::new(&row.partition, &row.name).map_err(|(field, problem)| BatchError::new(field, problem))
}

/// The opposite of [`row_from_wire`].
pub fn row_to_wire(row: &RowKey) -> v1::Row {
    v1::Row { partition: row.partition().to_owned(), name: row.name().to_owned() }
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use proptest::{collection::vec, option, prelude::*};
    use verdict_protocol::ids::{BatchId, Millis};

    use super::*;

    pub fn any_bytes() -> impl Strategy<Value = Bytes> {
        vec(any::<u8>(), 0..20).prop_map(Bytes::from)
    }

    pub fn any_row() -> impl Strategy<Value = RowKey> {
        ("[a-zé:/#]{1,9}", "[A-Zß/ ]{1,9}")
            .prop_map(|(partition, name)| RowKey::new(&partition, &name).unwrap())
    }

    fn any_condition() -> impl Strategy<Value = Condition> {
        prop_oneof![
            any::<bool>().prop_map(Condition::Exists),
            any::<u64>().prop_map(|version| Condition::VersionIs(Stamp(version))),
            any_bytes().prop_map(Condition::RecordIs),
            any::<i128>().prop_map(Condition::AtLeast),
            any::<i128>().prop_map(Condition::AtMost),
            any::<i128>().prop_map(Condition::BalanceIs),
        ]
    }

    pub fn any_operation() -> impl Strategy<Value = Operation> {
        let kind = prop_oneof![
            (any::<i128>(), option::of(any::<i128>()), option::of(any::<i128>()))
                .prop_map(|(delta, floor, ceiling)| OperationKind::Add { delta, floor, ceiling }),
            any_bytes().prop_map(OperationKind::Put),
            any_bytes().prop_map(OperationKind::Insert),
            Just(OperationKind::Delete),
            any_condition().prop_map(OperationKind::Require),
        ];
        (any_row(), kind).prop_map(|(row, kind)| Operation { row, kind })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_batch_comes_back(
            time in 0u64..1 << 48,
            tail: [u8; 10],
            timeout_ms: u32,
            zero_sum: bool,
            operations in vec(any_operation(), 0..5),
        ) {
            let batch = Batch { id: BatchId::from_parts(Millis(time), tail), timeout_ms, operations, zero_sum };
            prop_assert_eq!(batch_from_wire(batch_to_wire(&batch)).unwrap(), batch);
        }
    }

    fn wire(operation: v1::Operation) -> v1::Batch {
        let id = BatchId::from_parts(Millis(1), [0; 10]).to_string();
        let fine = v1::Operation {
            row: Some(v1::Row { partition: "a".into(), name: "USD".into() }),
            kind: Some(Kind::Delete(v1::Delete {})),
        };
        v1::Batch { id, operations: vec![fine, operation], ..Default::default() }
    }

    fn field(partition: &str, kind: Option<Kind>) -> String {
        let row = Some(v1::Row { partition: partition.into(), name: "USD".into() });
        batch_from_wire(wire(v1::Operation { row, kind })).unwrap_err().field
    }

    #[test]
    fn an_error_names_the_exact_field() {
        let add = |delta: &str, floor: Option<&str>, ceiling: Option<&str>| {
            let (floor, ceiling) = (floor.map(str::to_owned), ceiling.map(str::to_owned));
            Some(Kind::Add(v1::Add { delta: delta.to_owned(), floor, ceiling }))
        };
        let require = |condition| Some(Kind::Require(v1::Require { condition }));
        let at = |rest: &str| format!("batch.operations[1].{rest}");
        assert_eq!(field("a", add("x", None, None)), at("add.delta"));
        assert_eq!(field("a", add("1", Some(""), None)), at("add.floor"));
        assert_eq!(field("a", add("1", None, Some("+1"))), at("add.ceiling"));
        assert_eq!(field("", add("1", None, None)), at("row.partition"));
        assert_eq!(field("a", None), at("kind"));
        assert_eq!(field("a", require(None)), at("require.condition"));
        let balance = require::Condition::BalanceAtMost("1.5".to_owned());
        assert_eq!(field("a", require(Some(balance))), at("require.balance_at_most"));
        let without_row = v1::Operation { row: None, kind: Some(Kind::Delete(v1::Delete {})) };
        assert_eq!(batch_from_wire(wire(without_row)).unwrap_err().to_string(), at("row: is missing"));
        assert_eq!(batch_from_wire(v1::Batch::default()).unwrap_err().field, "batch.id");
    }
}
