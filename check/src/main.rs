//! `verdict-check`: explores cases, and fails if a rule breaks.

use std::{
    io::{IsTerminal, stderr},
    process::ExitCode,
    time::Duration,
};

use verdict_check::{
    case::{Case, Size},
    cases,
    explore::{Report, Settings, explore},
    parts::quiet_panics,
};

const HELP: &str = "\
Visits every state that small clusters of the shipped state machines can reach, and checks every promise in each.

verdict-check [--full | --huge | CASE...] [--threads N] [--states N] [--list]

  --full       the large cases, minutes; without it the small ones
  --huge       those whose end nobody has seen yet: give them --states
  CASE...      these cases
  --threads N  threads; as many as there are processors if not given
  --states N   give up on a case beyond so many states, and fail
  --list       tells the cases
";

struct Arguments {
    cases: Vec<Case>,
    settings: Settings,
    list: bool,
}

fn arguments() -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut settings = Settings { threads, states_max: usize::MAX, progress: stderr().is_terminal() };
    let (mut names, mut size, mut list) = (Vec::new(), Size::Small, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().and_then(|value| value.parse::<usize>().ok());
            value.filter(|value| *value > 0).ok_or(format!("{word} takes a number above 0"))
        };
        match word.as_str() {
            "--threads" => settings.threads = number()?,
            "--states" => settings.states_max = number()?,
            "--full" => size = Size::Full,
            "--huge" => size = Size::Huge,
            "--list" => list = true,
            "--help" | "-h" => return Err(HELP.to_owned()),
            other if other.starts_with('-') => return Err(format!("{other} is not known\n\n{HELP}")),
            _ => names.push(word),
        }
    }
    let mut cases = cases::all();
    if let Some(unknown) = names.iter().find(|name| cases.iter().all(|case| case.name != **name)) {
        return Err(format!("there is no case {unknown}; --list tells which there are"));
    }
    cases.retain(|case| match names.is_empty() {
        true => list || case.size == size,
        false => names.iter().any(|name| name == case.name),
    });
    Ok(Arguments { cases, settings, list })
}

fn main() -> ExitCode {
    let Arguments { cases, settings, list } = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    if list {
        for case in cases {
            println!("{:16}{:6}{}", case.name, format!("{:?}", case.size).to_lowercase(), case.about);
        }
        return ExitCode::SUCCESS;
    }
    quiet_panics();
    println!(
        "{:18}{:>12}{:>14}{:>7}{:>10}{:>9}{:>9}",
        "case", "states", "transitions", "depth", "healed", "seconds", "MiB"
    );
    let mut reports = Vec::new();
    for case in &cases {
        forget_peak();
        let report = explore(case, &settings);
        row(&report);
        reports.push(report);
    }
    sum_up(&reports)
}

fn row(report: &Report) {
    let Report { name, states, transitions, depth, healed, took, .. } = report;
    let memory = peak_mib().map_or("?".to_owned(), |mib| mib.to_string());
    println!(
        "{name:18}{states:>12}{transitions:>14}{depth:>7}{healed:>10}{:>9.1}{memory:>9}",
        took.as_secs_f64()
    );
    if let Some(violation) = &report.violation {
        println!("\n{violation}\n");
    } else if !report.complete {
        println!("  given up: there are more states than --states allows");
    }
}

fn sum_up(reports: &[Report]) -> ExitCode {
    let states: usize = reports.iter().map(|report| report.states).sum();
    let transitions: u64 = reports.iter().map(|report| report.transitions).sum();
    let healed: usize = reports.iter().map(|report| report.healed).sum();
    let took: Duration = reports.iter().map(|report| report.took).sum();
    println!("{:18}{states:>12}{transitions:>14}{:>7}{healed:>10}{:>9.1}", "all", "", took.as_secs_f64());
    let wrong = reports.iter().filter(|report| report.violation.is_some()).count();
    let incomplete = reports.iter().filter(|report| !report.complete && report.violation.is_none()).count();
    if wrong == 0 && incomplete == 0 {
        println!("{states} distinct states in {} cases, no violation", reports.len());
        return ExitCode::SUCCESS;
    }
    println!("{wrong} cases broke a rule, {incomplete} were given up");
    ExitCode::FAILURE
}

/// The most memory that was used since [`forget_peak`], in MiB, as Linux tells it.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().split(' ').next()?.parse().ok()?;
    Some(kib / 1024)
}

/// Begins a new peak. Where it can't, the next case shows the greatest so far.
fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap_or_default();
}
