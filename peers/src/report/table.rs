//! Tables.

use std::fmt::Write as _;

use super::number;
use crate::{
    load::Figures,
    plan::System,
    results::{Ratio, Results, Row, Spread},
};

const HEADS: [&str; 8] = [
    "system",
    "load",
    "clients",
    "trades/s",
    "from - to",
    "p50 / p99 / max ms",
    "CPU us a trade",
    "failed tries a trade",
];

/// The table for the terminal.
pub fn terminal(results: &Results) -> String {
    let mut lines = vec![HEADS.map(str::to_owned).to_vec()];
    lines.extend(results.cases.iter().map(cells));
    let mut text = aligned(&lines, 2);
    let mut lines =
        vec![vec!["Verdict against".to_owned(), String::new(), "throughput".into(), "p50".into()]];
    for ratio in &results.ratios {
        let p50 = ratio.p50.as_ref().map_or_else(String::new, p50_text);
        let peer = format!("{} {}", ratio.peer, ratio.peer_case);
        lines.push(vec![ratio.case.clone(), peer, times(&ratio.throughput), p50]);
    }
    if lines.len() > 1 {
        text += "\n";
        text += &aligned(&lines, 2);
    }
    text + "\n" + &circumstances(results) + "\n"
}

/// What goes into the documentation.
pub fn markdown(results: &Results) -> String {
    let mut text = circumstances(results) + "\n\n";
    let line = |text: &mut String, cells: &[String]| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    line(&mut text, &HEADS.map(str::to_owned));
    text += "|---|---|--:|--:|--:|--:|--:|--:|\n";
    for row in &results.cases {
        line(&mut text, &cells(row));
    }
    let peers: Vec<System> = [System::Postgres, System::PostgresStandby, System::Etcd]
        .into_iter()
        .filter(|peer| results.ratios.iter().any(|ratio| ratio.peer == *peer))
        .collect();
    if peers.is_empty() {
        return text;
    }
    text += "\n";
    let heads = peers.iter().map(|peer| format!("{peer}"));
    line(&mut text, &["Verdict's case".to_owned()].into_iter().chain(heads).collect::<Vec<_>>());
    let _ = writeln!(text, "|---|{}", "---|".repeat(peers.len()));
    for row in results.of(System::Verdict) {
        let ratio = |peer: &System| {
            let mut ratios = results.ratios.iter();
            let found = ratios.find(|ratio| ratio.case == row.case.name && ratio.peer == *peer);
            found.map_or_else(String::new, ratio_cell)
        };
        let cells: Vec<String> = [row.case.name.clone()].into_iter().chain(peers.iter().map(ratio)).collect();
        line(&mut text, &cells);
    }
    text
}

/// When, on what, how long.
fn circumstances(results: &Results) -> String {
    let Results { date, machine, versions, seconds, rounds, users, .. } = results;
    let mut text = format!(
        "Measured on {date}, {machine}: {}. {rounds} {} of {seconds} s for each case, {} users with two balances each; medians, and the \
         least and the greatest of the rounds.",
        versions.join(", "),
        if *rounds == 1 { "round" } else { "rounds" },
        super::grouped(*users),
    );
    if let Some(others) = results.others_cpus_max() {
        let _ = write!(text, " Other programs took at most {others:.2} processors meanwhile.");
    }
    text
}

fn cells(row: &Row) -> Vec<String> {
    let rate = row.spread(|figures| figures.trades_per_second);
    let (rate, range) = rate.map_or_else(
        || ("-".to_owned(), "-".to_owned()),
        |rate| (number(rate.median), format!("{} - {}", number(rate.min), number(rate.max))),
    );
    let latencies = [
        Some(row.median(|figures| figures.p50_ms)),
        Some(row.median(|figures| figures.p99_ms)),
        row.rounds.iter().filter_map(|figures| figures.max_ms).max_by(f64::total_cmp),
    ];
    let latencies: Vec<String> = latencies.into_iter().flatten().map(number).collect();
    let cpu = Spread::of(row.rounds.iter().filter_map(|figures: &Figures| figures.cpu_us_per_trade));
    let tries = row.median(|figures| figures.failed_tries_per_trade);
    vec![
        row.system.to_string(),
        row.case.load_text().to_owned(),
        row.case.clients_text(),
        rate,
        range,
        latencies.join(" / "),
        cpu.map_or_else(String::new, |cpu| number(cpu.median)),
        if tries < 0.005 { String::new() } else { number(tries) },
    ]
}

fn ratio_cell(ratio: &Ratio) -> String {
    let mut text = times(&ratio.throughput);
    if let Some(p50) = &ratio.p50 {
        text += "; p50 ";
        text += &p50_text(p50);
    } else {
        let _ = write!(text, ", against {}", ratio.peer_case);
    }
    text
}

/// "5.2 times (5.0 - 5.6)".
fn times(spread: &Spread) -> String {
    format!("{} times ({} - {})", number(spread.median), number(spread.min), number(spread.max))
}

fn p50_text(spread: &Spread) -> String {
    format!("{:.2} of it ({:.2} - {:.2})", spread.median, spread.min, spread.max)
}

/// Columns of equal width: the first `left` begin at the left, the others end at the right.
fn aligned(lines: &[Vec<String>], left: usize) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines.iter().filter_map(|line| Some(line.get(column)?.chars().count())).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(at, (cell, width))| match at < left {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::example;

    #[test]
    fn every_line_of_a_markdown_table_has_as_many_cells() {
        let text = markdown(&example());
        let tables: Vec<Vec<&str>> = text
            .split("\n\n")
            .map(|part| part.lines().filter(|line| line.starts_with('|')).collect())
            .filter(|lines: &Vec<&str>| !lines.is_empty())
            .collect();
        assert_eq!(tables.len(), 2, "{text}");
        for table in tables {
            let cells = |line: &str| line.matches('|').count();
            assert!(table.iter().all(|line| cells(line) == cells(table[0])), "{}", table.join("\n"));
        }
        assert!(
            text.contains("| unary-64 | 8.00 times (8.00 - 8.00); p50 0.12 of it (0.12 - 0.12) |"),
            "{text}"
        );
        assert!(text.contains("at most 0.38 processors"), "{text}");
    }

    #[test]
    fn peers_alone_are_a_table_too() {
        let mut results = example();
        results.cases.retain(|row| row.system == System::Etcd);
        results.compare();
        assert!(!markdown(&results).contains("Verdict's case"));
        let text = terminal(&results);
        assert!(text.contains("etcd") && !text.contains("Verdict against"), "{text}");
    }
}
