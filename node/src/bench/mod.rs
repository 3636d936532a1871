//! `verdict bench`: measures trades per second, latencies, and what a trade costs.
//!
//! - `case`: the cases by their names. `trade` makes the trades, `zipf` the skew.
//! - `target`: the cluster, three processes or one that runs; `fund` makes its accounts; `room` looks at the disk.
//! - `load` sends trades and takes answers (`wire`), on a thread of its own; `tally` counts what became of them.
//! - `measure` runs one round of a case. `floor` measures what the machine itself needs.
//! - `books` compares balances and records with what was answered: a cluster that is fast and wrong is found out.
//! - `report` puts the rounds together, which `table` and `html` show; `screen` shows progress.

pub mod books;
pub mod case;
pub mod floor;
pub mod fund;
pub mod html;
pub mod load;
pub mod measure;
pub mod report;
pub mod room;
pub mod screen;
pub mod table;
pub mod tally;
pub mod target;
pub mod trade;
pub mod wire;
pub mod zipf;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use clap::Args;
use verdict_protocol::batch::Placement;

use crate::{
    drill::utc,
    folder::{Folder, interrupted},
};
use books::Books;
use case::{ACCOUNTS, Case, CaseError, Kind, LIST, SHARDS, USUAL};
use floor::Floor;
use measure::{Bench, Pacing};
use report::{CaseReport, ClusterReport, FORMAT, Machine, Report, Round, Settings};
use screen::Screen;
use tally::Ledger;
use target::Target;
use trade::Population;

/// The exit code if the books are wrong.
const WRONG: u8 = 1;
/// The exit code if nothing was measured.
const COULD_NOT_RUN: u8 = 2;
/// The exit code after an interruption, as shells have it.
const INTERRUPTED: u8 = 130;
/// What `--quick` has instead of the defaults.
const QUICK_SECONDS: f64 = 1.0;
const QUICK_ACCOUNTS: u64 = 2000;

/// `verdict bench`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  verdict bench                                   the usual cases, three rounds of each
  verdict bench --list                            the cases
  verdict bench --case unary-64,stream-1 --repeat 1 --seconds 5
  verdict bench --case accounts-10k,accounts-10m --json growth.json
  verdict bench --case open-20k --connect 10.0.0.1:7400,10.0.0.2:7400,10.0.0.3:7400

Exit status: 0 it was measured, 1 the cluster's books are wrong, 2 it could not run, 130 it was interrupted.
docs/operations.md explains the cases and the figures.")]
pub struct BenchArgs {
    /// Tell the cases
    #[arg(long)]
    pub list: bool,
    /// Cases, by their names
    #[arg(long = "case", value_name = "NAME,...", value_delimiter = ',', default_value = USUAL)]
    pub cases: Vec<String>,
    /// Seconds that are measured, for each case and round; without it 5
    #[arg(long, value_name = "N", value_parser = positive)]
    pub seconds: Option<f64>,
    /// Seconds before that; without it a fifth of them
    #[arg(long, value_name = "N", value_parser = not_negative)]
    pub warm_up: Option<f64>,
    /// Rounds, in each of which every case has its turn: medians are told; without it 3
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeat: Option<u32>,
    /// Shards of the cluster; without it 2
    #[arg(long, value_name = "N", value_parser = shards)]
    pub shards: Option<u32>,
    /// Accounts, two to a user, for example 10k or 1m; without it 100k
    #[arg(long, value_name = "N", value_parser = accounts)]
    pub accounts: Option<u64>,
    /// Trades in flight, on all streams of a case together, where the case doesn't say otherwise
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub window: u32,
    /// Each trade pays a fee into the one account of the exchange
    #[arg(long)]
    pub fee: bool,
    /// How long the case `overload` lasts
    #[arg(long, value_name = "N", value_parser = positive, default_value = "60")]
    pub overload_seconds: f64,
    /// One short round with few accounts, to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Measure a cluster that runs, instead of three processes; its accounts `bench-user:N` get funds
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub connect: Vec<String>,
    /// With --connect: the nodes' processes on this machine, in the order of the nodes' ids, to tell what they use
    #[arg(long, value_name = "PID,...", value_delimiter = ',', requires = "connect")]
    pub pids: Vec<u32>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report as one HTML file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Keep the nodes' data and logs
    #[arg(long)]
    pub keep: bool,
    /// An empty folder for the nodes' data and logs, which are kept there; without it, a temporary one
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

fn positive(text: &str) -> Result<f64, String> {
    not_negative(text)
        .and_then(|number| if number > 0.0 { Ok(number) } else { Err("it must be more than 0".to_owned()) })
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.0..=86_400.0).contains(&number) { Ok(number) } else { Err("it must be 0 to 86400".to_owned()) }
}

fn accounts(text: &str) -> Result<u64, String> {
    let found = case::count(text).filter(|count| ACCOUNTS.contains(count));
    found.ok_or_else(|| {
        format!("it must be {} to {}, for example 10k or 1m", ACCOUNTS.start(), ACCOUNTS.end())
    })
}

fn shards(text: &str) -> Result<u32, String> {
    let found = text.parse().ok().filter(|count| SHARDS.contains(count));
    let found = found.ok_or_else(|| format!("it must be {} to {}", SHARDS.start(), SHARDS.end()))?;
    Ok(found as u32)
}

impl BenchArgs {
    fn settings(&self) -> Settings {
        let seconds = self.seconds.unwrap_or(if self.quick { QUICK_SECONDS } else { 5.0 });
        Settings {
            connect: self.connect.clone(),
            accounts: self.accounts.unwrap_or(if self.quick { QUICK_ACCOUNTS } else { 100_000 }),
            shards: self.shards.unwrap_or(2),
            window: self.window as usize,
            fee: self.fee,
            warm_up_seconds: self.warm_up.unwrap_or(seconds / 5.0),
            seconds,
            repeat: self.repeat.unwrap_or(if self.quick { 1 } else { 3 }),
        }
    }

    fn pacing(&self, settings: &Settings) -> Pacing {
        Pacing {
            warm_up: Duration::from_secs_f64(settings.warm_up_seconds),
            span: Duration::from_secs_f64(settings.seconds),
            overload: Duration::from_secs_f64(self.overload_seconds),
            window: settings.window,
            has_fee: settings.fee,
        }
    }

    fn cases(&self) -> anyhow::Result<Vec<Case>> {
        let names = self.cases.iter().map(|name| name.trim()).filter(|name| !name.is_empty());
        let cases: Vec<Case> = names.map(Case::parse).collect::<Result<_, CaseError>>()?;
        ensure!(!cases.is_empty(), "--case names none: `verdict bench --list` tells them");
        if !self.connect.is_empty() {
            for case in &cases {
                let needs_own = case.shards.is_some() || matches!(case.kind, Kind::Follower { .. });
                ensure!(!needs_own, "case {case} needs a cluster of its own: run it without --connect");
            }
            ensure!(
                self.shards.is_none(),
                "--shards is for a cluster of its own: leave it out with --connect"
            );
        }
        Ok(cases)
    }
}

/// Runs `verdict bench`. Errors are printed here, since they have their own exit code.
pub async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    if args.list {
        list();
        return Ok(ExitCode::SUCCESS);
    }
    run_and_tell(&args).await.or_else(|error| {
        crate::err!("verdict bench: {error:#}");
        Ok(ExitCode::from(COULD_NOT_RUN))
    })
}

fn list() {
    for (name, about) in LIST {
        crate::out!("{name:<16} {about}");
    }
    crate::out!("\nif none is named: {USUAL}");
}

async fn run_and_tell(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let cases = args.cases()?;
    if cfg!(debug_assertions) {
        crate::err!("THIS IS A DEBUG BUILD: its figures mean nothing. Measure with `make bench`.");
    }
    let folder = Folder::make(args.data.as_deref(), args.keep, "verdict-bench-")?;
    let accounts = cases.iter().map(|case| case.accounts.unwrap_or(args.settings().accounts));
    if let Some(warning) = room::check(folder.path(), accounts.max().unwrap_or_default())? {
        crate::err!("{warning}");
    }
    let screen = Screen::new();
    // Whatever ends first: dropping a run ends the processes that it has started.
    let done = tokio::select! {
        done = bench(args, &cases, folder.path(), &screen) => Ok(done),
        reader = interrupted() => Err(reader),
    };
    screen.finish();
    let report = match done {
        Err(reader) => {
            if reader {
                crate::err!("interrupted: all nodes were ended");
            }
            return Ok(ExitCode::from(INTERRUPTED));
        }
        Ok(Err(error)) => {
            folder.keep();
            return Err(error);
        }
        Ok(Ok(report)) => report,
    };
    let is_wrong = report.clusters.iter().any(|cluster| cluster.books.wrong_count > 0);
    if is_wrong {
        folder.keep();
    } else {
        folder.tell_if_kept();
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report).context("write the report as JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        fs::write(path, html::page(&report)).with_context(|| format!("write {}", path.display()))?;
    }
    crate::out!("{}", table::show(&report).trim_end());
    for path in [&args.json, &args.html].into_iter().flatten() {
        crate::out!("written: {}", path.display());
    }
    Ok(if is_wrong { ExitCode::from(WRONG) } else { ExitCode::SUCCESS })
}

/// Cases that share a cluster: its shards and accounts, and the places of the cases.
type Group = ((u32, u64), Vec<usize>);

fn groups(cases: &[Case], settings: &Settings) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (place, case) in cases.iter().enumerate() {
        let of_case = (case.shards.unwrap_or(settings.shards), case.accounts.unwrap_or(settings.accounts));
        match groups.iter_mut().find(|(cluster, _)| *cluster == of_case) {
            Some((_, places)) => places.push(place),
            None => groups.push((of_case, vec![place])),
        }
    }
    groups
}

async fn bench(args: &BenchArgs, cases: &[Case], folder: &Path, screen: &Screen) -> anyhow::Result<Report> {
    let settings = args.settings();
    let mut report = Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        began: utc(SystemTime::now()),
        is_debug_build: cfg!(debug_assertions),
        machine: machine(),
        settings: settings.clone(),
        ..Report::default()
    };
    let mut done: BTreeMap<usize, CaseReport> = BTreeMap::new();
    for (number, ((shards, accounts), places)) in groups(cases, &settings).into_iter().enumerate() {
        if args.connect.is_empty() {
            check_population(accounts, shards)?;
        }
        let folder = folder.join(format!("cluster-{}", number + 1));
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let target = match args.connect.is_empty() {
            true => Target::start(&folder, shards).await?,
            false => Target::connect(&args.connect, &args.pids).await?,
        };
        if number == 0 {
            screen.say("measuring what the machine itself needs");
            report.floor = Floor::measure(&folder, &target.leader_address().await?).await?;
        }
        let population = check_population(accounts, target.shards())?;
        let placement = population.placement;
        let mut cluster = ClusterReport { shards: placement.shards, accounts, ..ClusterReport::default() };
        cluster.leaders = target.leaders().await?;
        cluster.funded = fund::fund(target.client(), population).await.context("make the accounts")?;
        screen.say(&format!(
            "{} accounts on {} shards in {:.1} s ({:.0}/s); waiting until the nodes are done with them",
            cluster.funded.accounts,
            cluster.shards,
            cluster.funded.seconds,
            cluster.funded.accounts_per_second
        ));
        cluster.quiet_after_seconds = target.quiet().await?.map(|took| took.as_secs_f64());
        if cluster.quiet_after_seconds.is_none() {
            screen.say("whether they are done isn't known: what they still merge is measured too");
        }
        let memory = target.usages()?.into_iter().map(|(node, usage)| (node, usage.resident_bytes));
        cluster.resident_bytes_when_funded = memory.collect();

        let books = Books::open(target.client(), population.users).await?;
        let ledger = Arc::new(Ledger::new(Books::followed(population.users)));
        let pace = args.pacing(&settings);
        let mut bench = Bench { target, population, ledger, screen, pace, sample: Vec::new() };
        let rounds = rounds(&mut bench, cases, &places, settings.repeat).await;
        let rounds = match rounds {
            Ok(rounds) => rounds,
            Err(error) => {
                crate::err!("{}", bench.target.log_tails().trim_end());
                return Err(error);
            }
        };
        cluster.books = books
            .compare(bench.target.client(), &bench.ledger, &bench.sample)
            .await
            .context("check the books")?;
        bench.target.end().await;
        if args.connect.is_empty() && !args.keep && args.data.is_none() {
            // The next one may need the room.
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        for (place, rounds) in rounds {
            let case = CaseReport {
                case: cases[place].name.clone(),
                about: about(&cases[place]),
                shards: cluster.shards,
                accounts,
                is_on_one_shard: cases[place].is_on_one_shard(settings.fee),
                ..CaseReport::default()
            };
            done.insert(place, case.with_rounds(rounds, &report.floor));
        }
        report.clusters.push(cluster);
    }
    report.cases = done.into_values().collect();
    Ok(report)
}

/// The users of so many accounts, if every shard has some of them.
fn check_population(accounts: u64, shards: u32) -> anyhow::Result<Population> {
    let population = Population { users: accounts / 2, placement: Placement { shards } };
    let is_fine = SHARDS.contains(&u64::from(shards)) && population.is_rich_enough();
    ensure!(
        is_fine,
        "{accounts} accounts are too few for {shards} shards: a trade needs users on two shards"
    );
    Ok(population)
}

/// All rounds of the cases of one cluster. Each case has its turn in each round, so that what changes with time hits all of them.
async fn rounds(
    bench: &mut Bench<'_>,
    cases: &[Case],
    places: &[usize],
    repeat: u32,
) -> anyhow::Result<BTreeMap<usize, Vec<Round>>> {
    let mut rounds: BTreeMap<usize, Vec<Round>> = BTreeMap::new();
    bench.screen.about("warm-up");
    bench.warm_up().await.context("warm up")?;
    for number in 1..=repeat {
        for place in places {
            let case = &cases[*place];
            let what = format!("{case} {number}/{repeat}");
            bench.screen.about(&what);
            let round = bench.round(case).await.with_context(|| format!("case {case}"))?;
            bench.screen.round(&what, &round);
            rounds.entry(*place).or_default().push(round);
        }
    }
    Ok(rounds)
}

/// What the list says of a case.
fn about(case: &Case) -> String {
    let family =
        |name: &str| name.split_once("-N").or(name.split_once("-RATE")).map(|(family, _)| family.to_owned());
    let found = LIST.iter().find(|(name, _)| *name == case.name).or_else(|| {
        let number = case.name.rsplit_once('-').map(|(family, _)| family.to_owned());
        LIST.iter().find(|(name, _)| family(name).is_some() && family(name) == number)
    });
    found.map(|(_, about)| (*about).to_owned()).unwrap_or_default()
}

fn machine() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let after_colon = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?.split_once(':')?.1;
        Some(line.trim().to_owned())
    };
    let kilobytes = after_colon(&read("/proc/meminfo"), "MemTotal");
    let kilobytes = kilobytes.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    Machine {
        processor: after_colon(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown processor".into()),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory_bytes: kilobytes.unwrap_or_default() * 1024,
        system: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_share_a_cluster_if_they_can() {
        let names = ["unary-1", "shards-16", "stream-1", "accounts-10k", "shards-2"];
        let cases: Vec<Case> = names.map(|name| Case::parse(name).unwrap()).into();
        let settings = Settings { shards: 2, accounts: 100_000, ..Settings::default() };
        let expected = vec![((2, 100_000), vec![0, 2, 4]), ((16, 100_000), vec![1]), ((2, 10_000), vec![3])];
        assert_eq!(groups(&cases, &settings), expected);
    }

    #[test]
    fn every_case_is_told_about() {
        for name in ["unary-64", "open-20k", "accounts-10m", "shards-16", "hot-256", "legs-8", "window-16"] {
            let about = about(&Case::parse(name).unwrap());
            assert!(!about.is_empty(), "{name}");
        }
        for (name, expected) in [("hot-stream", "one user"), ("follower-dead", "killed")] {
            assert!(about(&Case::parse(name).unwrap()).contains(expected), "{name}");
        }
    }

    #[test]
    fn numbers_of_the_command_line_are_checked() {
        assert_eq!((accounts("10k"), shards("16"), positive("0.5")), (Ok(10_000), Ok(16), Ok(0.5)));
        assert_eq!(not_negative("0"), Ok(0.0));
        for wrong in ["0", "-1", "x", "1e99", "NaN"] {
            assert!(positive(wrong).is_err(), "{wrong}");
        }
        assert!(accounts("100g").is_err() && accounts("1").is_err());
        assert!(shards("1").is_err() && shards("65").is_err());
    }
}
