//! Healing: what must become of a state once faults end.
//!
//! All that was on its way is lost, deposed leaders are gone, and the leader lives on or a new one is elected. Then messages
//! are delivered in order, entries are recorded, clocks move, clients submit again what they submitted. Within a bound of time
//! every batch must be decided, every part and lock gone, and every table short. That messages are lost here costs no
//! generality: a state in which they have been delivered is a state of its own, and is healed too.

use std::collections::VecDeque;

use verdict_protocol::{
    batch::Batch,
    coordinator::{Act, Coordinator, CoordinatorEntry, CoordinatorReply},
    ids::{BatchId, GroupId, Millis},
    leader::{Effects, Event, Leader, Refusal, Reply, Token},
    messages::Decision,
    shard::Shard,
};

use crate::{
    case::{Case, Contents, START, TICK_MS},
    model::{Model, State},
    parts::{
        Heard, Lookup, Packet, Replica, apply_to_coordinator, apply_to_shard, clock, empty, guarded,
        open_epoch, shard_config,
    },
    rules::{self, Witness},
};

/// Within so many ticks everything must have ended.
const TICKS_MAX: u64 = 40;
/// More deliveries than this between two ticks: the cluster talks without end.
const DELIVERIES_MAX: usize = 10_000;

/// The token of callers in a healed cluster.
const HEALING_TOKEN: Token = Token(300);

/// A cluster without faults, as values.
pub struct Cluster<'a> {
    case: &'a Case,
    coordinator: Replica<Coordinator>,
    shards: Vec<Replica<Shard>>,
    leader: Leader,
    now: Millis,
    acts: VecDeque<Act>,
    packets: VecDeque<Packet>,
    replies: Vec<(Token, Reply)>,
    alarms: Vec<String>,
    /// All decisions that were recorded here, forgotten ones too.
    recorded: Vec<Decision>,
}

impl<'a> Cluster<'a> {
    /// A new cluster that has settled what a case has before its beginning.
    pub fn founded(case: &'a Case, contents: &Contents) -> Result<Cluster<'a>, String> {
        guarded(|| Cluster::found(case, contents)).unwrap_or_else(Err)
    }

    fn found(case: &'a Case, contents: &Contents) -> Result<Cluster<'a>, String> {
        let coordinator = empty::<Coordinator>(&());
        let shards = case.placement().all().map(|shard| empty::<Shard>(&shard_config(case, shard))).collect();
        let mut cluster = Cluster::elected(case, coordinator, shards);
        for batch in &contents.batches[..contents.first] {
            cluster.rest();
            cluster.submit(batch);
        }
        // Outcomes go with the next tick, and what is finished is recorded with the one after. A clock that stands still is enough
        // for that.
        for _ in 0..2 {
            cluster.rest();
            cluster.tick(0);
        }
        cluster.rest();
        match cluster.alarms.first() {
            Some(alarm) => Err(format!("before anything happens: {alarm}")),
            None if cluster.is_at_rest() => Ok(cluster),
            None => Err("G8: a cluster without any fault does not come to rest".to_owned()),
        }
    }

    /// A new leader over groups as they are.
    fn elected(
        case: &'a Case,
        mut coordinator: Replica<Coordinator>,
        shards: Vec<Replica<Shard>>,
    ) -> Cluster<'a> {
        let (leader, effects) = open_epoch(&mut coordinator, case);
        let mut cluster = Cluster {
            case,
            coordinator,
            shards,
            leader,
            now: START,
            acts: VecDeque::new(),
            packets: VecDeque::new(),
            replies: Vec::new(),
            alarms: Vec::new(),
            recorded: Vec::new(),
        };
        cluster.perform(effects);
        cluster
    }

    /// All decisions.
    pub fn decisions(&self) -> Vec<Decision> {
        let listed = self.coordinator.machine.list(&self.coordinator.store, 0, usize::MAX);
        listed.expect("memory doesn't fail").0.into_iter().map(|listed| listed.decision).collect()
    }

    /// The groups and the leader.
    pub fn into_parts(self) -> (Replica<Coordinator>, Vec<Replica<Shard>>, Leader) {
        (self.coordinator, self.shards, self.leader)
    }

    fn step(&mut self, event: Event) {
        let mut effects = Effects::default();
        self.leader.step(event, &Lookup(&self.coordinator), &mut effects);
        self.leader.seal(&mut effects);
        self.perform(effects);
    }

    fn perform(&mut self, effects: Effects) {
        let Effects { act, to_shards, reads, replies, confirm, step_down, alarms } = effects;
        if !act.is_empty() {
            self.acts.push_back(act);
        }
        self.packets.extend(to_shards.into_iter().map(|(shard, message)| Packet::ToShard(shard, message)));
        self.packets.extend(reads.into_iter().map(|(shard, asked, read)| Packet::Read(shard, asked, read)));
        self.replies.extend(replies);
        self.alarms.extend(alarms);
        self.alarms.extend(step_down.map(|why| format!("the only leader steps down: {why}")));
        if let Some(asked) = confirm {
            self.step(Event::Confirmed { asked });
        }
    }

    fn submit(&mut self, batch: &Batch) {
        let batch = batch.split(self.case.placement());
        self.step(Event::Submit { token: HEALING_TOKEN, batch });
    }

    fn tick(&mut self, millis: u64) {
        self.now = Millis(self.now.0 + millis);
        self.step(Event::Tick { now: self.now });
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Applied(acted) => self.step(Event::Applied(acted)),
            Heard::OldEpoch => self.alarms.push("the only leader is told of a newer epoch".to_owned()),
        }
    }

    fn record(&mut self, act: Act) {
        match apply_to_coordinator(&mut self.coordinator, &CoordinatorEntry::Act(act)) {
            CoordinatorReply::Acted(acted) => {
                self.recorded.extend(acted.decisions.iter().cloned());
                self.hear(Heard::Applied(acted));
            }
            CoordinatorReply::OldEpoch { .. } => self.hear(Heard::OldEpoch),
            other => self.alarms.push(format!("an act is answered with {other:?}")),
        }
    }

    /// Delivers and records until nothing is on its way.
    fn rest(&mut self) {
        for _ in 0..DELIVERIES_MAX {
            if let Some(packet) = self.packets.pop_front() {
                self.deliver(packet);
            } else if let Some(act) = self.acts.pop_front() {
                self.record(act);
            } else {
                return;
            }
        }
        self.alarms.push("the cluster talks without end".to_owned());
        self.packets.clear();
    }

    fn deliver(&mut self, packet: Packet) {
        match packet {
            Packet::ToShard(shard, message) => {
                let reply = apply_to_shard(&mut self.shards[shard.0 as usize - 1], self.case.room, &message);
                self.alarms.extend(reply.alarms);
                let answers = reply.messages.into_iter().map(|(_, answer)| Packet::FromShard(shard, answer));
                self.packets.extend(answers);
            }
            Packet::Read(shard, request, read) => {
                let replica = &self.shards[shard.0 as usize - 1];
                let answer = replica.machine.read(&replica.store, GroupId::COORDINATOR, &read);
                // Who has to wait is asked again.
                let answer = answer.expect("memory doesn't fail");
                self.packets.extend(answer.map(|answer| Packet::Answer(shard, request, answer)));
            }
            Packet::FromShard(shard, message) => self.step(Event::FromShard { shard, message }),
            Packet::Answer(shard, request, answer) => {
                self.step(Event::ReadAnswered { shard, request, answer });
            }
        }
    }

    fn is_at_rest(&self) -> bool {
        let counts = self.shards.iter().map(|shard| shard.machine.counts());
        self.leader.is_recovered()
            && self.leader.in_flight() == 0
            && self.coordinator.machine.counts().unfinished == 0
            && counts
                .into_iter()
                .all(|counts| (counts.in_doubt, counts.waiting, counts.held_rows) == (0, 0, 0))
            && self.shards.iter().all(|shard| shard.machine.held().next().is_none())
    }

    /// Lets time pass until everything has ended.
    fn come_to_rest(&mut self) -> Result<(), String> {
        for _ in 0..TICKS_MAX {
            self.rest();
            if self.is_at_rest() || !self.alarms.is_empty() {
                break;
            }
            self.tick(TICK_MS);
        }
        if let Some(alarm) = self.alarms.first() {
            return Err(format!("healing: {alarm}"));
        }
        if self.is_at_rest() {
            return Ok(());
        }
        let held: Vec<String> = self
            .shards
            .iter()
            .flat_map(|shard| rules::held(shard).into_iter().map(|part| (shard.machine.id(), part)))
            .map(|(shard, part)| {
                format!("shard {shard} holds {} {}", verdict_protocol::show::name_of(part.id), part.number)
            })
            .collect();
        Err(format!(
            "G8: {TICKS_MAX} seconds after the last fault the cluster is not at rest: recovered: {}, in flight: {}, \
             unfinished: {}, {held:?}",
            self.leader.is_recovered(),
            self.leader.in_flight(),
            self.coordinator.machine.counts().unfinished
        ))
    }

    /// Heals, then lets clients try again what they submitted, then settles two batches more.
    fn heal(mut self, contents: &Contents, submitted: &[Batch], known: &[Decision]) -> Result<(), String> {
        self.come_to_rest()?;
        for batch in submitted {
            self.replies.clear();
            self.submit(batch);
            self.come_to_rest()?;
            self.is_decided(batch.id, known)?;
        }
        self.is_true(contents, known)?;
        // The marks ride along with the next messages, so what was finished is forgotten with them.
        for (place, letter) in ['Y', 'Z'].into_iter().enumerate() {
            let now = Millis(START.0 + 12 * 3_600_000 + place as u64);
            let batch = self.case.closing(letter, now);
            self.submit(&batch);
            self.come_to_rest()?;
            if !self.recorded.iter().any(|decision| decision.id == batch.id && decision.result.is_ok()) {
                return Err("G8: a healed cluster does not settle a new batch".to_owned());
            }
        }
        for shard in &self.shards {
            let remembered = shard.machine.finished_numbers();
            if remembered > 1 {
                let id = shard.machine.id();
                return Err(format!("G9: shard {id} remembers {remembered} finished numbers above the mark"));
            }
        }
        Ok(())
    }

    /// The shards hold what all decisions, forgotten ones too, make of them.
    fn is_true(&self, contents: &Contents, known: &[Decision]) -> Result<(), String> {
        let mut decisions = known.to_vec();
        for decision in &self.recorded {
            match decisions.iter().find(|old| old.id == decision.id) {
                None => decisions.push(decision.clone()),
                Some(old) if old == decision => {}
                Some(old) => return Err(format!("R1: {decision:?} is recorded after {old:?}")),
            }
        }
        let witness = Witness { decisions, ..Witness::default() };
        self.shards
            .iter()
            .try_for_each(|shard| rules::shard_and_witness(contents, self.case.placement(), shard, &witness))
    }

    /// An answer came, and tells what stands.
    fn is_decided(&mut self, id: BatchId, known: &[Decision]) -> Result<(), String> {
        let name = verdict_protocol::show::name_of(id);
        let stands = known.iter().chain(&self.recorded).find(|one| one.id == id);
        let mut replies = std::mem::take(&mut self.replies).into_iter();
        let reply = replies.find(|(token, _)| *token == HEALING_TOKEN).map(|(_, reply)| reply);
        match (reply, stands) {
            (Some(Reply::Decided(told)), Some(stands)) if told == *stands => Ok(()),
            (Some(Reply::Refused(Refusal::DifferentContents)), Some(_)) => Ok(()),
            (Some(Reply::Refused(Refusal::TooOld { .. })), _) if self.case.forgetful => Ok(()),
            (reply, stands) => {
                Err(format!("G8: {name}, submitted again, is answered {reply:?}, and {stands:?} stands"))
            }
        }
    }
}

/// How a state is healed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Healing {
    /// The newest leader is dead, or dies: another one is elected.
    NewLeader,
    /// The newest leader goes on.
    SameLeader,
}

/// What decides how healing goes: states that have this in common need it once. None: it can't be healed in this way.
pub fn what_counts(model: &Model, state: &State, healing: Healing) -> Option<Vec<u32>> {
    let witness = model.witnesses.get(state.witness);
    let submitted = witness.submitted.iter().enumerate();
    let submitted = submitted.fold(0, |mask, (place, after)| mask | u32::from(after.is_some()) << place);
    let mut words = vec![state.coordinator, submitted];
    words.extend(&state.shards);
    if healing == Healing::SameLeader {
        let newest = *state.seats.last().expect("there is always a last seat");
        model.parts.seats.get(newest).leader?;
        words.push(newest);
    }
    Some(words)
}

/// Heals a state; an error tells what remains.
pub fn heal(model: &Model, state: &State, healing: Healing) -> Result<(), String> {
    let parts = &model.parts;
    let witness = model.witnesses.get(state.witness);
    let submitted: Vec<Batch> = parts
        .contents
        .batches
        .iter()
        .zip(&witness.submitted)
        .filter(|(_, after)| after.is_some())
        .map(|(batch, _)| batch.clone())
        .collect();
    let coordinator = parts.coordinators.get(state.coordinator).clone();
    let shards = state.shards.iter().map(|shard| parts.shards.get(*shard).clone()).collect();
    let healed = guarded(|| {
        let cluster = match healing {
            Healing::NewLeader => Cluster::elected(&parts.case, coordinator, shards),
            Healing::SameLeader => {
                let newest = *state.seats.last().expect("there is always a last seat");
                let seat = parts.seats.get(newest);
                let (leader, acts, heard) = parts.seated(seat);
                let mut cluster = Cluster {
                    case: &parts.case,
                    coordinator,
                    shards,
                    leader: leader.expect("was looked at before"),
                    now: clock(seat.ticks),
                    acts: acts.into(),
                    packets: VecDeque::new(),
                    replies: Vec::new(),
                    alarms: Vec::new(),
                    recorded: Vec::new(),
                };
                for heard in heard {
                    cluster.hear(heard);
                }
                if let Some(asked) = seat.confirm {
                    cluster.step(Event::Confirmed { asked });
                }
                // What was sent is lost, and so are the connections.
                for shard in parts.case.placement().all() {
                    cluster.step(Event::Reconnected { shard });
                }
                cluster
            }
        };
        cluster.heal(&parts.contents, &submitted, &witness.decisions)
    });
    healed.unwrap_or_else(Err).map_err(|why| format!("{why} (healed with {})", with(healing)))
}

fn with(healing: Healing) -> &'static str {
    match healing {
        Healing::NewLeader => "a new leader",
        Healing::SameLeader => "the same leader",
    }
}
