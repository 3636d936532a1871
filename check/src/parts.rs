//! The parts of a cluster, and their steps: the shipped machines, and nothing else that decides.
//!
//! Every part's state gets a number, and every step is taken once for each state of that part: the machines are functions of
//! their state and what comes in (rule R10), so taking it again could only give the same. A state of the whole cluster is then
//! a short row of numbers, and going from one to the next is looking up.

use std::{any::Any, cell::RefCell, panic, sync::Arc};

use verdict_protocol::{
    coordinator::{Act, Acted, Coordinator, CoordinatorEntry, CoordinatorReply},
    ids::{BatchId, GroupId, Millis, NodeId, ShardId},
    leader::{Decisions, Effects, Event, Leader, Remembered, Reply, Token},
    machine::{Machine, encode},
    messages::{Decision, FromShard, ShardRead, ShardReadAnswer, ToShard},
    shard::{Shard, ShardConfig, ShardEntry},
    store::MemoryStore,
};

use crate::{
    case::{Case, Contents, START, TICK_MS},
    rules,
    tables::{Interner, Memo},
};

/// A replicated machine as every replica of its group holds it at some index of the log.
///
/// Which replica leads makes no difference to it: who is elected has all that is committed, and applies it before it acts. The
/// running hash is left out, since it only counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica<M> {
    /// The machine.
    pub machine: M,
    /// What it has stored.
    pub store: MemoryStore,
}

/// A message on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the shard, the request, the message
pub enum Packet {
    ToShard(ShardId, ToShard),
    Read(ShardId, u64, ShardRead),
    FromShard(ShardId, FromShard),
    Answer(ShardId, u64, ShardReadAnswer),
}

/// What the log answers to a leader.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Heard {
    /// Its entry was applied.
    Applied(Acted),
    /// A newer epoch has begun.
    OldEpoch,
}

/// A leader, and what lies between it and its log. All but the clock are numbers of other parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Seat {
    /// None: it has died, and nobody follows yet.
    pub leader: Option<u32>,
    /// What it has proposed and is not in the log.
    pub acts: Vec<u32>,
    /// What is in the log and it has not heard of.
    pub heard: Vec<u32>,
    /// It wants its leadership confirmed.
    pub confirm: Option<u64>,
    /// How often its clock has moved.
    pub ticks: u8,
}

/// What happens to a leader, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // as in verdict_protocol::leader::Event
pub enum Input {
    Submit(u8),
    Seal(BatchId),
    Read,
    Confirmed(u64),
    Packet(u32),
    Reconnected(u32),
    Heard(u32),
    Tick(u8),
}

/// What a step of a leader leads to.
#[derive(Clone, Debug, Default)]
pub struct LeaderStep {
    /// The leader afterwards; none: it has stepped down.
    pub leader: Option<u32>,
    /// What it proposes.
    pub act: Option<u32>,
    /// What it sends.
    pub packets: Vec<u32>,
    /// What it tells.
    pub replies: Vec<(Token, Reply)>,
    /// It wants its leadership confirmed.
    pub confirm: Option<u64>,
    /// The highest number that it gives, within its epoch.
    pub highest: u64,
    /// What must not be.
    pub wrong: Option<String>,
}

/// What an entry of a shard's log leads to.
#[derive(Clone, Debug, Default)]
pub struct ShardStep {
    /// The shard afterwards.
    pub shard: u32,
    /// What it answers.
    pub packets: Vec<u32>,
    /// What it has committed on its own word.
    pub committed: Vec<Decision>,
    /// What must not be.
    pub wrong: Option<String>,
}

/// What an entry of the coordinators' log leads to.
#[derive(Clone, Debug, Default)]
pub struct CoordinatorStep {
    /// The group afterwards.
    pub coordinator: u32,
    /// What its leader is answered.
    pub heard: u32,
    /// Decisions that it recorded.
    pub recorded: Vec<Decision>,
    /// What must not be.
    pub wrong: Option<String>,
}

/// What a new epoch leads to.
#[derive(Clone, Debug, Default)]
pub struct OpenStep {
    /// The group afterwards.
    pub coordinator: u32,
    /// The leader, and what it does first.
    pub first: LeaderStep,
}

/// The token of the caller who submits the batch with this place in the case.
pub fn submit_token(place: usize) -> Token {
    Token(1 + place as u64)
}

/// The token of whoever seals an id.
pub const SEAL_TOKEN: Token = Token(100);

/// The token of the read.
pub const READ_TOKEN: Token = Token(200);

/// All parts that were met, and their steps.
pub struct Parts {
    /// The case.
    pub case: Case,
    /// Its batches.
    pub contents: Contents,
    /// Coordinator groups.
    pub coordinators: Interner<Replica<Coordinator>>,
    /// Shards.
    pub shards: Interner<Replica<Shard>>,
    /// Leaders.
    pub leaders: Interner<Leader>,
    /// Seats.
    pub seats: Interner<Seat>,
    /// Packets.
    pub packets: Interner<Packet>,
    acts: Interner<Act>,
    heard: Interner<Heard>,
    leader_steps: Memo<(u32, u32, Input), Arc<LeaderStep>>,
    shard_steps: Memo<(u32, u32), Arc<ShardStep>>,
    shard_states: Memo<Replica<Shard>, Result<(), String>>,
    reads: Memo<(u32, u32), Option<u32>>,
    coordinator_steps: Memo<(u32, u32), Arc<CoordinatorStep>>,
    open_steps: Memo<u32, Arc<OpenStep>>,
}

impl Parts {
    /// Nothing but the case.
    pub fn new(case: &Case) -> Parts {
        Parts {
            case: case.clone(),
            contents: case.contents(),
            coordinators: Interner::default(),
            shards: Interner::default(),
            leaders: Interner::default(),
            seats: Interner::default(),
            packets: Interner::default(),
            acts: Interner::default(),
            heard: Interner::default(),
            leader_steps: Memo::default(),
            shard_steps: Memo::default(),
            shard_states: Memo::default(),
            reads: Memo::default(),
            coordinator_steps: Memo::default(),
            open_steps: Memo::default(),
        }
    }

    /// A leader takes an event.
    pub fn step_leader(&self, leader: u32, coordinator: u32, input: Input) -> Arc<LeaderStep> {
        self.leader_steps.get_or((leader, coordinator, input), || {
            let mut after = self.leaders.get(leader).clone();
            let event = self.event(input);
            let replica = self.coordinators.get(coordinator);
            let effects = guarded(|| {
                let mut effects = Effects::default();
                after.step(event, &Lookup(replica), &mut effects);
                after.seal(&mut effects);
                effects
            });
            Arc::new(match effects {
                Ok(effects) => self.leader_step(after, effects),
                Err(wrong) => LeaderStep { wrong: Some(wrong), ..LeaderStep::default() },
            })
        })
    }

    fn leader_step(&self, after: Leader, effects: Effects) -> LeaderStep {
        let Effects { act, to_shards, reads, replies, confirm, step_down, alarms } = effects;
        let prepares = to_shards.values().flat_map(|message| &message.prepares);
        let highest = prepares.map(|prepare| prepare.number.sequence).max().unwrap_or_default();
        let sent = to_shards.into_iter().map(|(shard, message)| Packet::ToShard(shard, message));
        let asked = reads.into_iter().map(|(shard, request, read)| Packet::Read(shard, request, read));
        LeaderStep {
            leader: step_down.is_none().then(|| self.leaders.number(after)),
            act: (!act.is_empty()).then(|| self.acts.number(act)),
            packets: sent.chain(asked).map(|packet| self.packets.number(packet)).collect(),
            replies,
            confirm,
            highest,
            wrong: alarms.into_iter().next().map(|alarm| format!("a leader raises an alarm: {alarm}")),
        }
    }

    fn event(&self, input: Input) -> Event {
        match input {
            Input::Submit(place) => {
                let place = usize::from(place);
                let batch = self.contents.split[place].clone();
                Event::Submit { token: submit_token(place), batch }
            }
            Input::Seal(id) => Event::Query { token: SEAL_TOKEN, id, wait: false, abort_if_not_seen: true },
            Input::Read => Event::Read { token: READ_TOKEN, rows: self.case.read_rows() },
            Input::Confirmed(asked) => Event::Confirmed { asked },
            Input::Packet(packet) => match self.packets.get(packet).clone() {
                Packet::FromShard(shard, message) => Event::FromShard { shard, message },
                Packet::Answer(shard, request, answer) => Event::ReadAnswered { shard, request, answer },
                Packet::ToShard(..) | Packet::Read(..) => unreachable!("is for a shard"),
            },
            Input::Reconnected(shard) => Event::Reconnected { shard: ShardId(shard) },
            Input::Heard(heard) => match self.heard.get(heard).clone() {
                Heard::Applied(acted) => Event::Applied(acted),
                Heard::OldEpoch => unreachable!("ends the leader"),
            },
            Input::Tick(ticks) => Event::Tick { now: clock(ticks) },
        }
    }

    /// What a leader would answer to a question about an id.
    pub fn ask_leader(&self, leader: u32, coordinator: u32, id: BatchId) -> Option<Reply> {
        let mut leader = self.leaders.get(leader).clone();
        let mut effects = Effects::default();
        let question = Event::Query { token: SEAL_TOKEN, id, wait: false, abort_if_not_seen: false };
        leader.step(question, &Lookup(self.coordinators.get(coordinator)), &mut effects);
        effects.replies.pop().map(|(_, reply)| reply)
    }

    /// Whether the log has told a leader that it is none any more.
    pub fn is_old_epoch(&self, heard: u32) -> bool {
        *self.heard.get(heard) == Heard::OldEpoch
    }

    /// A shard's log takes a message.
    pub fn step_shard(&self, shard: u32, packet: u32) -> Arc<ShardStep> {
        self.shard_steps.get_or((shard, packet), || {
            let Packet::ToShard(to, message) = self.packets.get(packet) else {
                unreachable!("is not for the log of a shard")
            };
            let before = self.shards.get(shard);
            let mut after = before.clone();
            let reply = guarded(|| apply_to_shard(&mut after, self.case.room, message));
            let (messages, alarms) = match reply {
                Ok(reply) => (reply.messages, reply.alarms),
                Err(wrong) => return Arc::new(ShardStep { wrong: Some(wrong), ..ShardStep::default() }),
            };
            let answer = messages.into_iter().next().map(|(_, message)| message).unwrap_or_default();
            let alarm = alarms.into_iter().next().map(|alarm| format!("shard {to} raises an alarm: {alarm}"));
            let wrong = alarm
                .or_else(|| rules::shard_step(before, &after, message, &answer).err())
                .or_else(|| self.shard_state(&after, *to).err());
            let committed = rules::committed(before, *to, message, &answer);
            let packets = if answer.is_empty() {
                Vec::new()
            } else {
                vec![self.packets.number(Packet::FromShard(*to, answer))]
            };
            Arc::new(ShardStep { shard: self.shards.number(after), packets, committed, wrong })
        })
    }

    /// What every state of a shard must be and bear; looked at once for each.
    fn shard_state(&self, shard: &Replica<Shard>, id: ShardId) -> Result<(), String> {
        let placement = self.case.placement();
        self.shard_states.get_or(shard.clone(), || {
            rules::reopens(shard, id, placement)?;
            guarded(|| rules::bears_lies(shard, placement)).unwrap_or_else(Err)
        })
    }

    /// A shard is asked for rows; none: it waits.
    pub fn read_shard(&self, shard: u32, packet: u32) -> Option<u32> {
        self.reads.get_or((shard, packet), || {
            let Packet::Read(to, request, read) = self.packets.get(packet) else {
                unreachable!("is no read")
            };
            let replica = self.shards.get(shard);
            let answer = replica.machine.read(&replica.store, GroupId::COORDINATOR, read);
            let answer = answer.expect("memory doesn't fail")?;
            Some(self.packets.number(Packet::Answer(*to, *request, answer)))
        })
    }

    /// A shard asks about all that it has in doubt.
    pub fn ask(&self, shard: u32) -> Option<u32> {
        let machine = &self.shards.get(shard).machine;
        let in_doubt = machine.held().map(|held| held.part);
        let asks: Vec<_> =
            in_doubt.filter(|part| part.vote == verdict_protocol::messages::VoteKind::Yes).collect();
        (!asks.is_empty())
            .then(|| Packet::FromShard(machine.id(), FromShard { asks, ..FromShard::default() }))
            .map(|packet| self.packets.number(packet))
    }

    /// The coordinators' log takes what a leader proposed.
    pub fn step_coordinator(&self, coordinator: u32, act: u32) -> Arc<CoordinatorStep> {
        self.coordinator_steps.get_or((coordinator, act), || {
            let before = self.coordinators.get(coordinator);
            let mut after = before.clone();
            let entry = CoordinatorEntry::Act(self.acts.get(act).clone());
            let heard = match guarded(|| apply_to_coordinator(&mut after, &entry)) {
                Ok(CoordinatorReply::Acted(acted)) => Heard::Applied(acted),
                Ok(CoordinatorReply::OldEpoch { .. }) => Heard::OldEpoch,
                Ok(other) => {
                    let wrong = Some(format!("what a leader recorded is answered with {other:?}"));
                    return Arc::new(CoordinatorStep { wrong, ..CoordinatorStep::default() });
                }
                Err(wrong) => {
                    return Arc::new(CoordinatorStep { wrong: Some(wrong), ..CoordinatorStep::default() });
                }
            };
            let recorded = rules::recorded(before, &after).and_then(|recorded| {
                guarded(|| rules::bears_contradiction(&after)).unwrap_or_else(Err)?;
                Ok(recorded)
            });
            let (recorded, wrong) = match recorded {
                Ok(recorded) => (recorded, None),
                Err(wrong) => (Vec::new(), Some(wrong)),
            };
            Arc::new(CoordinatorStep {
                coordinator: self.coordinators.number(after),
                heard: self.heard.number(heard),
                recorded,
                wrong,
            })
        })
    }

    /// A new leader opens its epoch.
    pub fn open(&self, coordinator: u32) -> Arc<OpenStep> {
        self.open_steps.get_or(coordinator, || {
            let mut after = self.coordinators.get(coordinator).clone();
            let opened = guarded(|| open_epoch(&mut after, &self.case));
            Arc::new(match opened {
                Ok((leader, effects)) => {
                    let first = self.leader_step(leader, effects);
                    OpenStep { coordinator: self.coordinators.number(after), first }
                }
                Err(wrong) => OpenStep {
                    first: LeaderStep { wrong: Some(wrong), ..LeaderStep::default() },
                    ..OpenStep::default()
                },
            })
        })
    }

    /// The values behind a seat: its leader, proposals, and what it has not heard.
    pub fn seated(&self, seat: &Seat) -> (Option<Leader>, Vec<Act>, Vec<Heard>) {
        (
            seat.leader.map(|leader| self.leaders.get(leader).clone()),
            seat.acts.iter().map(|act| self.acts.get(*act).clone()).collect(),
            seat.heard.iter().map(|heard| self.heard.get(*heard).clone()).collect(),
        )
    }

    /// The number of the leader that a cluster at rest has.
    pub fn seat(&self, leader: Leader) -> u32 {
        self.seats.number(Seat { leader: Some(self.leaders.number(leader)), ..Seat::default() })
    }
}

/// What a leader's clock says after so many ticks. Each starts at the same time, so the clock of a new leader may be behind.
pub fn clock(ticks: u8) -> Millis {
    Millis(START.0 + u64::from(ticks) * TICK_MS)
}

/// Looks up decisions where the group stands.
pub struct Lookup<'a>(pub &'a Replica<Coordinator>);

impl Decisions for Lookup<'_> {
    fn remembered(&self, id: BatchId) -> Remembered {
        self.0.machine.remembered(&self.0.store, id).expect("memory doesn't fail")
    }
}

/// A group that has nothing yet.
pub fn empty<M: Machine>(config: &M::Config) -> Replica<M> {
    let store = MemoryStore::default();
    let machine = M::open(config, &store).expect("memory doesn't fail");
    Replica { machine, store }
}

/// The configuration of a shard.
pub fn shard_config(case: &Case, shard: ShardId) -> ShardConfig {
    ShardConfig { shard, placement: case.placement(), sweep_interval: 1 }
}

/// Applies one message as an entry of a shard's log.
pub fn apply_to_shard(
    shard: &mut Replica<Shard>,
    parts_max: u32,
    message: &ToShard,
) -> verdict_protocol::shard::ShardReply {
    let entry = ShardEntry { now: START, parts_max, messages: vec![message.clone()] };
    apply(shard, 0, &encode(&entry))
}

/// Applies, and brings all to the store: what is in memory alone is the business of the simulator and of tests.
fn apply<M: Machine>(replica: &mut Replica<M>, index: u64, command: &[u8]) -> M::Reply {
    let reply = replica.machine.apply(&mut replica.store, index, command).expect("memory doesn't fail");
    replica.machine.flush(&mut replica.store).expect("memory doesn't fail");
    replica.machine.trim(0);
    reply
}

/// Applies an entry of the coordinators' log.
///
/// An epoch is the index of the entry that opened it; nothing else depends on indexes, and epochs are only compared. So here
/// they are counted instead: states that differ in how much was recorded before an epoch are one.
pub fn apply_to_coordinator(
    coordinator: &mut Replica<Coordinator>,
    entry: &CoordinatorEntry,
) -> CoordinatorReply {
    let index = coordinator.machine.counts().epoch.0 + 1;
    apply(coordinator, index, &encode(entry))
}

/// Opens an epoch: the new leader, and what it does first.
pub fn open_epoch(coordinator: &mut Replica<Coordinator>, case: &Case) -> (Leader, Effects) {
    let entry =
        CoordinatorEntry::Open { node: NodeId(1), placement: case.placement(), keep: case.leader().keep };
    match apply_to_coordinator(coordinator, &entry) {
        CoordinatorReply::Opened(opened) => Leader::open(case.leader(), opened, START),
        other => panic!("opening an epoch was answered with {other:?}"),
    }
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Lets panics in guarded code be told by what they say, and nothing be printed. For the whole process, from now on.
pub fn quiet_panics() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let is_guarded = GUARDED.with(|guarded| *guarded.borrow());
        if is_guarded {
            let place = info.location().map_or(String::new(), |place| format!(" ({place})"));
            let what = text_of(info.payload());
            PANIC.with(|panic| *panic.borrow_mut() = Some(format!("an assertion fails: {what}{place}")));
        } else {
            before(info);
        }
    }));
}

thread_local! {
    static GUARDED: RefCell<bool> = const { RefCell::new(false) };
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Runs code of the machines; what it asserts is one of the rules.
pub fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let before = GUARDED.with(|guarded| guarded.replace(true));
    let done = panic::catch_unwind(panic::AssertUnwindSafe(run));
    GUARDED.with(|guarded| *guarded.borrow_mut() = before);
    done.map_err(|payload| {
        let told = PANIC.with(|panic| panic.borrow_mut().take());
        told.unwrap_or_else(|| format!("an assertion fails: {}", text_of(payload.as_ref())))
    })
}
