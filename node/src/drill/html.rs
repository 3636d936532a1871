//! The report as one HTML file: nothing is loaded from elsewhere, nothing needs a script.

use std::fmt::Write as _;

use super::{
    report::{EventReport, Promise, Report, Verdict},
    terminal::{numbered, unknown},
};
use crate::page::{
    self, escape, grouped,
    plot::{Curve, Mark, Plot},
};

/// The page.
pub fn page(report: &Report) -> String {
    let title = format!("{}: {}", report.scenario, report.title);
    let mut page = page::begin(&title);
    write_head(&mut page, report);
    write_tiles(&mut page, report);
    write_plots(&mut page, report);
    write_events(&mut page, report);
    write_promises(&mut page, report);
    write_load(&mut page, report);
    let on = if report.cluster.contains("containers") { " --compose" } else { "" };
    let again = format!("verdict drill {}{on} --json report.json", report.scenario);
    page::end(&mut page, &report.version, &again);
    page
}

fn write_head(page: &mut String, report: &Report) {
    let violated: Vec<String> = report
        .promises
        .iter()
        .filter(|promise| promise.verdict == Verdict::Violated)
        .map(|promise| format!("{} {}", promise.id, promise.name))
        .collect();
    let (class, verdict) = match violated.is_empty() {
        true => ("held", "All promises held".to_owned()),
        false => ("violated", format!("Violated: {}", violated.join(", "))),
    };
    let _ = write!(
        page,
        "<h1>{}</h1>\n<p class=\"soft\">Drill <code>{}</code> on {}, {} shards · {}</p>\n<p>{}</p>\n\
         <div class=\"verdict {class}\">{}</div>\n",
        escape(&report.title),
        escape(&report.scenario),
        escape(&report.cluster),
        report.shards,
        escape(&report.began),
        escape(&report.about),
        escape(&verdict)
    );
}

fn write_tiles(page: &mut String, report: &Report) {
    let (load, outcomes) = (&report.load, &report.load.outcomes);
    let done = || numbered(report).map(|(_, event)| event);
    let pause = done().map(|event| event.without_commits_seconds).fold(0.0, f64::max);
    let resolved = done().filter_map(|event| event.resolved_after_majority_seconds).fold(0.0, f64::max);
    let tiles = [
        (grouped(outcomes.committed), "committed"),
        (grouped(outcomes.aborted_sum()), "aborted"),
        (grouped(outcomes.unknown), "UNKNOWN at first"),
        (format!("{:.0}/s", load.per_second), "committed"),
        (format!("{:.0} / {:.0}", load.p50_ms, load.p99_ms), "latency p50 / p99, ms"),
        (format!("{pause:.2} s"), "longest time without a commit"),
        (format!("{resolved:.2} s"), "from a majority until all in doubt was resolved"),
    ];
    page::write_tiles(page, &tiles);
}

fn write_plots(page: &mut String, report: &Report) {
    let series = &report.series;
    let per_second = |counts: &[u32]| {
        counts.iter().map(|count| Some(f64::from(*count) / series.step_seconds)).collect::<Vec<_>>()
    };
    let curve = |name: &str, class, values, filled| Curve { name: name.to_owned(), class, values, filled };
    let plot = |title: &str, unit, curves, is_logarithmic| Plot {
        title: title.to_owned(),
        unit,
        step_seconds: series.step_seconds,
        curves,
        marks: marks(report),
        shaded: shaded(report),
        is_logarithmic,
    };
    let committed = curve("committed", "one", per_second(&series.committed), true);
    let aborted = curve("aborted", "two", per_second(&series.aborted), false);
    let p50 = curve("p50", "one", series.p50_ms.clone(), false);
    let p99 = curve("p99", "two", series.p99_ms.clone(), false);
    let parts = series.parts.iter().map(|parts| parts.map(f64::from)).collect();
    let parts = curve("parts", "one", parts, true);
    *page += "<h2>Over time</h2>\n";
    page::write_plot(page, &plot("Throughput", "batches/s", vec![committed, aborted], false));
    page::write_plot(page, &plot("Latency of what ended then", "ms", vec![p50, p99], true));
    page::write_plot(
        page,
        &plot("Parts in doubt or in line, on the leaders of the shards", "parts", vec![parts], false),
    );
    *page += "<p class=\"soft small\">Marks: <span class=\"no fault\">n</span> something breaks, \
              <span class=\"no repair\">n</span> something is mended; the table below tells what. Shaded: some node \
              can't take part.</p>\n";
}

fn marks(report: &Report) -> Vec<Mark> {
    let mark = |(number, event): (usize, &EventReport)| Mark {
        at: event.at,
        label: number.to_string(),
        title: format!("{:.1} s: {}", event.at, event.what),
        is_fault: event.kind == "fault",
    };
    numbered(report).map(mark).collect()
}

/// The times in which a node could not take part: until the next event, or until it is mended.
fn shaded(report: &Report) -> Vec<(f64, f64)> {
    let end = |event: &EventReport| if event.kind == "repair" { event.done_at } else { event.at };
    let ends = report.events.iter().skip(1).map(end).chain([report.load.seconds]);
    let stretches = report.events.iter().zip(ends).filter(|(event, _)| !event.impaired.is_empty());
    stretches.map(|(event, end)| (event.at, end)).collect()
}

fn write_events(page: &mut String, report: &Report) {
    *page += "<h2>What was done, and what followed</h2>\n<div class=\"card wide\"><table>\n\
              <tr><th></th><th class=\"n\">at</th><th>what</th><th class=\"n\">without commits</th>\
              <th class=\"n\">in doubt resolved</th><th class=\"n\">from a majority on</th>\
              <th>batches that ended until the next</th></tr>\n";
    for (number, event) in numbered(report) {
        let pause = match event.commits_again_at {
            Some(_) if event.without_commits_seconds < 0.1 => "&lt; 0.1 s".to_owned(),
            Some(_) => format!("{:.2} s", event.without_commits_seconds),
            None => format!("&gt; {:.1} s", event.without_commits_seconds),
        };
        let seconds =
            |seconds: Option<f64>| seconds.map_or("–".to_owned(), |seconds| format!("{seconds:.2} s"));
        let lost = match event.without_majority.is_empty() {
            true => String::new(),
            false => {
                let names: Vec<String> = event
                    .without_majority
                    .iter()
                    .map(|group| crate::cluster_state::group_name(*group))
                    .collect();
                format!("<br><span class=\"soft small\">no majority: {}</span>", names.join(", "))
            }
        };
        let mut ended = escape(&event.outcomes.in_words());
        if event.outcomes.unknown > 0 {
            let _ = write!(
                ended,
                "<br><span class=\"soft small\">unknown: {}</span>",
                escape(&unknown(&event.outcomes))
            );
        }
        let _ = writeln!(
            page,
            "<tr><td><span class=\"no {}\">{number}</span></td><td class=\"n\">{:.1} s</td>\
             <td>{}<br><span class=\"soft small\"><code>{}</code></span>{lost}</td><td class=\"n\">{pause}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td>{ended}</td></tr>",
            if event.kind == "fault" { "fault" } else { "repair" },
            event.at,
            escape(&event.what),
            escape(&event.step),
            seconds(event.resolved_seconds),
            seconds(event.resolved_after_majority_seconds),
        );
    }
    *page += "</table></div>\n<p class=\"soft small\">Without commits: the longest stretch without one that begins within 3 s, \
              counted from the mark. In doubt resolved: until nothing was in doubt any more \
              that was so before commits went on; the second figure counts from when each group had a majority.</p>\n";
}

fn write_promises(page: &mut String, report: &Report) {
    *page += "<h2>The promises</h2>\n<div class=\"card\">\n";
    for promise in &report.promises {
        write_promise(page, promise);
    }
    *page += "</div>\n";
}

fn write_promise(page: &mut String, promise: &Promise) {
    let (class, open) = match promise.verdict {
        Verdict::Held => ("held", ""),
        Verdict::Violated => ("violated", " open"),
        Verdict::NotExercised => ("not_exercised", ""),
    };
    let checked: u64 = promise.checks.iter().map(|check| check.checked).sum();
    let _ = write!(
        page,
        "<details{open}><summary><b>{} {}</b><span class=\"says\">{}</span><span class=\"soft small\">{} checks</span>\
         <span class=\"pill {class}\">{}</span></summary>\n<table>\n\
         <tr><th>checked</th><th class=\"n\">cases</th><th class=\"n\">wrong</th></tr>\n",
        escape(&promise.id),
        escape(&promise.name),
        escape(&promise.says),
        grouped(checked),
        promise.verdict.name()
    );
    for check in &promise.checks {
        let wrong = if check.wrong > 0 { "n wrong" } else { "n" };
        let mut what = escape(&check.what);
        for example in &check.examples {
            let _ = write!(what, "<br><code class=\"wrong\">{}</code>", escape(example));
        }
        let (cases, count) = match check.checked {
            0 => ("not exercised".to_owned(), "–".to_owned()),
            checked => (grouped(checked), grouped(check.wrong)),
        };
        let _ = writeln!(
            page,
            "<tr><td>{what}</td><td class=\"n\">{cases}</td><td class=\"{wrong}\">{count}</td></tr>"
        );
    }
    *page += "</table>\n";
    for note in &promise.notes {
        let _ = writeln!(page, "<p class=\"soft small\">{}</p>", escape(note));
    }
    *page += "</details>\n";
}

fn write_load(page: &mut String, report: &Report) {
    let load = &report.load;
    let rate = match load.rate {
        0 => "as fast as the answers came".to_owned(),
        rate => format!("{rate} trades per second"),
    };
    let mut facts = vec![
        (
            "load",
            format!("{rate}, {} clients with a stream each, at most {} in flight", load.clients, load.window),
        ),
        ("for", format!("{:.1} s; tape of seed {}", load.seconds, load.seed)),
        ("batches", format!("{}: {}", grouped(load.batches), load.outcomes.in_words())),
        ("unknown", unknown(&load.outcomes)),
        (
            "refused",
            format!(
                "{} times before anything was proposed; tried again under the same id",
                load.outcomes.refused
            ),
        ),
        (
            "latency",
            format!(
                "p50 {:.1} ms, p99 {:.1} ms, longest {:.0} ms, from when a batch was due to its definite answer",
                load.p50_ms, load.p99_ms, load.max_ms
            ),
        ),
        (
            "reads",
            format!(
                "{} of all balances at one position, {} without an answer in time",
                load.reads, load.reads_unanswered
            ),
        ),
        (
            "afterwards",
            format!("everything was finished {:.1} s after the load and its last answer", load.quiet_seconds),
        ),
    ];
    if let Some(memory) = load.memory_max {
        facts.push(("memory", format!("{} MiB in the largest process", memory >> 20)));
    }
    *page += "<h2>The load</h2>\n<div class=\"card\"><table>\n";
    for (name, value) in facts {
        let _ = writeln!(page, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    *page += "</table></div>\n";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::evaluate::{
        evaluate,
        tests::{example, given},
    };

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let mut given = given();
        given.title = "<script>alert(1)</script>".into();
        let page = page(&evaluate(&example(), given));
        assert_eq!((page.matches("<svg").count(), page.matches("</svg>").count()), (3, 3));
        assert_eq!((page.matches("<details").count(), page.matches("</details>").count()), (10, 10));
        page::tests::check_that_it_stands_alone(&page);
    }
}
