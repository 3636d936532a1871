//! The report as one HTML file.

use std::fmt::Write as _;

use super::{
    report::{CaseReport, Report},
    tally::SERIES_STEP,
};
use crate::page::{
    self,
    bars::{Bar, Bars},
    escape, grouped,
    plot::{Curve, Plot},
};

/// The page.
pub fn page(report: &Report) -> String {
    let title = format!("verdict bench, {}", report.began);
    let mut page = page::begin(&title);
    // Writing to a string can't fail.
    write_head(&mut page, report);
    write_bars(&mut page, report);
    write_table(&mut page, report);
    for case in &report.cases {
        write_over_time(&mut page, case);
    }
    write_clusters(&mut page, report);
    page::end(&mut page, &report.version, "verdict bench --json report.json");
    page
}

fn write_head(page: &mut String, report: &Report) {
    let (machine, settings, floor) = (&report.machine, &report.settings, &report.floor);
    let _ = write!(
        page,
        "<h1>Trades per second, and what a trade costs</h1>\n\
         <p class=\"soft\">{} · {} cores · {} GiB · {} · {}</p>\n\
         <p>A trade: 5 operations on 3 partitions of at least 2 shards{}; every shard and the coordinators have three replicas, and \
         every vote and decision is synced to disk on a majority of them. {} rounds of {} s each; medians.</p>\n",
        escape(&machine.processor),
        machine.cores,
        machine.memory_bytes >> 30,
        escape(&machine.system),
        escape(&report.began),
        if settings.fee { ", and a fee into one account" } else { "" },
        settings.repeat,
        settings.seconds
    );
    if report.is_debug_build {
        *page += "<div class=\"verdict violated\">This was a debug build: its figures mean nothing.</div>\n";
    }
    let fastest = report
        .cases
        .iter()
        .max_by(|one, other| one.trades_per_second.median.total_cmp(&other.trades_per_second.median));
    let mut tiles = vec![
        (format!("{:.2} ms", floor.floor_ms), "floor: two synced rounds, four round trips"),
        (format!("{:.2} ms", floor.one_shard_floor_ms), "floor of one shard: one round, three round trips"),
        (format!("{:.0} us", floor.fdatasync_p50_ms * 1000.0), "fdatasync of 4 KiB, p50"),
        (format!("{:.0} us", floor.round_trip_p50_ms * 1000.0), "round trip, p50"),
    ];
    if let Some(case) = fastest {
        tiles.push((grouped(case.trades_per_second.median as u64), "trades per second at most"));
    }
    page::write_tiles(page, &tiles);
}

fn write_bars(page: &mut String, report: &Report) {
    let rate = |case: &CaseReport| {
        let rate = case.trades_per_second;
        let range = (case.rounds.len() > 1).then_some((rate.min, rate.max));
        let label = grouped(rate.median as u64);
        Bar { name: case.case.clone(), parts: vec![(rate.median, "one")], range, label }
    };
    let cost = |case: &CaseReport| {
        let nodes = case.cpu_us_per_trade.unwrap_or_default();
        let parts = vec![(nodes, "one"), (case.client_cpu_us_per_trade, "two")];
        let label = format!("{nodes:.1} + {:.1}", case.client_cpu_us_per_trade);
        Bar { name: case.case.clone(), parts, range: None, label }
    };
    let latency = |case: &CaseReport| {
        let parts = vec![(case.p50_ms, "one"), ((case.p99_ms - case.p50_ms).max(0.0), "two")];
        let label = format!("{:.2} / {:.2}", case.p50_ms, case.p99_ms);
        Bar { name: case.case.clone(), parts, range: None, label }
    };
    let bars = |title: &str, unit, of: &dyn Fn(&CaseReport) -> Bar| Bars {
        title: title.to_owned(),
        unit,
        bars: report.cases.iter().map(of).collect(),
    };
    write_card(page, &bars("Throughput", "trades/s", &rate), &[]);
    let parts = [("one", "until p50"), ("two", "until p99")];
    write_card(page, &bars("Latency", "ms", &latency), &parts);
    let parts = [("one", "all nodes"), ("two", "load generator")];
    write_card(page, &bars("Processor time for each trade", "us", &cost), &parts);
}

fn write_card(page: &mut String, bars: &Bars, legend: &[(&str, &str)]) {
    let _ = write!(page, "<div class=\"card\"><div class=\"legend\"><span>{}</span>", escape(&bars.title));
    for (class, name) in legend {
        let _ = write!(page, "<span><i class=\"{class}\"></i>{name}</span>");
    }
    let _ = writeln!(page, "</div>{}</div>", bars.svg());
}

fn write_table(page: &mut String, report: &Report) {
    *page += "<h2>All figures</h2>\n<div class=\"card wide\"><table>\n<tr><th>case</th>";
    for head in [
        "trades/s",
        "min",
        "max",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "max ms",
        "CPU us",
        "client us",
        "syncs",
        "bytes",
        "messages",
        "p50 by floor",
        "committed",
        "not",
        "refused tries",
    ] {
        let _ = write!(page, "<th class=\"n\">{head}</th>");
    }
    *page += "</tr>\n";
    for case in &report.cases {
        let (rate, answers) = (case.trades_per_second, &case.answers);
        let known = |figure: Option<f64>, digits: usize| {
            figure.map_or("–".to_owned(), |figure| format!("{figure:.digits$}"))
        };
        let _ = write!(page, "<tr><td title=\"{}\">{}</td>", escape(&case.about), escape(&case.case));
        for figure in [
            grouped(rate.median as u64),
            grouped(rate.min as u64),
            grouped(rate.max as u64),
            format!("{:.2}", case.p50_ms),
            format!("{:.2}", case.p99_ms),
            format!("{:.2}", case.p999_ms),
            format!("{:.1}", case.max_ms),
            known(case.cpu_us_per_trade, 1),
            format!("{:.1}", case.client_cpu_us_per_trade),
            known(case.syncs_per_trade, 3),
            known(case.bytes_written_per_trade, 0),
            known(case.messages_per_trade, 3),
            match case.p50_by_floor {
                by_floor if !by_floor.is_finite() => "–".to_owned(),
                by_floor if case.is_on_one_shard => format!("{by_floor:.1} (one shard)"),
                by_floor => format!("{by_floor:.1}"),
            },
            grouped(answers.committed),
            grouped(answers.not_done()),
            grouped(answers.refused),
        ] {
            let _ = write!(page, "<td class=\"n\">{figure}</td>");
        }
        *page += "</tr>\n";
    }
    *page += "</table></div>\n";
}

/// The rounds of a case over time, and what an overload left behind.
fn write_over_time(page: &mut String, case: &CaseReport) {
    let curve = |name: String, class, counts: &[u32]| {
        // The last step is seldom whole.
        let whole = &counts[..counts.len().saturating_sub(1)];
        let rate = |count: &u32| Some(f64::from(*count) / SERIES_STEP.as_secs_f64());
        Curve { name, class, values: whole.iter().map(rate).collect(), filled: class == "one" }
    };
    let plot = |title: String, curves| Plot {
        title,
        unit: "trades/s",
        step_seconds: SERIES_STEP.as_secs_f64(),
        curves,
        marks: Vec::new(),
        shaded: Vec::new(),
        is_logarithmic: false,
    };
    let first = case.rounds.first().map(|round| &round.trades_per_100_ms[..]).unwrap_or_default();
    let curves = vec![curve("first round".to_owned(), "one", first)];
    page::write_plot(page, &plot(format!("{} over time", case.case), curves));
    if let Some(overload) = case.rounds.first().and_then(|round| round.overload.as_ref()) {
        let curves =
            vec![curve("first round, from its end on".to_owned(), "one", &overload.trades_per_100_ms_after)];
        page::write_plot(page, &plot("After the overload".to_owned(), curves));
    }
}

fn write_clusters(page: &mut String, report: &Report) {
    *page += "<h2>The clusters</h2>\n<div class=\"card\"><table>\n\
              <tr><th class=\"n\">shards</th><th class=\"n\">accounts</th><th>leaders of groups 0, 1, 2...</th>\
              <th class=\"n\">accounts made per second</th><th class=\"n\">balances read</th><th class=\"n\">records read</th>\
              <th class=\"n\">wrong</th></tr>\n";
    for cluster in &report.clusters {
        let leaders: Vec<String> = cluster.leaders.values().map(|node| format!("node {node}")).collect();
        let _ = writeln!(
            page,
            "<tr><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            cluster.shards,
            grouped(cluster.accounts),
            leaders.join(", "),
            grouped(cluster.funded.accounts_per_second as u64),
            grouped(cluster.books.balances),
            grouped(cluster.books.records),
            grouped(cluster.books.wrong_count)
        );
    }
    *page += "</table></div>\n";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        floor::Floor,
        report::{ClusterReport, OverloadReport, tests::round},
    };

    #[test]
    fn the_page_is_whole_and_stands_alone() {
        let mut overloaded = round(50);
        overloaded.overload =
            Some(OverloadReport { trades_per_100_ms_after: vec![1, 2, 3], ..OverloadReport::default() });
        let named =
            |name: &str| CaseReport { case: name.into(), about: "<b>".into(), ..CaseReport::default() };
        let report = Report {
            cases: vec![
                named("unary-1").with_rounds(vec![round(100), round(1_234_567)], &Floor::default()),
                named("overload").with_rounds(vec![overloaded], &Floor::default()),
            ],
            clusters: vec![ClusterReport::default()],
            is_debug_build: true,
            ..Report::default()
        };
        let page = page(&report);
        page::tests::check_that_it_stands_alone(&page);
        assert_eq!(page.matches("<svg").count(), 6);
        assert!(
            page.contains("617,333") && page.contains("mean nothing") && page.contains("After the overload")
        );
        page::tests::check_that_it_stands_alone(&super::page(&Report::default()));
    }
}
