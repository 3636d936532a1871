//! The loop of one shard: everything that has arrived becomes one entry; every answer goes to its coordinator.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    future::Future,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesOrdered};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use verdict_failpoints::failpoint;
use verdict_proto::convert::{from_shard_to_wire, not_leader_to_wire};
use verdict_protocol::{
    ids::{Epoch, GroupId, Millis, NodeId, ShardId},
    machine::encode,
    merge::merge,
    messages::{FromShard, HeldPart, ToShard, VoteKind},
    shard::{Shard, ShardEntry, ShardReply},
};
use verdict_raft::{Applied, Group, Leadership, ProposeError};

use crate::{
    ParticipantLimits,
    limiter::Limiter,
    now,
    streams::{StreamHandle, Streams},
};

/// How often the leader looks for parts that have been in doubt for long.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// A message on its way into the log.
pub struct Arrived {
    /// Where it came from.
    pub stream: StreamHandle,
    /// The message, which says something.
    pub message: ToShard,
    /// Its size on the wire.
    pub bytes: usize,
    /// Given back when its outcome is known.
    pub room: OwnedSemaphorePermit,
}

/// What became of an entry.
struct Proposed {
    /// Those who sent something of it.
    from: BTreeMap<u64, StreamHandle>,
    result: Result<Applied<ShardReply>, ProposeError>,
}

/// What the task of one shard keeps. Nothing of it has to survive.
pub struct Driver {
    node: NodeId,
    shard: ShardId,
    limits: ParticipantLimits,
    group: Group<Shard>,
    streams: Arc<Streams>,
    /// For each coordinator group the stream that gets the answers: of the highest epoch seen, the youngest.
    current: BTreeMap<GroupId, (Epoch, StreamHandle)>,
    /// The last view of the leadership that was told.
    told: Leadership,
    /// The index of the last entry of this driver that was applied, for the reads.
    applied: watch::Sender<u64>,
    warnings: Limiter,
}

impl Driver {
    /// A driver that has heard nothing yet.
    pub fn new(
        node: NodeId,
        shard: ShardId,
        limits: ParticipantLimits,
        group: Group<Shard>,
        streams: Arc<Streams>,
        applied: watch::Sender<u64>,
    ) -> Driver {
        let (current, warnings) = (BTreeMap::new(), Limiter::default());
        let told = Leadership::default();
        Driver { node, shard, limits, group, streams, current, told, applied, warnings }
    }

    /// Runs until it is told to stop.
    pub async fn run(mut self, mut arrivals: mpsc::Receiver<Arrived>, stop: CancellationToken) {
        let mut leadership = self.group.leadership();
        leadership.mark_changed();
        let mut group_runs = true;
        let mut proposed = FuturesOrdered::new();
        let mut arrived = Vec::new();
        let mut tick = tokio::time::interval(ASK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let room = proposed.len() < self.limits.entries_in_flight_max;
            tokio::select! {
                () = stop.cancelled() => return,
                changed = leadership.changed(), if group_runs => {
                    group_runs = changed.is_ok();
                    let view = *leadership.borrow_and_update();
                    self.tell_leadership(view);
                }
                Some(one) = proposed.next(), if !proposed.is_empty() => self.answer(one),
                count = arrivals.recv_many(&mut arrived, self.limits.entry_messages_max), if room => {
                    if count == 0 {
                        return;
                    }
                    let view = *leadership.borrow();
                    self.note_streams(&arrived);
                    for messages in self.entries(&mut arrived) {
                        match self.hint(view) {
                            Some(hint) => self.refuse(messages, hint),
                            None => {
                                self.came(&messages);
                                proposed.push_back(self.propose(messages));
                            }
                        }
                    }
                }
                _ = tick.tick() => self.ask(now()),
            }
        }
    }

    /// Whom to point to if this replica doesn't lead; `None` if it does. A leader that isn't ready yet takes messages: they wait
    /// in Raft's queue for a moment.
    fn hint(&self, view: Leadership) -> Option<Option<NodeId>> {
        (view.leader != Some(self.node)).then_some(view.leader)
    }

    /// Keeps the stream of the highest epoch of each coordinator group.
    fn note_streams(&mut self, arrived: &[Arrived]) {
        for Arrived { message, stream, .. } in arrived {
            match self.current.entry(message.coordinator) {
                Entry::Vacant(place) => {
                    place.insert((message.epoch, stream.clone()));
                }
                Entry::Occupied(mut place) => {
                    let (epoch, known) = place.get();
                    if (message.epoch, stream.serial()) > (*epoch, known.serial()) {
                        place.insert((message.epoch, stream.clone()));
                    }
                }
            }
        }
    }

    /// Divides what has arrived into entries: one, unless there are too many bytes.
    fn entries(&self, arrived: &mut Vec<Arrived>) -> Vec<Vec<Arrived>> {
        let mut entries = vec![Vec::with_capacity(arrived.len())];
        let mut bytes = 0;
        for one in arrived.drain(..) {
            if bytes > 0 && bytes + one.bytes > self.limits.entry_bytes_max {
                entries.push(Vec::new());
                bytes = 0;
            }
            bytes += one.bytes;
            entries.last_mut().expect("there is one").push(one);
        }
        entries
    }

    /// The failpoints of what the coordinator may say.
    fn came(&self, arrived: &[Arrived]) {
        if arrived.iter().any(|one| !one.message.prepares.is_empty()) {
            failpoint!(PREPARE_RECEIVED, self.group.id().0);
        }
        if arrived.iter().any(|one| !one.message.outcomes.is_empty()) {
            failpoint!(OUTCOME_RECEIVED, self.group.id().0);
        }
    }

    /// Queues one entry, behind all that were queued before.
    fn propose(&self, arrived: Vec<Arrived>) -> impl Future<Output = Proposed> + Send + 'static {
        let (mut from, mut rooms) = (BTreeMap::new(), Vec::with_capacity(arrived.len()));
        let messages = arrived.into_iter().map(|one| {
            from.insert(one.stream.serial(), one.stream);
            rooms.push(one.room);
            one.message
        });
        let entry = ShardEntry { now: now(), parts_max: self.limits.parts_max, messages: merge(messages) };
        let outcome = self.group.start_propose(encode(&entry));
        async move {
            let result = outcome.await;
            drop(rooms);
            Proposed { from, result }
        }
    }

    fn answer(&mut self, proposed: Proposed) {
        let Proposed { from, result } = proposed;
        let shard = self.shard;
        match result {
            Ok(Applied { index, reply }) => {
                self.applied.send_replace(index);
                reply.alarms.iter().for_each(|alarm| self.warn(&format!("shard {shard}: {alarm}")));
                for (coordinator, message) in reply.messages {
                    let (votes, done) = (!message.votes.is_empty(), !message.done.is_empty());
                    if votes {
                        failpoint!(VOTE_BEFORE_SEND, self.group.id().0);
                    }
                    if done {
                        failpoint!(DONE_BEFORE_SEND, self.group.id().0);
                    }
                    self.send(coordinator, &message);
                    if votes {
                        failpoint!(VOTE_SENT, self.group.id().0);
                    }
                }
            }
            Err(ProposeError::NotLeader { leader }) => self.tell_not_leader(from.values(), leader),
            Err(ProposeError::Stopped(_)) => self.tell_not_leader(from.values(), None),
            // Nothing was appended: as if it had been lost on its way.
            Err(ProposeError::Refused(why)) => {
                self.warn(&format!("shard {shard} can't take messages, they will be sent again: {why}"));
            }
            // It may be applied or not, now or later: nobody is told anything, and the coordinator sends again.
            Err(ProposeError::Unknown(why)) => {
                tracing::debug!(%shard, why, "the outcome of an entry is unknown");
                self.applied.send_modify(|_| {});
            }
        }
    }

    /// Sends to the current stream of a coordinator group. If there is none any more, the next one will ask.
    fn send(&self, coordinator: GroupId, message: &FromShard) {
        if let Some((_, stream)) = self.current.get(&coordinator) {
            stream.send_all(from_shard_to_wire(self.shard, message));
        }
    }

    fn refuse(&self, arrived: Vec<Arrived>, hint: Option<NodeId>) {
        let streams: BTreeMap<u64, StreamHandle> =
            arrived.into_iter().map(|one| (one.stream.serial(), one.stream)).collect();
        self.tell_not_leader(streams.values(), hint);
    }

    fn tell_not_leader<'a>(&self, streams: impl Iterator<Item = &'a StreamHandle>, hint: Option<NodeId>) {
        // Who is pointed to itself would come back at once.
        let hint = hint.filter(|hint| *hint != self.node);
        for stream in streams {
            stream.send(not_leader_to_wire(self.shard, hint));
        }
    }

    /// Tells all coordinators when this replica has stopped leading, and when it learns who leads instead.
    fn tell_leadership(&mut self, view: Leadership) {
        let before = std::mem::replace(&mut self.told, view);
        if view.leader == before.leader || view.leader == Some(self.node) {
            return;
        }
        let lost = before.leader == Some(self.node);
        if lost {
            tracing::info!(shard = %self.shard, term = view.term, leader = ?view.leader, "stopped leading");
        }
        if lost || view.leader.is_some() {
            self.streams.send_to_all(&not_leader_to_wire(self.shard, view.leader));
        }
    }

    /// Asks the coordinators about parts that have been in doubt for long.
    fn ask(&self, now: Millis) {
        if !self.told.is_leader || self.current.is_empty() {
            return;
        }
        let before = Millis(now.0.saturating_sub(self.limits.ask_after_ms));
        let mut asks: BTreeMap<GroupId, Vec<HeldPart>> = BTreeMap::new();
        self.group.read(|shard, _| {
            // Counting is cheap; listing isn't.
            if shard.counts().oldest.is_none_or(|oldest| oldest >= before) {
                return;
            }
            let long = shard.held().filter(|held| held.part.vote == VoteKind::Yes && held.since < before);
            for held in long.take(self.limits.asks_max) {
                asks.entry(held.coordinator).or_default().push(held.part);
            }
        });
        for (coordinator, asks) in asks {
            self.send(coordinator, &FromShard { asks, ..Default::default() });
        }
    }

    fn warn(&self, text: &str) {
        if self.warnings.admits(text) {
            tracing::warn!("{text}");
        }
    }
}
