//! Batches on one shard: it commits them by itself, and the log records that in passing (rule R13).
//!
//! A leader that lets a shard do so, and every later one, decides nothing about the batch before the shard has answered. What an
//! earlier leader let a shard commit is known when the shard has answered the greeting. Until then an id that the shard may have
//! committed is neither started, with whatever contents on whatever shards, nor sealed. Which ids these may be the log knows ahead: they
//! lie in the shard's [`Window`]. An id made a second after the last leader died lies beyond them, so a shard that is out of reach
//! holds up nobody who doesn't touch it (promise G9).
//!
//! Nothing else has to wait. A batch that is recovered was started by an earlier leader, and that one knew that no shard had committed
//! its id; and no leader lets a shard commit anything before all shards have told what they hold of earlier ones.

use crate::{
    coordinator::Window,
    ids::{BatchId, Millis, Number, ShardId, Stamp},
    messages::Decision,
};

use super::{Decisions, Effects, Flight, Leader, Refusal, Remembered, Reply, Stage};

impl Leader {
    /// The stamp at which the only participant of a batch may commit it by itself; none: the batch goes the ordinary way.
    ///
    /// A shard that is silent is not let: while it doesn't answer, nobody can decide.
    pub(super) fn let_alone(&mut self, shard: ShardId, id: BatchId, effects: &mut Effects) -> Option<Stamp> {
        if !self.config.alone || !self.all_greeted() || self.is_silent(shard) {
            return None;
        }
        self.ask_for_window(shard, effects);
        let view = &self.shards[&shard];
        // What was asked for may be recorded before the prepare arrives.
        if !view.window.contains(id) || id.time() <= view.window_asked.after {
            return None;
        }
        let stamp = self.give_stamp(effects)?;
        self.view(shard).alone.insert(stamp);
        Some(stamp)
    }

    /// So that the first batches needn't take two rounds.
    pub(super) fn ask_for_windows(&mut self, effects: &mut Effects) {
        if self.config.alone {
            let placement = self.config.placement;
            placement.all().for_each(|shard| self.ask_for_window(shard, effects));
        }
    }

    /// Asks for a later window before the present one is used up, so that nobody waits for it. It ends shortly ahead of the clock, and
    /// begins before all that is not recorded.
    fn ask_for_window(&mut self, shard: ShardId, effects: &mut Effects) {
        let ahead = self.config.alone_ahead_ms;
        if self.shards[&shard].window_asked.up_to.0 > self.now.0 + ahead / 2 {
            return;
        }
        let behind = self.now.0.saturating_sub(self.config.alone_behind_ms);
        let wanted =
            Window { after: Millis(behind.min(self.before_undecided())), up_to: Millis(self.now.0 + ahead) };
        let view = self.view(shard);
        view.window_asked = view.window_asked.later(wanted);
        effects.act.windows.insert(shard, view.window_asked);
    }

    /// A shard that has not answered the greeting, and may have committed this id by itself for an earlier leader.
    pub(super) fn hidden_by(&self, id: BatchId) -> Option<ShardId> {
        let mut hiding = self.shards.iter().filter(|(_, view)| !view.greeted && view.window.contains(id));
        hiding.next().map(|(shard, _)| *shard)
    }

    /// The only participant of a batch has committed it, under one of its numbers. Repeated, it says nothing new. What a deposed leader
    /// asked for is in the answer to the greeting too, and counts from there.
    pub(super) fn committed(
        &mut self,
        shard: ShardId,
        id: BatchId,
        number: Number,
        stamp: Stamp,
        effects: &mut Effects,
    ) {
        if number.epoch != self.epoch {
            return;
        }
        let Some(flight) = self.flights.get(&id) else { return };
        match &flight.stage {
            Stage::Preparing { pending, alone, .. }
                if flight.shards == [shard] && flight.tries.contains(&number) =>
            {
                let (deadline, alone) = (pending.deadline, *alone);
                let (hash, shards) = (flight.hash, flight.shards.clone());
                self.deadlines.remove(&(deadline, id));
                self.settle(Decision { id, hash, shards, number, result: Ok(stamp) }, effects);
                if let Some(stamp) = alone {
                    self.answered_alone(shard, stamp, effects);
                }
            }
            Stage::Recording { .. } => {}
            Stage::Telling { decision, .. } if decision.result == Ok(stamp) => {}
            Stage::Parked(_)
            | Stage::Preparing { .. }
            | Stage::Recovering { .. }
            | Stage::Deciding { .. }
            | Stage::Telling { .. } => effects.alarms.push(format!(
                "shard {shard} has committed batch {id} under {number}, though it was not to be (rule R13)"
            )),
        }
    }

    /// A batch is committed, by the word of its only participant.
    fn settle(&mut self, decision: Decision, effects: &mut Effects) {
        let id = decision.id;
        self.leave_lines(id);
        let flight = self.flights.get_mut(&id).expect("a batch that is settled is in flight");
        for token in std::mem::take(&mut flight.waiters) {
            effects.replies.push((token, Reply::Decided(decision.clone())));
        }
        flight.stage = Stage::Recording { decision: decision.clone() };
        self.recovering.remove(&id);
        self.parked.remove(&id);
        self.settled.push(decision);
    }

    /// A shard that could commit at this stamp has answered: reads above it needn't wait any more.
    pub(super) fn answered_alone(&mut self, shard: ShardId, stamp: Stamp, effects: &mut Effects) {
        self.view(shard).alone.remove(&stamp);
        self.release_reads(shard, effects);
    }

    /// Takes over what a shard has committed by itself for an earlier leader.
    pub(super) fn adopt_commit(
        &mut self,
        shard: ShardId,
        decision: Decision,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        let id = decision.id;
        let Some(flight) = self.flights.get_mut(&id) else {
            match decisions.remembered(id) {
                Remembered::Decided(recorded) if recorded == decision => {
                    self.adopt_decision(decision, &[shard], true);
                }
                Remembered::Decided(recorded) => contradicted(shard, &decision, &recorded, effects),
                // Behind the horizon it may be forgotten already. To record it once more changes nothing.
                Remembered::Forgotten { .. } | Remembered::Nothing => {
                    let stage = Stage::Recovering { since: self.now, mixed: false };
                    self.flights.insert(id, Flight::new(decision.hash, decision.shards.clone(), stage));
                    self.settle(decision, effects);
                }
            }
            return;
        };
        match &mut flight.stage {
            Stage::Parked(_) => {
                if flight.hash != decision.hash {
                    for token in std::mem::take(&mut flight.waiters) {
                        effects.replies.push((token, Reply::Refused(Refusal::DifferentContents)));
                    }
                }
                (flight.hash, flight.shards) = (decision.hash, decision.shards.clone());
                self.settle(decision, effects);
            }
            Stage::Telling { decision: recorded, missing, .. } if *recorded == decision => {
                missing.insert(shard, decision.number);
            }
            Stage::Recording { decision: known } if *known == decision => {}
            Stage::Telling { decision: other, .. } | Stage::Recording { decision: other } => {
                contradicted(shard, &decision, other, effects);
            }
            Stage::Preparing { .. } | Stage::Recovering { .. } | Stage::Deciding { .. } => {
                effects.alarms.push(format!(
                    "shard {shard} has committed batch {id} under {}, and it was taken up without it (rule R13)",
                    decision.number
                ));
            }
        }
    }
}

fn contradicted(shard: ShardId, ours: &Decision, other: &Decision, effects: &mut Effects) {
    effects.alarms.push(format!(
        "shard {shard} has committed batch {} under {}, but it stands as {:?} (rule R13)",
        ours.id, ours.number, other.result
    ));
}
