//! The closed loop: each client settles one trade after the other, and waits for each answer.
//!
//! Latencies are from the first try to the answer, tries that failed included. Trades are counted when they are answered
//! within the measured time. At its end each client finishes the trade that it is at, or gives it up after a try without effect.
//! That one isn't counted, but how long it took is told as the longest latency if it is, so that a client that never gets its
//! turn is seen; and if it was answered it is among those that are compared with what the servers hold.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    cpu::Cpu,
    trade::{Load, Trade, Trades},
};

/// The longest latency that is told apart, in microseconds: a minute.
const LATENCY_MAX_US: u64 = 60_000_000;
/// How long after the end the last trades may take.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// What came of a trade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is settled: durable everywhere, and the next reader sees it.
    Settled {
        /// Tries that had no effect before.
        failed_tries: u64,
    },
    /// It was given up after a try without effect, because time was up.
    GivenUp {
        /// Tries that had no effect.
        failed_tries: u64,
    },
}

/// One client of a system.
pub trait Client: Send + 'static {
    /// Settles one trade. After `give_up` no new try is begun.
    fn settle(
        &mut self,
        trade: &Trade,
        give_up: Instant,
    ) -> impl Future<Output = anyhow::Result<Answer>> + Send;
}

/// How a measurement is done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Not counted at first.
    pub warm_up: Duration,
    /// Counted.
    pub measured: Duration,
    /// How many users there are.
    pub users: u64,
    /// For the trades.
    pub seed: u64,
}

/// What was measured in one case and round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Trades answered in a second.
    pub trades_per_second: f64,
    /// The median latency, in milliseconds.
    pub p50_ms: f64,
    /// The latency that 99 of 100 trades keep below, in milliseconds.
    pub p99_ms: f64,
    /// The longest latency, in milliseconds; trades without an answer at the end included.
    pub max_ms: Option<f64>,
    /// Tries without effect for each trade answered.
    pub failed_tries_per_trade: f64,
    /// Processor time of servers and clients together for one trade, in microseconds.
    pub cpu_us_per_trade: Option<f64>,
    /// Processor time that others on this machine took meanwhile, in processors.
    pub others_cpus: Option<f64>,
}

/// Figures, and how many trades were answered in all.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The figures.
    pub figures: Figures,
    /// All trades that were answered, the warm-up and the end included.
    pub answered: u64,
}

struct Window {
    from: Instant,
    to: Instant,
}

struct Seen {
    /// Of the trades that are counted, in microseconds.
    latencies: Histogram<u64>,
    /// Of all trades that ended after the warm-up, in microseconds.
    longest: u64,
    /// Of the same trades.
    failed_tries: u64,
    /// All trades that were answered at whatever time.
    answered: u64,
}

/// Runs the clients side by side. `next_id` gives numbers to the trades.
pub async fn run<C: Client>(
    clients: Vec<C>,
    load: Load,
    plan: &Plan,
    next_id: &Arc<AtomicU64>,
) -> anyhow::Result<Measured> {
    let from = Instant::now() + plan.warm_up;
    let window = Arc::new(Window { from, to: from + plan.measured });
    let mut tasks = tokio::task::JoinSet::new();
    for (number, client) in (1..).zip(clients) {
        let trades = Trades::new(plan.seed.wrapping_mul(0x1_0001).wrapping_add(number), plan.users, load);
        tasks.spawn(one_client(client, trades, window.clone(), next_id.clone()));
    }
    tokio::time::sleep_until(window.from.into()).await;
    let cpu_before = Cpu::now()?;
    tokio::time::sleep_until(window.to.into()).await;
    let cpu = Cpu::now()?.since(&cpu_before);

    let mut all = Seen::new()?;
    let collect = async {
        while let Some(seen) = tasks.join_next().await {
            all.add(&seen.context("wait for a client")??)?;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(END_PATIENCE, collect)
        .await
        .with_context(|| format!("a trade was not answered within {} s", END_PATIENCE.as_secs()))??;
    Ok(Measured { answered: all.answered, figures: all.figures(plan.measured, &cpu)? })
}

async fn one_client<C: Client>(
    mut client: C,
    mut trades: Trades,
    window: Arc<Window>,
    next_id: Arc<AtomicU64>,
) -> anyhow::Result<Seen> {
    let mut seen = Seen::new()?;
    let mut began = Instant::now();
    while began < window.to {
        let trade = trades.next(next_id.fetch_add(1, Ordering::Relaxed));
        let answer = client.settle(&trade, window.to).await;
        let now = Instant::now();
        let answer = answer.with_context(|| format!("settle trade {}", trade.id))?;
        seen.note(answer, began, now, &window);
        began = now;
    }
    Ok(seen)
}

impl Seen {
    fn new() -> anyhow::Result<Seen> {
        let latencies = Histogram::new_with_max(LATENCY_MAX_US, 3).context("make a histogram")?;
        Ok(Seen { latencies, longest: 0, failed_tries: 0, answered: 0 })
    }

    fn note(&mut self, answer: Answer, began: Instant, ended: Instant, window: &Window) {
        let (is_settled, failed_tries) = match answer {
            Answer::Settled { failed_tries } => (true, failed_tries),
            Answer::GivenUp { failed_tries } => (false, failed_tries),
        };
        self.answered += u64::from(is_settled);
        if ended < window.from {
            return;
        }
        let latency = (ended - began).as_micros() as u64;
        self.longest = self.longest.max(latency);
        self.failed_tries += failed_tries;
        if is_settled && ended < window.to {
            self.latencies.saturating_record(latency.max(1));
        }
    }

    fn add(&mut self, other: &Seen) -> anyhow::Result<()> {
        self.latencies.add(&other.latencies).context("add up latencies")?;
        self.longest = self.longest.max(other.longest);
        self.failed_tries += other.failed_tries;
        self.answered += other.answered;
        Ok(())
    }

    fn figures(&self, measured: Duration, cpu: &Cpu) -> anyhow::Result<Figures> {
        let count = self.latencies.len();
        anyhow::ensure!(count > 0, "no trade was answered in {} s", measured.as_secs_f64());
        let milliseconds = |quantile| self.latencies.value_at_quantile(quantile) as f64 / 1000.0;
        Ok(Figures {
            trades_per_second: count as f64 / measured.as_secs_f64(),
            p50_ms: milliseconds(0.5),
            p99_ms: milliseconds(0.99),
            max_ms: Some(self.longest as f64 / 1000.0),
            failed_tries_per_trade: self.failed_tries as f64 / count as f64,
            cpu_us_per_trade: Some(cpu.ours * 1e6 / count as f64),
            others_cpus: Some(cpu.others() / measured.as_secs_f64()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Window {
        let from = Instant::now() + Duration::from_secs(10);
        Window { from, to: from + Duration::from_secs(10) }
    }

    #[test]
    fn only_what_is_answered_in_the_measured_time_is_counted() {
        let window = window();
        let at =
            |seconds: i64| window.from + Duration::from_secs(20) - Duration::from_secs((20 - seconds) as u64);
        let settled = Answer::Settled { failed_tries: 1 };
        let mut seen = Seen::new().unwrap();
        seen.note(settled, at(-2), at(-1), &window);
        seen.note(settled, at(-1), at(1), &window);
        seen.note(settled, at(1), at(2), &window);
        seen.note(settled, at(9), at(11), &window);
        seen.note(Answer::GivenUp { failed_tries: 5 }, at(3), at(10), &window);
        assert_eq!((seen.answered, seen.latencies.len(), seen.failed_tries), (4, 2, 8));
        let cpu = Cpu { ours: 4.0, machine: 5.0 };
        let figures = seen.figures(window.to - window.from, &cpu).unwrap();
        assert_eq!((figures.trades_per_second, figures.failed_tries_per_trade), (0.2, 4.0));
        assert_eq!((figures.max_ms, figures.cpu_us_per_trade), (Some(7000.0), Some(2_000_000.0)));
        assert_eq!(figures.others_cpus, Some(0.1));
    }

    #[test]
    fn a_client_that_never_gets_its_turn_is_seen() {
        let window = window();
        let mut seen = Seen::new().unwrap();
        seen.note(Answer::GivenUp { failed_tries: 1 }, window.from, window.to, &window);
        assert_eq!(seen.longest, 10_000_000);
        assert!(seen.figures(Duration::from_secs(10), &Cpu { ours: 0.0, machine: 0.0 }).is_err());
    }

    /// Settles at once, and counts.
    struct Quick(Arc<AtomicU64>);

    impl Client for Quick {
        async fn settle(&mut self, _: &Trade, _: Instant) -> anyhow::Result<Answer> {
            self.0.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(Answer::Settled { failed_tries: 0 })
        }
    }

    #[tokio::test]
    async fn as_many_are_told_answered_as_were() {
        let settled = Arc::new(AtomicU64::new(0));
        let clients = (0..4).map(|_| Quick(settled.clone())).collect();
        let (warm_up, measured) = (Duration::from_millis(20), Duration::from_millis(50));
        let plan = Plan { warm_up, measured, users: 10, seed: 1 };
        let next_id = Arc::new(AtomicU64::new(7));
        let measured = run(clients, Load::Uniform, &plan, &next_id).await.unwrap();
        assert_eq!(measured.answered, settled.load(Ordering::Relaxed));
        assert_eq!(next_id.load(Ordering::Relaxed), 7 + measured.answered);
    }
}
