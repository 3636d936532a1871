//! The coordinator group, as a replicated state machine: one decision for each batch, recorded once.
//!
//! Invariants:
//! - The first decision of an id wins; a later one changes nothing and is answered with the one that stands (rule R1).
//! - What is proposed carries its epoch, and is refused if a newer one has begun (rule R6). An epoch is the index of the entry that
//!   opened it.
//! - A decision is forgotten only when all its participants have confirmed it and its id is at or before the horizon. The horizon
//!   only moves forward, and an id at or before it that has no decision never gets another one than abort, nor is started by a
//!   leader. So nothing forgotten is ever run again, whatever the clocks say (promise G3).
//! - What a batch's only participant has committed is recorded as such, whatever the horizon: it has happened. It is finished at once,
//!   since nobody is left to be told before it may be forgotten.
//! - Decisions are bounded in number: those with the oldest ids make room, and the horizon moves with them.
//! - The ceiling only rises, and every stamp that is given lies at or below it.
//! - What a shard has committed by itself, and is not recorded, has an id with a time in the window of that shard.
//! - The history mark only rises, and at least [`Keep::history_max`] commits have been recorded behind it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    batch::Placement,
    ids::{BatchId, Epoch, Millis, NodeId, Number, ShardId, Stamp},
    leader::Remembered,
    machine::{Machine, decode, encode},
    messages::{Abort, AbortReason, Decision},
    recent::Recent,
    roster::{self, NodeChange, NodeRefusal},
    store::{Store, StoreError},
};

const STATE_TABLE: u8 = 0x20;
const DECISION_TABLE: u8 = 0x21;
const ORDER_TABLE: u8 = 0x22;
const UNFINISHED_TABLE: u8 = 0x23;
const CHECKPOINT_TABLE: u8 = 0x25;
const WINDOW_TABLE: u8 = 0x26;

/// By how much an opening entry, and later the leader, raises the ceiling of stamps.
pub const STAMP_BLOCK: u64 = 1 << 20;

/// How many decisions are looked at with each entry to forget them, beside twice as many as the entry records.
const REMOVED_PER_ENTRY: usize = 64;

/// The same while too many are remembered.
const REMOVED_PER_ENTRY_CROWDED: usize = 1024;

/// The history mark moves in steps of this part of what is kept.
const CHECKPOINTS: u64 = 16;

/// One entry of the coordinator's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorEntry {
    /// A new leader opens its epoch.
    Open {
        /// Who leads.
        node: NodeId,
        /// Where partitions live, as the leader is configured. Must be the same for ever.
        placement: Placement,
        /// How much is remembered while this leader leads. Told with the entry, because applying must not depend on any replica's own
        /// settings (rule R10).
        keep: Keep,
    },
    /// What the leader of an epoch records.
    Act(Act),
    /// A node joins or leaves the cluster. It has nothing to do with batches, so it belongs to no epoch.
    Node(NodeChange),
}

/// How much is remembered, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Keep {
    /// Decisions. Those with the oldest ids are forgotten while there are more.
    pub decisions_max: u64,
    /// Commits of which the shards keep the versions that they replaced.
    pub history_max: u64,
}

impl Default for Keep {
    fn default() -> Keep {
        Keep { decisions_max: 10_000_000, history_max: 10_000_000 }
    }
}

/// Times of ids: later than `after`, up to `up_to`. A shard is let commit a batch by itself only if the time of its id lies in the
/// window that is recorded for the shard, and the window's beginning moves only past what is recorded too. So a new leader knows of
/// all other ids that no shard which it hasn't heard has committed them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Window {
    /// Only later ids.
    pub after: Millis,
    /// Only ids up to here.
    pub up_to: Millis,
}

impl Window {
    /// Whether an id lies in it.
    pub fn contains(&self, id: BatchId) -> bool {
        self.after < id.time() && id.time() <= self.up_to
    }

    /// The later of both ends: neither moves back.
    pub fn later(self, other: Window) -> Window {
        Window { after: self.after.max(other.after), up_to: self.up_to.max(other.up_to) }
    }
}

/// What the leader of an epoch records in one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Act {
    /// The epoch in which it was proposed.
    pub epoch: Epoch,
    /// Decisions.
    pub decisions: Vec<Decision>,
    /// Commits that the only participant has made and carried out.
    pub settled: Vec<Decision>,
    /// Batches that all participants have confirmed.
    pub finished: Vec<BatchId>,
    /// A higher ceiling of stamps.
    pub ceiling: Option<Stamp>,
    /// A later horizon.
    pub horizon: Option<Millis>,
    /// Later windows of ids that shards may commit by themselves.
    pub windows: BTreeMap<ShardId, Window>,
    /// Too many decisions are remembered: those with ids up to this time may be forgotten to make room.
    pub crowded: Option<Millis>,
}

impl Act {
    /// Whether it records nothing.
    pub fn is_empty(&self) -> bool {
        self.decisions.is_empty()
            && self.settled.is_empty()
            && self.finished.is_empty()
            && self.ceiling.is_none()
            && self.horizon.is_none()
            && self.windows.is_empty()
            && self.crowded.is_none()
    }

    /// Adds what is to be recorded behind what waits already. Both are of one epoch.
    pub fn pile(&mut self, more: Act) {
        debug_assert!(
            self.epoch == Epoch(0) || self.epoch == more.epoch,
            "what waits is dropped with its epoch"
        );
        self.epoch = more.epoch;
        if self.decisions.is_empty() {
            self.decisions = more.decisions;
        } else {
            self.decisions.extend(more.decisions);
        }
        self.settled.extend(more.settled);
        self.finished.extend(more.finished);
        self.ceiling = self.ceiling.max(more.ceiling);
        self.horizon = self.horizon.max(more.horizon);
        for (shard, window) in more.windows {
            let place = self.windows.entry(shard).or_default();
            *place = place.later(window);
        }
        self.crowded = self.crowded.max(more.crowded);
    }
}

/// What applying an entry answers to its proposer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CoordinatorReply {
    /// The epoch is open: all that its leader starts from.
    Opened(Opened),
    /// It is recorded.
    Acted(Acted),
    /// A newer epoch has begun: nothing was recorded.
    OldEpoch {
        /// The epoch that has.
        newer: Epoch,
    },
    /// What became of a wish about a node.
    Node(Result<(), NodeRefusal>),
    /// The opening entry tells another number of shards than the first one did: nothing was recorded.
    OtherPlacement {
        /// What the first one told.
        recorded: Placement,
    },
}

/// What has come of an [`Act`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Acted {
    /// For each decision of the entry the one that stands; what was settled comes last.
    pub decisions: Vec<Decision>,
    /// The ceiling of stamps.
    pub ceiling: Stamp,
    /// The horizon.
    pub horizon: Millis,
    /// The history mark: nobody will read at a position below it.
    pub history: Stamp,
    /// How many decisions are remembered.
    pub remembered: u64,
    /// The windows that the entry moved, as they are now.
    pub windows: BTreeMap<ShardId, Window>,
}

/// What a new leader starts from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// The epoch.
    pub epoch: Epoch,
    /// All stamps that were ever given lie at or below this.
    pub floor: Stamp,
    /// Stamps may be given up to this.
    pub ceiling: Stamp,
    /// Ids at or before this are refused.
    pub horizon: Millis,
    /// The history mark.
    pub history: Stamp,
    /// How many decisions are remembered.
    pub remembered: u64,
    /// Ids that shards may have committed by themselves, without it being recorded.
    pub windows: BTreeMap<ShardId, Window>,
    /// Decisions that not all participants have confirmed.
    pub unfinished: Vec<Decision>,
}

/// A decision as it is stored.
#[derive(Serialize, Deserialize)]
struct Stored {
    decision: Decision,
    position: u64,
    finished: bool,
}

/// A decision and where it stands in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its place in the order of recording.
    pub position: u64,
    /// The decision.
    pub decision: Decision,
    /// Whether all participants have confirmed it.
    pub finished: bool,
}

/// What is kept in one row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct State {
    placement: Option<Placement>,
    epoch: Epoch,
    ceiling: Stamp,
    horizon: Millis,
    /// The position of the next decision, from 1.
    next: u64,
    /// How many decisions are remembered.
    count: u64,
    unfinished: u64,
    keep: Keep,
    /// Where looking for what can be forgotten goes on: of all before, only what is unfinished is left.
    forgotten: BatchId,
    /// How many commits were ever recorded.
    commits: u64,
    /// The greatest stamp that was ever recorded.
    newest: Stamp,
    history: Stamp,
}

/// The state machine of the coordinator group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coordinator {
    state: State,
    recent: Recent,
}

/// The counters of the group, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoordinatorCounts {
    /// The epoch.
    pub epoch: Epoch,
    /// Decisions that are remembered.
    pub decisions: u64,
    /// Of these, how many not all participants have confirmed.
    pub unfinished: u64,
    /// The horizon.
    pub horizon: Millis,
}

impl Machine for Coordinator {
    type Reply = CoordinatorReply;
    type Config = ();

    fn open(_: &(), store: &dyn Store) -> Result<Coordinator, StoreError> {
        let state = match store.get(&[STATE_TABLE])? {
            None => State { next: 1, ..State::default() },
            Some(bytes) => decode("coordinator state", &bytes)?,
        };
        let greatest = store.last(&[DECISION_TABLE], &[DECISION_TABLE + 1])?;
        let recent = Recent::above(greatest.map(|(key, _)| id_of(&key[1..])).unwrap_or_default());
        Ok(Coordinator { state, recent })
    }

    fn apply(
        &mut self,
        store: &mut dyn Store,
        index: u64,
        command: &[u8],
    ) -> Result<CoordinatorReply, StoreError> {
        let reply = match decode("coordinator entry", command)? {
            CoordinatorEntry::Open { placement, keep, .. } => {
                self.open_epoch(store, Epoch(index), placement, keep)?
            }
            CoordinatorEntry::Act(act) => self.act(store, act)?,
            CoordinatorEntry::Node(change) => CoordinatorReply::Node(roster::change(store, index, change)?),
        };
        store.put(&[STATE_TABLE], &encode(&self.state))?;
        Ok(reply)
    }

    fn flush(&mut self, _: &mut dyn Store) -> Result<(), StoreError> {
        // All of it is in the store.
        Ok(())
    }

    fn trim(&mut self, _: usize) {}
}

impl Coordinator {
    /// The decision of an id, if one is remembered. It never changes, so any replica may tell it.
    pub fn decision(&self, store: &dyn Store, id: BatchId) -> Result<Option<Decision>, StoreError> {
        Ok(self.load(store, id)?.map(|stored| stored.decision))
    }

    /// What is remembered of an id: its decision, or whether it is too old to be remembered.
    pub fn remembered(&self, store: &dyn Store, id: BatchId) -> Result<Remembered, StoreError> {
        let horizon = self.state.horizon;
        Ok(match self.decision(store, id)? {
            Some(decision) => Remembered::Decided(decision),
            None if id.time() <= horizon => Remembered::Forgotten { horizon },
            None => Remembered::Nothing,
        })
    }

    /// The decisions from a position on, in the order of recording, and where the list goes on.
    pub fn list(
        &self,
        store: &dyn Store,
        from: u64,
        limit: usize,
    ) -> Result<(Vec<Listed>, Option<u64>), StoreError> {
        let mut found = Vec::new();
        let mut next = None;
        store.scan(&order_key(from), &[ORDER_TABLE + 1], &mut |key, value| {
            if found.len() == limit {
                next = Some(position_of(key));
                return false;
            }
            found.push((position_of(key), id_of(value)));
            true
        })?;
        let mut listed = Vec::with_capacity(found.len());
        for (position, id) in found {
            let stored = load(store, id)?.ok_or_else(|| missing(id))?;
            listed.push(Listed { position, decision: stored.decision, finished: stored.finished });
        }
        Ok((listed, next))
    }

    /// The counters.
    pub fn counts(&self) -> CoordinatorCounts {
        CoordinatorCounts {
            epoch: self.state.epoch,
            decisions: self.state.count,
            unfinished: self.state.unfinished,
            horizon: self.state.horizon,
        }
    }

    fn open_epoch(
        &mut self,
        store: &mut dyn Store,
        epoch: Epoch,
        placement: Placement,
        keep: Keep,
    ) -> Result<CoordinatorReply, StoreError> {
        let recorded = *self.state.placement.get_or_insert(placement);
        if recorded != placement {
            return Ok(CoordinatorReply::OtherPlacement { recorded });
        }
        assert!(epoch > self.state.epoch, "epoch {epoch} opens after {}", self.state.epoch);
        let floor = self.state.ceiling;
        self.state.epoch = epoch;
        self.state.keep = keep;
        self.state.ceiling = Stamp(floor.0 + STAMP_BLOCK);
        let mut ids = Vec::new();
        store.scan(&[UNFINISHED_TABLE], &[UNFINISHED_TABLE + 1], &mut |_, id| {
            ids.push(id_of(id));
            true
        })?;
        let mut unfinished = Vec::with_capacity(ids.len());
        for id in ids {
            unfinished.push(load(store, id)?.ok_or_else(|| missing(id))?.decision);
        }
        Ok(CoordinatorReply::Opened(Opened {
            epoch,
            floor,
            ceiling: self.state.ceiling,
            horizon: self.state.horizon,
            history: self.state.history,
            remembered: self.state.count,
            windows: windows(store)?,
            unfinished,
        }))
    }

    fn act(&mut self, store: &mut dyn Store, act: Act) -> Result<CoordinatorReply, StoreError> {
        if act.epoch != self.state.epoch {
            assert!(act.epoch < self.state.epoch, "epoch {} acts before it is open", act.epoch);
            return Ok(CoordinatorReply::OldEpoch { newer: self.state.epoch });
        }
        if let Some(ceiling) = act.ceiling {
            self.state.ceiling = self.state.ceiling.max(ceiling);
        }
        let recorded = act.decisions.len() + act.settled.len();
        let mut decisions = Vec::with_capacity(recorded);
        for decision in act.decisions {
            decisions.push(self.decide(store, decision)?);
        }
        for decision in act.settled {
            decisions.push(self.settle(store, decision)?);
        }
        for id in act.finished {
            self.finish(store, id)?;
        }
        if let Some(horizon) = act.horizon {
            self.state.horizon = self.state.horizon.max(horizon);
        }
        let mut windows = BTreeMap::new();
        for (shard, window) in act.windows {
            let stored = store.get(&window_key(shard))?.map(|bytes| decode("window", &bytes)).transpose()?;
            let window = window.later(stored.unwrap_or_default());
            store.put(&window_key(shard), &encode(&window))?;
            windows.insert(shard, window);
        }
        let most = if act.crowded.is_some() { REMOVED_PER_ENTRY_CROWDED } else { REMOVED_PER_ENTRY };
        self.forget(store, most + 2 * recorded, act.crowded)?;
        Ok(CoordinatorReply::Acted(Acted {
            decisions,
            ceiling: self.state.ceiling,
            horizon: self.state.horizon,
            history: self.state.history,
            remembered: self.state.count,
            windows,
        }))
    }

    /// Rule R1.
    fn decide(&mut self, store: &mut dyn Store, mut decision: Decision) -> Result<Decision, StoreError> {
        let id = decision.id;
        if let Some(stored) = self.load(store, id)? {
            return Ok(stored.decision);
        }
        if id.time() <= self.state.horizon {
            // Callers are told that it is too old to be remembered, so it must not commit any more.
            if decision.result.is_ok() {
                decision.result = Err(Abort::because(AbortReason::Interrupted));
            }
            if decision.shards.is_empty() {
                return Ok(decision);
            }
        }
        let finished = decision.shards.is_empty();
        self.record(store, decision, finished)
    }

    /// Rule R1, for what has happened already.
    fn settle(&mut self, store: &mut dyn Store, decision: Decision) -> Result<Decision, StoreError> {
        match self.load(store, decision.id)? {
            Some(stored) => Ok(stored.decision),
            None => self.record(store, decision, true),
        }
    }

    fn record(
        &mut self,
        store: &mut dyn Store,
        decision: Decision,
        finished: bool,
    ) -> Result<Decision, StoreError> {
        let id = decision.id;
        if let Ok(stamp) = decision.result {
            assert!(stamp <= self.state.ceiling, "stamp {stamp} is above the ceiling {}", self.state.ceiling);
            self.note_commit(store, stamp)?;
        }
        if finished && id < self.state.forgotten {
            // Looking for what can be forgotten has passed it by.
            return Ok(decision);
        }
        let position = self.state.next;
        self.state.next += 1;
        self.state.count += 1;
        store.put_new(&order_key(position), &id.0)?;
        if !finished {
            self.state.unfinished += 1;
            store.put_new(&unfinished_key(position), &id.0)?;
        }
        let stored = Stored { decision, position, finished };
        store.put_new(&decision_key(id), &encode(&stored))?;
        self.recent.note(id);
        Ok(stored.decision)
    }

    fn load(&self, store: &dyn Store, id: BatchId) -> Result<Option<Stored>, StoreError> {
        if self.recent.is_new(id) { Ok(None) } else { load(store, id) }
    }

    /// Counts a commit, and moves the history mark when enough have been recorded behind a checkpoint.
    fn note_commit(&mut self, store: &mut dyn Store, stamp: Stamp) -> Result<(), StoreError> {
        self.state.newest = self.state.newest.max(stamp);
        self.state.commits += 1;
        let Keep { history_max, .. } = self.state.keep;
        if !self.state.commits.is_multiple_of((history_max / CHECKPOINTS).max(1)) {
            return Ok(());
        }
        store.put(&checkpoint_key(self.state.commits), &encode(&self.state.newest))?;
        let Some(old) = self.state.commits.checked_sub(history_max) else { return Ok(()) };
        let mut passed = Vec::new();
        let mut history = Ok(self.state.history);
        store.scan(&[CHECKPOINT_TABLE], &checkpoint_key(old + 1), &mut |key, stamp| {
            history = decode("checkpoint", stamp);
            passed.push(key.to_vec());
            history.is_ok() && passed.len() < REMOVED_PER_ENTRY
        })?;
        self.state.history = self.state.history.max(history?);
        passed.iter().try_for_each(|key| store.delete(key))
    }

    fn finish(&mut self, store: &mut dyn Store, id: BatchId) -> Result<(), StoreError> {
        let Some(mut stored) = load(store, id)? else { return Ok(()) };
        if stored.finished {
            return Ok(());
        }
        stored.finished = true;
        self.state.unfinished -= 1;
        store.delete(&unfinished_key(stored.position))?;
        if id < self.state.forgotten {
            // Looking for what can be forgotten has passed it by.
            return self.remove(store, id, stored.position);
        }
        store.put(&decision_key(id), &encode(&stored))
    }

    /// Removes finished decisions, oldest ids first: those at or before the horizon, and while more are remembered than may be, those up
    /// to `crowded` too. The horizon moves with them. Looks at `most` decisions, and goes on there with the next entry.
    fn forget(
        &mut self,
        store: &mut dyn Store,
        most: usize,
        crowded: Option<Millis>,
    ) -> Result<(), StoreError> {
        let surplus = self.state.count.saturating_sub(self.state.keep.decisions_max);
        let crowded = crowded.filter(|up_to| surplus > 0 && *up_to > self.state.horizon);
        let last = crowded.unwrap_or(self.state.horizon);
        let end = BatchId::after(last);
        if last == Millis(0) || end <= self.state.forgotten {
            return Ok(());
        }
        let mut looked = 0;
        let mut old = Vec::new();
        let mut next = Ok(end);
        let mut horizon = self.state.horizon;
        store.scan(&decision_key(self.state.forgotten), &decision_key(end), &mut |key, bytes| {
            let id = id_of(&key[1..]);
            if looked == most || (id.time() > horizon && old.len() as u64 >= surplus) {
                next = Ok(id);
                return false;
            }
            looked += 1;
            match decode::<Stored>("decision", bytes) {
                Err(error) => next = Err(error),
                Ok(stored) if stored.finished => old.push((id, stored.position)),
                Ok(_) => {}
            }
            horizon = horizon.max(id.time());
            next.is_ok()
        })?;
        self.state.horizon = horizon;
        // Never beyond the horizon, or a decision recorded there later would be dropped while its id may still be used.
        self.state.forgotten = next?.min(BatchId::after(horizon));
        for (id, position) in old {
            self.remove(store, id, position)?;
        }
        Ok(())
    }

    fn remove(&mut self, store: &mut dyn Store, id: BatchId, position: u64) -> Result<(), StoreError> {
        assert!(id.time() <= self.state.horizon, "batch {id} is forgotten before the horizon has passed it");
        self.state.count -= 1;
        store.delete(&decision_key(id))?;
        store.delete(&order_key(position))
    }
}

/// The number under which an id is cancelled that was never seen.
pub fn cancelled_number(epoch: Epoch) -> Number {
    Number { epoch, sequence: 0 }
}

fn load(store: &dyn Store, id: BatchId) -> Result<Option<Stored>, StoreError> {
    store.get(&decision_key(id))?.map(|bytes| decode("decision", &bytes)).transpose()
}

fn missing(id: BatchId) -> StoreError {
    StoreError(format!("batch {id} is listed, but its decision is missing"))
}

fn decision_key(id: BatchId) -> Vec<u8> {
    [&[DECISION_TABLE], id.0.as_slice()].concat()
}

fn order_key(position: u64) -> Vec<u8> {
    [&[ORDER_TABLE], position.to_be_bytes().as_slice()].concat()
}

fn unfinished_key(position: u64) -> Vec<u8> {
    [&[UNFINISHED_TABLE], position.to_be_bytes().as_slice()].concat()
}

fn checkpoint_key(commits: u64) -> Vec<u8> {
    [&[CHECKPOINT_TABLE], commits.to_be_bytes().as_slice()].concat()
}

fn window_key(shard: ShardId) -> Vec<u8> {
    [&[WINDOW_TABLE], shard.0.to_be_bytes().as_slice()].concat()
}

fn windows(store: &dyn Store) -> Result<BTreeMap<ShardId, Window>, StoreError> {
    let mut windows = BTreeMap::new();
    let mut failed = None;
    store.scan(&[WINDOW_TABLE], &[WINDOW_TABLE + 1], &mut |key, bytes| {
        let shard = key[1..].try_into().expect("a shard follows the table");
        match decode("window", bytes) {
            Err(error) => failed = Some(error),
            Ok(window) => _ = windows.insert(ShardId(u32::from_be_bytes(shard)), window),
        }
        failed.is_none()
    })?;
    failed.map_or(Ok(windows), Err)
}

fn position_of(key: &[u8]) -> u64 {
    u64::from_be_bytes(key[1..9].try_into().expect("a position follows the table"))
}

fn id_of(value: &[u8]) -> BatchId {
    BatchId(value.try_into().expect("an id has 16 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_piles_up_is_recorded_in_order_and_with_the_highest_marks() {
        let id = |n: u64| BatchId::from_parts(Millis(n), [0; 10]);
        let mut waiting = Act::default();
        assert!(waiting.is_empty());
        waiting.pile(Act {
            epoch: Epoch(3),
            finished: vec![id(1)],
            ceiling: Some(Stamp(5)),
            ..Act::default()
        });
        waiting.pile(Act {
            epoch: Epoch(3),
            finished: vec![id(2)],
            horizon: Some(Millis(9)),
            crowded: Some(Millis(4)),
            ..Act::default()
        });
        assert_eq!(waiting.epoch, Epoch(3));
        assert_eq!(waiting.finished, vec![id(1), id(2)]);
        assert_eq!((waiting.ceiling, waiting.horizon), (Some(Stamp(5)), Some(Millis(9))));
        assert_eq!(waiting.crowded, Some(Millis(4)));
    }
}
