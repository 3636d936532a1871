//! `verdict drill`: lets things die and break while trades settle, and reports what happened.
//!
//! - `scenario`: what is done, as people write it.
//! - `field`: what it is done to: [processes](crate::processes) with a [network](proxy) and [disks](disk) of our own, or the
//!   containers of `compose`.
//! - `play` does it; `load` settles trades meanwhile, `watching` asks the nodes about themselves, `audit` asks
//!   everything afterwards. All that they see goes into a `record`.
//! - `evaluate` judges the record, and makes a `report` of it, which `terminal` and `html` show.

pub mod audit;
pub mod compose;
pub mod disk;
pub mod evaluate;
pub mod field;
pub mod html;
pub mod load;
pub mod play;
pub mod proxy;
pub mod record;
pub mod report;
pub mod scenario;
pub mod screen;
pub mod terminal;
pub mod watching;

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::Args;
use verdict_client::Client;

use crate::{
    book::Book,
    cluster_state::leader_of,
    ctl::status::replicas,
    folder::{Folder, interrupted},
    settle::fund,
    tape::Tape,
    totals::Totals,
};
use audit::audit;
use compose::Compose;
use evaluate::evaluate;
use field::Field;
use load::Load;
use play::Player;
use record::Record;
use report::{FORMAT, LoadReport, Report};
use scenario::{BUILT_IN, Scenario, built_in};
use screen::Screen;
use watching::Watch;

/// The exit code if a promise was violated.
const VIOLATED: u8 = 1;
/// The exit code if the drill could not run, so that nothing was judged, or if a report could not be written.
const COULD_NOT_RUN: u8 = 2;
/// The exit code after an interruption, as shells have it.
const INTERRUPTED: u8 = 130;
/// Users that trade with each other: all balances fit into one read.
const USERS: u64 = 100;
/// The fee, in basis points.
const FEE_BPS: u32 = 10;
/// Trades per second that a tape has if the load runs as fast as it can.
const FASTEST_PER_SECOND: u64 = 4000;
/// So much longer than asked may the load run: steps may take their time, beyond the waits between them.
const OVERTIME_SECONDS: u64 = 90;

/// `verdict drill`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  verdict drill list                              the scenarios that come with the program
  verdict drill show kill-coordinator             one of them, to read or to begin a file of your own with
  verdict drill kill-coordinator --out report.html
  verdict drill ./mine.drill --seconds 60 --rate 1000
  verdict drill all --out reports                 each of them, with a report of each in a folder

Exit status: 0 all promises held, 1 one was violated, 2 the drill could not run or its report not be written,
3 the command line is wrong, 130 it was interrupted.
docs/operations.md explains the scenario language and the report.")]
pub struct DrillArgs {
    /// A scenario's name or file; `list`, `show NAME`, or `all`
    #[arg(value_name = "SCENARIO", required = true, num_args = 1..=2)]
    pub what: Vec<String>,
    /// How long the load runs, instead of what the scenario says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=scenario::SECONDS_MAX))]
    pub seconds: Option<u64>,
    /// Trades per second; 0: as fast as the answers come
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub rate: u32,
    /// Batches in flight; without it 1024, or 256 if the load is as fast as the answers come
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub window: Option<u32>,
    /// Clients, each with a stream of its own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub clients: u32,
    /// The seed of the tape; without it, another one each time
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write the report as one HTML file (for `all`: a folder)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write the report as JSON (for `all`: a folder)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Drill the compose cluster of docker/, instead of processes of this program's own
    #[arg(long)]
    pub compose: bool,
    /// Keep the nodes' data and logs
    #[arg(long)]
    pub keep: bool,
    /// An empty folder for the nodes' data and logs, which are kept there; without it, a temporary one
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

impl DrillArgs {
    /// With a rate, what is stuck must not hold up the rest.
    fn window(&self) -> usize {
        self.window.unwrap_or(if self.rate == 0 { 256 } else { 1024 }) as usize
    }
}

/// Runs `verdict drill`. Errors are printed here, since they have their own exit code.
pub async fn run(args: DrillArgs) -> anyhow::Result<ExitCode> {
    let words: Vec<&str> = args.what.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["list"] => list(),
        ["show", name] => show(name),
        ["all"] => run_all(&args).await,
        [name] => match find(name) {
            Ok(scenario) => run_and_tell(&args, scenario).await,
            Err(error) => Err(error),
        },
        _ => Err(anyhow::anyhow!("expected a scenario's name or file, `list`, `show NAME` or `all`")),
    };
    done.or_else(|error| {
        crate::err!("verdict drill: {error:#}");
        Ok(ExitCode::from(COULD_NOT_RUN))
    })
}

fn list() -> anyhow::Result<ExitCode> {
    for (name, text) in BUILT_IN {
        crate::out!("{name:<24} {}", Scenario::parse(name, text)?.title);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(name: &str) -> anyhow::Result<ExitCode> {
    let found = BUILT_IN.iter().find(|(known, _)| *known == name);
    let (_, text) =
        found.with_context(|| format!("there is no scenario {name:?}: see `verdict drill list`"))?;
    crate::out!("{}", text.trim_end());
    Ok(ExitCode::SUCCESS)
}

/// A scenario by its name, or from a file.
fn find(name: &str) -> anyhow::Result<Scenario> {
    if let Some(scenario) = built_in(name) {
        return Ok(scenario?);
    }
    let path = Path::new(name);
    if !path.exists() {
        bail!("there is neither a scenario nor a file {name:?}: see `verdict drill list`");
    }
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(Scenario::parse(name, &text)?)
}

/// What came of a drill.
enum End {
    Reported(Box<Report>),
    /// Whether somebody may still be reading what is written.
    Interrupted(bool),
}

async fn run_and_tell(args: &DrillArgs, scenario: Scenario) -> anyhow::Result<ExitCode> {
    let files = Files { html: args.out.clone(), json: args.json.clone() };
    match run_one(args, scenario, &files).await? {
        End::Reported(report) => {
            crate::out!("{}", terminal::show(&report).trim_end());
            let mut failed = false;
            for (path, written) in files.write(&report) {
                match written {
                    Ok(()) => crate::out!("written: {}", path.display()),
                    Err(error) => {
                        failed = true;
                        crate::err!("verdict drill: {error:#}");
                    }
                }
            }
            Ok(ExitCode::from(exit_code(!report.held, failed)))
        }
        End::Interrupted(reader) => Ok(interruption(reader)),
    }
}

/// A promise that was violated tells more than what could not be done.
fn exit_code(violated: bool, failed: bool) -> u8 {
    match (violated, failed) {
        (true, _) => VIOLATED,
        (false, true) => COULD_NOT_RUN,
        (false, false) => 0,
    }
}

fn interruption(reader: bool) -> ExitCode {
    if reader {
        crate::err!("interrupted: the nodes that were started here were ended; containers stay as they are");
    }
    ExitCode::from(INTERRUPTED)
}

/// Runs every scenario that comes with the program.
async fn run_all(args: &DrillArgs) -> anyhow::Result<ExitCode> {
    let (mut lines, mut violated, mut failed) = (Vec::new(), false, false);
    for folder in [&args.out, &args.json].into_iter().flatten() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        tempfile::tempfile_in(folder).with_context(|| format!("write into {}", folder.display()))?;
    }
    for (name, text) in BUILT_IN {
        crate::err!("--- {name}");
        // Each has a cluster of its own.
        let args = DrillArgs { data: args.data.as_ref().map(|folder| folder.join(name)), ..args.clone() };
        let file = |folder: &PathBuf, ending: &str| folder.join(format!("{name}.{ending}"));
        let files = Files {
            html: args.out.as_ref().map(|folder| file(folder, "html")),
            json: args.json.as_ref().map(|folder| file(folder, "json")),
        };
        let told = lines.len();
        match run_one(&args, Scenario::parse(name, text)?, &files).await {
            Ok(End::Reported(report)) => {
                violated |= !report.held;
                lines.push(terminal::line(&report));
                for error in files.write(&report).into_iter().filter_map(|(_, written)| written.err()) {
                    failed = true;
                    lines.push(format!("{name:<24} {error:#}"));
                }
            }
            Ok(End::Interrupted(reader)) => return Ok(interruption(reader)),
            Err(error) => {
                failed = true;
                lines.push(format!("{name:<24} could not run: {error:#}"));
            }
        }
        for line in &lines[told..] {
            crate::err!("{line}");
        }
    }
    crate::out!("{}", terminal::LINE_HEADER);
    for line in lines {
        crate::out!("{line}");
    }
    Ok(ExitCode::from(exit_code(violated, failed)))
}

/// The files that a report goes into.
#[derive(Debug)]
struct Files {
    html: Option<PathBuf>,
    json: Option<PathBuf>,
}

impl Files {
    /// Whether they can be written: it would be a pity to learn that after the drill. Leaves everything as it is.
    fn check(&self) -> anyhow::Result<()> {
        [&self.html, &self.json].into_iter().flatten().try_for_each(|path| check_file(path))
    }

    /// Writes them, each whatever became of the other.
    fn write(&self, report: &Report) -> Vec<(&Path, anyhow::Result<()>)> {
        let write = |path: &Path, text: String| {
            fs::write(path, text).with_context(|| format!("write {}", path.display()))
        };
        let mut written = Vec::new();
        if let Some(path) = self.html.as_deref() {
            written.push((path, write(path, html::page(report))));
        }
        if let Some(path) = self.json.as_deref() {
            let text = serde_json::to_string_pretty(report).context("write the report as JSON");
            written.push((path, text.and_then(|text| write(path, text + "\n"))));
        }
        written
    }
}

fn check_file(path: &Path) -> anyhow::Result<()> {
    let is_new = path.symlink_metadata().is_err();
    // A pipe would take the end of this check for the end of the report.
    if !is_new && !path.is_file() && !path.is_dir() {
        return Ok(());
    }
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.with_context(|| format!("write {}", path.display()))?;
    if is_new {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// Runs a scenario, on a cluster of its own that ends with it, or on the containers.
async fn run_one(args: &DrillArgs, mut scenario: Scenario, files: &Files) -> anyhow::Result<End> {
    if let Some(seconds) = args.seconds {
        scenario.seconds = Duration::from_secs(seconds);
        scenario.check_times()?;
    }
    let folder = Folder::make(args.data.as_deref(), args.keep, "verdict-drill-")?;
    // They may lie in that folder.
    files.check()?;
    let field = match args.compose {
        true => {
            let compose = Compose::find().await?;
            scenario.shards = compose.shards();
            let spares: Vec<u64> = compose.spares().into_iter().map(|(node, _)| node).collect();
            scenario.check_for(&compose.nodes(), &spares)?;
            compose.check(&scenario).await?;
            Field::Compose(compose)
        }
        false => {
            let spares = scenario.nodes + scenario.replacements().len() as u64;
            let ids = |from: u64, to: u64| (from..=to).collect::<Vec<u64>>();
            scenario.check_for(&ids(1, scenario.nodes), &ids(scenario.nodes + 1, spares))?;
            Field::local(&folder, &scenario).await?
        }
    };
    let field = tokio::sync::Mutex::new(field);
    let result = tokio::select! {
        result = drill(args, &scenario, &field) => Ok(result),
        reader = interrupted() => Err(reader),
    };
    let mut field = field.into_inner();
    field.end().await;
    match result {
        Ok(Ok(report)) => {
            if report.held {
                folder.tell_if_kept();
            } else if !args.compose {
                folder.keep();
            }
            Ok(End::Reported(Box::new(report)))
        }
        Ok(Err(error)) => {
            crate::err!("{}", field.log_tails().trim_end());
            if !args.compose {
                folder.keep();
            }
            Err(error)
        }
        Err(reader) => Ok(End::Interrupted(reader)),
    }
}

/// The whole drill.
async fn drill(
    args: &DrillArgs,
    scenario: &Scenario,
    field: &tokio::sync::Mutex<Field>,
) -> anyhow::Result<Report> {
    let began = Instant::now();
    let (client, addresses, nodes, watched, name) = {
        let mut field = field.lock().await;
        let client = field::client(&field)?;
        field.start(&client).await.context("start the nodes")?;
        let watched = [field.direct_addresses(), field.spares()].concat();
        (client, field.public_addresses(), field.nodes().len(), watched, field.name())
    };
    crate::err!("{}: {}", scenario.name, scenario.title);
    crate::err!("{name} are up after {:.1} s", began.elapsed().as_secs_f64());

    let seed = args.seed.unwrap_or_else(time_as_seed);
    let book = book(args, scenario, seed)?;
    fund(&client, &book, args.window()).await.context("fund the users")?;
    let mut load = Load::new(&book, &addresses, args.clients as usize, args.rate, args.window())?;
    let before = Totals::read(&client, load.accounts()).await.context("read the balances before the load")?;
    let groups = groups(&client, scenario.shards).await?;

    let began_at = SystemTime::now();
    load.begin();
    let played = play(scenario, field, &client, &load, &watched).await?;
    crate::err!("the load has ended; checking every answer");
    // Those that are members now.
    let direct = field.lock().await.direct_addresses();
    let position = before.positions.iter().copied().max().unwrap_or_default();
    let mut asked = audit(&load, &book, &client, &direct, &played.seen.batches, position).await;
    if played.seen.ran_out {
        asked.troubles.push(format!(
            "the load had no more trades after {:.1} s, before the drill was over: what was done later met no load; choose a --rate that they last for",
            played.seen.seconds
        ));
    }
    let record = Record {
        load_seconds: played.seen.seconds,
        window: args.window(),
        rate: args.rate,
        unbounded: (0..load.accounts().len())
            .filter(|place| Load::is_unbounded(&load.accounts()[*place]))
            .collect(),
        accounts: load.accounts().to_vec(),
        initial: before.balances.iter().map(|(_, balance)| *balance).collect(),
        batches: played.seen.batches,
        repeats: played.seen.repeats,
        reads: played.seen.reads,
        reads_unanswered: played.seen.reads_unanswered,
        events: played.events,
        replicas: groups,
        samples: played.watched.samples,
        doubts: played.watched.doubts,
        hashes: played.watched.hashes,
        audit: asked,
    };
    let given = Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        began: utc(began_at),
        scenario: scenario.name.clone(),
        title: scenario.title.clone(),
        about: scenario.about.clone(),
        cluster: name,
        nodes: nodes as u64,
        shards: scenario.shards,
        load: LoadReport { clients: args.clients as usize, seed, ..LoadReport::default() },
        ..Report::default()
    };
    Ok(evaluate(&record, given))
}

/// What happened while the load ran.
struct Played {
    seen: load::Seen,
    events: Vec<record::Event>,
    watched: watching::Watched,
}

/// Plays the scenario while the load runs and the nodes are watched.
async fn play(
    scenario: &Scenario,
    field: &tokio::sync::Mutex<Field>,
    client: &Client,
    load: &Load<'_>,
    watched: &[(u64, String)],
) -> anyhow::Result<Played> {
    let screen = Screen::new(scenario.seconds);
    let impaired = Mutex::new(BTreeSet::new());
    let over = AtomicBool::new(false);
    // While a step is being done, nobody can be asked.
    let memory = |node: u64| field.try_lock().ok().and_then(|field| field.memory(node));
    let player =
        Player { field, shards: scenario.shards, client, load, screen: &screen, impaired: &impaired };
    let watch = Watch { nodes: watched, impaired: &impaired, memory: &memory, load, ended: &over };
    let playing = async {
        let events = player.play(scenario).await;
        load.end();
        events
    };
    let settling = async {
        let seen = load.run(scenario.shards, &screen).await;
        over.store(true, Ordering::Relaxed);
        seen
    };
    let showing = async {
        while !over.load(Ordering::Relaxed) {
            screen.tick(load.now());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (events, seen, watched, ()) = tokio::join!(playing, settling, watch.run(), showing);
    screen.finish();
    Ok(Played { seen, events: events?, watched: watched? })
}

/// A tape that is long enough, and its book.
fn book(args: &DrillArgs, scenario: &Scenario, seed: u64) -> anyhow::Result<Book> {
    let rate = if args.rate == 0 { FASTEST_PER_SECOND } else { u64::from(args.rate) };
    let trades = rate * tape_seconds(scenario);
    let tape = Tape::generate(seed, usize::try_from(trades).context("count the trades")?);
    Book::new(tape, USERS, FEE_BPS).map_err(anyhow::Error::msg)
}

/// How long the load can run: waits that come after `seconds` hold it up.
fn tape_seconds(scenario: &Scenario) -> u64 {
    (scenario.seconds + scenario.waits()).as_secs() + OVERTIME_SECONDS
}

/// The voters of all groups.
async fn groups(client: &Client, shards: u32) -> anyhow::Result<std::collections::BTreeMap<u32, Vec<u64>>> {
    // With a leader of each the status is of use.
    for group in 0..=shards {
        leader_of(client, group, shards).await?;
    }
    let status = client.status().await.context("ask for the replicas of all groups")?;
    let voters = replicas(&status).map(|(_, replica)| (replica.group_id, replica.voters.clone()));
    Ok(voters.filter(|(_, voters)| !voters.is_empty()).collect())
}

fn time_as_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_millis() as u64
}

/// A time as `2026-11-21 12:30:00 UTC`.
pub fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, of_day) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days to a date of the civil calendar, counting years from March (Howard Hinnant, "chrono-compatible low-level date
    // algorithms", civil_from_days).
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_dates() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(at(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(at(1_795_264_205), "2026-11-21 12:30:05 UTC");
    }

    #[test]
    fn files_are_checked_without_a_trace_and_one_that_fails_keeps_no_other_from_being_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| Some(folder.path().join(name));
        let (old, new) = (path("old.html"), path("new.json"));
        fs::write(old.as_deref().unwrap(), "as it was").unwrap();
        Files { html: old.clone(), json: new.clone() }.check().unwrap();
        assert_eq!(fs::read_to_string(old.as_deref().unwrap()).unwrap(), "as it was");
        assert!(!new.as_deref().unwrap().exists());
        let lost = Files { html: path("nowhere/new.html"), json: new.clone() };
        let told = lost.check().unwrap_err().to_string();
        assert!(told.ends_with("nowhere/new.html"), "{told}");
        assert!(Files { html: path(""), json: None }.check().is_err(), "a folder is no file");

        let report = evaluate(&evaluate::tests::example(), evaluate::tests::given());
        let written = lost.write(&report);
        assert_eq!(written.iter().map(|(_, written)| written.is_ok()).collect::<Vec<_>>(), [false, true]);
        assert!(fs::read_to_string(new.as_deref().unwrap()).unwrap().contains("\"held\": true"));
    }

    #[test]
    fn a_report_that_could_not_be_written_hides_no_violated_promise() {
        assert_eq!((exit_code(true, true), exit_code(true, false)), (VIOLATED, VIOLATED));
        assert_eq!((exit_code(false, true), exit_code(false, false)), (COULD_NOT_RUN, 0));
    }

    #[test]
    fn the_tape_is_long_enough_for_all_waits_between_steps() {
        let text = "seconds 20\nat 5s kill node 1\nafter 200s start it\nafter 1500ms kill it";
        let scenario = Scenario::parse("x", text).unwrap();
        assert_eq!(tape_seconds(&scenario), 20 + 201 + OVERTIME_SECONDS);
    }
}
