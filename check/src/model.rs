//! The cluster as a whole: its states, and everything that can happen next in one.

use verdict_protocol::{
    ids::BatchId,
    leader::{Refusal, Reply, Token},
    messages::{Decision, HeldPart},
};

use crate::{
    case::{ANY, Bound, Case},
    heal,
    parts::{Input, LeaderStep, Packet, Parts, READ_TOKEN, SEAL_TOKEN, Seat, submit_token},
    rules::{self, Witness},
    tables::{Interner, Memo},
};

/// A state of the cluster. All but what is left of the bounds are numbers of [`Parts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The coordinator group.
    pub coordinator: u32,
    /// What was seen.
    pub witness: u32,
    /// How often each thing may still happen.
    pub left: [u8; 8],
    /// The shards.
    pub shards: Vec<u32>,
    /// The leaders; the last one is that of the newest epoch.
    pub seats: Vec<u32>,
    /// What is on its way, in ascending order. Two equal messages are one; that it comes twice is a repeat.
    pub packets: Vec<u32>,
}

impl State {
    /// As words, to be hashed and kept.
    pub fn encode(&self) -> Vec<u32> {
        let [a, b, c, d, e, f, g, h] = self.left;
        let left = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])];
        let mut words = Vec::with_capacity(5 + self.shards.len() + self.seats.len() + self.packets.len());
        words.extend([self.coordinator, self.witness, left[0], left[1], self.seats.len() as u32]);
        words.extend(&self.shards);
        words.extend(&self.seats);
        words.extend(&self.packets);
        words
    }

    /// From what [`State::encode`] made.
    pub fn decode(words: &[u32], shards: usize) -> State {
        let (seats, packets) = (5 + shards, 5 + shards + words[4] as usize);
        let mut left = [0; 8];
        left[..4].copy_from_slice(&words[2].to_le_bytes());
        left[4..].copy_from_slice(&words[3].to_le_bytes());
        State {
            coordinator: words[0],
            witness: words[1],
            left,
            shards: words[5..seats].to_vec(),
            seats: words[seats..packets].to_vec(),
            packets: words[packets..].to_vec(),
        }
    }

    fn left(&self, bound: Bound) -> u8 {
        self.left[bound as usize]
    }

    fn spend(&mut self, bound: Bound) {
        let left = &mut self.left[bound as usize];
        *left -= 1;
    }

    fn send(&mut self, packets: &[u32]) {
        for packet in packets {
            if let Err(place) = self.packets.binary_search(packet) {
                self.packets.insert(place, *packet);
            }
        }
    }

    fn take(&mut self, packet: u32, keep: bool) {
        if !keep && let Ok(place) = self.packets.binary_search(&packet) {
            self.packets.remove(place);
        }
    }
}

/// One thing that can happen. `seat` is a place among the leaders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    /// A client submits the batch with this place in the case.
    Submit { seat: u8, batch: u8 },
    /// A client seals the id of the batch with this place.
    Seal { batch: u8 },
    /// A client reads the rows of the case.
    Read { seat: u8 },
    /// A message reaches a shard, or a leader; kept, it will come again.
    Deliver { seat: u8, packet: u32, keep: bool },
    /// The first thing that a leader has proposed is in the log.
    Record { seat: u8 },
    /// The log's answer reaches the leader.
    Hear { seat: u8 },
    /// The newest leader hears that it still led.
    Confirm,
    /// A leader's clock moves.
    Tick { seat: u8 },
    /// It ticks without moving: outcomes wait for no prepare any longer.
    Beat { seat: u8 },
    /// A new leader opens its epoch.
    Elect,
    /// A shard is led elsewhere, and the newest leader learns it.
    Move { shard: u8 },
    /// A shard asks about what it has in doubt.
    Ask { shard: u8 },
}

impl Action {
    /// As one word.
    pub fn encode(self) -> u64 {
        let word = |kind: u64, a: u8, b: u8, packet: u32| {
            kind | u64::from(a) << 8 | u64::from(b) << 16 | u64::from(packet) << 32
        };
        match self {
            Action::Submit { seat, batch } => word(0, seat, batch, 0),
            Action::Seal { batch } => word(1, 0, batch, 0),
            Action::Read { seat } => word(2, seat, 0, 0),
            Action::Deliver { seat, packet, keep } => word(3, seat, u8::from(keep), packet),
            Action::Record { seat } => word(4, seat, 0, 0),
            Action::Hear { seat } => word(5, seat, 0, 0),
            Action::Confirm => word(6, 0, 0, 0),
            Action::Tick { seat } => word(7, seat, 0, 0),
            Action::Elect => word(8, 0, 0, 0),
            Action::Move { shard } => word(9, shard, 0, 0),
            Action::Ask { shard } => word(10, shard, 0, 0),
            Action::Beat { seat } => word(11, seat, 0, 0),
        }
    }

    /// From what [`Action::encode`] made.
    pub fn decode(word: u64) -> Action {
        let (a, b, packet) = ((word >> 8) as u8, (word >> 16) as u8, (word >> 32) as u32);
        match word & 0xff {
            0 => Action::Submit { seat: a, batch: b },
            1 => Action::Seal { batch: b },
            2 => Action::Read { seat: a },
            3 => Action::Deliver { seat: a, packet, keep: b == 1 },
            4 => Action::Record { seat: a },
            5 => Action::Hear { seat: a },
            6 => Action::Confirm,
            7 => Action::Tick { seat: a },
            8 => Action::Elect,
            9 => Action::Move { shard: a },
            10 => Action::Ask { shard: a },
            11 => Action::Beat { seat: a },
            kind => unreachable!("there is no action {kind}"),
        }
    }
}

/// The model of a case.
pub struct Model {
    /// The parts and their steps.
    pub parts: Parts,
    /// What was seen, by number.
    pub witnesses: Interner<Witness>,
    ids: Vec<BatchId>,
    shard_and_witness: Memo<(u32, u32), Result<(), String>>,
    shard_and_coordinator: Memo<(u32, u32), Result<(), String>>,
    /// Ids of which a leader would say that there is no trace.
    not_seen: Memo<(u32, u32), Result<Vec<BatchId>, String>>,
}

impl Model {
    /// The model of a case, and its first state: a leader whom all shards have greeted, and what the case has settled before.
    pub fn new(case: &Case) -> Result<(Model, State), String> {
        let model = Model {
            parts: Parts::new(case),
            witnesses: Interner::default(),
            ids: case.contents().ids(),
            shard_and_witness: Memo::default(),
            shard_and_coordinator: Memo::default(),
            not_seen: Memo::default(),
        };
        let cluster = heal::Cluster::founded(case, &model.parts.contents)?;
        let decisions = cluster.decisions();
        let told = decisions.iter().filter_map(|decision| decision.result.clone().ok()).max();
        let mut submitted = vec![None; model.parts.contents.batches.len()];
        submitted[..model.parts.contents.first].fill(Some(Default::default()));
        let witness = Witness { decisions, submitted, told: told.unwrap_or_default(), ..Witness::default() };
        let (coordinator, shards, leader) = cluster.into_parts();
        let state = State {
            coordinator: model.parts.coordinators.number(coordinator),
            witness: model.witnesses.number(witness),
            left: case.bounds.left(),
            shards: shards.into_iter().map(|shard| model.parts.shards.number(shard)).collect(),
            seats: vec![model.parts.seat(leader)],
            packets: Vec::new(),
        };
        Ok((model, state))
    }

    fn case(&self) -> &Case {
        &self.parts.case
    }

    /// Everything that can happen in a state.
    pub fn actions(&self, state: &State) -> Vec<Action> {
        let mut actions = Vec::new();
        let witness = self.witnesses.get(state.witness);
        let newest = state.seats.len() - 1;
        let repeats = state.left(Bound::Repeats);
        for (place, number) in state.seats.iter().enumerate() {
            let seat = place as u8;
            let values = self.parts.seats.get(*number);
            if !values.acts.is_empty() {
                actions.push(Action::Record { seat });
            }
            if values.leader.is_none() {
                continue;
            }
            if !values.heard.is_empty() {
                actions.push(Action::Hear { seat });
            }
            for batch in self.parts.contents.first..self.parts.contents.batches.len() {
                if witness.submitted[batch].is_none() || state.left(Bound::Retries) > 0 {
                    actions.push(Action::Submit { seat, batch: batch as u8 });
                }
            }
            if state.left(Bound::Reads) > 0 {
                actions.push(Action::Read { seat });
            }
            if state.left(Bound::Ticks) > 0 {
                actions.push(Action::Tick { seat });
            }
            if values.leader.is_some_and(|leader| self.parts.leaders.get(leader).has_untold()) {
                actions.push(Action::Beat { seat });
            }
            for packet in &state.packets {
                if let Packet::FromShard(..) | Packet::Answer(..) = self.parts.packets.get(*packet) {
                    deliver(&mut actions, seat, *packet, repeats);
                }
            }
        }
        for packet in &state.packets {
            if let Packet::ToShard(..) | Packet::Read(..) = self.parts.packets.get(*packet) {
                deliver(&mut actions, 0, *packet, repeats);
            }
        }
        let seat = self.parts.seats.get(state.seats[newest]);
        if seat.leader.is_some() {
            if seat.confirm.is_some() {
                actions.push(Action::Confirm);
            }
            if state.left(Bound::Seals) > 0 {
                let first = self.parts.contents.first;
                let last = self.parts.contents.batches.len();
                actions.extend((first..last).map(|batch| Action::Seal { batch: batch as u8 }));
            }
            if state.left(Bound::Moves) > 0 {
                actions.extend((0..state.shards.len()).map(|shard| Action::Move { shard: shard as u8 }));
            }
        }
        if state.left(Bound::Elections) > 0 {
            actions.push(Action::Elect);
        }
        if state.left(Bound::Asks) > 0 {
            actions.extend((0..state.shards.len()).map(|shard| Action::Ask { shard: shard as u8 }));
        }
        actions
    }

    /// What an action leads to; none: to nothing. An error is a rule that it breaks.
    pub fn next(&self, state: &State, action: Action) -> Result<Option<State>, String> {
        let mut next = state.clone();
        let happened = match action {
            Action::Submit { seat, batch } => {
                let mut witness = self.witnesses.get(state.witness).clone();
                let told = witness.told;
                match &mut witness.submitted[usize::from(batch)] {
                    Some(_) => next.spend(Bound::Retries),
                    first => *first = Some(told),
                }
                next.witness = self.witnesses.number(witness);
                self.lead(&mut next, seat, Input::Submit(batch))?
            }
            Action::Seal { batch } => {
                next.spend(Bound::Seals);
                let id = self.parts.contents.batches[usize::from(batch)].id;
                let newest = next.seats.len() as u8 - 1;
                self.lead(&mut next, newest, Input::Seal(id))?
            }
            Action::Read { seat } => {
                next.spend(Bound::Reads);
                let mut witness = self.witnesses.get(state.witness).clone();
                witness.read_after = Some(witness.told);
                next.witness = self.witnesses.number(witness);
                self.lead(&mut next, seat, Input::Read)?
            }
            Action::Deliver { seat, packet, keep } => self.deliver(&mut next, seat, packet, keep)?,
            Action::Record { seat } => self.record(&mut next, seat)?,
            Action::Hear { seat } => self.hear(&mut next, seat)?,
            Action::Confirm => {
                let newest = next.seats.len() - 1;
                let mut seat = self.parts.seats.get(next.seats[newest]).clone();
                let asked = seat.confirm.take().expect("is only done when it was asked");
                next.seats[newest] = self.parts.seats.number(seat);
                self.lead(&mut next, newest as u8, Input::Confirmed(asked))?
            }
            Action::Tick { seat } => {
                next.spend(Bound::Ticks);
                let place = usize::from(seat);
                let mut values = self.parts.seats.get(next.seats[place]).clone();
                values.ticks += 1;
                let ticks = values.ticks;
                next.seats[place] = self.parts.seats.number(values);
                self.lead(&mut next, seat, Input::Tick(ticks))?
            }
            Action::Beat { seat } => {
                let ticks = self.parts.seats.get(next.seats[usize::from(seat)]).ticks;
                self.lead(&mut next, seat, Input::Tick(ticks))?
            }
            Action::Elect => self.elect(&mut next)?,
            Action::Move { shard } => {
                next.spend(Bound::Moves);
                let newest = next.seats.len() as u8 - 1;
                self.lead(&mut next, newest, Input::Reconnected(u32::from(shard) + 1))?
            }
            Action::Ask { shard } => {
                next.spend(Bound::Asks);
                match self.parts.ask(next.shards[usize::from(shard)]) {
                    Some(packet) => next.send(&[packet]),
                    None => return Ok(None),
                }
                true
            }
        };
        Ok((happened && next != *state).then_some(next))
    }

    fn deliver(&self, next: &mut State, seat: u8, packet: u32, keep: bool) -> Result<bool, String> {
        if keep && next.left(Bound::Repeats) != ANY {
            next.spend(Bound::Repeats);
        }
        match self.parts.packets.get(packet) {
            Packet::ToShard(shard, _) => {
                let place = shard.0 as usize - 1;
                let step = self.parts.step_shard(next.shards[place], packet);
                broken(&step.wrong)?;
                next.take(packet, keep);
                next.shards[place] = step.shard;
                next.send(&step.packets);
                if !step.committed.is_empty() {
                    let mut witness = self.witnesses.get(next.witness).clone();
                    for decision in &step.committed {
                        witness.settle(&self.parts.contents, decision)?;
                    }
                    next.witness = self.witnesses.number(witness);
                }
                Ok(true)
            }
            Packet::Read(shard, ..) => {
                let Some(answer) = self.parts.read_shard(next.shards[shard.0 as usize - 1], packet) else {
                    return Ok(false);
                };
                next.take(packet, keep);
                next.send(&[answer]);
                Ok(true)
            }
            Packet::FromShard(..) | Packet::Answer(..) => {
                next.take(packet, keep);
                self.lead(next, seat, Input::Packet(packet))
            }
        }
    }

    /// The log takes the first thing that a leader has proposed.
    fn record(&self, next: &mut State, seat: u8) -> Result<bool, String> {
        let place = usize::from(seat);
        let mut values = self.parts.seats.get(next.seats[place]).clone();
        let step = self.parts.step_coordinator(next.coordinator, values.acts.remove(0));
        broken(&step.wrong)?;
        if !step.recorded.is_empty() {
            let mut witness = self.witnesses.get(next.witness).clone();
            let held: Vec<Vec<HeldPart>> =
                next.shards.iter().map(|shard| rules::held(self.parts.shards.get(*shard))).collect();
            // What a shard has committed was seen when it did.
            let seen = |decision: &&Decision| witness.decision(decision.id) == Some(*decision);
            let unseen: Vec<Decision> =
                step.recorded.iter().filter(|decision| !seen(decision)).cloned().collect();
            for decision in &unseen {
                witness.record(&self.parts.contents, decision, &held)?;
            }
            next.witness = self.witnesses.number(witness);
        }
        next.coordinator = step.coordinator;
        if values.leader.is_some() {
            values.heard.push(step.heard);
        }
        let hears = values.leader.is_some() && self.case().prompt;
        next.seats[place] = self.parts.seats.number(values);
        if hears {
            return self.hear(next, seat);
        }
        Ok(true)
    }

    fn hear(&self, next: &mut State, seat: u8) -> Result<bool, String> {
        let place = usize::from(seat);
        let mut values = self.parts.seats.get(next.seats[place]).clone();
        let heard = values.heard.remove(0);
        if self.parts.is_old_epoch(heard) {
            self.end(next, place);
            return Ok(true);
        }
        next.seats[place] = self.parts.seats.number(values);
        self.lead(next, seat, Input::Heard(heard))
    }

    /// A leader ends. The newest one's seat stays, with what it has proposed: that may still be recorded.
    fn end(&self, next: &mut State, place: usize) {
        if place + 1 < next.seats.len() {
            next.seats.remove(place);
            return;
        }
        let acts = self.parts.seats.get(next.seats[place]).acts.clone();
        next.seats[place] = self.parts.seats.number(Seat { acts, ..Seat::default() });
    }

    fn elect(&self, next: &mut State) -> Result<bool, String> {
        next.spend(Bound::Elections);
        let step = self.parts.open(next.coordinator);
        next.coordinator = step.coordinator;
        let newest = next.seats.len() - 1;
        let is_dead = self.parts.seats.get(next.seats[newest]).leader.is_none();
        if is_dead || !self.case().deposed {
            next.seats.pop();
        }
        // One deposed leader at a time; the older one dies.
        while next.seats.len() > 1 {
            next.seats.remove(0);
        }
        next.seats.push(self.parts.seats.number(Seat::default()));
        let place = next.seats.len() - 1;
        self.perform(next, place, &step.first)?;
        Ok(true)
    }

    /// A leader takes an event, and all that follows is done.
    fn lead(&self, next: &mut State, seat: u8, input: Input) -> Result<bool, String> {
        let place = usize::from(seat);
        let Some(leader) = self.parts.seats.get(next.seats[place]).leader else { return Ok(false) };
        let step = self.parts.step_leader(leader, next.coordinator, input);
        self.perform(next, place, &step)?;
        Ok(step.highest <= self.case().numbers_max)
    }

    fn perform(&self, next: &mut State, place: usize, step: &LeaderStep) -> Result<(), String> {
        broken(&step.wrong)?;
        self.tell(next, &step.replies)?;
        next.send(&step.packets);
        let mut seat = self.parts.seats.get(next.seats[place]).clone();
        seat.leader = step.leader;
        seat.acts.extend(step.act);
        seat.confirm = step.confirm.or(seat.confirm);
        next.seats[place] = self.parts.seats.number(seat);
        if step.leader.is_none() {
            self.end(next, place);
        }
        Ok(())
    }

    /// Answers reach callers, and must be true.
    fn tell(&self, next: &mut State, replies: &[(Token, Reply)]) -> Result<(), String> {
        if replies.is_empty() {
            return Ok(());
        }
        let mut witness = self.witnesses.get(next.witness).clone();
        for (token, reply) in replies {
            self.tell_one(&mut witness, *token, reply)?;
        }
        next.witness = self.witnesses.number(witness);
        Ok(())
    }

    fn tell_one(&self, witness: &mut Witness, token: Token, reply: &Reply) -> Result<(), String> {
        let contents = &self.parts.contents;
        let of_caller = (0..contents.batches.len()).find(|place| submit_token(*place) == token);
        match reply {
            Reply::Decided(decision) => {
                if let Some(place) = of_caller
                    && let Some(hash) = decision.hash
                    && hash != contents.split[place].hash
                {
                    return Err(format!("a caller is told the end of other contents: {decision:?}"));
                }
                witness.tell(decision)
            }
            Reply::Rows { position, rows } => {
                assert_eq!(token, READ_TOKEN, "only the read is answered with rows");
                witness.tell_read(contents, &self.case().read_rows(), *position, rows)
            }
            Reply::InProgress if token == SEAL_TOKEN => Ok(()),
            // A shard that was not heard yet may have committed it by itself, or know the id with these contents.
            Reply::InProgress if of_caller.is_some_and(|place| self.may_be_unknown(place)) => Ok(()),
            Reply::Refused(Refusal::DifferentContents) => {
                let place = of_caller.ok_or("who submits nothing has no contents")?;
                let others = (0..contents.batches.len()).filter(|other| *other != place);
                let id = contents.batches[place].id;
                let mut others = others.filter(|other| contents.batches[*other].id == id);
                if others.any(|other| witness.submitted[other].is_some()) {
                    return Ok(());
                }
                Err("a batch is refused for other contents that nobody submitted".to_owned())
            }
            Reply::Refused(Refusal::TooOld { .. }) if self.case().forgetful => Ok(()),
            Reply::Refused(Refusal::Unavailable { .. }) if token == READ_TOKEN => Ok(()),
            other => Err(format!("{token:?} is answered with {other:?}")),
        }
    }

    /// Whether the caller of a batch may be told that nobody knows.
    fn may_be_unknown(&self, place: usize) -> bool {
        let batches = &self.parts.contents.batches;
        self.case().alone || batches.iter().filter(|batch| batch.id == batches[place].id).count() > 1
    }

    /// All that must hold in a state.
    pub fn check(&self, state: &State) -> Result<(), String> {
        let (contents, placement) = (&self.parts.contents, self.case().placement());
        for shard in &state.shards {
            self.shard_and_witness.get_or((*shard, state.witness), || {
                let (shard, witness) = (self.parts.shards.get(*shard), self.witnesses.get(state.witness));
                rules::shard_and_witness(contents, placement, shard, witness)
            })?;
            self.shard_and_coordinator.get_or((*shard, state.coordinator), || {
                let shard = self.parts.shards.get(*shard);
                let coordinator = self.parts.coordinators.get(state.coordinator);
                rules::shard_and_coordinator(contents, placement, shard, coordinator)
            })?;
        }
        self.check_questions(state)
    }

    /// Whatever a client would be told now about any id is true (promise G6).
    fn check_questions(&self, state: &State) -> Result<(), String> {
        let newest = *state.seats.last().expect("there is always a last seat");
        let Some(leader) = self.parts.seats.get(newest).leader else { return Ok(()) };
        let witness = self.witnesses.get(state.witness);
        let not_seen = self.not_seen.get_or((leader, state.coordinator), || {
            let mut not_seen = Vec::new();
            for id in &self.ids {
                match self.parts.ask_leader(leader, state.coordinator, *id) {
                    Some(Reply::NotSeen) => not_seen.push(*id),
                    Some(Reply::Decided(decision)) => witness.clone().tell(&decision)?,
                    Some(Reply::Refused(Refusal::TooOld { .. })) if self.case().forgetful => {}
                    Some(Reply::InProgress) => {}
                    other => return Err(format!("a question about {id} is answered with {other:?}")),
                }
            }
            Ok(not_seen)
        })?;
        for id in not_seen {
            let held = state.shards.iter().flat_map(|shard| rules::held(self.parts.shards.get(*shard)));
            if witness.decision(id).is_some() || held.into_iter().any(|part| part.id == id) {
                return Err(format!(
                    "a question about {id} is answered NOT_SEEN, and there is a trace of it"
                ));
            }
        }
        Ok(())
    }
}

fn deliver(actions: &mut Vec<Action>, seat: u8, packet: u32, repeats: u8) {
    if repeats != ANY {
        actions.push(Action::Deliver { seat, packet, keep: false });
    }
    if repeats > 0 {
        actions.push(Action::Deliver { seat, packet, keep: true });
    }
}

fn broken(wrong: &Option<String>) -> Result<(), String> {
    wrong.as_ref().map_or(Ok(()), |wrong| Err(wrong.clone()))
}
