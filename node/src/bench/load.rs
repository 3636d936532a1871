//! The load: trades sent by unary clients, on streams with a window (closed loop), or at a given rate (open loop).
//!
//! In a closed loop a batch that is refused is sent again after a while, under the same id, and holds its client or its place in the
//! window until it is answered otherwise. Its latency counts from the first time. When the load is told to stop, what was begun is
//! finished in the same way. In an open loop what is refused is given up.
//!
//! All of it runs on one thread of its own, so that it wakes nobody and shares no lock that anybody waits for. In an open loop a
//! trade's latency counts from when it was to be sent, not from when there was room to send it: what waits because the cluster
//! is slow is not forgotten (coordinated omission).

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures::{Stream, StreamExt as _, future::join_all};
use tokio::{
    sync::{oneshot, watch},
    time::{MissedTickBehavior, interval},
};
use tonic::{client::Grpc, transport::Channel};
use uuid::Uuid;
use verdict_proto::connect::{Connect as _, Tcp};

use super::{
    tally::{End, Tally},
    trade::{Form, Maker, Mix, Order, Orders, Population, SEQUENCE_END, Trade, sequence_of},
    wire::{self, Answer, Said},
};

/// An answer that takes longer than this is lost. The servers answer "unknown" sooner.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A unary client to whom something went wrong waits so long: going round in circles makes it no better.
const WRONG_PAUSE: Duration = Duration::from_millis(20);
/// In a closed loop it is looked so often whether something is to be sent again.
const AGAIN_TICK: Duration = Duration::from_millis(5);
/// Unary clients share connections, so many each, as those of one service do.
const CLIENTS_PER_CONNECTION: usize = 64;
/// In an open loop the streams are looked at so often. Where several trades are due each time, more of them share a message: who has so
/// many to send sends no message for every few of them.
const PACE: Duration = Duration::from_micros(250);
const PACE_OF_MANY: Duration = Duration::from_millis(1);
const MANY: f64 = 4.0;
/// Orders that share a message.
const ORDERS_PER_MESSAGE: usize = 256;
/// Trades of one stream that may wait for their answers in an open loop; more are turned away.
const OPEN_MAX: usize = 1 << 20;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Senders {
    /// So many clients, each with one call at a time.
    Unary(usize),
    /// Streams with so many trades in flight on all of them together.
    Streams {
        /// How many, each with a connection of its own.
        count: usize,
        /// Trades in flight.
        window: usize,
    },
    /// Streams on which trades are sent at a given rate, whatever is answered.
    Open {
        /// How many, each with a connection of its own.
        count: usize,
        /// Trades per second on all of them together.
        per_second: f64,
        /// A trade that finds no room on its stream for so long is turned away. None: it waits.
        patience: Option<Duration>,
    },
}

/// What is sent, and by whom.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who sends.
    pub senders: Senders,
    /// Which users trade.
    pub mix: Mix,
    /// In one batch or in several.
    pub form: Form,
    /// Whether each trade pays a fee to the exchange.
    pub has_fee: bool,
    /// The users.
    pub population: Population,
}

impl Plan {
    fn maker(&self) -> Maker {
        Maker::new(self.population, self.mix.clone(), self.has_fee)
    }
}

/// A load that runs.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Tally>,
    stop: Arc<watch::Sender<bool>>,
    failed: oneshot::Receiver<anyhow::Result<()>>,
    thread: JoinHandle<()>,
}

impl Load {
    /// Starts it against the node at this address.
    pub fn start(plan: Plan, address: &str, tally: Arc<Tally>) -> anyhow::Result<Load> {
        let (stop, stopped) = watch::channel(false);
        let (told, failed) = oneshot::channel();
        let (address, counted) = (address.to_owned(), tally.clone());
        let run = move || {
            // Nobody listens any more if the bench was interrupted.
            let _ = told.send(run(plan, &address, counted, stopped));
        };
        let thread = thread::Builder::new().name("load".into()).spawn(run).context("start a thread")?;
        Ok(Load { tally, stop: Arc::new(stop), failed, thread })
    }

    /// What became of its trades so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Sends no new trades, and waits for the ends of those that were begun.
    pub async fn stop(self) -> anyhow::Result<Arc<Tally>> {
        self.stop.send_replace(true);
        self.failed.await.context("the load's thread has ended without a word")??;
        // It has said its last word.
        let _ = self.thread.join();
        Ok(self.tally)
    }
}

fn run(plan: Plan, address: &str, tally: Arc<Tally>, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the load's runtime")?.block_on(async {
        let connect = || -> anyhow::Result<Grpc<Channel>> {
            let channel = Tcp.channel(address).with_context(|| format!("{address} is no host:port"))?;
            Ok(Grpc::with_origin(channel, format!("http://{address}").parse().context("make an address")?))
        };
        match plan.senders {
            Senders::Unary(clients) => {
                let connections = clients.div_ceil(CLIENTS_PER_CONNECTION);
                let connections = (0..connections).map(|_| connect()).collect::<anyhow::Result<Vec<_>>>()?;
                let clients = (0..clients).map(|client| {
                    let connection = connections[client % connections.len()].clone();
                    unary(plan.clone(), connection, tally.clone(), stop.clone())
                });
                let clients: Vec<_> = clients.map(tokio::spawn).collect();
                all(clients).await
            }
            Senders::Streams { count, .. } | Senders::Open { count, .. } => {
                let lanes: Vec<Arc<Lane>> =
                    (0..count).map(|place| Arc::new(Lane::new(&plan, place, tally.clone()))).collect();
                let pacer = Pacer::start(&plan, &lanes)?;
                let streams = lanes.iter().map(|lane| Ok(lane.clone().run(connect()?, stop.clone())));
                let streams = streams.collect::<anyhow::Result<Vec<_>>>()?;
                let streams: Vec<_> = streams.into_iter().map(tokio::spawn).collect();
                let done = all(streams).await;
                pacer.end();
                done
            }
        }
    })
}

async fn all(tasks: Vec<tokio::task::JoinHandle<anyhow::Result<()>>>) -> anyhow::Result<()> {
    for done in join_all(tasks).await {
        done.context("a client has panicked")??;
    }
    Ok(())
}

/// Waits until the load is told to stop, and then for as long as an answer may take.
async fn patience(mut stop: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = stop.wait_for(|stop| *stop).await;
    tokio::time::sleep(ANSWER_TIMEOUT).await;
}

/// One client, with one call at a time.
async fn unary(
    plan: Plan,
    mut connection: Grpc<Channel>,
    tally: Arc<Tally>,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut maker = plan.maker();
    let patience = patience(stop.clone());
    tokio::pin!(patience);
    for sequence in 0..SEQUENCE_END {
        if *stop.borrow() {
            break;
        }
        let trade = maker.make(sequence);
        let began = Instant::now();
        let end = tokio::select! {
            end = settle(&trade, &plan, &mut connection, &tally) => end,
            () = &mut patience => End::Lost,
        };
        let was_committed = end == End::Committed;
        tally.ended(&trade, began, Instant::now(), end);
        if !was_committed {
            tokio::time::sleep(WRONG_PAUSE).await;
        }
    }
    Ok(())
}

/// Sends the orders of a trade one after the other.
async fn settle(trade: &Trade, plan: &Plan, connection: &mut Grpc<Channel>, tally: &Tally) -> End {
    let mut end = End::Committed;
    for order in trade.orders(plan.form, plan.population.placement) {
        end = worse(end, submit(order, connection, tally).await);
    }
    end
}

/// Sends an order until it is not refused.
async fn submit(order: Order, connection: &mut Grpc<Channel>, tally: &Tally) -> End {
    loop {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, wire::submit(connection, order)).await;
        let Ok(said) = answer else { return End::Lost };
        let Said::Refused { retry_after } = said else { return end_of(said) };
        tally.refused();
        tokio::time::sleep(retry_after).await;
    }
}

fn end_of(said: Said) -> End {
    match said {
        Said::Committed => End::Committed,
        Said::Refused { .. } => End::Refused,
        Said::Other(what) => End::Other(what),
    }
}

/// The end of a trade of which two parts ended like this. One of them refused and the other not leaves half a trade.
fn worse(one: End, other: End) -> End {
    match (one, other) {
        (End::Lost, _) | (_, End::Lost) => End::Lost,
        (End::Other(what), _) | (_, End::Other(what)) => End::Other(what),
        (End::Refused, End::Refused) => End::Refused,
        (End::Refused, End::Committed) | (End::Committed, End::Refused) => {
            End::Other("refused in part".into())
        }
        (End::Committed, End::Committed) => End::Committed,
    }
}

/// One stream, and its trades.
#[derive(Debug)]
struct Lane {
    tally: Arc<Tally>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    maker: Maker,
    form: Form,
    population: Population,
    window: usize,
    /// None: it is a closed loop.
    pace: Option<Pace>,
    /// What is left to be sent of the newest trade.
    orders: Option<Orders>,
    /// Refused orders, by when they are to be sent again.
    again: BTreeMap<(Instant, Uuid), Order>,
    /// The number of the first trade in `slots`.
    base: u32,
    /// Trades without an answer, and those with one that are newer than the first of them.
    slots: VecDeque<Slot>,
    in_flight: usize,
    is_stopping: bool,
    waker: Option<Waker>,
}

/// A trade on its way.
#[derive(Debug)]
struct Slot {
    trade: Trade,
    intended: Instant,
    /// Orders without an answer.
    left: usize,
    /// How those with an answer ended; None: there is none yet.
    end: Option<End>,
}

/// When trades are to be sent.
#[derive(Debug)]
struct Pace {
    began: Instant,
    interval: Duration,
    patience: Option<Duration>,
    /// How many were due and are sent or turned away.
    passed: u32,
}

impl Pace {
    /// When the next one is due.
    fn next(&self) -> Instant {
        self.began + self.interval * self.passed
    }
}

impl Lane {
    fn new(plan: &Plan, place: usize, tally: Arc<Tally>) -> Lane {
        let (window, pace) = match plan.senders {
            Senders::Unary(_) => unreachable!("unary clients have no streams"),
            // Those that share the rest have one more.
            Senders::Streams { count, window } => ((window + place) / count, None),
            Senders::Open { count, per_second, patience } => {
                let interval = Duration::from_secs_f64(count as f64 / per_second);
                // The streams take turns.
                let began = Instant::now() + interval.mul_f64(place as f64 / count as f64);
                (OPEN_MAX, Some(Pace { began, interval, patience, passed: 0 }))
            }
        };
        let state = State {
            maker: plan.maker(),
            form: plan.form,
            population: plan.population,
            window: window.max(1),
            pace,
            orders: None,
            again: BTreeMap::new(),
            base: 0,
            slots: VecDeque::new(),
            in_flight: 0,
            is_stopping: false,
            waker: None,
        };
        Lane { tally, state: Mutex::new(state) }
    }

    /// Sends and takes answers until it is told to stop and all is answered.
    async fn run(
        self: Arc<Lane>,
        mut connection: Grpc<Channel>,
        mut stop: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let patience = patience(stop.clone());
        let orders = Outgoing { lane: self.clone() };
        let mut answers =
            wire::submit_stream(&mut connection, orders).await.context("open a stream to the node")?;
        let stopped = async {
            // A sender that is gone means the same.
            let _ = stop.wait_for(|stop| *stop).await;
            self.stop();
            patience.await;
        };
        let reading = async {
            while let Some(answers) = answers.next().await {
                let answers = answers.map_err(|status| anyhow::anyhow!("the stream broke: {status}"))?;
                answers.into_iter().for_each(|answer| self.take(answer));
                self.wake();
            }
            anyhow::Ok(())
        };
        let read = tokio::select! {
            () = stopped => Ok(()),
            read = reading => read,
            () = self.wake_when_due() => unreachable!("it goes on for ever"),
        };
        self.give_up();
        read
    }

    /// Wakes the stream when something is to be sent again.
    async fn wake_when_due(&self) {
        let mut ticks = interval(AGAIN_TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let first = self.lock().again.keys().next().map(|(due, _)| *due);
            if first.is_some_and(|due| due <= Instant::now()) {
                self.wake();
            }
        }
    }

    fn take(&self, Answer { id, said }: Answer) {
        let now = Instant::now();
        if let Said::Refused { .. } = said {
            self.tally.refused();
        }
        let mut state = self.lock();
        let Some((trade, intended, end)) = state.take(id, said, now) else { return };
        drop(state);
        self.tally.ended(&trade, intended, now, end);
    }

    /// No new trades.
    fn stop(&self) {
        self.lock().is_stopping = true;
        self.wake();
    }

    fn wake(&self) {
        let waker = self.lock().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// What has no answer will get none.
    fn give_up(&self) {
        let mut state = self.lock();
        state.again.clear();
        let lost: Vec<Slot> = state.slots.drain(..).filter(|slot| slot.left > 0).collect();
        drop(state);
        for slot in lost {
            self.tally.ended(&slot.trade, slot.intended, Instant::now(), End::Lost);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }
}

impl State {
    /// Takes in what was said about a batch. If its trade has ended with it: when it was to be sent, and how it ended.
    fn take(&mut self, id: Option<Uuid>, said: Said, now: Instant) -> Option<(Trade, Instant, End)> {
        let place = id.and_then(|id| sequence_of(id).checked_sub(self.base)).map(|place| place as usize);
        let slot = place.and_then(|place| self.slots.get_mut(place)).filter(|slot| slot.left > 0);
        let Some((slot, id)) = slot.zip(id) else {
            debug_assert!(false, "an answer to what was not asked");
            return None;
        };
        if let (Said::Refused { retry_after }, None) = (&said, &self.pace)
            && let Some(order) = slot.trade.order(id, self.form, self.population.placement)
        {
            self.again.insert((now + *retry_after, id), order);
            return None;
        }
        slot.left -= 1;
        let end = end_of(said);
        let end = match slot.end.take() {
            None => end,
            Some(before) => worse(before, end),
        };
        if slot.left > 0 {
            slot.end = Some(end);
            return None;
        }
        let (trade, intended) = (slot.trade, slot.intended);
        while self.slots.front().is_some_and(|slot| slot.left == 0) {
            self.slots.pop_front();
            self.base += 1;
        }
        self.in_flight -= 1;
        Some((trade, intended, end))
    }

    /// A refused order whose time has come.
    fn due(&mut self, now: impl Fn() -> Instant) -> Option<Order> {
        let first = self.again.first_entry()?;
        (first.key().0 <= now()).then(|| first.remove())
    }

    /// The next order, if one is to be sent now. `now` is asked for only if it is needed.
    fn next(&mut self, tally: &Tally, now: impl Fn() -> Instant) -> Poll<Option<Order>> {
        loop {
            if let Some(order) = self.orders.as_mut().and_then(Iterator::next) {
                return Poll::Ready(Some(order));
            }
            if let Some(order) = self.due(&now) {
                return Poll::Ready(Some(order));
            }
            let sequence = self.base + self.slots.len() as u32;
            if self.is_stopping || sequence == SEQUENCE_END {
                // In a closed loop what is in flight may have to be sent again.
                let is_over = self.pace.is_some() || self.in_flight == 0;
                return if is_over { Poll::Ready(None) } else { Poll::Pending };
            }
            let has_room = self.in_flight < self.window;
            let intended = match &mut self.pace {
                None if has_room => now(),
                None => return Poll::Pending,
                Some(pace) => {
                    let (due, now) = (pace.next(), now());
                    if due > now {
                        return Poll::Pending;
                    }
                    pace.passed += 1;
                    if !has_room || pace.patience.is_some_and(|patience| now - due > patience) {
                        tally.turned_away();
                        continue;
                    }
                    due
                }
            };
            let trade = self.maker.make(sequence);
            let orders = trade.orders(self.form, self.population.placement);
            self.slots.push_back(Slot { trade, intended, left: orders.count(), end: None });
            self.in_flight += 1;
            self.orders = Some(orders);
        }
    }
}

/// The orders of a lane, as the connection asks for them: all that are to be sent now share a message.
struct Outgoing {
    lane: Arc<Lane>,
}

impl Stream for Outgoing {
    type Item = Vec<Order>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Vec<Order>>> {
        let mut state = self.lane.lock();
        let mut orders = Vec::new();
        while orders.len() < ORDERS_PER_MESSAGE {
            match state.next(&self.lane.tally, Instant::now) {
                Poll::Ready(Some(order)) => orders.push(order),
                Poll::Ready(None) if orders.is_empty() => return Poll::Ready(None),
                Poll::Pending if orders.is_empty() => {
                    state.waker = Some(context.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(orders))
    }
}

/// Wakes the streams of an open loop, on a thread of its own: a runtime's timers are too coarse.
struct Pacer(Option<(Arc<AtomicBool>, JoinHandle<()>)>);

impl Pacer {
    fn start(plan: &Plan, lanes: &[Arc<Lane>]) -> anyhow::Result<Pacer> {
        let Senders::Open { per_second, .. } = plan.senders else { return Ok(Pacer(None)) };
        let pace = if per_second * PACE.as_secs_f64() < MANY { PACE } else { PACE_OF_MANY };
        let (is_over, lanes) = (Arc::new(AtomicBool::new(false)), lanes.to_vec());
        let over = is_over.clone();
        let run = move || {
            while !over.load(Ordering::Relaxed) {
                lanes.iter().for_each(|lane| lane.wake());
                thread::sleep(pace);
            }
        };
        let thread = thread::Builder::new().name("pacer".into()).spawn(run).context("start a thread")?;
        Ok(Pacer(Some((is_over, thread))))
    }

    fn end(self) {
        if let Some((is_over, thread)) = self.0 {
            is_over.store(true, Ordering::Relaxed);
            // It ends within its pause.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use verdict_protocol::batch::Placement;

    use super::*;
    use crate::bench::tally::{Counts, Ledger};

    const RETRY_AFTER: Duration = Duration::from_secs(100);
    const REFUSED: Said = Said::Refused { retry_after: RETRY_AFTER };

    fn plan(senders: Senders, form: Form) -> Plan {
        let population = Population { users: 100, placement: Placement { shards: 4 } };
        Plan { senders, mix: Mix::Uniform, form, has_fee: false, population }
    }

    fn lane(senders: Senders, form: Form) -> Lane {
        Lane::new(&plan(senders, form), 0, Arc::new(Tally::new(Arc::new(Ledger::new(0)))))
    }

    impl Lane {
        /// All orders that are to be sent at this time.
        fn sent_at(&self, now: Instant) -> Vec<Order> {
            let mut state = self.lock();
            let next = || match state.next(&self.tally, || now) {
                Poll::Ready(order) => order,
                Poll::Pending => None,
            };
            std::iter::from_fn(next).collect()
        }

        fn answer(&self, order: &Order, said: Said) {
            self.take(Answer { id: Some(order.id), said });
        }
    }

    #[test]
    fn a_closed_loop_sends_one_trade_for_each_answer() {
        let lane = lane(Senders::Streams { count: 1, window: 3 }, Form::Atomic);
        let now = Instant::now();
        let first = lane.sent_at(now);
        assert_eq!(first.len(), 3);
        assert!(lane.sent_at(now).is_empty());
        // Out of order.
        lane.answer(&first[2], Said::Committed);
        lane.answer(&first[0], Said::Committed);
        let next = lane.sent_at(now);
        assert_eq!(next.len(), 2);
        lane.answer(&first[1], Said::Other("x".into()));
        next.iter().for_each(|order| lane.answer(order, Said::Committed));
        let expected = Counts { committed: 4, others: [("x".to_owned(), 1)].into(), ..Counts::default() };
        assert_eq!(lane.tally.counts(), expected);
        assert!(lane.lock().slots.is_empty());
        lane.lock().is_stopping = true;
        assert!(lane.sent_at(now).is_empty());
    }

    #[test]
    fn in_a_closed_loop_a_refused_trade_holds_its_place_and_comes_again() {
        let lane = lane(Senders::Streams { count: 1, window: 1 }, Form::Atomic);
        lane.tally.begin_measuring();
        let order = lane.sent_at(Instant::now()).remove(0);
        lane.answer(&order, REFUSED);
        assert!(lane.sent_at(Instant::now()).is_empty(), "too early, and no other one takes its place");
        // The load ends meanwhile.
        lane.lock().is_stopping = true;
        let next = |now: Instant| lane.lock().next(&lane.tally, || now);
        assert!(next(Instant::now()).is_pending());
        let again = lane.sent_at(Instant::now() + RETRY_AFTER);
        assert_eq!(again.iter().map(|order| order.id).collect::<Vec<_>>(), [order.id]);
        thread::sleep(Duration::from_millis(3));
        lane.answer(&again[0], Said::Committed);
        let expected = Counts { committed: 1, refused: 1, ..Counts::default() };
        assert_eq!((lane.tally.counts(), lane.tally.counts().not_done()), (expected, 0));
        assert!(lane.tally.end_measuring().latency.max() >= 3000, "it counts from the first time");
        assert!(matches!(next(Instant::now()), Poll::Ready(None)));
    }

    #[test]
    fn in_an_open_loop_a_refused_trade_is_given_up() {
        let lane = lane(Senders::Open { count: 1, per_second: 1000.0, patience: None }, Form::Atomic);
        let began = lane.lock().pace.as_ref().unwrap().began;
        let order = lane.sent_at(began).remove(0);
        lane.answer(&order, REFUSED);
        assert!(lane.lock().again.is_empty() && lane.lock().slots.is_empty());
        let expected = Counts { refused: 1, given_up: 1, ..Counts::default() };
        assert_eq!((lane.tally.counts(), lane.tally.counts().not_done()), (expected, 1));
    }

    #[test]
    fn a_trade_in_parts_has_ended_with_its_last_part() {
        let lane = lane(Senders::Streams { count: 1, window: 1 }, Form::Independent);
        let orders = lane.sent_at(Instant::now());
        assert!((2..=3).contains(&orders.len()), "{orders:?}");
        for (place, order) in orders.iter().enumerate() {
            assert_eq!(lane.tally.committed(), 0);
            assert!(place == 0 || lane.sent_at(Instant::now()).is_empty());
            lane.answer(order, Said::Committed);
        }
        assert_eq!(lane.tally.committed(), 1);
        let orders = lane.sent_at(Instant::now());
        lane.answer(&orders[0], REFUSED);
        orders[1..].iter().for_each(|order| lane.answer(order, Said::Committed));
        assert_eq!(lane.tally.committed(), 1);
        // The part that was refused comes again, and no other.
        let again = lane.sent_at(Instant::now() + RETRY_AFTER);
        assert_eq!(again.iter().map(|order| order.id).collect::<Vec<_>>(), [orders[0].id]);
        assert_eq!(again[0].batch(), orders[0].batch());
        lane.answer(&again[0], Said::Committed);
        assert_eq!((lane.tally.committed(), lane.tally.counts().wrong()), (2, 0));
    }

    #[test]
    fn an_open_loop_sends_what_is_due_and_waiting_counts() {
        let lane = lane(Senders::Open { count: 1, per_second: 1000.0, patience: None }, Form::Atomic);
        let began = lane.lock().pace.as_ref().unwrap().began;
        let at = |ms: u64| began + Duration::from_millis(ms);
        assert_eq!(lane.sent_at(at(0)).len(), 1);
        assert!(lane.sent_at(at(0)).is_empty());
        // The stream had no room for a second; all that was due is sent then, with its own time.
        assert_eq!(lane.sent_at(at(1000)).len(), 1000);
        let intended: Vec<Instant> = lane.lock().slots.iter().map(|slot| slot.intended).collect();
        assert_eq!((intended[1], intended[1000]), (at(1), at(1000)));
    }

    #[test]
    fn who_has_no_patience_turns_trades_away() {
        let patience = Some(Duration::from_millis(10));
        let lane = lane(Senders::Open { count: 1, per_second: 1000.0, patience }, Form::Atomic);
        let began = lane.lock().pace.as_ref().unwrap().began;
        assert_eq!(lane.sent_at(began + Duration::from_millis(999)).len(), 11);
        assert_eq!(lane.tally.counts().turned_away, 989);
    }

    #[test]
    fn streams_share_the_window_and_the_rate() {
        for window in [1, 7, 4096] {
            let senders = Senders::Streams { count: 4, window };
            let plan = plan(senders, Form::Atomic);
            let tally = Arc::new(Tally::new(Arc::new(Ledger::new(0))));
            let windows = (0..4).map(|place| Lane::new(&plan, place, tally.clone()).lock().window);
            assert_eq!(windows.sum::<usize>(), window.max(4));
        }
        let lane = lane(Senders::Open { count: 4, per_second: 4000.0, patience: None }, Form::Atomic);
        assert_eq!(lane.lock().pace.as_ref().unwrap().interval, Duration::from_millis(1));
    }

    #[test]
    fn what_has_no_answer_is_lost() {
        let lane = lane(Senders::Streams { count: 1, window: 5 }, Form::Independent);
        let orders = lane.sent_at(Instant::now());
        let first = orders.iter().filter(|order| order.trade.sequence == 0);
        first.for_each(|order| lane.answer(order, Said::Committed));
        lane.give_up();
        let counts = lane.tally.counts();
        assert_eq!((counts.committed, counts.lost), (1, 4));
    }
}
