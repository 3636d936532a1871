//! A small Raft, as a model of what the `raft` crate promises (Ongaro and Ousterhout, "In Search of an Understandable Consensus
//! Algorithm", 2014): terms, votes, a replicated log, read barriers, hand-over of the leadership, snapshots.
//!
//! What must be durable comes out as [`Write`]s; a message that rests on them is held back until the disk has told that they are
//! synced ([`Raft::synced`]). A leader replicates before its own disk has an entry, and its own copy counts only once it is
//! synced. So what a crash may take away is exactly what nobody was told of, unless one of the `Defects` is put in.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use verdict_protocol::{ids::NodeId, store::MemoryStore};

use crate::random::Random;

/// Virtual time, in microseconds.
pub type Time = u64;

/// Entries that one message carries at most.
const ENTRIES_MAX: usize = 64;

/// Bugs that can be put into the model, to show that the checks find them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Defect {
    /// None.
    #[default]
    None,
    /// Votes and appended entries are acknowledged before they are synced.
    SyncForgotten,
    /// A leader commits what it alone has.
    CommitWithoutQuorum,
    /// A leader serves reads without confirming that it still leads.
    ReadWithoutQuorum,
    /// A candidate with a shorter log is voted for.
    VoteForShorterLog,
    /// A snapshot is installed without the state that it holds.
    SnapshotForgotten,
}

/// An entry of the log. One without a command is Raft's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The term of the leader that appended it.
    pub term: u64,
    /// The command.
    pub command: Rc<[u8]>,
}

/// The state of a machine at an index.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The index of the last entry in it.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
    /// The state.
    pub state: MemoryStore,
}

/// A log: what lies at or below its base has been cut off.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Index and term of the last entry that was cut off.
    pub base: (u64, u64),
    entries: VecDeque<Entry>,
}

impl Log {
    /// Index and term of the last entry.
    pub fn last(&self) -> (u64, u64) {
        let index = self.base.0 + self.entries.len() as u64;
        (index, self.entries.back().map_or(self.base.1, |entry| entry.term))
    }

    /// The entry at an index.
    pub fn get(&self, index: u64) -> Option<&Entry> {
        self.entries.get(index.checked_sub(self.base.0 + 1)? as usize)
    }

    /// The term of the entry at an index, if it is known.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base.0 { Some(self.base.1) } else { self.get(index).map(|entry| entry.term) }
    }

    /// How many entries are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no entry is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn append(&mut self, after: u64, entries: impl IntoIterator<Item = Entry>) {
        assert!(after >= self.base.0 && after <= self.last().0, "a log has no gap");
        self.entries.truncate((after - self.base.0) as usize);
        self.entries.extend(entries);
    }

    fn cut(&mut self, upto: u64) {
        if let Some(term) = self.term_at(upto).filter(|_| upto > self.base.0) {
            self.entries.drain(..(upto - self.base.0) as usize);
            self.base = (upto, term);
        }
    }

    /// Begins behind a snapshot. Entries behind it stay if they fit to it.
    fn begin_at(&mut self, index: u64, term: u64) {
        if self.term_at(index) == Some(term) && index >= self.base.0 {
            self.cut(index);
        } else {
            self.entries.clear();
            self.base = (index, term);
        }
    }

    fn from(&self, first: u64) -> Vec<Entry> {
        let skip = (first - self.base.0 - 1) as usize;
        self.entries.iter().skip(skip).take(ENTRIES_MAX).cloned().collect()
    }
}

/// What is to be written to the disk.
#[derive(Clone, Debug)]
pub enum Write {
    /// Term and vote.
    Vote {
        /// The term.
        term: u64,
        /// For whom this replica has voted in it.
        voted_for: Option<NodeId>,
    },
    /// Entries behind an index; what was there before is cut off.
    Append {
        /// The index.
        after: u64,
        /// The entries.
        entries: Vec<Entry>,
    },
    /// Cuts off the beginning of the log.
    Cut {
        /// The last index that goes.
        upto: u64,
    },
    /// A snapshot of the replica's own state.
    Snapshot(Rc<Snapshot>),
    /// A snapshot of the leader's: it takes the place of the state, and of the log up to it.
    Install(Rc<Snapshot>),
}

/// What a replica finds on its disk.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// The term.
    pub term: u64,
    /// The vote in it.
    pub voted_for: Option<NodeId>,
    /// The log.
    pub log: Log,
    /// The newest snapshot.
    pub snapshot: Option<Rc<Snapshot>>,
}

impl Durable {
    /// The log may end before what was applied, or hold there what never was committed: a leader applies what a majority of the others
    /// has on disk. Then it goes on behind what was applied.
    pub fn begin_behind(&mut self, applied: (u64, u64)) {
        if applied.0 > self.log.base.0 && self.log.term_at(applied.0) != Some(applied.1) {
            self.log.begin_at(applied.0, applied.1);
        }
    }

    /// A write has reached the disk.
    pub fn take(&mut self, write: Write) {
        match write {
            Write::Vote { term, voted_for } => (self.term, self.voted_for) = (term, voted_for),
            Write::Append { after, entries } => self.log.append(after, entries),
            Write::Cut { upto } => self.log.cut(upto),
            Write::Snapshot(snapshot) => self.snapshot = Some(snapshot),
            Write::Install(snapshot) => {
                self.log.begin_at(snapshot.index, snapshot.term);
                self.snapshot = Some(snapshot);
            }
        }
    }
}

/// What replicas say to each other. Each may come twice, late or never: an older term is ignored.
#[derive(Clone, Debug)]
pub enum Message {
    /// A candidate asks for a vote.
    RequestVote {
        /// Its term.
        term: u64,
        /// Index and term of its last entry.
        last: (u64, u64),
    },
    /// The answer.
    Vote {
        /// The term of who answers.
        term: u64,
        /// Yes or no.
        granted: bool,
    },
    /// A leader sends entries, or none.
    Append {
        /// Its term.
        term: u64,
        /// Index and term of the entry before.
        prev: (u64, u64),
        /// The entries.
        entries: Vec<Entry>,
        /// Up to where they are committed.
        commit: u64,
        /// The last read barrier that was asked for.
        round: u64,
    },
    /// The answer: up to where the logs are equal, or where to try again.
    Appended {
        /// The term of who answers.
        term: u64,
        /// The index up to which it has the leader's log; or an index to try from.
        matched: Result<u64, u64>,
        /// The read barrier of the message that is answered.
        round: u64,
    },
    /// A leader sends a snapshot instead of entries that it has no more.
    Install {
        /// Its term.
        term: u64,
        /// The snapshot.
        snapshot: Rc<Snapshot>,
        /// The last read barrier that was asked for.
        round: u64,
    },
    /// A leader asks a follower to take over.
    TakeOver {
        /// Its term.
        term: u64,
    },
}

impl Message {
    /// The term that it carries.
    pub fn term(&self) -> u64 {
        match self {
            Message::RequestVote { term, .. }
            | Message::Vote { term, .. }
            | Message::Append { term, .. }
            | Message::Appended { term, .. }
            | Message::Install { term, .. }
            | Message::TakeOver { term } => *term,
        }
    }
}

/// Intervals, in microseconds.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Timing {
    /// How often a leader tells that it lives.
    pub heartbeat: Time,
    /// A follower that hears nothing for this long stands for election...
    pub election_min: Time,
    /// ...or for at most this long.
    pub election_max: Time,
}

#[derive(Debug)]
enum Role {
    Follower,
    Candidate { votes: BTreeSet<NodeId> },
    Leader(Leading),
}

#[derive(Debug)]
struct Leading {
    peers: BTreeMap<NodeId, Peer>,
    /// The index of the first entry of this term.
    own_first: u64,
}

#[derive(Clone, Copy, Debug)]
struct Peer {
    next: u64,
    matched: u64,
    round: u64,
    heard_at: Time,
}

/// A confirmation of the leadership that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// The term in which it was asked for.
    pub term: u64,
    /// Confirmed when a majority has answered this round.
    pub round: u64,
    /// To be served once this is applied.
    pub index: u64,
}

/// What a barrier has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// Not yet.
    Pending,
    /// This replica led when it was asked for, and has applied all that was committed then.
    Confirmed,
    /// It doesn't lead, or in another term.
    Deposed,
}

/// What a step wants done.
#[derive(Debug, Default)]
pub struct Out {
    /// To be written, in this order.
    pub writes: Vec<Write>,
    /// To be sent.
    pub sends: Vec<(NodeId, Message)>,
    /// Set: take this state.
    pub install: Option<Rc<Snapshot>>,
    /// This replica has just become leader.
    pub elected: bool,
    /// A follower needs a snapshot, and there is none that is new enough.
    pub wants_snapshot: bool,
}

/// One replica.
#[derive(Debug)]
pub struct Raft {
    /// Who this is.
    pub id: NodeId,
    /// The current term.
    pub term: u64,
    /// The log as it is in memory.
    pub log: Log,
    /// Up to where entries are known to be committed.
    pub commit: u64,
    /// Up to where they are applied.
    pub applied: u64,
    /// The newest snapshot.
    pub snapshot: Option<Rc<Snapshot>>,
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    voters: Vec<NodeId>,
    voted_for: Option<NodeId>,
    role: Role,
    timing: Timing,
    defect: Defect,
    election_at: Time,
    heartbeat_at: Time,
    round: u64,
    written: u64,
    synced: u64,
    /// Appends on their way to the disk: serial, the index before, the last index.
    appends: VecDeque<(u64, u64, u64)>,
    synced_last: u64,
    /// Messages that rest on writes.
    unsent: VecDeque<(u64, NodeId, Message)>,
}

/// What a replica is and must know from the start.
#[derive(Clone, Debug)]
pub struct Seat {
    /// Who this is.
    pub id: NodeId,
    /// Everybody who votes, this one too.
    pub voters: Vec<NodeId>,
    /// Intervals.
    pub timing: Timing,
    /// A bug that is put in.
    pub defect: Defect,
}

impl Raft {
    /// A replica that starts with what is on its disk, and has applied up to `applied`.
    pub fn start(seat: Seat, durable: &Durable, applied: u64, now: Time, random: &mut Random) -> Raft {
        let log = durable.log.clone();
        assert!(log.base.0 <= applied, "what was cut off from the log was applied");
        Raft {
            id: seat.id,
            term: durable.term,
            commit: applied,
            applied,
            snapshot: durable.snapshot.clone(),
            leader: None,
            voters: seat.voters,
            voted_for: durable.voted_for,
            role: Role::Follower,
            timing: seat.timing,
            defect: seat.defect,
            election_at: now + random.range(seat.timing.election_min, seat.timing.election_max),
            heartbeat_at: 0,
            round: 0,
            written: 0,
            synced: 0,
            appends: VecDeque::new(),
            synced_last: log.last().0,
            unsent: VecDeque::new(),
            log,
        }
    }

    /// Whether this replica believes that it leads.
    pub fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    /// Whether it can serve: it leads, an entry of its own term is applied, and a majority was heard of lately.
    pub fn serves(&self, now: Time) -> bool {
        let Role::Leader(leading) = &self.role else { return false };
        let lease = 2 * self.timing.election_max;
        let heard = leading.peers.values().filter(|peer| now < peer.heard_at + lease).count() + 1;
        self.applied >= leading.own_first && heard >= self.majority()
    }

    /// When [`Raft::tick`] wants to be called next.
    pub fn wakes_at(&self) -> Time {
        if self.leads() { self.heartbeat_at } else { self.election_at }
    }

    fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Time, random: &mut Random, out: &mut Out) {
        if self.leads() {
            if now >= self.heartbeat_at {
                self.heartbeat_at = now + self.timing.heartbeat;
                self.send_all(true, out);
            }
        } else if now >= self.election_at {
            self.stand(now, random, out);
        }
    }

    /// Stands for election.
    fn stand(&mut self, now: Time, random: &mut Random, out: &mut Out) {
        self.election_at = now + random.range(self.timing.election_min, self.timing.election_max);
        self.leader = None;
        self.role = Role::Candidate { votes: BTreeSet::from([self.id]) };
        self.set_vote(self.term + 1, Some(self.id), out);
        let request = Message::RequestVote { term: self.term, last: self.log.last() };
        for peer in self.others() {
            self.send_synced(peer, request.clone(), out);
        }
    }

    fn others(&self) -> Vec<NodeId> {
        self.voters.iter().copied().filter(|voter| *voter != self.id).collect()
    }

    fn set_vote(&mut self, term: u64, voted_for: Option<NodeId>, out: &mut Out) {
        (self.term, self.voted_for) = (term, voted_for);
        self.write(Write::Vote { term, voted_for }, out);
    }

    fn write(&mut self, write: Write, out: &mut Out) {
        self.written += 1;
        match &write {
            Write::Append { after, entries } => {
                self.appends.push_back((self.written, *after, after + entries.len() as u64));
                self.synced_last = self.synced_last.min(*after);
            }
            Write::Install(snapshot) => {
                self.appends.push_back((self.written, snapshot.index, self.log.last().0));
            }
            Write::Vote { .. } | Write::Cut { .. } | Write::Snapshot(_) => {}
        }
        out.writes.push(write);
    }

    /// Sends once all that was written so far is synced.
    fn send_synced(&mut self, to: NodeId, message: Message, out: &mut Out) {
        if self.synced == self.written || self.defect == Defect::SyncForgotten {
            out.sends.push((to, message));
        } else {
            self.unsent.push_back((self.written, to, message));
        }
    }

    /// The disk has synced one more write.
    pub fn synced(&mut self, out: &mut Out) {
        self.synced += 1;
        while let Some((serial, _, last)) = self.appends.front().copied()
            && serial <= self.synced
        {
            self.appends.pop_front();
            self.synced_last = last;
        }
        for (_, after, _) in &self.appends {
            self.synced_last = self.synced_last.min(*after);
        }
        while let Some((serial, _, _)) = self.unsent.front()
            && *serial <= self.synced
        {
            let (_, to, message) = self.unsent.pop_front().expect("there is a first one");
            out.sends.push((to, message));
        }
        self.advance();
    }

    /// Appends a command, if this replica leads: its index and term.
    pub fn propose(&mut self, command: Vec<u8>, out: &mut Out) -> Option<(u64, u64)> {
        if !self.leads() {
            return None;
        }
        let after = self.log.last().0;
        let entry = Entry { term: self.term, command: command.into() };
        self.log.append(after, [entry.clone()]);
        self.write(Write::Append { after, entries: vec![entry] }, out);
        self.send_all(false, out);
        self.advance();
        Some((after + 1, self.term))
    }

    /// Asks for a confirmation of the leadership.
    pub fn barrier(&mut self, out: &mut Out) -> Option<Barrier> {
        let Role::Leader(leading) = &self.role else { return None };
        let index = self.commit.max(leading.own_first);
        self.round += 1;
        let barrier = Barrier { term: self.term, round: self.round, index };
        self.send_all(false, out);
        Some(barrier)
    }

    /// What has become of a barrier.
    pub fn confirmation(&self, barrier: Barrier) -> Confirmation {
        let Role::Leader(leading) = &self.role else { return Confirmation::Deposed };
        if barrier.term != self.term {
            return Confirmation::Deposed;
        }
        let answered = 1 + leading.peers.values().filter(|peer| peer.round >= barrier.round).count();
        let confirmed = answered >= self.majority() || self.defect == Defect::ReadWithoutQuorum;
        if confirmed && self.applied >= barrier.index {
            Confirmation::Confirmed
        } else {
            Confirmation::Pending
        }
    }

    /// Asks a follower to take over the leadership.
    pub fn hand_over(&mut self, to: NodeId, out: &mut Out) -> bool {
        let leads = self.leads() && to != self.id && self.voters.contains(&to);
        if leads {
            out.sends.push((to, Message::TakeOver { term: self.term }));
        }
        leads
    }

    /// Keeps a snapshot of the own state, and cuts the log behind it, but for `keep` entries.
    pub fn keep_snapshot(&mut self, snapshot: Rc<Snapshot>, keep: u64, out: &mut Out) {
        let upto = snapshot.index.saturating_sub(keep);
        self.write(Write::Snapshot(snapshot.clone()), out);
        self.snapshot = Some(snapshot);
        if upto > self.log.base.0 {
            self.log.cut(upto);
            self.write(Write::Cut { upto }, out);
        }
    }

    /// Sends to every peer what it lacks. `again`: from where it has confirmed, as what was sent may be lost.
    fn send_all(&mut self, again: bool, out: &mut Out) {
        for peer in self.others() {
            if let Role::Leader(leading) = &mut self.role
                && again
            {
                let state = leading.peers.get_mut(&peer).expect("every other voter is a peer");
                state.next = state.matched + 1;
            }
            self.send_entries(peer, out);
        }
    }

    fn send_entries(&mut self, to: NodeId, out: &mut Out) {
        let Role::Leader(leading) = &mut self.role else { return };
        let (term, round, commit) = (self.term, self.round, self.commit);
        let peer = leading.peers.get_mut(&to).expect("every other voter is a peer");
        let before = peer.next - 1;
        let Some(prev_term) = self.log.term_at(before) else {
            match &self.snapshot {
                Some(snapshot) if snapshot.index >= self.log.base.0 => {
                    let snapshot = snapshot.clone();
                    peer.next = snapshot.index + 1;
                    out.sends.push((to, Message::Install { term, snapshot, round }));
                }
                _ => out.wants_snapshot = true,
            }
            return;
        };
        let entries = self.log.from(peer.next);
        peer.next += entries.len() as u64;
        out.sends.push((to, Message::Append { term, prev: (before, prev_term), entries, commit, round }));
    }

    /// A message has come.
    pub fn take(&mut self, from: NodeId, message: Message, now: Time, random: &mut Random, out: &mut Out) {
        let term = message.term();
        if term > self.term {
            self.role = Role::Follower;
            self.leader = None;
            self.set_vote(term, None, out);
        }
        match message {
            Message::RequestVote { last, .. } => self.vote(from, term, last, now, random, out),
            Message::Vote { granted, .. } => self.voted(from, term, granted, now, out),
            Message::Append { prev, entries, commit, round, .. } => {
                if self.follow(from, term, round, now, random, out) {
                    self.append(from, prev, entries, commit, round, out);
                }
            }
            Message::Appended { matched, round, .. } => self.appended(from, term, matched, round, now, out),
            Message::Install { snapshot, round, .. } => {
                if self.follow(from, term, round, now, random, out) {
                    self.install(from, snapshot, round, out);
                }
            }
            Message::TakeOver { .. } => {
                if term == self.term && !self.leads() {
                    self.stand(now, random, out);
                }
            }
        }
    }

    fn vote(
        &mut self,
        from: NodeId,
        term: u64,
        last: (u64, u64),
        now: Time,
        random: &mut Random,
        out: &mut Out,
    ) {
        let mine = self.log.last();
        let complete = (last.1, last.0) >= (mine.1, mine.0) || self.defect == Defect::VoteForShorterLog;
        let free = self.voted_for.is_none_or(|voted_for| voted_for == from);
        let granted = term == self.term && complete && free && !self.leads();
        if granted {
            self.election_at = now + random.range(self.timing.election_min, self.timing.election_max);
            if self.voted_for.is_none() {
                self.set_vote(term, Some(from), out);
            }
        }
        self.send_synced(from, Message::Vote { term: self.term, granted }, out);
    }

    fn voted(&mut self, from: NodeId, term: u64, granted: bool, now: Time, out: &mut Out) {
        let majority = self.majority();
        let Role::Candidate { votes } = &mut self.role else { return };
        if term != self.term || !granted {
            return;
        }
        votes.insert(from);
        if votes.len() < majority {
            return;
        }
        let after = self.log.last().0;
        let peer = Peer { next: after + 1, matched: 0, round: 0, heard_at: now };
        let peers = self.others().into_iter().map(|other| (other, peer)).collect();
        self.role = Role::Leader(Leading { peers, own_first: after + 1 });
        self.leader = Some(self.id);
        self.round = 0;
        self.heartbeat_at = now + self.timing.heartbeat;
        out.elected = true;
        self.propose(Vec::new(), out);
    }

    /// Whether a leader's message is of this term. Then it leads.
    fn follow(
        &mut self,
        from: NodeId,
        term: u64,
        round: u64,
        now: Time,
        random: &mut Random,
        out: &mut Out,
    ) -> bool {
        if term < self.term {
            let matched = Err(0);
            out.sends.push((from, Message::Appended { term: self.term, matched, round }));
            return false;
        }
        assert!(!self.leads(), "two leaders in term {term}: {} and {from}", self.id);
        self.role = Role::Follower;
        self.leader = Some(from);
        self.election_at = now + random.range(self.timing.election_min, self.timing.election_max);
        true
    }

    fn append(
        &mut self,
        from: NodeId,
        prev: (u64, u64),
        mut entries: Vec<Entry>,
        commit: u64,
        round: u64,
        out: &mut Out,
    ) {
        let term = self.term;
        let last = prev.0 + entries.len() as u64;
        let mut after = prev.0;
        if after < self.log.base.0 {
            // What was cut off is committed, hence equal.
            let known = ((self.log.base.0 - after) as usize).min(entries.len());
            entries.drain(..known);
            after += known as u64;
        } else if self.log.term_at(prev.0) != Some(prev.1) {
            let hint = self.log.last().0.min(prev.0.saturating_sub(1)).max(self.commit);
            let matched = Err(hint);
            return self.send_synced(from, Message::Appended { term, matched, round }, out);
        }
        let known = entries
            .iter()
            .enumerate()
            .take_while(|(place, entry)| self.log.term_at(after + 1 + *place as u64) == Some(entry.term))
            .count();
        entries.drain(..known);
        after += known as u64;
        if !entries.is_empty() {
            assert!(after >= self.commit, "what is committed is never cut off again");
            self.log.append(after, entries.iter().cloned());
            self.write(Write::Append { after, entries }, out);
        }
        self.commit = self.commit.max(commit.min(last));
        self.send_synced(from, Message::Appended { term, matched: Ok(last), round }, out);
    }

    fn install(&mut self, from: NodeId, snapshot: Rc<Snapshot>, round: u64, out: &mut Out) {
        let index = snapshot.index;
        if index > self.commit {
            self.log.begin_at(index, snapshot.term);
            self.commit = index;
            self.applied = index;
            self.snapshot = Some(snapshot.clone());
            self.write(Write::Install(snapshot.clone()), out);
            if self.defect != Defect::SnapshotForgotten {
                out.install = Some(snapshot);
            }
        }
        self.send_synced(from, Message::Appended { term: self.term, matched: Ok(index), round }, out);
    }

    fn appended(
        &mut self,
        from: NodeId,
        term: u64,
        matched: Result<u64, u64>,
        round: u64,
        now: Time,
        out: &mut Out,
    ) {
        let last = self.log.last().0;
        let Role::Leader(leading) = &mut self.role else { return };
        let Some(peer) = leading.peers.get_mut(&from).filter(|_| term == self.term) else { return };
        peer.heard_at = now;
        peer.round = peer.round.max(round);
        match matched {
            Ok(index) => {
                peer.matched = peer.matched.max(index);
                peer.next = peer.next.max(index + 1);
                if peer.next <= last {
                    self.send_entries(from, out);
                }
                self.advance();
            }
            Err(hint) => {
                peer.next = (hint + 1).min(peer.next).max(peer.matched + 1);
                self.send_entries(from, out);
            }
        }
    }

    /// Commits what a majority has synced, if it is of this term.
    fn advance(&mut self) {
        let Role::Leader(leading) = &self.role else { return };
        let mut matched: Vec<u64> = leading.peers.values().map(|peer| peer.matched).collect();
        matched.push(self.synced_last);
        matched.sort_unstable_by(|one, other| other.cmp(one));
        let mut index = matched[self.majority() - 1];
        if self.defect == Defect::CommitWithoutQuorum {
            index = index.max(self.synced_last);
        }
        if index > self.commit && self.log.term_at(index) == Some(self.term) {
            self.commit = index;
        }
    }
}
