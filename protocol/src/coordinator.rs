//! The coordinator group, as a replicated state machine: one decision for each batch, recorded once.
//!
//! Invariants:
//! - The first decision of an id wins; a later one changes nothing and is answered with the one that stands (rule R1).
//! - What is proposed carries its epoch, and is refused if a newer one has begun (rule R6). An epoch is the index of the entry that
//!   opened it.
//! - A decision is forgotten only when all its participants have confirmed it and its id is at or before the horizon; ids at or
//!   before the horizon are refused by the leader, so nothing forgotten is ever run again (promise G3).
//! - The ceiling only rises, and every stamp that is given lies at or below it.

use serde::{Deserialize, Serialize};

use crate::{
    batch::Placement,
    ids::{BatchId, Epoch, Millis, NodeId, Number, Stamp},
    leader::Remembered,
    machine::{Machine, decode, encode},
    messages::Decision,
    roster::{self, NodeChange, NodeRefusal},
    store::{Store, StoreError},
};

const STATE_TABLE: u8 = 0x20;
const DECISION_TABLE: u8 = 0x21;
const ORDER_TABLE: u8 = 0x22;
const UNFINISHED_TABLE: u8 = 0x23;

/// By how much an opening entry, and later the leader, raises the ceiling of stamps.
pub const STAMP_BLOCK: u64 = 1 << 20;

/// How many forgotten decisions are removed with each entry, beside as many as the entry records.
const REMOVED_PER_ENTRY: usize = 64;

/// One entry of the coordinator's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorEntry {
    /// A new leader opens its epoch.
    Open {
        /// Who leads.
        node: NodeId,
        /// Where partitions live, as the leader is configured. Must be the same for ever.
        placement: Placement,
    },
    /// What the leader of an epoch records.
    Act(Act),
    /// A node joins or leaves the cluster. It has nothing to do with batches, so it belongs to no epoch.
    Node(NodeChange),
}

/// What the leader of an epoch records in one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Act {
    /// The epoch in which it was proposed.
    pub epoch: Epoch,
    /// Decisions.
    pub decisions: Vec<Decision>,
    /// Batches that all participants have confirmed.
    pub finished: Vec<BatchId>,
    /// A higher ceiling of stamps.
    pub ceiling: Option<Stamp>,
    /// A later horizon.
    pub horizon: Option<Millis>,
}

impl Act {
    /// Whether it records nothing.
    pub fn is_empty(&self) -> bool {
        self.decisions.is_empty()
            && self.finished.is_empty()
            && self.ceiling.is_none()
            && self.horizon.is_none()
    }
}

/// What applying an entry answers to its proposer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CoordinatorReply {
    /// The epoch is open: all that its leader starts from.
    Opened(Opened),
    /// It is recorded.
    Acted {
        /// For each decision of the entry the one that stands.
        decisions: Vec<Decision>,
        /// The ceiling of stamps.
        ceiling: Stamp,
        /// The horizon.
        horizon: Millis,
    },
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
}

/// The state machine of the coordinator group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coordinator {
    state: State,
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
        Ok(Coordinator { state })
    }

    fn apply(
        &mut self,
        store: &mut dyn Store,
        index: u64,
        command: &[u8],
    ) -> Result<CoordinatorReply, StoreError> {
        let reply = match decode("coordinator entry", command)? {
            CoordinatorEntry::Open { placement, .. } => self.open_epoch(store, Epoch(index), placement)?,
            CoordinatorEntry::Act(act) => self.act(store, act)?,
            CoordinatorEntry::Node(change) => CoordinatorReply::Node(roster::change(store, index, change)?),
        };
        store.put(&[STATE_TABLE], &encode(&self.state))?;
        Ok(reply)
    }
}

impl Coordinator {
    /// The decision of an id, if one is remembered. It never changes, so any replica may tell it.
    pub fn decision(&self, store: &dyn Store, id: BatchId) -> Result<Option<Decision>, StoreError> {
        Ok(load(store, id)?.map(|stored| stored.decision))
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
    ) -> Result<CoordinatorReply, StoreError> {
        let recorded = *self.state.placement.get_or_insert(placement);
        if recorded != placement {
            return Ok(CoordinatorReply::OtherPlacement { recorded });
        }
        assert!(epoch > self.state.epoch, "epoch {epoch} opens after {}", self.state.epoch);
        let floor = self.state.ceiling;
        self.state.epoch = epoch;
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
        let recorded = act.decisions.len();
        let mut decisions = Vec::with_capacity(recorded);
        for decision in act.decisions {
            decisions.push(self.decide(store, decision)?);
        }
        for id in act.finished {
            self.finish(store, id)?;
        }
        if let Some(horizon) = act.horizon {
            self.raise_horizon(store, horizon)?;
        }
        self.forget(store, REMOVED_PER_ENTRY + 2 * recorded)?;
        Ok(CoordinatorReply::Acted { decisions, ceiling: self.state.ceiling, horizon: self.state.horizon })
    }

    /// Rule R1.
    fn decide(&mut self, store: &mut dyn Store, decision: Decision) -> Result<Decision, StoreError> {
        let id = decision.id;
        if let Some(stored) = load(store, id)? {
            return Ok(stored.decision);
        }
        if let Ok(stamp) = decision.result {
            assert!(stamp <= self.state.ceiling, "stamp {stamp} is above the ceiling {}", self.state.ceiling);
        }
        let position = self.state.next;
        let finished = decision.shards.is_empty();
        self.state.next += 1;
        self.state.count += 1;
        store.put(&order_key(position), &id.0)?;
        if !finished {
            self.state.unfinished += 1;
            store.put(&unfinished_key(position), &id.0)?;
        }
        let stored = Stored { decision, position, finished };
        store.put(&decision_key(id), &encode(&stored))?;
        Ok(stored.decision)
    }

    fn finish(&mut self, store: &mut dyn Store, id: BatchId) -> Result<(), StoreError> {
        let Some(mut stored) = load(store, id)? else { return Ok(()) };
        if !stored.finished {
            stored.finished = true;
            self.state.unfinished -= 1;
            store.delete(&unfinished_key(stored.position))?;
            store.put(&decision_key(id), &encode(&stored))?;
        }
        Ok(())
    }

    /// Moves the horizon forward, but never onto a batch that is not finished.
    fn raise_horizon(&mut self, store: &dyn Store, wanted: Millis) -> Result<(), StoreError> {
        let mut oldest = wanted;
        store.scan(&[UNFINISHED_TABLE], &[UNFINISHED_TABLE + 1], &mut |_, id| {
            oldest = oldest.min(Millis(id_of(id).time().0.saturating_sub(1)));
            true
        })?;
        self.state.horizon = self.state.horizon.max(oldest);
        Ok(())
    }

    /// Removes decisions at or before the horizon, oldest ids first, a few at a time.
    fn forget(&mut self, store: &mut dyn Store, most: usize) -> Result<(), StoreError> {
        if self.state.horizon == Millis(0) {
            return Ok(());
        }
        let mut old = Vec::new();
        let end = decision_key(BatchId::from_parts(Millis(self.state.horizon.0 + 1), [0; 10]));
        let mut failed = None;
        store.scan(&[DECISION_TABLE], &end[..7], &mut |_, bytes| {
            match decode::<Stored>("decision", bytes) {
                Err(error) => failed = Some(error),
                Ok(stored) if stored.finished => old.push((stored.decision.id, stored.position)),
                Ok(_) => {}
            }
            failed.is_none() && old.len() < most
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        for (id, position) in old {
            store.delete(&decision_key(id))?;
            store.delete(&order_key(position))?;
            self.state.count -= 1;
        }
        Ok(())
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

fn position_of(key: &[u8]) -> u64 {
    u64::from_be_bytes(key[1..9].try_into().expect("a position follows the table"))
}

fn id_of(value: &[u8]) -> BatchId {
    BatchId(value.try_into().expect("an id has 16 bytes"))
}
