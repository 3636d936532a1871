//! The driver of one shard on one node, as `participant/src/driver.rs` and `reads.rs` have it: everything that has arrived becomes one
//! entry, every answer goes to the present stream of the coordinators, and a read is answered after a confirmation of its own.

use std::collections::{BTreeMap, VecDeque};

use verdict_protocol::{
    ids::{Epoch, GroupId, Millis, NodeId, ShardId},
    machine::encode,
    merge::merge,
    messages::{FromShard, ShardRead, ToShard, VoteKind},
    shard::{Shard, ShardEntry},
    show,
};

use crate::{
    context::Context,
    faults::Fired,
    host::{Host, Outcome},
    messages::{Packet, Place, Stream, Told},
    raft::{Barrier, Confirmation, Time, Write},
    witness::Seen,
};

/// How often the driver looks for what is overdue.
pub const TICK: Time = 1_000_000;
/// Messages that one entry takes.
const ENTRY_MESSAGES_MAX: usize = 1024;
const BARRIER_PATIENCE: Time = 3_000_000;
const READ_PATIENCE: Time = 10_000_000;
const ASK_AFTER_MS: u64 = 2_000;
const ASKS_MAX: usize = 100;
const READS_WAITING_MAX: usize = 1_000;

struct Read {
    stream: Stream,
    request: u64,
    read: ShardRead,
}

/// The driver. Nothing of it survives a crash.
#[derive(Default)]
pub struct Driver {
    /// A round is due.
    pub woken: bool,
    arrived: Vec<(Stream, ToShard)>,
    entries: usize,
    /// The stream of the highest epoch seen: it gets the answers.
    current: Option<Stream>,
    /// Every node from which a coordinator's leader has spoken, with its last epoch.
    open: BTreeMap<NodeId, Epoch>,
    told: Option<NodeId>,
    reads: Vec<Read>,
    confirming: Option<(Barrier, Time, Vec<Read>)>,
    waiting: VecDeque<(Time, Read)>,
}

impl Driver {
    /// A message has come. If too many wait it is dropped: the coordinator sends again.
    pub fn arrive(
        &mut self,
        stream: Stream,
        message: ToShard,
        reads: Vec<(u64, ShardRead)>,
        cx: &mut Context,
    ) {
        let room = cx.narrow.map_or(cx.plan.settings.arrivals_max, |narrow| narrow.1);
        for (request, read) in reads {
            self.reads.push(Read { stream, request, read });
        }
        if message.is_empty() {
            return;
        }
        if self.arrived.len() >= room {
            cx.tally.count(Fired::QueueFull);
            return;
        }
        self.arrived.push((stream, message));
    }

    /// One round. `wall` is the machine's clock in milliseconds. Gives what is to be written.
    pub fn round(&mut self, host: &mut Host<Shard>, wall: u64, cx: &mut Context) -> Vec<Write> {
        self.woken = false;
        let mut writes = Vec::new();
        let applied = self.answer(host, cx);
        self.tell_leadership(host, cx);
        if !self.arrived.is_empty() && self.entries < cx.plan.settings.entries_in_flight_max {
            let most = self.arrived.len().min(ENTRY_MESSAGES_MAX);
            let taken: Vec<_> = self.arrived.drain(..most).collect();
            self.note_streams(&taken);
            writes.extend(self.propose(taken, host, wall, cx));
        }
        self.look_at_barrier(host, cx);
        if applied {
            self.look_again(host, cx);
        }
        writes
    }

    fn note_streams(&mut self, taken: &[(Stream, ToShard)]) {
        for (stream, _) in taken {
            self.current = self.current.max(Some(*stream));
            let epoch = self.open.entry(stream.node).or_default();
            *epoch = stream.epoch.max(*epoch);
        }
    }

    fn propose(
        &mut self,
        taken: Vec<(Stream, ToShard)>,
        host: &mut Host<Shard>,
        wall: u64,
        cx: &mut Context,
    ) -> Vec<Write> {
        let streams: Vec<Stream> = taken.iter().map(|(stream, _)| *stream).collect();
        if host.raft.leader == Some(host.node()) {
            let parts_max = cx.narrow.map_or(cx.plan.settings.parts_max, |narrow| narrow.0);
            let messages = merge(taken.into_iter().map(|(_, message)| message));
            let entry = ShardEntry { now: Millis(wall), parts_max, messages };
            if let Some(writes) = host.propose(encode(&entry), cx) {
                self.entries += 1;
                return writes;
            }
        }
        let hint = host.raft.leader;
        for stream in streams {
            self.say(stream, Told::NotLeader(hint), host, cx);
        }
        Vec::new()
    }

    /// Tells the answers of what was applied. Gives whether there was any.
    fn answer(&mut self, host: &mut Host<Shard>, cx: &mut Context) -> bool {
        let outcomes = std::mem::take(&mut host.outcomes);
        let some = !outcomes.is_empty();
        for outcome in outcomes {
            self.entries -= 1;
            let Outcome::Applied(_, reply) = outcome else { continue };
            for text in &reply.alarms {
                cx.witness.see(cx.now, &Seen::Alarm { group: host.group, text });
            }
            for (coordinator, message) in reply.messages {
                assert_eq!(coordinator, GroupId::COORDINATOR, "there is one coordinator group");
                let refused = message.votes.iter().filter(|vote| vote.kind == VoteKind::Overloaded);
                refused.for_each(|_| cx.tally.count(Fired::Overloaded));
                if let Some(stream) = self.current {
                    self.say(stream, Told::Message(message), host, cx);
                }
            }
        }
        some
    }

    fn say(&self, stream: Stream, told: Told, host: &Host<Shard>, cx: &mut Context) {
        let shard = ShardId(host.group.0);
        cx.trace.line(cx.now, || {
            let text = match &told {
                Told::Message(message) => show::from_shard(message),
                Told::Answers(answers) => format!("{} answers to reads", answers.len()),
                Told::NotLeader(hint) => format!("not leader, hint {hint:?}"),
            };
            format!("n{} shard {shard} to n{}: {text}", host.node(), stream.node)
        });
        let packet = Packet::FromShard { shard, epoch: stream.epoch, told };
        cx.send(Place::Node(host.node()), Place::Node(stream.node), packet);
    }

    /// Tells all coordinators when this replica has stopped leading, and when it learns who leads instead.
    fn tell_leadership(&mut self, host: &Host<Shard>, cx: &mut Context) {
        let leader = host.raft.leader;
        let before = std::mem::replace(&mut self.told, leader);
        if leader == before || leader == Some(host.node()) {
            return;
        }
        if before == Some(host.node()) || leader.is_some() {
            for (node, epoch) in &self.open {
                self.say(Stream { epoch: *epoch, node: *node }, Told::NotLeader(leader), host, cx);
            }
        }
    }

    /// Asks about parts that have been in doubt for long, and looks at reads that wait.
    pub fn tick(&mut self, host: &Host<Shard>, wall: u64, cx: &mut Context) {
        self.look_again(host, cx);
        let Some(stream) = self.current.filter(|_| host.raft.serves(cx.now)) else { return };
        let before = Millis(wall.saturating_sub(ASK_AFTER_MS));
        let held = host.machine.held();
        let long = held.filter(|held| held.part.vote == VoteKind::Yes && held.since < before);
        let asks: Vec<_> = long.take(ASKS_MAX).map(|held| held.part).collect();
        if !asks.is_empty() {
            self.say(stream, Told::Message(FromShard { asks, ..FromShard::default() }), host, cx);
        }
    }

    fn look_at_barrier(&mut self, host: &mut Host<Shard>, cx: &mut Context) {
        if let Some((barrier, since, reads)) = self.confirming.take() {
            match host.confirmation(barrier) {
                Confirmation::Pending if cx.now <= since + BARRIER_PATIENCE => {
                    self.confirming = Some((barrier, since, reads));
                }
                // The coordinator asks again.
                Confirmation::Pending => {}
                Confirmation::Deposed => self.refuse(&reads, host, cx),
                Confirmation::Confirmed => {
                    let reads = reads.into_iter().map(|read| (cx.now, read)).collect();
                    self.serve(reads, host, cx);
                }
            }
        }
        if self.confirming.is_none() && !self.reads.is_empty() {
            let reads = std::mem::take(&mut self.reads);
            match host.barrier(cx) {
                Some(barrier) => self.confirming = Some((barrier, cx.now, reads)),
                None => self.refuse(&reads, host, cx),
            }
        }
    }

    fn refuse(&self, reads: &[Read], host: &Host<Shard>, cx: &mut Context) {
        let hint = host.raft.leader.filter(|leader| *leader != host.node());
        for read in reads {
            self.say(read.stream, Told::NotLeader(hint), host, cx);
        }
    }

    fn look_again(&mut self, host: &Host<Shard>, cx: &mut Context) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|(since, _)| cx.now < since + READ_PATIENCE);
        self.serve(waiting, host, cx);
    }

    fn serve(&mut self, reads: VecDeque<(Time, Read)>, host: &Host<Shard>, cx: &mut Context) {
        for (since, read) in reads {
            let looked = host.machine.read(&host.store, GroupId::COORDINATOR, &read.read);
            match looked.expect("memory doesn't fail") {
                Some(answer) => {
                    self.say(read.stream, Told::Answers(vec![(read.request, answer)]), host, cx);
                }
                None if self.waiting.len() < READS_WAITING_MAX => self.waiting.push_back((since, read)),
                None => {}
            }
        }
    }

    fn confirms(&self, host: &Host<Shard>) -> bool {
        let done = |(barrier, _, _): &(Barrier, Time, Vec<Read>)| {
            host.confirmation(*barrier) != Confirmation::Pending
        };
        self.confirming.as_ref().is_some_and(done)
    }

    /// Whether there is something to do.
    pub fn wants_a_round(&self, host: &Host<Shard>, cx: &Context) -> bool {
        let room = self.entries < cx.plan.settings.entries_in_flight_max;
        (room && !self.arrived.is_empty())
            || self.confirms(host)
            || (self.confirming.is_none() && !self.reads.is_empty())
            || self.told != host.raft.leader
    }
}
