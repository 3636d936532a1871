//! The report for a terminal of 80 columns.

use std::fmt::Write as _;

use super::report::{CaseReport, OverloadReport, Report, Spread};

/// What a figure is that isn't known.
const UNKNOWN: &str = "-";

/// The report.
pub fn show(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let (machine, settings, floor) = (&report.machine, &report.settings, &report.floor);
    let _ = writeln!(
        text,
        "\n{} ({} cores, {} GiB), {}",
        machine.processor,
        machine.cores,
        machine.memory_bytes >> 30,
        machine.system
    );
    let _ = writeln!(
        text,
        "floor {:.2} ms: {:.0} synced rounds of {:.3} ms and {:.0} round trips of {:.3} ms",
        floor.floor_ms,
        floor.synced_rounds,
        floor.fdatasync_p50_ms,
        floor.round_trips,
        floor.round_trip_p50_ms
    );
    let _ = writeln!(
        text,
        "floor of one shard {:.2} ms: {:.0} synced round and {:.0} round trips",
        floor.one_shard_floor_ms, floor.one_shard_synced_rounds, floor.one_shard_round_trips
    );
    let rounds = if settings.repeat == 1 { "round" } else { "rounds" };
    let _ = writeln!(
        text,
        "{} {rounds} of {} s; {} accounts and {} shards unless a case says otherwise\n",
        settings.repeat, settings.seconds, settings.accounts, settings.shards
    );
    show_speed(&mut text, report);
    show_cost(&mut text, report);
    show_more(&mut text, report);
    show_books(&mut text, report);
    if report.is_debug_build {
        text += "\nTHIS IS A DEBUG BUILD: ITS FIGURES MEAN NOTHING.\n";
    }
    text
}

fn show_speed(text: &mut String, report: &Report) {
    let head = ["case", "trades/s", "spread", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "not done"];
    let lines = report.cases.iter().map(|case| {
        let rate = case.trades_per_second;
        [
            case.case.clone(),
            format!("{:.0}", rate.median),
            if case.rounds.len() > 1 { format!("{:.0} %", rate.width() * 100.0) } else { UNKNOWN.to_owned() },
            milliseconds(case.p50_ms),
            milliseconds(case.p99_ms),
            milliseconds(case.p999_ms),
            milliseconds(case.max_ms),
            case.answers.not_done().to_string(),
        ]
    });
    *text += &aligned(head, lines.collect());
}

fn show_cost(text: &mut String, report: &Report) {
    let head = ["for each trade", "CPU us", "client us", "syncs", "written", "messages", "MiB", "p50/floor"];
    let known = |figure: Option<f64>, digits: usize| {
        figure.map_or(UNKNOWN.to_owned(), |figure| format!("{figure:.digits$}"))
    };
    let lines = report.cases.iter().map(|case| {
        let memory = case.resident_bytes.values().max().map(|bytes| (bytes >> 20).to_string());
        [
            case.case.clone(),
            known(case.cpu_us_per_trade, 1),
            format!("{:.1}", case.client_cpu_us_per_trade),
            known(case.syncs_per_trade, 3),
            known(case.bytes_written_per_trade, 0),
            known(case.messages_per_trade, 3),
            memory.unwrap_or(UNKNOWN.to_owned()),
            format!("{:.1}", case.p50_by_floor),
        ]
    });
    text.push('\n');
    *text += &aligned(head, lines.collect());
    *text += "CPU: all nodes together; client: the load generator. MiB: the largest node.\n";
    let on_one_shard = report.cases.iter().filter(|case| case.is_on_one_shard);
    let on_one_shard: Vec<&str> = on_one_shard.map(|case| &*case.case).collect();
    if !on_one_shard.is_empty() {
        let _ = writeln!(text, "p50/floor of one shard: {}.", on_one_shard.join(", "));
    }
}

fn show_more(text: &mut String, report: &Report) {
    for case in &report.cases {
        show_overload(text, case);
        if let Some(follower) = &case.follower {
            let nodes: Vec<String> = follower.nodes.iter().map(u64::to_string).collect();
            let _ = writeln!(
                text,
                "\n{}: {} % of what all nodes reached a moment before,\n  {} trades/s (without node {})",
                case.case,
                ranged(follower.throughput_by_whole, percent),
                ranged(follower.whole_per_second, whole),
                nodes.join(", ")
            );
        }
        show_answers(text, case);
    }
}

fn show_overload(text: &mut String, case: &CaseReport) {
    let Some(overload) = &case.overload else { return };
    let tenths = |figure: f64| format!("{figure:.1}");
    let back =
        overload.recovery_seconds.map_or("12 s or more".to_owned(), |back| ranged(back, tenths) + " s");
    let refused = |of: fn(&OverloadReport) -> u64| -> u64 {
        let overloads = case.rounds.iter().filter_map(|round| round.overload.as_ref());
        overloads.map(of).sum()
    };
    let _ = writeln!(
        text,
        "\n{}: peak {} trades/s,\n  offered {}, goodput {}, {} % of the peak,\n  \
         p99 {} ms against {} ms at half load, {} times,\n  full speed again after {back},\n  \
         refused: {} at the peak, {} at half load, {} meanwhile, {} afterwards",
        case.case,
        ranged(overload.peak_per_second, whole),
        ranged(overload.offered_per_second, whole),
        ranged(overload.goodput_per_second, whole),
        ranged(overload.goodput_by_peak, percent),
        ranged(overload.p99_ms, milliseconds),
        ranged(overload.half_load_p99_ms, milliseconds),
        ranged(overload.p99_by_half_load, tenths),
        refused(|overload| overload.answers_at_peak.refused),
        refused(|overload| overload.answers_at_half_load.refused),
        refused(|overload| overload.answers_meanwhile.refused),
        refused(|overload| overload.answers_afterwards.refused)
    );
}

/// The median of the rounds, and from where to where they went.
fn ranged(spread: Spread, show: impl Fn(f64) -> String) -> String {
    let (median, min, max) = (show(spread.median), show(spread.min), show(spread.max));
    if min == max { median } else { format!("{median} ({min} - {max})") }
}

fn whole(figure: f64) -> String {
    format!("{figure:.0}")
}

fn percent(share: f64) -> String {
    whole(share * 100.0)
}

/// What was answered other than COMMITTED, in the end or at first.
fn show_answers(text: &mut String, case: &CaseReport) {
    let answers = &case.answers;
    let mut told: Vec<String> =
        answers.others.iter().map(|(what, count)| format!("{count} {what}")).collect();
    for (count, what) in [
        (answers.refused, "refused (RESOURCE_EXHAUSTED)"),
        (answers.turned_away, "turned away: no room on the stream"),
        (answers.lost, "never answered"),
    ] {
        if count > 0 {
            told.push(format!("{count} {what}"));
        }
    }
    if !told.is_empty() {
        let _ = writeln!(text, "\n{}: {} committed, {}", case.case, answers.committed, told.join(", "));
    }
}

fn show_books(text: &mut String, report: &Report) {
    for cluster in &report.clusters {
        let books = &cluster.books;
        let all = if books.is_all { "all" } else { "the followed" };
        let _ = writeln!(
            text,
            "\n{} accounts on {} shards: {all} {} balances and {} records read, {} wrong",
            cluster.accounts, cluster.shards, books.balances, books.records, books.wrong_count
        );
        for wrong in &books.wrong {
            let _ = writeln!(text, "  WRONG: {wrong}");
        }
    }
}

fn milliseconds(figure: f64) -> String {
    let digits = match figure {
        _ if figure < 10.0 => 2,
        _ if figure < 100.0 => 1,
        _ => 0,
    };
    format!("{figure:.digits$}")
}

/// A table: the first column to the left, all others to the right.
fn aligned<const N: usize>(head: [&str; N], lines: Vec<[String; N]>) -> String {
    let mut all = vec![head.map(str::to_owned)];
    all.extend(lines);
    let width = |column: usize| all.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for line in &all {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{floor::Floor, report::tests::round};

    #[test]
    fn it_fits_a_terminal_and_tells_what_was_not_committed() {
        let mut rounds = vec![round(123_456), round(100_000)];
        rounds[0].answers.others.insert("ABORTED CONTENTION".into(), 3);
        for (round, peak_per_second) in rounds.iter_mut().zip([1000.0, 2000.0]) {
            round.overload = Some(OverloadReport { peak_per_second, ..OverloadReport::default() });
        }
        let case = CaseReport { case: "follower-paused".into(), ..CaseReport::default() };
        let case = case.with_rounds(rounds, &Floor { floor_ms: 1.0, ..Floor::default() });
        let report = Report { cases: vec![case], is_debug_build: true, ..Report::default() };
        let text = show(&report);
        for line in text.lines().take_while(|line| !line.contains("peak")) {
            assert!(line.chars().count() <= 80, "{line:?} doesn't fit");
        }
        let peak = "peak 1500 (1000 - 2000) trades/s";
        for expected in ["111728", "21 %", "3 ABORTED CONTENTION", "12 s or more", "MEAN NOTHING", peak] {
            assert!(text.contains(expected), "{expected} isn't in {text}");
        }
    }
}
