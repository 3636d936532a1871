//! Sees everything that happens, keeps the facts, and lets every invariant look at them.

use std::{collections::BTreeMap, rc::Rc};

use verdict_protocol::{
    batch::Batch,
    coordinator::{Acted, Coordinator, CoordinatorEntry, CoordinatorReply},
    ids::{BatchId, ContentHash, GroupId, NodeId, ShardId},
    machine::{Machine, Position, decode},
    messages::{Decision, VoteKind},
    shard::{Shard, ShardEntry, ShardReply},
    store::MemoryStore,
};

use crate::{
    client::Record,
    context::Context,
    host::Host,
    invariants::{self, Invariant},
    messages::{Answer, Question},
    plan::Plan,
    raft::{Entry, Log, Time},
};

/// Something that was seen.
pub enum Seen<'a> {
    /// The first replica of the coordinators has applied an entry.
    Coordinator {
        /// Its index.
        index: u64,
        /// The entry.
        entry: &'a CoordinatorEntry,
        /// The answer.
        reply: &'a CoordinatorReply,
        /// The machine afterwards.
        machine: &'a Coordinator,
        /// Its state.
        store: &'a MemoryStore,
    },
    /// The first replica of a shard has applied an entry.
    Shard {
        /// The shard.
        shard: ShardId,
        /// The entry.
        entry: &'a ShardEntry,
        /// The answer.
        reply: &'a ShardReply,
        /// The machine afterwards.
        machine: &'a Shard,
        /// Its state.
        store: &'a MemoryStore,
    },
    /// A replica of a shard has started from its disk or from a snapshot.
    ShardOpened {
        /// The shard.
        shard: ShardId,
        /// Where.
        node: NodeId,
        /// The machine.
        machine: &'a Shard,
        /// Its state.
        store: &'a MemoryStore,
    },
    /// A replica of the coordinators has.
    CoordinatorOpened {
        /// Where.
        node: NodeId,
        /// The machine.
        machine: &'a Coordinator,
        /// Its state.
        store: &'a MemoryStore,
    },
    /// A replica has applied an entry with a command.
    Applied {
        /// The group.
        group: GroupId,
        /// Where.
        node: NodeId,
        /// The index and the running hash.
        position: Position,
    },
    /// A replica is about to apply an entry.
    Entry {
        /// The group.
        group: GroupId,
        /// Where.
        node: NodeId,
        /// Its index.
        index: u64,
        /// The entry.
        entry: &'a Entry,
    },
    /// A replica votes.
    Voted {
        /// The group.
        group: GroupId,
        /// The term.
        term: u64,
        /// Who votes.
        voter: NodeId,
        /// For whom.
        candidate: NodeId,
    },
    /// A replica has become leader.
    Elected {
        /// The group.
        group: GroupId,
        /// The term.
        term: u64,
        /// Who.
        node: NodeId,
        /// Its log.
        log: &'a Log,
    },
    /// A leader takes entries for committed.
    Committed {
        /// The group.
        group: GroupId,
        /// The leader's term.
        term: u64,
        /// Up to this index.
        index: u64,
    },
    /// Something that must not be, by the machines' own word.
    Alarm {
        /// The group that raises it.
        group: GroupId,
        /// The text.
        text: &'a str,
    },
    /// A client was answered.
    Answered {
        /// What it did, with this answer as the last one.
        record: &'a Record,
        /// When.
        now: Time,
    },
    /// The copies of a group's entries on disk are counted, after a leader committed.
    Copies {
        /// The group.
        group: GroupId,
        /// Up to this index.
        index: u64,
        /// On so many disks.
        copies: usize,
        /// Of so many.
        voters: usize,
    },
}

/// A decision as it was first recorded.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The decision.
    pub decision: Decision,
    /// How many were recorded before it.
    pub place: usize,
    /// When it was applied first.
    pub at: Time,
}

/// What a shard commits on its own word with an entry. That is decided in this moment, whenever it is recorded; an answer may repeat it.
pub fn committed(shard: ShardId, entry: &ShardEntry, reply: &ShardReply) -> Vec<Decision> {
    let mut committed = Vec::new();
    for vote in reply.messages.iter().flat_map(|(_, message)| &message.votes) {
        let VoteKind::Committed(stamp) = vote.kind else { continue };
        let mut prepares = entry.messages.iter().flat_map(|message| &message.prepares);
        if let Some(prepare) = prepares.find(|prepare| prepare.number == vote.number) {
            let (id, hash, number) = (vote.id, Some(prepare.hash), vote.number);
            committed.push(Decision { id, hash, shards: vec![shard], number, result: Ok(stamp) });
        }
    }
    committed
}

/// What is known for certain about a run, whoever remembers it.
pub struct Facts {
    /// The plan.
    pub plan: Plan,
    /// All batches that were submitted, by id and contents.
    pub batches: BTreeMap<(BatchId, ContentHash), Rc<Batch>>,
    /// All decisions that were ever recorded.
    pub decisions: BTreeMap<BatchId, Recorded>,
    /// What clients did.
    pub records: Vec<Record>,
}

impl Facts {
    /// The contents of a decided batch.
    pub fn contents(&self, decision: &Decision) -> Option<&Rc<Batch>> {
        self.batches.get(&(decision.id, decision.hash?))
    }

    /// Committed batches in the order of their stamps.
    pub fn committed(&self) -> Vec<&Recorded> {
        let mut committed: Vec<&Recorded> =
            self.decisions.values().filter(|recorded| recorded.decision.result.is_ok()).collect();
        committed.sort_by_key(|recorded| recorded.decision.result.clone().ok());
        committed
    }
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant.
    pub invariant: String,
    /// What was seen.
    pub text: String,
    /// When.
    pub at: Time,
}

/// The witness.
pub struct Witness {
    /// The facts.
    pub facts: Facts,
    /// The first violation.
    pub violation: Option<Violation>,
    invariants: Vec<Box<dyn Invariant>>,
    first: BTreeMap<GroupId, u64>,
    /// Groups whose leaders have committed, to be counted.
    pub committed: Vec<(GroupId, u64)>,
}

impl Witness {
    /// Nothing was seen yet.
    pub fn new(plan: &Plan) -> Witness {
        let facts = Facts {
            plan: plan.clone(),
            batches: BTreeMap::new(),
            decisions: BTreeMap::new(),
            records: Vec::new(),
        };
        Witness {
            facts,
            violation: None,
            invariants: invariants::all(),
            first: BTreeMap::new(),
            committed: Vec::new(),
        }
    }

    /// Lets every invariant see it, and notes what becomes a fact by it.
    pub fn see(&mut self, now: Time, seen: &Seen<'_>) {
        for invariant in &mut self.invariants {
            if let Err(text) = invariant.see(seen, &self.facts)
                && self.violation.is_none()
            {
                let invariant = invariant.name().to_owned();
                self.violation = Some(Violation { invariant, text, at: now });
            }
        }
        match seen {
            Seen::Coordinator { reply: CoordinatorReply::Acted(Acted { decisions, .. }), .. } => {
                for decision in decisions {
                    let place = self.facts.decisions.len();
                    let recorded = Recorded { decision: decision.clone(), place, at: now };
                    self.facts.decisions.entry(decision.id).or_insert(recorded);
                }
            }
            Seen::Shard { shard, entry, reply, .. } => {
                for decision in committed(*shard, entry, reply) {
                    let place = self.facts.decisions.len();
                    let recorded = Recorded { decision, place, at: now };
                    self.facts.decisions.entry(recorded.decision.id).or_insert(recorded);
                }
            }
            Seen::Committed { group, index, .. } => self.committed.push((*group, *index)),
            _ => {}
        }
    }

    /// Notes a violation that no invariant sees by itself.
    pub fn violated(&mut self, invariant: &str, text: String, at: Time) {
        if self.violation.is_none() {
            self.violation = Some(Violation { invariant: invariant.to_owned(), text, at });
        }
    }

    /// Looks at a cluster in which nothing happens any more.
    pub fn rest(&mut self, now: Time, rest: &invariants::Rest<'_>) {
        for invariant in &mut self.invariants {
            if self.violation.is_some() {
                return;
            }
            if let Err(text) = invariant.rest(rest, &self.facts) {
                let invariant = invariant.name().to_owned();
                self.violation = Some(Violation { invariant, text, at: now });
            }
        }
    }

    /// A client begins something. Gives the number of its record.
    pub fn began(&mut self, record: Record) -> usize {
        if let Some((batch, hash)) = record.submitted() {
            self.facts.batches.insert((batch.id, hash), batch.clone());
        }
        self.facts.records.push(record);
        self.facts.records.len() - 1
    }

    /// A record.
    pub fn record(&self, record: usize) -> &Record {
        &self.facts.records[record]
    }

    /// A client calls, for the first time or again. Gives the question.
    pub fn called(&mut self, record: usize) -> Question {
        let record = &mut self.facts.records[record];
        record.calls += 1;
        record.question.clone()
    }

    /// A client was answered.
    pub fn answer(&mut self, record: usize, answer: Answer, now: Time) {
        self.facts.records[record].answers.push(answer);
        let record = self.facts.records[record].clone();
        self.see(now, &Seen::Answered { record: &record, now });
    }

    /// A client knows the end.
    pub fn ended(&mut self, record: usize, answer: Answer, now: Time) {
        self.facts.records[record].answered = Some(now);
        self.facts.records[record].end = Some(answer);
    }

    /// Whether nobody has applied this index of a group before.
    fn is_first(&mut self, group: GroupId, index: u64) -> bool {
        let first = self.first.entry(group).or_default();
        let is_first = index > *first;
        *first = index.max(*first);
        is_first
    }
}

/// Machines whose doings the witness understands.
pub trait Watched: Machine {
    /// An entry was applied.
    fn watch(
        host: &Host<Self>,
        index: u64,
        command: &[u8],
        reply: &Self::Reply,
        position: Position,
        cx: &mut Context,
    );

    /// A replica has started.
    fn opened<'a>(group: GroupId, node: NodeId, machine: &'a Self, store: &'a MemoryStore) -> Seen<'a>;
}

impl Watched for Coordinator {
    fn watch(
        host: &Host<Coordinator>,
        index: u64,
        command: &[u8],
        reply: &CoordinatorReply,
        position: Position,
        cx: &mut Context,
    ) {
        cx.witness.see(cx.now, &Seen::Applied { group: host.group, node: host.node(), position });
        if cx.witness.is_first(host.group, index) {
            let entry: CoordinatorEntry = decode("entry", command).expect("was just applied");
            if let CoordinatorReply::Acted(Acted { decisions, .. }) = reply {
                for decision in decisions {
                    cx.trace
                        .line(cx.now, || format!("decided: {}", verdict_protocol::show::decision(decision)));
                }
            }
            let (machine, store) = (&host.machine, &host.store);
            let seen = Seen::Coordinator { index, entry: &entry, reply, machine, store };
            cx.witness.see(cx.now, &seen);
        }
    }

    fn opened<'a>(_: GroupId, node: NodeId, machine: &'a Coordinator, store: &'a MemoryStore) -> Seen<'a> {
        Seen::CoordinatorOpened { node, machine, store }
    }
}

impl Watched for Shard {
    fn watch(
        host: &Host<Shard>,
        index: u64,
        command: &[u8],
        reply: &ShardReply,
        position: Position,
        cx: &mut Context,
    ) {
        cx.witness.see(cx.now, &Seen::Applied { group: host.group, node: host.node(), position });
        if cx.witness.is_first(host.group, index) {
            let entry: ShardEntry = decode("entry", command).expect("was just applied");
            let (machine, store, shard) = (&host.machine, &host.store, host.machine.id());
            cx.witness.see(cx.now, &Seen::Shard { shard, entry: &entry, reply, machine, store });
        }
    }

    fn opened<'a>(group: GroupId, node: NodeId, machine: &'a Shard, store: &'a MemoryStore) -> Seen<'a> {
        Seen::ShardOpened { shard: ShardId(group.0), node, machine, store }
    }
}
