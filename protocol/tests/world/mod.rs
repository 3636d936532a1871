//! A whole cluster of the pure parts in one value: groups with logs and replicas, leaders (deposed ones too), packets that wait to be
//! delivered, and callers. Whoever holds it chooses what happens next; it has no will, clock or randomness of its own.
#![allow(dead_code)] // each test file uses its own part

use std::collections::{BTreeMap, BTreeSet};

use verdict_protocol::{
    batch::{Batch, Placement, RowKey},
    coordinator::{Act, Coordinator, CoordinatorEntry, CoordinatorReply, Opened},
    ids::{BatchId, ContentHash, GroupId, Millis, NodeId, ShardId, Stamp},
    leader::{Decisions, Effects, Event, Leader, LeaderConfig, Remembered, Reply, Token},
    machine::{self, Machine},
    messages::{
        AbortReason, Decision, FromShard, RowAt, ShardQuery, ShardRead, ShardReadAnswer, ToShard, VoteKind,
    },
    plain,
    shard::{Shard, ShardConfig, ShardEntry, ShardReply},
    store::MemoryStore,
};

/// Small, so that undo entries are dropped in short tests.
const SWEEP_INTERVAL: u32 = 16;

/// One replica of a group.
pub struct Replica<M> {
    pub machine: M,
    pub store: MemoryStore,
    pub applied: u64,
    /// What is on its disk, and how far that goes: it starts again from there.
    pub flushed: (MemoryStore, u64),
}

impl<M: Machine> Replica<M> {
    /// Brings to the store what the machine keeps in memory.
    fn flush(&mut self) {
        self.machine.flush(&mut self.store).expect("memory doesn't fail");
        self.flushed = (self.store.clone(), self.applied);
    }
}

/// A group whose log never loses what was committed. Which replica leads makes no difference to what is true, and that is tested.
pub struct Group<M: Machine> {
    pub config: M::Config,
    pub log: Vec<Vec<u8>>,
    pub replicas: Vec<Replica<M>>,
    pub lead: usize,
}

impl<M: Machine> Group<M> {
    fn new(config: M::Config, replicas: usize) -> Group<M> {
        let replica = || {
            let store = MemoryStore::default();
            let machine = M::open(&config, &store).expect("memory doesn't fail");
            let flushed = (store.clone(), 0);
            Replica { machine, store, applied: 0, flushed }
        };
        Group { replicas: (0..replicas).map(|_| replica()).collect(), config, log: Vec::new(), lead: 0 }
    }

    /// Appends an entry and applies it where the group is led.
    pub fn commit(&mut self, entry: Vec<u8>) -> M::Reply {
        self.catch_up(self.lead);
        self.log.push(entry);
        self.catch_up(self.lead).expect("the entry was just appended")
    }

    /// Applies all that is committed on one replica; the reply is that of the last entry.
    pub fn catch_up(&mut self, place: usize) -> Option<M::Reply> {
        let replica = &mut self.replicas[place];
        let mut last = None;
        while (replica.applied as usize) < self.log.len() {
            let entry = &self.log[replica.applied as usize];
            replica.applied += 1;
            let reply = machine::apply(&mut replica.machine, &mut replica.store, replica.applied, entry);
            last = Some(reply.expect("memory doesn't fail"));
            // Each one at times of its own.
            if replica.applied.is_multiple_of(1 + 2 * place as u64) {
                replica.flush();
            }
            // Of what nobody needs it keeps all, or nothing, flushed or not.
            replica.machine.trim(if replica.applied.is_multiple_of(3) { usize::MAX } else { 0 });
        }
        last
    }

    /// Forgets what a replica keeps in memory, as a restart does, and applies again what that was.
    pub fn restart(&mut self, place: usize) {
        let replica = &mut self.replicas[place];
        (replica.store, replica.applied) = replica.flushed.clone();
        replica.machine = M::open(&self.config, &replica.store).expect("memory doesn't fail");
        self.catch_up(place);
    }

    /// The leading replica.
    pub fn leading(&self) -> &Replica<M> {
        &self.replicas[self.lead]
    }

    /// Catches up all replicas and compares them: state and running hash.
    pub fn check_replicas(&mut self) {
        for place in 0..self.replicas.len() {
            self.catch_up(place);
            self.replicas[place].flush();
        }
        let first = &self.replicas[0].store;
        for replica in &self.replicas[1..] {
            assert!(replica.store == *first, "two replicas at the same index differ");
        }
    }
}

/// Something on its way.
#[derive(Clone, Debug)]
pub enum Packet {
    ToShard(ShardId, ToShard),
    Read(ShardId, u64, ShardRead),
    FromShard(ShardId, FromShard),
    Answer(ShardId, u64, ShardReadAnswer),
}

struct Lookup<'a>(&'a Group<Coordinator>);

impl Decisions for Lookup<'_> {
    fn remembered(&self, id: BatchId) -> Remembered {
        let replica = self.0.leading();
        replica.machine.remembered(&replica.store, id).expect("memory doesn't fail")
    }
}

/// A leader, or one that doesn't know yet that it is none any more.
pub struct Running {
    pub leader: Leader,
    /// What it has proposed and not heard of.
    pub acts: Vec<Act>,
    /// Read confirmations that it has asked for.
    pub confirm: Option<u64>,
}

pub struct World {
    pub config: LeaderConfig,
    pub now: Millis,
    pub coordinator: Group<Coordinator>,
    pub shards: BTreeMap<ShardId, Group<Shard>>,
    /// The last one is the leader of the newest epoch.
    pub leaders: Vec<Running>,
    pub packets: Vec<Packet>,
    /// What is sent to these, or by them, is lost.
    pub down: BTreeSet<ShardId>,
    /// How many parts a shard may hold.
    pub parts_max: u32,
    /// Reads that wait at a shard; looked at again when time passes.
    waiting: Vec<Packet>,
    pub replies: Vec<(Token, Reply)>,
    pub alarms: Vec<String>,
    /// By hash too: an id may be used again, by mistake, for other contents.
    submitted: BTreeMap<(BatchId, ContentHash), Batch>,
    /// The greatest stamp that was answered before the first submission of a batch.
    submitted_after: BTreeMap<(BatchId, ContentHash), Stamp>,
    pub tokens: BTreeMap<Token, BatchId>,
    next_token: u64,
    /// What had been told when a read began: its position must not lie below.
    pub read_after: BTreeMap<Token, Stamp>,
    /// All that was ever decided, in order, though the coordinators may have forgotten it.
    pub recorded: Vec<Decision>,
    places: BTreeMap<BatchId, usize>,
}

/// What was committed, in the order of stamps.
fn in_order(decisions: &[Decision]) -> Vec<(Stamp, &Decision)> {
    let committed = decisions.iter().filter_map(|decision| Some((*decision.result.as_ref().ok()?, decision)));
    let mut committed: Vec<(Stamp, &Decision)> = committed.collect();
    committed.sort_unstable_by_key(|(stamp, _)| *stamp);
    committed
}

pub const START: Millis = Millis(1_700_000_000_000);

impl World {
    pub fn new(shards: u32, replicas: usize) -> World {
        World::with(shards, replicas, |_| {})
    }

    pub fn with(shards: u32, replicas: usize, change: impl FnOnce(&mut LeaderConfig)) -> World {
        let placement = Placement { shards };
        let mut config = LeaderConfig::new(placement);
        change(&mut config);
        let group = |shard| {
            (shard, Group::new(ShardConfig { shard, placement, sweep_interval: SWEEP_INTERVAL }, replicas))
        };
        World {
            config,
            now: START,
            coordinator: Group::new((), replicas),
            shards: placement.all().map(group).collect(),
            leaders: Vec::new(),
            packets: Vec::new(),
            down: BTreeSet::new(),
            parts_max: 1000,
            waiting: Vec::new(),
            replies: Vec::new(),
            alarms: Vec::new(),
            submitted: BTreeMap::new(),
            submitted_after: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next_token: 0,
            read_after: BTreeMap::new(),
            recorded: Vec::new(),
            places: BTreeMap::new(),
        }
    }

    /// A shard comes back with nothing, which no promise covers: all its disks are lost.
    pub fn wipe(&mut self, shard: ShardId) {
        let config = ShardConfig { shard, placement: self.config.placement, sweep_interval: SWEEP_INTERVAL };
        self.shards.insert(shard, Group::new(config, 2));
    }

    /// A new leader opens its epoch. The one before lives on, unaware.
    pub fn elect(&mut self) {
        self.elect_with(|_| {});
    }

    /// The same with another answer of the log than it gave.
    pub fn elect_with(&mut self, change: impl FnOnce(&mut Opened)) {
        let entry = CoordinatorEntry::Open {
            node: NodeId(1),
            placement: self.config.placement,
            keep: self.config.keep,
        };
        match self.coordinator.commit(machine::encode(&entry)) {
            CoordinatorReply::Opened(mut opened) => {
                change(&mut opened);
                let (leader, effects) = Leader::open(self.config, opened, self.now);
                self.leaders.push(Running { leader, acts: Vec::new(), confirm: None });
                self.perform(self.leaders.len() - 1, effects);
            }
            other => panic!("the epoch did not open: {other:?}"),
        }
    }

    /// The newest leader dies. The first `committed` of its proposals are in the log all the same.
    pub fn crash(&mut self, committed: usize) {
        if let Some(running) = self.leaders.pop() {
            for act in running.acts.into_iter().take(committed) {
                let entry = machine::encode(&CoordinatorEntry::Act(act));
                if let CoordinatorReply::Acted(acted) = self.coordinator.commit(entry) {
                    self.note_decisions(&acted.decisions);
                }
            }
        }
    }

    /// What a shard commits on its own word is decided in that moment, wherever and whenever it is recorded.
    fn note_commits(&mut self, shard: ShardId, message: &ToShard, answer: &FromShard) {
        let commits = answer.votes.iter().filter_map(|vote| match vote.kind {
            VoteKind::Committed(stamp) => Some((vote.id, vote.number, stamp)),
            _ => None,
        });
        let decisions = commits.filter_map(|(id, number, stamp)| {
            let prepare = message.prepares.iter().find(|prepare| prepare.number == number)?;
            let (hash, shards) = (Some(prepare.hash), prepare.shards.clone());
            assert_eq!(shards, [shard], "a batch is committed by one of several participants");
            Some(Decision { id, hash, shards, number, result: Ok(stamp) })
        });
        let decisions: Vec<Decision> = decisions.collect();
        self.note_decisions(&decisions);
    }

    /// Promise G2: a decision never changes, whether it is remembered or not.
    fn note_decisions(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            let place = self.places.get(&decision.id).copied();
            match place {
                None => {
                    self.places.insert(decision.id, self.recorded.len());
                    self.recorded.push(decision.clone());
                }
                Some(place) => assert_eq!(self.recorded[place], *decision, "a decision has changed"),
            }
        }
    }

    /// One event for one leader, and its effects.
    pub fn step(&mut self, place: usize, event: Event) {
        let mut effects = Effects::default();
        let running = &mut self.leaders[place];
        running.leader.step(event, &Lookup(&self.coordinator), &mut effects);
        running.leader.seal(&mut effects);
        self.perform(place, effects);
    }

    fn perform(&mut self, place: usize, effects: Effects) {
        let running = &mut self.leaders[place];
        if !effects.act.is_empty() {
            running.acts.push(effects.act);
        }
        running.confirm = effects.confirm.or(running.confirm);
        for (shard, message) in effects.to_shards {
            self.packets.push(Packet::ToShard(shard, message));
        }
        for (shard, request, read) in effects.reads {
            self.packets.push(Packet::Read(shard, request, read));
        }
        self.replies.extend(effects.replies);
        self.alarms.extend(effects.alarms);
        if effects.step_down.is_some() {
            self.leaders.remove(place);
        }
    }

    /// The oldest proposal of a leader is committed and applied.
    pub fn apply_act(&mut self, place: usize) {
        if self.leaders[place].acts.is_empty() {
            return;
        }
        let act = self.leaders[place].acts.remove(0);
        match self.coordinator.commit(machine::encode(&CoordinatorEntry::Act(act))) {
            CoordinatorReply::Acted(acted) => {
                self.note_decisions(&acted.decisions);
                self.step(place, Event::Applied(acted));
            }
            CoordinatorReply::OldEpoch { .. } => {
                self.leaders.remove(place);
            }
            other => panic!("an act was answered with {other:?}"),
        }
    }

    /// The newest leader hears that it still led. A deposed one never does.
    pub fn confirm(&mut self) {
        let Some(place) = self.leaders.len().checked_sub(1) else { return };
        if let Some(asked) = self.leaders[place].confirm.take() {
            self.step(place, Event::Confirmed { asked });
        }
    }

    /// Delivers a packet, to the given leader if it comes from a shard.
    pub fn deliver(&mut self, packet: Packet, place: usize) {
        if std::env::var_os("WORLD_TRACE").is_some() {
            eprintln!("deliver to {place} of {}: {packet:?}", self.leaders.len());
        }
        let (Packet::ToShard(shard, _)
        | Packet::Read(shard, ..)
        | Packet::FromShard(shard, _)
        | Packet::Answer(shard, ..)) = &packet;
        if self.down.contains(shard) {
            return;
        }
        match packet {
            Packet::ToShard(shard, message) => {
                let entry = self.shard_entry(message);
                let group = self.shards.get_mut(&shard).expect("packets name known shards");
                let ShardReply { messages, alarms } = group.commit(machine::encode(&entry));
                self.alarms.extend(alarms);
                for (coordinator, message) in messages {
                    assert_eq!(coordinator, GroupId::COORDINATOR);
                    self.note_commits(shard, &entry.messages[0], &message);
                    self.packets.push(Packet::FromShard(shard, message));
                }
            }
            Packet::Read(shard, request, read) => {
                let group = self.shards.get_mut(&shard).expect("packets name known shards");
                group.catch_up(group.lead);
                let replica = group.leading();
                let answer = replica.machine.read(&replica.store, GroupId::COORDINATOR, &read);
                match answer.expect("memory doesn't fail") {
                    Some(answer) => self.packets.push(Packet::Answer(shard, request, answer)),
                    // It waits; here that means that it is asked again after a while.
                    None => self.waiting.push(Packet::Read(shard, request, read)),
                }
            }
            Packet::FromShard(shard, message) => {
                if place < self.leaders.len() {
                    self.step(place, Event::FromShard { shard, message });
                }
            }
            Packet::Answer(shard, request, answer) => {
                if place < self.leaders.len() {
                    self.step(place, Event::ReadAnswered { shard, request, answer });
                }
            }
        }
    }

    /// A message as the entry that a shard's leader makes of it.
    pub fn shard_entry(&self, message: ToShard) -> ShardEntry {
        ShardEntry { now: self.now, parts_max: self.parts_max, messages: vec![message] }
    }

    pub fn submit(&mut self, batch: Batch) -> Option<Token> {
        let place = self.leaders.len().checked_sub(1)?;
        self.next_token += 1;
        let token = Token(self.next_token);
        let split = batch.split(self.config.placement);
        let hash = split.hash;
        self.submitted.entry((batch.id, hash)).or_insert_with(|| batch.clone());
        let told = self.newest_told();
        self.submitted_after.entry((batch.id, hash)).or_insert(told);
        self.tokens.insert(token, batch.id);
        self.step(place, Event::Submit { token, batch: split });
        Some(token)
    }

    /// What was decided.
    pub fn contents(&self, decision: &Decision) -> &Batch {
        &self.submitted[&(decision.id, decision.hash.expect("who seals an id doesn't know its contents"))]
    }

    pub fn query(&mut self, id: BatchId, abort_if_not_seen: bool) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        let place = self.leaders.len() - 1;
        self.step(place, Event::Query { token, id, wait: false, abort_if_not_seen });
        token
    }

    pub fn read(&mut self, rows: Vec<RowKey>) -> Token {
        self.read_at(self.leaders.len() - 1, rows)
    }

    /// A read at any leader, a deposed one too.
    pub fn read_at(&mut self, place: usize, rows: Vec<RowKey>) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.read_after.insert(token, self.newest_told());
        self.step(place, Event::Read { token, rows });
        token
    }

    /// The greatest stamp of a commit that anybody was told.
    fn newest_told(&self) -> Stamp {
        let told = self.replies.iter().filter_map(|(_, reply)| match reply {
            Reply::Decided(decision) => decision.result.as_ref().ok().copied(),
            _ => None,
        });
        told.max().unwrap_or_default()
    }

    pub fn tick(&mut self, millis: u64) {
        self.now = Millis(self.now.0 + millis);
        self.packets.append(&mut self.waiting);
        let mut place = 0;
        while place < self.leaders.len() {
            let before = self.leaders.len();
            self.step(place, Event::Tick { now: self.now });
            place += usize::from(self.leaders.len() == before);
        }
    }

    pub fn reply(&self, token: Token) -> Option<&Reply> {
        self.replies.iter().find(|(to, _)| *to == token).map(|(_, reply)| reply)
    }

    /// No more faults: delivers everything in order and lets time pass until nothing is left to do.
    pub fn settle(&mut self) {
        if self.leaders.is_empty() {
            self.elect();
        }
        self.leaders.drain(..self.leaders.len() - 1);
        for round in 0..400 {
            self.deliver_all();
            if round > 3 && self.leaders[0].leader.in_flight() == 0 && self.leaders[0].acts.is_empty() {
                break;
            }
            self.tick(250);
        }
        self.deliver_all();
    }

    /// Delivers until nothing is under way.
    pub fn deliver_all(&mut self) {
        for _ in 0..100_000 {
            let newest = self.leaders.len().saturating_sub(1);
            if !self.packets.is_empty() {
                let packet = self.packets.remove(0);
                self.deliver(packet, newest);
            } else if self.leaders.get(newest).is_some_and(|running| !running.acts.is_empty()) {
                self.apply_act(newest);
            } else if self.leaders.get(newest).is_some_and(|running| running.confirm.is_some()) {
                self.confirm();
            } else {
                return;
            }
        }
        panic!("the cluster never comes to rest: {:?}", self.packets);
    }

    /// Delivers all but outcomes, which are lost.
    pub fn deliver_all_but_outcomes(&mut self) {
        for _ in 0..100 {
            self.packets.retain_mut(|packet| match packet {
                Packet::ToShard(_, message) => {
                    message.outcomes.clear();
                    !message.is_empty()
                }
                _ => true,
            });
            let newest = self.leaders.len() - 1;
            for packet in std::mem::take(&mut self.packets) {
                self.deliver(packet, newest);
            }
            self.apply_act(newest);
        }
    }

    /// All decisions that are remembered, in the order of recording.
    pub fn decisions(&self) -> Vec<Decision> {
        let replica = self.coordinator.leading();
        let (listed, _) = replica.machine.list(&replica.store, 0, usize::MAX).expect("memory doesn't fail");
        listed.into_iter().map(|listed| listed.decision).collect()
    }

    /// What a row holds, of what has been applied where its shard is led.
    pub fn row(&self, row: &RowKey) -> RowAt {
        let group = &self.shards[&self.config.placement.shard_of(row.partition())];
        let read = ShardRead {
            position: Stamp(u64::MAX - 1),
            known: true,
            wait_for: Vec::new(),
            query: ShardQuery::Rows(vec![row.clone()]),
        };
        let replica = group.leading();
        match replica.machine.read(&replica.store, GroupId::COORDINATOR, &read) {
            Ok(Some(ShardReadAnswer::Rows(rows))) => rows[0].clone(),
            other => panic!("a row was answered with {other:?}"),
        }
    }

    /// Everything that must hold once the cluster is at rest.
    pub fn check_at_rest(&mut self) {
        assert_eq!(self.alarms, Vec::<String>::new(), "alarms");
        let in_flight = self.leaders[0].leader.in_flight();
        assert_eq!(in_flight, 0, "the leader still has batches in flight");
        self.coordinator.check_replicas();
        for (shard, group) in &mut self.shards {
            group.check_replicas();
            let counts = group.leading().machine.counts();
            assert_eq!(
                (counts.in_doubt, counts.waiting, counts.settled, counts.held_rows),
                (0, 0, 0, 0),
                "shard {shard} holds something at rest"
            );
            for place in 0..group.replicas.len() {
                group.restart(place);
            }
        }
        for decision in self.decisions() {
            assert!(self.recorded.contains(&decision), "{decision:?} was never recorded");
        }
        let decisions = self.recorded.clone();
        self.check_replies(&decisions);
        self.check_order(&decisions);
        self.check_rejections(&decisions);
    }

    /// Promise G6 for rejections: each is true at some place in the order that lies between its submission and its decision.
    fn check_rejections(&self, decisions: &[Decision]) {
        for (place, decision) in decisions.iter().enumerate() {
            let Err(abort) = &decision.result else { continue };
            let (AbortReason::ShortOfFunds
            | AbortReason::AboveCeiling
            | AbortReason::ConditionNotMet
            | AbortReason::RowExists) = abort.reason
            else {
                continue;
            };
            let from = self.submitted_after[&(decision.id, decision.hash.expect("it was judged"))];
            let committed = in_order(&decisions[..place]);
            let mut model: BTreeMap<RowKey, RowAt> = BTreeMap::new();
            let fails = |model: &BTreeMap<RowKey, RowAt>| {
                let mut model = model.clone();
                self.contents(decision).operations.iter().any(|operation| {
                    let row = model.entry(operation.row.clone()).or_default();
                    plain::run(row, Stamp(u64::MAX), &operation.kind).is_err()
                })
            };
            let mut is_true = from == Stamp(0) && fails(&model);
            for (stamp, decision) in committed {
                for operation in &self.contents(decision).operations {
                    let row = model.entry(operation.row.clone()).or_default();
                    plain::run(row, stamp, &operation.kind).expect("was checked before");
                }
                is_true |= stamp >= from && fails(&model);
            }
            assert!(
                is_true,
                "batch {} was rejected by {abort:?}, which was never so since it came",
                decision.id
            );
        }
    }

    /// Promise G6: whatever was answered is what stands.
    fn check_replies(&self, decisions: &[Decision]) {
        for (token, reply) in &self.replies {
            if let (Reply::Decided(told), Some(id)) = (reply, self.tokens.get(token)) {
                let stands = decisions.iter().find(|decision| decision.id == *id);
                assert_eq!(Some(told), stands, "batch {id} was answered otherwise than it stands");
            }
        }
    }

    /// Promises G1, G3, G5, G7: run one by one in the order of their stamps, by a model that knows no shards, all committed batches
    /// meet their conditions, and end in the state that the shards hold.
    fn check_order(&self, decisions: &[Decision]) {
        let committed = in_order(decisions);
        assert!(committed.windows(2).all(|pair| pair[0].0 < pair[1].0), "a stamp was given twice");
        let mut model: BTreeMap<RowKey, RowAt> = BTreeMap::new();
        for (stamp, decision) in committed {
            for operation in &self.contents(decision).operations {
                let row = model.entry(operation.row.clone()).or_default();
                plain::run(row, stamp, &operation.kind).unwrap_or_else(|why| {
                    panic!("batch {} at {stamp} on {:?}: {why}", decision.id, operation.row)
                });
            }
        }
        for (row, expected) in &model {
            assert_eq!(self.row(row), *expected, "row {row:?}");
        }
    }
}
