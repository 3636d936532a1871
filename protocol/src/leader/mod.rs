//! What the leader of the coordinator group keeps in memory: `step(event) -> effects`.
//!
//! A leader lives for one epoch. It starts from what the opening entry answered ([`Opened`]), greets every shard, recovers what the
//! epochs before left undecided, and settles new batches on the shards that have answered. When the epoch ends it is dropped, with
//! all that it kept: nothing here has to survive.
//!
//! Invariants:
//! - A batch is started only when all its participants have answered the greeting, and none of them listed it (rule R12).
//! - Commit is proposed only when all participants voted YES under one and the same number (R4), abort at any time before, but for
//!   what a shard may have committed.
//! - The only participant of a batch may commit it by itself. So while one that was asked to has not answered, nobody decides the
//!   batch; while one has not answered the greeting, nobody decides or starts an id that it may have committed (R13).
//! - What was committed so is forgotten by the shard only after it is recorded.
//! - An outcome is told, to shards and callers, only after the log has answered which decision stands (R1, R9), but for what a shard
//!   has committed. They may wait for the next message to the same shard, but only while nobody waits for them there.
//! - Only an explicit `done` ends a participant's part (R2); until then the outcome is sent again.
//! - The mark of a shard lies below every number that may still be unfinished there (R4).
//! - Every stamp is greater than every stamp and every read position given before.
//! - No shard is read at a position at or below a stamp that it may still commit at by itself; and a read gets its position when all
//!   its shards have answered the greeting.
//! - No shard is told a history mark above the position of a read that is under way.
//! - What a shard that doesn't answer can take up of the room for batches and reads is a part of it, so that batches and reads that
//!   don't touch it go on (promise G9).

mod alone;
mod reads;
mod recovery;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    batch::{Placement, RowKey, SplitBatch},
    coordinator::{Act, Acted, Keep, Opened, STAMP_BLOCK, Window, cancelled_number},
    ids::{BatchId, ContentHash, Epoch, GroupId, Millis, Number, ShardId, Stamp},
    messages::{
        Abort, AbortReason, Decision, Done, FromShard, PartOutcome, Prepare, RowAt, RowChange, ShardRead,
        ShardReadAnswer, ToShard, Vote, VoteKind,
    },
};

use self::reads::{Question, Reading};

/// Settings of a leader. Times are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaderConfig {
    /// The coordinator group.
    pub group: GroupId,
    /// Where partitions live.
    pub placement: Placement,
    /// Whether the only participant of a batch may commit it by itself.
    pub alone: bool,
    /// How far the window of ids that a shard may commit by itself reaches beyond the clock. After a failover so many new ids wait for a
    /// shard that died with the leader; ids of clocks that are further ahead take two rounds.
    pub alone_ahead_ms: u64,
    /// How far the window reaches back. Older ids take two rounds.
    pub alone_behind_ms: u64,
    /// Batches in memory, decided ones that are not finished included; more are refused.
    pub batches_max: usize,
    /// Reads in memory; more are refused.
    pub reads_max: usize,
    /// How long a batch may take if it doesn't say.
    pub timeout_default_ms: u64,
    /// The longest that it may ask for.
    pub timeout_max_ms: u64,
    /// After this time without an answer a message is sent again.
    pub resend_ms: u64,
    /// How long recovery waits for a participant that can't be reached before it decides abort.
    pub patience_ms: u64,
    /// How long a decision is remembered at least. Older ids are refused.
    pub retention_ms: u64,
    /// How much is remembered, in numbers.
    pub keep: Keep,
    /// Ids younger than this are never forgotten because of the number of decisions: new batches are refused instead.
    pub young_ms: u64,
    /// How far an id's time may lie in the future of the leader's clock.
    pub future_max_ms: u64,
    /// How long a read may take.
    pub read_timeout_ms: u64,
}

impl LeaderConfig {
    /// The defaults for a number of shards.
    pub fn new(placement: Placement) -> LeaderConfig {
        LeaderConfig {
            group: GroupId::COORDINATOR,
            placement,
            alone: true,
            alone_ahead_ms: 1_000,
            alone_behind_ms: 60_000,
            batches_max: 100_000,
            reads_max: 10_000,
            timeout_default_ms: 10_000,
            timeout_max_ms: 60_000,
            resend_ms: 500,
            patience_ms: 1_500,
            retention_ms: 24 * 3_600_000,
            keep: Keep::default(),
            young_ms: 2 * 60_000,
            future_max_ms: 10 * 60_000,
            read_timeout_ms: 5_000,
        }
    }
}

/// Ends of batches that may wait to be recorded.
const FINISHED_WAITING_MAX: usize = 1024;

/// How often the log is told that too many decisions are remembered, if there is nothing else to tell it.
const CROWD_TOLD_MS: u64 = 100;

/// A shard that has said nothing for this time, though it was asked, is *silent*.
const SILENT_MS: u64 = 2_000;

/// How many numbers a shard may have to remember as finished, because an older one isn't: then that one's batch is aborted before its
/// time is up.
const NUMBERS_MAX: u64 = 1 << 20;

/// Names a caller who waits for a reply; given by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// What happens to a leader.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Time has passed. The clock may jump: only waiting depends on it.
    Tick {
        /// The driver's clock.
        now: Millis,
    },
    /// A caller submits a batch that has passed [`Batch::check`](crate::batch::Batch::check).
    Submit {
        /// The caller.
        token: Token,
        /// The batch.
        batch: SplitBatch,
    },
    /// A caller asks for an outcome. The driver has confirmed leadership after the question came (rule R7).
    Query {
        /// The caller.
        token: Token,
        /// The batch.
        id: BatchId,
        /// Answer only when it is decided.
        wait: bool,
        /// Decide abort if there is no trace of it.
        abort_if_not_seen: bool,
    },
    /// A caller reads rows.
    Read {
        /// The caller.
        token: Token,
        /// The rows.
        rows: Vec<RowKey>,
    },
    /// A caller reads the history of a row.
    History {
        /// The caller.
        token: Token,
        /// The row.
        row: RowKey,
        /// The first stamp.
        from: Stamp,
        /// How many changes.
        limit: usize,
    },
    /// Leadership was confirmed after [`Effects::confirm`] had asked for it with this number.
    Confirmed {
        /// The number.
        asked: u64,
    },
    /// A message of a shard.
    FromShard {
        /// The shard.
        shard: ShardId,
        /// What it says.
        message: FromShard,
    },
    /// A shard's answer to a read.
    ReadAnswered {
        /// The shard.
        shard: ShardId,
        /// The request that it answers.
        request: u64,
        /// The answer.
        answer: ShardReadAnswer,
    },
    /// A shard can be reached again, perhaps under another leader: what was sent may be lost.
    Reconnected {
        /// The shard.
        shard: ShardId,
    },
    /// An entry that this leader proposed was applied.
    Applied(Acted),
}

/// What a leader wants done. The driver first hands [`Effects::act`] to the log; the rest doesn't depend on it, for what does is
/// an effect of the [`Event::Applied`] that follows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Effects {
    /// To be recorded in the coordinator's log.
    pub act: Act,
    /// One message for each shard that there is something to say to.
    pub to_shards: BTreeMap<ShardId, ToShard>,
    /// Reads of shards, with their request numbers.
    pub reads: Vec<(ShardId, u64, ShardRead)>,
    /// Replies to callers.
    pub replies: Vec<(Token, Reply)>,
    /// Set: confirm leadership, then say so with this number.
    pub confirm: Option<u64>,
    /// Set: this leader has been deposed, and why it knows.
    pub step_down: Option<String>,
    /// Things that must not be, for people.
    pub alarms: Vec<String>,
}

/// What a caller is told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// The batch is decided.
    Decided(Decision),
    /// The batch is being prepared or decided.
    InProgress,
    /// There is no trace of the batch, anywhere.
    NotSeen,
    /// Nothing was decided.
    Refused(Refusal),
    /// The values of rows at a position, in the order of the question.
    Rows {
        /// The position.
        position: Stamp,
        /// The values.
        rows: Vec<RowAt>,
    },
    /// A part of the history of a row.
    History {
        /// Up to here it is complete.
        position: Stamp,
        /// The changes.
        changes: Vec<RowChange>,
        /// Where it goes on.
        next: Option<Stamp>,
        /// Changes below this are not told any more; 0: all are kept.
        oldest: Stamp,
    },
}

/// Why nothing was decided.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The id is known with other contents.
    DifferentContents,
    /// The id is at or before the horizon.
    TooOld {
        /// The horizon.
        horizon: Millis,
    },
    /// The id's time is too far ahead.
    FromTheFuture {
        /// The leader's clock.
        now: Millis,
    },
    /// Too much is in flight.
    Overloaded,
    /// What the rows hold is more than fits into one answer.
    TooLarge,
    /// The position of a read has fallen behind what is kept of the history, up to here. Only a leader that has been deposed meets
    /// this: nobody asks shards to forget what reads of the newest epoch need.
    Pruned {
        /// The history mark.
        history: Stamp,
    },
    /// These shards could not be reached in time. For reads only: they decide nothing.
    Unavailable {
        /// The shards.
        shards: Vec<ShardId>,
    },
}

/// What the log remembers of an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remembered {
    /// Its decision.
    Decided(Decision),
    /// It is at or before the horizon: if there was a decision, it is forgotten.
    Forgotten {
        /// The horizon.
        horizon: Millis,
    },
    /// There is no decision, and never was one.
    Nothing,
}

/// Looks up what is recorded: all that was applied before the step. Decision and horizon are read at one moment: a horizon that this
/// leader has not heard of yet may have removed a decision already.
pub trait Decisions {
    /// What is remembered of an id.
    fn remembered(&self, id: BatchId) -> Remembered;
}

/// A batch that the leader has to do with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Flight {
    /// None: cancelled unseen.
    hash: Option<ContentHash>,
    shards: Vec<ShardId>,
    waiters: Vec<Token>,
    stage: Stage,
    /// What shards listed in their greetings: the number, and whether it is a YES.
    listed: BTreeMap<ShardId, (Number, bool)>,
    /// Numbers of this epoch under which it was tried.
    tries: Vec<Number>,
    /// Participants that have answered any of them.
    answered: BTreeSet<ShardId>,
}

impl Flight {
    fn new(hash: Option<ContentHash>, shards: Vec<ShardId>, stage: Stage) -> Flight {
        let (waiters, tries) = (Vec::new(), Vec::new());
        Flight { hash, shards, waiters, stage, listed: BTreeMap::new(), tries, answered: BTreeSet::new() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// Waits for participants to answer the greeting. Nothing was sent.
    Parked(Pending),
    /// Prepares are out. `alone`: the only participant may have committed it, at this stamp; it has not said yet. `late`: the batch's
    /// time is up, and it is aborted as soon as the participant says that it is not committed.
    Preparing {
        pending: Pending,
        number: Number,
        votes: BTreeMap<ShardId, Heard>,
        retry_at: Option<Millis>,
        alone: Option<Stamp>,
        late: bool,
    },
    /// Left over by an earlier epoch.
    Recovering { since: Millis, mixed: bool },
    /// A decision is on its way into the log; with a stamp if it is commit and one could be given.
    Deciding { number: Number, commit: bool, stamp: Option<Stamp> },
    /// Its only participant has committed it, which is still to be recorded.
    Recording { decision: Decision },
    /// Decided; these shards have not confirmed it. `finished`: that is recorded already, and needn't be again.
    Telling { decision: Decision, missing: BTreeMap<ShardId, Number>, finished: bool },
}

impl Stage {
    /// What is told to who has other contents for the id. Before it is decided, a shard that has not answered the greeting may hold a part
    /// of those, or have committed them: then it is too early to say that they won't commit.
    fn with_other_contents(&self, all_greeted: bool) -> Reply {
        match self {
            Stage::Recording { .. } | Stage::Telling { .. } => Reply::Refused(Refusal::DifferentContents),
            Stage::Parked(_)
            | Stage::Preparing { .. }
            | Stage::Recovering { .. }
            | Stage::Deciding { .. } => {
                if all_greeted {
                    Reply::Refused(Refusal::DifferentContents)
                } else {
                    Reply::InProgress
                }
            }
        }
    }
}

/// What is needed to start a batch, and to start it again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    batch: SplitBatch,
    deadline: Millis,
}

/// What a participant said under the present number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Heard {
    Yes,
    Waiting,
}

/// What the leader knows of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct ShardView {
    greeted: bool,
    greeted_at: Millis,
    /// When it was last heard of.
    heard_at: Millis,
    /// Reads that it has not answered.
    reads: usize,
    /// Reads that it is asked only after it has said what it has committed.
    reads_held: BTreeSet<u64>,
    /// Stamps at which it may commit by itself, as far as it has not answered.
    alone: BTreeSet<Stamp>,
    /// Ids that it may commit by itself, or has for earlier leaders: what is recorded, and what is to be.
    window: Window,
    window_asked: Window,
    /// Numbers that may be unfinished there, with their batches and the time of the last message about them.
    outstanding: BTreeMap<Number, (BatchId, Millis)>,
    /// Decided batches that it has not been told of: nobody waits for it.
    untold: Vec<BatchId>,
    /// Batches that wait in line there.
    in_line: BTreeSet<BatchId>,
}

impl ShardView {
    /// It is about to be asked something: if nothing was open, it was silent with good reason.
    fn ask(&mut self, now: Millis) {
        if self.greeted && self.outstanding.is_empty() && self.reads == 0 {
            self.heard_at = now;
        }
    }
}

/// The leader of one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leader {
    config: LeaderConfig,
    epoch: Epoch,
    now: Millis,
    /// The latest horizon that is recorded, or on its way into the log: ids at or before it are not taken up any more.
    horizon: Millis,
    horizon_asked_at: Millis,
    /// Callers whose ids lie behind a horizon that is on its way into the log. They are told when it is there: until then another leader,
    /// which doesn't know of it, may take such an id up.
    too_old: Vec<(BatchId, Token)>,
    history: Stamp,
    /// How many decisions the log remembers, as far as it was heard.
    remembered: u64,
    opened_at: Millis,
    crowd_told_at: Millis,
    last_sequence: u64,
    last_stamp: Stamp,
    ceiling: Stamp,
    ceiling_asked: Stamp,
    flights: BTreeMap<BatchId, Flight>,
    shards: BTreeMap<ShardId, ShardView>,
    /// Parts to be aborted one by one: of ids that are or will be decided otherwise, and of tries that are given up.
    strays: BTreeMap<(ShardId, Number), BatchId>,
    parked: BTreeSet<BatchId>,
    recovering: BTreeSet<BatchId>,
    deadlines: BTreeSet<(Millis, BatchId)>,
    retries: BTreeSet<(Millis, BatchId)>,
    /// Batches that commit as soon as the ceiling is raised, in order.
    without_stamp: Vec<BatchId>,
    readings: BTreeMap<u64, Reading>,
    /// Reads that wait for greetings to be answered; the oldest first.
    early: Vec<Question>,
    last_request: u64,
    resent_at: Millis,
    /// Batches whose end is still to be recorded. Nobody waits for it, so it rides along with the next decisions, or with the next
    /// tick.
    finished: Vec<BatchId>,
    /// Commits that shards have made, still to be recorded. Their callers have been told, so it rides along too.
    settled: Vec<Decision>,
    ticked: bool,
}

impl Leader {
    /// Starts the epoch: greets every shard.
    pub fn open(config: LeaderConfig, opened: Opened, now: Millis) -> (Leader, Effects) {
        let mut leader = Leader {
            config,
            epoch: opened.epoch,
            now,
            horizon: opened.horizon,
            horizon_asked_at: now,
            too_old: Vec::new(),
            history: opened.history,
            remembered: opened.remembered,
            opened_at: now,
            crowd_told_at: now,
            last_sequence: 0,
            last_stamp: opened.floor,
            ceiling: opened.ceiling,
            ceiling_asked: opened.ceiling,
            flights: BTreeMap::new(),
            shards: config
                .placement
                .all()
                .map(|shard| {
                    let window = opened.windows.get(&shard).copied().unwrap_or_default();
                    let view =
                        ShardView { heard_at: now, window, window_asked: window, ..ShardView::default() };
                    (shard, view)
                })
                .collect(),
            strays: BTreeMap::new(),
            parked: BTreeSet::new(),
            recovering: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            retries: BTreeSet::new(),
            without_stamp: Vec::new(),
            readings: BTreeMap::new(),
            early: Vec::new(),
            // Numbers of different epochs differ, so that a late answer never fits another leader's question.
            last_request: opened.epoch.0 << 40,
            resent_at: now,
            finished: Vec::new(),
            settled: Vec::new(),
            ticked: false,
        };
        let mut effects = Effects::default();
        for decision in opened.unfinished {
            let missing = decision.shards.clone();
            leader.adopt_decision(decision, &missing, false);
        }
        for shard in config.placement.all() {
            leader.greet(shard, &mut effects);
        }
        leader.seal(&mut effects);
        (leader, effects)
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Batches in memory.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether outcomes, or commits to be recorded, wait to ride along.
    pub fn has_untold(&self) -> bool {
        !self.settled.is_empty() || self.shards.values().any(|view| !view.untold.is_empty())
    }

    /// Whether every shard has answered the greeting and nothing of earlier epochs is undecided.
    pub fn is_recovered(&self) -> bool {
        self.recovering.is_empty() && self.all_greeted()
    }

    fn all_greeted(&self) -> bool {
        self.shards.values().all(|view| view.greeted)
    }

    /// Takes one event. Effects pile up in `effects` over as many events as the driver has; [`Leader::seal`] ends the pile.
    pub fn step(&mut self, event: Event, decisions: &dyn Decisions, effects: &mut Effects) {
        match event {
            Event::Tick { now } => self.tick(now, effects),
            Event::Submit { token, batch } => self.submit(token, batch, decisions, effects),
            Event::Query { token, id, wait, abort_if_not_seen } => {
                self.query(token, id, wait, abort_if_not_seen, decisions, effects);
            }
            Event::Read { token, rows } => self.read(token, rows, effects),
            Event::History { token, row, from, limit } => self.history(token, row, from, limit, effects),
            Event::Confirmed { asked } => self.confirmed(asked, effects),
            Event::FromShard { shard, message } => self.take_message(shard, message, decisions, effects),
            Event::ReadAnswered { shard, request, answer } => {
                self.read_answered(shard, request, answer, decisions, effects);
            }
            Event::Reconnected { shard } => {
                // All that is open is sent again, and that is part of it.
                if self.view(shard).greeted {
                    self.view(shard).untold.clear();
                }
                self.resend(shard, Millis(u64::MAX), effects);
            }
            Event::Applied(acted) => self.applied(acted, effects),
        }
    }

    /// Completes what goes out: the epoch, what rides along, and the marks as they are now.
    pub fn seal(&mut self, effects: &mut Effects) {
        self.tell_outcomes(effects);
        let waiting = self.finished.len() + self.settled.len();
        if self.ticked || !effects.act.is_empty() || waiting >= FINISHED_WAITING_MAX {
            effects.act.finished.append(&mut self.finished);
            effects.act.settled.append(&mut self.settled);
            self.ticked = false;
        }
        let rests = self.now.0 < self.crowd_told_at.0 + CROWD_TOLD_MS;
        if self.remembered > self.config.keep.decisions_max && !(rests && effects.act.is_empty()) {
            self.crowd_told_at = self.now;
            effects.act.crowded = Some(Millis(self.now.0.saturating_sub(self.config.young_ms)));
        }
        effects.act.epoch = self.epoch;
        let history = self.history_for_reads();
        for (shard, message) in &mut effects.to_shards {
            message.coordinator = self.config.group;
            message.placement = self.config.placement;
            message.epoch = self.epoch;
            message.mark = self.mark(*shard);
            message.history = history;
        }
    }

    /// Outcomes ride along with the next prepares or reads for the same shard, so that they cost no message, no entry and no sync of
    /// their own. If none come by the next tick, or somebody stands in line there, they go by themselves.
    fn tell_outcomes(&mut self, effects: &mut Effects) {
        let placement = self.config.placement;
        for shard in placement.all() {
            if self.shards[&shard].untold.is_empty() {
                continue;
            }
            let rides = effects.to_shards.get(&shard).is_some_and(|message| !message.is_empty())
                || effects.reads.iter().any(|(read, _, _)| *read == shard);
            let view = &self.shards[&shard];
            let awaited = !view.in_line.is_empty() || view.reads > 0;
            if rides || awaited || self.ticked {
                for id in std::mem::take(&mut self.view(shard).untold) {
                    self.send_outcome(shard, id, effects);
                }
            }
        }
    }

    /// The present try of a batch is over: it stands in no line any more.
    fn leave_lines(&mut self, id: BatchId) {
        for shard in &self.flights[&id].shards {
            let in_line = &mut self.shards.get_mut(shard).expect("participants are known shards").in_line;
            // Mostly there are none.
            if !in_line.is_empty() {
                in_line.remove(&id);
            }
        }
    }

    /// Up to which number all are finished at a shard.
    fn mark(&self, shard: ShardId) -> Number {
        let view = &self.shards[&shard];
        if !view.greeted {
            return Number::default();
        }
        match view.outstanding.keys().next() {
            None => Number { epoch: self.epoch, sequence: self.last_sequence },
            Some(first) => Number { epoch: first.epoch, sequence: first.sequence.saturating_sub(1) },
        }
    }

    fn submit(&mut self, token: Token, batch: SplitBatch, decisions: &dyn Decisions, effects: &mut Effects) {
        let (id, hash) = (batch.id, batch.hash);
        let refuse = |effects: &mut Effects, refusal| effects.replies.push((token, Reply::Refused(refusal)));
        let all_greeted = self.all_greeted();
        if let Some(flight) = self.flights.get_mut(&id) {
            if flight.hash.is_some_and(|known| known != hash) {
                effects.replies.push((token, flight.stage.with_other_contents(all_greeted)));
                return;
            }
            match &flight.stage {
                Stage::Telling { decision, .. } | Stage::Recording { decision } => {
                    effects.replies.push((token, Reply::Decided(decision.clone())));
                }
                _ => flight.waiters.push(token),
            }
            return;
        }
        match decisions.remembered(id) {
            Remembered::Decided(decision) if decision.hash.is_some_and(|known| known != hash) => {
                return refuse(effects, Refusal::DifferentContents);
            }
            Remembered::Decided(decision) => {
                effects.replies.push((token, Reply::Decided(decision)));
                return;
            }
            Remembered::Forgotten { horizon } => {
                effects.replies.push((token, self.is_too_old(id, horizon)));
                return;
            }
            Remembered::Nothing if id.time() <= self.horizon => return self.too_old.push((id, token)),
            Remembered::Nothing => {}
        }
        if id.time().0 > self.now.0 + self.config.future_max_ms {
            return refuse(effects, Refusal::FromTheFuture { now: self.now });
        }
        let asked = batch.timeout_ms;
        if !self.has_room(id, batch.shards()) {
            return refuse(effects, Refusal::Overloaded);
        }
        let wanted = match asked {
            0 => self.config.timeout_default_ms,
            wanted => u64::from(wanted).min(self.config.timeout_max_ms),
        };
        let deadline = Millis(self.now.0 + wanted);
        self.deadlines.insert((deadline, id));
        self.parked.insert(id);
        let shards = batch.shards().collect();
        let mut flight = Flight::new(Some(hash), shards, Stage::Parked(Pending { batch, deadline }));
        flight.waiters.push(token);
        self.flights.insert(id, flight);
        self.start_if_greeted(id, effects);
    }

    /// An id lies behind the horizon, and isn't remembered. It will never commit, but for what a shard may have been let do by an earlier
    /// leader, and still do: that has no horizon, so it can't be said before the shard has answered the greeting.
    fn is_too_old(&self, id: BatchId, horizon: Millis) -> Reply {
        match self.hidden_by(id) {
            Some(_) => Reply::InProgress,
            None => Reply::Refused(Refusal::TooOld { horizon }),
        }
    }

    /// Whether one more batch may come in (promise G9).
    fn has_room(&self, id: BatchId, mut shards: impl Iterator<Item = ShardId>) -> bool {
        let Keep { decisions_max, .. } = self.config.keep;
        // Those that can't be forgotten yet, since they are too young or unfinished, are no reason to refuse before there are many.
        let remembered_max =
            decisions_max.saturating_add(decisions_max / 8).saturating_add(self.config.batches_max as u64);
        let silent_max = self.share(self.config.batches_max);
        let hidden = self.hidden_by(id).is_some_and(|shard| self.is_silent(shard));
        self.flights.len() < self.config.batches_max
            && self.remembered < remembered_max
            && !(hidden && self.parked.len() >= silent_max)
            && shards
                .all(|shard| !self.is_silent(shard) || self.shards[&shard].outstanding.len() < silent_max)
    }

    /// What one shard that is silent may take up of room for `most`.
    fn share(&self, most: usize) -> usize {
        (most / (2 * self.shards.len())).max(1)
    }

    fn is_silent(&self, shard: ShardId) -> bool {
        let view = &self.shards[&shard];
        let asked = !view.greeted || !view.outstanding.is_empty() || view.reads > 0;
        asked && self.now.0 >= view.heard_at.0 + SILENT_MS
    }

    /// Rules R12 and R13: only when all participants have answered the greeting, and all shards that may have committed the id before.
    fn start_if_greeted(&mut self, id: BatchId, effects: &mut Effects) {
        let flight = &self.flights[&id];
        if !flight.shards.iter().all(|shard| self.shards[shard].greeted) || self.hidden_by(id).is_some() {
            return;
        }
        let flight = self.flights.get_mut(&id).expect("was just found");
        self.parked.remove(&id);
        let dummy = Stage::Recovering { since: self.now, mixed: false };
        let Stage::Parked(pending) = std::mem::replace(&mut flight.stage, dummy) else {
            unreachable!("only parked batches are started");
        };
        self.prepare(id, pending, effects);
    }

    /// Sends prepares under a new number, which gives up all earlier ones. A single participant may commit at once, if it is likely to
    /// answer: while it doesn't, nobody can decide.
    fn prepare(&mut self, id: BatchId, pending: Pending, effects: &mut Effects) {
        let alone = match *self.flights[&id].shards {
            [shard] => self.let_alone(shard, id, effects),
            _ => None,
        };
        self.send_prepares(id, pending, alone, false, effects);
    }

    pub(self) fn send_prepares(
        &mut self,
        id: BatchId,
        pending: Pending,
        alone: Option<Stamp>,
        late: bool,
        effects: &mut Effects,
    ) {
        self.leave_lines(id);
        self.last_sequence += 1;
        let number = Number { epoch: self.epoch, sequence: self.last_sequence };
        let flight = self.flights.get_mut(&id).expect("a batch that is prepared is in flight");
        for shard in pending.batch.shards() {
            let view = self.shards.get_mut(&shard).expect("the placement names known shards");
            view.ask(self.now);
            view.outstanding.insert(number, (id, self.now));
        }
        flight.tries.push(number);
        let votes = BTreeMap::new();
        flight.stage = Stage::Preparing { pending, number, votes, retry_at: None, alone, late };
        for shard in flight.shards.clone() {
            self.send_prepare(shard, id, effects);
        }
    }

    fn send_prepare(&self, shard: ShardId, id: BatchId, effects: &mut Effects) {
        let flight = &self.flights[&id];
        let Stage::Preparing { pending, number, alone, late, .. } = &flight.stage else { return };
        let Some(part) = pending.batch.part(shard) else { return };
        effects.to_shards.entry(shard).or_default().prepares.push(Prepare {
            number: *number,
            id,
            hash: pending.batch.hash,
            shards: flight.shards.clone(),
            gives_up: flight.tries.iter().copied().filter(|tried| tried != number).collect(),
            sole: alone.filter(|_| !late),
            part: part.clone(),
        });
    }

    fn take_message(
        &mut self,
        shard: ShardId,
        message: FromShard,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        if !self.shards.contains_key(&shard) {
            effects.alarms.push(format!("a message came from shard {shard}, which there isn't"));
            return;
        }
        let now = self.now;
        self.view(shard).heard_at = now;
        if let Some(greeting) = message.greeting {
            self.greeted(shard, greeting, decisions, effects);
        }
        for vote in message.votes {
            self.vote(shard, vote, effects);
        }
        for done in message.done {
            self.done(shard, done, effects);
        }
        for part in message.asks {
            self.asked(shard, part, decisions, effects);
        }
    }

    /// A vote counts only under the number under which the batch is being prepared now.
    fn vote(&mut self, shard: ShardId, vote: Vote, effects: &mut Effects) {
        let id = vote.id;
        if vote.kind == VoteKind::OldEpoch && vote.number.epoch == self.epoch {
            effects.step_down = Some(format!("shard {shard} has recorded another epoch than {}", self.epoch));
            return;
        }
        if let VoteKind::Committed(stamp) = vote.kind {
            return self.committed(shard, id, vote.number, stamp, effects);
        }
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let Stage::Preparing { number, alone, late, .. } = &mut flight.stage else { return };
        flight.answered.insert(shard);
        if vote.number != *number || !flight.shards.contains(&shard) {
            return;
        }
        // It has taken the prepare, and with it that the earlier tries are given up: their numbers are finished there.
        if !matches!(vote.kind, VoteKind::Finished | VoteKind::Held | VoteKind::OldEpoch) {
            let view = self.shards.get_mut(&shard).expect("participants are known shards");
            for tried in flight.tries.iter().filter(|tried| *tried != number) {
                view.outstanding.remove(tried);
                self.strays.remove(&(shard, *tried));
            }
        }
        // Whatever it says, it has not committed, and will not by itself.
        let (alone, late) = (alone.take(), *late);
        if let Some(stamp) = alone {
            self.answered_alone(shard, stamp, effects);
        }
        if late {
            let abort = match vote.kind {
                VoteKind::No(abort) => abort,
                _ => Abort::because(AbortReason::ParticipantUnavailable),
            };
            return self.decide_abort(id, abort, effects);
        }
        let flight = self.flights.get_mut(&id).expect("was just found");
        let Stage::Preparing { number, votes, retry_at, pending, .. } = &mut flight.stage else { return };
        match vote.kind {
            // This try is given up already, perhaps also where it was granted.
            VoteKind::Yes | VoteKind::Waiting if retry_at.is_some() => {}
            VoteKind::Yes => {
                if votes.insert(shard, Heard::Yes) == Some(Heard::Waiting) {
                    let view = self.shards.get_mut(&shard).expect("participants are known shards");
                    view.in_line.remove(&id);
                }
                let yes = votes.values().filter(|heard| **heard == Heard::Yes).count();
                if yes == flight.shards.len() {
                    let number = *number;
                    self.decide_commit(id, number, effects);
                }
            }
            VoteKind::Waiting => {
                if *votes.entry(shard).or_insert(Heard::Waiting) == Heard::Waiting {
                    self.view(shard).in_line.insert(id);
                }
            }
            VoteKind::No(abort) => self.decide_abort(id, abort, effects),
            VoteKind::Conflict if retry_at.is_none() && self.now < pending.deadline => {
                let pending = pending.clone();
                self.prepare(id, pending, effects);
            }
            VoteKind::Overloaded | VoteKind::Finished if retry_at.is_none() => {
                let at = Millis(self.now.0 + self.config.resend_ms / 4);
                *retry_at = Some(at);
                self.retries.insert((at, id));
                self.give_up_try(id, effects);
            }
            VoteKind::Conflict
            | VoteKind::Overloaded
            | VoteKind::Finished
            | VoteKind::OldEpoch
            | VoteKind::Committed(_) => {}
            VoteKind::Held => {
                effects.alarms.push(format!(
                    "shard {shard} holds another part of batch {id}, which it did not list: the batch is aborted"
                ));
                self.decide_abort(id, Abort::because(AbortReason::Interrupted), effects);
            }
        }
    }

    /// Frees what the present try holds anywhere while it waits for room at a shard. Of two batches that each hold what the other one
    /// waits for, neither would get on.
    fn give_up_try(&mut self, id: BatchId, effects: &mut Effects) {
        self.leave_lines(id);
        let flight = &self.flights[&id];
        let Stage::Preparing { number, .. } = flight.stage else { return };
        for shard in flight.shards.clone() {
            self.stray(shard, number, id, effects);
        }
    }

    fn decide_commit(&mut self, id: BatchId, number: Number, effects: &mut Effects) {
        self.leave_lines(id);
        let stamp = self.give_stamp(effects);
        let flight = self.flights.get_mut(&id).expect("a batch that is decided is in flight");
        if let Stage::Preparing { pending, .. } = &flight.stage {
            self.deadlines.remove(&(pending.deadline, id));
        }
        flight.stage = Stage::Deciding { number, commit: true, stamp };
        self.recovering.remove(&id);
        match stamp {
            Some(stamp) => self.propose(id, number, Ok(stamp), effects),
            None => self.without_stamp.push(id),
        }
    }

    /// Always safe before a decision exists, and while no shard may have committed the batch by itself.
    fn decide_abort(&mut self, id: BatchId, abort: Abort, effects: &mut Effects) {
        self.leave_lines(id);
        let flight = self.flights.get_mut(&id).expect("a batch that is decided is in flight");
        let number = match &flight.stage {
            Stage::Preparing { number, pending, alone, .. } => {
                assert!(alone.is_none(), "batch {id} may be committed: its shard has not said");
                self.deadlines.remove(&(pending.deadline, id));
                *number
            }
            Stage::Deciding { .. } | Stage::Recording { .. } | Stage::Telling { .. } => return,
            Stage::Parked(_) => {
                self.last_sequence += 1;
                Number { epoch: self.epoch, sequence: self.last_sequence }
            }
            Stage::Recovering { .. } => flight
                .listed
                .values()
                .map(|(number, _)| *number)
                .max()
                .unwrap_or(cancelled_number(self.epoch)),
        };
        flight.stage = Stage::Deciding { number, commit: false, stamp: None };
        self.recovering.remove(&id);
        self.propose(id, number, Err(abort), effects);
    }

    fn propose(&mut self, id: BatchId, number: Number, result: Result<Stamp, Abort>, effects: &mut Effects) {
        let flight = &self.flights[&id];
        let (hash, shards) = (flight.hash, flight.shards.clone());
        effects.act.decisions.push(Decision { id, hash, shards, number, result });
    }

    /// The next stamp, greater than all stamps and read positions before; none while the ceiling has to be raised first.
    fn give_stamp(&mut self, effects: &mut Effects) -> Option<Stamp> {
        if self.ceiling.0 - self.last_stamp.0 < STAMP_BLOCK / 2 && self.ceiling_asked == self.ceiling {
            self.ceiling_asked = Stamp(self.ceiling.0 + STAMP_BLOCK);
            effects.act.ceiling = Some(self.ceiling_asked);
        }
        if self.last_stamp == self.ceiling {
            return None;
        }
        self.last_stamp = Stamp(self.last_stamp.0 + 1);
        Some(self.last_stamp)
    }

    fn applied(&mut self, acted: Acted, effects: &mut Effects) {
        let Acted { decisions, ceiling, horizon, history, remembered, windows } = acted;
        for (shard, window) in windows {
            self.view(shard).window = window;
        }
        self.history = self.history.max(history);
        self.remembered = remembered;
        self.ceiling = self.ceiling.max(ceiling);
        self.ceiling_asked = self.ceiling_asked.max(self.ceiling);
        self.horizon = self.horizon.max(horizon);
        let (behind, others) =
            std::mem::take(&mut self.too_old).into_iter().partition(|(id, _)| id.time() <= horizon);
        self.too_old = others;
        for (id, token) in behind {
            effects.replies.push((token, self.is_too_old(id, horizon)));
        }
        for decision in decisions {
            self.decided(decision, effects);
        }
        for id in std::mem::take(&mut self.without_stamp) {
            let Some(Flight { stage: Stage::Deciding { number, .. }, .. }) = self.flights.get(&id) else {
                continue;
            };
            let number = *number;
            self.decide_commit(id, number, effects);
        }
    }

    /// The log has answered: this decision stands.
    fn decided(&mut self, decision: Decision, effects: &mut Effects) {
        let id = decision.id;
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let mut finished = false;
        match &flight.stage {
            Stage::Telling { .. } => return,
            Stage::Recording { decision: ours } => {
                finished = true;
                if *ours != decision {
                    effects.alarms.push(format!(
                        "batch {id} is committed by its shard, but {decision:?} is recorded (rule R13)"
                    ));
                    return;
                }
            }
            Stage::Parked(_)
            | Stage::Preparing { .. }
            | Stage::Recovering { .. }
            | Stage::Deciding { .. } => {}
        }
        for token in std::mem::take(&mut flight.waiters) {
            effects.replies.push((token, Reply::Decided(decision.clone())));
        }
        let mut missing: BTreeMap<ShardId, Number> =
            flight.shards.iter().map(|shard| (*shard, decision.number)).collect();
        if decision.result.is_err() {
            // Listed parts may stand under other numbers; each is ended under its own.
            missing.extend(flight.listed.iter().map(|(shard, (number, _))| (*shard, *number)));
        }
        for (shard, number) in &missing {
            let view = self.shards.get_mut(shard).expect("participants are known shards");
            view.ask(self.now);
            view.outstanding.insert(*number, (id, self.now));
            // The outcome ends these too.
            for tried in &flight.tries {
                self.strays.remove(&(*shard, *tried));
            }
        }
        for shard in missing.keys() {
            self.shards.get_mut(shard).expect("participants are known shards").untold.push(id);
        }
        flight.stage = Stage::Telling { decision, missing, finished };
        self.end_if_done(id);
    }

    fn send_outcome(&self, shard: ShardId, id: BatchId, effects: &mut Effects) {
        let Some(Flight { stage: Stage::Telling { decision, missing, .. }, tries, .. }) =
            self.flights.get(&id)
        else {
            return;
        };
        let Some(number) = missing.get(&shard) else { return };
        effects.to_shards.entry(shard).or_default().outcomes.push(PartOutcome {
            id,
            number: *number,
            commit: decision.result.as_ref().ok().copied(),
            gives_up: tries.iter().copied().filter(|tried| tried != number).collect(),
        });
    }

    /// Rule R2: only this ends a participant's part.
    fn done(&mut self, shard: ShardId, done: Done, effects: &mut Effects) {
        let Done { id, number, lost } = done;
        if lost {
            effects.alarms.push(format!(
                "shard {shard} has lost its part of batch {id}, which is committed under {number}"
            ));
            return;
        }
        if self.strays.get(&(shard, number)) == Some(&id) {
            self.strays.remove(&(shard, number));
            let before = self.tried_before(id, number);
            let view = self.view(shard);
            for ended in before.into_iter().chain([number]) {
                view.outstanding.remove(&ended);
            }
            return;
        }
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let Stage::Telling { missing, .. } = &mut flight.stage else { return };
        if missing.get(&shard) != Some(&number) {
            return;
        }
        missing.remove(&shard);
        let tries = flight.tries.clone();
        let view = self.view(shard);
        view.outstanding.remove(&number);
        for tried in tries {
            view.outstanding.remove(&tried);
        }
        self.end_if_done(id);
    }

    fn end_if_done(&mut self, id: BatchId) {
        if let Some(Flight { stage: Stage::Telling { missing, decision, finished }, .. }) =
            self.flights.get(&id)
            && missing.is_empty()
        {
            if !decision.shards.is_empty() && !finished {
                self.finished.push(id);
            }
            self.flights.remove(&id);
        }
    }

    fn query(
        &mut self,
        token: Token,
        id: BatchId,
        wait: bool,
        abort_if_not_seen: bool,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        if let Some(flight) = self.flights.get_mut(&id) {
            match &flight.stage {
                Stage::Telling { decision, .. } | Stage::Recording { decision } => {
                    effects.replies.push((token, Reply::Decided(decision.clone())));
                }
                _ if wait => flight.waiters.push(token),
                _ => effects.replies.push((token, Reply::InProgress)),
            }
            return;
        }
        match decisions.remembered(id) {
            Remembered::Decided(decision) => {
                return effects.replies.push((token, Reply::Decided(decision)));
            }
            Remembered::Forgotten { horizon } => {
                return effects.replies.push((token, self.is_too_old(id, horizon)));
            }
            Remembered::Nothing if abort_if_not_seen && id.time() <= self.horizon => {
                return self.too_old.push((id, token));
            }
            Remembered::Nothing => {}
        }
        if id.time().0 > self.now.0 + self.config.future_max_ms {
            effects.replies.push((token, Reply::Refused(Refusal::FromTheFuture { now: self.now })));
        } else if abort_if_not_seen && self.hidden_by(id).is_some() {
            // A shard may have committed it by itself (rule R13).
            effects.replies.push((token, Reply::InProgress));
        } else if abort_if_not_seen && self.flights.len() >= self.config.batches_max {
            effects.replies.push((token, Reply::Refused(Refusal::Overloaded)));
        } else if abort_if_not_seen {
            let stage = Stage::Recovering { since: self.now, mixed: false };
            let mut flight = Flight::new(None, Vec::new(), stage);
            flight.waiters.push(token);
            self.flights.insert(id, flight);
            self.decide_abort(id, Abort::because(AbortReason::Cancelled), effects);
        } else if self.is_recovered() {
            effects.replies.push((token, Reply::NotSeen));
        } else {
            // A shard that has not answered the greeting may hold a part of it.
            effects.replies.push((token, Reply::InProgress));
        }
    }

    fn tick(&mut self, now: Millis, effects: &mut Effects) {
        self.now = self.now.max(now);
        self.ticked = true;
        self.end_deadlines(effects);
        self.end_what_holds_up_marks(effects);
        self.retry(effects);
        self.lose_patience(effects);
        self.raise_horizon(effects);
        self.end_readings(effects);
        if self.now.0 >= self.resent_at.0 + self.config.resend_ms / 2 {
            self.resent_at = self.now;
            let before = Millis(self.now.0.saturating_sub(self.config.resend_ms));
            let placement = self.config.placement;
            for shard in placement.all() {
                self.resend(shard, before, effects);
            }
        }
    }

    fn end_deadlines(&mut self, effects: &mut Effects) {
        while let Some((deadline, id)) = self.deadlines.first().copied()
            && deadline <= self.now
        {
            self.deadlines.pop_first();
            let Some(flight) = self.flights.get(&id) else { continue };
            match &flight.stage {
                // A shard may have committed the id for an earlier leader: there is nothing to be said. Nothing was sent now, so nothing
                // need be kept.
                Stage::Parked(_) if self.hidden_by(id).is_some() => {
                    self.parked.remove(&id);
                    for token in self.flights.remove(&id).expect("was just found").waiters {
                        effects.replies.push((token, Reply::InProgress));
                    }
                }
                // A shard that has not answered the greeting may hold a part of it, from an earlier epoch and with all votes in. So
                // that nothing was sent now is no answer; a recorded abort is one.
                Stage::Parked(_) => {
                    self.parked.remove(&id);
                    self.decide_abort(id, Abort::because(AbortReason::ParticipantUnavailable), effects);
                }
                Stage::Preparing { late: true, .. } => {}
                // The shard may have committed it. A prepare that doesn't permit that, under a number that gives up the one that did,
                // asks what has become of it; whatever else the answer is, it can be aborted then.
                Stage::Preparing { alone: Some(stamp), pending, .. } => {
                    let (stamp, pending) = (*stamp, pending.clone());
                    self.send_prepares(id, pending, Some(stamp), true, effects);
                }
                Stage::Preparing { .. } => {
                    let silent = flight.shards.iter().any(|shard| !flight.answered.contains(shard));
                    let reason =
                        if silent { AbortReason::ParticipantUnavailable } else { AbortReason::Contention };
                    self.decide_abort(id, Abort::because(reason), effects);
                }
                Stage::Recovering { .. }
                | Stage::Deciding { .. }
                | Stage::Recording { .. }
                | Stage::Telling { .. } => {}
            }
        }
    }

    /// Ends batches that make a shard remember too many finished numbers: as if their time was up.
    fn end_what_holds_up_marks(&mut self, effects: &mut Effects) {
        let oldest = |view: &ShardView| {
            let (number, (id, _)) = view.outstanding.first_key_value()?;
            let far = number.epoch != self.epoch || number.sequence + NUMBERS_MAX < self.last_sequence;
            far.then_some(*id)
        };
        let late: BTreeSet<BatchId> = self.shards.values().filter_map(oldest).collect();
        for id in late {
            if let Some(Flight { stage: Stage::Preparing { pending, .. }, .. }) = self.flights.get(&id) {
                self.deadlines.remove(&(pending.deadline, id));
                self.deadlines.insert((self.now, id));
            }
        }
        self.end_deadlines(effects);
    }

    fn retry(&mut self, effects: &mut Effects) {
        while let Some((at, id)) = self.retries.first().copied()
            && at <= self.now
        {
            self.retries.pop_first();
            if let Some(Flight { stage: Stage::Preparing { retry_at: Some(due), pending, .. }, .. }) =
                self.flights.get(&id)
                && *due == at
            {
                let pending = pending.clone();
                self.prepare(id, pending, effects);
            }
        }
    }

    /// Asks for a later horizon: never past a batch that is not decided, as far as is known. That a shard has not answered the
    /// greeting, and may hold such a one, holds it up for the time of the retention only.
    fn raise_horizon(&mut self, effects: &mut Effects) {
        let retention = self.config.retention_ms;
        let step = (retention / 100).clamp(100, 60_000);
        let known = self.is_recovered() || self.now.0 >= self.opened_at.0 + retention;
        if self.now.0 < self.horizon_asked_at.0 + step || !known {
            return;
        }
        self.horizon_asked_at = self.now;
        let wanted = Millis(self.now.0.saturating_sub(retention).min(self.before_undecided()));
        if wanted > self.horizon {
            // From now on: what is taken up before the log has it would be forgotten while it is in flight.
            self.horizon = wanted;
            effects.act.horizon = Some(wanted);
        }
    }

    /// All ids up to this time that the leader knows of are decided, and recorded.
    fn before_undecided(&self) -> u64 {
        let mut undecided =
            self.flights.iter().filter(|(_, flight)| !matches!(flight.stage, Stage::Telling { .. }));
        undecided.next().map_or(u64::MAX, |(id, _)| id.time().0.saturating_sub(1))
    }

    /// Sends again what was last sent to a shard before `before` and has no answer, in order of the numbers.
    fn resend(&mut self, shard: ShardId, before: Millis, effects: &mut Effects) {
        self.resend_reads(shard, before, effects);
        let Some(view) = self.shards.get_mut(&shard) else { return };
        if !view.greeted {
            if view.greeted_at < before {
                self.greet(shard, effects);
            }
            return;
        }
        let patient = Millis(before.0.saturating_sub(4 * self.config.resend_ms));
        let due: Vec<(Number, BatchId, Millis)> = view
            .outstanding
            .iter()
            .filter(|(_, (_, sent))| *sent <= before)
            .map(|(number, (id, sent))| (*number, *id, *sent))
            .collect();
        for (number, id, sent) in due {
            if self.strays.contains_key(&(shard, number)) {
                self.send_stray(shard, number, id, effects);
            } else {
                match self.flights.get(&id).map(|flight| &flight.stage) {
                    Some(Stage::Telling { missing, .. }) if missing.get(&shard) == Some(&number) => {
                        self.send_outcome(shard, id, effects);
                    }
                    Some(Stage::Preparing { votes, number: current, .. }) if *current == number => {
                        match votes.get(&shard) {
                            None => self.send_prepare(shard, id, effects),
                            // Its vote will come by itself; ask only if it takes very long, or after a reconnection.
                            Some(Heard::Waiting) if sent <= patient => self.send_prepare(shard, id, effects),
                            Some(Heard::Waiting | Heard::Yes) => continue,
                        }
                    }
                    _ => continue,
                }
            }
            let now = self.now;
            if let Some(entry) = self.view(shard).outstanding.get_mut(&number) {
                entry.1 = now;
            }
        }
    }

    fn view(&mut self, shard: ShardId) -> &mut ShardView {
        self.shards.get_mut(&shard).expect("the shard was checked on arrival")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::{Batch, Operation, OperationKind},
        messages::Greeting,
    };

    struct Nothing;

    impl Decisions for Nothing {
        fn remembered(&self, _: BatchId) -> Remembered {
            Remembered::Nothing
        }
    }

    /// A leader of one shard, which has answered the greeting.
    fn greeted(now: Millis) -> Leader {
        let opened = Opened {
            epoch: Epoch(1),
            floor: Stamp(0),
            ceiling: Stamp(100),
            horizon: Millis(0),
            history: Stamp(0),
            remembered: 0,
            windows: BTreeMap::new(),
            unfinished: Vec::new(),
        };
        let (mut leader, _) = Leader::open(LeaderConfig::new(Placement { shards: 1 }), opened, now);
        let greeting = Some(Greeting { epoch: Epoch(1), parts: Vec::new() });
        let message = FromShard { greeting, ..FromShard::default() };
        leader.step(Event::FromShard { shard: ShardId(1), message }, &Nothing, &mut Effects::default());
        leader
    }

    #[test]
    fn a_batch_that_makes_a_shard_remember_too_many_numbers_is_ended() {
        let now = Millis(1_700_000_000_000);
        let mut leader = greeted(now);
        let row = RowKey::new("a", "USD").unwrap();
        let operation = Operation { row, kind: OperationKind::Delete };
        let id = BatchId::from_parts(now, [1; 10]);
        let batch = Batch { id, timeout_ms: 0, operations: vec![operation], zero_sum: false };
        let submit = Event::Submit { token: Token(1), batch: batch.split(Placement { shards: 1 }) };
        leader.step(submit, &Nothing, &mut Effects::default());
        let first = leader.last_sequence;
        let decided_at = |leader: &mut Leader, last_sequence: u64| {
            leader.last_sequence = last_sequence;
            let mut effects = Effects::default();
            leader.step(Event::Tick { now }, &Nothing, &mut effects);
            effects
                .act
                .decisions
                .into_iter()
                .map(|decision| (decision.id, decision.result.is_ok()))
                .collect::<Vec<_>>()
        };
        assert_eq!(decided_at(&mut leader, first + NUMBERS_MAX), [], "so many may be finished after it");
        assert_eq!(decided_at(&mut leader, first + NUMBERS_MAX + 1), [(id, false)], "more may not");
    }
}
