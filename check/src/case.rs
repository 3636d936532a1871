//! A case: a small cluster, what its clients want, and how many faults may happen to it.

use verdict_protocol::{
    batch::{Batch, BatchLimits, Placement, RowKey, SplitBatch},
    ids::{BatchId, ContentHash, Millis, ShardId},
    leader::LeaderConfig,
    messages::Decision,
    show::{operation_of, row_of},
};

/// When the world begins.
pub const START: Millis = Millis(1_700_000_000_000);

/// By how much a tick moves a leader's clock. With it everything that is unanswered is sent again; two of them end all patience
/// and every deadline.
pub const TICK_MS: u64 = 1000;

/// How often each thing may happen along one path.
///
/// Not bounded: loss and delay (a message need never be delivered), and reordering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// A new leader of the coordinators opens its epoch.
    pub elections: u8,
    /// A message is delivered and stays on its way, to come again. 255: every message stays for ever.
    pub repeats: u8,
    /// A leader's clock moves on.
    pub ticks: u8,
    /// A shard is led elsewhere: its new leader starts from what is stored, and what was on its way may be asked again at once.
    pub moves: u8,
    /// A shard asks about the parts that it has in doubt.
    pub asks: u8,
    /// A client submits a batch again, under the same id.
    pub retries: u8,
    /// An id is sealed: aborted unless it has been seen.
    pub seals: u8,
    /// A client reads all rows of the case.
    pub reads: u8,
}

/// Every message stays on its way for ever.
pub const ANY: u8 = 255;

/// The kinds of things that are bounded, in the order of [`Bounds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // as in Bounds
pub enum Bound {
    Elections,
    Repeats,
    Ticks,
    Moves,
    Asks,
    Retries,
    Seals,
    Reads,
}

impl Bounds {
    /// As bytes, to be counted down.
    pub fn left(&self) -> [u8; 8] {
        let Bounds { elections, repeats, ticks, moves, asks, retries, seals, reads } = *self;
        [elections, repeats, ticks, moves, asks, retries, seals, reads]
    }
}

/// How large a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Seconds: it runs with the tests.
    Small,
    /// Minutes.
    Full,
    /// Nobody has seen its end yet.
    Huge,
}

/// A configuration to be checked.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, on the command line.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// How large it is.
    pub size: Size,
    /// How many shards there are.
    pub shards: u32,
    /// What is settled before anything is explored: operations, as golden scripts have them.
    pub before: &'static str,
    /// What clients submit: a letter for the id, and operations. The same letter twice is one id with two contents.
    pub batches: &'static [(char, &'static str)],
    /// The rows of the read.
    pub read: &'static str,
    /// How many parts a shard may hold.
    pub room: u32,
    /// How many faults.
    pub bounds: Bounds,
    /// Whether a leader that is deposed lives on, unaware. If not, it dies when the next one is elected.
    pub deposed: bool,
    /// Whether a leader hears of what it recorded in the moment in which it is recorded. If not, anything may come between.
    pub prompt: bool,
    /// Whether decisions are forgotten as soon as they may be.
    pub forgetful: bool,
    /// Whether the only participant of a batch may commit it on its own word.
    pub alone: bool,
    /// Paths on which an epoch gives a number above this are not followed: two batches that each come behind the other one on one
    /// of two shards may, if messages go on to overtake each other, be tried again and again until their time is up.
    pub numbers_max: u64,
    /// Of this many states that differ in the living leader alone, one is healed with that leader. (With a new leader all are.)
    pub heal_every: u32,
}

impl Case {
    /// What the rest of a case is when nothing else is said.
    pub const PLAIN: Case = Case {
        name: "",
        about: "",
        size: Size::Small,
        shards: 2,
        before: "",
        batches: &[],
        read: "",
        room: 1000,
        bounds: Bounds {
            elections: 0,
            repeats: 0,
            ticks: 0,
            moves: 0,
            asks: 0,
            retries: 0,
            seals: 0,
            reads: 0,
        },
        deposed: true,
        prompt: false,
        forgetful: false,
        alone: false,
        numbers_max: u64::MAX,
        heal_every: 1,
    };

    /// Where partitions live.
    pub fn placement(&self) -> Placement {
        Placement { shards: self.shards }
    }

    /// The settings of every leader.
    pub fn leader(&self) -> LeaderConfig {
        LeaderConfig {
            alone: self.alone,
            resend_ms: TICK_MS,
            patience_ms: TICK_MS + TICK_MS / 2,
            timeout_default_ms: 2 * TICK_MS,
            retention_ms: if self.forgetful { 1 } else { 24 * 3_600_000 },
            future_max_ms: 24 * 3_600_000,
            ..LeaderConfig::new(self.placement())
        }
    }

    /// The rows of the read.
    pub fn read_rows(&self) -> Vec<RowKey> {
        self.read.split_whitespace().map(|row| row_of(self.placement(), row)).collect()
    }

    /// All batches: first what was settled before, then those that clients submit.
    pub fn contents(&self) -> Contents {
        let mut all = Vec::new();
        if !self.before.is_empty() {
            all.push(self.batch(BEFORE, self.before, 0));
        }
        let first = all.len();
        all.extend(self.batches.iter().map(|(letter, text)| {
            let place = i64::from(u32::from(*letter)) - i64::from(u32::from('A'));
            self.batch(*letter, text, 1 + place as u64)
        }));
        let split = all.iter().map(|batch| batch.split(self.placement())).collect();
        Contents { batches: all, split, first }
    }

    fn batch(&self, letter: char, text: &str, after: u64) -> Batch {
        let operations =
            text.split(';').map(|text| operation_of(self.placement(), text.trim())).collect::<Vec<_>>();
        let id = id_of(letter, Millis(START.0 + after));
        let batch = Batch { id, timeout_ms: 0, operations, zero_sum: false };
        let zero_sum = Batch { zero_sum: true, ..batch.clone() };
        let limits = BatchLimits::default();
        batch.check(&limits, self.placement()).unwrap_or_else(|why| panic!("case {}: {why}", self.name));
        // Who can promise to create no money does.
        if zero_sum.check(&limits, self.placement()).is_ok() { zero_sum } else { batch }
    }

    /// The batch that a healed cluster must still settle: it touches every shard.
    pub fn closing(&self, letter: char, now: Millis) -> Batch {
        let operations = self
            .placement()
            .all()
            .map(|shard| operation_of(self.placement(), &format!("add closing{letter}@{shard} 1")))
            .collect();
        Batch { id: id_of(letter, now), timeout_ms: 0, operations, zero_sum: false }
    }
}

/// The letter of what is settled before.
pub const BEFORE: char = 'S';

fn id_of(letter: char, time: Millis) -> BatchId {
    let letter = u8::try_from(letter).expect("letters are ASCII");
    BatchId::from_parts(time, [letter; 10])
}

/// All batches of a case.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The batches.
    pub batches: Vec<Batch>,
    /// The same, as they are settled.
    pub split: Vec<SplitBatch>,
    /// The first one that clients submit.
    pub first: usize,
}

impl Contents {
    /// The batch that was decided.
    pub fn of(&self, decision: &Decision) -> Option<&Batch> {
        self.held(decision.id, decision.hash?)
    }

    /// The batch with an id and a hash.
    pub fn held(&self, id: BatchId, hash: ContentHash) -> Option<&Batch> {
        let mut all = self.batches.iter().zip(&self.split);
        all.find(|(_, split)| split.id == id && split.hash == hash).map(|(batch, _)| batch)
    }

    /// All ids that clients use, each once.
    pub fn ids(&self) -> Vec<BatchId> {
        let mut ids: Vec<BatchId> = self.batches[self.first..].iter().map(|batch| batch.id).collect();
        ids.dedup();
        ids
    }
}

/// The shard of a row.
pub fn shard_of(placement: Placement, row: &RowKey) -> ShardId {
    placement.shard_of(row.partition())
}
