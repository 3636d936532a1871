//! Settles many batches, each to a definite end: `verdict settle`, and the engine of the demo.
//!
//! What happens to one batch:
//! - COMMITTED: done. ABORTED because its record exists: it was settled before.
//! - ABORTED for what it met (short of funds, say): a trade that was settled before fails in several ways at once, and any of
//!   them may be told. So its record is read; if it exists, the trade was settled before.
//! - ABORTED (INTERRUPTED, CONTENTION, PARTICIPANT_UNAVAILABLE): true for that id for ever, but another try under a fresh id may
//!   do better.
//! - UNKNOWN: asked for by its id until the answer is definite. Never seen: submitted again under the same id.
//! - Refused without being proposed (overload, no node): submitted again under the same id.
//! - Anything else ends it: it is counted by its reason.

use std::{collections::BTreeMap, fmt, path::PathBuf, process::ExitCode, sync::Mutex, time::Duration};

use anyhow::Context as _;
use clap::Args;
use futures::{StreamExt as _, stream};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;
use verdict_client::{
    AbortReason, Answer, Batch, Client, ClientError, Options, Outcome, Submitter, UndecidedState, value,
};
use verdict_proto::v1::{Operation, operation::Kind};

use crate::{
    book::{Book, TREASURY},
    progress::Progress,
    reach::reach,
    tape::{ReadOptions, Symbol, Tape, amount_text},
    totals::{ROWS_PER_READ, Totals},
};

/// How long one batch may take to a definite end, over all its tries.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the server is asked to wait when it is asked for an outcome.
const RESOLVE_WAIT: Duration = Duration::from_secs(2);
/// The pause between two tries of one batch, beyond those that the client makes.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest latency that is told apart from longer ones, in microseconds: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// Pauses without a commit that are worth telling.
const GAP_MIN: Duration = Duration::from_millis(100);
/// The time series has one figure for each of these.
const SERIES_STEP: Duration = Duration::from_millis(100);
/// Messages that are kept; more are only counted.
const MESSAGES_MAX: usize = 10;

/// Which tape to settle, and how.
#[derive(Args, Clone, Debug)]
pub struct TapeArgs {
    /// A trade file as Binance publishes it (CSV); without it, a tape is made from a seed
    #[arg(long, value_name = "FILE")]
    pub tape: Option<PathBuf>,
    /// Assets of the tape; without it, they are taken from the file's name
    #[arg(long, value_name = "BASE-QUOTE", value_parser = Symbol::parse)]
    pub symbol: Option<Symbol>,
    /// Leave out lines that are broken, instead of refusing the tape
    #[arg(long)]
    pub skip_broken: bool,
    /// Settle only so many trades (of a file), or make so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub trades: Option<u64>,
    /// The seed of a tape that is made
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Users that trade with each other
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    pub users: u64,
    /// The exchange's fee in basis points (hundredths of a percent), paid by the buyer on top, rounded down
    #[arg(long, value_name = "BP", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub fee_bps: u32,
    /// Batches in flight
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub window: u32,
}

impl TapeArgs {
    /// Reads or makes the tape, and its book.
    pub fn book(&self, trades_default: u64) -> anyhow::Result<Book> {
        let tape = match &self.tape {
            Some(path) => {
                let trades_max = self.trades.map(|trades| trades as usize);
                let options =
                    ReadOptions { symbol: self.symbol.clone(), skip_broken: self.skip_broken, trades_max };
                Tape::read(path, &options)?
            }
            None => {
                let mut tape = Tape::generate(self.seed, self.trades.unwrap_or(trades_default) as usize);
                tape.symbol = self.symbol.clone().unwrap_or(tape.symbol);
                tape
            }
        };
        Book::new(tape, self.users, self.fee_bps).map_err(anyhow::Error::msg)
    }
}

/// `verdict settle`.
#[derive(Args, Clone, Debug)]
pub struct SettleArgs {
    /// The tape
    #[command(flatten)]
    pub tape: TapeArgs,
    /// Nodes to talk to
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', default_value = "127.0.0.1:7400")]
    pub connect: Vec<String>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// The definite end of one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It is committed, at this stamp.
    Committed(u64),
    /// Its record existed: it was settled before, under another id.
    AlreadySettled,
    /// It is aborted for this reason.
    Aborted(AbortReason),
    /// Nothing definite was learned, or it was refused.
    Failed(String),
}

/// The batches of a run: numbered from 0, made when they are needed.
pub struct Work<'a> {
    /// What to call it.
    pub label: &'a str,
    /// How many there are.
    pub count: usize,
    /// Makes a batch by its number and its id.
    pub make: &'a (dyn Fn(usize, &str) -> Batch + Sync),
    /// Ids to use, each for one try. None: ids are made, and fresh ones for aborts that time may mend.
    pub ids: Option<&'a [Uuid]>,
    /// Only batches with a number below this may start.
    pub gate: Option<watch::Receiver<usize>>,
    /// Batches in flight.
    pub window: usize,
}

/// What became of the batches of a run.
#[derive(Debug)]
pub struct Run {
    /// Figures.
    pub report: SettleReport,
    /// The id under which each batch came to its end, and the end.
    pub ends: Vec<(Uuid, End)>,
    /// Ids that were given up for fresh ones: the number of the batch, the id, and why it is aborted.
    pub given_up: Vec<(usize, Uuid, AbortReason)>,
    /// When it began: the times in `report.pauses` count from here.
    pub began: std::time::Instant,
}

/// The figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SettleReport {
    /// Batches.
    pub batches: u64,
    /// Of them committed.
    pub committed: u64,
    /// Settled before, under another id.
    pub already_settled: u64,
    /// Aborted, by reason.
    pub aborted: BTreeMap<String, u64>,
    /// Refused or without a definite end.
    pub failed: u64,
    /// What was said about the first of them.
    pub failures: Vec<String>,
    /// Tries that were aborted and repeated under a fresh id, by reason.
    pub retried: BTreeMap<String, u64>,
    /// Answers that were lost or not definite.
    pub unknown: UnknownCounts,
    /// Streams that the client opened; more than one: nodes were lost.
    pub streams: u64,
    /// How long it took.
    pub seconds: f64,
    /// Committed batches per second.
    pub per_second: f64,
    /// From the first try of a batch to its definite end.
    pub latency: Latency,
    /// Commits in each 100 ms.
    pub commits_per_100_ms: Vec<u32>,
    /// Stretches of 100 ms or more without a commit.
    pub pauses: Vec<Pause>,
    /// Stretches in which no batch was allowed to start.
    pub holds: Vec<Pause>,
}

/// What became of answers that were lost or not definite.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UnknownCounts {
    /// Batches whose answer was lost at least once; the client asked again by submitting under the same id.
    pub asked_again: u64,
    /// Of them: it was committed.
    pub asked_again_committed: u64,
    /// Of them: it was aborted.
    pub asked_again_aborted: u64,
    /// Answers that were still UNKNOWN when the client's time ran out.
    pub unknown: u64,
    /// Of them: `GetBatch` told that it was committed.
    pub get_batch_committed: u64,
    /// Of them: `GetBatch` told that it was aborted.
    pub get_batch_aborted: u64,
    /// Of them: never seen, so it was submitted again under the same id.
    pub get_batch_not_seen: u64,
}

/// Latencies in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Latency {
    /// The median.
    pub p50_ms: f64,
    /// Of 100 batches, one took longer.
    pub p99_ms: f64,
    /// Of 1000 batches, one took longer.
    pub p99_9_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// A stretch without commits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pause {
    /// When it began, in seconds since the run began.
    pub at: f64,
    /// How long it was, in seconds.
    pub seconds: f64,
}

impl Pause {
    fn between(from: Duration, to: Duration) -> Pause {
        Pause { at: from.as_secs_f64(), seconds: (to - from).as_secs_f64() }
    }

    fn overlaps(&self, other: &Pause) -> bool {
        self.at < other.at + other.seconds && other.at < self.at + self.seconds
    }
}

/// What one batch has been through.
struct Done {
    number: usize,
    id: Uuid,
    end: End,
    took: Duration,
    lost: bool,
    given_up: Vec<(Uuid, AbortReason)>,
    unknown: UnknownCounts,
}

impl Work<'_> {
    /// Settles all of it.
    pub async fn run(&self, client: &Client, progress: &Progress) -> Run {
        let submitter = client.submitter(self.window);
        let began = Instant::now();
        let holds = Mutex::new(Vec::new());
        let numbers = stream::iter(0..self.count).then(|number| self.pass_gate(number, began, &holds));
        let work = numbers.map(|number| self.settle_one(client, &submitter, number));
        let mut done = std::pin::pin!(work.buffer_unordered(self.window));
        let mut tally = Tally::new(self.count, began);
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                done = done.next() => match done {
                    Some(done) => {
                        progress.count(matches!(done.end, End::Committed(_)));
                        tally.add(done);
                    }
                    None => break,
                },
                _ = ticks.tick() => progress.tick(),
            }
        }
        progress.tick();
        tally.report.holds =
            std::mem::take(&mut *holds.lock().expect("nothing panics while it holds this lock"));
        tally.finish(submitter.stats().streams)
    }

    /// Waits until a batch may start, and notes if that took long.
    async fn pass_gate(&self, number: usize, began: Instant, holds: &Mutex<Vec<Pause>>) -> usize {
        if let Some(gate) = &self.gate {
            let at = began.elapsed();
            // A gate whose keeper has gone is open.
            let _ = gate.clone().wait_for(|limit| number < *limit).await;
            let hold = Pause::between(at, began.elapsed());
            if hold.seconds >= GAP_MIN.as_secs_f64() {
                holds.lock().expect("nothing panics while it holds this lock").push(hold);
            }
        }
        number
    }

    async fn settle_one(&self, client: &Client, submitter: &Submitter, number: usize) -> Done {
        let mut slot = submitter.reserve().await;
        let started = Instant::now();
        let id = self.ids.map_or_else(Uuid::now_v7, |ids| ids[number]);
        let (unknown, given_up) = Default::default();
        let mut done = Done {
            number,
            id,
            end: End::AlreadySettled,
            took: Duration::ZERO,
            lost: false,
            given_up,
            unknown,
        };
        loop {
            let batch = (self.make)(number, &done.id.to_string());
            let answer = slot.submit(batch).await;
            done.lost |= answer.lost > 0;
            match self.end_of(client, answer, &mut done, started).await {
                Some(end) => {
                    done.end = end;
                    done.took = started.elapsed();
                    return done;
                }
                None => tokio::time::sleep(PAUSE).await,
            }
            slot = submitter.reserve().await;
        }
    }

    /// Whether the record that a batch inserts, its first operation, exists.
    async fn record_exists(&self, client: &Client, number: usize) -> bool {
        let record = (self.make)(number, "").operations.into_iter().next();
        let Some(Operation { row: Some(row), kind: Some(Kind::Insert(_)) }) = record else { return false };
        let Ok(read) = client.read(vec![row]).await else { return false };
        let found = read.values.into_iter().next().and_then(|found| found.value?.kind);
        matches!(found, Some(value::Kind::Record(_)))
    }

    /// The end that an answer means, or none if another try is to be made.
    async fn end_of(
        &self,
        client: &Client,
        answer: Answer,
        done: &mut Done,
        started: Instant,
    ) -> Option<End> {
        let late = started.elapsed() > PATIENCE;
        let outcome = match answer.result {
            Ok(Outcome::Unknown { message, .. }) => match resolve(client, done, started).await {
                Some(outcome) => outcome,
                None if late => return Some(End::Failed(format!("{}: still unknown: {message}", done.id))),
                None => return None,
            },
            Ok(outcome) => outcome,
            Err(ClientError::Overloaded { .. } | ClientError::Unavailable { .. }) if !late => return None,
            Err(error) => return Some(End::Failed(format!("{}: {error}", done.id))),
        };
        match outcome {
            Outcome::Committed { stamp } => Some(End::Committed(stamp)),
            Outcome::Aborted { reason: AbortReason::RowExists, operation: Some(0), .. } => {
                Some(End::AlreadySettled)
            }
            Outcome::Aborted { reason, .. } if self.ids.is_none() && time_may_mend(reason) && !late => {
                done.given_up.push((done.id, reason));
                done.id = Uuid::now_v7();
                None
            }
            Outcome::Aborted { reason, .. } if is_about_values(reason) => {
                match self.record_exists(client, done.number).await {
                    true => Some(End::AlreadySettled),
                    false => Some(End::Aborted(reason)),
                }
            }
            Outcome::Aborted { reason, .. } => Some(End::Aborted(reason)),
            Outcome::Unknown { message, .. } => Some(End::Failed(format!("{}: {message}", done.id))),
        }
    }
}

/// Whether an abort tells one of the conditions that a batch met, of which several may have failed.
fn is_about_values(reason: AbortReason) -> bool {
    match reason {
        AbortReason::ShortOfFunds
        | AbortReason::AboveCeiling
        | AbortReason::Overflow
        | AbortReason::ConditionNotMet => true,
        AbortReason::Unspecified
        | AbortReason::RowExists
        | AbortReason::WrongKind
        | AbortReason::Contention
        | AbortReason::ParticipantUnavailable
        | AbortReason::Interrupted
        | AbortReason::Cancelled => false,
    }
}

/// Asks for the outcome of an id until it is definite. None: never seen, or it took too long.
async fn resolve(client: &Client, done: &mut Done, started: Instant) -> Option<Outcome> {
    done.unknown.unknown += 1;
    while started.elapsed() <= PATIENCE {
        match client.get_batch(&done.id.to_string(), false, RESOLVE_WAIT).await {
            Ok(outcome @ Outcome::Committed { .. }) => {
                done.unknown.get_batch_committed += 1;
                return Some(outcome);
            }
            Ok(outcome @ Outcome::Aborted { .. }) => {
                done.unknown.get_batch_aborted += 1;
                return Some(outcome);
            }
            Ok(Outcome::Unknown { state: UndecidedState::NotSeen, .. }) => {
                done.unknown.get_batch_not_seen += 1;
                return None;
            }
            Ok(Outcome::Unknown { .. }) | Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    None
}

/// Whether an abort says nothing about the batch itself.
fn time_may_mend(reason: AbortReason) -> bool {
    match reason {
        AbortReason::Interrupted | AbortReason::Contention | AbortReason::ParticipantUnavailable => true,
        AbortReason::Unspecified
        | AbortReason::ShortOfFunds
        | AbortReason::AboveCeiling
        | AbortReason::Overflow
        | AbortReason::ConditionNotMet
        | AbortReason::RowExists
        | AbortReason::WrongKind
        | AbortReason::Cancelled => false,
    }
}

/// The name of a reason, as the wire contract has it, without its prefix.
pub fn reason_name(reason: AbortReason) -> &'static str {
    reason.as_str_name().trim_start_matches("ABORT_REASON_")
}

/// Adds up what is done.
struct Tally {
    report: SettleReport,
    ends: Vec<(Uuid, End)>,
    given_up: Vec<(usize, Uuid, AbortReason)>,
    began: Instant,
    latency_us: Histogram<u64>,
    last_commit: Duration,
}

impl Tally {
    fn new(count: usize, began: Instant) -> Tally {
        let nothing = (Uuid::nil(), End::Failed("it was not begun".into()));
        Tally {
            report: SettleReport { batches: count as u64, ..SettleReport::default() },
            ends: vec![nothing; count],
            given_up: Vec::new(),
            began,
            latency_us: Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are right"),
            last_commit: Duration::ZERO,
        }
    }

    fn add(&mut self, done: Done) {
        let report = &mut self.report;
        let count = |counts: &mut BTreeMap<String, u64>, reason| {
            *counts.entry(reason_name(reason).to_owned()).or_default() += 1;
        };
        let mut committed = false;
        match &done.end {
            End::Committed(_) => {
                committed = true;
                report.committed += 1;
                self.note_commit();
            }
            End::AlreadySettled => report.already_settled += 1,
            End::Aborted(reason) => count(&mut report.aborted, *reason),
            End::Failed(message) => {
                report.failed += 1;
                if report.failures.len() < MESSAGES_MAX {
                    report.failures.push(message.clone());
                }
            }
        }
        let report = &mut self.report;
        if done.lost {
            report.unknown.asked_again += 1;
            match &done.end {
                End::Committed(_) => report.unknown.asked_again_committed += 1,
                End::AlreadySettled | End::Aborted(_) => report.unknown.asked_again_aborted += 1,
                End::Failed(_) => {}
            }
        }
        report.unknown.unknown += done.unknown.unknown;
        report.unknown.get_batch_committed += done.unknown.get_batch_committed;
        report.unknown.get_batch_aborted += done.unknown.get_batch_aborted;
        report.unknown.get_batch_not_seen += done.unknown.get_batch_not_seen;
        for (id, reason) in done.given_up {
            count(&mut report.retried, reason);
            self.given_up.push((done.number, id, reason));
        }
        if committed {
            self.latency_us.saturating_record(done.took.as_micros() as u64);
        }
        self.ends[done.number] = (done.id, done.end);
    }

    fn note_commit(&mut self) {
        let at = self.began.elapsed();
        let step = (at.as_millis() / SERIES_STEP.as_millis()) as usize;
        let series = &mut self.report.commits_per_100_ms;
        series.resize(series.len().max(step + 1), 0);
        series[step] += 1;
        let length = at - self.last_commit;
        if length >= GAP_MIN {
            self.report.pauses.push(Pause::between(self.last_commit, at));
        }
        self.last_commit = at;
    }

    fn finish(mut self, streams: u64) -> Run {
        let seconds = self.began.elapsed().as_secs_f64();
        let quantile = |q| self.latency_us.value_at_quantile(q) as f64 / 1000.0;
        self.report.latency = Latency {
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            p99_9_ms: quantile(0.999),
            max_ms: self.latency_us.max() as f64 / 1000.0,
        };
        self.report.streams = streams;
        self.report.seconds = seconds;
        self.report.per_second = self.report.committed as f64 / seconds.max(1e-9);
        Run { report: self.report, ends: self.ends, given_up: self.given_up, began: self.began.into_std() }
    }
}

impl SettleReport {
    /// The longest pause that begins in a stretch of time, in seconds since the run began. Pauses that come from holding
    /// batches back don't count.
    pub fn longest_pause(&self, from: f64, to: f64) -> Option<Pause> {
        let held = |pause: &&Pause| self.holds.iter().any(|hold| hold.overlaps(pause));
        let within = self.pauses.iter().filter(|pause| (from..to).contains(&pause.at) && !held(pause));
        within.copied().max_by(|one, other| one.seconds.total_cmp(&other.seconds))
    }
}

impl fmt::Display for SettleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by_reason = |counts: &BTreeMap<String, u64>| match counts.is_empty() {
            true => "none".to_owned(),
            false => {
                counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
            }
        };
        writeln!(
            f,
            "batches      {}: {} committed, {} settled before",
            self.batches, self.committed, self.already_settled
        )?;
        writeln!(f, "aborted      {}", by_reason(&self.aborted))?;
        writeln!(f, "retried      {} (under fresh ids)", by_reason(&self.retried))?;
        let unknown = &self.unknown;
        writeln!(
            f,
            "answers lost {}: asked again under the same id, {} were committed, {} aborted",
            unknown.asked_again, unknown.asked_again_committed, unknown.asked_again_aborted
        )?;
        writeln!(
            f,
            "unknown      {}: asked by id, {} were committed, {} aborted, {} never seen and submitted again",
            unknown.unknown,
            unknown.get_batch_committed,
            unknown.get_batch_aborted,
            unknown.get_batch_not_seen
        )?;
        if self.failed > 0 {
            writeln!(f, "FAILED       {}", self.failed)?;
            for message in &self.failures {
                writeln!(f, "             {message}")?;
            }
        }
        writeln!(f, "throughput   {:.0} committed/s over {:.2} s", self.per_second, self.seconds)?;
        let Latency { p50_ms, p99_ms, p99_9_ms, max_ms } = &self.latency;
        write!(
            f,
            "latency      p50 {p50_ms:.1} ms, p99 {p99_ms:.1} ms, p99.9 {p99_9_ms:.1} ms, max {max_ms:.1} ms"
        )
    }
}

/// Pays every user what the tape will take from it, once: users that were funded for this book before are left alone.
pub async fn fund(client: &Client, book: &Book, window: usize) -> anyhow::Result<SettleReport> {
    let needs: Vec<_> = book.needs().iter().collect();
    let make = |number: usize, id: &str| book.funding(*needs[number].0, *needs[number].1, id);
    let work = Work { label: "funding", count: needs.len(), make: &make, ids: None, gate: None, window };
    let progress = Progress::new(work.label, needs.len() as u64);
    let report = work.run(client, &progress).await.report;
    progress.finish();
    let funded = report.committed + report.already_settled;
    anyhow::ensure!(funded == report.batches, "not all users could be funded:\n{report}");
    Ok(report)
}

/// `verdict settle`: 0 if every trade is settled and no total has changed.
pub async fn run(args: SettleArgs) -> anyhow::Result<ExitCode> {
    let book = args.tape.book(20_000)?;
    let client = Client::connect(args.connect, Options::default())?;
    let window = args.tape.window as usize;
    let tape = book.tape();
    crate::err!(
        "{}: {} trades of {}, {} users",
        tape.name,
        tape.trades.len(),
        tape.symbol,
        book.needs().len()
    );
    if tape.skipped > 0 {
        crate::err!("{} broken lines were left out", tape.skipped);
    }
    // A wrong address is told at once, not after the patience of every batch.
    reach(&client).await?;
    let funding = fund(&client, &book, window).await.context("fund the users")?;
    let before = Totals::read(&client, &book.accounts()).await?;
    let trades = book.trades();
    let make = |number: usize, id: &str| book.batch(&trades[number], id);
    let work = Work { label: "settling", count: trades.len(), make: &make, ids: None, gate: None, window };
    let progress = Progress::new(work.label, trades.len() as u64);
    let report = work.run(&client, &progress).await.report;
    progress.finish();
    let after = Totals::read(&client, &book.accounts()).await?;
    let settled = report.committed + report.already_settled == report.batches;
    let kept = before.assets == after.assets && after.below_zero_except(TREASURY).next().is_none();
    if args.json {
        crate::out!("{}", report_json(&report, &before, &after)?);
    } else {
        crate::out!(
            "funded       {} users, {} were funded before",
            funding.committed,
            funding.already_settled
        );
        crate::out!("{report}");
        crate::out!("{}", totals_table(&before, &after).trim_end());
        crate::out!("{}", verdict_line(settled, kept, &report, funding.committed > 0));
    }
    Ok(if settled && kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verdict_line(settled: bool, kept: bool, report: &SettleReport, funded: bool) -> String {
    match (settled, kept) {
        (true, true) if report.committed == 0 && funded => {
            "every trade has a record of an earlier run, with its own users and fees; this run funded users and settled nothing".into()
        }
        (true, true) if report.committed == 0 => "every trade was settled before: nothing has changed".into(),
        (true, true) => "every trade is settled, and no unit was made or lost".into(),
        (false, true) => "NOT every trade is settled; no unit was made or lost".into(),
        (_, false) => "TOTALS OR FLOORS DON'T HOLD".into(),
    }
}

/// The totals before and after, asset by asset.
pub fn totals_table(before: &Totals, after: &Totals) -> String {
    let mut text = format!("{:<12} {:>28} {:>28}\n", "total of", "before", "after");
    for (asset, sum) in &before.assets {
        let now = after.assets.get(asset).copied().unwrap_or_default();
        let mark = if now == *sum { "unchanged" } else { "CHANGED" };
        text += &format!("{asset:<12} {:>28} {:>28} {mark}\n", amount_text(*sum), amount_text(now));
    }
    for (row, balance) in after.below_zero_except(TREASURY).take(MESSAGES_MAX) {
        text += &format!("BELOW ITS FLOOR: {}#{} is {}\n", row.partition, row.name, amount_text(*balance));
    }
    if after.positions.len() > 1 {
        text += &format!(
            "({} accounts, read in pieces of {ROWS_PER_READ} while nothing moved)\n",
            after.balances.len()
        );
    }
    text
}

fn report_json(report: &SettleReport, before: &Totals, after: &Totals) -> anyhow::Result<String> {
    // As text: the numbers are larger than what JSON readers can hold.
    let sums = |totals: &Totals| -> BTreeMap<String, String> {
        totals.assets.iter().map(|(asset, sum)| (asset.clone(), sum.to_string())).collect()
    };
    let json =
        serde_json::json!({ "report": report, "total_before": sums(before), "total_after": sums(after) });
    Ok(serde_json::to_string_pretty(&json)?)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        pin::Pin,
        sync::{Arc, Mutex},
    };

    use futures::Stream;
    use prost::Message as _;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::{Request, Response, Status, Streaming, transport::Server};
    use verdict_client::{BatchBuilder, Value, connect::InProcess};
    use verdict_proto::v1::{
        Aborted, CallError, Committed, GetBatchRequest, GetBatchResponse, HistoryRequest, HistoryResponse,
        Outcome as Told, ReadRequest, ReadResponse, RowValue, SubmitAnswer, SubmitRequest, SubmitResponse,
        SubmitStreamRequest, SubmitStreamResponse, Undecided,
        outcome::Result as Said,
        settlement_server::{Settlement, SettlementServer},
        submit_answer::Result as Answered,
    };

    use super::*;

    /// A node that answers the first tries of every batch as it is told, and then commits. It remembers which ids came.
    #[derive(Clone, Default)]
    struct Node {
        script: Arc<Mutex<BTreeMap<String, VecDeque<Answered>>>>,
        first: Vec<Answered>,
        /// What `GetBatch` says.
        told: Option<Said>,
        ids: Arc<Mutex<Vec<String>>>,
    }

    #[tonic::async_trait]
    impl Settlement for Node {
        type SubmitStreamStream = Pin<Box<dyn Stream<Item = Result<SubmitStreamResponse, Status>> + Send>>;

        async fn submit_stream(
            &self,
            request: Request<Streaming<SubmitStreamRequest>>,
        ) -> Result<Response<Self::SubmitStreamStream>, Status> {
            let node = self.clone();
            let answer = move |batch: bytes::Bytes| {
                let batch = Batch::decode(batch).expect("a request has batches");
                let partition = batch.operations[0].row.clone().expect("an operation has a row").partition;
                node.ids.lock().unwrap().push(batch.id.clone());
                let mut script = node.script.lock().unwrap();
                let acts = script.entry(partition).or_insert_with(|| node.first.clone().into());
                let mut result =
                    acts.pop_front().unwrap_or_else(|| told(Said::Committed(Committed { stamp: 7 })));
                if let Answered::Outcome(outcome) = &mut result {
                    outcome.batch_id = batch.id.clone();
                }
                SubmitAnswer { batch_id: batch.id, result: Some(result) }
            };
            let answers = request.into_inner().map(move |request| {
                let answers = request?.batches.into_iter().map(&answer).collect();
                Ok(SubmitStreamResponse { answers })
            });
            Ok(Response::new(answers.boxed()))
        }

        async fn get_batch(
            &self,
            request: Request<GetBatchRequest>,
        ) -> Result<Response<GetBatchResponse>, Status> {
            let outcome = Told { batch_id: request.into_inner().batch_id, result: self.told.clone() };
            Ok(Response::new(GetBatchResponse { outcome: Some(outcome) }))
        }

        async fn submit(&self, _: Request<SubmitRequest>) -> Result<Response<SubmitResponse>, Status> {
            Err(Status::unimplemented("not used here"))
        }

        /// Every row is a record.
        async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadResponse>, Status> {
            let values = request.into_inner().rows.into_iter().map(|row| RowValue {
                row: Some(row),
                value: Some(Value { kind: Some(value::Kind::Record("{}".into())) }),
                version: 1,
            });
            Ok(Response::new(ReadResponse { position: 1, values: values.collect() }))
        }

        async fn history(&self, _: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
            Err(Status::unimplemented("not used here"))
        }
    }

    fn told(said: Said) -> Answered {
        Answered::Outcome(Told { batch_id: String::new(), result: Some(said) })
    }

    fn aborted(reason: AbortReason, operation: Option<u32>) -> Answered {
        let (reason, met, message) = (reason.into(), None, String::new());
        told(Said::Aborted(Aborted { reason, operation, met, message }))
    }

    fn undecided(state: UndecidedState) -> Said {
        Said::Undecided(Undecided { state: state.into(), message: "lost sight of it".into() })
    }

    /// Settles 50 batches against the node; the client gives up after 300 ms.
    async fn settle(node: Node, ids: Option<&[Uuid]>) -> Run {
        let network = InProcess::default();
        let incoming = ReceiverStream::new(network.listen("n:1"));
        let server = Server::builder().add_service(SettlementServer::new(node));
        tokio::spawn(server.serve_with_incoming(incoming));
        let timeout = Duration::from_millis(300);
        let options = Options { connect: Arc::new(network), timeout, try_timeout: timeout };
        let client = Client::connect(["n:1"], options).unwrap();
        let make = |number: usize, id: &str| {
            BatchBuilder::with_id(id).insert(format!("trade:{number}"), "trade", "").build()
        };
        let work = Work { label: "test", count: 50, make: &make, ids, gate: None, window: 50 };
        work.run(&client, &Progress::new("test", 50)).await
    }

    #[tokio::test(start_paused = true)]
    async fn interrupted_batches_are_settled_under_fresh_ids_and_the_old_ids_are_remembered() {
        let first = vec![aborted(AbortReason::Interrupted, None), aborted(AbortReason::Contention, None)];
        let node = Node { first, ..Node::default() };
        let run = settle(node.clone(), None).await;
        assert_eq!((run.report.committed, run.report.failed, run.given_up.len()), (50, 0, 100));
        let latency = &run.report.latency;
        assert!(
            latency.p50_ms >= 100.0 && latency.max_ms >= latency.p50_ms,
            "two pauses of 50 ms: {latency:?}"
        );
        assert_eq!((run.report.retried["INTERRUPTED"], run.report.retried["CONTENTION"]), (50, 50));
        let mut ids = node.ids.lock().unwrap().clone();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 150, "every try had an id of its own");
    }

    #[tokio::test(start_paused = true)]
    async fn refused_batches_are_settled_under_the_same_ids() {
        let code = tonic::Code::ResourceExhausted.into();
        let refusal = CallError { code, message: "full".into(), field: String::new(), retry_after_ms: 1 };
        // More refusals than the client takes in its time.
        let node = Node { first: vec![Answered::Error(refusal); 20], ..Node::default() };
        let run = settle(node.clone(), None).await;
        assert_eq!((run.report.committed, run.report.failed), (50, 0));
        let ids: std::collections::BTreeSet<String> = node.ids.lock().unwrap().iter().cloned().collect();
        assert_eq!(ids.len(), 50);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_batches_are_asked_for_by_id_until_they_are_definite() {
        let lost = || vec![told(undecided(UndecidedState::Unknown)); 20];
        let told = Some(Said::Committed(Committed { stamp: 9 }));
        let run = settle(Node { first: lost(), told, ..Node::default() }, None).await;
        assert_eq!((run.report.unknown.unknown, run.report.unknown.get_batch_committed), (50, 50));
        assert!(run.ends.iter().all(|(_, end)| *end == End::Committed(9)));

        let told = Some(undecided(UndecidedState::NotSeen));
        let run = settle(Node { first: lost(), told, ..Node::default() }, None).await;
        assert!(run.report.unknown.get_batch_not_seen >= 50, "{:?}", run.report.unknown);
        assert!(run.ends.iter().all(|(_, end)| *end == End::Committed(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_exists_means_settled_before_and_given_ids_are_tried_once() {
        let first = vec![aborted(AbortReason::RowExists, Some(0))];
        let run = settle(Node { first, ..Node::default() }, None).await;
        assert_eq!((run.report.already_settled, run.report.committed), (50, 0));

        // Both failed, and the other one was told.
        let first = vec![aborted(AbortReason::ShortOfFunds, Some(1))];
        let run = settle(Node { first, ..Node::default() }, None).await;
        assert_eq!((run.report.already_settled, run.report.aborted.len()), (50, 0));

        let ids: Vec<Uuid> = (0..50).map(|_| Uuid::now_v7()).collect();
        let first = vec![aborted(AbortReason::Interrupted, None)];
        let run = settle(Node { first, ..Node::default() }, Some(&ids)).await;
        let end = End::Aborted(AbortReason::Interrupted);
        assert!(run.ends.iter().zip(&ids).all(|(found, id)| *found == (*id, end.clone())));
    }

    #[test]
    fn the_pause_of_a_kill_is_the_longest_that_begins_with_it() {
        let pause = |at, seconds| Pause { at, seconds };
        let pauses = vec![pause(0.0, 0.2), pause(1.0, 0.5), pause(1.6, 2.0), pause(9.0, 5.0)];
        let report = SettleReport { pauses, ..SettleReport::default() };
        assert_eq!(report.longest_pause(0.9, 2.0), Some(pause(1.6, 2.0)));
        assert_eq!(report.longest_pause(5.0, 6.0), None);
        let held = SettleReport { holds: vec![pause(2.0, 0.5)], ..report };
        assert_eq!(held.longest_pause(0.9, 2.0), Some(pause(1.0, 0.5)));
    }
}
