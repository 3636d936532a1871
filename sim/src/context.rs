//! What surrounds the nodes: virtual time, the queue of events, the network, chance, and the witness that sees everything.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use verdict_protocol::ids::{GroupId, NodeId, ShardId};

use crate::{
    faults::{Fired, Tally},
    messages::{Packet, Place},
    plan::Plan,
    raft::Time,
    random::Random,
    trace::Trace,
    witness::Witness,
};

/// Something that happens at its time.
#[derive(Clone, Debug)]
pub enum Event {
    /// A packet arrives.
    Deliver {
        /// From here.
        from: Place,
        /// Here.
        to: Place,
        /// What.
        packet: Packet,
        /// Its place among all that was sent this way, and whether it was held up.
        order: (u64, bool),
    },
    /// Something of a node is due, if the node has not been started again since.
    Timer {
        /// The node.
        node: NodeId,
        /// Which of its lives.
        life: u64,
        /// What.
        timer: Timer,
    },
    /// A client does something.
    Client {
        /// Which.
        client: u32,
        /// Its own count of what it waits for.
        wake: u64,
    },
    /// A fault of the plan begins.
    Fault(usize),
    /// It ends.
    FaultEnds(usize),
    /// A node starts again.
    Start(NodeId),
    /// A node goes on.
    Resume(NodeId),
    /// The world is looked at.
    Look,
}

/// What can be due at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// The disk has synced what was handed to it.
    Synced,
    /// A Raft replica's clock.
    Raft(GroupId),
    /// A driver has something to do.
    Drive(GroupId),
    /// The coordinator's leader looks at its clock.
    Tick,
    /// A shard's driver looks for what is overdue.
    ShardTick(ShardId),
    /// A call at the gateway is handed in again.
    Call(u64),
}

/// The network: what is cut, and what goes wrong by chance.
#[derive(Debug, Default)]
pub struct Network {
    /// Links on which nothing arrives, with how often they were cut, and of these how often one way only.
    pub cut: BTreeMap<(NodeId, NodeId), (u32, u32)>,
    /// Replicas whose Raft messages are lost, while all else arrives, by fault.
    pub deaf: BTreeMap<usize, (GroupId, NodeId)>,
    /// Shards that the coordinators' leader and they don't hear each other, by fault: whether what they are told is lost, and what they say.
    pub severed: BTreeMap<usize, (ShardId, bool, bool)>,
    /// Periods in which messages go wrong, by fault: lost, repeated, delayed, delay in milliseconds.
    pub wrong: BTreeMap<usize, (u64, u64, u64, u64)>,
    /// The last packet sent, and the last one delivered, on each link.
    sent: BTreeMap<(Place, Place), (u64, u64)>,
}

/// All that nodes and clients act upon.
pub struct Context {
    /// Virtual time.
    pub now: Time,
    /// All chance.
    pub random: Random,
    /// The plan.
    pub plan: Plan,
    /// The network.
    pub network: Network,
    /// Faults that really happened.
    pub tally: Tally,
    /// What is told to the reader, and the hash of all that happened.
    pub trace: Trace,
    /// Checks everything.
    pub witness: Witness,
    /// Shards are narrow at present: parts and messages.
    pub narrow: Option<(u32, usize)>,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
    epoch: Instant,
}

impl Context {
    /// Nothing has happened yet.
    pub fn new(plan: Plan, trace: Trace) -> Context {
        Context {
            now: 0,
            random: Random::new(plan.seed ^ 0x5eed),
            network: Network::default(),
            tally: Tally::default(),
            trace,
            witness: Witness::new(&plan),
            narrow: None,
            queue: BTreeMap::new(),
            serial: 0,
            epoch: Instant::now(),
            plan,
        }
    }

    /// The next event, and time moves to it.
    pub fn next_event(&mut self) -> Option<Event> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now = at;
        Some(event)
    }

    /// Virtual time as the routes want it. Only differences are looked at.
    pub fn instant(&self) -> Instant {
        self.epoch + Duration::from_micros(self.now)
    }

    /// Puts an event into the queue.
    pub fn at(&mut self, at: Time, event: Event) {
        self.serial += 1;
        self.queue.insert((at.max(self.now), self.serial), event);
    }

    /// Puts an event of a node into the queue.
    pub fn timer(&mut self, at: Time, node: NodeId, life: u64, timer: Timer) {
        self.at(at, Event::Timer { node, life, timer });
    }

    /// Sends a packet: it arrives once, twice, late or never.
    pub fn send(&mut self, from: Place, to: Place, packet: Packet) {
        let (low, high) = self.plan.settings.latency;
        if from == to {
            return self.deliver(from, to, packet, 5, false);
        }
        if let (Place::Node(one), Place::Node(other)) = (from, to)
            && let Some((_, one_way)) = self.network.cut.get(&(one, other))
        {
            self.tally.count(if *one_way > 0 { Fired::CutOneWay } else { Fired::Cut });
            return;
        }
        if let (Place::Node(one), Place::Node(other), Packet::Raft(group, _)) = (from, to, &packet)
            && self.network.deaf.values().any(|deaf| deaf == &(*group, one) || deaf == &(*group, other))
        {
            self.tally.count(Fired::Deaf);
            return;
        }
        let is_severed = |(shard, told, says): &(ShardId, bool, bool)| match &packet {
            Packet::ToShard { shard: to, .. } => *told && to == shard,
            Packet::FromShard { shard: from, .. } => *says && from == shard,
            _ => false,
        };
        if self.network.severed.values().any(is_severed) {
            self.tally.count(Fired::Severed);
            return;
        }
        // Mostly fast, sometimes not.
        let latency = if self.random.chance(9_000) {
            self.random.range(low, low * 3)
        } else {
            self.random.range(low, high)
        };
        let (mut lost, mut repeated, mut delayed, mut delay_ms) = (0, 0, 0, 0);
        for wrong in self.network.wrong.values() {
            lost = wrong.0.max(lost);
            repeated = wrong.1.max(repeated);
            delayed = wrong.2.max(delayed);
            delay_ms = wrong.3.max(delay_ms);
        }
        if lost + repeated + delayed == 0 {
            return self.deliver(from, to, packet, latency, false);
        }
        if self.random.chance(lost) {
            self.tally.count(Fired::Lost);
            return;
        }
        let late = self.random.chance(delayed);
        // A call, of a client or of a node that hands it on, arrives once, and so does its answer, as over TCP. Whoever makes it twice knows
        // that it did.
        let once = matches!(packet, Packet::Call { .. } | Packet::Forward { .. } | Packet::Answer { .. });
        if self.random.chance(repeated) && !once {
            self.tally.count(Fired::Repeated);
            let again = latency + self.random.range(0, 1_000 * delay_ms);
            self.deliver(from, to, packet.clone(), again, true);
        }
        let extra = if late {
            self.tally.count(Fired::Delayed);
            self.random.range(high, 1_000 * delay_ms.max(1) + high)
        } else {
            0
        };
        self.deliver(from, to, packet, latency + extra, late);
    }

    fn deliver(&mut self, from: Place, to: Place, packet: Packet, latency: Time, late: bool) {
        let link = self.network.sent.entry((from, to)).or_default();
        link.0 += 1;
        let order = (link.0, late);
        self.at(self.now + latency, Event::Deliver { from, to, packet, order });
    }

    /// What was held up arrives now, in any order.
    pub fn hurry(&mut self) {
        let late = |event: &Event| matches!(event, Event::Deliver { order: (_, true), .. });
        let keys: Vec<_> = self.queue.iter().filter(|(_, event)| late(event)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(event) = self.queue.remove(&key) {
                let at = self.now + self.random.range(1, 20_000);
                self.at(at, event);
            }
        }
    }

    /// A packet arrives: counts it if it was held up and others have overtaken it.
    pub fn arrived(&mut self, from: Place, to: Place, order: (u64, bool)) {
        let link = self.network.sent.entry((from, to)).or_default();
        if order.0 < link.1 && order.1 {
            self.tally.count(Fired::Overtaken);
        }
        link.1 = link.1.max(order.0);
    }
}
