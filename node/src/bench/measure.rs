//! One round of one case.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::{
    case::{Case, Kind},
    load::{Load, Plan, Senders},
    report::{Counters, FollowerReport, OverloadReport, Round, Snapshot},
    screen::Screen,
    tally::{Counts, Ledger, SERIES_STEP, Tally},
    target::Target,
    trade::{Form, Mix, Population, Trade},
};
use crate::usage::Usage;

/// So much more than the peak is offered in an overload.
const OVERLOAD: f64 = 3.0;
/// A trade of an overload that finds no room on its stream for so long is turned away: who sends too much must see at once that
/// it is too much.
const PATIENCE: Duration = Duration::from_millis(10);
/// How long it is watched whether the throughput comes back.
const RECOVERY: Duration = Duration::from_secs(12);
/// It is back when it has so much of the peak for a second.
const RECOVERED: f64 = 0.9;
/// How long a cluster gets to notice that a follower is gone.
const NOTICE: Duration = Duration::from_secs(2);
/// The screen moves so often.
const TICK: Duration = Duration::from_millis(200);

/// What the rounds of one cluster have in common.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The cluster.
    pub target: Target,
    /// Its users.
    pub population: Population,
    /// What must be in its books.
    pub ledger: Arc<Ledger>,
    /// Where progress is shown.
    pub screen: &'a Screen,
    /// How it is run.
    pub pace: Pacing,
    /// Trades that were committed: some of each load.
    pub sample: Vec<Trade>,
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
pub struct Pacing {
    /// Before it is measured.
    pub warm_up: Duration,
    /// How long it is measured.
    pub span: Duration,
    /// How long an overload lasts.
    pub overload: Duration,
    /// Trades in flight on streams.
    pub window: usize,
    /// Whether each trade pays a fee.
    pub has_fee: bool,
}

impl Bench<'_> {
    /// Runs a case once.
    pub async fn round(&mut self, case: &Case) -> anyhow::Result<Round> {
        let plan = self.plan(case);
        match case.kind {
            Kind::Unary { .. } | Kind::Streams { .. } | Kind::Open { .. } => {
                self.measure(plan, self.pace.warm_up, self.pace.span).await
            }
            Kind::Overload => self.overload(plan).await,
            Kind::Follower { is_paused } => self.without_follower(plan, is_paused).await,
        }
    }

    fn plan(&self, case: &Case) -> Plan {
        Plan {
            senders: case.senders(self.pace.window),
            mix: case.users().mix(self.population),
            form: case.form(),
            has_fee: self.pace.has_fee,
            population: self.population,
        }
    }

    /// Runs a load, and measures it after a while.
    async fn measure(&mut self, plan: Plan, warm_up: Duration, span: Duration) -> anyhow::Result<Round> {
        let (load, mut round) = self.measure_on(plan, warm_up, span).await?;
        round.answers = self.stop(load).await?;
        Ok(round)
    }

    /// The same, for a figure that others are compared with: there must be one.
    async fn measure_whole(
        &mut self,
        plan: Plan,
        warm_up: Duration,
        span: Duration,
    ) -> anyhow::Result<Round> {
        let round = self.measure(plan, warm_up, span).await?;
        let problem =
            "nothing was committed in the time that was measured: give more --seconds, or a smaller --window";
        anyhow::ensure!(round.trades > 0, problem);
        Ok(round)
    }

    /// The same, and the load runs on. The round has no answers yet.
    async fn measure_on(
        &mut self,
        plan: Plan,
        warm_up: Duration,
        span: Duration,
    ) -> anyhow::Result<(Load, Round)> {
        let address = self.target.leader_address().await?;
        let tally = Arc::new(Tally::new(self.ledger.clone()));
        let load = Load::start(plan, &address, tally)?;
        self.watch(&load, warm_up, "warm-up").await;
        let counters = self.counters(load.tally()).await;
        let before = Snapshot { counters, ..self.snapshot(load.tally())? };
        let began = Instant::now();
        load.tally().begin_measuring();
        self.watch(&load, span, "measured").await;
        let measured = load.tally().end_measuring();
        let seconds = began.elapsed().as_secs_f64();
        let after = self.snapshot(load.tally())?;
        let after = Snapshot { counters: self.counters(load.tally()).await, ..after };
        let round = Round::new(seconds, &before, &after, measured, Counts::default());
        Ok((load, round))
    }

    async fn stop(&mut self, load: Load) -> anyhow::Result<Counts> {
        let tally = load.stop().await.context("the load")?;
        self.sample.extend(tally.sample());
        Ok(tally.counts())
    }

    /// What the nodes count, and what was committed when they told it: asking them takes time, in which trades go on.
    async fn counters(&self, tally: &Tally) -> Option<Counters> {
        let (syncs, messages) = self.target.counters().await?;
        Some(Counters { committed: tally.committed(), syncs, messages })
    }

    /// All that can be told without asking anybody.
    fn snapshot(&self, tally: &Tally) -> anyhow::Result<Snapshot> {
        let client = Usage::of(std::process::id())?;
        let (committed, nodes) = (tally.committed(), self.target.usages()?);
        Ok(Snapshot { committed, nodes, client, counters: None })
    }

    async fn watch(&self, load: &Load, span: Duration, what: &str) {
        let began = Instant::now();
        let end = sleep(span);
        tokio::pin!(end);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut before = (began, load.tally().committed());
        loop {
            tokio::select! {
                () = &mut end => return,
                _ = ticks.tick() => {
                    let now = (Instant::now(), load.tally().committed());
                    let seconds = (now.0 - before.0).as_secs_f64();
                    let rate = if seconds > 0.0 { (now.1 - before.1) as f64 / seconds } else { 0.0 };
                    self.screen.tick(what, began.elapsed(), span, rate);
                    before = now;
                }
            }
        }
    }

    /// Peak, half of it, three times as much, and the peak again.
    async fn overload(&mut self, plan: Plan) -> anyhow::Result<Round> {
        let Pacing { warm_up, span, overload, .. } = self.pace;
        let streams = match plan.senders {
            Senders::Streams { count, .. } | Senders::Open { count, .. } => count,
            Senders::Unary(clients) => clients,
        };
        let open = |per_second: f64, patience| Plan {
            senders: Senders::Open { count: streams, per_second: per_second.max(1.0), patience },
            ..plan.clone()
        };
        let peak = self.measure_whole(plan.clone(), warm_up, span).await?;
        let half = self.measure(open(peak.trades_per_second / 2.0, None), warm_up, span).await?;
        let offered = peak.trades_per_second * OVERLOAD;
        let (flood, mut round) = self.measure_on(open(offered, Some(PATIENCE)), warm_up, overload).await?;

        // The closed loop begins again at the very end of the flood.
        let address = self.target.leader_address().await?;
        let again = Load::start(plan.clone(), &address, Arc::new(Tally::new(self.ledger.clone())))?;
        again.tally().begin_measuring();
        let watching = self.watch(&again, RECOVERY, "recovery");
        let (flooded, ()) = tokio::join!(flood.stop(), watching);
        let flooded = flooded.context("the overload")?;
        self.sample.extend(flooded.sample());
        let after = again.tally().end_measuring().series;
        let (meanwhile, afterwards) = (flooded.counts(), self.stop(again).await?);
        for counts in [&peak.answers, &half.answers, &meanwhile, &afterwards] {
            round.answers.add(counts);
        }
        round.overload = Some(OverloadReport {
            peak_per_second: peak.trades_per_second,
            offered_per_second: offered,
            goodput_per_second: round.trades_per_second,
            goodput_by_peak: round.trades_per_second / peak.trades_per_second,
            p99_ms: round.p99_ms,
            half_load_p99_ms: half.p99_ms,
            p99_by_half_load: round.p99_ms / half.p99_ms,
            recovery_seconds: recovery(&after, peak.trades_per_second),
            trades_per_100_ms_after: after,
            answers_at_peak: peak.answers,
            answers_at_half_load: half.answers,
            answers_meanwhile: meanwhile,
            answers_afterwards: afterwards,
        });
        Ok(round)
    }

    /// With all nodes, then without one that leads nothing.
    async fn without_follower(&mut self, plan: Plan, is_paused: bool) -> anyhow::Result<Round> {
        let Pacing { warm_up, span, .. } = self.pace;
        let victim = self.spare_node().await?;
        let whole = self.measure_whole(plan.clone(), warm_up, span).await?;
        let cluster = self.target.cluster().context("only a cluster of the bench's own loses nodes")?;
        match is_paused {
            true => cluster.pause(victim)?,
            false => cluster.kill(victim).await?,
        }
        self.target.find_processes();
        self.target.leave_out(Some(victim));
        sleep(NOTICE).await;
        let result = self.measure(plan, warm_up, span).await;
        let cluster = self.target.cluster().context("it was there a moment ago")?;
        match is_paused {
            true => cluster.resume(victim)?,
            false => cluster.start(victim)?,
        }
        self.target.leave_out(None);
        self.target.find_processes();
        self.target.wait_whole().await.context("wait for the node to be back")?;
        let mut round = result?;
        round.answers.add(&whole.answers);
        round.follower = Some(FollowerReport {
            node: victim,
            whole_per_second: whole.trades_per_second,
            throughput_by_whole: round.trades_per_second / whole.trades_per_second,
        });
        Ok(round)
    }

    /// A node that leads nothing, after others have taken over from it.
    async fn spare_node(&self) -> anyhow::Result<u64> {
        let leaders = self.target.leaders().await?;
        let nodes: Vec<u64> = self.target.usages()?.into_keys().collect();
        let leads = |node: u64| leaders.values().filter(|leader| **leader == node).count();
        // The coordinators' leader last: the load talks to it.
        let decides = |node: u64| leaders.get(&0) == Some(&node);
        let spare = nodes.iter().copied().min_by_key(|node| (decides(*node), leads(*node), *node));
        let spare = spare.context("the cluster has no nodes")?;
        let others: Vec<u64> = nodes.into_iter().filter(|node| *node != spare).collect();
        let led = leaders.iter().filter(|(_, leader)| **leader == spare);
        let wanted = led.zip(others.iter().cycle()).map(|((group, _), node)| (*group, *node)).collect();
        self.target.move_leaders(&wanted).await?;
        Ok(spare)
    }

    /// One uniform trade after the other for a moment, so that the first case finds everything warm.
    pub async fn warm_up(&mut self) -> anyhow::Result<()> {
        let plan = Plan {
            senders: Senders::Streams { count: 1, window: self.pace.window },
            mix: Mix::Uniform,
            form: Form::Atomic,
            has_fee: self.pace.has_fee,
            population: self.population,
        };
        let warm_up = self.pace.warm_up;
        if !warm_up.is_zero() {
            self.measure(plan, Duration::ZERO, warm_up).await?;
        }
        Ok(())
    }
}

/// When a series first has nine tenths of the peak for a second, in seconds.
fn recovery(series: &[u32], peak_per_second: f64) -> Option<f64> {
    let step = SERIES_STEP.as_secs_f64();
    let steps = (1.0 / step).round() as usize;
    let is_back = |second: &[u32]| {
        second.iter().map(|count| f64::from(*count)).sum::<f64>() >= RECOVERED * peak_per_second
    };
    Some(series.windows(steps).position(is_back)? as f64 * step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_is_the_first_whole_second_near_the_peak() {
        let series = |empty: usize| [vec![0; empty], vec![95; 40]].concat();
        assert_eq!(recovery(&series(0), 1000.0), Some(0.0));
        // 9 steps of 95 are less than 900, so all 10 must be full.
        assert_eq!(recovery(&series(25), 1000.0), Some(2.5));
        assert_eq!(recovery(&series(0), 2000.0), None);
        assert_eq!(recovery(&[95; 9], 1000.0), None, "less than a second is no second");
    }
}
