//! The `verdict` program: flags, tracing and signals; all else is in the library.

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use verdict_node::{bench, ctl, demo, dev, drill, err, node, out, settle};

/// Batches are many small allocations, made on one thread and given back on another: this allocator is quickest at that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The version, which tells a build with failpoints from one that is for use.
const VERSION: &str = if verdict_failpoints::ENABLED {
    concat!(env!("CARGO_PKG_VERSION"), " (debug build with failpoints: not for use)")
} else {
    env!("CARGO_PKG_VERSION")
};

/// Settles batches of changes that touch several partitions: all of a batch or none of it, in isolation, exactly once.
#[derive(Parser)]
#[command(name = "verdict", version = VERSION)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run one node of a cluster, with the roles that its configuration gives it.
    Node(node::NodeArgs),
    /// Run a durable three-node cluster inside this process, on one port: for writing a service against.
    Dev(dev::DevArgs),
    /// Watch a tape of trades settle on three node processes, while the processes that lead are killed.
    Demo(demo::DemoArgs),
    /// Let things die and break while trades settle, and report what happened and whether every promise was kept.
    Drill(drill::DrillArgs),
    /// Measure trades per second, latencies, and what a trade costs, on a cluster of three processes or on one that runs.
    Bench(bench::BenchArgs),
    /// Settle a tape of trades on a running cluster.
    Settle(settle::SettleArgs),
    /// Submit, read and look at a running cluster.
    Ctl(ctl::CtlArgs),
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // The parser's own exit code for mistakes is 2, which `ctl` uses for batches that are undecided.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(ctl::ERROR) } else { ExitCode::SUCCESS };
        }
    };
    let filter = EnvFilter::try_from_env("VERDICT_LOG")
        .unwrap_or_else(|_| EnvFilter::new(format!("warn,{}", verdict_raft::QUIET)));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .init();
    let result = match arguments.command {
        Command::Node(args) => {
            args.load().and_then(|config| block_on(config.threads, node::run(args, config)))
        }
        Command::Dev(args) => block_on(None, dev::run(args)),
        Command::Demo(args) => block_on(None, demo::run(args)),
        Command::Drill(args) => block_on(None, drill::run(args)),
        Command::Bench(args) => block_on(None, bench::run(args)),
        Command::Settle(args) => block_on(None, settle::run(args)),
        Command::Ctl(args) => block_on(None, ctl::run(args)),
    };
    let code = result.unwrap_or_else(|error| {
        err!("verdict: {error:#}");
        ExitCode::FAILURE
    });
    match out::failure() {
        None => code,
        Some(failure) => {
            err!("verdict: write to stdout: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command to its end, on so many threads; None: one for each processor.
fn block_on(
    threads: Option<usize>,
    command: impl Future<Output = anyhow::Result<ExitCode>>,
) -> anyhow::Result<ExitCode> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = threads {
        runtime.worker_threads(threads);
    }
    runtime.enable_all().build().context("start the runtime")?.block_on(command)
}
