//! Measures what a user would pick instead of Verdict, beside Verdict: the same trades, the same durability, the same run.
//!
//! - Every system is made anew for every round, on the same disk, on loopback ports; the rounds go through all systems, each
//!   beginning with another one, so that what disturbs the machine disturbs all alike.
//! - All clients are closed loops in this process, except Verdict's, which are those of `verdict bench`.
//! - After the cases of a round each peer is asked for what it holds: as many trades as were answered, and all the money.
//! - Only what was started here is ended.

mod cpu;
mod etcd;
mod load;
mod plan;
mod postgres;
mod process;
mod report;
mod results;
mod trade;
mod verdict;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use rustix::fs::statfs;
use tokio::{
    process::Command,
    signal::unix::{SignalKind, signal},
};

use crate::{
    load::{Client, Figures, Measured, Plan},
    plan::{Case, Clients, SYSTEMS, System},
    process::{Servers, User},
    results::{Results, Row},
};

/// Between two systems, for the disk to come to rest.
const REST: Duration = Duration::from_secs(2);
/// What Linux calls a file system in memory.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Measures PostgreSQL with two-phase commit and etcd beside Verdict.
#[derive(Debug, Parser)]
#[command(name = "bench-peers")]
struct Arguments {
    /// Verdict's program.
    #[arg(long, value_name = "PATH")]
    verdict: Option<PathBuf>,
    /// What to measure; all if not given.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SYSTEM,...")]
    only: Vec<System>,
    /// A short try: one round, few cases, 3 seconds each.
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 3].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: Option<u64>,
    /// How long each case is measured in a round, in seconds [default: 10].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: Option<u64>,
    /// How long each case runs before it is measured, in seconds [default: 3].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=600))]
    warm_up_seconds: Option<u64>,
    /// How many users, an even number.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(4..=10_000_000))]
    users: u64,
    /// The folder below which all data goes; it is removed at the end. The system's folder for temporary files if not given.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// The folder of PostgreSQL's programs, if they aren't from a package.
    #[arg(long, value_name = "FOLDER")]
    postgres_programs: Option<PathBuf>,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write a picture.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What is measured and how.
struct Bench {
    systems: Vec<System>,
    is_quick: bool,
    rounds: u64,
    seconds: u64,
    warm_up_seconds: u64,
    users: u64,
    verdict: Option<verdict::Program>,
    postgres: Option<postgres::Installation>,
    etcd: Option<etcd::Installation>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench-peers: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let bench = Bench::prepare(arguments).await?;
    let parent = arguments.folder.clone().unwrap_or_else(std::env::temp_dir);
    let parent = parent.canonicalize().with_context(|| format!("find the folder {}", parent.display()))?;
    check_disk(&parent)?;
    let folder = tempfile::Builder::new().prefix("verdict-peers-").tempdir_in(&parent);
    let folder = folder.with_context(|| format!("make a folder in {}", parent.display()))?;
    // The user that runs PostgreSQL must be able to pass it.
    User::Same.make_folder(folder.path())?;

    let mut servers = Servers::default();
    let outcome = tokio::select! {
        outcome = bench.measure(&mut servers, folder.path()) => outcome,
        () = interrupted() => Err(anyhow::anyhow!("interrupted")),
    };
    if outcome.is_err() {
        eprint!("{}", servers.log_tails());
    }
    servers.end().await;
    let results = outcome?;

    for (file, text) in [
        (&arguments.json, serde_json::to_string_pretty(&results).context("write JSON")? + "\n"),
        (&arguments.markdown, report::markdown(&results)),
        (&arguments.svg, report::svg(&results)),
    ] {
        if let Some(file) = file {
            fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
        }
    }
    match io::stdout().write_all(report::terminal(&results).as_bytes()) {
        // Nobody reads it any more; the files are written.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write the table"),
    }
}

impl Bench {
    /// Finds all programs before anything is measured.
    async fn prepare(arguments: &Arguments) -> anyhow::Result<Bench> {
        let Arguments { only, quick, users, .. } = arguments;
        anyhow::ensure!(users.is_multiple_of(2), "the number of users must be even: half for each instance");
        let wanted = |system: &System| only.is_empty() || only.contains(system);
        let systems: Vec<System> = SYSTEMS.into_iter().filter(wanted).collect();
        let wants_postgres = [System::Postgres, System::PostgresStandby].iter().any(wanted);
        Ok(Bench {
            is_quick: *quick,
            rounds: arguments.rounds.unwrap_or(if *quick { 1 } else { 3 }),
            seconds: arguments.seconds.unwrap_or(if *quick { 3 } else { 10 }),
            warm_up_seconds: arguments.warm_up_seconds.unwrap_or(if *quick { 1 } else { 3 }),
            users: *users,
            verdict: match wanted(&System::Verdict) {
                true => Some(verdict::Program::find(arguments.verdict.as_deref())?),
                false => None,
            },
            postgres: match wants_postgres {
                true => Some(postgres::Installation::find(arguments.postgres_programs.as_deref()).await?),
                false => None,
            },
            etcd: match wanted(&System::Etcd) {
                true => Some(etcd::Installation::find()?),
                false => None,
            },
            systems,
        })
    }

    async fn measure(&self, servers: &mut Servers, folder: &Path) -> anyhow::Result<Results> {
        let mut results = self.empty_results().await?;
        for round in 0..self.rounds {
            // Each round begins with another system.
            let mut systems = self.systems.clone();
            systems.rotate_left(round as usize % self.systems.len());
            for system in systems {
                rest().await?;
                let folder = folder.join(format!("round-{round}-{}", system as u8));
                let cases = system.cases(self.is_quick);
                let measured = self.measure_one(system, &cases, round, servers, &folder).await;
                let figures = measured.with_context(|| format!("round {}, {system}", round + 1))?;
                servers.end().await;
                fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
                let rows = results.cases.iter_mut().filter(|row| row.system == system);
                for (row, figures) in rows.zip(figures) {
                    row.rounds.push(figures);
                }
            }
        }
        results.compare();
        Ok(results)
    }

    async fn empty_results(&self) -> anyhow::Result<Results> {
        let mut versions = Vec::new();
        if let Some(program) = &self.verdict {
            versions.push(program.version().await?);
        }
        if let Some(installation) = &self.postgres {
            versions.push(installation.version().await?);
        }
        if let Some(installation) = &self.etcd {
            versions.push(installation.version().await?);
        }
        let rows = |system: &System| {
            let system = *system;
            system.cases(self.is_quick).into_iter().map(move |case| Row { system, case, rounds: Vec::new() })
        };
        Ok(Results {
            date: today().await?,
            machine: machine()?,
            versions,
            seconds: self.seconds,
            rounds: self.rounds,
            users: self.users,
            cases: self.systems.iter().flat_map(rows).collect(),
            ratios: Vec::new(),
        })
    }

    async fn measure_one(
        &self,
        system: System,
        cases: &[Case],
        round: u64,
        servers: &mut Servers,
        folder: &Path,
    ) -> anyhow::Result<Vec<Figures>> {
        match system {
            System::Verdict => self.measure_verdict(cases, round, folder).await,
            System::Postgres => self.measure_postgres(cases, round, servers, folder, system).await,
            System::PostgresStandby => self.measure_postgres(cases, round, servers, folder, system).await,
            System::Etcd => self.measure_etcd(cases, round, servers, folder).await,
        }
    }

    async fn measure_verdict(
        &self,
        cases: &[Case],
        round: u64,
        folder: &Path,
    ) -> anyhow::Result<Vec<Figures>> {
        let program = self.verdict.as_ref().context("Verdict's program wasn't looked for")?;
        let question = verdict::Question {
            cases,
            seconds: self.seconds,
            warm_up_seconds: self.warm_up_seconds,
            users: self.users,
            folder,
        };
        eprintln!("round {} of {}: `verdict bench` runs", round + 1, self.rounds);
        let figures = program.measure(&question).await?;
        for (case, figures) in cases.iter().zip(&figures) {
            self.tell(round, System::Verdict, case, figures);
        }
        Ok(figures)
    }

    async fn measure_postgres(
        &self,
        cases: &[Case],
        round: u64,
        servers: &mut Servers,
        folder: &Path,
        system: System,
    ) -> anyhow::Result<Vec<Figures>> {
        let installation = self.postgres.as_ref().context("PostgreSQL wasn't looked for")?;
        let with_standbys = system == System::PostgresStandby;
        let started = postgres::Postgres::start(installation, servers, folder, self.users, with_standbys);
        let postgres = started.await.context("start PostgreSQL")?;
        let mut run = Run::new(self, system, round);
        for case in cases {
            postgres.settle_down().await?;
            let clients = postgres.clients(clients_of(case)?, case.load()).await?;
            run.measure(case, clients, servers).await?;
        }
        postgres.check(run.answered).await.context("check what PostgreSQL holds")?;
        Ok(run.figures)
    }

    async fn measure_etcd(
        &self,
        cases: &[Case],
        round: u64,
        servers: &mut Servers,
        folder: &Path,
    ) -> anyhow::Result<Vec<Figures>> {
        let installation = self.etcd.as_ref().context("etcd wasn't looked for")?;
        let started = etcd::Etcd::start(installation, servers, folder, self.users);
        let etcd = started.await.context("start etcd")?;
        let mut run = Run::new(self, System::Etcd, round);
        for case in cases {
            run.measure(case, etcd.clients(clients_of(case)?), servers).await?;
        }
        etcd.check(run.answered).await.context("check what etcd holds")?;
        Ok(run.figures)
    }

    fn tell(&self, round: u64, system: System, case: &Case, figures: &Figures) {
        let Figures { trades_per_second, p50_ms, p99_ms, .. } = figures;
        eprintln!(
            "round {} of {}: {:<24}  {:<10}  {trades_per_second:>9.0} trades/s  p50 {p50_ms:>7.2} ms  p99 {p99_ms:>8.2} ms",
            round + 1,
            self.rounds,
            system.title(),
            case.name,
        );
    }
}

/// The cases of one peer in one round, one after the other on the same servers.
struct Run<'a> {
    bench: &'a Bench,
    system: System,
    round: u64,
    next_id: Arc<AtomicU64>,
    answered: u64,
    figures: Vec<Figures>,
}

impl<'a> Run<'a> {
    fn new(bench: &'a Bench, system: System, round: u64) -> Run<'a> {
        let next_id = Arc::new(AtomicU64::new(1));
        Run { bench, system, round, next_id, answered: 0, figures: Vec::new() }
    }

    async fn measure<C: Client>(
        &mut self,
        case: &Case,
        clients: Vec<C>,
        servers: &mut Servers,
    ) -> anyhow::Result<()> {
        let plan = Plan {
            warm_up: Duration::from_secs(self.bench.warm_up_seconds),
            measured: Duration::from_secs(self.bench.seconds),
            users: self.bench.users,
            seed: self.round * 100 + self.figures.len() as u64,
        };
        let measured = load::run(clients, case.load(), &plan, &self.next_id).await;
        servers.check_running()?;
        let Measured { figures, answered } = measured.with_context(|| format!("case {}", case.name))?;
        self.answered += answered;
        self.bench.tell(self.round, self.system, case, &figures);
        self.figures.push(figures);
        Ok(())
    }
}

fn clients_of(case: &Case) -> anyhow::Result<usize> {
    match case.clients {
        Clients::Callers(count) => Ok(count),
        Clients::Streams(_) => anyhow::bail!("{}: peers have no streams", case.name),
    }
}

/// What is still to be written of one system must not be paid for by the next.
async fn rest() -> anyhow::Result<()> {
    tokio::task::spawn_blocking(rustix::fs::sync).await.context("wait for the disk")?;
    tokio::time::sleep(REST).await;
    Ok(())
}

/// Memory isn't a disk: a sync there costs nothing.
fn check_disk(folder: &Path) -> anyhow::Result<()> {
    let system = statfs(folder).with_context(|| format!("look at {}", folder.display()))?;
    let is_memory = i128::from(system.f_type) == i128::from(TMPFS_MAGIC);
    anyhow::ensure!(
        !is_memory,
        "{} is in memory, where nothing is durable: name a folder on a disk (--folder)",
        folder.display()
    );
    Ok(())
}

async fn today() -> anyhow::Result<String> {
    let out = Command::new("date").args(["-u", "+%Y-%m-%d"]).output().await.context("ask for the date")?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn machine() -> anyhow::Result<String> {
    let cpus = std::thread::available_parallelism().context("count the processors")?;
    let info = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map(|(_, model)| format!(" ({})", model.trim())).unwrap_or_default();
    Ok(format!("{cpus} processors{model}"))
}

async fn interrupted() {
    let ended = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ended(SignalKind::interrupt()) => {}
        () = ended(SignalKind::terminate()) => {}
        () = ended(SignalKind::hangup()) => {}
    }
}
