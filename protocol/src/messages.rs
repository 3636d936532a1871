//! What coordinator and shards say to each other, and the values of which it is made.
//!
//! Every message may come twice, late or never. What makes that harmless stands with each.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    batch::{Placement, RowKey},
    ids::{BatchId, ContentHash, Epoch, GroupId, Number, ShardId, Stamp},
    wire::EncodedPart,
};

/// From a coordinator's leader to one shard. Becomes a part of one entry of the shard's log, so all of it is applied or none; it
/// is applied in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ToShard {
    /// The coordinator group.
    pub coordinator: GroupId,
    /// Where partitions live, as the sender is configured. A shard that knows otherwise takes nothing of it.
    pub placement: Placement,
    /// The epoch of the sender.
    pub epoch: Epoch,
    /// All prepares up to this number are finished for this shard. True for ever, so an old one is harmless.
    pub mark: Number,
    /// Nobody will read at a position below this any more. True for ever.
    pub history: Stamp,
    /// Asks to record the epoch and to list what is held. Answered again when it comes again.
    pub greet: bool,
    /// Decisions. The second one changes nothing and is confirmed again.
    pub outcomes: Vec<PartOutcome>,
    /// Prepares, in order of their numbers. A repeated one gets the same answer; a late one is refused by its number.
    pub prepares: Vec<Prepare>,
}

impl ToShard {
    /// Whether it says nothing that needs an entry in the log.
    pub fn is_empty(&self) -> bool {
        !self.greet && self.outcomes.is_empty() && self.prepares.is_empty()
    }
}

/// Asks for a vote.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepare {
    /// Its number.
    pub number: Number,
    /// The batch.
    pub id: BatchId,
    /// Hash of the whole batch (rule R8).
    pub hash: ContentHash,
    /// All participants, in ascending order (rule R8).
    pub shards: Vec<ShardId>,
    /// Earlier numbers of the same batch that are given up by this one.
    pub gives_up: Vec<Number>,
    /// Set if this shard is the only participant: it may commit the batch at once, at this stamp, on its own word.
    pub sole: Option<Stamp>,
    /// The operations of this shard.
    pub part: EncodedPart,
}

/// Tells a decision.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartOutcome {
    /// The batch.
    pub id: BatchId,
    /// The number under which it was decided.
    pub number: Number,
    /// Commit at this stamp, or abort.
    pub commit: Option<Stamp>,
    /// Other numbers of the batch that end with it.
    pub gives_up: Vec<Number>,
}

/// From a shard to a coordinator's leader. Sent after what it tells is applied, hence replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FromShard {
    /// The answer to a greeting.
    pub greeting: Option<Greeting>,
    /// Votes and refusals.
    pub votes: Vec<Vote>,
    /// Outcomes that have been carried out.
    pub done: Vec<Done>,
    /// Parts that have been in doubt for long: please tell.
    pub asks: Vec<HeldPart>,
}

impl FromShard {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.greeting.is_none() && self.votes.is_empty() && self.done.is_empty() && self.asks.is_empty()
    }
}

/// The promise of rule R11: nothing of an epoch older than this takes away what is listed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Greeting {
    /// The epoch that is recorded; newer than the one that greeted if that has been deposed.
    pub epoch: Epoch,
    /// All that is held for this coordinator.
    pub parts: Vec<HeldPart>,
}

/// What a shard holds of one batch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeldPart {
    /// The number under which it is held.
    pub number: Number,
    /// The batch.
    pub id: BatchId,
    /// Hash of its contents.
    pub hash: ContentHash,
    /// Its participants.
    pub shards: Vec<ShardId>,
    /// YES, NO, waiting or committed.
    pub vote: VoteKind,
}

/// The answer to a prepare. Counts only under its own number (rule R4).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vote {
    /// The batch.
    pub id: BatchId,
    /// The number.
    pub number: Number,
    /// What it says.
    pub kind: VoteKind,
}

/// What a vote says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VoteKind {
    /// "I can do my part, whatever happens to me, whenever you say so."
    Yes,
    /// The batch can't commit.
    No(Abort),
    /// In line behind lower numbers; the vote follows.
    Waiting,
    /// Refused: a higher number holds a row. Try again under a new number.
    Conflict,
    /// Refused: the epoch is not the one that is recorded here.
    OldEpoch,
    /// Refused: the number is finished.
    Finished,
    /// Refused: a part of the same batch is held under an older epoch or with other contents.
    Held,
    /// Refused: too many parts are held.
    Overloaded,
    /// The batch is committed, at this stamp: its only participant has carried it out.
    Committed(Stamp),
}

/// The answer to an outcome (rule R2: only this counts, and only if not `lost`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Done {
    /// The batch.
    pub id: BatchId,
    /// The number under which it was decided.
    pub number: Number,
    /// The shard knows nothing of that number. Must not be, and is never taken for done.
    pub lost: bool,
}

/// Why a batch is aborted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Abort {
    /// The reason.
    pub reason: AbortReason,
    /// The place of the operation that failed in the whole batch, where there is one.
    pub operation: Option<u32>,
    /// What it met.
    pub met: Option<Met>,
}

impl Abort {
    /// An abort that no single operation is to blame for.
    pub fn because(reason: AbortReason) -> Abort {
        Abort { reason, operation: None, met: None }
    }
}

/// The reasons, as the wire contract explains them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // each stands in proto/verdict/v1/types.proto
pub enum AbortReason {
    ShortOfFunds,
    AboveCeiling,
    Overflow,
    ConditionNotMet,
    RowExists,
    WrongKind,
    Contention,
    ParticipantUnavailable,
    Interrupted,
    Cancelled,
}

/// What an operation met.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Met {
    /// A balance.
    Balance(i128),
    /// A record; its first bytes if it is long.
    Record(Bytes),
    /// A version.
    Version(Stamp),
    /// No row.
    Absent,
}

/// One decision, as it is recorded. It never changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Decision {
    /// The batch.
    pub id: BatchId,
    /// Hash of its contents; none if the id was cancelled unseen.
    pub hash: Option<ContentHash>,
    /// The participants, in ascending order.
    pub shards: Vec<ShardId>,
    /// The number under which it was decided.
    pub number: Number,
    /// Commit at a stamp, or abort.
    pub result: Result<Stamp, Abort>,
}

/// A read of rows of one shard at one position.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ShardRead {
    /// The position.
    pub position: Stamp,
    /// Whether the coordinator has said which parts in doubt matter: those in `wait_for`.
    pub known: bool,
    /// Batches whose parts have to be gone first.
    pub wait_for: Vec<BatchId>,
    /// What to read.
    pub query: ShardQuery,
}

/// What to read of one shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ShardQuery {
    /// The values of rows.
    Rows(Vec<RowKey>),
    /// The changes of one row with stamps from `from` on, at most `limit`.
    History {
        /// The row.
        row: RowKey,
        /// The first stamp.
        from: Stamp,
        /// How many.
        limit: usize,
    },
}

/// The answer of a shard to a read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ShardReadAnswer {
    /// These parts in doubt would write the rows: ask again with `known` set.
    InDoubt(Vec<BatchId>),
    /// The values, in the order of the rows.
    Rows(Vec<RowAt>),
    /// A part of the history.
    History {
        /// The changes, oldest first.
        changes: Vec<RowChange>,
        /// Where it goes on.
        next: Option<Stamp>,
        /// Changes below this are not told any more; 0: all are kept.
        oldest: Stamp,
    },
    /// The position lies below the history mark: what the rows held there may have been dropped.
    Pruned {
        /// The mark.
        history: Stamp,
    },
    /// The answer has more than [`READ_BYTES_MAX`] bytes.
    TooLarge,
}

/// The most that the contents of all rows, or of all changes, of one read may take, in bytes.
pub const READ_BYTES_MAX: usize = 8 << 20;

/// What a row holds at some position.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowAt {
    /// The stamp of its last change; 0: never written.
    pub version: Stamp,
    /// Its contents.
    pub value: RowValue,
}

/// The contents of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RowValue {
    /// The row doesn't exist.
    #[default]
    Absent,
    /// An exact amount in smallest units.
    Balance(i128),
    /// Bytes.
    Record(Bytes),
}

impl RowValue {
    /// What the contents take, about.
    pub fn bytes(&self) -> usize {
        match self {
            RowValue::Absent | RowValue::Balance(_) => 16,
            RowValue::Record(bytes) => 16 + bytes.len(),
        }
    }
}

/// What one batch did to one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowChange {
    /// The batch.
    pub id: BatchId,
    /// Its stamp.
    pub stamp: Stamp,
    /// The change of a balance.
    pub delta: Option<i128>,
    /// What the row held afterwards.
    pub result: RowValue,
}
