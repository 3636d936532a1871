//! Strong reads across shards.
//!
//! A read gets its position when it comes: the last stamp that was given. Every batch that was answered before has a stamp at or below
//! it, every one that is decided later a stamp above it. Each shard answers from its rows at that position, after the parts in doubt
//! on them that have such a stamp are gone; all other parts in doubt lie above the position and don't matter.
//!
//! A shard that may commit by itself at a stamp up to the position is asked only after it has answered. So whatever it can still commit
//! lies above. Before it has answered the greeting it may commit by itself for a deposed leader, at stamps below all that are given now.
//! Therefore a read gets its position only when all its shards have answered it: or it might see such a batch, and not one that was
//! answered before that one came.
//!
//! That this leader still led when the read came is confirmed meanwhile: a newer one's stamps would be missing.

use std::collections::BTreeMap;

use crate::{
    batch::RowKey,
    ids::{BatchId, Millis, ShardId, Stamp},
    messages::{Decision, READ_BYTES_MAX, RowAt, ShardQuery, ShardRead, ShardReadAnswer},
};

use super::{Decisions, Effects, Flight, Leader, Refusal, Remembered, Reply, Stage, Token};

/// What is read, not begun yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Question {
    token: Token,
    asked_at: Millis,
    queries: BTreeMap<ShardId, ShardQuery>,
    order: Vec<ShardId>,
}

/// A read that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Reading {
    token: Token,
    position: Stamp,
    confirmed: bool,
    asked_at: Millis,
    /// What shards still have to answer, and when they were asked last.
    pending: BTreeMap<ShardId, (ShardRead, Millis)>,
    /// What they have answered.
    answers: BTreeMap<ShardId, ShardReadAnswer>,
    /// The shard of each row, in the order of the question.
    order: Vec<ShardId>,
}

impl Leader {
    pub(super) fn read(&mut self, token: Token, rows: Vec<RowKey>, effects: &mut Effects) {
        let placement = self.config.placement;
        let order: Vec<ShardId> = rows.iter().map(|row| placement.shard_of(row.partition())).collect();
        let mut by_shard: BTreeMap<ShardId, Vec<RowKey>> = BTreeMap::new();
        for (shard, row) in order.iter().zip(rows) {
            by_shard.entry(*shard).or_default().push(row);
        }
        let queries = by_shard.into_iter().map(|(shard, rows)| (shard, ShardQuery::Rows(rows))).collect();
        self.ask(Question { token, asked_at: self.now, queries, order }, effects);
    }

    pub(super) fn history(
        &mut self,
        token: Token,
        row: RowKey,
        from: Stamp,
        limit: usize,
        effects: &mut Effects,
    ) {
        let shard = self.config.placement.shard_of(row.partition());
        let query = ShardQuery::History { row, from, limit };
        let queries = BTreeMap::from([(shard, query)]);
        self.ask(Question { token, asked_at: self.now, queries, order: vec![shard] }, effects);
    }

    fn ask(&mut self, question: Question, effects: &mut Effects) {
        let silent_max = self.share(self.config.reads_max);
        let crowded = |shard: &ShardId| self.is_silent(*shard) && self.shards[shard].reads >= silent_max;
        if self.readings.len() + self.early.len() >= self.config.reads_max
            || question.queries.keys().any(crowded)
        {
            effects.replies.push((question.token, Reply::Refused(Refusal::Overloaded)));
            return;
        }
        for shard in question.queries.keys() {
            let now = self.now;
            let view = self.view(*shard);
            view.ask(now);
            view.reads += 1;
        }
        if self.can_begin(&question) { self.begin(question, effects) } else { self.early.push(question) }
    }

    fn can_begin(&self, question: &Question) -> bool {
        question.queries.keys().all(|shard| self.shards[shard].greeted)
    }

    /// Begins the reads whose shards have all answered the greeting.
    pub(super) fn begin_early(&mut self, effects: &mut Effects) {
        for question in std::mem::take(&mut self.early) {
            if self.can_begin(&question) { self.begin(question, effects) } else { self.early.push(question) }
        }
    }

    fn begin(&mut self, question: Question, effects: &mut Effects) {
        let Question { token, asked_at, queries, order } = question;
        let position = self.last_stamp;
        self.last_request += 1;
        let request = self.last_request;
        let mut pending = BTreeMap::new();
        for (shard, query) in queries {
            let read = ShardRead { position, known: false, wait_for: Vec::new(), query };
            let now = self.now;
            let view = self.view(shard);
            // All stamps that were given lie at or below the position.
            if view.alone.is_empty() {
                effects.reads.push((shard, request, read.clone()));
            } else {
                view.reads_held.insert(request);
            }
            pending.insert(shard, (read, now));
        }
        let reading =
            Reading { token, position, confirmed: false, asked_at, pending, answers: BTreeMap::new(), order };
        self.readings.insert(request, reading);
        effects.confirm = Some(request);
    }

    /// Asks a shard what has waited until it said what it has committed.
    pub(super) fn release_reads(&mut self, shard: ShardId, effects: &mut Effects) {
        let view = self.shards.get_mut(&shard).expect("the shard was checked on arrival");
        while let Some(request) = view.reads_held.first().copied() {
            let reading = self.readings.get_mut(&request).expect("a read that is held is under way");
            if view.alone.first().is_some_and(|stamp| *stamp <= reading.position) {
                return;
            }
            view.reads_held.remove(&request);
            let (read, sent) = reading.pending.get_mut(&shard).expect("was not asked yet");
            *sent = self.now;
            effects.reads.push((shard, request, read.clone()));
        }
    }

    /// Leadership was confirmed after all reads up to `asked` had come.
    pub(super) fn confirmed(&mut self, asked: u64, effects: &mut Effects) {
        let waiting: Vec<u64> = self
            .readings
            .range_mut(..=asked)
            .filter(|(_, reading)| !reading.confirmed)
            .map(|(request, reading)| {
                reading.confirmed = true;
                *request
            })
            .collect();
        for request in waiting {
            self.answer_if_complete(request, effects);
        }
    }

    pub(super) fn read_answered(
        &mut self,
        shard: ShardId,
        request: u64,
        answer: ShardReadAnswer,
        decisions: &dyn Decisions,
        effects: &mut Effects,
    ) {
        let now = self.now;
        let Some(reading) = self.readings.get_mut(&request) else { return };
        let position = reading.position;
        let Some((read, _)) = reading.pending.get(&shard) else { return };
        self.shards.get_mut(&shard).expect("it was asked").heard_at = now;
        let ShardReadAnswer::InDoubt(ids) = answer else {
            reading.pending.remove(&shard);
            reading.answers.insert(shard, answer);
            self.view(shard).reads -= 1;
            return self.answer_if_complete(request, effects);
        };
        if read.known {
            // The answer to the first question, come twice.
            return;
        }
        let mut read = read.clone();
        read.known = true;
        read.wait_for = ids.into_iter().filter(|id| self.stamped_up_to(*id, position, decisions)).collect();
        effects.reads.push((shard, request, read.clone()));
        let reading = self.readings.get_mut(&request).expect("was just found");
        reading.pending.insert(shard, (read, self.now));
    }

    /// Whether a batch was given a stamp at or below the position.
    fn stamped_up_to(&self, id: BatchId, position: Stamp, decisions: &dyn Decisions) -> bool {
        match self.flights.get(&id) {
            Some(Flight { stage: Stage::Deciding { stamp, .. }, .. }) => {
                stamp.is_some_and(|stamp| stamp <= position)
            }
            Some(Flight {
                stage: Stage::Telling { decision, .. } | Stage::Recording { decision }, ..
            }) => decision.result.as_ref().is_ok_and(|stamp| *stamp <= position),
            Some(Flight {
                stage: Stage::Parked(_) | Stage::Preparing { .. } | Stage::Recovering { .. },
                ..
            }) => false,
            None => {
                matches!(
                    decisions.remembered(id),
                    Remembered::Decided(Decision { result: Ok(stamp), .. }) if stamp <= position
                )
            }
        }
    }

    fn answer_if_complete(&mut self, request: u64, effects: &mut Effects) {
        let reading = &self.readings[&request];
        if !reading.confirmed || !reading.pending.is_empty() {
            return;
        }
        let reading = self.readings.remove(&request).expect("was just found");
        let position = reading.position;
        let mut values: BTreeMap<ShardId, std::vec::IntoIter<RowAt>> = BTreeMap::new();
        let (mut bytes, mut too_large) = (0, false);
        for (shard, answer) in reading.answers {
            match answer {
                ShardReadAnswer::Pruned { history } => {
                    effects.replies.push((reading.token, Reply::Refused(Refusal::Pruned { history })));
                    return;
                }
                ShardReadAnswer::History { changes, next, oldest } => {
                    let reply = Reply::History { position, changes, next, oldest };
                    effects.replies.push((reading.token, reply));
                    return;
                }
                ShardReadAnswer::TooLarge => too_large = true,
                ShardReadAnswer::Rows(rows) => {
                    bytes += rows.iter().map(|row| row.value.bytes()).sum::<usize>();
                    values.insert(shard, rows.into_iter());
                }
                ShardReadAnswer::InDoubt(_) => unreachable!("is never kept as an answer"),
            }
        }
        if too_large || bytes > READ_BYTES_MAX {
            effects.replies.push((reading.token, Reply::Refused(Refusal::TooLarge)));
            return;
        }
        let rows: Option<Vec<RowAt>> =
            reading.order.iter().map(|shard| values.get_mut(shard)?.next()).collect();
        match rows {
            Some(rows) => effects.replies.push((reading.token, Reply::Rows { position, rows })),
            None => {
                effects.alarms.push("a shard answered a read with fewer rows than were asked".to_owned());
                let shards = values.into_keys().collect();
                effects.replies.push((reading.token, Reply::Refused(Refusal::Unavailable { shards })));
            }
        }
    }

    /// Gives up reads that take too long.
    pub(super) fn end_readings(&mut self, effects: &mut Effects) {
        let oldest = self.now.0.saturating_sub(self.config.read_timeout_ms);
        let late = self.early.partition_point(|question| question.asked_at.0 < oldest);
        for question in self.early.drain(..late).collect::<Vec<_>>() {
            let mut shards = Vec::new();
            for shard in question.queries.into_keys() {
                let view = self.view(shard);
                view.reads -= 1;
                if !view.greeted {
                    shards.push(shard);
                }
            }
            effects.replies.push((question.token, Reply::Refused(Refusal::Unavailable { shards })));
        }
        while let Some(entry) = self.readings.first_entry()
            && entry.get().asked_at.0 < oldest
        {
            let (request, reading) = entry.remove_entry();
            let shards: Vec<ShardId> = reading.pending.into_keys().collect();
            for shard in &shards {
                let view = self.shards.get_mut(shard).expect("it was asked");
                view.reads -= 1;
                view.reads_held.remove(&request);
            }
            effects.replies.push((reading.token, Reply::Refused(Refusal::Unavailable { shards })));
        }
    }

    /// Up to where the shards may drop old versions: no read that is under way, and none that is still to come, is at a position below.
    pub(super) fn history_for_reads(&self) -> Stamp {
        let lowest = self.readings.values().next().map_or(self.history, |first| first.position);
        self.history.min(lowest)
    }

    /// Asks a shard again.
    pub(super) fn resend_reads(&mut self, shard: ShardId, before: Millis, effects: &mut Effects) {
        let held = &self.shards[&shard].reads_held;
        for (request, reading) in &mut self.readings {
            if let Some((read, sent)) = reading.pending.get_mut(&shard)
                && *sent <= before
                && !held.contains(request)
            {
                effects.reads.push((shard, *request, read.clone()));
                *sent = self.now;
            }
        }
    }
}
