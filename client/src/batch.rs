//! Makes batches.

use std::time::Duration;

use uuid::Uuid;
use verdict_proto::v1::{
    Add, Batch, Delete, Insert, Operation, Put, Require, Row, operation::Kind, require::Condition,
};

/// A row by its partition and its name.
pub fn row(partition: impl Into<String>, name: impl Into<String>) -> Row {
    Row { partition: partition.into(), name: name.into() }
}

/// Makes a batch, operation by operation. Nothing is checked here: the server names what is wrong.
#[derive(Clone, Debug)]
pub struct BatchBuilder {
    batch: Batch,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        BatchBuilder::new()
    }
}

impl BatchBuilder {
    /// An empty batch with a new id of the present time. Whoever may have to ask about the batch after a crash of its own
    /// stores the id before the first try.
    pub fn new() -> BatchBuilder {
        BatchBuilder::with_id(Uuid::now_v7().to_string())
    }

    /// An empty batch with an id that was made before: a UUID of version 7 in its canonical text form.
    pub fn with_id(id: impl Into<String>) -> BatchBuilder {
        BatchBuilder { batch: Batch { id: id.into(), ..Batch::default() } }
    }

    /// How long the coordinator may try before it decides abort. Milliseconds count; 0 is the server's default.
    pub fn timeout(mut self, timeout: Duration) -> BatchBuilder {
        self.batch.timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self
    }

    /// Demands that the deltas of each asset add up to 0.
    pub fn zero_sum(mut self) -> BatchBuilder {
        self.batch.zero_sum = true;
        self
    }

    /// Adds to a balance; it must not go below 0 if `delta` is negative.
    pub fn add(self, partition: impl Into<String>, name: impl Into<String>, delta: i128) -> BatchBuilder {
        self.add_within(partition, name, delta, None, None)
    }

    /// Adds to a balance with a floor and a ceiling of its own. No floor: 0 if `delta` is negative.
    pub fn add_within(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        delta: i128,
        floor: Option<i128>,
        ceiling: Option<i128>,
    ) -> BatchBuilder {
        let text = |amount: i128| amount.to_string();
        let add = Add { delta: text(delta), floor: floor.map(text), ceiling: ceiling.map(text) };
        self.operation(row(partition, name), Kind::Add(add))
    }

    /// Writes a record.
    pub fn put(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> BatchBuilder {
        self.operation(row(partition, name), Kind::Put(Put { value: value.into().into() }))
    }

    /// Writes a record that must not exist.
    pub fn insert(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> BatchBuilder {
        self.operation(row(partition, name), Kind::Insert(Insert { value: value.into().into() }))
    }

    /// Removes a record.
    pub fn delete(self, partition: impl Into<String>, name: impl Into<String>) -> BatchBuilder {
        self.operation(row(partition, name), Kind::Delete(Delete {}))
    }

    /// Demands that a row exists.
    pub fn require_exists(self, partition: impl Into<String>, name: impl Into<String>) -> BatchBuilder {
        self.require(row(partition, name), Condition::Exists(true))
    }

    /// Demands that a row doesn't exist.
    pub fn require_absent(self, partition: impl Into<String>, name: impl Into<String>) -> BatchBuilder {
        self.require(row(partition, name), Condition::Exists(false))
    }

    /// Demands that a row has this version; 0: it was never written.
    pub fn require_version(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        version: u64,
    ) -> BatchBuilder {
        self.require(row(partition, name), Condition::Version(version))
    }

    /// Demands that a record has exactly these contents.
    pub fn require_value(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> BatchBuilder {
        self.require(row(partition, name), Condition::Value(value.into().into()))
    }

    /// Demands a balance of at least this much.
    pub fn require_at_least(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        amount: i128,
    ) -> BatchBuilder {
        self.require(row(partition, name), Condition::BalanceAtLeast(amount.to_string()))
    }

    /// Demands a balance of at most this much.
    pub fn require_at_most(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        amount: i128,
    ) -> BatchBuilder {
        self.require(row(partition, name), Condition::BalanceAtMost(amount.to_string()))
    }

    /// Demands a balance of exactly this much.
    pub fn require_equals(
        self,
        partition: impl Into<String>,
        name: impl Into<String>,
        amount: i128,
    ) -> BatchBuilder {
        self.require(row(partition, name), Condition::BalanceEquals(amount.to_string()))
    }

    /// Adds a condition.
    pub fn require(self, row: Row, condition: Condition) -> BatchBuilder {
        self.operation(row, Kind::Require(Require { condition: Some(condition) }))
    }

    /// Adds an operation.
    pub fn operation(mut self, row: Row, kind: Kind) -> BatchBuilder {
        self.batch.operations.push(Operation { row: Some(row), kind: Some(kind) });
        self
    }

    /// The batch.
    pub fn build(self) -> Batch {
        self.batch
    }
}

/// Whether two batches have the same contents: how long the coordinator may try is not part of them.
pub(crate) fn same_contents(one: &Batch, other: &Batch) -> bool {
    one.operations == other.operations && one.zero_sum == other.zero_sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_an_id_of_its_own_and_of_version_7() {
        let (one, other) = (BatchBuilder::new().build(), BatchBuilder::new().build());
        assert_ne!(one.id, other.id);
        let id: Uuid = one.id.parse().expect("an id is a UUID");
        assert_eq!((id.get_version_num(), id.to_string()), (7, one.id));
    }

    #[test]
    fn amounts_at_the_ends_of_the_range_are_written_exactly() {
        let batch =
            BatchBuilder::new().add_within("a", "X", i128::MIN, Some(i128::MIN), Some(i128::MAX)).build();
        let Some(Kind::Add(add)) = &batch.operations[0].kind else { panic!("an add was made") };
        assert_eq!(add.delta, "-170141183460469231731687303715884105728");
        assert_eq!(add.floor.as_deref(), Some("-170141183460469231731687303715884105728"));
        assert_eq!(add.ceiling.as_deref(), Some("170141183460469231731687303715884105727"));
    }

    #[test]
    fn contents_are_the_operations_and_zero_sum_not_the_time_allowed() {
        let batch = BatchBuilder::new().add("a", "X", 1).build();
        let patient = Batch { timeout_ms: 5, ..batch.clone() };
        let stricter = Batch { zero_sum: true, ..batch.clone() };
        assert!(same_contents(&batch, &patient));
        assert!(!same_contents(&batch, &stricter));
    }
}
