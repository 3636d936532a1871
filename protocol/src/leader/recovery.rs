//! Greeting the shards, and ending what earlier epochs left behind (rules R11 and R12).
//!
//! A shard's answer to the greeting lists all that it holds, and nothing of an older epoch takes any of it away afterwards. So what a
//! greeted shard did not list it will never vote YES for in an older epoch, and what all participants list as YES under one number
//! can be committed: nothing that was ready to commit is lost with its leader. What it listed as committed is so, and is recorded as
//! such; what it was asked to commit by itself and did not list, it never will.

use std::collections::BTreeMap;

use crate::{
    ids::{BatchId, Millis, Number, ShardId},
    messages::{Abort, AbortReason, Decision, Greeting, HeldPart, PartOutcome, VoteKind},
};

use super::{Decisions, Effects, Flight, Leader, Remembered, Stage};

impl Leader {
    pub(super) fn greet(&mut self, shard: ShardId, effects: &mut Effects) {
        effects.to_shards.entry(shard).or_default().greet = true;
        let now = self.now;
        self.view(shard).greeted_at = now;
    }

    /// A decision that these participants have not confirmed, or not to this leader.
    pub(super) fn adopt_decision(&mut self, decision: Decision, missing: &[ShardId], finished: bool) {
        let id = decision.id;
        let missing: BTreeMap<ShardId, Number> =
            missing.iter().map(|shard| (*shard, decision.number)).collect();
        for (shard, number) in &missing {
            // Sent once the shard has answered the greeting.
            self.view(*shard).outstanding.insert(*number, (id, Millis(0)));
        }
        let (hash, shards) = (decision.hash, decision.shards.clone());
        self.flights.insert(id, Flight::new(hash, shards, Stage::Telling { decision, missing, finished }));
    }

    pub(super) fn greeted(
        &mut self,
        shard: ShardId,
        greeting: Greeting,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        if greeting.epoch > self.epoch {
            effects.step_down =
                Some(format!("shard {shard} has recorded the newer epoch {}", greeting.epoch));
            return;
        }
        // A late answer, to an earlier greeting or a second time, lists nothing that still counts.
        if greeting.epoch < self.epoch || self.view(shard).greeted {
            return;
        }
        self.view(shard).greeted = true;
        for part in greeting.parts {
            self.adopt(shard, part, decisions, effects);
        }
        if self.all_greeted() {
            self.ask_for_windows(effects);
        }
        let recovering: Vec<BatchId> = self.recovering.iter().copied().collect();
        for id in recovering {
            self.try_to_recover(id, effects);
        }
        let parked: Vec<BatchId> = self.parked.iter().copied().collect();
        for id in parked {
            self.start_if_greeted(id, effects);
        }
        self.resend(shard, Millis(0), effects);
        self.begin_early(effects);
    }

    /// A shard asks about a part that it has held for long. If the question is late, the part may have ended since; what is too
    /// old to be remembered has.
    pub(super) fn asked(
        &mut self,
        shard: ShardId,
        part: HeldPart,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        let known = self.view(shard).outstanding.contains_key(&part.number);
        let forgotten = matches!(decisions.remembered(part.id), Remembered::Forgotten { .. });
        if !known && !forgotten && self.view(shard).greeted {
            let id = part.id;
            self.adopt(shard, part, decisions, effects);
            if self.recovering.contains(&id) {
                self.try_to_recover(id, effects);
            }
        }
    }

    /// Takes over a part that a shard listed.
    fn adopt(&mut self, shard: ShardId, part: HeldPart, decisions: &dyn Decisions, effects: &mut Effects) {
        let HeldPart { number, id, hash, shards, vote } = part;
        if number.epoch >= self.epoch {
            return;
        }
        let now = self.now;
        self.view(shard).outstanding.insert(number, (id, Millis(0)));
        if let VoteKind::Committed(stamp) = vote {
            let decision = Decision { id, hash: Some(hash), shards, number, result: Ok(stamp) };
            return self.adopt_commit(shard, decision, decisions, effects);
        }
        if !self.flights.contains_key(&id) {
            match decisions.remembered(id) {
                Remembered::Decided(decision) if decision.result.is_ok() && decision.hash == Some(hash) => {
                    // The shard has confirmed it between the greeting and now; its own word ends it once more.
                    return self.adopt_decision(decision, &[shard], false);
                }
                // Behind the horizon there is no decision any more, and never will be one to commit. If it was committed, the shard
                // has confirmed it since it made this list, and an abort changes nothing.
                Remembered::Decided(_) | Remembered::Forgotten { .. } => {
                    return self.stray(shard, number, id, effects);
                }
                Remembered::Nothing => {}
            }
            self.recovering.insert(id);
            let stage = Stage::Recovering { since: now, mixed: false };
            let mut flight = Flight::new(Some(hash), shards, stage);
            flight.listed.insert(shard, (number, vote == VoteKind::Yes));
            self.flights.insert(id, flight);
            return;
        }
        let all_greeted = self.all_greeted();
        let flight = self.flights.get_mut(&id).expect("was just found");
        let same = flight.hash.is_none_or(|known| known == hash);
        match &mut flight.stage {
            Stage::Recovering { mixed, .. } => {
                *mixed |= !same;
                flight.listed.insert(shard, (number, vote == VoteKind::Yes));
            }
            Stage::Parked(_) => {
                // A caller was faster than this greeting. The batch is recovered, never started again.
                flight.hash = Some(hash);
                flight.shards = shards;
                flight.stage = Stage::Recovering { since: now, mixed: false };
                if !same {
                    for token in std::mem::take(&mut flight.waiters) {
                        effects.replies.push((token, flight.stage.with_other_contents(all_greeted)));
                    }
                }
                flight.listed.insert(shard, (number, vote == VoteKind::Yes));
                self.parked.remove(&id);
                self.recovering.insert(id);
            }
            Stage::Deciding { commit: false, .. } if same => {
                flight.listed.insert(shard, (number, vote == VoteKind::Yes));
            }
            Stage::Telling { decision, missing, .. } if same => match decision.result {
                Ok(_) if number == decision.number => {
                    missing.insert(shard, number);
                }
                Ok(_) => effects.alarms.push(format!(
                    "shard {shard} holds batch {id} under {number}, but it is committed under {}",
                    decision.number
                )),
                Err(_) => {
                    if let Some(other) = missing.insert(shard, number)
                        && other != number
                    {
                        self.view(shard).outstanding.remove(&other);
                    }
                }
            },
            Stage::Preparing { .. }
            | Stage::Deciding { .. }
            | Stage::Recording { .. }
            | Stage::Telling { .. }
                if same =>
            {
                effects.alarms.push(format!(
                    "shard {shard} lists batch {id} under {number}, though it was taken up without it (rule R12)"
                ));
            }
            // Other contents under the same id, which can never commit any more.
            Stage::Preparing { .. }
            | Stage::Deciding { .. }
            | Stage::Recording { .. }
            | Stage::Telling { .. } => {
                self.stray(shard, number, id, effects);
            }
        }
    }

    /// Decides a batch that an earlier epoch left undecided, as soon as enough is known.
    fn try_to_recover(&mut self, id: BatchId, effects: &mut Effects) {
        let flight = &self.flights[&id];
        let Stage::Recovering { mixed, .. } = flight.stage else { return };
        let mut numbers = flight.listed.values().map(|(number, _)| number);
        let first = *numbers.next().expect("a batch in recovery was listed by a shard");
        let uneven = mixed || numbers.any(|number| *number != first);
        let refused = flight.listed.values().any(|(_, yes)| !yes);
        let mut unknown = false;
        let mut absent = false;
        for shard in &flight.shards {
            match (flight.listed.contains_key(shard), self.shards[shard].greeted) {
                (true, _) => {}
                (false, true) => absent = true,
                (false, false) => unknown = true,
            }
        }
        if uneven || refused || absent {
            self.decide_abort(id, Abort::because(AbortReason::Interrupted), effects);
        } else if !unknown {
            self.decide_commit(id, first, effects);
        }
    }

    /// Gives up waiting for participants that can't be reached.
    pub(super) fn lose_patience(&mut self, effects: &mut Effects) {
        let patience = self.config.patience_ms;
        let late: Vec<BatchId> = self
            .recovering
            .iter()
            .filter(|id| match self.flights[*id].stage {
                Stage::Recovering { since, .. } => self.now.0 >= since.0 + patience,
                _ => false,
            })
            .copied()
            .collect();
        for id in late {
            self.decide_abort(id, Abort::because(AbortReason::Interrupted), effects);
        }
    }

    /// Aborts a part, and with it what the shard may hold of earlier tries of this epoch.
    pub(super) fn stray(&mut self, shard: ShardId, number: Number, id: BatchId, effects: &mut Effects) {
        for tried in self.tried_before(id, number) {
            self.strays.remove(&(shard, tried));
        }
        self.strays.insert((shard, number), id);
        self.send_stray(shard, number, id, effects);
    }

    /// The numbers of this epoch under which a batch was tried before this one.
    pub(super) fn tried_before(&self, id: BatchId, number: Number) -> Vec<Number> {
        let tries = self.flights.get(&id).map_or(&[][..], |flight| &flight.tries);
        tries.iter().copied().filter(|tried| *tried < number).collect()
    }

    pub(super) fn send_stray(&self, shard: ShardId, number: Number, id: BatchId, effects: &mut Effects) {
        let outcome = PartOutcome { id, number, commit: None, gives_up: self.tried_before(id, number) };
        effects.to_shards.entry(shard).or_default().outcomes.push(outcome);
    }
}
