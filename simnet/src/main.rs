//! Whole nodes in a simulated network, on simulated disks, in simulated time.
//!
//! `simnet seeds` runs many seeds, each in a process of its own; `simnet seed` runs one, with a readable trace. See docs/proof.md.

mod cluster;
mod disk;
mod faults;
mod nature;
mod net;
mod trace;
mod world;

use std::{
    collections::BTreeMap,
    process::{Command as Process, ExitCode, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::world::Report;

/// The stack of the simulation's thread: all hosts run on it.
const STACK_BYTES: usize = 64 << 20;

#[derive(Parser)]
#[command(about = "The real stack in a simulated world")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs seeds one after the other, and says what came of them.
    Seeds {
        /// How many.
        #[arg(long, default_value_t = 100)]
        count: u64,
        /// The first one.
        #[arg(long, default_value_t = 1)]
        from: u64,
        /// How many at a time.
        #[arg(long, default_value_t = 2)]
        jobs: u64,
    },
    /// Runs one seed, and prints what happens.
    Seed {
        /// Which one.
        seed: u64,
        /// Print the report alone, as JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Seed { seed, json } => run_one(seed, json),
        Command::Seeds { count, from, jobs } => run_many(from, count, jobs),
    }
}

/// Runs one seed on a thread of its own.
fn run_one(seed: u64, json: bool) -> Result<ExitCode> {
    let filter = EnvFilter::try_from_env("RUST_LOG").unwrap_or_else(|_| EnvFilter::new("off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let simulation = move || {
        if !json {
            trace::print();
        }
        world::run(seed)
    };
    let thread =
        thread::Builder::new().stack_size(STACK_BYTES).spawn(simulation).context("start a thread")?;
    let report = thread.join().ok().context("the simulation panicked")?;
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("\n{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs each seed in a process of its own: nothing of one reaches the next.
fn run_many(from: u64, count: u64, jobs: u64) -> Result<ExitCode> {
    let (next, begun) = (AtomicU64::new(from), Instant::now());
    let reports: Mutex<Vec<(Report, f64)>> = Mutex::default();
    thread::scope(|scope| {
        let work = || -> Result<()> {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= from + count {
                    return Ok(());
                }
                let started = Instant::now();
                let report = in_a_process(seed)?;
                let seconds = started.elapsed().as_secs_f64();
                tell(&report, seconds);
                reports.lock().expect("nobody panics with it").push((report, seconds));
            }
        };
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker doesn't panic"))
    })?;
    let reports = reports.into_inner().expect("nobody panics with it");
    Ok(sum_up(&reports, begun.elapsed().as_secs_f64()))
}

fn in_a_process(seed: u64) -> Result<Report> {
    let program = std::env::current_exe().context("find this program")?;
    let output = Process::new(program)
        .args(["seed", &seed.to_string(), "--json"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .context("start a process")?;
    let last = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned();
    Ok(serde_json::from_str(&last).unwrap_or_else(|_| Report {
        seed,
        violations: vec![format!("the process ended with {} and no report", output.status)],
        ..Report::default()
    }))
}

fn tell(report: &Report, seconds: f64) {
    let faults: u64 = report.faults.iter().filter(|(kind, _)| !kind.starts_with('(')).map(|(_, n)| n).sum();
    println!(
        "seed {:>6}  {:>6.1} simulated s in {seconds:>5.1} s  {:>4} committed of {:>4}  {:>4} reads  {faults:>3} faults  trace {}  {}",
        report.seed,
        report.simulated_ms as f64 / 1000.0,
        report.committed,
        report.sent,
        report.readings,
        report.trace,
        if report.violations.is_empty() { "ok" } else { "VIOLATED" }
    );
    for violation in &report.violations {
        println!("             {violation}");
    }
}

fn sum_up(reports: &[(Report, f64)], seconds: f64) -> ExitCode {
    let mut faults: BTreeMap<&str, u64> = BTreeMap::new();
    for (kind, times) in reports.iter().flat_map(|(report, _)| &report.faults) {
        *faults.entry(kind).or_default() += times;
    }
    let simulated: u64 = reports.iter().map(|(report, _)| report.simulated_ms).sum();
    let committed: usize = reports.iter().map(|(report, _)| report.committed).sum();
    let mut doubts: Vec<u64> = reports.iter().map(|(report, _)| report.doubt_ms).collect();
    doubts.sort_unstable();
    let failed: Vec<u64> =
        reports.iter().filter(|(report, _)| !report.violations.is_empty()).map(|(r, _)| r.seed).collect();
    println!(
        "\n{} seeds, {} simulated s in {seconds:.0} s, {committed} batches committed",
        reports.len(),
        simulated / 1000
    );
    println!("faults that fired:");
    for (kind, times) in &faults {
        println!("  {times:>8}  {kind}");
    }
    if let (Some(middle), Some(most)) = (doubts.get(doubts.len() / 2), doubts.last()) {
        println!("something in doubt after all was well: median {middle} ms, at most {most} ms");
    }
    match failed.as_slice() {
        [] => {
            println!("no promise was broken");
            ExitCode::SUCCESS
        }
        _ => {
            println!(
                "BROKEN in {} seeds: {failed:?}; replay one with `make sim-stack SEED={}`",
                failed.len(),
                failed[0]
            );
            ExitCode::FAILURE
        }
    }
}
