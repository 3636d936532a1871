//! The loop of one shard that answers reads.
//!
//! Reads that have come together are confirmed together: one round to a quorum for all of them ([`Group::read_barrier`]), while
//! those that come meanwhile wait for the next. A read that must wait for parts in doubt is looked at again after every entry
//! that this replica's driver has applied. Once confirmed it may be answered even if this replica has been deposed since: what
//! it waits for is named, and everything else that lies at or below its position had been applied when it was confirmed.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use verdict_proto::{
    convert::{EXCHANGE_MESSAGE_BYTES_MAX, not_leader_to_wire, read_answer_to_wire},
    v1,
};
use verdict_protocol::{
    ids::{GroupId, NodeId, ShardId},
    messages::{ShardRead, ShardReadAnswer},
    shard::Shard,
};
use verdict_raft::{Confirmed, Group, ReadError};

use crate::{ParticipantLimits, limiter::Limiter, streams::StreamHandle};

/// How often reads that wait are looked at in any case, and old ones dropped.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A message with answers is sent when it has this many bytes.
const MESSAGE_BYTES: usize = 4 << 20;

/// A read that has come.
pub struct ArrivedRead {
    /// Where it came from, and where the answer goes.
    pub stream: StreamHandle,
    /// The coordinator group that asks.
    pub coordinator: GroupId,
    /// The coordinator's number for it.
    pub request: u64,
    /// What to read.
    pub read: ShardRead,
}

/// Answers that go out together, by stream.
type Answers = BTreeMap<u64, (StreamHandle, Vec<v1::ReadAnswer>)>;

/// What the reading task of one shard keeps.
pub struct Reads {
    node: NodeId,
    shard: ShardId,
    limits: ParticipantLimits,
    group: Group<Shard>,
    applied: watch::Receiver<u64>,
    /// Confirmed, but parts in doubt are in the way. In order of coming.
    waiting: VecDeque<(Instant, ArrivedRead)>,
    warnings: Limiter,
}

impl Reads {
    /// Nothing waits.
    pub fn new(
        node: NodeId,
        shard: ShardId,
        limits: ParticipantLimits,
        group: Group<Shard>,
        applied: watch::Receiver<u64>,
    ) -> Reads {
        let (waiting, warnings) = (VecDeque::new(), Limiter::default());
        Reads { node, shard, limits, group, applied, waiting, warnings }
    }

    /// Runs until it is told to stop.
    pub async fn run(mut self, mut arrivals: mpsc::Receiver<ArrivedRead>, stop: CancellationToken) {
        let mut arrived = Vec::new();
        let mut barrier: Option<BoxFuture<'static, Result<Confirmed, ReadError>>> = None;
        let mut tick = tokio::time::interval(LOOK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut driven = true;
        loop {
            let confirmed = async {
                match &mut barrier {
                    Some(barrier) => barrier.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                result = confirmed => {
                    barrier = None;
                    self.serve(std::mem::take(&mut arrived), result);
                }
                count = arrivals.recv_many(&mut arrived, self.limits.reads_waiting_max), if arrived.is_empty() => {
                    if count == 0 {
                        return;
                    }
                    let group = self.group.clone();
                    barrier = Some(async move { group.read_barrier().await }.boxed());
                }
                changed = self.applied.changed(), if driven && !self.waiting.is_empty() => {
                    driven = changed.is_ok();
                    self.look_again();
                }
                _ = tick.tick() => self.look_again(),
            }
        }
    }

    /// Answers reads for which the leadership was confirmed, or says that it wasn't.
    fn serve(&mut self, reads: Vec<ArrivedRead>, confirmed: Result<Confirmed, ReadError>) {
        let hint = match confirmed {
            Ok(_) => {
                let now = Instant::now();
                return self.answer(reads.into_iter().map(|read| (now, read)).collect());
            }
            Err(ReadError::NotLeader { leader }) => leader.filter(|leader| *leader != self.node),
            Err(ReadError::Stopped(_)) => None,
            // Nobody knows who leads: the coordinator asks again, here or elsewhere.
            Err(ReadError::Unavailable(why)) => {
                tracing::debug!(shard = %self.shard, why, "reads are not confirmed");
                return;
            }
        };
        let streams: BTreeMap<u64, StreamHandle> =
            reads.into_iter().map(|read| (read.stream.serial(), read.stream)).collect();
        for stream in streams.values() {
            stream.send(not_leader_to_wire(self.shard, hint));
        }
    }

    /// Looks at the reads that wait, and drops those that have waited too long.
    fn look_again(&mut self) {
        let patience = Duration::from_millis(self.limits.read_wait_ms);
        let now = Instant::now();
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|(since, _)| now < *since + patience);
        self.answer(waiting);
    }

    /// Answers what can be answered; the rest waits, the youngest if there are too many.
    fn answer(&mut self, reads: VecDeque<(Instant, ArrivedRead)>) {
        let mut answers = Answers::new();
        for (since, read) in reads {
            // One look for each, so that no applying waits for many.
            let looked = self.group.read(|shard, store| shard.read(store, read.coordinator, &read.read));
            match looked {
                Ok(Some(answer)) => self.collect(&mut answers, read, &answer),
                Ok(None) => {
                    if self.waiting.len() >= self.limits.reads_waiting_max {
                        self.warn("too many reads wait for parts in doubt: the oldest is dropped");
                        self.waiting.pop_front();
                    }
                    self.waiting.push_back((since, read));
                }
                Err(error) => self.warn(&format!("read rows: {error}")),
            }
        }
        for (stream, answers) in answers.into_values() {
            self.send(&stream, answers);
        }
    }

    fn collect(&self, answers: &mut Answers, read: ArrivedRead, answer: &ShardReadAnswer) {
        let answer = read_answer_to_wire(read.request, answer);
        let bytes = answer.encoded_len();
        if bytes + MESSAGE_BYTES > EXCHANGE_MESSAGE_BYTES_MAX {
            return self
                .warn(&format!("an answer to a read has {bytes} bytes and can't be sent: read fewer rows"));
        }
        answers.entry(read.stream.serial()).or_insert_with(|| (read.stream, Vec::new())).1.push(answer);
    }

    fn send(&self, stream: &StreamHandle, answers: Vec<v1::ReadAnswer>) {
        let empty = v1::ParticipantMessage { shard: self.shard.0, ..Default::default() };
        let (mut message, mut bytes) = (empty.clone(), 0);
        for answer in answers {
            let size = answer.encoded_len();
            if bytes > 0 && bytes + size > MESSAGE_BYTES {
                stream.send(std::mem::replace(&mut message, empty.clone()));
                bytes = 0;
            }
            bytes += size;
            message.reads.push(answer);
        }
        stream.send(message);
    }

    fn warn(&self, text: &str) {
        let text = format!("shard {}: {text}", self.shard);
        if self.warnings.admits(&text) {
            tracing::warn!("{text}");
        }
    }
}
