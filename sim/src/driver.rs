//! The coordinators' driver on one node, as `coordinator/src/driver.rs` has it: one loop, everything that has arrived in one round, at
//! most one entry for what a round records, effects in order, and an end of the epoch at whatever casts doubt on it.

use std::{collections::BTreeMap, time::Instant};

use verdict_protocol::{
    batch::Placement,
    coordinator::{Act, Coordinator, CoordinatorEntry, CoordinatorReply, Keep},
    ids::{BatchId, Epoch, GroupId, Millis, NodeId, ShardId},
    leader::{Decisions, Effects, Event, Leader, LeaderConfig, Remembered, Reply, Token},
    machine::encode,
    show,
    store::MemoryStore,
};

use crate::{
    context::Context,
    faults::Fired,
    host::{Host, Outcome},
    messages::{NotServed, Packet, Place, Question, Stream, Told},
    plan::Plan,
    raft::{Barrier, Confirmation, Time, Write},
    routes::Routes,
    witness::Seen,
};

/// How often the leader looks at its clock.
pub const TICK: Time = 20_000;
/// How long to wait before the next epoch is opened.
const REOPEN_PAUSE: Time = 50_000;
/// How long a confirmation may take.
const BARRIER_PATIENCE: Time = 3_000_000;

/// Who waits for a reply: the gateway of a node, by its number.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The node.
    pub node: NodeId,
    /// The gateway's number.
    pub call: u64,
}

/// Something that has come for the driver.
#[derive(Debug)]
pub enum Arrival {
    /// A question.
    Request(Caller, Question),
    /// A shard's word, through a node.
    Said(NodeId, ShardId, Epoch, Told),
    /// The stream to a node broke.
    Broken(NodeId),
    /// Time has passed.
    Tick,
}

struct Confirming {
    barrier: Barrier,
    since: Time,
    confirm: Option<u64>,
    queries: Vec<Event>,
}

/// One epoch.
pub struct Reign {
    /// The core.
    pub leader: Leader,
    term: u64,
    effects: Effects,
    /// The leader's clock in microseconds, and when it was last looked at.
    clock: (u64, Time),
    callers: BTreeMap<u64, Caller>,
    last_token: u64,
    acts: usize,
    act_waiting: Act,
    to_confirm: Option<u64>,
    to_query: Vec<Event>,
    confirming: Option<Confirming>,
    barrier_rests: bool,
}

enum Stage {
    Following,
    Opening { term: u64 },
    Reigning(Box<Reign>),
    Resting { until: Time },
}

/// The driver. Nothing of it survives a crash.
pub struct Driver {
    /// What has arrived.
    pub inbox: Vec<Arrival>,
    /// A round is due.
    pub woken: bool,
    stage: Stage,
    routes: Routes,
    placement: Placement,
    node: NodeId,
}

/// Why an epoch ends.
struct Lost;

/// What a driver works with in a round.
struct Round<'a> {
    host: &'a mut Host<Coordinator>,
    routes: &'a mut Routes,
    cx: &'a mut Context,
    wall: u64,
    writes: Vec<Write>,
    now: Instant,
}

impl Driver {
    /// A driver that has heard nothing yet.
    pub fn new(node: NodeId, plan: &Plan) -> Driver {
        let placement = Placement { shards: plan.shards() };
        let voters = placement.all().map(|shard| (shard, plan.voters(shard.group())));
        let nodes = (1..=plan.nodes).map(NodeId).collect();
        let routes = Routes::new(nodes, voters.collect(), node, placement.all());
        Driver { inbox: Vec::new(), woken: false, stage: Stage::Following, routes, placement, node }
    }

    /// The present epoch.
    pub fn reign(&self) -> Option<&Reign> {
        match &self.stage {
            Stage::Reigning(reign) => Some(reign),
            Stage::Following | Stage::Opening { .. } | Stage::Resting { .. } => None,
        }
    }

    /// One round. `wall` is the machine's clock in microseconds. Gives what is to be written.
    pub fn round(&mut self, host: &mut Host<Coordinator>, wall: u64, cx: &mut Context) -> Vec<Write> {
        self.woken = false;
        let arrivals = std::mem::take(&mut self.inbox);
        let outcomes = std::mem::take(&mut host.outcomes);
        let mut writes = Vec::new();
        let serves = host.raft.serves(cx.now);
        match &mut self.stage {
            Stage::Resting { until } if cx.now >= *until => self.stage = Stage::Following,
            Stage::Resting { .. } | Stage::Following | Stage::Reigning(_) => {}
            Stage::Opening { term } => {
                let lost = !serves || host.raft.term != *term;
                match outcomes.into_iter().next() {
                    None if lost => self.stage = Stage::Resting { until: cx.now + REOPEN_PAUSE },
                    None => {}
                    Some(Outcome::Applied(_, CoordinatorReply::Opened(opened))) if !lost => {
                        let term = *term;
                        cx.trace.line(cx.now, || format!("n{} opens epoch {}", self.node, opened.epoch));
                        self.routes.restart();
                        let config = config(self.placement, cx);
                        let (leader, effects) = Leader::open(config, opened, Millis(wall / 1000));
                        let reign = Reign::new(leader, effects, term, (wall, cx.now));
                        self.stage = Stage::Reigning(Box::new(reign));
                        return self.rule(host, wall, arrivals, Vec::new(), cx);
                    }
                    Some(_) => self.stage = Stage::Resting { until: cx.now + REOPEN_PAUSE },
                }
                return self.refuse(arrivals, cx);
            }
        }
        if matches!(self.stage, Stage::Reigning(_)) {
            return self.rule(host, wall, arrivals, outcomes, cx);
        }
        if matches!(self.stage, Stage::Following) && serves {
            let keep = config(self.placement, cx).keep;
            let entry = CoordinatorEntry::Open { node: self.node, placement: self.placement, keep };
            let term = host.raft.term;
            self.stage = Stage::Opening { term };
            // Nobody waits for what an earlier epoch of this node proposed.
            host.forget_proposals();
            writes = host.propose(encode(&entry), cx).unwrap_or_default();
        }
        writes.extend(self.refuse(arrivals, cx));
        writes
    }

    fn refuse(&mut self, arrivals: Vec<Arrival>, cx: &mut Context) -> Vec<Write> {
        for arrival in arrivals {
            if let Arrival::Request(caller, _) = arrival {
                answer(self.node, caller, Err(NotServed::NotLeader), cx);
            }
        }
        Vec::new()
    }

    fn rule(
        &mut self,
        host: &mut Host<Coordinator>,
        wall: u64,
        arrivals: Vec<Arrival>,
        outcomes: Vec<Outcome<CoordinatorReply>>,
        cx: &mut Context,
    ) -> Vec<Write> {
        let Stage::Reigning(reign) = &mut self.stage else { return self.refuse(arrivals, cx) };
        let now = cx.instant();
        let mut round = Round { host, routes: &mut self.routes, cx, wall, writes: Vec::new(), now };
        let mut arrivals = arrivals.into_iter();
        let ruled = reign.take(&mut arrivals, outcomes, &mut round);
        let writes = std::mem::take(&mut round.writes);
        if ruled.is_err() {
            let callers = std::mem::take(&mut reign.callers);
            cx.trace.line(cx.now, || format!("n{} ends its epoch {}", self.node, reign.leader.epoch()));
            for caller in callers.into_values() {
                answer(self.node, caller, Err(NotServed::Lost), cx);
            }
            self.stage = Stage::Resting { until: cx.now + REOPEN_PAUSE };
            self.refuse(arrivals.collect(), cx);
        }
        writes
    }
}

fn config(placement: Placement, cx: &Context) -> LeaderConfig {
    let settings = &cx.plan.settings;
    let (decisions_max, young_ms, history_max) = settings.keep;
    LeaderConfig {
        keep: Keep { decisions_max, history_max },
        young_ms,
        alone: settings.alone,
        alone_ahead_ms: settings.alone_ahead_ms,
        alone_behind_ms: settings.alone_behind_ms,
        batches_max: settings.batches_max,
        retention_ms: settings.retention_ms,
        future_max_ms: settings.future_max_ms,
        ..LeaderConfig::new(placement)
    }
}

fn answer(node: NodeId, caller: Caller, reply: Result<Reply, NotServed>, cx: &mut Context) {
    let packet = Packet::Served { call: caller.call, reply };
    cx.send(Place::Node(node), Place::Node(caller.node), packet);
}

impl Reign {
    fn new(leader: Leader, effects: Effects, term: u64, clock: (u64, Time)) -> Reign {
        Reign {
            leader,
            term,
            effects,
            clock,
            callers: BTreeMap::new(),
            last_token: 0,
            acts: 0,
            act_waiting: Act::default(),
            to_confirm: None,
            to_query: Vec::new(),
            confirming: None,
            barrier_rests: false,
        }
    }

    fn take(
        &mut self,
        arrivals: &mut impl Iterator<Item = Arrival>,
        outcomes: Vec<Outcome<CoordinatorReply>>,
        round: &mut Round<'_>,
    ) -> Result<(), Lost> {
        if !round.host.raft.serves(round.cx.now) || round.host.raft.term != self.term {
            return Err(Lost);
        }
        for outcome in outcomes {
            self.acts -= 1;
            match outcome {
                Outcome::Applied(_, CoordinatorReply::Acted(acted)) => {
                    self.step(Event::Applied(acted), round)?;
                }
                Outcome::Applied(..) | Outcome::Unknown => return Err(Lost),
            }
        }
        self.look_at_barrier(round)?;
        for arrival in arrivals {
            self.arrived(arrival, round)?;
        }
        self.leader.seal(&mut self.effects);
        self.perform(round)
    }

    fn step(&mut self, event: Event, round: &mut Round<'_>) -> Result<(), Lost> {
        let lookup = Lookup { machine: &round.host.machine, store: &round.host.store };
        self.leader.step(event, &lookup, &mut self.effects);
        if self.effects.step_down.take().is_some() { Err(Lost) } else { Ok(()) }
    }

    fn arrived(&mut self, arrival: Arrival, round: &mut Round<'_>) -> Result<(), Lost> {
        match arrival {
            Arrival::Request(caller, question) => self.request(caller, question, round),
            Arrival::Broken(node) => {
                round.routes.broken(node, round.now);
                Ok(())
            }
            Arrival::Said(_, _, epoch, _) if epoch != self.leader.epoch() => Ok(()),
            Arrival::Said(node, shard, _, Told::NotLeader(hint)) => {
                if round.routes.not_leader(node, shard, hint, round.now) {
                    self.step(Event::Reconnected { shard }, round)?;
                }
                Ok(())
            }
            Arrival::Said(node, shard, _, Told::Message(message)) => {
                round.routes.heard(node, shard);
                self.step(Event::FromShard { shard, message }, round)
            }
            Arrival::Said(node, shard, _, Told::Answers(answers)) => {
                round.routes.heard(node, shard);
                for (request, answer) in answers {
                    self.step(Event::ReadAnswered { shard, request, answer }, round)?;
                }
                Ok(())
            }
            Arrival::Tick => self.tick(round),
        }
    }

    /// The clock starts with the machine's, follows real time, and is drawn towards the machine's by at most a tenth.
    fn tick(&mut self, round: &mut Round<'_>) -> Result<(), Lost> {
        self.barrier_rests = false;
        let elapsed = round.cx.now - self.clock.1;
        let plain = self.clock.0 + elapsed;
        let most = elapsed / 10;
        let clock = round.wall.clamp(plain - most, plain + most);
        self.clock = (clock, round.cx.now);
        self.step(Event::Tick { now: Millis(clock / 1000) }, round)?;
        for shard in round.routes.due(round.now) {
            self.step(Event::Reconnected { shard }, round)?;
        }
        Ok(())
    }

    fn request(&mut self, caller: Caller, question: Question, round: &mut Round<'_>) -> Result<(), Lost> {
        self.last_token += 1;
        let token = Token(self.last_token);
        self.callers.insert(token.0, caller);
        match question {
            Question::Submit { split, .. } => {
                self.step(Event::Submit { token, batch: (*split).clone() }, round)
            }
            Question::Query { id, wait, seal } => {
                self.to_query.push(Event::Query { token, id, wait, abort_if_not_seen: seal });
                Ok(())
            }
            Question::Read { rows } => self.step(Event::Read { token, rows }, round),
            Question::History { row, from, limit } => {
                self.step(Event::History { token, row, from, limit }, round)
            }
        }
    }

    fn look_at_barrier(&mut self, round: &mut Round<'_>) -> Result<(), Lost> {
        let Some(confirming) = self.confirming.take() else { return Ok(()) };
        match round.host.confirmation(confirming.barrier) {
            Confirmation::Deposed => Err(Lost),
            Confirmation::Confirmed => {
                if let Some(asked) = confirming.confirm {
                    self.step(Event::Confirmed { asked }, round)?;
                }
                for query in confirming.queries {
                    self.step(query, round)?;
                }
                Ok(())
            }
            Confirmation::Pending if round.cx.now > confirming.since + BARRIER_PATIENCE => {
                self.barrier_rests = true;
                self.to_confirm = self.to_confirm.max(confirming.confirm);
                self.to_query.splice(0..0, confirming.queries);
                Ok(())
            }
            Confirmation::Pending => {
                self.confirming = Some(confirming);
                Ok(())
            }
        }
    }

    /// Performs all that the round asked for.
    fn perform(&mut self, round: &mut Round<'_>) -> Result<(), Lost> {
        let effects = std::mem::take(&mut self.effects);
        self.act_waiting.pile(effects.act);
        let room = self.acts < round.cx.plan.settings.entries_in_flight_max;
        let mut deposed = false;
        if room && !self.act_waiting.is_empty() {
            let act = std::mem::take(&mut self.act_waiting);
            match round.host.propose(encode(&CoordinatorEntry::Act(act)), round.cx) {
                Some(writes) => {
                    self.acts += 1;
                    round.writes.extend(writes);
                }
                None => deposed = true,
            }
        }
        let node = round.host.node();
        let mut reads: BTreeMap<ShardId, Vec<_>> = BTreeMap::new();
        let mut to_shards = effects.to_shards;
        for (shard, request, read) in effects.reads {
            reads.entry(shard).or_default().push((request, read));
            to_shards.entry(shard).or_default();
        }
        let stream = Stream { epoch: self.leader.epoch(), node };
        for (shard, message) in to_shards {
            let Some(to) = round.routes.of(shard, round.now) else { continue };
            let reads = reads.remove(&shard).unwrap_or_default();
            let packet = Packet::ToShard { shard, stream, message, reads };
            round.cx.send(Place::Node(node), Place::Node(to), packet);
        }
        for (token, reply) in effects.replies {
            let Some(caller) = self.callers.remove(&token.0) else { continue };
            if reply == Reply::Refused(verdict_protocol::leader::Refusal::Overloaded) {
                round.cx.tally.count(Fired::Refused);
            }
            round.cx.trace.line(round.cx.now, || format!("n{node} says {}", show::answer(&reply)));
            answer(node, caller, Ok(reply), round.cx);
        }
        self.to_confirm = self.to_confirm.max(effects.confirm);
        self.begin_barrier(round);
        for text in effects.alarms {
            round.cx.witness.see(round.cx.now, &Seen::Alarm { group: GroupId::COORDINATOR, text: &text });
        }
        if deposed { Err(Lost) } else { Ok(()) }
    }

    fn begin_barrier(&mut self, round: &mut Round<'_>) {
        let idle = self.to_confirm.is_none() && self.to_query.is_empty();
        if self.confirming.is_some() || self.barrier_rests || idle {
            return;
        }
        if let Some(barrier) = round.host.barrier(round.cx) {
            let (confirm, queries) = (self.to_confirm.take(), std::mem::take(&mut self.to_query));
            self.confirming = Some(Confirming { barrier, since: round.cx.now, confirm, queries });
        }
    }

    /// Whether a confirmation is under way that can be looked at now.
    pub fn confirms(&self, host: &Host<Coordinator>) -> bool {
        let done = |one: &Confirming| host.confirmation(one.barrier) != Confirmation::Pending;
        self.confirming.as_ref().is_some_and(done)
    }
}

struct Lookup<'a> {
    machine: &'a Coordinator,
    store: &'a MemoryStore,
}

impl Decisions for Lookup<'_> {
    fn remembered(&self, id: BatchId) -> Remembered {
        self.machine.remembered(self.store, id).expect("memory doesn't fail")
    }
}
