//! The one loop of the coordinator group on this node.
//!
//! While the local replica leads, the loop takes everything that has arrived (calls, shards' messages, applied entries, confirmations,
//! the tick), steps the core for each, and performs the effects together: at most one entry is proposed, one message goes to each
//! shard, callers are answered. Entries are proposed one behind the other without waiting; while many are under way, what is to be
//! recorded piles up for the next one, so load makes entries larger, not queues longer.
//!
//! Invariants:
//! - Only what the log has answered is told: the core makes outcomes from [`Event::Applied`] alone, and answers arrive in the order
//!   of the entries.
//! - One [`Leader`] lives for one epoch (rule R6). Whatever casts doubt on the epoch ends it: then the core, the streams to shards
//!   and everything piled up are dropped, and whoever waits learns that sight was lost.
//! - A question about an id is given to the core only after leadership was confirmed behind its arrival (rule R7). One confirmation
//!   serves all that wait for one.
//! - An error of the store, or another placement in the log than in the configuration, ends leading for good.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt,
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, StreamExt as _, stream::FuturesOrdered};
use tokio::{
    sync::{mpsc, watch},
    time::{Interval, MissedTickBehavior},
};
use verdict_failpoints::failpoint;
use verdict_protocol::{
    batch::{Placement, RowKey, SplitBatch},
    coordinator::{Act, Coordinator, CoordinatorEntry, CoordinatorReply, Opened},
    ids::{BatchId, GroupId, NodeId, Stamp},
    leader::{Decisions, Effects, Event, Leader, LeaderConfig, Remembered, Reply, Token},
    machine::encode,
    messages::FromShard,
    store::StoreError,
};
use verdict_raft::{Applied, Confirmed, Group, Leadership, ProposeError, ReadError};

use crate::{
    caller::Caller,
    clock::Clock,
    router::{PeerEvent, PeerMessage, Router},
};

/// Events of each kind that one round takes. Bounds what one entry and one message can hold.
const EVENTS_PER_ROUND: usize = 4096;
/// Entries under way; while there are so many, what is to be recorded piles up.
const ACTS_IN_FLIGHT_MAX: usize = 16;
/// Callers who wait for the core; more are refused.
const CALLERS_MAX: usize = 400_000;
/// Alarms that one round writes to the log.
const ALARMS_PER_ROUND: usize = 16;
/// How often a replica that must not lead, and does, tries to hand the leadership on.
const HAND_ON_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait before the next epoch is opened, when one ended while the local replica still led.
const REOPEN_PAUSE: Duration = Duration::from_millis(50);

/// What a driver needs to know.
#[derive(Clone, Debug)]
pub(crate) struct DriverConfig {
    pub(crate) node: NodeId,
    pub(crate) placement: Placement,
    pub(crate) leader: LeaderConfig,
    pub(crate) tick: Duration,
}

/// What a caller wants of the leader.
#[derive(Debug)]
pub(crate) enum Question {
    /// Settle a batch that has passed its checks.
    Submit { batch: SplitBatch },
    /// Tell an outcome.
    Query { id: BatchId, wait: bool, abort_if_not_seen: bool },
    /// Read rows.
    Read { rows: Vec<RowKey> },
    /// Read a history.
    History { row: RowKey, from: Stamp, limit: usize },
}

/// A question and who asks.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) question: Question,
    pub(crate) caller: Caller<Answer>,
}

/// What the driver answers.
pub(crate) type Answer = Result<Reply, NotServed>;

/// Why the driver has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotServed {
    /// The question was given to nobody: there is no leader here.
    NotLeader,
    /// The question was given to nobody: too many wait.
    Overloaded,
    /// The leadership ended while the question was under way.
    Lost,
}

/// Why an epoch ended.
enum End {
    /// The node shuts down.
    Shutdown,
    /// The leadership is gone or in doubt.
    Lost(String),
    /// This replica must never lead again.
    Never(String),
}

/// The driver. [`Driver::run`] is its task.
pub(crate) struct Driver {
    pub(crate) config: DriverConfig,
    pub(crate) group: Group<Coordinator>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) router: Router,
    pub(crate) shutdown: watch::Receiver<bool>,
}

impl Driver {
    /// Leads whenever the local replica does, until the shutdown.
    pub(crate) async fn run(mut self) {
        let mut may_lead = true;
        loop {
            let Some(term) = self.follow(may_lead).await else { break };
            let end = self.lead(term).await;
            self.router.close();
            match end {
                End::Shutdown => break,
                End::Lost(why) => {
                    tracing::info!(%why, "this node leads the coordinators no longer");
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
                End::Never(why) => {
                    tracing::error!(%why, "this node must not lead the coordinators");
                    may_lead = false;
                }
            }
        }
        self.requests.close();
        while let Some(request) = self.requests.recv().await {
            request.caller.answer(Err(NotServed::NotLeader));
        }
    }

    /// Refuses calls until the local replica leads. Gives the term; none at the shutdown. A replica that must not lead hands the
    /// leadership on whenever it gets it: perhaps another voter can.
    async fn follow(&mut self, may_lead: bool) -> Option<u64> {
        let mut hand_on = tokio::time::interval(HAND_ON_INTERVAL);
        hand_on.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // An error: the host has stopped.
            self.leadership.has_changed().ok()?;
            let now = *self.leadership.borrow_and_update();
            if now.is_leader && may_lead {
                return Some(now.term);
            }
            tokio::select! {
                _ = hand_on.tick(), if now.is_leader => {
                    let group = self.group.clone();
                    tokio::spawn(async move { group.transfer_leader(None).await });
                }
                _ = self.shutdown.wait_for(|stop| *stop) => return None,
                changed = self.leadership.changed() => changed.ok()?,
                request = self.requests.recv() => request?.caller.answer(Err(NotServed::NotLeader)),
            }
        }
    }

    /// One epoch, from its opening to its end.
    async fn lead(&mut self, term: u64) -> End {
        let opened = match self.open().await {
            Ok(opened) => opened,
            Err(end) => return end,
        };
        let epoch = opened.epoch;
        tracing::info!(%epoch, term, unfinished = opened.unfinished.len(), "this node leads the coordinators");
        self.router.open();
        let mut clock = Clock::start();
        let (leader, effects) = Leader::open(self.config.leader, opened, clock.now());
        let mut tick = tokio::time::interval(self.config.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reign = Reign {
            driver: self,
            term,
            leader,
            effects,
            clock,
            tick,
            callers: HashMap::new(),
            last_token: 0,
            acts: FuturesOrdered::new(),
            act_waiting: Act::default(),
            to_confirm: None,
            to_query: Vec::new(),
            barrier: None,
            barrier_rests: false,
        };
        let end = reign.rule().await;
        for (_, caller) in reign.callers.drain() {
            caller.answer(Err(NotServed::Lost));
        }
        end
    }

    /// Opens an epoch in the log.
    async fn open(&mut self) -> Result<Opened, End> {
        let entry = CoordinatorEntry::Open {
            node: self.config.node,
            placement: self.config.placement,
            keep: self.config.leader.keep,
        };
        let proposal = self.group.start_propose(encode(&entry));
        let applied = tokio::select! {
            _ = self.shutdown.wait_for(|stop| *stop) => return Err(End::Shutdown),
            applied = proposal => applied.map_err(|error| End::Lost(format!("open an epoch: {error}")))?,
        };
        match applied.reply {
            CoordinatorReply::Opened(opened) => {
                failpoint!(EPOCH_OPENED, GroupId::COORDINATOR.0);
                Ok(opened)
            }
            CoordinatorReply::OtherPlacement { recorded } => Err(End::Never(format!(
                "the configuration tells {} shards, but the cluster was founded with {}: correct the configuration \
                 and start the node again",
                self.config.placement.shards, recorded.shards
            ))),
            CoordinatorReply::Acted(_) | CoordinatorReply::OldEpoch { .. } | CoordinatorReply::Node(_) => {
                unreachable!("an opening entry is answered as one")
            }
        }
    }
}

type Acted = Result<Applied<CoordinatorReply>, ProposeError>;
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A confirmation of the leadership that is under way, and for whom.
struct Barrier {
    done: Boxed<Result<Confirmed, ReadError>>,
    confirm: Option<u64>,
    queries: Vec<Event>,
}

/// One epoch.
struct Reign<'a> {
    driver: &'a mut Driver,
    term: u64,
    leader: Leader,
    effects: Effects,
    clock: Clock,
    tick: Interval,
    callers: HashMap<u64, Caller<Answer>>,
    last_token: u64,
    acts: FuturesOrdered<Boxed<Acted>>,
    /// To be recorded when fewer entries are under way.
    act_waiting: Act,
    /// Wait for the next confirmation.
    to_confirm: Option<u64>,
    to_query: Vec<Event>,
    barrier: Option<Barrier>,
    /// The last confirmation failed: the next one begins with the next tick.
    barrier_rests: bool,
}

/// What woke the loop.
enum Woken {
    Requests,
    Peers,
    Acted(Acted),
    Barrier(Result<Confirmed, ReadError>),
    /// The leadership has changed; false: the host has stopped.
    Leadership(bool),
    Tick,
    Shutdown,
}

impl Reign<'_> {
    async fn rule(&mut self) -> End {
        let mut requests = Vec::new();
        let mut peers = Vec::new();
        loop {
            self.leader.seal(&mut self.effects);
            self.perform();
            let woken = self.wait(&mut requests, &mut peers).await;
            if let Err(end) = self.round(woken, &mut requests, &mut peers) {
                for request in requests {
                    request.caller.answer(Err(NotServed::NotLeader));
                }
                return end;
            }
        }
    }

    /// Waits until there is something to do.
    async fn wait(&mut self, requests: &mut Vec<Request>, peers: &mut Vec<PeerEvent>) -> Woken {
        let Reign { driver, tick, acts, barrier, .. } = self;
        let confirmed = async {
            match barrier {
                Some(barrier) => (&mut barrier.done).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = driver.shutdown.wait_for(|stop| *stop) => Woken::Shutdown,
            changed = driver.leadership.changed() => Woken::Leadership(changed.is_ok()),
            _ = tick.tick() => Woken::Tick,
            Some(acted) = acts.next(), if !acts.is_empty() => Woken::Acted(acted),
            result = confirmed => Woken::Barrier(result),
            _ = driver.router.recv_many(peers, EVENTS_PER_ROUND) => Woken::Peers,
            count = driver.requests.recv_many(requests, EVENTS_PER_ROUND) => match count {
                0 => Woken::Shutdown,
                _ => Woken::Requests,
            },
        }
    }

    /// Steps the core for all that has arrived.
    fn round(
        &mut self,
        woken: Woken,
        requests: &mut Vec<Request>,
        peers: &mut Vec<PeerEvent>,
    ) -> Result<(), End> {
        match woken {
            Woken::Shutdown => return Err(End::Shutdown),
            Woken::Leadership(true) => self.check_leadership()?,
            Woken::Leadership(false) => return Err(End::Lost("the replica has stopped".to_owned())),
            Woken::Tick => self.ticked()?,
            Woken::Acted(acted) => self.acted(acted)?,
            Woken::Barrier(result) => self.confirmed(result)?,
            Woken::Peers | Woken::Requests => {}
        }
        // What has arrived meanwhile belongs to the same round.
        while let Some(Some(acted)) = self.acts.next().now_or_never() {
            self.acted(acted)?;
        }
        while peers.len() < EVENTS_PER_ROUND
            && let Some(event) = self.driver.router.try_recv()
        {
            peers.push(event);
        }
        while requests.len() < EVENTS_PER_ROUND
            && let Ok(request) = self.driver.requests.try_recv()
        {
            requests.push(request);
        }
        for event in peers.drain(..) {
            self.peer(event)?;
        }
        let mut taken = Ok(());
        for request in requests.drain(..) {
            match taken {
                Ok(()) => taken = self.request(request),
                Err(_) => request.caller.answer(Err(NotServed::NotLeader)),
            }
        }
        taken
    }

    fn step(&mut self, event: Event) -> Result<(), End> {
        let lookup = Lookup { group: &self.driver.group, failed: RefCell::new(None) };
        self.leader.step(event, &lookup, &mut self.effects);
        if let Some(error) = lookup.failed.into_inner() {
            return Err(End::Never(format!("look up a decision: {error}")));
        }
        match self.effects.step_down.take() {
            Some(why) => Err(End::Lost(why)),
            None => Ok(()),
        }
    }

    fn check_leadership(&mut self) -> Result<(), End> {
        let now = *self.driver.leadership.borrow_and_update();
        if now.is_leader && now.term == self.term {
            return Ok(());
        }
        Err(End::Lost(match now.leader {
            Some(leader) => format!("node {leader} leads in term {}", now.term),
            None => format!("nobody is known to lead in term {}", now.term),
        }))
    }

    fn ticked(&mut self) -> Result<(), End> {
        self.barrier_rests = false;
        let now = self.clock.now();
        self.step(Event::Tick { now })?;
        for shard in self.driver.router.tick(Instant::now()) {
            self.step(Event::Reconnected { shard })?;
        }
        Ok(())
    }

    fn acted(&mut self, acted: Acted) -> Result<(), End> {
        let applied = acted.map_err(|error| End::Lost(format!("record decisions: {error}")))?;
        match applied.reply {
            CoordinatorReply::Acted(acted) => {
                if !acted.decisions.is_empty() {
                    failpoint!(DECISION_RECORDED, GroupId::COORDINATOR.0);
                }
                self.step(Event::Applied(acted))
            }
            CoordinatorReply::OldEpoch { newer } => Err(End::Lost(format!("the epoch {newer} has begun"))),
            CoordinatorReply::Opened(_)
            | CoordinatorReply::OtherPlacement { .. }
            | CoordinatorReply::Node(_) => {
                unreachable!("what an epoch records is answered as such")
            }
        }
    }

    fn confirmed(&mut self, result: Result<Confirmed, ReadError>) -> Result<(), End> {
        let barrier = self.barrier.take().expect("a barrier that is done was under way");
        match result {
            // It leads, but not as the one that asked: there may have been another leader in between.
            Ok(confirmed) if confirmed.term != self.term => {
                Err(End::Lost(format!("leads in term {} now, not in {}", confirmed.term, self.term)))
            }
            Ok(_) => {
                if let Some(asked) = barrier.confirm {
                    self.step(Event::Confirmed { asked })?;
                }
                for query in barrier.queries {
                    self.step(query)?;
                }
                Ok(())
            }
            Err(error @ (ReadError::NotLeader { .. } | ReadError::Stopped(_))) => {
                Err(End::Lost(format!("confirm the leadership: {error}")))
            }
            Err(ReadError::Unavailable(_)) => {
                // No quorum now; whoever waits has a time limit of its own.
                self.barrier_rests = true;
                self.to_confirm = self.to_confirm.max(barrier.confirm);
                self.to_query.splice(0..0, barrier.queries);
                Ok(())
            }
        }
    }

    fn peer(&mut self, event: PeerEvent) -> Result<(), End> {
        let now = Instant::now();
        let Some(message) = self.driver.router.take(event, now) else { return Ok(()) };
        match message {
            PeerMessage::Rerouted(shard) => self.step(Event::Reconnected { shard }),
            PeerMessage::Said { shard, message, reads } => {
                heard(&message);
                if !message.is_empty() {
                    self.step(Event::FromShard { shard, message })?;
                }
                for (request, answer) in reads {
                    self.step(Event::ReadAnswered { shard, request, answer })?;
                }
                Ok(())
            }
        }
    }

    fn request(&mut self, request: Request) -> Result<(), End> {
        let Request { question, caller } = request;
        if self.callers.len() >= CALLERS_MAX {
            caller.answer(Err(NotServed::Overloaded));
            return Ok(());
        }
        self.last_token += 1;
        let token = Token(self.last_token);
        self.callers.insert(token.0, caller);
        match question {
            Question::Submit { batch } => {
                failpoint!(BATCH_RECEIVED, GroupId::COORDINATOR.0);
                self.step(Event::Submit { token, batch })
            }
            Question::Query { id, wait, abort_if_not_seen } => {
                self.to_query.push(Event::Query { token, id, wait, abort_if_not_seen });
                Ok(())
            }
            Question::Read { rows } => self.step(Event::Read { token, rows }),
            Question::History { row, from, limit } => self.step(Event::History { token, row, from, limit }),
        }
    }

    /// Performs all that the round asked for.
    fn perform(&mut self) {
        let effects = std::mem::take(&mut self.effects);
        self.record(effects.act);
        self.driver.router.send(effects.to_shards, effects.reads, Instant::now());
        for (token, reply) in effects.replies {
            if let Some(caller) = self.callers.remove(&token.0) {
                let decided = matches!(reply, Reply::Decided(_));
                caller.answer(Ok(reply));
                if decided {
                    failpoint!(CALLER_ANSWERED, GroupId::COORDINATOR.0);
                }
            }
        }
        self.to_confirm = self.to_confirm.max(effects.confirm);
        self.begin_barrier();
        for alarm in effects.alarms.iter().take(ALARMS_PER_ROUND) {
            tracing::error!(epoch = %self.leader.epoch(), "{alarm}");
        }
        if let Some(more) = effects.alarms.len().checked_sub(ALARMS_PER_ROUND).filter(|more| *more > 0) {
            tracing::error!(epoch = %self.leader.epoch(), more, "there are more such alarms");
        }
    }

    fn record(&mut self, act: Act) {
        self.act_waiting.pile(act);
        if self.act_waiting.is_empty() || self.acts.len() >= ACTS_IN_FLIGHT_MAX {
            return;
        }
        let act = std::mem::take(&mut self.act_waiting);
        debug_assert_eq!(act.epoch, self.leader.epoch(), "a leader records in its own epoch");
        let (decides, finishes) = (!act.decisions.is_empty(), !act.finished.is_empty());
        if decides {
            failpoint!(DECISION_BEFORE_PROPOSE, GroupId::COORDINATOR.0);
        }
        let proposal = self.driver.group.start_propose(encode(&CoordinatorEntry::Act(act)));
        self.acts.push_back(Box::pin(proposal));
        if decides {
            failpoint!(DECISION_PROPOSED, GroupId::COORDINATOR.0);
        }
        if finishes {
            failpoint!(FINISHED_PROPOSED, GroupId::COORDINATOR.0);
        }
    }

    fn begin_barrier(&mut self) {
        if self.barrier.is_some()
            || self.barrier_rests
            || (self.to_confirm.is_none() && self.to_query.is_empty())
        {
            return;
        }
        let group = self.driver.group.clone();
        self.barrier = Some(Barrier {
            done: Box::pin(async move { group.read_barrier().await }),
            confirm: self.to_confirm.take(),
            queries: std::mem::take(&mut self.to_query),
        });
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The failpoints of what a shard may say.
fn heard(message: &FromShard) {
    if message.greeting.is_some() {
        failpoint!(GREETING_RECEIVED, GroupId::COORDINATOR.0);
    }
    if !message.votes.is_empty() {
        failpoint!(VOTE_RECEIVED, GroupId::COORDINATOR.0);
    }
    if !message.done.is_empty() {
        failpoint!(DONE_RECEIVED, GroupId::COORDINATOR.0);
    }
}

/// Looks decisions up in the local replica.
struct Lookup<'a> {
    group: &'a Group<Coordinator>,
    failed: RefCell<Option<StoreError>>,
}

impl Decisions for Lookup<'_> {
    fn remembered(&self, id: BatchId) -> Remembered {
        match self.group.read(|machine, store| machine.remembered(store, id)) {
            Ok(remembered) => remembered,
            Err(error) => {
                // The step that asked is thrown away with its effects.
                *self.failed.borrow_mut() = Some(error);
                Remembered::Nothing
            }
        }
    }
}
