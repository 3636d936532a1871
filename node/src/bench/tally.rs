//! What became of the trades of a load: counted while it runs, with latencies of the time that is measured.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::trade::Trade;

/// The longest latency that is told apart from longer ones, in microseconds: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// The time series has one figure for each of these.
pub const SERIES_STEP: Duration = Duration::from_millis(100);
/// Trades whose records are read in the end, of each load.
const SAMPLE_MAX: usize = 500;

/// How a trade ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Committed, all of it.
    Committed,
    /// Refused, and not sent again: nothing of it was proposed.
    Refused,
    /// Anything else, in a word or two. Parts of it may have been committed if it was sent in parts.
    Other(String),
    /// It was not answered.
    Lost,
}

/// Counts and latencies. Shared by reference: all that changes is inside.
#[derive(Debug)]
pub struct Tally {
    ledger: Arc<Ledger>,
    began: Instant,
    committed: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    is_measuring: bool,
    measured: Measured,
    sample: Vec<Trade>,
    /// Of so many committed trades, one is kept for the sample.
    sample_of: u64,
    counts: Counts,
}

/// What was seen in the time that was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Latencies of the trades that were committed, in microseconds.
    pub latency: Histogram<u64>,
    /// Trades committed in each step of the time series.
    pub series: Vec<u32>,
    /// When it began, since the load's beginning.
    began: Duration,
}

/// What became of all trades of a load, those before and after the measured time too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Committed.
    pub committed: u64,
    /// Tries that were refused with RESOURCE_EXHAUSTED. In a closed loop the same batch is sent again.
    pub refused: u64,
    /// Trades that ended with a refusal: in an open loop all that were refused.
    pub given_up: u64,
    /// Not sent, since there was no room on the stream (open loop with a limit on waiting).
    pub turned_away: u64,
    /// Without an answer when the load ended.
    pub lost: u64,
    /// All other answers, by what was said.
    pub others: BTreeMap<String, u64>,
}

impl Counts {
    /// Adds those of another load.
    pub fn add(&mut self, other: &Counts) {
        self.committed += other.committed;
        self.refused += other.refused;
        self.given_up += other.given_up;
        self.turned_away += other.turned_away;
        self.lost += other.lost;
        for (what, count) in &other.others {
            *self.others.entry(what.clone()).or_default() += count;
        }
    }

    /// How many were neither committed nor refused, nor held back.
    pub fn wrong(&self) -> u64 {
        self.lost + self.others.values().sum::<u64>()
    }

    /// How many were not committed.
    pub fn not_done(&self) -> u64 {
        self.wrong() + self.given_up + self.turned_away
    }
}

impl Measured {
    fn new(began: Duration) -> Measured {
        Measured { latency: histogram(), series: Vec::new(), began }
    }
}

/// A histogram of microseconds, to three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are right")
}

impl Tally {
    /// One without anything.
    pub fn new(ledger: Arc<Ledger>) -> Tally {
        let inner = Inner {
            is_measuring: false,
            measured: Measured::new(Duration::ZERO),
            sample: Vec::new(),
            sample_of: 1,
            counts: Counts::default(),
        };
        Tally { ledger, began: Instant::now(), committed: AtomicU64::new(0), inner: Mutex::new(inner) }
    }

    /// From now on latencies count.
    pub fn begin_measuring(&self) {
        let mut inner = self.lock();
        inner.is_measuring = true;
        inner.measured = Measured::new(self.began.elapsed());
    }

    /// Latencies don't count any more; what was measured.
    pub fn end_measuring(&self) -> Measured {
        let mut inner = self.lock();
        inner.is_measuring = false;
        inner.measured.clone()
    }

    /// Trades that were committed so far.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// What became of all trades so far.
    pub fn counts(&self) -> Counts {
        self.lock().counts.clone()
    }

    /// Some of the trades that were committed, spread over all of them.
    pub fn sample(&self) -> Vec<Trade> {
        self.lock().sample.clone()
    }

    /// Counts a trade that has ended. Its latency is from `intended` to `now`.
    pub fn ended(&self, trade: &Trade, intended: Instant, now: Instant, end: End) {
        match end {
            End::Committed => {
                self.ledger.settle(trade);
                self.committed.fetch_add(1, Ordering::Relaxed);
            }
            End::Refused => {}
            End::Other(_) | End::Lost => self.ledger.doubt(trade),
        }
        let mut inner = self.lock();
        let Inner { is_measuring, measured, counts, .. } = &mut *inner;
        match end {
            End::Committed => {
                counts.committed += 1;
                if *is_measuring {
                    let micros = now.saturating_duration_since(intended).as_micros() as u64;
                    measured.latency.saturating_record(micros);
                    let at = now.saturating_duration_since(self.began + measured.began);
                    let step = (at.as_micros() / SERIES_STEP.as_micros()) as usize;
                    if measured.series.len() <= step {
                        measured.series.resize(step + 1, 0);
                    }
                    measured.series[step] += 1;
                }
                inner.keep(trade);
            }
            End::Refused => counts.given_up += 1,
            End::Lost => counts.lost += 1,
            End::Other(what) => *counts.others.entry(what).or_default() += 1,
        }
    }

    /// Counts a try that was refused.
    pub fn refused(&self) {
        self.lock().counts.refused += 1;
    }

    /// Counts a trade that was not sent.
    pub fn turned_away(&self) {
        self.lock().counts.turned_away += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds this lock")
    }
}

impl Inner {
    fn keep(&mut self, trade: &Trade) {
        if !self.counts.committed.is_multiple_of(self.sample_of) {
            return;
        }
        self.sample.push(*trade);
        if self.sample.len() == SAMPLE_MAX {
            // Every other one goes.
            let mut place = 0;
            self.sample.retain(|_| {
                place += 1;
                place % 2 == 0
            });
            self.sample_of *= 2;
        }
    }
}

/// What the first users must hold: what they held before, and what committed trades moved.
#[derive(Debug)]
pub struct Ledger {
    cash: Vec<AtomicI64>,
    asset: Vec<AtomicI64>,
    /// Users of trades that may or may not have been committed.
    doubtful: Mutex<BTreeSet<u64>>,
}

impl Ledger {
    /// Of users 0 to this number; all others are not followed.
    pub fn new(users: u64) -> Ledger {
        let zeros = || (0..users).map(|_| AtomicI64::new(0)).collect();
        Ledger { cash: zeros(), asset: zeros(), doubtful: Mutex::default() }
    }

    /// By how much a user's cash and asset must have changed; None if that isn't known.
    pub fn change(&self, user: u64) -> Option<(i64, i64)> {
        if self.lock().contains(&user) {
            return None;
        }
        let of = |all: &[AtomicI64]| all.get(user as usize).map(|sum| sum.load(Ordering::Relaxed));
        of(&self.cash).zip(of(&self.asset))
    }

    /// The users that are followed.
    pub fn users(&self) -> u64 {
        self.cash.len() as u64
    }

    fn settle(&self, trade: &Trade) {
        for (user, cash, asset) in trade.changes() {
            if let Some(sum) = self.cash.get(user as usize) {
                sum.fetch_add(cash, Ordering::Relaxed);
                self.asset[user as usize].fetch_add(asset, Ordering::Relaxed);
            }
        }
    }

    fn doubt(&self, trade: &Trade) {
        let followed = trade.changes().map(|(user, ..)| user).filter(|user| *user < self.users());
        self.lock().extend(followed);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.doubtful.lock().expect("nothing panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use verdict_protocol::batch::Placement;

    use super::*;
    use crate::bench::trade::{Maker, Mix, Population};

    fn maker() -> Maker {
        Maker::new(Population { users: 50, placement: Placement { shards: 2 } }, Mix::Uniform, false)
    }

    #[test]
    fn latencies_count_from_the_intended_time_and_only_while_it_is_measured() {
        let tally = Tally::new(Arc::new(Ledger::new(0)));
        let (mut maker, now) = (maker(), Instant::now());
        let trade = maker.make(1);
        let before = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap();
        tally.ended(&trade, before(900), now, End::Committed);
        tally.begin_measuring();
        for ms in 1..=100 {
            tally.ended(&trade, before(ms), now, End::Committed);
        }
        tally.ended(&trade, before(500), now, End::Refused);
        let measured = tally.end_measuring();
        tally.ended(&trade, before(900), now, End::Committed);
        assert_eq!(measured.latency.len(), 100);
        let near = |quantile: f64, ms: u64| {
            let value = measured.latency.value_at_quantile(quantile);
            assert!(value.abs_diff(ms * 1000) <= ms, "{quantile}: {value}");
        };
        near(0.5, 50);
        near(0.99, 99);
        near(1.0, 100);
        assert_eq!(measured.series.iter().sum::<u32>(), 100);
        let expected = Counts { committed: 102, given_up: 1, ..Counts::default() };
        assert_eq!((tally.counts(), tally.committed()), (expected, 102));
    }

    #[test]
    fn the_sample_is_small_and_spread_over_all() {
        let tally = Tally::new(Arc::new(Ledger::new(0)));
        let (mut maker, now) = (maker(), Instant::now());
        for sequence in 0..20_000 {
            tally.ended(&maker.make(sequence), now, now, End::Committed);
        }
        let numbers: Vec<u32> = tally.sample().iter().map(|trade| trade.sequence).collect();
        assert!((SAMPLE_MAX / 4..SAMPLE_MAX).contains(&numbers.len()), "{}", numbers.len());
        assert!(numbers[0] < 1000 && numbers[numbers.len() - 1] > 19_000, "{numbers:?}");
        assert!(numbers.windows(2).all(|pair| pair[1] - pair[0] < 500), "{numbers:?}");
    }

    #[test]
    fn the_ledger_follows_committed_trades_and_owns_up_to_what_it_doesnt_know() {
        let ledger = Arc::new(Ledger::new(50));
        let tally = Tally::new(ledger.clone());
        let (mut maker, now) = (maker(), Instant::now());
        let trade = maker.make(0);
        tally.ended(&trade, now, now, End::Committed);
        tally.ended(&trade, now, now, End::Refused);
        let quantity = i64::from(trade.quantity);
        assert_eq!(ledger.change(trade.buyer), Some((-trade.quote(), quantity)));
        assert_eq!(ledger.change(trade.seller), Some((trade.quote(), -quantity)));
        tally.ended(&trade, now, now, End::Lost);
        assert_eq!((ledger.change(trade.buyer), ledger.change(trade.seller)), (None, None));
        assert_eq!(tally.counts().wrong(), 1);
        assert_eq!(ledger.change(50), None, "not followed");
    }
}
