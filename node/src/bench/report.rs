//! What a bench tells in the end. Written as JSON it is this, field by field (docs/operations.md lists them).

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    books::Findings,
    floor::Floor,
    fund::Funded,
    tally::{Counts, Measured},
    target::Usages,
};
use crate::usage::Usage;

/// The form of the JSON: changed when a field changes its meaning or goes.
pub const FORMAT: u32 = 2;

/// The report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The form of this JSON.
    pub format: u32,
    /// The program's version.
    pub version: String,
    /// When it began, as `2026-11-21 12:30:00 UTC`.
    pub began: String,
    /// Whether the program was built without optimization: then the figures mean nothing.
    pub is_debug_build: bool,
    /// What it ran on.
    pub machine: Machine,
    /// How it was run.
    pub settings: Settings,
    /// What the machine itself needs for one batch.
    pub floor: Floor,
    /// The clusters that were measured.
    pub clusters: Vec<ClusterReport>,
    /// The cases, in the order in which they were named.
    pub cases: Vec<CaseReport>,
}

/// The machine of the load, and of the cluster if that is the bench's own.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// What its processors are called.
    pub processor: String,
    /// How many it has.
    pub cores: usize,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Its system.
    pub system: String,
}

/// How the bench was run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Settings {
    /// The nodes that it was told to connect to; empty: it had a cluster of its own.
    pub connect: Vec<String>,
    /// Accounts, two to a user, where the case doesn't say otherwise.
    pub accounts: u64,
    /// Shards, where the case doesn't say otherwise.
    pub shards: u32,
    /// Trades in flight, on all streams together.
    pub window: usize,
    /// Whether each trade pays a fee into one account.
    pub fee: bool,
    /// Seconds before it was measured, for each case and round.
    pub warm_up_seconds: f64,
    /// Seconds that were measured, for each case and round.
    pub seconds: f64,
    /// Rounds.
    pub repeat: u32,
}

/// One cluster.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ClusterReport {
    /// Its shards.
    pub shards: u32,
    /// Its accounts.
    pub accounts: u64,
    /// The node that leads each group, when the cases began; group 0 is the coordinators'.
    pub leaders: BTreeMap<u32, u64>,
    /// How the accounts were made.
    pub funded: Funded,
    /// How long the nodes went on working after that: the measuring began when they were done. None: it isn't known whether they were.
    pub quiet_after_seconds: Option<f64>,
    /// The memory of each node after that, in bytes.
    pub resident_bytes_when_funded: BTreeMap<u64, u64>,
    /// Whether its books agreed in the end with what it had answered.
    pub books: Findings,
}

/// The figures of several rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

/// One case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub case: String,
    /// What it does.
    pub about: String,
    /// Shards of its cluster.
    pub shards: u32,
    /// Accounts of its cluster.
    pub accounts: u64,
    /// Trades committed per second.
    pub trades_per_second: Spread,
    /// The medians of the rounds' medians...
    pub p50_ms: f64,
    /// ...of the latencies that one of a hundred exceeded...
    pub p99_ms: f64,
    /// ...and one of a thousand.
    pub p999_ms: f64,
    /// The longest of all rounds.
    pub max_ms: f64,
    /// Whether each batch has rows of one shard only: its floor is lower.
    pub is_on_one_shard: bool,
    /// `p50_ms` by the floor of the same run.
    pub p50_by_floor: f64,
    /// Processor time of all nodes for each committed trade, in microseconds (median of the rounds).
    pub cpu_us_per_trade: Option<f64>,
    /// The same, of each node.
    pub cpu_us_per_trade_by_node: BTreeMap<u64, f64>,
    /// The same, of the load generator, which isn't in any of the above.
    pub client_cpu_us_per_trade: f64,
    /// Synced writes of all nodes for each trade.
    pub syncs_per_trade: Option<f64>,
    /// Bytes that all nodes caused to be written to disk for each trade.
    pub bytes_written_per_trade: Option<f64>,
    /// Messages between nodes for each trade.
    pub messages_per_trade: Option<f64>,
    /// The memory of each node at the end of the last round, in bytes.
    pub resident_bytes: BTreeMap<u64, u64>,
    /// What became of all trades, those outside of the measured time too.
    pub answers: Counts,
    /// What the overloads did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overload: Option<OverloadSummary>,
    /// What the loss of a follower did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follower: Option<FollowerSummary>,
    /// Each round by itself.
    pub rounds: Vec<Round>,
}

/// One round of a case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Round {
    /// How long it was measured.
    pub seconds: f64,
    /// Trades committed in that time.
    pub trades: u64,
    /// The same per second.
    pub trades_per_second: f64,
    /// Half of them took longer.
    pub p50_ms: f64,
    /// One of a hundred took longer.
    pub p99_ms: f64,
    /// One of a thousand took longer.
    pub p999_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// Processor time of each node for each trade, in microseconds.
    pub cpu_us_per_trade_by_node: BTreeMap<u64, f64>,
    /// That of the load generator.
    pub client_cpu_us_per_trade: f64,
    /// Synced writes of all nodes for each trade.
    pub syncs_per_trade: Option<f64>,
    /// Bytes written to disk by all nodes for each trade.
    pub bytes_written_per_trade: Option<f64>,
    /// Messages between nodes for each trade.
    pub messages_per_trade: Option<f64>,
    /// The memory of each node at the end, in bytes.
    pub resident_bytes: BTreeMap<u64, u64>,
    /// What became of all trades of the round.
    pub answers: Counts,
    /// Trades committed in each tenth of a second.
    pub trades_per_100_ms: Vec<u32>,
    /// What an overload did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overload: Option<OverloadReport>,
    /// What the loss of a follower did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follower: Option<FollowerReport>,
}

/// What an overload did, in one round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OverloadReport {
    /// Trades per second in a closed loop.
    pub peak_per_second: f64,
    /// Trades per second that were wanted: three times that.
    pub offered_per_second: f64,
    /// Trades per second that were committed meanwhile.
    pub goodput_per_second: f64,
    /// The same as a share of the peak.
    pub goodput_by_peak: f64,
    /// The latency that one of a hundred exceeded, of those that were committed.
    pub p99_ms: f64,
    /// The same in an open loop at half the peak.
    pub half_load_p99_ms: f64,
    /// The one by the other.
    pub p99_by_half_load: f64,
    /// Seconds from the end of the overload to the first whole second at nine tenths of the peak. None: it didn't come.
    pub recovery_seconds: Option<f64>,
    /// Trades committed in each tenth of a second, from the end of the overload on.
    pub trades_per_100_ms_after: Vec<u32>,
    /// What became of the trades at the peak...
    pub answers_at_peak: Counts,
    /// ...at half load...
    pub answers_at_half_load: Counts,
    /// ...during the overload...
    pub answers_meanwhile: Counts,
    /// ...and from its end on.
    pub answers_afterwards: Counts,
}

/// What the overloads of all rounds did: the figures of [`OverloadReport`].
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct OverloadSummary {
    pub peak_per_second: Spread,
    pub offered_per_second: Spread,
    pub goodput_per_second: Spread,
    pub goodput_by_peak: Spread,
    pub p99_ms: Spread,
    pub half_load_p99_ms: Spread,
    pub p99_by_half_load: Spread,
    /// None: in some round it didn't come.
    pub recovery_seconds: Option<Spread>,
}

/// What the loss of a follower did, in one round.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FollowerReport {
    /// Which node it was.
    pub node: u64,
    /// Trades per second before, with the same leaders.
    pub whole_per_second: f64,
    /// The throughput without it, as a share of that.
    pub throughput_by_whole: f64,
}

/// What the loss of a follower did in all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct FollowerSummary {
    /// Which node it was, in each round.
    pub nodes: Vec<u64>,
    /// Trades per second before, with the same leaders.
    pub whole_per_second: Spread,
    /// The throughput without it, as a share of that.
    pub throughput_by_whole: Spread,
}

impl Spread {
    /// Of these figures, at least one.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Spread {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (figures.first(), figures.last()) else { return Spread::default() };
        let middle = figures.len() / 2;
        let median = match figures.len() % 2 {
            1 => figures[middle],
            _ => (figures[middle - 1] + figures[middle]) / 2.0,
        };
        Spread { median, min: *min, max: *max }
    }

    /// How far apart the least and the greatest are, as a share of the median.
    pub fn width(&self) -> f64 {
        (self.max - self.min) / self.median
    }
}

/// What was counted at the beginning or at the end of the measured time.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Trades committed so far.
    pub committed: u64,
    /// What the nodes have used.
    pub nodes: Usages,
    /// What this process has used.
    pub client: Usage,
    /// What the nodes count, if they tell.
    pub counters: Option<Counters>,
}

/// What all nodes have counted together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Trades committed when they told it.
    pub committed: u64,
    /// Synced writes.
    pub syncs: u64,
    /// Messages.
    pub messages: u64,
}

impl Round {
    /// From what was counted before and after, and the latencies between.
    pub fn new(
        seconds: f64,
        before: &Snapshot,
        after: &Snapshot,
        measured: Measured,
        answers: Counts,
    ) -> Round {
        let trades = after.committed.saturating_sub(before.committed);
        let per_trade = |amount: f64| share(amount, trades);
        let used: BTreeMap<u64, Usage> = after
            .nodes
            .iter()
            .filter_map(|(node, after)| Some((*node, after.since(before.nodes.get(node)?))))
            .collect();
        let cpu = |usage: &Usage| per_trade(usage.processor.as_secs_f64() * 1e6);
        let written = || used.values().map(|usage| usage.bytes_written).sum::<u64>();
        let counters = before.counters.zip(after.counters);
        let counted = |of: fn(&Counters) -> u64| {
            let since = |of: fn(&Counters) -> u64| {
                counters.map(|(before, after)| of(&after).saturating_sub(of(&before)))
            };
            Some(share(since(of)? as f64, since(|counters| counters.committed)?))
        };
        Round {
            seconds,
            trades,
            trades_per_second: trades as f64 / seconds,
            p50_ms: quantile_ms(&measured.latency, 0.5),
            p99_ms: quantile_ms(&measured.latency, 0.99),
            p999_ms: quantile_ms(&measured.latency, 0.999),
            max_ms: quantile_ms(&measured.latency, 1.0),
            cpu_us_per_trade_by_node: used.iter().map(|(node, usage)| (*node, cpu(usage))).collect(),
            client_cpu_us_per_trade: cpu(&after.client.since(&before.client)),
            syncs_per_trade: counted(|counters| counters.syncs),
            bytes_written_per_trade: (!used.is_empty()).then(|| per_trade(written() as f64)),
            messages_per_trade: counted(|counters| counters.messages),
            resident_bytes: used.iter().map(|(node, usage)| (*node, usage.resident_bytes)).collect(),
            answers,
            trades_per_100_ms: measured.series,
            overload: None,
            follower: None,
        }
    }
}

/// What nobody used up isn't divided among nobody.
fn share(amount: f64, trades: u64) -> f64 {
    if trades == 0 { 0.0 } else { amount / trades as f64 }
}

fn quantile_ms(latency: &Histogram<u64>, quantile: f64) -> f64 {
    latency.value_at_quantile(quantile) as f64 / 1000.0
}

impl CaseReport {
    /// Puts the rounds together, of which there is at least one.
    pub fn with_rounds(mut self, rounds: Vec<Round>, floor: &Floor) -> CaseReport {
        let spread = |of: fn(&Round) -> f64| Spread::of(rounds.iter().map(of));
        // A figure that some round doesn't have is left out.
        let median = |of: fn(&Round) -> Option<f64>| {
            rounds.iter().map(of).collect::<Option<Vec<f64>>>().map(|figures| Spread::of(figures).median)
        };
        self.trades_per_second = spread(|round| round.trades_per_second);
        self.p50_ms = spread(|round| round.p50_ms).median;
        self.p99_ms = spread(|round| round.p99_ms).median;
        self.p999_ms = spread(|round| round.p999_ms).median;
        self.max_ms = spread(|round| round.max_ms).max;
        self.p50_by_floor = self.p50_ms / floor.of(self.is_on_one_shard);
        self.cpu_us_per_trade = median(Round::cpu_us_per_trade);
        let nodes = rounds.iter().flat_map(|round| round.cpu_us_per_trade_by_node.keys().copied());
        for node in nodes.collect::<std::collections::BTreeSet<u64>>() {
            let figures =
                rounds.iter().filter_map(|round| round.cpu_us_per_trade_by_node.get(&node).copied());
            self.cpu_us_per_trade_by_node.insert(node, Spread::of(figures).median);
        }
        self.client_cpu_us_per_trade = spread(|round| round.client_cpu_us_per_trade).median;
        self.syncs_per_trade = median(|round| round.syncs_per_trade);
        self.bytes_written_per_trade = median(|round| round.bytes_written_per_trade);
        self.messages_per_trade = median(|round| round.messages_per_trade);
        self.resident_bytes = rounds.last().map(|round| round.resident_bytes.clone()).unwrap_or_default();
        for round in &rounds {
            self.answers.add(&round.answers);
        }
        self.overload = OverloadSummary::of(&rounds);
        self.follower = FollowerSummary::of(&rounds);
        self.rounds = rounds;
        self
    }
}

impl OverloadSummary {
    /// None if there was no overload.
    fn of(rounds: &[Round]) -> Option<OverloadSummary> {
        let all: Vec<&OverloadReport> = rounds.iter().filter_map(|round| round.overload.as_ref()).collect();
        let spread = |of: fn(&OverloadReport) -> f64| Spread::of(all.iter().map(|overload| of(overload)));
        let recovered: Option<Vec<f64>> = all.iter().map(|overload| overload.recovery_seconds).collect();
        (!all.is_empty()).then(|| OverloadSummary {
            peak_per_second: spread(|overload| overload.peak_per_second),
            offered_per_second: spread(|overload| overload.offered_per_second),
            goodput_per_second: spread(|overload| overload.goodput_per_second),
            goodput_by_peak: spread(|overload| overload.goodput_by_peak),
            p99_ms: spread(|overload| overload.p99_ms),
            half_load_p99_ms: spread(|overload| overload.half_load_p99_ms),
            p99_by_half_load: spread(|overload| overload.p99_by_half_load),
            recovery_seconds: recovered.map(Spread::of),
        })
    }
}

impl FollowerSummary {
    /// None if none was lost.
    fn of(rounds: &[Round]) -> Option<FollowerSummary> {
        let all: Vec<FollowerReport> = rounds.iter().filter_map(|round| round.follower).collect();
        (!all.is_empty()).then(|| FollowerSummary {
            nodes: all.iter().map(|follower| follower.node).collect(),
            whole_per_second: Spread::of(all.iter().map(|follower| follower.whole_per_second)),
            throughput_by_whole: Spread::of(all.iter().map(|follower| follower.throughput_by_whole)),
        })
    }
}

impl Round {
    /// Of all nodes, if any could be looked at.
    pub fn cpu_us_per_trade(&self) -> Option<f64> {
        let by_node = &self.cpu_us_per_trade_by_node;
        (!by_node.is_empty()).then(|| by_node.values().sum())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::tally::Ledger;
    use crate::bench::tally::Tally;

    fn usage(ms: u64, bytes_written: u64) -> Usage {
        let processor = Duration::from_millis(ms);
        Usage { processor, bytes_written, write_calls: 0, resident_bytes: 5 }
    }

    fn snapshot(committed: u64, scale: u64) -> Snapshot {
        let nodes = [(1, usage(10 * scale, 100 * scale)), (2, usage(20 * scale, 0))];
        let counters = Some(Counters { committed, syncs: 3 * scale, messages: 7 * scale });
        Snapshot { committed, nodes: nodes.into(), client: usage(scale, 0), counters }
    }

    fn measured() -> Measured {
        let tally = Tally::new(std::sync::Arc::new(Ledger::new(0)));
        tally.begin_measuring();
        tally.end_measuring()
    }

    /// A round with a given throughput.
    pub fn round(per_second: u64) -> Round {
        let answers = Counts { committed: per_second * 2 + 10, ..Counts::default() };
        Round::new(2.0, &snapshot(10, 1), &snapshot(10 + per_second * 2, 1001), measured(), answers)
    }

    #[test]
    fn costs_are_for_each_trade_that_was_committed_meanwhile() {
        let round = round(500);
        assert_eq!((round.trades, round.trades_per_second), (1000, 500.0));
        assert_eq!(round.cpu_us_per_trade_by_node, [(1, 10_000.0), (2, 20_000.0)].into());
        assert_eq!((round.cpu_us_per_trade(), round.client_cpu_us_per_trade), (Some(30_000.0), 1000.0));
        assert_eq!(round.bytes_written_per_trade, Some(100.0));
        assert_eq!((round.syncs_per_trade, round.messages_per_trade), (Some(3.0), Some(7.0)));
    }

    #[test]
    fn nothing_committed_and_nothing_known_are_no_nonsense() {
        let round =
            Round::new(1.0, &Snapshot::default(), &Snapshot::default(), measured(), Counts::default());
        assert_eq!((round.trades_per_second, round.client_cpu_us_per_trade), (0.0, 0.0));
        assert_eq!((round.cpu_us_per_trade(), round.syncs_per_trade), (None, None));
        assert_eq!(round.bytes_written_per_trade, None);
        let case = CaseReport::default().with_rounds(vec![round], &Floor::default());
        assert_eq!(case.cpu_us_per_trade, None);
    }

    #[test]
    fn rounds_are_told_by_their_median_and_spread() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([1.0, 4.0]).median, 2.5);
        assert_eq!(Spread::of([2.0]), Spread { median: 2.0, min: 2.0, max: 2.0 });
        let rounds = [300, 100, 250].map(round).to_vec();
        let case = CaseReport::default().with_rounds(rounds, &Floor::default());
        assert_eq!(case.trades_per_second, Spread { median: 250.0, min: 100.0, max: 300.0 });
        assert_eq!(case.answers.committed, 2 * (300 + 100 + 250) + 30);
        assert!((case.trades_per_second.width() - 0.8).abs() < 1e-9);
    }

    #[test]
    fn counters_are_divided_by_what_was_committed_when_they_were_told() {
        let with = |snapshot: Snapshot, committed, syncs| {
            let counters = Some(Counters { committed, syncs, messages: 2 * syncs });
            Snapshot { counters, ..snapshot }
        };
        // Telling it took time: 100 more were committed.
        let (before, after) = (with(snapshot(10, 1), 10, 0), with(snapshot(510, 2), 610, 300));
        let round = Round::new(1.0, &before, &after, measured(), Counts::default());
        assert_eq!(
            (round.trades, round.syncs_per_trade, round.messages_per_trade),
            (500, Some(0.5), Some(1.0))
        );
    }

    #[test]
    fn overloads_and_lost_followers_are_told_by_their_medians() {
        let mut rounds = [100, 200, 300].map(round).to_vec();
        for (place, round) in rounds.iter_mut().enumerate() {
            let peak_per_second = [10.0, 30.0, 20.0][place];
            let recovery_seconds = Some(place as f64);
            round.overload =
                Some(OverloadReport { peak_per_second, recovery_seconds, ..OverloadReport::default() });
            let throughput_by_whole = [0.9, 0.8, 1.0][place];
            round.follower =
                Some(FollowerReport { node: 3, throughput_by_whole, ..FollowerReport::default() });
        }
        let case = CaseReport::default().with_rounds(rounds.clone(), &Floor::default());
        let (overload, follower) = (case.overload.unwrap(), case.follower.unwrap());
        assert_eq!(overload.peak_per_second, Spread { median: 20.0, min: 10.0, max: 30.0 });
        assert_eq!(overload.recovery_seconds, Some(Spread { median: 1.0, min: 0.0, max: 2.0 }));
        assert_eq!(follower.throughput_by_whole, Spread { median: 0.9, min: 0.8, max: 1.0 });
        assert_eq!(follower.nodes, [3, 3, 3]);
        rounds[1].overload.as_mut().unwrap().recovery_seconds = None;
        let case = CaseReport::default().with_rounds(rounds, &Floor::default());
        assert_eq!(case.overload.unwrap().recovery_seconds, None, "not in every round");
    }

    #[test]
    fn the_json_has_the_names_that_others_read() {
        let case = CaseReport { case: "unary-64".into(), ..CaseReport::default() };
        let case = case.with_rounds(vec![round(100)], &Floor::default());
        let report = Report { cases: vec![case], ..Report::default() };
        let json = serde_json::to_value(&report).unwrap();
        let case = &json["cases"][0];
        assert_eq!(case["case"], "unary-64");
        assert_eq!(case["trades_per_second"]["median"], 100.0);
        for name in ["p50_ms", "p99_ms", "p999_ms", "max_ms", "cpu_us_per_trade", "client_cpu_us_per_trade"] {
            assert!(case[name].is_number(), "{name} in {case}");
        }
        assert!(json["machine"].is_object() && json["floor"]["floor_ms"].is_number());
    }

    #[test]
    fn each_case_has_its_own_floor() {
        let floor = Floor { floor_ms: 4.0, one_shard_floor_ms: 2.0, ..Floor::default() };
        let by_floor = |is_on_one_shard| {
            let case = CaseReport { is_on_one_shard, ..CaseReport::default() };
            case.with_rounds(vec![Round { p50_ms: 6.0, ..Round::default() }], &floor).p50_by_floor
        };
        assert_eq!((by_floor(false), by_floor(true)), (1.5, 3.0));
    }
}
