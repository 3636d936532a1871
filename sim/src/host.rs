//! A replica of one group on one node: the model of Raft, the shipped state machine, and what a crash leaves of them.
//!
//! The log and the vote are synced before they are spoken of. The machine's state is not: after a crash it is found as it was after any of
//! the flushes since the newest snapshot, or as the snapshot has it, and the log is applied again from there.

use std::{collections::BTreeMap, rc::Rc};

use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::{self, Machine},
    store::MemoryStore,
};

use crate::{
    context::{Context, Timer},
    faults::Fired,
    messages::{Packet, Place},
    raft::{Barrier, Confirmation, Durable, Message, Out, Raft, Seat, Snapshot, Time, Write},
    witness::{Seen, Watched},
};

/// What has become of a proposal.
#[derive(Debug)]
pub enum Outcome<R> {
    /// It is applied, at this index.
    Applied(u64, R),
    /// It may be applied, now or later, or never.
    Unknown,
}

/// One replica.
pub struct Host<M: Machine> {
    /// The group.
    pub group: GroupId,
    /// The replica's Raft.
    pub raft: Raft,
    /// The machine.
    pub machine: M,
    /// Its state.
    pub store: MemoryStore,
    /// What is on the disk.
    pub durable: Durable,
    /// Outcomes that the driver has not taken yet, in the order of the proposals.
    pub outcomes: Vec<Outcome<M::Reply>>,
    seat: Seat,
    config: M::Config,
    /// What the database holds.
    flushed: Rc<Snapshot>,
    /// What it held after earlier flushes, of those that a crash may leave: it has no log, so what is not in a table yet is gone.
    flushed_before: Vec<Rc<Snapshot>>,
    /// Own proposals: index and term.
    proposals: BTreeMap<u64, u64>,
    timer_at: Time,
}

impl<M: Machine + Watched> Host<M> {
    /// A replica with an empty disk.
    pub fn new(group: GroupId, seat: Seat, config: M::Config, cx: &mut Context) -> Host<M> {
        let store = MemoryStore::default();
        let machine = M::open(&config, &store).expect("memory doesn't fail");
        let durable = Durable::default();
        let raft = Raft::start(seat.clone(), &durable, 0, cx.now, &mut cx.random);
        let flushed = Rc::new(Snapshot { index: 0, term: 0, state: store.clone() });
        Host {
            group,
            raft,
            machine,
            store,
            durable,
            outcomes: Vec::new(),
            seat,
            config,
            flushed_before: Vec::new(),
            flushed,
            proposals: BTreeMap::new(),
            timer_at: 0,
        }
    }

    /// Starts again from what is on the disk: the state as some flush left it.
    pub fn restart(&mut self, power: bool, cx: &mut Context) {
        let lost = cx.random.chance(5_000);
        if power && !lost && cx.random.chance(5_000) {
            // The database happens to have written all that is applied, though the log may not have.
            self.flush_all();
        }
        let flushed = match &self.flushed_before[..] {
            before @ [_, ..] if lost => cx.random.pick(before),
            _ => &self.flushed,
        };
        let found = match &self.durable.snapshot {
            Some(snapshot) if snapshot.index > flushed.index => snapshot.clone(),
            _ => flushed.clone(),
        };
        if found.index < self.raft.applied {
            cx.tally.count(Fired::StateRewound);
        }
        if found.index > self.durable.log.last().0 {
            cx.tally.count(Fired::LogBehindState);
        }
        self.durable.begin_behind((found.index, found.term));
        self.store = found.state.clone();
        self.machine = M::open(&self.config, &self.store).expect("memory doesn't fail");
        (self.flushed, self.flushed_before) = (found.clone(), Vec::new());
        self.raft = Raft::start(self.seat.clone(), &self.durable, found.index, cx.now, &mut cx.random);
        self.proposals.clear();
        self.outcomes.clear();
        self.timer_at = 0;
        let seen = M::opened(self.group, self.seat.id, &self.machine, &self.store);
        cx.witness.see(cx.now, &seen);
    }

    /// Whether its Raft's clock has to be looked at, by this timer.
    pub fn tick(&mut self, cx: &mut Context) -> Vec<Write> {
        self.timer_at = 0;
        let mut out = Out::default();
        self.raft.tick(cx.now, &mut cx.random, &mut out);
        self.perform(out, cx)
    }

    /// Sees to it that the clock is looked at again. Gives the time if a timer is to be set.
    pub fn next_tick(&mut self, now: Time) -> Option<Time> {
        let at = self.raft.wakes_at().max(now + 1);
        let missing = self.timer_at <= now || at < self.timer_at;
        missing.then(|| {
            self.timer_at = at;
            at
        })
    }

    /// A message of another replica.
    pub fn take(&mut self, from: NodeId, message: Message, cx: &mut Context) -> Vec<Write> {
        let mut out = Out::default();
        self.raft.take(from, message, cx.now, &mut cx.random, &mut out);
        self.perform(out, cx)
    }

    /// The disk has synced one write.
    pub fn synced(&mut self, write: Write, cx: &mut Context) -> Vec<Write> {
        self.durable.take(write);
        let mut out = Out::default();
        self.raft.synced(&mut out);
        self.perform(out, cx)
    }

    /// Proposes a command. No: this replica doesn't lead.
    pub fn propose(&mut self, command: Vec<u8>, cx: &mut Context) -> Option<Vec<Write>> {
        let mut out = Out::default();
        let (index, term) = self.raft.propose(command, &mut out)?;
        self.proposals.insert(index, term);
        Some(self.perform(out, cx))
    }

    /// Drops what is awaited: whoever proposed it is gone.
    pub fn forget_proposals(&mut self) {
        self.proposals.clear();
        self.outcomes.clear();
    }

    /// Asks for a confirmation of the leadership.
    pub fn barrier(&mut self, cx: &mut Context) -> Option<Barrier> {
        let mut out = Out::default();
        let barrier = self.raft.barrier(&mut out)?;
        let writes = self.perform(out, cx);
        assert!(writes.is_empty(), "a barrier writes nothing");
        Some(barrier)
    }

    /// What has become of it.
    pub fn confirmation(&self, barrier: Barrier) -> Confirmation {
        self.raft.confirmation(barrier)
    }

    /// Hands the leadership over.
    pub fn hand_over(&mut self, to: NodeId, cx: &mut Context) -> bool {
        let mut out = Out::default();
        let began = self.raft.hand_over(to, &mut out);
        self.perform(out, cx);
        began
    }

    /// Makes a snapshot now. Nothing new: none.
    pub fn snapshot(&mut self, cx: &mut Context) -> Option<Vec<Write>> {
        let index = self.raft.applied;
        let newest = self.raft.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
        if index <= newest {
            return None;
        }
        let term = self.raft.log.term_at(index).expect("what was just applied is in the log");
        self.flush(index, term);
        let snapshot = self.flushed.clone();
        let before = self.raft.log.base.0;
        let mut out = Out::default();
        self.raft.keep_snapshot(snapshot, cx.plan.settings.keep_entries, &mut out);
        if self.raft.log.base.0 > before {
            cx.tally.count(Fired::LogCut);
        }
        Some(self.perform(out, cx))
    }

    /// Does what a step wants, and applies what is committed. Gives what is to be written.
    fn perform(&mut self, out: Out, cx: &mut Context) -> Vec<Write> {
        let id = self.seat.id;
        if out.elected {
            cx.trace.line(cx.now, || format!("n{id} leads group {} in term {}", self.group, self.raft.term));
            let seen =
                Seen::Elected { group: self.group, term: self.raft.term, node: id, log: &self.raft.log };
            cx.witness.see(cx.now, &seen);
        }
        for (to, message) in out.sends {
            let candidate = match &message {
                Message::Vote { granted: true, .. } => Some(to),
                Message::RequestVote { .. } => Some(id),
                _ => None,
            };
            if let Some(candidate) = candidate {
                let (group, term) = (self.group, message.term());
                cx.witness.see(cx.now, &Seen::Voted { group, term, voter: id, candidate });
            }
            cx.send(Place::Node(id), Place::Node(to), Packet::Raft(self.group, message));
        }
        if let Some(snapshot) = out.install {
            self.install(&snapshot, cx);
        }
        self.give_up_what_was_cut();
        self.apply(cx);
        let mut writes = out.writes;
        let behind = self.raft.applied - self.raft.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
        if out.wants_snapshot || behind >= cx.plan.settings.snapshot_after {
            writes.extend(self.snapshot(cx).unwrap_or_default());
        }
        writes
    }

    fn install(&mut self, snapshot: &Snapshot, cx: &mut Context) {
        cx.tally.count(Fired::Install);
        cx.trace.line(cx.now, || {
            format!("n{} installs a snapshot of group {} at {}", self.seat.id, self.group, snapshot.index)
        });
        self.store = snapshot.state.clone();
        self.machine = M::open(&self.config, &self.store).expect("memory doesn't fail");
        self.flushed = Rc::new(snapshot.clone());
        self.flushed_before.clear();
        let gone = self.proposals.len();
        self.proposals.clear();
        self.outcomes.extend((0..gone).map(|_| Outcome::Unknown));
        let seen = M::opened(self.group, self.seat.id, &self.machine, &self.store);
        cx.witness.see(cx.now, &seen);
    }

    /// Whoever waits for an entry that was cut off the log is told.
    fn give_up_what_was_cut(&mut self) {
        let (before, log) = (self.proposals.len(), &self.raft.log);
        self.proposals.retain(|index, term| log.term_at(*index) == Some(*term));
        self.outcomes.extend((self.proposals.len()..before).map(|_| Outcome::Unknown));
    }

    fn apply(&mut self, cx: &mut Context) {
        let led = self.raft.leads();
        if led && self.raft.commit > self.raft.applied {
            let (group, term, index) = (self.group, self.raft.term, self.raft.commit);
            cx.witness.see(cx.now, &Seen::Committed { group, term, index });
        }
        while self.raft.applied < self.raft.commit {
            let index = self.raft.applied + 1;
            let entry = self.raft.log.get(index).expect("what is committed is in the log").clone();
            self.raft.applied = index;
            let seen = Seen::Entry { group: self.group, node: self.seat.id, index, entry: &entry };
            cx.witness.see(cx.now, &seen);
            let proposed = self.proposals.remove(&index);
            if entry.command.is_empty() {
                self.outcomes.extend(proposed.map(|_| Outcome::Unknown));
                continue;
            }
            let reply = machine::apply(&mut self.machine, &mut self.store, index, &entry.command)
                .expect("memory doesn't fail");
            // Of what nobody needs in memory, each keeps all, a little or nothing.
            self.machine.trim([0, 2_000, usize::MAX][((index + self.seat.id.0) % 3) as usize]);
            let position = machine::position(&self.store).expect("memory doesn't fail");
            cx.trace.mix(index);
            cx.trace.mix(u64::from_le_bytes(position.hash[..8].try_into().expect("eight bytes")));
            M::watch(self, index, &entry.command, &reply, position, cx);
            if proposed == Some(entry.term) {
                self.outcomes.push(Outcome::Applied(index, reply));
            } else if proposed.is_some() {
                self.outcomes.push(Outcome::Unknown);
            }
            // Each replica at other places.
            if index >= self.flushed.index + cx.plan.settings.flush_after + 3 * self.seat.id.0 {
                self.flush(index, entry.term);
            }
        }
    }

    /// Brings all that is applied to the database.
    pub fn flush_all(&mut self) {
        let index = self.raft.applied;
        self.flush(index, self.raft.log.term_at(index).unwrap_or(0));
    }

    /// The same, up to the entry that was applied last.
    fn flush(&mut self, index: u64, term: u64) {
        self.machine.flush(&mut self.store).expect("memory doesn't fail");
        let now = Rc::new(Snapshot { index, term, state: self.store.clone() });
        let durable = self.durable.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
        self.flushed_before.retain(|before| before.index >= durable);
        self.flushed_before.push(std::mem::replace(&mut self.flushed, now));
    }

    /// The node of the replica.
    pub fn node(&self) -> NodeId {
        self.seat.id
    }

    /// The timer of the replica's Raft.
    pub fn timer(&self) -> Timer {
        Timer::Raft(self.group)
    }
}
