//! Kills real processes at every failpoint, in every role that comes there, again and again under load, and checks every promise: `make
//! failpoints`.

use std::{
    fs::{self, File, OpenOptions},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use serde_json::{Value, json};
use verdict_failpoints::{FAILPOINTS, Failpoint, Role};
use verdict_tests::{
    bank::Findings,
    failpoints::{Harness, Kill},
    random::Random,
};

/// Goals for the kill of a leader: half of the kills, and all but one of a hundred, have a first commit after this; nothing is in doubt
/// after that.
const FIRST_COMMIT_P50: Duration = Duration::from_millis(800);
const FIRST_COMMIT_P99: Duration = Duration::from_secs(2);
const RESOLVED_MAX: Duration = Duration::from_secs(3);

/// Kills processes at named places under load, and checks every promise afterwards. The debug build of `verdict` must stand beside this
/// program, or `VERDICT_BIN` say where it is.
#[derive(Parser)]
struct Arguments {
    /// Kills for each failpoint and role.
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Only failpoints whose names contain one of these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only roles whose names contain this.
    #[arg(long, default_value = "")]
    role: String,
    /// Lists the failpoints, and kills nothing.
    #[arg(long)]
    list: bool,
    /// Writes the results there, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Waits for the lock of this file before each cluster, so that others who take it get their turn.
    #[arg(long)]
    lock: Option<PathBuf>,
    /// Fails too if the goals for recovery are not met.
    #[arg(long)]
    goals: bool,
}

/// What came of one failpoint in one role.
struct Row {
    point: &'static Failpoint,
    role: Role,
    kills: Vec<Kill>,
    failures: Vec<String>,
    findings: Findings,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        print!("{}", verdict_failpoints::table());
        return ExitCode::SUCCESS;
    }
    let wanted = |point: &Failpoint, role: Role| {
        role.name().contains(&arguments.role)
            && (arguments.only.is_empty()
                || arguments.only.iter().any(|part| point.name.contains(part.as_str())))
    };
    let pairs: Vec<_> = FAILPOINTS
        .iter()
        .flat_map(|point| point.roles.iter().map(|role| (*point, *role)))
        .filter(|(point, role)| wanted(point, *role))
        .collect();
    let (began, mut random, mut rows) = (Instant::now(), Random::announced(), Vec::new());
    for (place, (point, role)) in pairs.iter().enumerate() {
        let lock = arguments.lock.as_ref().map(take_lock);
        let run = tokio::spawn(run(point, *role, arguments.kills, random.split()));
        let row = match run.await {
            Ok(row) => row,
            Err(panic) => Row {
                point,
                role: *role,
                kills: Vec::new(),
                failures: vec![panic.to_string()],
                findings: Findings::default(),
            },
        };
        drop(lock);
        println!("[{}/{} {:.0} s] {}", place + 1, pairs.len(), began.elapsed().as_secs_f64(), row.line());
        rows.push(row);
    }
    report(&arguments, &rows, began.elapsed())
}

fn take_lock(path: &PathBuf) -> File {
    let file = OpenOptions::new().create(true).append(true).open(path).expect("open the lock's file");
    file.lock().expect("take the lock");
    file
}

async fn run(point: &'static Failpoint, role: Role, kills: usize, random: Random) -> Row {
    let mut harness = Harness::start(random).await;
    let mut row = Row { point, role, kills: Vec::new(), failures: Vec::new(), findings: Findings::default() };
    for _ in 0..kills {
        match harness.kill(point, role).await {
            Ok(kill) => row.kills.push(kill),
            Err(why) => row.failures.push(why.to_string()),
        }
    }
    row.findings = harness.end().await;
    row.failures.extend(row.findings.violations.iter().map(ToString::to_string));
    row
}

impl Row {
    fn line(&self) -> String {
        let without = Spread::of(self.kills.iter().map(|kill| kill.without_commits));
        let resolved = Spread::of(self.kills.iter().map(|kill| kill.resolved));
        let failures = self.failures.len();
        let verdict = if failures == 0 { "kept".to_owned() } else { format!("{failures} FAILURES") };
        format!(
            "{:24} {:20} {:3} kills, without commits {without}, resolved {resolved} ms, {} committed, {} by id: {verdict}",
            self.point.name,
            self.role.name(),
            self.kills.len(),
            self.findings.committed,
            self.findings.resolved_by_id,
        )
    }

    fn json(&self) -> Value {
        json!({
            "failpoint": self.point.name,
            "role": self.role.name(),
            "kills": self.kills.len(),
            "without_commits_ms": self.kills.iter().map(|kill| kill.without_commits.as_millis() as u64).collect::<Vec<_>>(),
            "resolved_ms": self.kills.iter().map(|kill| kill.resolved.as_millis() as u64).collect::<Vec<_>>(),
            "after_quorum_ms":
                self.kills.iter().map(|kill| kill.after_quorum.as_millis() as u64).collect::<Vec<_>>(),
            "sent": self.findings.sent,
            "committed": self.findings.committed,
            "aborted": self.findings.aborted,
            "resolved_by_id": self.findings.resolved_by_id,
            "readings": self.findings.readings,
            "errors": self.findings.errors,
            "failures": self.failures,
        })
    }
}

/// Half, all but one of a hundred, all.
struct Spread {
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Spread {
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        let at = |part: f64| {
            let place = (times.len() as f64 * part).ceil() as usize;
            times.get(place.saturating_sub(1)).copied().unwrap_or_default()
        };
        Spread { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p99, max] = [self.p50, self.p99, self.max].map(|time| time.as_millis());
        write!(f, "{p50:4} / {p99:4} / {max:4}")
    }
}

fn report(arguments: &Arguments, rows: &[Row], took: Duration) -> ExitCode {
    println!("\nmilliseconds as p50 / p99 / max\n");
    println!("| role | kills | without commits | resolved | of that after a quorum |\n|---|---|---|---|---|");
    let roles = [Role::CoordinatorLeader, Role::ShardLeader, Role::CoordinatorFollower, Role::ShardFollower];
    let mut leaders = Vec::new();
    for role in roles {
        let kills: Vec<Kill> =
            rows.iter().filter(|row| row.role == role).flat_map(|row| row.kills.clone()).collect();
        table_row(role.name(), &kills);
        if role.leads() {
            leaders.extend(kills);
        }
    }
    let all: Vec<Kill> = rows.iter().flat_map(|row| row.kills.clone()).collect();
    table_row("all", &all);
    let first = Spread::of(leaders.iter().map(|kill| kill.without_commits));
    let resolved = Spread::of(all.iter().map(|kill| kill.after_quorum));
    let met = leaders.is_empty() || first.p50 <= FIRST_COMMIT_P50 && first.p99 <= FIRST_COMMIT_P99;
    let met = met && resolved.max <= RESOLVED_MAX;
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "\ngoals: a leader's kill p50 <= {FIRST_COMMIT_P50:?}, p99 <= {FIRST_COMMIT_P99:?}; resolved <= {RESOLVED_MAX:?} after a quorum: {}",
        if met { "met" } else { "NOT MET" }
    );
    let failures: Vec<String> = rows
        .iter()
        .flat_map(|row| {
            row.failures.iter().map(move |why| format!("{}, {}: {why}", row.point.name, row.role.name()))
        })
        .collect();
    println!(
        "{} kills at {} failpoints x roles in {:.0} s (load average {}): {} failures",
        all.len(),
        rows.len(),
        took.as_secs_f64(),
        load.split(' ').next().unwrap_or_default(),
        failures.len(),
    );
    failures.iter().for_each(|failure| println!("FAILED: {failure}"));
    if let Some(path) = &arguments.json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        let text = json!({ "seconds": took.as_secs(), "goals_met": met, "rows": rows }).to_string();
        if let Err(error) = fs::write(path, text) {
            println!("FAILED: write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    if failures.is_empty() && (met || !arguments.goals) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn table_row(what: &str, kills: &[Kill]) {
    let without = Spread::of(kills.iter().map(|kill| kill.without_commits));
    let resolved = Spread::of(kills.iter().map(|kill| kill.resolved));
    let after_quorum = Spread::of(kills.iter().map(|kill| kill.after_quorum));
    println!("| {what} | {} | {without} | {resolved} | {after_quorum} |", kills.len());
}
