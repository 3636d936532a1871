//! The shard: the built-in participant, as a replicated state machine.
//!
//! An entry of a shard's log is a list of messages from coordinators ([`ToShard`]); applying it answers with messages to them
//! ([`FromShard`]). All that a leader of the shard knows is here, in replicated state, so a change of leaders changes nothing.
//!
//! Invariants:
//! - A part that voted YES is removed by the outcome of its batch, or by a later number of the same batch and epoch, and by nothing
//!   else: not by time, not by a limit, not by another epoch (rules R3, R11).
//! - A prepare at or below the mark, with a finished number, or of another epoch than the recorded one, changes nothing (R4, R11).
//! - The answer to a repeated prepare is the same, YES and NO alike, until its outcome.
//! - Effects of a commit and the end of its part are one atomic step (R5).
//! - A part that was committed on this shard's own word is kept, without rows, until its coordinator has recorded that; nothing else
//!   takes it away, and every later prepare of its batch is answered with it.
//! - The shard commits on its own word in the order of stamps only: above the stamp of everything that it has carried out, and under a
//!   higher number than those it has refused.
//! - A prepare that might have been committed so, and was refused, is finished: none of its copies commits later.
//! - The history mark only moves forward. What is needed to undo changes above it is kept, and the rest is dropped, by a sweep that does a
//!   bounded piece of work with each entry; a read below the mark is refused, whether that is gone or not.
//!
//! For example: `prepare 1.1 add a -10` on a balance of 15 is held and answered YES; `prepare 1.2 add a -10` waits, because the
//! answer depends on 1.1; `outcome 1.1 abort` grants it, and the vote YES for 1.2 is among the answers.

mod evaluate;
mod holders;
mod locks;
mod numbers;
mod rows;
mod slots;
mod undo;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use self::{
    evaluate::{ByRow, Use},
    locks::{Answer, Claim, Mode, Ticket},
    numbers::Numbers,
    rows::{Row, Rows, Write, Writes},
    slots::Slot,
};
use crate::{
    batch::{Part, Placement},
    ids::{BatchId, ContentHash, Epoch, GroupId, Millis, Number, ShardId, Stamp},
    machine::{Machine, decode, encode},
    messages::{
        Done, FromShard, Greeting, HeldPart, PartOutcome, Prepare, READ_BYTES_MAX, RowValue, ShardQuery,
        ShardRead, ShardReadAnswer, ToShard, Vote, VoteKind,
    },
    point_map::PointMap,
    store::{Store, StoreError},
    wire::EncodedPart,
};

const PART_TABLE: u8 = 0x12;
const PEER_TABLE: u8 = 0x13;
const CONFIG_TABLE: u8 = 0x15;
const PROGRESS_TABLE: u8 = 0x16;

/// How many undo entries are added between two pieces of a sweep, in the product. To begin a piece costs as much as to look at some dozens.
/// Part of the format: replicas that sweep at different places differ.
pub const SWEEP_INTERVAL: u32 = 4096;

/// What all replicas of a shard must know and have equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShardConfig {
    /// Which shard this is.
    pub shard: ShardId,
    /// Where partitions live.
    pub placement: Placement,
    /// A sweep goes on when so many undo entries were added: mostly [`SWEEP_INTERVAL`].
    pub sweep_interval: u32,
}

/// One entry of a shard's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// The proposer's clock, to show ages by. Nothing depends on it.
    pub now: Millis,
    /// How many parts may be held; more are refused (OVERLOADED), so that memory is bounded. A setting of the proposer's, told with the
    /// entry because applying it must not depend on any replica's own (rule R10).
    pub parts_max: u32,
    /// What came in.
    pub messages: Vec<ToShard>,
}

/// What applying an entry answers: for each coordinator, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ShardReply {
    /// The answers.
    pub messages: Vec<(GroupId, FromShard)>,
    /// Things that must not be, for the log and for people.
    pub alarms: Vec<String>,
}

impl ShardReply {
    fn to(&mut self, coordinator: GroupId) -> &mut FromShard {
        let place = self.messages.iter().position(|(group, _)| *group == coordinator);
        let place = place.unwrap_or_else(|| {
            self.messages.push((coordinator, FromShard::default()));
            self.messages.len() - 1
        });
        &mut self.messages[place].1
    }
}

/// What is remembered of a coordinator group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Peer {
    epoch: Epoch,
    mark: Number,
    /// It will not read at a position below.
    history: Stamp,
    /// The highest number that was answered NO. That answer counts on the order of stamps: what was sent before with a lower stamp, and
    /// comes later, must not be committed at it any more.
    refused: Number,
    /// Finished numbers above the mark.
    finished: Numbers,
    /// Whether it has changed since it was stored.
    changed: bool,
}

/// What is stored of a [`Peer`]: epoch, mark, history, refused, and the finished numbers as runs.
type StoredPeer = (Epoch, Number, Stamp, Number, Vec<(Number, u64)>);

impl Peer {
    fn is_finished(&self, number: Number) -> bool {
        number <= self.mark || self.finished.contains(number)
    }

    /// Something of it has changed, but for the finished numbers.
    fn note(&mut self, store: &mut dyn Store, coordinator: GroupId) {
        let is = encode(&(self.epoch, self.mark, self.history, self.refused));
        store.note(&[&peer_key(coordinator), &is]);
        self.changed = true;
    }

    /// Whether the coordinator has said anything that lasts.
    fn is_known(&self) -> bool {
        self.epoch > Epoch(0) || self.mark > Number::default() || self.history > Stamp(0)
    }
}

/// How far the undo log is dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Sweep {
    /// The history mark: no coordinator reads at a position below it, and it never moves back.
    history: Stamp,
    /// Where it goes on: there is no undo entry below.
    from: Stamp,
    /// Undo entries that were added since it last went on.
    added: u64,
}

/// Where a held part stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Stand {
    Waiting,
    Yes,
    No(crate::messages::Abort),
    /// Carried out on this shard's own word; its coordinator is still to record that.
    Committed(Stamp),
}

/// A part as it is stored (rule R8).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Held {
    number: Number,
    hash: ContentHash,
    shards: Vec<ShardId>,
    operations: Part,
    stand: Stand,
    since: Millis,
}

impl Held {
    fn vote(&self) -> VoteKind {
        match &self.stand {
            Stand::Waiting => VoteKind::Waiting,
            Stand::Yes => VoteKind::Yes,
            Stand::No(abort) => VoteKind::No(abort.clone()),
            Stand::Committed(stamp) => VoteKind::Committed(*stamp),
        }
    }

    fn is_committed(&self) -> bool {
        matches!(self.stand, Stand::Committed(_))
    }
}

/// What a part holds, or waits for: the rows in key order.
type Seats = SmallVec<[(Slot, Claim); 3]>;

/// A part in memory. Its seats follow from the rest.
#[derive(Clone, Debug)]
struct Kept {
    held: Held,
    seats: Seats,
    /// Whether the store has it.
    stored: bool,
    /// Whether the store doesn't have it as it is.
    changed: bool,
}

impl PartialEq for Kept {
    fn eq(&self, other: &Kept) -> bool {
        self.held == other.held
    }
}

impl Eq for Kept {}

impl Hash for Kept {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.held.hash(state);
    }
}

/// A part that is held, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldSince {
    /// The part.
    pub part: HeldPart,
    /// The coordinator group that decides it.
    pub coordinator: GroupId,
    /// When the leader proposed its prepare, by that leader's clock.
    pub since: Millis,
}

/// How much a shard holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardCounts {
    /// Parts that voted YES and wait for their outcome.
    pub in_doubt: u32,
    /// Parts in line.
    pub waiting: u32,
    /// Rows that are held.
    pub held_rows: u32,
    /// Parts that are committed on this shard's own word, which is still to be recorded.
    pub settled: u32,
    /// When the oldest part in doubt was proposed.
    pub oldest: Option<Millis>,
}

/// The state machine of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    config: ShardConfig,
    /// Where partitions live, as the first coordinator told it.
    placement: Option<Placement>,
    peers: BTreeMap<GroupId, Peer>,
    parts: PointMap<(GroupId, BatchId), Box<Kept>>,
    /// The same parts by number: every part is in both.
    tickets: BTreeMap<Ticket, BatchId>,
    rows: Rows,
    /// Parts that have come or changed since the last flush. Some are gone again.
    fresh: Vec<(GroupId, BatchId)>,
    /// Parts that are gone, and that the store still has.
    gone: BTreeSet<(GroupId, BatchId)>,
    sweep: Sweep,
    /// The greatest stamp of all that was carried out here.
    newest: Stamp,
    /// Whether one of these two has changed since they were stored.
    changed: bool,
}

impl Machine for Shard {
    type Reply = ShardReply;
    type Config = ShardConfig;

    fn open(config: &ShardConfig, store: &dyn Store) -> Result<Shard, StoreError> {
        let mut shard = Shard {
            config: *config,
            placement: None,
            peers: BTreeMap::new(),
            parts: PointMap::default(),
            tickets: BTreeMap::new(),
            rows: Rows::default(),
            fresh: Vec::new(),
            gone: BTreeSet::new(),
            sweep: Sweep::default(),
            newest: Stamp(0),
            changed: false,
        };
        if let Some(bytes) = store.get(&[CONFIG_TABLE])? {
            let placement = decode("placement", &bytes)?;
            check_placement(placement, config.placement)?;
            shard.placement = Some(placement);
        }
        if let Some(bytes) = store.get(&[PROGRESS_TABLE])? {
            (shard.newest, shard.sweep) = decode("progress", &bytes)?;
        }
        shard.load_peers(store)?;
        shard.load_parts(store)?;
        Ok(shard)
    }

    fn apply(&mut self, store: &mut dyn Store, _: u64, command: &[u8]) -> Result<ShardReply, StoreError> {
        let entry: ShardEntry = decode("shard entry", command)?;
        let mut reply = ShardReply::default();
        let proposed = Proposed { now: entry.now, parts_max: entry.parts_max as usize };
        for message in entry.messages {
            self.take(store, proposed, message, &mut reply)?;
        }
        if self.sweep.added >= u64::from(self.config.sweep_interval) {
            self.sweep(store)?;
        }
        Ok(reply)
    }

    fn flush(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        for (coordinator, peer) in &mut self.peers {
            if std::mem::take(&mut peer.changed) {
                let Peer { epoch, mark, history, refused, .. } = *peer;
                let stored: StoredPeer = (epoch, mark, history, refused, peer.finished.runs());
                store.bring(&peer_key(*coordinator), Some(&encode(&stored)))?;
            }
        }
        for (coordinator, id) in std::mem::take(&mut self.gone) {
            store.bring(&part_key(coordinator, id), None)?;
        }
        let mut fresh = std::mem::take(&mut self.fresh);
        fresh.sort_unstable();
        for (coordinator, id) in fresh {
            if let Some(part) = self.parts.get_mut(&(coordinator, id))
                && std::mem::take(&mut part.changed)
            {
                part.stored = true;
                store.bring(&part_key(coordinator, id), Some(&encode(&part.held)))?;
            }
        }
        if std::mem::take(&mut self.changed) {
            store.bring(&[PROGRESS_TABLE], Some(&encode(&(self.newest, &self.sweep))))?;
        }
        self.rows.store_all(store)
    }

    fn trim(&mut self, keep_bytes: usize) {
        self.rows.trim(keep_bytes);
    }
}

impl Shard {
    /// Which shard this is.
    pub fn id(&self) -> ShardId {
        self.config.shard
    }

    /// How much is held.
    pub fn counts(&self) -> ShardCounts {
        let mut counts = ShardCounts::default();
        for (ticket, id) in &self.tickets {
            let held = &self.parts[&(ticket.coordinator, *id)].held;
            match held.stand {
                Stand::Yes => {
                    counts.in_doubt += 1;
                    let oldest = counts.oldest.unwrap_or(held.since);
                    counts.oldest = Some(oldest.min(held.since));
                }
                Stand::Waiting => counts.waiting += 1,
                Stand::No(_) => {}
                Stand::Committed(_) => counts.settled += 1,
            }
        }
        counts.held_rows = self.rows.held() as u32;
        counts
    }

    /// All parts that are held, by coordinator and number.
    pub fn held(&self) -> impl Iterator<Item = HeldSince> + '_ {
        self.tickets.iter().map(|(ticket, id)| {
            let held = &self.parts[&(ticket.coordinator, *id)].held;
            HeldSince { part: listed(*id, held), coordinator: ticket.coordinator, since: held.since }
        })
    }

    /// The epoch that is recorded for a coordinator.
    pub fn epoch(&self, coordinator: GroupId) -> Epoch {
        self.peers.get(&coordinator).map(|peer| peer.epoch).unwrap_or_default()
    }

    /// Whether a number of a coordinator is known to be finished here.
    pub fn is_finished(&self, coordinator: GroupId, number: Number) -> bool {
        self.peers.get(&coordinator).is_some_and(|peer| peer.is_finished(number))
    }

    /// How many finished numbers are remembered above the marks.
    pub fn finished_numbers(&self) -> usize {
        self.peers.values().map(|peer| peer.finished.len()).sum()
    }

    /// The history mark: no coordinator reads at a position below it.
    pub fn history(&self) -> Stamp {
        self.sweep.history
    }

    /// Answers a read from what has been applied, or `None`: a part that it has to wait for is still held.
    ///
    /// The caller has confirmed that this replica leads, and has applied all that was committed before the read came.
    pub fn read(
        &self,
        store: &dyn Store,
        coordinator: GroupId,
        read: &ShardRead,
    ) -> Result<Option<ShardReadAnswer>, StoreError> {
        let undecided = |id| self.parts.get(&(coordinator, id)).is_some_and(|part| !part.held.is_committed());
        if read.wait_for.iter().any(|id| undecided(*id)) {
            return Ok(None);
        }
        let history = self.history();
        if read.position < history {
            return Ok(Some(ShardReadAnswer::Pruned { history }));
        }
        let single;
        let rows = match &read.query {
            ShardQuery::Rows(rows) => rows.as_slice(),
            ShardQuery::History { row, .. } => {
                single = [row.clone()];
                &single
            }
        };
        if !read.known {
            let in_doubt: BTreeSet<BatchId> = rows
                .iter()
                .filter_map(|row| self.rows.find(row))
                .flat_map(|row| row.lock().writers())
                .map(|ticket| self.tickets[&ticket])
                .collect();
            if !in_doubt.is_empty() {
                return Ok(Some(ShardReadAnswer::InDoubt(in_doubt.into_iter().collect())));
            }
        }
        let mut bytes = 0;
        Ok(Some(match &read.query {
            ShardQuery::Rows(rows) => {
                let mut values = Vec::with_capacity(rows.len());
                for row in rows {
                    let at = self.rows.at(store, row, read.position)?;
                    bytes += at.value.bytes();
                    if bytes > READ_BYTES_MAX {
                        return Ok(Some(ShardReadAnswer::TooLarge));
                    }
                    values.push(at);
                }
                ShardReadAnswer::Rows(values)
            }
            ShardQuery::History { row, from, limit } => {
                let kept = Stamp(history.0 + 1);
                let from = kept.max(*from);
                let (changes, next) = self.rows.history(store, row, from, read.position, *limit)?;
                let oldest = if history == Stamp(0) { history } else { kept };
                ShardReadAnswer::History { changes, next, oldest }
            }
        }))
    }

    fn take(
        &mut self,
        store: &mut dyn Store,
        proposed: Proposed,
        message: ToShard,
        reply: &mut ShardReply,
    ) -> Result<(), StoreError> {
        let coordinator = message.coordinator;
        match self.placement {
            None => {
                store.put(&[CONFIG_TABLE], &encode(&message.placement))?;
                self.placement = Some(message.placement);
            }
            Some(told) if told != message.placement => {
                reply.alarms.push(format!(
                    "coordinator {coordinator} speaks of {} shards, this shard is one of {}: nothing of it is taken",
                    message.placement.shards, told.shards
                ));
                return Ok(());
            }
            Some(_) => {}
        }
        self.raise_mark(store, coordinator, message.mark, reply);
        let peer = self.peers.entry(coordinator).or_default();
        if message.history > peer.history {
            peer.history = message.history;
            peer.note(store, coordinator);
            self.raise_history();
        }
        if message.greet {
            let greeting = self.greet(store, coordinator, message.epoch);
            reply.to(coordinator).greeting = Some(greeting);
        }
        let mut behind = Behind::default();
        let deposed = message.epoch < self.peers.entry(coordinator).or_default().epoch;
        for outcome in message.outcomes {
            // It may be no decision: a leader also aborts tries that it gives up, and the next one may have committed what it found. That one
            // tells what was decided.
            if deposed && outcome.commit.is_none() {
                continue;
            }
            let done = self.finish(store, coordinator, outcome, &mut behind, &mut reply.alarms)?;
            reply.to(coordinator).done.push(done);
        }
        // Once for all outcomes of the message: a long line is looked at as a whole.
        self.let_in(store, behind, reply);
        for prepare in message.prepares {
            let (id, number, sole) = (prepare.id, prepare.number, prepare.sole.is_some());
            let vote = self.prepare(store, proposed, coordinator, prepare, reply)?;
            // A refusal leaves no part behind, so a copy of this prepare could still be granted. Whoever was told that it is not
            // committed must be able to rely on that.
            let is_held = matches!(
                vote.kind,
                VoteKind::Yes | VoteKind::No(_) | VoteKind::Waiting | VoteKind::Committed(_)
            );
            if sole && !is_held && vote.kind != VoteKind::OldEpoch {
                self.forget(store, coordinator, number);
            }
            reply.to(coordinator).votes.push(Vote { id, number: vote.number, kind: vote.kind });
        }
        Ok(())
    }

    /// Forgets finished numbers up to the mark.
    fn raise_mark(
        &mut self,
        store: &mut dyn Store,
        coordinator: GroupId,
        mark: Number,
        reply: &mut ShardReply,
    ) {
        let peer = self.peers.entry(coordinator).or_default();
        if mark <= peer.mark {
            return;
        }
        let up_to_mark = ..=Ticket { number: mark, coordinator: GroupId(u32::MAX) };
        let mut held = self.tickets.range(up_to_mark);
        if let Some((ticket, id)) = held.find(|(ticket, _)| ticket.coordinator == coordinator) {
            reply.alarms.push(format!(
                "coordinator {coordinator} says that all numbers up to {mark} are finished, but batch {id} is held under {}: \
                 the mark is ignored",
                ticket.number
            ));
            return;
        }
        peer.finished.remove_up_to(mark);
        peer.mark = mark;
        peer.note(store, coordinator);
    }

    /// Nobody reads below the least of what the coordinators have told. The mark doesn't move back for one that is new: what is below may
    /// be gone.
    fn raise_history(&mut self) {
        let known = self.peers.values().filter(|peer| peer.is_known());
        let least = known.map(|peer| peer.history).min().unwrap_or_default();
        if least > self.sweep.history {
            self.sweep.history = least;
            self.changed = true;
        }
    }

    /// Rule R11: the epoch is recorded before anything is listed.
    fn greet(&mut self, store: &mut dyn Store, coordinator: GroupId, epoch: Epoch) -> Greeting {
        let peer = self.peers.entry(coordinator).or_default();
        if epoch > peer.epoch {
            peer.epoch = epoch;
            peer.note(store, coordinator);
        }
        // An answer to a deposed leader may reach the one whose epoch is recorded, so it lists everything too.
        let epoch = peer.epoch;
        let mine = self.held().filter(|held| held.coordinator == coordinator);
        let parts = mine.map(|held| held.part).collect();
        Greeting { epoch, parts }
    }

    fn prepare(
        &mut self,
        store: &mut dyn Store,
        proposed: Proposed,
        coordinator: GroupId,
        prepare: Prepare,
        reply: &mut ShardReply,
    ) -> Result<Answered, StoreError> {
        let (number, id) = (prepare.number, prepare.id);
        let answer = |kind| Ok(Answered { number, kind });
        let peer = self.peers.entry(coordinator).or_default();
        if number.epoch != peer.epoch {
            return answer(VoteKind::OldEpoch);
        }
        if peer.is_finished(number) {
            return answer(VoteKind::Finished);
        }
        let held = self.parts.get(&(coordinator, id)).map(|part| &part.held);
        if let Some(held) = held
            && held.is_committed()
            && held.hash == prepare.hash
        {
            // It has happened, whichever number is asked about.
            return Ok(Answered { number: held.number, kind: held.vote() });
        }
        let held = held.map(|held| (held.number, held.hash, held.vote()));
        for given_up in prepare.gives_up {
            self.forget(store, coordinator, given_up);
        }
        if let Some((held, hash, vote)) = held {
            if held == number {
                return answer(vote);
            }
            if held.epoch != number.epoch || hash != prepare.hash {
                return answer(VoteKind::Held);
            }
            if held > number {
                return answer(VoteKind::Finished);
            }
            // The coordinator has given up the earlier try; votes count only under one number.
            let mut behind = Behind::default();
            self.remove(store, coordinator, id, &mut behind);
            self.let_in(store, behind, reply);
        }
        if self.parts.len() >= proposed.parts_max {
            return answer(VoteKind::Overloaded);
        }
        let mut held = Held {
            number,
            hash: prepare.hash,
            shards: prepare.shards,
            operations: read_part(&prepare.part)?,
            stand: Stand::Waiting,
            since: proposed.now,
        };
        let uses = evaluate::by_row(&held.operations);
        let mut seats = self.seats(store, &uses)?;
        let ticket = Ticket { number, coordinator };
        let refused = self.peers[&coordinator].refused;
        let sole = prepare.sole.filter(|_| held.shards == [self.config.shard] && number > refused);
        let stand = match (self.judge(ticket, &uses, &seats), sole) {
            (Verdict::Conflict, _) => return answer(VoteKind::Conflict),
            (Verdict::Waits, _) => Stand::Waiting,
            // Above all that was done here: the order of stamps is the order of the effects, of conditions and floors too.
            (Verdict::Yes, Some(stamp)) if stamp > self.newest => Stand::Committed(stamp),
            (Verdict::Yes, _) => Stand::Yes,
            (Verdict::No(abort), _) => Stand::No(abort),
        };
        drop(uses);
        self.stand_in_line(ticket, &mut seats, &stand);
        if let Stand::Committed(stamp) = stand {
            // The commit point. What is left is to remember it until the coordinators do.
            let operations = std::mem::take(&mut held.operations);
            self.carry_out(store, id, stamp, &operations, &seats)?;
            seats.clear();
        }
        if let Stand::No(_) = stand {
            self.note_refusal(store, ticket);
        }
        held.stand = stand;
        let vote = held.vote();
        self.note_part(store, ticket, id, Some(&held.stand));
        self.tickets.insert(ticket, id);
        self.fresh.push((coordinator, id));
        self.parts.insert((coordinator, id), Box::new(Kept { held, seats, stored: false, changed: true }));
        answer(vote)
    }

    fn finish(
        &mut self,
        store: &mut dyn Store,
        coordinator: GroupId,
        outcome: PartOutcome,
        behind: &mut Behind,
        alarms: &mut Vec<String>,
    ) -> Result<Done, StoreError> {
        let PartOutcome { id, number, commit, gives_up } = outcome;
        let known = self.peers.entry(coordinator).or_default().is_finished(number);
        let part = self.parts.get_mut(&(coordinator, id));
        let held = part.as_ref().map(|part| &part.held);
        let ends = held.is_some_and(|held| held.number == number || gives_up.contains(&held.number));
        let mut lost = false;
        match (commit, part) {
            (Some(stamp), Some(part)) if part.held.number == number && part.held.stand == Stand::Yes => {
                let operations = std::mem::take(&mut part.held.operations);
                let seats = std::mem::take(&mut part.seats);
                self.carry_out(store, id, stamp, &operations, &seats)?;
                // It still stands in its lines.
                self.parts.get_mut(&(coordinator, id)).expect("carrying out removes no part").seats = seats;
            }
            // Carried out before. Now that it is recorded it needs no memory here.
            (Some(stamp), Some(part))
                if part.held.number == number && part.held.stand == Stand::Committed(stamp) => {}
            // What has happened can't be decided otherwise.
            (_, Some(part)) if ends && part.held.is_committed() => {
                alarms.push(format!(
                    "batch {id} is told to end with {commit:?} under {number}, but this shard has committed it: {:?}",
                    part.held.stand
                ));
                return Ok(Done { id, number, lost: true });
            }
            // No part, or one that can't have been counted on: fine if this outcome has been here before.
            (Some(_), _) => lost = !known,
            (None, _) => {}
        }
        if lost {
            alarms.push(format!(
                "batch {id} is committed under {number}, but this shard holds no YES under it and has not finished it"
            ));
            return Ok(Done { id, number, lost });
        }
        if ends {
            self.remove(store, coordinator, id, behind);
        }
        for ended in gives_up.into_iter().chain([number]) {
            self.forget(store, coordinator, ended);
        }
        Ok(Done { id, number, lost })
    }

    /// The effects of a committed part, at its stamp.
    fn carry_out(
        &mut self,
        store: &mut dyn Store,
        id: BatchId,
        stamp: Stamp,
        operations: &Part,
        seats: &Seats,
    ) -> Result<(), StoreError> {
        let history = self.history();
        self.newest = self.newest.max(stamp);
        self.changed = true;
        let mut by_row = None;
        let mut writes = Writes::new();
        for (place, (slot, claim)) in seats.iter().enumerate() {
            if !claim.writes {
                continue;
            }
            if claim.mode == Mode::Add {
                writes.push((*slot, Write::Add(claim.delta)));
                continue;
            }
            let operations = &by_row.get_or_insert_with(|| evaluate::by_row(operations))[place].operations;
            let row = self.rows.row(*slot);
            let after = evaluate::run(operations, row.settled()).unwrap_or_else(|abort| {
                panic!("batch {id} was granted row {:?} and now fails: {abort:?}", row.key())
            });
            let write = match (&row.settled().value, after) {
                (RowValue::Absent, RowValue::Balance(sum)) => Write::Add(sum),
                (RowValue::Balance(old), RowValue::Balance(new)) => {
                    Write::Add(new.checked_sub(*old).expect("deltas on a row add up to 128 bits"))
                }
                (_, after) => Write::Replace(after),
            };
            writes.push((*slot, write));
        }
        if !writes.is_empty() {
            self.sweep.added += u64::from(stamp > history);
            self.rows.commit(store, id, stamp, &writes, history)?;
        }
        Ok(())
    }

    /// The rows of a part in memory, with what it claims of each.
    fn seats(&mut self, store: &dyn Store, uses: &ByRow<'_>) -> Result<Seats, StoreError> {
        uses.iter().map(|Use { row, claim, .. }| Ok((self.rows.seat(store, row)?, *claim))).collect()
    }

    /// Whether a part can be granted now, for all its rows together.
    fn judge(&self, ticket: Ticket, uses: &ByRow<'_>, seats: &Seats) -> Verdict {
        let mut verdict = Verdict::Yes;
        for (Use { operations, .. }, (slot, claim)) in uses.iter().zip(seats) {
            let row = self.rows.row(*slot);
            let one = match row.lock().admits(ticket, claim) {
                Answer::Conflict => Verdict::Conflict,
                Answer::Waits => Verdict::Waits,
                Answer::Granted => judge_row(ticket, row, operations, claim),
                Answer::TooLow | Answer::TooHigh => unreachable!("being admitted isn't about amounts"),
            };
            verdict = verdict.and(one);
        }
        verdict
    }

    /// Enters a part into the lines of its rows, as a holder or as one who waits. Who does neither has no seats.
    fn stand_in_line(&mut self, ticket: Ticket, seats: &mut Seats, stand: &Stand) {
        match stand {
            Stand::Yes => {
                seats.iter().for_each(|(slot, claim)| self.rows.hold(*slot, ticket, *claim));
            }
            Stand::Waiting => {
                seats.iter().for_each(|(slot, claim)| self.rows.wait(*slot, ticket, *claim));
            }
            Stand::No(_) => seats.clear(),
            // Its effects come at once.
            Stand::Committed(_) => {}
        }
    }

    /// A part has come, changed or gone.
    fn note_part(&self, store: &mut dyn Store, ticket: Ticket, id: BatchId, stand: Option<&Stand>) {
        let Ticket { number, coordinator } = ticket;
        let (epoch, sequence) = (number.epoch.0.to_be_bytes(), number.sequence.to_be_bytes());
        let key = part_key(coordinator, id);
        match stand {
            // By far the most.
            None => store.note(&[&key, &epoch, &sequence]),
            Some(Stand::Yes) => store.note(&[&key, &epoch, &sequence, &[1]]),
            Some(stand) => store.note(&[&key, &epoch, &sequence, &encode(stand)]),
        }
    }

    /// Takes a part out, and collects who stands behind it.
    fn remove(&mut self, store: &mut dyn Store, coordinator: GroupId, id: BatchId, behind: &mut Behind) {
        let part = self.parts.remove(&(coordinator, id)).expect("only held parts are removed");
        let ticket = Ticket { number: part.held.number, coordinator };
        behind.tickets.remove(&ticket);
        self.end(store, ticket, id, part.stored);
        self.forget(store, coordinator, ticket.number);
        self.leave_line(ticket, &part.seats, behind);
    }

    /// A part is in memory no more.
    fn end(&mut self, store: &mut dyn Store, ticket: Ticket, id: BatchId, stored: bool) {
        self.tickets.remove(&ticket);
        self.note_part(store, ticket, id, None);
        if stored {
            self.gone.insert((ticket.coordinator, id));
        }
    }

    /// Looks again at parts that wait, in order, and at those behind the ones that no longer do.
    fn let_in(&mut self, store: &mut dyn Store, mut behind: Behind, reply: &mut ShardReply) {
        while let Some(ticket) = behind.tickets.pop_first() {
            self.reconsider(store, ticket, &mut behind, reply);
        }
    }

    /// Takes a ticket out of the lines of its rows, and collects who stands behind it.
    fn leave_line(&mut self, ticket: Ticket, seats: &Seats, behind: &mut Behind) {
        for (slot, _) in seats {
            let lock = self.rows.leave(*slot, ticket);
            if lock.is_waited_for() && behind.rows.insert(*slot) {
                behind.tickets.extend(lock.waiting());
            }
        }
    }

    /// Looks again at a part that waits.
    fn reconsider(
        &mut self,
        store: &mut dyn Store,
        ticket: Ticket,
        behind: &mut Behind,
        reply: &mut ShardReply,
    ) {
        let id = self.tickets[&ticket];
        let key = (ticket.coordinator, id);
        let part = &self.parts[&key];
        let stand = match self.judge(ticket, &evaluate::by_row(&part.held.operations), &part.seats) {
            Verdict::Waits => return,
            Verdict::Yes => Some(Stand::Yes),
            Verdict::No(abort) => Some(Stand::No(abort)),
            Verdict::Conflict => None,
        };
        let mut part = self.parts.remove(&key).expect("who waits is held");
        self.leave_line(ticket, &part.seats, behind);
        let number = ticket.number;
        let Some(stand) = stand else {
            reply.to(ticket.coordinator).votes.push(Vote { id, number, kind: VoteKind::Conflict });
            return self.end(store, ticket, id, part.stored);
        };
        self.stand_in_line(ticket, &mut part.seats, &stand);
        if let Stand::No(_) = stand {
            self.note_refusal(store, ticket);
        }
        self.note_part(store, ticket, id, Some(&stand));
        part.held.stand = stand;
        if !std::mem::replace(&mut part.changed, true) {
            self.fresh.push(key);
        }
        reply.to(ticket.coordinator).votes.push(Vote { id, number, kind: part.held.vote() });
        self.parts.insert(key, part);
    }

    /// Looks at twice as many undo entries as were added, in the order of stamps, and drops those that no read will need: so it catches up
    /// with a mark that has moved before as many have come as there are to drop.
    fn sweep(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        let most = 2 * std::mem::take(&mut self.sweep.added) as usize;
        self.changed = true;
        if self.sweep.from <= self.sweep.history {
            self.sweep.from = self.rows.drop_undo(store, self.sweep.from, self.sweep.history, most)?;
        }
        Ok(())
    }

    fn note_refusal(&mut self, store: &mut dyn Store, ticket: Ticket) {
        let peer = self.peers.entry(ticket.coordinator).or_default();
        if ticket.number > peer.refused {
            peer.refused = ticket.number;
            peer.note(store, ticket.coordinator);
        }
    }

    /// Notes a number as finished: whatever comes with it is refused.
    fn forget(&mut self, store: &mut dyn Store, coordinator: GroupId, number: Number) {
        let peer = self.peers.entry(coordinator).or_default();
        if number > peer.mark && peer.finished.insert(number) {
            peer.changed = true;
            let (epoch, sequence) = (number.epoch.0.to_be_bytes(), number.sequence.to_be_bytes());
            store.note(&[&peer_key(coordinator), &epoch, &sequence]);
        }
    }

    fn load_peers(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        let mut failed = None;
        store.scan(&[PEER_TABLE], &[PEER_TABLE + 1], &mut |key, bytes| {
            match decode::<StoredPeer>("peer", bytes) {
                Err(error) => failed = Some(error),
                Ok((epoch, mark, history, refused, runs)) => {
                    let finished = Numbers::of_runs(runs);
                    let peer = Peer { epoch, mark, history, refused, finished, changed: false };
                    self.peers.insert(group_of(key), peer);
                }
            }
            failed.is_none()
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn load_parts(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        let mut found = Ok(Vec::new());
        store.scan(&[PART_TABLE], &[PART_TABLE + 1], &mut |key, bytes| {
            let id = BatchId(key[5..21].try_into().expect("a part's key ends with its batch"));
            match (decode::<Held>("part", bytes), &mut found) {
                (Ok(held), Ok(found)) => found.push((group_of(key), id, held)),
                (Err(error), _) => found = Err(error),
                (Ok(_), Err(_)) => {}
            }
            found.is_ok()
        })?;
        for (coordinator, id, held) in found? {
            let ticket = Ticket { number: held.number, coordinator };
            let mut seats = match held.stand {
                Stand::Yes | Stand::Waiting => self.seats(store, &evaluate::by_row(&held.operations))?,
                Stand::No(_) | Stand::Committed(_) => Seats::new(),
            };
            self.stand_in_line(ticket, &mut seats, &held.stand);
            self.tickets.insert(ticket, id);
            self.parts
                .insert((coordinator, id), Box::new(Kept { held, seats, stored: true, changed: false }));
        }
        Ok(())
    }
}

/// The answer to a prepare: that of another number, if the batch is committed under that one.
struct Answered {
    number: Number,
    kind: VoteKind,
}

/// What the proposer of an entry told with it.
#[derive(Clone, Copy)]
struct Proposed {
    now: Millis,
    parts_max: usize,
}

fn check_placement(told: Placement, configured: Placement) -> Result<(), StoreError> {
    if told == configured {
        return Ok(());
    }
    Err(StoreError(format!(
        "this shard was set up as one of {} shards and is now configured as one of {}: the number can't change",
        told.shards, configured.shards
    )))
}

/// Who is to be looked at again, and the rows whose lines have been taken in. Whoever leaves a line lets in only higher numbers, and
/// they are looked at in ascending order, so taking in each line once is enough.
#[derive(Default)]
struct Behind {
    rows: BTreeSet<Slot>,
    tickets: BTreeSet<Ticket>,
}

/// What becomes of a part.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Yes,
    Waits,
    Conflict,
    No(crate::messages::Abort),
}

impl Verdict {
    /// The verdict on two rows together: a certain NO stands whatever the other row does; the first one is told.
    fn and(self, other: Verdict) -> Verdict {
        match (self, other) {
            (Verdict::No(one), Verdict::No(other)) => {
                Verdict::No(if other.operation < one.operation { other } else { one })
            }
            (Verdict::No(abort), _) | (_, Verdict::No(abort)) => Verdict::No(abort),
            (Verdict::Conflict, _) | (_, Verdict::Conflict) => Verdict::Conflict,
            (Verdict::Waits, _) | (_, Verdict::Waits) => Verdict::Waits,
            (Verdict::Yes, Verdict::Yes) => Verdict::Yes,
        }
    }
}

fn judge_row(
    ticket: Ticket,
    row: &Row,
    operations: &[(u32, &crate::batch::OperationKind)],
    claim: &Claim,
) -> Verdict {
    let (settled, lock) = (row.settled(), row.lock());
    if claim.mode != Mode::Add {
        return match evaluate::run(operations, settled) {
            Ok(_) => Verdict::Yes,
            Err(abort) => Verdict::No(abort),
        };
    }
    let balance = match settled.value {
        RowValue::Absent => 0,
        RowValue::Balance(balance) => balance,
        RowValue::Record(_) => return Verdict::No(evaluate::wrong_kind(operations, settled)),
    };
    match lock.fits(ticket, claim, balance) {
        Answer::Granted => Verdict::Yes,
        Answer::Waits => Verdict::Waits,
        Answer::Conflict => Verdict::Conflict,
        Answer::TooLow => Verdict::No(evaluate::too_low(operations, lock.best(balance), balance)),
        Answer::TooHigh => Verdict::No(evaluate::too_high(operations, lock.least(balance), balance)),
    }
}

/// Whoever hands messages in has looked at each part: here it is too late to refuse one.
fn read_part(part: &EncodedPart) -> Result<Part, StoreError> {
    part.decode().map_err(|error| StoreError(format!("decode a part: {error}")))
}

fn listed(id: BatchId, held: &Held) -> HeldPart {
    HeldPart { number: held.number, id, hash: held.hash, shards: held.shards.clone(), vote: held.vote() }
}

fn part_key(coordinator: GroupId, id: BatchId) -> [u8; 21] {
    let mut key = [PART_TABLE; 21];
    key[1..5].copy_from_slice(&coordinator.0.to_be_bytes());
    key[5..].copy_from_slice(&id.0);
    key
}

fn peer_key(coordinator: GroupId) -> [u8; 5] {
    let mut key = [PEER_TABLE; 5];
    key[1..].copy_from_slice(&coordinator.0.to_be_bytes());
    key
}

fn group_of(key: &[u8]) -> GroupId {
    GroupId(u32::from_be_bytes(key[1..5].try_into().expect("the coordinator group follows the table")))
}
