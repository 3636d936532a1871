//! The report for a terminal of 80 columns.

use std::fmt::Write as _;

use super::report::{EventReport, Outcomes, Report, Verdict};

/// The widest line.
const WIDTH: usize = 80;
/// The width of the curve.
const CURVE: usize = 54;
/// Where the text about an event begins.
const EVENT_INDENT: usize = 39;
/// Heights that one letter can show.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The head of the table of `drill all`.
pub const LINE_HEADER: &str =
    "scenario                 verdict       no commits  resolved     p99 ms  unknown";

/// The report.
pub fn show(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = writeln!(text, "\n{}: {}", report.scenario, report.title);
    let _ = writeln!(text, "{}, {} shards, {}\n", report.cluster, report.shards, report.began);
    show_load(&mut text, report);
    show_curve(&mut text, report);
    show_events(&mut text, report);
    show_promises(&mut text, report);
    let verdict = if report.held { "All promises held." } else { "A PROMISE WAS VIOLATED." };
    let _ = writeln!(text, "\n{verdict}");
    text
}

/// One line for `drill all`.
pub fn line(report: &Report) -> String {
    let faults = || report.events.iter().filter(|event| event.kind == "fault");
    let pause = faults().map(|event| event.without_commits_seconds).fold(0.0, f64::max);
    let resolved = faults().filter_map(|event| event.resolved_seconds).fold(0.0, f64::max);
    let verdict = if report.held { "held" } else { "VIOLATED" };
    format!(
        "{:<24} {verdict:<13} {:>8.2} s {:>7.2} s {:>10.1} {:>8}",
        report.scenario, pause, resolved, report.load.p99_ms, report.load.outcomes.unknown
    )
}

fn show_load(text: &mut String, report: &Report) {
    let load = &report.load;
    let asked = match load.rate {
        0 => format!("as fast as the answers came, {} in flight", load.window),
        rate => format!("{rate} trades/s"),
    };
    let mut fact = |name: &str, value: String| {
        for (place, line) in wrap(&value, WIDTH - 12).into_iter().enumerate() {
            let name = if place == 0 { name } else { "" };
            let _ = writeln!(*text, "{name:<11} {line}");
        }
    };
    fact("load", format!("{asked}, {} clients, for {:.1} s", load.clients, load.seconds));
    fact("batches", format!("{}: {}", load.batches, load.outcomes.in_words()));
    fact("unknown", unknown(&load.outcomes));
    fact("throughput", format!("{:.0} committed/s", load.per_second));
    fact(
        "latency",
        format!("p50 {:.1} ms, p99 {:.1} ms, max {:.0} ms", load.p50_ms, load.p99_ms, load.max_ms),
    );
    let reads =
        format!("{} of all balances at one position, {} unanswered", load.reads, load.reads_unanswered);
    fact("reads", reads);
}

/// In words, what became of UNKNOWN answers.
pub fn unknown(outcomes: &Outcomes) -> String {
    let mut text = match outcomes.unknown {
        0 => "no answer was UNKNOWN".to_owned(),
        count => format!(
            "{count} answers, asked for by id: {} committed, {} aborted ({} never seen, submitted again)",
            outcomes.unknown_committed, outcomes.unknown_aborted, outcomes.unknown_never_seen
        ),
    };
    if outcomes.answers_lost > 0 {
        text += &format!("; {} lost answers were asked again by the client", outcomes.answers_lost);
    }
    if outcomes.unresolved > 0 {
        text += &format!("; {} NEVER RESOLVED", outcomes.unresolved);
    }
    text
}

fn show_curve(text: &mut String, report: &Report) {
    let series = &report.series;
    if series.committed.is_empty() {
        return;
    }
    // Several steps in one letter: their mean.
    let cells: Vec<f64> = (0..CURVE)
        .map(|cell| {
            let count = series.committed.len();
            let (from, to) =
                (cell * count / CURVE, ((cell + 1) * count / CURVE).max(cell * count / CURVE + 1));
            let steps = &series.committed[from.min(count - 1)..to.min(count)];
            f64::from(steps.iter().sum::<u32>()) / steps.len() as f64 / series.step_seconds
        })
        .collect();
    let most = cells.iter().copied().fold(1.0, f64::max);
    let bars: String = cells
        .iter()
        .map(|value| {
            let height = (value / most * 8.0).ceil() as usize;
            BARS[height.min(8)]
        })
        .collect();
    let mut marks = vec![' '; CURVE];
    let span = series.committed.len() as f64 * series.step_seconds;
    for (number, event) in numbered(report) {
        let cell = ((event.at / span * CURVE as f64) as usize).min(CURVE - 1);
        // Where two meet, the next free cell.
        let free = (cell..CURVE).find(|cell| marks[*cell] == ' ').unwrap_or(cell);
        marks[free] = label(number);
    }
    let marks: String = marks.into_iter().collect();
    let _ = writeln!(text, "\ncommits/s   {bars}  (top: {most:.0})");
    let _ = writeln!(text, "            {}", marks.trim_end());
}

/// The events that do something, with their numbers.
pub fn numbered(report: &Report) -> impl Iterator<Item = (usize, &EventReport)> {
    (1..).zip(report.events.iter().filter(|event| event.kind != "wait"))
}

/// One letter for a number: 1 to 9, then a, b and so on.
fn label(number: usize) -> char {
    char::from_digit(number as u32 % 36, 36).unwrap_or('*')
}

fn show_events(text: &mut String, report: &Report) {
    if report.events.iter().all(|event| event.kind == "wait") {
        return;
    }
    let _ = writeln!(text, "\n      at       no commits   resolved    what");
    for (number, event) in numbered(report) {
        let pause = match event.commits_again_at {
            Some(_) if event.without_commits_seconds < 0.1 => "< 0.1 s".to_owned(),
            Some(_) => format!("{:.2} s", event.without_commits_seconds),
            None => format!("> {:.1} s", event.without_commits_seconds),
        };
        let resolved = event.resolved_seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.2} s"));
        let what = wrap(&event.what, WIDTH - EVENT_INDENT);
        let first = what.first().map_or("", String::as_str);
        let _ =
            writeln!(text, "  {}  {:>5.1} s   {pause:>9}  {resolved:>9}    {first}", label(number), event.at);
        for line in what.iter().skip(1) {
            let _ = writeln!(text, "{:EVENT_INDENT$}{line}", "");
        }
        for line in wrap(&event.outcomes.in_words(), WIDTH - EVENT_INDENT) {
            let _ = writeln!(text, "{:EVENT_INDENT$}{line}", "");
        }
    }
    let _ = writeln!(text, "  no commits: the longest time without one that comes from it. resolved: until");
    let _ = writeln!(text, "  nothing was older in doubt than the next commit. Counts: until the next line.");
}

fn show_promises(text: &mut String, report: &Report) {
    let _ = writeln!(text);
    for promise in &report.promises {
        let checked: u64 = promise.checks.iter().map(|check| check.checked).sum();
        let wrong: u64 = promise.checks.iter().map(|check| check.wrong).sum();
        let evidence = match promise.verdict {
            Verdict::Held => format!("{checked} checks"),
            Verdict::Violated => format!("{wrong} of {checked} checks wrong"),
            Verdict::NotExercised => String::new(),
        };
        let line =
            format!("{:<3} {:<14} {:<14} {evidence}", promise.id, promise.name, promise.verdict.name());
        let _ = writeln!(text, "{}", line.trim_end());
        for check in promise.checks.iter().filter(|check| check.wrong > 0) {
            for line in
                wrap(&format!("{} of {} wrong: {}", check.wrong, check.checked, check.what), WIDTH - 6)
            {
                let _ = writeln!(text, "      {line}");
            }
            for line in check.examples.iter().flat_map(|example| wrap(example, WIDTH - 8)) {
                let _ = writeln!(text, "        {line}");
            }
        }
        for line in promise.notes.iter().flat_map(|note| wrap(note, WIDTH - 6)) {
            let _ = writeln!(text, "      {line}");
        }
    }
}

/// Lines of at most so many letters, broken between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::evaluate::tests::{example, given};

    #[test]
    fn the_report_fits_80_columns_and_tells_what_happened() {
        let report = crate::drill::evaluate::evaluate(&example(), given());
        let text = show(&report);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line:?} is too long");
        }
        for told in ["kill -9: node 1", "All promises held.", "G10", "G1  Atomic"] {
            assert!(text.contains(told), "{told:?} is missing in:\n{text}");
        }
        assert!(line(&report).chars().count() <= WIDTH);
    }
}
