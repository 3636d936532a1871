//! What is written down while a drill runs. All that is judged afterwards is judged from this alone.
//!
//! Times are in seconds since the load began.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use verdict_client::{AbortReason, ClientError, Outcome, Row, UndecidedState};

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// How long the load ran.
    pub load_seconds: f64,
    /// Batches in flight, at most.
    pub window: usize,
    /// Trades per second that were wanted; 0: as fast as the answers came.
    pub rate: u32,
    /// All balances that the load touches.
    pub accounts: Vec<Row>,
    /// The place (in `accounts`) of those that may be below 0.
    pub unbounded: BTreeSet<usize>,
    /// What they held before the load.
    pub initial: Vec<i128>,
    /// The batches, in the order in which they were due.
    pub batches: Vec<Attempt>,
    /// Batches that were submitted again under the same id.
    pub repeats: Vec<Repeat>,
    /// Reads of all balances.
    pub reads: Vec<Read>,
    /// Reads that had no answer in time.
    pub reads_unanswered: u64,
    /// What was done to the cluster.
    pub events: Vec<Event>,
    /// The nodes with a replica of each group, when the load began.
    pub replicas: BTreeMap<u32, Vec<u64>>,
    /// What the nodes said about themselves.
    pub samples: Vec<Sample>,
    /// What was in doubt.
    pub doubts: Vec<Doubt>,
    /// State hashes that were seen, by group and index, with the nodes that showed them.
    pub hashes: BTreeMap<(u32, u64), BTreeMap<String, BTreeSet<u64>>>,
    /// What was asked afterwards.
    pub audit: Audit,
}

/// What a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A trade: there are funds for it.
    Trade,
    /// It asks for far more than there is.
    Overdraft,
}

/// One batch and what was said about it.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Its id.
    pub id: Uuid,
    /// What it is.
    pub kind: Kind,
    /// Its changes of balances: the place in `Record::accounts`, and the amount.
    pub deltas: Vec<(usize, i128)>,
    /// The shards that it touches.
    pub shards: BTreeSet<u32>,
    /// When it was to be sent.
    pub due: f64,
    /// When it was sent first.
    pub sent: f64,
    /// What was said, in order.
    pub answers: Vec<Answer>,
}

/// How something was learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// By submitting it.
    Submit,
    /// By asking for its id.
    GetBatch,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// When it came.
    pub at: f64,
    /// To which question.
    pub asked: Asked,
    /// What it was.
    pub said: Said,
    /// How many answers were lost before it, and asked for again under the same id by the client.
    pub lost: u32,
}

/// What is said about a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is committed, at this stamp.
    Committed(u64),
    /// It is aborted.
    Aborted(AbortReason),
    /// Not known.
    Unknown,
    /// There is no trace of it.
    NotSeen,
    /// Nothing was proposed: another try may do better.
    Refused,
    /// Refused for what the id is: it is known with other contents, or too old, or malformed.
    Denied(String),
    /// Another error, which says nothing of the batch.
    Failed(String),
}

impl Said {
    /// What a result of the client says.
    pub fn of(result: &Result<Outcome, ClientError>) -> Said {
        match result {
            Ok(Outcome::Committed { stamp }) => Said::Committed(*stamp),
            Ok(Outcome::Aborted { reason, .. }) => Said::Aborted(*reason),
            Ok(Outcome::Unknown { state: UndecidedState::NotSeen, .. }) => Said::NotSeen,
            Ok(Outcome::Unknown { .. }) => Said::Unknown,
            Err(ClientError::Overloaded { .. } | ClientError::Unavailable { .. }) => Said::Refused,
            Err(
                error @ (ClientError::InvalidArgument { .. }
                | ClientError::DifferentContents { .. }
                | ClientError::TooOld { .. }),
            ) => Said::Denied(error.to_string()),
            Err(error @ ClientError::Refused { .. }) => Said::Failed(error.to_string()),
        }
    }

    /// Whether it says anything of the batch. What doesn't can't contradict what was said before.
    pub fn is_answer(&self) -> bool {
        match self {
            Said::Committed(_) | Said::Aborted(_) | Said::NotSeen | Said::Denied(_) => true,
            Said::Unknown | Said::Refused | Said::Failed(_) => false,
        }
    }

    /// Whether it never changes.
    pub fn is_definite(&self) -> bool {
        matches!(self, Said::Committed(_) | Said::Aborted(_))
    }
}

impl Attempt {
    /// The first definite answer, and when it came.
    pub fn end(&self) -> Option<&Answer> {
        self.answers.iter().find(|answer| answer.said.is_definite())
    }

    /// The stamp, if it is committed.
    pub fn stamp(&self) -> Option<u64> {
        match self.end()?.said {
            Said::Committed(stamp) => Some(stamp),
            _ => None,
        }
    }

    /// Whether the answer to a submit was UNKNOWN.
    pub fn was_unknown(&self) -> bool {
        self.answers.iter().any(|answer| answer.asked == Asked::Submit && answer.said == Said::Unknown)
    }
}

/// A batch that was submitted again.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeat {
    /// Its place in `Record::batches`.
    pub number: usize,
    /// When the answer came.
    pub at: f64,
    /// The answer.
    pub said: Said,
}

/// A read of all balances at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// When it was asked.
    pub from: f64,
    /// When it was answered.
    pub to: f64,
    /// The greatest stamp that had been answered before it was asked.
    pub answered: u64,
    /// Its position.
    pub position: u64,
    /// The balances, in the order of `Record::accounts`.
    pub balances: Vec<i128>,
}

/// Something that was done to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When it began.
    pub at: f64,
    /// When it was done.
    pub done: f64,
    /// The step, as it is written in the scenario.
    pub step: String,
    /// What was really done, for people.
    pub what: String,
    /// Whether something was broken, or mended.
    pub kind: EventKind,
    /// The nodes that can't take part afterwards: dead, paused or cut off.
    pub impaired: BTreeSet<u64>,
    /// The node that went for good, and the one that has taken its place.
    pub replaced: Option<(u64, u64)>,
    /// What should have happened and did not.
    pub troubles: Vec<String>,
}

/// What an event does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It breaks something.
    Fault {
        /// Whether processes died.
        kills: bool,
    },
    /// It mends something.
    Repair,
    /// It is waited for, or there was nothing to do.
    Wait,
}

/// What one node said about itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// When.
    pub at: f64,
    /// Which node.
    pub node: u64,
    /// Parts in doubt in the groups that it leads.
    pub in_doubt: u32,
    /// Prepares that wait in line there.
    pub waiting: u32,
    /// Decisions that are not confirmed by all.
    pub unfinished: u32,
    /// Its memory, in bytes, where it can be told.
    pub memory: Option<u64>,
}

/// The parts that were in doubt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Doubt {
    /// When it was asked.
    pub at: f64,
    /// For each part that has voted: since when the replica that told of it has held it.
    pub since: Vec<f64>,
    /// Whether all shards could be asked.
    pub complete: bool,
}

/// What was asked after the run, when everything was mended.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// What each balance holds.
    pub balances: Vec<i128>,
    /// What each node says about each batch: the node, the batch's number, the answer.
    pub asked: Vec<(u64, usize, Said)>,
    /// All batches once more under their ids: the number, the answer.
    pub again: Vec<(usize, Said)>,
    /// Whether each batch's record exists.
    pub records: Vec<bool>,
    /// The decisions that the log has about our ids: the batch's number, the outcome.
    pub decisions: Vec<(usize, Said)>,
    /// Whether these are all.
    pub decisions_complete: bool,
    /// The batches that changed the fee account, as its history tells, with the amounts; None: it could not be read.
    pub fees: Option<Vec<(Uuid, i128)>>,
    /// Ids that were submitted with other contents, and what was said.
    pub other_contents: Vec<Said>,
    /// An id from before the horizon, and what was said; None: there is none yet.
    pub too_old: Option<Said>,
    /// What was not finished in the end, if anything.
    pub not_quiet: Option<String>,
    /// How long it took after the load until everything was finished.
    pub quiet_seconds: f64,
    /// Whether all replicas of each group showed the same hash at the same index in the end; None: they were not at one index.
    pub equal: Option<bool>,
    /// Questions that were not answered.
    pub troubles: Vec<String>,
}
