//! One node: a disk, a clock, replicas with their drivers, and a gateway.

use std::collections::BTreeMap;

use verdict_protocol::{
    batch::Placement,
    coordinator::Coordinator,
    ids::{BatchId, GroupId, NodeId, ShardId},
    leader::Reply,
    shard::{Shard, ShardConfig},
    show,
};

use crate::{
    context::{Context, Event, Timer},
    driver::{self, Arrival},
    faults::Fired,
    gateway::{Gateway, Handed},
    host::Host,
    messages::{Answer, Packet, Place, Question},
    plan::START,
    raft::{Seat, Time, Write},
    shard,
};

/// The disk: one sync at a time, for everything that waited when it began.
#[derive(Debug, Default)]
struct Disk {
    waiting: Vec<(GroupId, Write)>,
    syncing: Vec<(GroupId, Write)>,
    /// A sync takes up to so much longer.
    slow: BTreeMap<usize, Time>,
}

/// A node.
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// How often it was started.
    pub life: u64,
    /// It runs.
    pub up: bool,
    /// It stands still: what happens is held back.
    pub paused: u32,
    /// What was held back.
    pub held: Vec<Event>,
    /// By how many milliseconds its clock is wrong.
    pub skew_ms: i64,
    /// The coordinators' replica.
    pub coordinator: Option<(Host<Coordinator>, driver::Driver)>,
    /// The shards' replicas.
    pub shards: BTreeMap<ShardId, (Host<Shard>, shard::Driver)>,
    gateway: Gateway,
    disk: Disk,
    /// How its process died, until it starts again.
    died: Option<bool>,
}

impl Node {
    /// Brings all that is applied to the databases.
    pub fn flush(&mut self) {
        self.coordinator.iter_mut().for_each(|(host, _)| host.flush_all());
        self.shards.values_mut().for_each(|(host, _)| host.flush_all());
    }

    /// A node with an empty disk, not started yet.
    pub fn new(id: NodeId, cx: &mut Context) -> Node {
        let placement = Placement { shards: cx.plan.shards() };
        let mut coordinator = None;
        let mut shards = BTreeMap::new();
        for (group, seats) in cx.plan.seats.clone().into_iter().enumerate() {
            if !seats.contains(&id.0) {
                continue;
            }
            let (timing, defect) = (cx.plan.settings.timing, cx.plan.settings.defect);
            let seat = Seat { id, voters: seats.into_iter().map(NodeId).collect(), timing, defect };
            let group = GroupId(group as u32);
            if group == GroupId::COORDINATOR {
                let host = Host::new(group, seat, (), cx);
                coordinator = Some((host, driver::Driver::new(id, &cx.plan)));
            } else {
                let shard = ShardId(group.0);
                let host = Host::new(group, seat, ShardConfig { shard, placement, sweep_interval: 16 }, cx);
                shards.insert(shard, (host, shard::Driver::default()));
            }
        }
        let (gateway, disk) = (Gateway::default(), Disk::default());
        Node {
            id,
            life: 0,
            up: false,
            paused: 0,
            held: Vec::new(),
            skew_ms: 0,
            coordinator,
            shards,
            gateway,
            disk,
            died: None,
        }
    }

    /// The process starts.
    pub fn start(&mut self, cx: &mut Context) {
        self.up = true;
        self.life += 1;
        let (id, life) = (self.id, self.life);
        cx.trace.line(cx.now, || format!("n{id} starts"));
        if let Some(power) = self.died.take() {
            self.recover(power, cx);
        }
        if self.coordinator.is_some() {
            cx.timer(cx.now + driver::TICK, id, life, Timer::Tick);
        }
        for shard in self.shards.keys() {
            cx.timer(cx.now + shard::TICK, id, life, Timer::ShardTick(*shard));
        }
        for group in self.groups() {
            self.tend(group, Vec::new(), cx);
        }
    }

    fn groups(&self) -> Vec<GroupId> {
        let coordinator = self.coordinator.iter().map(|_| GroupId::COORDINATOR);
        coordinator.chain(self.shards.keys().map(|shard| shard.group())).collect()
    }

    /// The process dies. With `power`, what had not reached the disk is lost; else what was handed to the system is kept.
    pub fn die(&mut self, power: bool, cx: &mut Context) {
        cx.tally.count(if power { Fired::PowerLoss } else { Fired::Kill });
        cx.trace.line(cx.now, || format!("n{} dies{}", self.id, if power { " of power" } else { "" }));
        let leads = self.coordinator.iter().any(|(host, _)| host.raft.leads())
            || self.shards.values().any(|(host, _)| host.raft.leads());
        if leads {
            cx.tally.count(Fired::LeaderDied);
        }
        let syncing = std::mem::take(&mut self.disk.syncing);
        let waiting = std::mem::take(&mut self.disk.waiting);
        let kept = if power { cx.random.below(syncing.len() as u64 + 1) as usize } else { syncing.len() };
        if kept < syncing.len() || !waiting.is_empty() {
            cx.tally.count(Fired::UnsyncedLost);
        }
        for (group, write) in syncing.into_iter().take(kept) {
            match (group, &mut self.coordinator) {
                (GroupId::COORDINATOR, Some((host, _))) => host.durable.take(write),
                _ => self.shard(group).0.durable.take(write),
            }
        }
        self.up = false;
        self.paused = 0;
        self.held.clear();
        self.gateway = Gateway::default();
        self.died = Some(power);
    }

    /// What a process finds that starts again.
    fn recover(&mut self, power: bool, cx: &mut Context) {
        if let Some((host, driver)) = &mut self.coordinator {
            host.restart(power, cx);
            *driver = driver::Driver::new(self.id, &cx.plan);
        }
        for (host, driver) in self.shards.values_mut() {
            host.restart(power, cx);
            *driver = shard::Driver::default();
        }
    }

    /// The disk becomes slow, because of a fault, or is well again.
    pub fn slow_disk(&mut self, fault: usize, slow: Option<Time>) {
        match slow {
            Some(slow) => self.disk.slow.insert(fault, slow),
            None => self.disk.slow.remove(&fault),
        };
    }

    /// Whether nothing is on its way to the disk.
    pub fn disk_rests(&self) -> bool {
        self.disk.waiting.is_empty() && self.disk.syncing.is_empty()
    }

    fn shard(&mut self, group: GroupId) -> &mut (Host<Shard>, shard::Driver) {
        self.shards.get_mut(&ShardId(group.0)).expect("only hosted groups are named")
    }

    /// The machine's clock, in microseconds.
    fn wall(&self, cx: &Context) -> u64 {
        (START.0 * 1000 + cx.now).saturating_add_signed(self.skew_ms * 1000)
    }

    /// Something of this node is due.
    pub fn due(&mut self, timer: Timer, cx: &mut Context) {
        let (id, life) = (self.id, self.life);
        match timer {
            Timer::Synced => self.synced(cx),
            Timer::Raft(group) => {
                let writes = match (group, &mut self.coordinator) {
                    (GroupId::COORDINATOR, Some((host, _))) => host.tick(cx),
                    _ => self.shard(group).0.tick(cx),
                };
                self.tend(group, writes, cx);
            }
            Timer::Drive(group) => self.drive(group, cx),
            Timer::Tick => {
                cx.timer(cx.now + driver::TICK, id, life, Timer::Tick);
                if let Some((_, driver)) = &mut self.coordinator {
                    driver.inbox.push(Arrival::Tick);
                    self.drive(GroupId::COORDINATOR, cx);
                }
            }
            Timer::ShardTick(shard) => {
                cx.timer(cx.now + shard::TICK, id, life, Timer::ShardTick(shard));
                let wall = self.wall(cx) / 1000;
                let (host, driver) = self.shard(shard.group());
                driver.tick(host, wall, cx);
            }
            Timer::Call(call) => self.hand_in(call, cx),
        }
    }

    /// One round of a driver.
    fn drive(&mut self, group: GroupId, cx: &mut Context) {
        let wall = self.wall(cx);
        let writes = match (group, &mut self.coordinator) {
            (GroupId::COORDINATOR, Some((host, driver))) => driver.round(host, wall, cx),
            _ => {
                let (host, driver) = self.shard(group);
                driver.round(host, wall / 1000, cx)
            }
        };
        self.tend(group, writes, cx);
    }

    /// Sees to what a replica wants: writes, its clock, its driver.
    fn tend(&mut self, group: GroupId, writes: Vec<Write>, cx: &mut Context) {
        let (id, life) = (self.id, self.life);
        self.disk.waiting.extend(writes.into_iter().map(|write| (group, write)));
        self.begin_sync(cx);
        let (tick, wake) = match (group, &mut self.coordinator) {
            (GroupId::COORDINATOR, Some((host, driver))) => {
                let wanted = !host.outcomes.is_empty()
                    || driver.reign().is_some_and(|reign| reign.confirms(host))
                    || !driver.inbox.is_empty();
                let wake = wanted && !driver.woken;
                driver.woken |= wake;
                (host.next_tick(cx.now), wake)
            }
            _ => {
                let (host, driver) = self.shard(group);
                let wanted = !host.outcomes.is_empty() || driver.wants_a_round(host, cx);
                let wake = wanted && !driver.woken;
                driver.woken |= wake;
                (host.next_tick(cx.now), wake)
            }
        };
        if let Some(at) = tick {
            cx.timer(at, id, life, Timer::Raft(group));
        }
        if wake {
            let at = cx.now + cx.random.range(5, 150);
            cx.timer(at, id, life, Timer::Drive(group));
        }
    }

    fn begin_sync(&mut self, cx: &mut Context) {
        if self.disk.waiting.is_empty() || !self.disk.syncing.is_empty() {
            return;
        }
        self.disk.syncing = std::mem::take(&mut self.disk.waiting);
        let (low, high) = cx.plan.settings.sync;
        let mut takes = cx.random.range(low, high);
        if let Some(slow) = self.disk.slow.values().max() {
            cx.tally.count(Fired::SlowSync);
            takes += cx.random.range(slow / 2, *slow);
        }
        cx.timer(cx.now + takes, self.id, self.life, Timer::Synced);
    }

    fn synced(&mut self, cx: &mut Context) {
        let synced = std::mem::take(&mut self.disk.syncing);
        let mut touched = Vec::new();
        for (group, write) in synced {
            let writes = match (group, &mut self.coordinator) {
                (GroupId::COORDINATOR, Some((host, _))) => host.synced(write, cx),
                _ => self.shard(group).0.synced(write, cx),
            };
            self.disk.waiting.extend(writes.into_iter().map(|write| (group, write)));
            if !touched.contains(&group) {
                touched.push(group);
            }
        }
        for group in touched {
            self.tend(group, Vec::new(), cx);
        }
    }

    /// A packet has come.
    pub fn take(&mut self, from: Place, packet: Packet, cx: &mut Context) {
        match (from, packet) {
            (Place::Node(node), Packet::Raft(group, message)) => {
                let writes = match (group, &mut self.coordinator) {
                    (GroupId::COORDINATOR, Some((host, _))) => host.take(node, message, cx),
                    _ => self.shard(group).0.take(node, message, cx),
                };
                self.tend(group, writes, cx);
            }
            (Place::Node(node), Packet::ToShard { shard, stream, message, reads }) => {
                cx.trace.line(cx.now, || {
                    let reads =
                        if reads.is_empty() { String::new() } else { format!(", {} reads", reads.len()) };
                    format!(
                        "n{} shard {shard} gets from n{node}: {}{reads}",
                        self.id,
                        show::to_shard(&message)
                    )
                });
                match self.shards.get_mut(&shard) {
                    Some((_, driver)) => {
                        driver.arrive(stream, message, reads, cx);
                        self.tend(shard.group(), Vec::new(), cx);
                    }
                    None => {
                        let told = crate::messages::Told::NotLeader(None);
                        let packet = Packet::FromShard { shard, epoch: stream.epoch, told };
                        cx.send(Place::Node(self.id), from, packet);
                    }
                }
            }
            (Place::Node(node), Packet::FromShard { shard, epoch, told }) => {
                self.arrive(Arrival::Said(node, shard, epoch, told), cx);
            }
            (_, Packet::Broken(node)) => self.arrive(Arrival::Broken(node), cx),
            (Place::Node(node), Packet::Forward { call, question }) => {
                let caller = driver::Caller { node, call };
                if self.coordinator.is_some() {
                    self.arrive(Arrival::Request(caller, question), cx);
                } else {
                    let reply = Err(crate::messages::NotServed::NotLeader);
                    cx.send(Place::Node(self.id), from, Packet::Served { call, reply });
                }
            }
            (Place::Node(_), Packet::Served { call, reply }) => {
                self.gateway.served(call, reply, self.id, self.life, cx);
            }
            (Place::Client(client), Packet::Call { request, question }) => {
                self.call(client, request, question, cx);
            }
            (from, packet) => unreachable!("{from} never sends {packet:?}"),
        }
    }

    fn arrive(&mut self, arrival: Arrival, cx: &mut Context) {
        if let Some((_, driver)) = &mut self.coordinator {
            driver.inbox.push(arrival);
            self.tend(GroupId::COORDINATOR, Vec::new(), cx);
        }
    }

    fn call(&mut self, client: u32, request: u64, question: Question, cx: &mut Context) {
        let known = match &question {
            Question::Query { id, .. } => self.decision(*id),
            Question::Submit { .. } | Question::Read { .. } | Question::History { .. } => None,
        };
        let call = self.gateway.take(self.life, client, request, question, cx.now);
        match known {
            // Rule R7: a recorded decision never changes, so any replica may tell it.
            Some(reply) => self.gateway.answer(call, self.id, Answer::Told(reply), cx),
            None => self.hand_in(call, cx),
        }
    }

    fn decision(&self, id: BatchId) -> Option<Reply> {
        let (host, _) = self.coordinator.as_ref()?;
        host.machine.decision(&host.store, id).expect("memory doesn't fail").map(Reply::Decided)
    }

    fn hand_in(&mut self, call: u64, cx: &mut Context) {
        let leader = self.coordinator.as_ref().and_then(|(host, _)| host.raft.leader);
        if let Handed::Here(caller, question) = self.gateway.hand_in(call, self.id, self.life, leader, cx) {
            self.arrive(Arrival::Request(caller, question), cx);
        }
    }

    /// Makes a snapshot of a group, if there is something new.
    pub fn snapshot(&mut self, group: GroupId, cx: &mut Context) {
        let writes = match (group, &mut self.coordinator) {
            (GroupId::COORDINATOR, Some((host, _))) => host.snapshot(cx),
            _ => self.shard(group).0.snapshot(cx),
        };
        if let Some(writes) = writes {
            cx.tally.count(Fired::Snapshot);
            self.tend(group, writes, cx);
        }
    }

    /// Hands the leadership of a group over, if this node has it.
    pub fn hand_over(&mut self, group: GroupId, to: NodeId, cx: &mut Context) {
        let began = match (group, &mut self.coordinator) {
            (GroupId::COORDINATOR, Some((host, _))) => host.hand_over(to, cx),
            _ => self.shard(group).0.hand_over(to, cx),
        };
        if began {
            cx.tally.count(Fired::HandOver);
        }
    }

    /// The term in which this node believes to lead a group.
    pub fn leads(&self, group: GroupId) -> Option<u64> {
        let raft = match (group, &self.coordinator) {
            (GroupId::COORDINATOR, Some((host, _))) => &host.raft,
            _ => &self.shards.get(&ShardId(group.0))?.0.raft,
        };
        raft.leads().then_some(raft.term)
    }
}
