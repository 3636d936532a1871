//! What was measured, and what follows from it.
//!
//! A ratio is made in each round from two figures of that round, which saw the same noise; told are the median of the rounds
//! and the least and the greatest. Worked example: Verdict 10, 20, 30 trades a second in three rounds, a peer 5, 5, 10: the
//! ratios are 2, 4, 3, so the median is 3, from 2 to 4.

use serde::Serialize;

use crate::{
    load::Figures,
    plan::{Case, SYSTEMS, System},
};

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// The day, as year-month-day.
    pub date: String,
    /// The machine, in words.
    pub machine: String,
    /// What was measured, with versions.
    pub versions: Vec<String>,
    /// How long each case was measured in each round, in seconds.
    pub seconds: u64,
    /// How many rounds.
    pub rounds: u64,
    /// How many users, with two balances each.
    pub users: u64,
    /// The cases, in the order of the systems.
    pub cases: Vec<Row>,
    /// Verdict against the others.
    pub ratios: Vec<Ratio>,
}

/// One case of one system.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The system.
    pub system: System,
    /// The case.
    pub case: Case,
    /// The figures of each round.
    pub rounds: Vec<Figures>,
}

/// The median of several numbers, the least and the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// In the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

/// A case of Verdict against one of a peer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The case of Verdict.
    pub case: String,
    /// The peer.
    pub peer: System,
    /// The case of the peer.
    pub peer_case: String,
    /// How many times the peer's throughput.
    pub throughput: Spread,
    /// Verdict's median latency as a part of the peer's, where both have the same clients.
    pub p50: Option<Spread>,
}

impl Spread {
    /// Of these, if there are any.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        let (min, max) = (*numbers.first()?, *numbers.last()?);
        let middle = numbers.len() / 2;
        let median = match numbers.len() % 2 {
            0 => f64::midpoint(numbers[middle - 1], numbers[middle]),
            _ => numbers[middle],
        };
        Some(Spread { median, min, max })
    }
}

impl Row {
    /// Over the rounds.
    pub fn spread(&self, figure: impl Fn(&Figures) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(figure))
    }

    /// The median over the rounds, 0 if there are none.
    pub fn median(&self, figure: impl Fn(&Figures) -> f64) -> f64 {
        self.spread(figure).map_or(0.0, |spread| spread.median)
    }

    fn rate(&self) -> f64 {
        self.median(|figures| figures.trades_per_second)
    }
}

impl Results {
    /// All rows of a system.
    pub fn of(&self, system: System) -> impl Iterator<Item = &Row> {
        self.cases.iter().filter(move |row| row.system == system)
    }

    /// Verdict's cases against the peers'.
    pub fn compare(&mut self) {
        let mut ratios = Vec::new();
        for row in self.of(System::Verdict) {
            for peer in SYSTEMS.into_iter().filter(|system| *system != System::Verdict) {
                ratios.extend(self.opponent(&row.case, peer).and_then(|other| ratio(row, other)));
            }
        }
        self.ratios = ratios;
    }

    /// What a case is compared with: the peer's with as many clients, or else its best one under the same load.
    fn opponent(&self, case: &Case, peer: System) -> Option<&Row> {
        let rows = || self.of(peer).filter(|row| row.case.is_hot == case.is_hot && !row.rounds.is_empty());
        let same = rows().find(|row| row.case.clients == case.clients);
        same.or_else(|| rows().max_by(|a, b| a.rate().total_cmp(&b.rate())))
    }

    /// How much processor time others took at most while a case was measured, in processors.
    pub fn others_cpus_max(&self) -> Option<f64> {
        let figures = self.cases.iter().flat_map(|row| &row.rounds);
        figures.filter_map(|figures| figures.others_cpus).max_by(f64::total_cmp)
    }
}

fn ratio(ours: &Row, theirs: &Row) -> Option<Ratio> {
    let pairs = || ours.rounds.iter().zip(&theirs.rounds);
    let has_same_clients = ours.case.clients == theirs.case.clients;
    let p50 = Spread::of(pairs().map(|(ours, theirs)| ours.p50_ms / theirs.p50_ms));
    Some(Ratio {
        case: ours.case.name.clone(),
        peer: theirs.system,
        peer_case: theirs.case.name.clone(),
        throughput: Spread::of(pairs().map(|(a, b)| a.trades_per_second / b.trades_per_second))?,
        p50: p50.filter(|_| has_same_clients),
    })
}

/// What the tests of this crate look at: a run of two rounds.
#[cfg(test)]
pub fn example() -> Results {
    use crate::plan::Clients;

    let mut cases = Vec::new();
    for system in SYSTEMS {
        for case in system.cases(false) {
            let scale = if system == System::Verdict { 8.0 } else { 1.0 };
            let clients = match case.clients {
                Clients::Callers(count) => count as f64,
                Clients::Streams(_) => 4096.0,
            };
            let rounds = [1.0, 1.5].map(|round| Figures {
                trades_per_second: scale * round * (100.0 + clients),
                p50_ms: clients / 16.0 / scale,
                p99_ms: clients / scale,
                max_ms: Some(clients * 2.0),
                failed_tries_per_trade: 0.0,
                cpu_us_per_trade: (system != System::Verdict).then_some(500.0),
                others_cpus: (system == System::Etcd).then_some(0.25 * round),
            });
            cases.push(Row { system, case, rounds: rounds.to_vec() });
        }
    }
    let (date, machine) = ("2026-11-21".to_owned(), "2 processors".to_owned());
    let versions = vec!["Verdict 0.1.0".to_owned(), "etcd <3>".to_owned()];
    let mut results =
        Results { date, machine, versions, seconds: 10, rounds: 2, users: 10_000, cases, ratios: Vec::new() };
    results.compare();
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find<'a>(results: &'a Results, case: &str, peer: System) -> &'a Ratio {
        let mut ratios = results.ratios.iter();
        ratios.find(|ratio| ratio.case == case && ratio.peer == peer).expect("there is such a ratio")
    }

    #[test]
    fn the_median_lies_between_the_ends() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn ratios_are_made_within_rounds() {
        let results = example();
        let ratio = find(&results, "unary-64", System::Postgres);
        assert_eq!(ratio.peer_case, "uniform-64");
        // Both rounds differ by half, the ratio doesn't.
        assert_eq!(ratio.throughput, Spread { median: 8.0, min: 8.0, max: 8.0 });
        assert_eq!(ratio.p50.map(|p50| p50.median), Some(0.125));
    }

    #[test]
    fn without_the_same_clients_it_is_the_best_of_the_same_load() {
        let results = example();
        for (case, peer, expected) in [
            ("unary-256", System::Postgres, "uniform-128"),
            ("unary-256", System::Etcd, "uniform-256"),
            ("stream-1", System::Etcd, "uniform-256"),
            ("hot-256", System::PostgresStandby, "hot-64"),
            ("hot-stream", System::Postgres, "hot-128"),
        ] {
            let ratio = find(&results, case, peer);
            assert_eq!(ratio.peer_case, expected, "{case}");
            assert_eq!(ratio.p50.is_some(), case == "unary-256" && peer == System::Etcd, "{case}");
        }
    }

    #[test]
    fn json_has_the_cases_and_the_ratios() {
        let results = example();
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["cases"][0]["system"], "verdict");
        assert_eq!(json["cases"][0]["case"]["name"], "unary-1");
        assert_eq!(json["cases"][0]["rounds"][1]["max_ms"], 2.0);
        assert_eq!(json["ratios"].as_array().map(Vec::len), Some(8 * 3));
        assert_eq!(json["ratios"][1]["peer"], "postgres-standby");
        assert_eq!(results.others_cpus_max(), Some(0.375));
    }
}
