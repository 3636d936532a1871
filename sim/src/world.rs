//! A whole run: nodes and clients in one queue of events, faults as the plan has them, then healing, and the last look.

use std::collections::BTreeMap;

use verdict_protocol::ids::{GroupId, NodeId, ShardId};

use crate::{
    client::Client,
    context::{Context, Event},
    faults::{Fired, Tally},
    invariants::{Rest, bounded_recovery},
    messages::{Packet, Place},
    node::Node,
    plan::{Act, Change, Contents, Plan, Step, Trouble, balances},
    raft::Time,
    trace::Trace,
    witness::{Facts, Seen, Violation},
};

/// How often it is looked whether everything has come to rest.
const LOOK: Time = 50_000;
/// More events than any run needs.
const STEPS_MAX: u64 = 2_000_000;
/// The client that comes last.
const SWEEPER: u32 = 1_000;

/// What a run has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The hash over all events.
    pub hash: u64,
    /// How many events there were.
    pub steps: u64,
    /// Batches that were committed; rejected by a condition or a bound; aborted otherwise.
    pub outcomes: [u64; 3],
    /// Reads that were answered.
    pub reads: u64,
    /// How long it took, from the end of the faults, until nothing was undecided, held or behind, in microseconds.
    pub recovery: Time,
    /// Faults that happened.
    pub tally: Tally,
    /// The first promise that was broken.
    pub violation: Option<Violation>,
}

/// A run.
pub struct World {
    cx: Context,
    nodes: BTreeMap<NodeId, Node>,
    clients: BTreeMap<u32, Client>,
    /// When all faults ended.
    healed: Option<Time>,
    swept: bool,
    recovery: Option<Time>,
    /// Nodes that a fault cut off, to be joined again.
    cuts: BTreeMap<usize, Vec<(NodeId, NodeId, bool)>>,
    skews: BTreeMap<usize, (NodeId, i64)>,
}

impl World {
    /// The world of a plan, before anything has happened.
    pub fn new(plan: Plan, trace: Trace) -> World {
        let mut cx = Context::new(plan, trace);
        let ids: Vec<NodeId> = (1..=cx.plan.nodes).map(NodeId).collect();
        let mut nodes: BTreeMap<NodeId, Node> = ids.iter().map(|id| (*id, Node::new(*id, &mut cx))).collect();
        for node in nodes.values_mut() {
            node.start(&mut cx);
        }
        let steps = cx.plan.clients.clone().into_iter().enumerate();
        let mut clients: BTreeMap<u32, Client> =
            steps.map(|(id, steps)| (id as u32, Client::new(id as u32, steps))).collect();
        for client in clients.values_mut() {
            client.go_on(&mut cx);
        }
        for (place, fault) in cx.plan.faults.clone().iter().enumerate() {
            cx.at(fault.at_ms * 1000, Event::Fault(place));
        }
        cx.at(cx.plan.faults_ms * 1000, Event::Look);
        let (cuts, skews) = (BTreeMap::new(), BTreeMap::new());
        World { cx, nodes, clients, healed: None, swept: false, recovery: None, cuts, skews }
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) {
        while self.cx.witness.violation.is_none() {
            let Some(event) = self.cx.next_event() else { break };
            if self.cx.trace.steps() > STEPS_MAX {
                let text = format!("more than {STEPS_MAX} events");
                self.cx.witness.violated("bounded recovery", text, self.cx.now);
            }
            if matches!(event, Event::Look) && self.look() {
                break;
            }
            self.take(event);
            self.count_copies();
        }
    }

    /// What it has shown so far.
    pub fn report(&self) -> Report {
        let facts = &self.cx.witness.facts;
        let mut outcomes = [0; 3];
        for recorded in facts.decisions.values() {
            use verdict_protocol::messages::AbortReason as Reason;
            let kind = match &recorded.decision.result {
                Ok(_) => 0,
                Err(abort) => match abort.reason {
                    Reason::ShortOfFunds
                    | Reason::AboveCeiling
                    | Reason::Overflow
                    | Reason::ConditionNotMet
                    | Reason::RowExists
                    | Reason::WrongKind => 1,
                    Reason::Contention
                    | Reason::ParticipantUnavailable
                    | Reason::Interrupted
                    | Reason::Cancelled => 2,
                },
            };
            outcomes[kind] += 1;
        }
        let done = |record: &&crate::client::Record| record.id().is_none() && record.answered.is_some();
        Report {
            seed: self.cx.plan.seed,
            hash: self.cx.trace.hash(),
            steps: self.cx.trace.steps(),
            outcomes,
            reads: facts.records.iter().filter(done).count() as u64,
            recovery: self.recovery.unwrap_or(0),
            tally: self.cx.tally,
            violation: self.cx.witness.violation.clone(),
        }
    }

    /// What is known of it.
    pub fn facts(&self) -> &Facts {
        &self.cx.witness.facts
    }

    fn take(&mut self, event: Event) {
        let World { cx, nodes, clients, .. } = self;
        match event {
            Event::Deliver { from, to, packet, order } => {
                cx.trace.step(cx.now, 1 + place_word(from) * 64 + place_word(to));
                match to {
                    Place::Client(id) => {
                        cx.arrived(from, to, order);
                        if let (Some(client), Packet::Answer { request, answer }) =
                            (clients.get_mut(&id), packet)
                        {
                            client.answered(request, answer, cx);
                        }
                    }
                    Place::Node(id) => {
                        let node = nodes.get_mut(&id).expect("packets go to nodes of the cluster");
                        if !node.up {
                            // Whoever holds a connection to it notices.
                            if matches!(packet, Packet::ToShard { .. }) {
                                cx.send(to, from, Packet::Broken(id));
                            }
                        } else if node.paused > 0 {
                            node.held.push(Event::Deliver { from, to, packet, order });
                        } else {
                            cx.arrived(from, to, order);
                            node.take(from, packet, cx);
                        }
                    }
                }
            }
            Event::Timer { node: id, life, timer } => {
                let node = nodes.get_mut(&id).expect("timers are of nodes of the cluster");
                if !node.up || node.life != life {
                    return;
                }
                if node.paused > 0 {
                    node.held.push(Event::Timer { node: id, life, timer });
                    return;
                }
                cx.trace.step(cx.now, 2 + id.0 * 64);
                node.due(timer, cx);
            }
            Event::Client { client, wake } => {
                cx.trace.step(cx.now, 3 + u64::from(client) * 64);
                if let Some(client) = clients.get_mut(&client) {
                    client.woken(wake, cx);
                }
            }
            Event::Fault(place) => self.begin_fault(place),
            Event::FaultEnds(place) => self.end_fault(place),
            Event::Start(id) => self.start(id),
            Event::Resume(id) => self.resume(id),
            Event::Look => cx.at(cx.now + LOOK, Event::Look),
        }
    }

    fn start(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).expect("a node of the cluster");
        if !node.up {
            self.cx.trace.step(self.cx.now, 4 + id.0 * 64);
            node.start(&mut self.cx);
        }
    }

    fn resume(&mut self, id: NodeId) {
        let groups = 0..=self.cx.plan.shards();
        let newest: Vec<Option<u64>> = groups
            .map(|group| self.nodes.values().filter_map(|node| node.leads(GroupId(group))).max())
            .collect();
        let node = self.nodes.get_mut(&id).expect("a node of the cluster");
        if node.paused == 0 {
            return;
        }
        node.paused -= 1;
        if node.paused > 0 {
            return;
        }
        self.cx.trace.line(self.cx.now, || format!("n{id} goes on"));
        let deposed = |(group, newest): (usize, &Option<u64>)| {
            node.leads(GroupId(group as u32)).is_some_and(|term| Some(term) < *newest)
        };
        if newest.iter().enumerate().any(deposed) {
            self.cx.tally.count(Fired::DeposedWoke);
        }
        for event in std::mem::take(&mut node.held) {
            self.cx.at(self.cx.now, event);
        }
    }

    fn leader_of(&self, group: u32) -> Option<NodeId> {
        let group = GroupId(group);
        let running = self.nodes.values().filter(|node| node.up);
        running.filter_map(|node| Some((node.leads(group)?, node.id))).max().map(|(_, id)| id)
    }

    fn begin_fault(&mut self, place: usize) {
        let fault = self.cx.plan.faults[place].clone();
        let end = self.cx.now + fault.for_ms * 1000;
        self.cx.trace.step(self.cx.now, 5 + place as u64 * 64);
        self.cx.trace.line(self.cx.now, || format!("FAULT {:?} for {} ms", fault.what, fault.for_ms));
        match fault.what {
            Trouble::Crash { node, power } => self.crash(&[NodeId(node)], power, end),
            Trouble::CrashLeader { group, power } => {
                let leader: Vec<NodeId> = self.leader_of(group).into_iter().collect();
                self.crash(&leader, power, end);
            }
            Trouble::CrashGroup { group } => {
                let seats: Vec<NodeId> =
                    self.cx.plan.seats[group as usize].iter().copied().map(NodeId).collect();
                self.crash(&seats, true, end);
                if self.nodes.values().any(|node| node.up) {
                    self.cx.tally.count(Fired::GroupDown);
                }
            }
            Trouble::CrashAll => {
                let all: Vec<NodeId> = self.nodes.keys().copied().collect();
                self.crash(&all, true, end);
                self.cx.tally.count(Fired::AllDown);
            }
            Trouble::Pause { node } => self.pause(Some(NodeId(node)), end),
            Trouble::PauseLeader { group } => self.pause(self.leader_of(group), end),
            Trouble::Cut { from, to, both } => {
                let (from, to) = (NodeId(from), NodeId(to));
                let mut links = vec![(from, to, !both)];
                if both {
                    links.push((to, from, false));
                }
                self.cut(place, links);
            }
            Trouble::Isolate { node, out, into } => self.isolate(place, Some(NodeId(node)), out, into),
            Trouble::IsolateLeader { group } => self.isolate(place, self.leader_of(group), true, true),
            Trouble::Deaf { group } => {
                if let Some(leader) = self.leader_of(group) {
                    self.cx.network.deaf.insert(place, (GroupId(group), leader));
                }
            }
            Trouble::Sever { shard, told, says } => {
                self.cx.network.severed.insert(place, (ShardId(shard), told, says));
            }
            Trouble::Reset { node } => self.reset(NodeId(node)),
            Trouble::HandOver { group, to } => {
                if let Some(leader) = self.leader_of(group) {
                    let node = self.nodes.get_mut(&leader).expect("leaders are nodes of the cluster");
                    if node.paused == 0 {
                        node.hand_over(GroupId(group), NodeId(to), &mut self.cx);
                    }
                }
            }
            Trouble::Snapshot { group, node } => {
                let node = self.nodes.get_mut(&NodeId(node)).expect("a node of the cluster");
                if node.up && node.paused == 0 {
                    node.snapshot(GroupId(group), &mut self.cx);
                }
            }
            Trouble::Clock { node, by_ms } => {
                let node = self.nodes.get_mut(&NodeId(node)).expect("a node of the cluster");
                node.skew_ms += by_ms;
                self.skews.insert(place, (node.id, by_ms));
                self.cx.tally.count(Fired::Clock);
            }
            Trouble::SlowDisk { node, ms } => {
                let node = self.nodes.get_mut(&NodeId(node)).expect("a node of the cluster");
                node.slow_disk(place, Some(ms * 1000));
            }
            Trouble::Net { lost, repeated, delayed, delay_ms } => {
                self.cx.network.wrong.insert(place, (lost, repeated, delayed, delay_ms));
            }
            Trouble::Storm { last } => {
                for client in self.clients.values_mut() {
                    client.storm(last, &mut self.cx);
                }
            }
            Trouble::Narrow { parts_max, arrivals_max } => self.cx.narrow = Some((parts_max, arrivals_max)),
        }
        self.cx.at(end, Event::FaultEnds(place));
    }

    fn end_fault(&mut self, place: usize) {
        for (from, to, one_way) in self.cuts.remove(&place).unwrap_or_default() {
            if let Some((count, ways)) = self.cx.network.cut.get_mut(&(from, to)) {
                *count -= 1;
                *ways -= u32::from(one_way);
                if *count == 0 {
                    self.cx.network.cut.remove(&(from, to));
                }
            }
        }
        self.cx.network.wrong.remove(&place);
        self.cx.network.deaf.remove(&place);
        self.cx.network.severed.remove(&place);
        if let Some((node, by_ms)) = self.skews.remove(&place) {
            self.nodes.get_mut(&node).expect("a node of the cluster").skew_ms -= by_ms;
        }
        for node in self.nodes.values_mut() {
            node.slow_disk(place, None);
        }
        if matches!(self.cx.plan.faults[place].what, Trouble::Narrow { .. }) {
            self.cx.narrow = None;
        }
    }

    fn crash(&mut self, ids: &[NodeId], power: bool, until: Time) {
        for id in ids {
            let node = self.nodes.get_mut(id).expect("a node of the cluster");
            if !node.up {
                continue;
            }
            node.die(power, &mut self.cx);
            // A process that is killed closes its connections; a machine without power doesn't.
            if !power {
                self.reset_all(*id);
            }
            self.cx.at(until, Event::Start(*id));
        }
    }

    fn reset_all(&mut self, id: NodeId) {
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != id).collect();
        for other in others {
            self.cx.send(Place::Node(id), Place::Node(other), Packet::Broken(id));
        }
    }

    fn reset(&mut self, id: NodeId) {
        self.cx.tally.count(Fired::Reset);
        self.reset_all(id);
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != id).collect();
        for other in others {
            self.cx.send(Place::Node(other), Place::Node(id), Packet::Broken(other));
        }
    }

    fn pause(&mut self, id: Option<NodeId>, until: Time) {
        let Some(node) = id.and_then(|id| self.nodes.get_mut(&id)).filter(|node| node.up) else { return };
        node.paused += 1;
        self.cx.tally.count(Fired::Pause);
        self.cx.at(until, Event::Resume(node.id));
    }

    fn isolate(&mut self, place: usize, id: Option<NodeId>, out: bool, into: bool) {
        let Some(id) = id else { return };
        let mut links = Vec::new();
        for other in self.nodes.keys().copied().filter(|other| *other != id) {
            if out {
                links.push((id, other, !into));
            }
            if into {
                links.push((other, id, !out));
            }
        }
        self.cut(place, links);
    }

    fn cut(&mut self, place: usize, links: Vec<(NodeId, NodeId, bool)>) {
        for (from, to, one_way) in &links {
            let (count, ways) = self.cx.network.cut.entry((*from, *to)).or_default();
            *count += 1;
            *ways += u32::from(*one_way);
        }
        self.cuts.insert(place, links);
    }

    /// Looks how far things are. Gives whether the run is over.
    fn look(&mut self) -> bool {
        let Some(healed) = self.healed else {
            if self.cx.tally.total() < self.cx.plan.faults_min {
                self.go_on();
            } else {
                self.heal();
            }
            return false;
        };
        let since = self.cx.now - healed;
        if let Err(why) = self.is_quiet() {
            if since > bounded_recovery::BOUND {
                let seconds = bounded_recovery::BOUND / 1_000_000;
                let text = format!("{seconds} s after the end of all faults {why}");
                self.cx.witness.violated(bounded_recovery::NAME, text, self.cx.now);
            }
            return false;
        }
        if self.recovery.is_none() {
            self.recovery = Some(since);
            self.cx.trace.line(self.cx.now, || "everything is at rest; late messages arrive".to_owned());
            self.cx.hurry();
            return false;
        }
        if !self.swept {
            self.swept = true;
            let mut client = Client::new(SWEEPER, sweep(&self.cx));
            client.go_on(&mut self.cx);
            self.clients.insert(SWEEPER, client);
            return false;
        }
        for node in self.nodes.values_mut() {
            node.flush();
        }
        let rest = Rest { nodes: &self.nodes };
        self.cx.witness.rest(self.cx.now, &rest);
        true
    }

    /// There were too few faults: clients send again, and many messages go wrong, for a little longer.
    fn go_on(&mut self) {
        self.cx.network.wrong.insert(usize::MAX, (1_500, 1_500, 1_500, 500));
        for client in self.clients.values_mut() {
            client.storm(1, &mut self.cx);
        }
    }

    /// All faults end.
    fn heal(&mut self) {
        self.healed = Some(self.cx.now);
        self.cx.network.wrong.clear();
        self.cx.trace.line(self.cx.now, || "all faults end".to_owned());
        for place in 0..self.cx.plan.faults.len() {
            self.end_fault(place);
        }
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in ids {
            self.start(id);
            while self.nodes[&id].paused > 0 {
                self.resume(id);
            }
        }
    }

    /// Whether nothing is left to do, or what is.
    fn is_quiet(&self) -> Result<(), String> {
        for (id, client) in &self.clients {
            if !client.is_done() {
                return Err(format!("client {id} still waits"));
            }
        }
        if !self.nodes.values().all(|node| node.up && node.paused == 0 && node.disk_rests()) {
            return Err("a node is not at rest".to_owned());
        }
        let now = self.cx.now;
        fn serving(node: &Node, now: Time) -> Option<&verdict_protocol::leader::Leader> {
            let (host, driver) = node.coordinator.as_ref()?;
            let reign = driver.reign().filter(|_| host.raft.serves(now))?;
            Some(&reign.leader)
        }
        let leaders = self.nodes.values().filter_map(|node| serving(node, now));
        let Some(leader) = leaders.max_by_key(|leader| leader.epoch()) else {
            return Err("nobody leads the coordinators".to_owned());
        };
        if !leader.is_recovered() || leader.in_flight() > 0 {
            return Err(format!("the leader has {} batches in flight", leader.in_flight()));
        }
        for (group, seats) in self.cx.plan.seats.iter().enumerate() {
            self.is_group_quiet(GroupId(group as u32), seats)?;
        }
        Ok(())
    }

    fn is_group_quiet(&self, group: GroupId, seats: &[u64]) -> Result<(), String> {
        let mut ends = Vec::new();
        for seat in seats {
            let node = &self.nodes[&NodeId(*seat)];
            let raft = match (group, &node.coordinator) {
                (GroupId::COORDINATOR, Some((host, _))) => &host.raft,
                _ => {
                    let (host, _) = &node.shards[&ShardId(group.0)];
                    let counts = host.machine.counts();
                    if counts.in_doubt + counts.waiting > 0 || host.machine.held().next().is_some() {
                        return Err(format!("shard {group} at n{seat} holds {counts:?}"));
                    }
                    &host.raft
                }
            };
            ends.push((raft.log.last(), raft.applied));
        }
        // The coordinators' leader always has something to tell its log of the horizon; the others hear of it a little later.
        let behind = if group == GroupId::COORDINATOR { 8 } else { 0 };
        let last = ends.iter().map(|(last, _)| last.0).max().unwrap_or(0);
        if ends.iter().any(|(_, applied)| applied + behind < last) {
            return Err(format!("replicas of group {group} stand at {ends:?}"));
        }
        Ok(())
    }

    /// What a leader takes for committed is on the disks of a majority.
    fn count_copies(&mut self) {
        for (group, index) in std::mem::take(&mut self.cx.witness.committed) {
            let seats = &self.cx.plan.seats[group.0 as usize];
            let mut known = None;
            let mut disks = Vec::new();
            for seat in seats {
                let node = &self.nodes[&NodeId(*seat)];
                let (raft, durable) = match (group, &node.coordinator) {
                    (GroupId::COORDINATOR, Some((host, _))) => (&host.raft, &host.durable),
                    _ => {
                        let (host, _) = &node.shards[&ShardId(group.0)];
                        (&host.raft, &host.durable)
                    }
                };
                if raft.leads() && raft.commit >= index {
                    known = raft.log.term_at(index).or(known);
                }
                let snapshot = durable.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
                disks.push((durable.log.base.0.max(snapshot), durable.log.term_at(index)));
            }
            let Some(term) = known else { continue };
            let has = |disk: &&(u64, Option<u64>)| disk.0 >= index || disk.1 == Some(term);
            let (copies, voters) = (disks.iter().filter(has).count(), seats.len());
            self.cx.witness.see(self.cx.now, &Seen::Copies { group, index, copies, voters });
        }
    }
}

fn place_word(place: Place) -> u64 {
    match place {
        Place::Node(node) => node.0,
        Place::Client(client) => 16 + u64::from(client),
    }
}

/// The last client: batches that touch every shard, so that every shard hears the marks, and a read of everything.
fn sweep(cx: &Context) -> Vec<Step> {
    let made_ms = (cx.now / 1000) as i64;
    let submit = |id: u32| {
        let changes = (0..12).map(|place| Change::Add(format!("sweep:{place}/note"), 1)).collect();
        Act::Submit(Contents {
            id: 1_000_000 + id,
            made_ms: made_ms + i64::from(id),
            zero_sum: false,
            changes,
        })
    };
    let acts = [submit(0), submit(1), submit(2), Act::Read { rows: balances() }];
    acts.into_iter().map(|what| Step { after_ms: 600, what }).collect()
}
