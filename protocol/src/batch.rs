//! Batches: what a client submits, checked and split by shard.
//!
//! A batch that has passed [`Batch::check`] can be settled or rejected, but is never malformed. Its [`ContentHash`] covers all
//! that decides its effects (operations and `zero_sum`), not how long the coordinator may try. What is settled is a [`SplitBatch`]: each
//! of its parts is encoded once, and passed on as it is.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use smallvec::SmallVec;

use crate::{
    ids::{BatchId, ContentHash, ShardId, Stamp},
    wire::{EncodedPart, write_operation},
};

/// The longest name of a partition or of a row, in bytes.
pub const NAME_BYTES_MAX: usize = 256;

/// The key of a row: its partition and its name inside it. Ordered by partition first.
///
/// Kept as `partition, 0x00, name` in one piece; neither part contains a NUL. Most keys are short, and lie in place.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey(SmallVec<[u8; 40]>);

/// In one go: what could be derived copies byte by byte.
impl Clone for RowKey {
    fn clone(&self) -> RowKey {
        RowKey(SmallVec::from_slice(&self.0))
    }
}

impl RowKey {
    /// A key of its two parts, or what is wrong with them: the field (`partition` or `name`) and the problem.
    pub fn new(partition: &str, name: &str) -> Result<RowKey, (&'static str, String)> {
        for (field, text) in [("partition", partition), ("name", name)] {
            let problem = if text.is_empty() {
                "must not be empty".to_owned()
            } else if text.len() > NAME_BYTES_MAX {
                format!("is {} bytes long, at most {NAME_BYTES_MAX} are allowed", text.len())
            } else if !is_plain(text) && text.chars().any(char::is_control) {
                format!("{text:?} contains a control character")
            } else {
                continue;
            };
            return Err((field, problem));
        }
        let mut bytes = SmallVec::with_capacity(partition.len() + 1 + name.len());
        bytes.extend_from_slice(partition.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(name.as_bytes());
        Ok(RowKey(bytes))
    }

    /// Of bytes that may be no key: [`RowKey::check`] tells.
    pub(crate) fn from_encoded(bytes: &[u8]) -> RowKey {
        RowKey(SmallVec::from_slice(bytes))
    }

    /// Whether a key that was decoded is one, as [`RowKey::new`] makes them. Nothing else may be asked of one that is none.
    pub fn check(&self) -> Result<(), BatchError> {
        let parts = std::str::from_utf8(&self.0).ok().and_then(|text| text.split_once('\0'));
        let (partition, name) =
            parts.ok_or_else(|| BatchError::new("row", "is not a partition, a zero byte and a name"))?;
        let key = RowKey::new(partition, name);
        key.map(|_| ()).map_err(|(field, problem)| BatchError::new(format!("row.{field}"), problem))
    }

    /// The bytes as they are stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What it takes in memory beside itself, in bytes: a long one doesn't lie in place.
    pub fn heap_bytes(&self) -> usize {
        if self.0.spilled() { self.0.capacity() } else { 0 }
    }

    /// The partition.
    pub fn partition(&self) -> &str {
        self.parts().0
    }

    /// The name inside the partition.
    pub fn name(&self) -> &str {
        self.parts().1
    }

    /// The asset of the balance in this row: its name up to the first `/`.
    pub fn asset(&self) -> &str {
        self.name().split('/').next().unwrap_or_default()
    }

    fn parts(&self) -> (&str, &str) {
        let text = std::str::from_utf8(&self.0).expect("a key is made of two strings");
        text.split_once('\0').expect("a key has a NUL between its parts")
    }
}

/// Whether a text is made of printable ASCII alone, as most are.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// As bytes in one piece.
impl Serialize for RowKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RowKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RowKey, D::Error> {
        struct Key;
        impl de::Visitor<'_> for Key {
            type Value = RowKey;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the key of a row")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<RowKey, E> {
                Ok(RowKey(SmallVec::from_slice(bytes)))
            }
        }
        deserializer.deserialize_bytes(Key)
    }
}

impl std::fmt::Debug for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}#{}", self.partition(), self.name())
    }
}

/// One change or one condition on one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Operation {
    /// The row.
    pub row: RowKey,
    /// What to do with it.
    pub kind: OperationKind,
}

impl Operation {
    /// What it takes when encoded, or a little more.
    fn bytes_at_most(&self) -> usize {
        // Three numbers of 128 bits take 19 bytes each at most, and so do lengths and marks together.
        let contents = match &self.kind {
            OperationKind::Put(value)
            | OperationKind::Insert(value)
            | OperationKind::Require(Condition::RecordIs(value)) => value.len(),
            OperationKind::Add { .. } | OperationKind::Delete | OperationKind::Require(_) => 0,
        };
        self.row.as_bytes().len() + contents + 80
    }
}

/// What an operation does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OperationKind {
    /// Changes a balance.
    Add {
        /// The signed change, in smallest units.
        delta: i128,
        /// The balance afterwards must be at least this. None: 0 for a negative delta, no floor otherwise.
        floor: Option<i128>,
        /// The balance afterwards must be at most this.
        ceiling: Option<i128>,
    },
    /// Writes a record.
    Put(Bytes),
    /// Writes a record that must not exist.
    Insert(Bytes),
    /// Removes a record, if there is one.
    Delete,
    /// Demands something, changes nothing.
    Require(Condition),
}

/// What a `Require` demands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Condition {
    /// The row exists, or doesn't.
    Exists(bool),
    /// The stamp of the last change is this; 0: never written.
    VersionIs(Stamp),
    /// A record with these contents.
    RecordIs(Bytes),
    /// A balance of at least this.
    AtLeast(i128),
    /// A balance of at most this.
    AtMost(i128),
    /// A balance of exactly this.
    BalanceIs(i128),
}

/// What a client submits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// How long the coordinator may try before it decides abort; 0: the default.
    pub timeout_ms: u32,
    /// The operations, in order.
    pub operations: Vec<Operation>,
    /// Whether the deltas of each asset must add up to 0.
    pub zero_sum: bool,
}

/// Limits on a batch. Half of each is worth a warning in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Operations per batch.
    pub operations_max: usize,
    /// Participants per batch.
    pub participants_max: usize,
    /// Bytes of all operations of a batch, as they are encoded for the shards.
    pub bytes_max: usize,
}

impl Default for BatchLimits {
    fn default() -> Self {
        BatchLimits { operations_max: 1000, participants_max: 64, bytes_max: 1 << 20 }
    }
}

/// What is wrong with a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct BatchError {
    /// The field, as the wire contract names it.
    pub field: String,
    /// What is wrong with it and what to do.
    pub problem: String,
}

impl BatchError {
    /// An error in a field of the batch.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> BatchError {
        BatchError { field: field.into(), problem: problem.into() }
    }
}

/// Which shard owns a partition. Fixed when a cluster is set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// How many shards there are: 1 to this number.
    pub shards: u32,
}

impl Placement {
    /// The shard that owns a partition: FNV-1a (64 bits) of its name, finished with a multiply-shift so that all bits count,
    /// scaled to the number of shards. Part of the stored format: it never changes.
    pub fn shard_of(&self, partition: &str) -> ShardId {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in partition.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let scaled = (u128::from(hash) * u128::from(self.shards)) >> 64;
        ShardId(1 + scaled as u32)
    }

    /// All shards.
    pub fn all(&self) -> impl Iterator<Item = ShardId> {
        (1..=self.shards).map(ShardId)
    }
}

/// The operations of one shard, each with its place in the whole batch.
pub type Part = Vec<(u32, Operation)>;

/// A batch as it is settled: its parts, each encoded once, as it is sent to its shard and put into that one's log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SplitBatch {
    /// Its id.
    pub id: BatchId,
    /// Hash of its contents.
    pub hash: ContentHash,
    /// How long the coordinator may try before it decides abort; 0: the default.
    pub timeout_ms: u32,
    /// Its parts, in ascending order of their shards; at least one.
    pub parts: Vec<(ShardId, EncodedPart)>,
}

impl SplitBatch {
    /// What a leader checks of a batch that another node has split: that every shard will take its part.
    pub fn check(&self, placement: Placement) -> Result<(), PartError> {
        self.parts.iter().try_for_each(|(shard, part)| check_part(placement, *shard, part))
    }

    /// The part of a shard.
    pub fn part(&self, shard: ShardId) -> Option<&EncodedPart> {
        self.parts.iter().find(|(owner, _)| *owner == shard).map(|(_, part)| part)
    }

    /// Its participants, in ascending order.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.parts.iter().map(|(shard, _)| *shard)
    }
}

/// Why a shard can't take a part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// It is none, or none that could be carried out.
    #[error(transparent)]
    Malformed(#[from] BatchError),
    /// It has a row of another shard.
    #[error("row {row:?} was sent to shard {shard}, but it lives in shard {owner}")]
    Elsewhere {
        /// The row.
        row: RowKey,
        /// The shard that the part was for.
        shard: ShardId,
        /// The shard that owns the row.
        owner: ShardId,
    },
}

/// Whether a shard can take a part: it can be read, its rows live there, and its deltas add up. All replicas apply what is in a log: what
/// can't be applied would stop them all.
pub fn check_part(placement: Placement, shard: ShardId, part: &EncodedPart) -> Result<(), PartError> {
    let part = part.decode()?;
    for (_, operation) in &part {
        operation.row.check()?;
        check_owner(placement, shard, &operation.row)?;
    }
    check_deltas(part)?;
    Ok(())
}

/// Whether a row lives in a shard.
pub fn check_owner(placement: Placement, shard: ShardId, row: &RowKey) -> Result<(), PartError> {
    let owner = placement.shard_of(row.partition());
    if owner == shard { Ok(()) } else { Err(PartError::Elsewhere { row: row.clone(), shard, owner }) }
}

/// Deltas on one row must not leave 128 bits together. Only deltas that are huge are looked at row by row.
fn check_deltas(part: Part) -> Result<(), BatchError> {
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
    Batch { id: BatchId([0; 16]), timeout_ms: 0, operations, zero_sum: false }.check_rows()
}

impl Batch {
    /// Splits it by shard, each part in the order of the batch. The hash is BLAKE3 of `zero_sum` (1 byte) and of each part in turn: its shard
    /// (4 bytes), its length (8 bytes), its bytes. As each operation tells its place, that is all of the batch.
    pub fn split(&self, placement: Placement) -> SplitBatch {
        let owner = |operation: &Operation| placement.shard_of(operation.row.partition());
        let mut by_shard: SmallVec<[(ShardId, u32); 16]> =
            (0..).zip(&self.operations).map(|(place, operation)| (owner(operation), place)).collect();
        by_shard.sort_unstable();
        let mut hashed = Vec::with_capacity(64 + 96 * self.operations.len());
        hashed.push(u8::from(self.zero_sum));
        let mut ends: SmallVec<[(ShardId, usize, usize); 4]> = SmallVec::new();
        for part in by_shard.chunk_by(|(one, _), (other, _)| one == other) {
            let shard = part[0].0;
            hashed.extend_from_slice(&shard.0.to_be_bytes());
            let length = hashed.len();
            hashed.extend_from_slice(&[0; 8]);
            let from = hashed.len();
            for (_, place) in part {
                write_operation(&mut hashed, *place, &self.operations[*place as usize]);
            }
            let bytes = (hashed.len() - from) as u64;
            hashed[length..from].copy_from_slice(&bytes.to_be_bytes());
            ends.push((shard, from, hashed.len()));
        }
        let hash = ContentHash(*blake3::hash(&hashed).as_bytes());
        let all = Bytes::from(hashed);
        let parts =
            ends.into_iter().map(|(shard, from, to)| (shard, EncodedPart::from_wire(all.slice(from..to))));
        SplitBatch { id: self.id, hash, timeout_ms: self.timeout_ms, parts: parts.collect() }
    }

    /// Checks all that can be checked without knowing any row.
    pub fn check(&self, limits: &BatchLimits, placement: Placement) -> Result<(), BatchError> {
        if !self.id.is_v7() {
            return Err(BatchError::new("batch.id", format!("{} is not a UUID of version 7", self.id)));
        }
        let count = self.operations.len();
        if count == 0 {
            return Err(BatchError::new("batch.operations", "is empty: a batch has at least one operation"));
        }
        if count > limits.operations_max {
            let problem = format!("has {count} operations, at most {} are allowed", limits.operations_max);
            return Err(BatchError::new("batch.operations", problem));
        }
        let at_most: usize = self.operations.iter().map(Operation::bytes_at_most).sum();
        let bytes = if at_most > limits.bytes_max { self.bytes() } else { 0 };
        if bytes > limits.bytes_max {
            let problem = format!("takes {bytes} bytes, at most {} are allowed", limits.bytes_max);
            return Err(BatchError::new("batch.operations", problem));
        }
        self.check_rows()?;
        if self.zero_sum {
            self.check_zero_sum()?;
        }
        let mut shards: Vec<_> =
            self.operations.iter().map(|operation| placement.shard_of(operation.row.partition())).collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.len() > limits.participants_max {
            let problem =
                format!("touch {} shards, at most {} are allowed", shards.len(), limits.participants_max);
            return Err(BatchError::new("batch.operations", problem));
        }
        Ok(())
    }

    /// What its operations take in their parts.
    fn bytes(&self) -> usize {
        EncodedPart::new((0..).zip(&self.operations)).bytes().len()
    }

    /// Operations on one row must make sense together.
    fn check_rows(&self) -> Result<(), BatchError> {
        #[derive(Default)]
        struct Seen {
            balance: Option<usize>,
            record: Option<usize>,
            write: Option<usize>,
            sum: i128,
        }
        let mut rows: BTreeMap<&RowKey, Seen> = BTreeMap::new();
        for (place, operation) in self.operations.iter().enumerate() {
            let seen = rows.entry(&operation.row).or_default();
            let clash = |other: usize, what: &str| {
                let problem = format!("clashes with operations[{other}] on row {:?}: {what}", operation.row);
                Err(BatchError::new(format!("batch.operations[{place}]"), problem))
            };
            match &operation.kind {
                OperationKind::Add { delta, floor, ceiling } => {
                    let Some(sum) = seen.sum.checked_add(*delta) else {
                        let problem = format!("the deltas on row {:?} overflow 128 bits", operation.row);
                        return Err(BatchError::new(format!("batch.operations[{place}].add.delta"), problem));
                    };
                    seen.sum = sum;
                    if let (Some(floor), Some(ceiling)) = (floor, ceiling)
                        && floor > ceiling
                    {
                        let problem = format!("the floor {floor} is above the ceiling {ceiling}");
                        return Err(BatchError::new(format!("batch.operations[{place}].add.floor"), problem));
                    }
                    let low = floor.unwrap_or(if *delta < 0 { 0 } else { i128::MIN });
                    let high = ceiling.unwrap_or(i128::MAX);
                    if (sum < 0 && low.checked_sub(sum).is_none())
                        || (sum > 0 && high.checked_sub(sum).is_none())
                    {
                        let problem = "no balance of 128 bits fits this delta with its floor and ceiling";
                        return Err(BatchError::new(format!("batch.operations[{place}].add"), problem));
                    }
                    seen.balance.get_or_insert(place);
                }
                OperationKind::Put(_) | OperationKind::Insert(_) | OperationKind::Delete => {
                    if let Some(other) = seen.write {
                        return clash(other, "a batch writes a record at most once");
                    }
                    seen.write = Some(place);
                    seen.record.get_or_insert(place);
                }
                OperationKind::Require(Condition::RecordIs(_)) => {
                    seen.record.get_or_insert(place);
                }
                OperationKind::Require(
                    Condition::AtLeast(_) | Condition::AtMost(_) | Condition::BalanceIs(_),
                ) => {
                    seen.balance.get_or_insert(place);
                }
                OperationKind::Require(Condition::Exists(_) | Condition::VersionIs(_)) => {}
            }
            if let (Some(balance), Some(record)) = (seen.balance, seen.record) {
                let what = "one treats the row as a balance, the other as a record";
                return clash(balance.min(record), what);
            }
        }
        Ok(())
    }

    fn check_zero_sum(&self) -> Result<(), BatchError> {
        let mut sums: BTreeMap<&str, i128> = BTreeMap::new();
        for operation in &self.operations {
            if let OperationKind::Add { delta, .. } = &operation.kind {
                let sum = sums.entry(operation.row.asset()).or_default();
                *sum = sum.checked_add(*delta).ok_or_else(|| {
                    let problem = format!("the deltas of {} overflow 128 bits", operation.row.asset());
                    BatchError::new("batch.zero_sum", problem)
                })?;
            }
        }
        match sums.into_iter().find(|(_, sum)| *sum != 0) {
            None => Ok(()),
            Some((asset, sum)) => {
                let problem = format!("the deltas of {asset} add up to {sum}, not to 0");
                Err(BatchError::new("batch.zero_sum", problem))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Millis;

    fn row(partition: &str, name: &str) -> RowKey {
        RowKey::new(partition, name).unwrap()
    }

    fn add(partition: &str, name: &str, delta: i128) -> Operation {
        Operation {
            row: row(partition, name),
            kind: OperationKind::Add { delta, floor: None, ceiling: None },
        }
    }

    fn batch(operations: Vec<Operation>, zero_sum: bool) -> Batch {
        Batch { id: BatchId::from_parts(Millis(1), [0; 10]), timeout_ms: 0, operations, zero_sum }
    }

    fn problem(batch: &Batch) -> String {
        batch.check(&BatchLimits::default(), Placement { shards: 3 }).unwrap_err().to_string()
    }

    #[test]
    fn a_batch_that_creates_money_is_refused_by_zero_sum() {
        let mut trade = batch(vec![add("a", "USD", -5), add("b", "USD/margin", 4)], true);
        assert_eq!(problem(&trade), "batch.zero_sum: the deltas of USD add up to -1, not to 0");
        trade.operations.push(add("c", "USD", 1));
        trade.check(&BatchLimits::default(), Placement { shards: 3 }).unwrap();
    }

    #[test]
    fn clashing_operations_name_each_other() {
        let put = |value: &'static [u8]| Operation {
            row: row("a", "x"),
            kind: OperationKind::Put(Bytes::from_static(value)),
        };
        let mixed = batch(vec![add("a", "x", 1), put(b"1")], false);
        assert!(
            problem(&mixed).starts_with("batch.operations[1]: clashes with operations[0]"),
            "{}",
            problem(&mixed)
        );
        let twice = batch(vec![put(b"1"), put(b"2")], false);
        assert!(problem(&twice).contains("at most once"));
    }

    #[test]
    fn deltas_that_overflow_are_refused() {
        let wide = batch(vec![add("a", "x", i128::MAX), add("a", "x", 1)], false);
        assert!(problem(&wide).contains("overflow"), "{}", problem(&wide));
    }

    #[test]
    fn the_placement_is_part_of_the_format() {
        let placement = Placement { shards: 4 };
        let shards: Vec<u32> = ["user:1", "user:2", "user:3", "trade:BTC-USDT:1"]
            .map(|name| placement.shard_of(name).0)
            .to_vec();
        assert_eq!(shards, [1, 1, 2, 4]);
        let mut counts = [0; 4];
        for user in 0..4000 {
            counts[placement.shard_of(&format!("user:{user}")).0 as usize - 1] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "uneven: {counts:?}");
    }
}
