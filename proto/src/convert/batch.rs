//! Batches and what they are made of. Batches themselves, and their parts, are decoded by [`verdict_protocol::wire`]; the tests here hold
//! that against the generated code.

use verdict_protocol::batch::{BatchError, RowKey};

use super::fields::FieldError;
use crate::v1;

impl v1::SubmitRequest {
    /// Of a batch.
    pub fn of(batch: &v1::Batch) -> v1::SubmitRequest {
        v1::SubmitRequest { batch: encoded(batch) }
    }
}

impl v1::SubmitStreamRequest {
    /// Of batches.
    pub fn of<'a>(batches: impl IntoIterator<Item = &'a v1::Batch>) -> v1::SubmitStreamRequest {
        v1::SubmitStreamRequest { batches: batches.into_iter().map(encoded).collect() }
    }
}

/// A batch, as requests hold it.
pub fn encoded(batch: &v1::Batch) -> bytes::Bytes {
    prost::Message::encode_to_vec(batch).into()
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
    use prost::Message as _;
    use verdict_protocol::{
        batch::{Batch, Condition, Operation, OperationKind, Placement},
        ids::{BatchId, Millis, Stamp},
        wire::{EncodedPart, Head},
    };

    use super::*;
    use crate::v1::{operation::Kind, require};

    /// What a client's generated code makes of a batch.
    fn batch_to_wire(batch: &Batch) -> v1::Batch {
        v1::Batch {
            id: batch.id.to_string(),
            timeout_ms: batch.timeout_ms,
            operations: batch.operations.iter().map(operation_to_wire).collect(),
            zero_sum: batch.zero_sum,
        }
    }

    fn operation_to_wire(operation: &Operation) -> v1::Operation {
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

    /// What the contract says of an operation in a part.
    fn part_operation(index: u32, operation: &Operation) -> v1::PartOperation {
        use v1::part_operation::Kind as Wire;
        // Whether a shorter form means the same.
        let bytes = |amount: i128| {
            let all = amount.to_be_bytes();
            let short = (0..16).rev().find(|from| {
                let sign = if all[*from] & 0x80 == 0 { 0 } else { 0xff };
                all[..*from].iter().all(|byte| *byte == sign)
            });
            Bytes::copy_from_slice(&all[short.unwrap()..])
        };
        let (mut floor, mut ceiling) = (None, None);
        let kind = match &operation.kind {
            OperationKind::Add { delta, floor: lowest, ceiling: highest } => {
                (floor, ceiling) = (lowest.map(bytes), highest.map(bytes));
                Wire::Delta(bytes(*delta))
            }
            OperationKind::Put(value) => Wire::Put(value.clone()),
            OperationKind::Insert(value) => Wire::Insert(value.clone()),
            OperationKind::Delete => Wire::Delete(true),
            OperationKind::Require(Condition::Exists(exists)) => Wire::Exists(*exists),
            OperationKind::Require(Condition::VersionIs(stamp)) => Wire::Version(stamp.0),
            OperationKind::Require(Condition::RecordIs(value)) => Wire::Value(value.clone()),
            OperationKind::Require(Condition::AtLeast(least)) => Wire::BalanceAtLeast(bytes(*least)),
            OperationKind::Require(Condition::AtMost(most)) => Wire::BalanceAtMost(bytes(*most)),
            OperationKind::Require(Condition::BalanceIs(equal)) => Wire::BalanceEquals(bytes(*equal)),
        };
        let row = Bytes::copy_from_slice(operation.row.as_bytes());
        v1::PartOperation { index, row, kind: Some(kind), floor, ceiling }
    }

    fn decoded(batch: &v1::Batch) -> Result<Batch, FieldError> {
        Batch::from_wire(&batch.encode_to_vec().into(), 1000)
    }

    /// The fields of a message, each as its own piece of bytes.
    fn fields_of(bytes: &[u8]) -> Vec<Vec<u8>> {
        let (mut fields, mut left) = (Vec::new(), bytes);
        while !left.is_empty() {
            let before = left;
            let (tag, wire) = prost::encoding::decode_key(&mut left).unwrap();
            prost::encoding::skip_field(wire, tag, &mut left, prost::encoding::DecodeContext::default())
                .unwrap();
            fields.push(before[..before.len() - left.len()].to_vec());
        }
        fields
    }

    prop_compose! {
        fn any_batch()(
            time in 0u64..1 << 48,
            tail: [u8; 10],
            timeout_ms: u32,
            zero_sum: bool,
            operations in vec(any_operation(), 0..5),
        ) -> Batch {
            Batch { id: BatchId::from_parts(Millis(time), tail), timeout_ms, operations, zero_sum }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_batch_comes_back(batch in any_batch()) {
            let wire = batch_to_wire(&batch);
            prop_assert_eq!(decoded(&wire).unwrap(), batch.clone());
            let bytes = wire.encode_to_vec();
            prop_assert_eq!(Head::of_wire(&bytes), Head { id: &wire.id, timeout_ms: batch.timeout_ms });
        }

        /// Decoders of other languages read parts by the contract, and whatever writes them so can be read here.
        #[test]
        fn a_part_is_what_the_contract_says(operations in vec((any::<u32>(), any_operation()), 0..5)) {
            let part = EncodedPart::new(operations.iter().map(|(place, operation)| (*place, operation)));
            let wire: Vec<_> = operations.iter().map(|(index, operation)| part_operation(*index, operation)).collect();
            prop_assert_eq!(&v1::Part::decode(part.bytes().clone()).unwrap().operations, &wire);
            prop_assert_eq!(&v1::Part { operations: wire }.encode_to_vec(), part.bytes());
            prop_assert_eq!(part.decode().unwrap(), operations);
        }

        #[test]
        fn parts_are_the_batch(batch in any_batch(), shards in 1u32..5) {
            let placement = Placement { shards };
            let split = batch.split(placement);
            let mut operations = Vec::new();
            for (shard, part) in &split.parts {
                for (place, operation) in part.decode().unwrap() {
                    prop_assert_eq!(placement.shard_of(operation.row.partition()), *shard);
                    operations.push((place, operation));
                }
            }
            prop_assert!(split.parts.is_sorted_by(|(one, _), (other, _)| one < other));
            operations.sort_by_key(|(place, _)| *place);
            prop_assert_eq!(operations, (0..).zip(batch.operations.clone()).collect::<Vec<_>>());
            prop_assert_eq!(split.hash, Batch { timeout_ms: 1, ..batch.clone() }.split(placement).hash);
            let other = Batch { zero_sum: !batch.zero_sum, ..batch.clone() };
            prop_assert_ne!(split.hash, other.split(placement).hash);
            if let Some(first) = batch.operations.first() {
                let mut longer = batch.clone();
                longer.operations.push(first.clone());
                prop_assert_ne!(split.hash, longer.split(placement).hash);
            }
        }

        /// What other encoders may make of it: fields in another order, fields that nobody knows, and fields that come twice.
        #[test]
        fn other_encodings_are_understood(batch in any_batch(), turn: usize, unknown: u64) {
            let wire = batch_to_wire(&batch);
            let mut fields = fields_of(&wire.encode_to_vec());
            // Operations keep their order among themselves.
            let (mut operations, mut others): (Vec<_>, Vec<_>) =
                fields.drain(..).partition(|field| field[0] >> 3 == 3);
            let mut strange = Vec::new();
            prost::encoding::uint64::encode(90, &unknown, &mut strange);
            prost::encoding::fixed64::encode(91, &unknown, &mut strange);
            prost::encoding::fixed32::encode(92, &7, &mut strange);
            prost::encoding::string::encode(1, &"given twice, the last one counts".to_owned(), &mut strange);
            if let Some(first) = operations.first_mut() {
                let inner = v1::Operation::decode(&*wire.operations[0].encode_to_vec()).unwrap();
                // A row in two pieces, in a field that comes twice, behind the kind.
                let row = inner.row.clone().unwrap();
                let kind = v1::Operation { row: None, ..inner };
                let partition = v1::Row { partition: row.partition, name: String::new() };
                let name = v1::Row { partition: String::new(), name: row.name };
                let mut bytes = kind.encode_to_vec();
                bytes.extend(v1::Operation { row: Some(partition), kind: None }.encode_to_vec());
                bytes.extend(v1::Operation { row: Some(name), kind: None }.encode_to_vec());
                bytes.extend(&strange[..strange.len() - 34]);
                first.clear();
                prost::encoding::bytes::encode(3, &bytes, first);
            }
            others.reverse();
            let middle = turn % (operations.len() + 1);
            let tail = operations.split_off(middle);
            let bytes: Vec<u8> =
                [operations, vec![strange], others, tail].into_iter().flatten().flatten().collect();
            prop_assert_eq!(v1::Batch::decode(&*bytes).unwrap(), wire, "so do generated decoders");
            prop_assert_eq!(Batch::from_wire(&bytes.into(), 1000).unwrap(), batch);
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
        decoded(&wire(v1::Operation { row, kind })).unwrap_err().field
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
        assert_eq!(decoded(&wire(without_row)).unwrap_err().to_string(), at("row: is missing"));
        assert_eq!(decoded(&v1::Batch::default()).unwrap_err().field, "batch.id");
    }
}
