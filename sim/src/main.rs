//! Runs simulated clusters: many, for a time or a number of seeds, or one with a trace. See `sim --help`.

use std::{
    io::IsTerminal as _,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use verdict_sim::{
    plan::{FAULTS_MIN, Plan},
    raft::Defect,
    run::{Sum, run},
    shrink::shrink,
    trace::Trace,
    world::Report,
};

/// Simulates whole clusters of the shipped state machines under faults, and checks every promise.
#[derive(Parser)]
struct Arguments {
    /// Run for so many seconds (60 if nothing else is said).
    #[arg(long)]
    seconds: Option<u64>,
    /// Run so many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Run this seed alone, with a trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Run the plan in this file, with a trace.
    #[arg(long)]
    plan: Option<PathBuf>,
    /// Put this bug into the model of Raft (SyncForgotten and others, see raft.rs): the checks must find it.
    #[arg(long)]
    defect: Option<String>,
    /// Without the trace: only what came out.
    #[arg(long)]
    quiet: bool,
    /// Run each seed twice, and fail if the traces differ.
    #[arg(long)]
    twice: bool,
    /// Threads; all cores if 0.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Where the smallest plan of a failing seed is written.
    #[arg(long, default_value = "target/sim")]
    out: PathBuf,
    /// Don't make the plan of a failing seed smaller.
    #[arg(long)]
    no_shrink: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let one = match (&arguments.plan, arguments.seed) {
        (Some(path), _) => {
            let read = std::fs::read_to_string(path).map_err(|error| error.to_string());
            match read.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string())) {
                Ok(plan) => Some(plan),
                Err(error) => {
                    eprintln!("{}: {error}", path.display());
                    return ExitCode::from(2);
                }
            }
        }
        (None, seed) => seed.map(Plan::of_seed),
    };
    let defect = match arguments.defect.as_ref().map(|name| serde_json::from_value(name.clone().into())) {
        None => Defect::None,
        Some(Ok(defect)) => defect,
        Some(Err(error)) => {
            eprintln!("--defect: {error}");
            return ExitCode::from(2);
        }
    };
    match one {
        Some(plan) => replay(&with(plan, defect), &arguments),
        None => {
            // A panic is told with its seed.
            std::panic::set_hook(Box::new(|_| {}));
            many(&arguments, defect)
        }
    }
}

fn with(mut plan: Plan, defect: Defect) -> Plan {
    if defect != Defect::None {
        plan.settings.defect = defect;
    }
    plan
}

/// One run, with a trace.
fn replay(plan: &Plan, arguments: &Arguments) -> ExitCode {
    let report = run(plan, if arguments.quiet { Trace::silent() } else { Trace::printed() });
    println!("\nseed {}, {} events, trace hash {:016x}", report.seed, report.steps, report.hash);
    let [committed, rejected, aborted] = report.outcomes;
    println!("{committed} committed, {rejected} rejected, {aborted} aborted, {} reads", report.reads);
    println!("{} faults, recovery in {:.2} s", report.tally.total(), report.recovery as f64 / 1e6);
    if arguments.twice && run(plan, Trace::silent()).hash != report.hash {
        println!("a second run had another trace");
        return ExitCode::FAILURE;
    }
    match &report.violation {
        None => {
            println!("no promise was broken");
            ExitCode::SUCCESS
        }
        Some(violation) => {
            println!("BROKEN: {}: {}", violation.invariant, violation.text);
            ExitCode::FAILURE
        }
    }
}

/// Very many runs, on all cores.
fn many(arguments: &Arguments, defect: Defect) -> ExitCode {
    let began = Instant::now();
    let seconds = match (arguments.seconds, arguments.seeds) {
        (None, None) => Some(60),
        (seconds, _) => seconds,
    };
    let until = seconds.map(|seconds| began + Duration::from_secs(seconds));
    let last = arguments.seeds.map_or(u64::MAX, |seeds| arguments.from + seeds);
    let next = AtomicU64::new(arguments.from);
    let done = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let sum = Mutex::new(Sum::default());
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = if arguments.threads == 0 { cores } else { arguments.threads };
    let work = || {
        let mut mine = Sum::default();
        while !stop.load(Ordering::Relaxed) && until.is_none_or(|until| Instant::now() < until) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last {
                break;
            }
            let report = run_one(&with(Plan::of_seed(seed), defect), arguments.twice);
            if report.violation.is_some() {
                stop.store(true, Ordering::Relaxed);
            }
            mine.add(report);
            done.fetch_add(1, Ordering::Relaxed);
        }
        sum.lock().expect("no thread dies while it adds").join(mine);
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while std::io::stderr().is_terminal() && !workers.iter().all(|worker| worker.is_finished()) {
            let (count, past) = (done.load(Ordering::Relaxed), began.elapsed().as_secs_f64());
            eprint!("\r{count} seeds, {:.0} a second ", count as f64 / past.max(0.1));
            thread::sleep(Duration::from_millis(200));
        }
    });
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    let sum = sum.into_inner().expect("all threads have ended");
    println!("{}", sum.show(began.elapsed().as_secs_f64()));
    conclude(&sum, arguments, defect)
}

fn run_one(plan: &Plan, twice: bool) -> Report {
    let mut report = run(plan, Trace::silent());
    if twice && run(plan, Trace::silent()).hash != report.hash {
        let text = "a second run had another trace".to_owned();
        let violation = verdict_sim::witness::Violation { invariant: "determinism".to_owned(), text, at: 0 };
        report.violation = report.violation.or(Some(violation));
    }
    report
}

fn conclude(sum: &Sum, arguments: &Arguments, defect: Defect) -> ExitCode {
    let Some(failed) = sum.failed.iter().min_by_key(|report| report.seed) else {
        if sum.seeds > 0 && sum.mildest.0 < FAULTS_MIN {
            println!("seed {} had only {} faults, each must have {FAULTS_MIN}", sum.mildest.1, sum.mildest.0);
            return ExitCode::FAILURE;
        }
        println!("no promise was broken");
        return ExitCode::SUCCESS;
    };
    if let Some(violation) = &failed.violation {
        println!("BROKEN in seed {}: {}: {}", failed.seed, violation.invariant, violation.text);
    }
    if arguments.no_shrink {
        return ExitCode::FAILURE;
    }
    let (plan, tries) = shrink(&with(Plan::of_seed(failed.seed), defect));
    let steps: usize = plan.clients.iter().map(Vec::len).sum();
    println!("after {tries} tries {} faults and {steps} steps of clients are left", plan.faults.len());
    let path = arguments.out.join(format!("seed-{}.json", failed.seed));
    let text = serde_json::to_string_pretty(&plan).unwrap_or_default();
    match std::fs::create_dir_all(&arguments.out).and_then(|()| std::fs::write(&path, text)) {
        Ok(()) => println!("replay it:  cargo run --release -p verdict-sim -- --plan {}", path.display()),
        Err(error) => println!("{}: {error}", path.display()),
    }
    ExitCode::FAILURE
}
