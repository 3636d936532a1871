//! `verdict demo`: real trades settle on three real processes, while the processes that lead are killed.
//!
//! The story:
//! 1. Three nodes start; users are funded from a treasury that may go below 0, so every asset's total is 0 and stays so.
//! 2. The tape is settled with many batches in flight, one in a hundred a deliberate overdraft. At a fifth of the way the process
//!    that leads the coordinator group is killed, at three fifths one that leads a shard; each comes back after two seconds.
//!    Meanwhile all balances are read over and over at one position: they must add up every time.
//! 3. Everything is submitted again: under the same ids (each answer must be the same) and under fresh ids (nothing may commit).
//! 4. Totals, floors, traces of overdrafts, locks, parts in doubt and state hashes of all replicas are checked.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use tokio::{sync::watch, time::sleep};
use uuid::Uuid;
use verdict_client::{AbortReason, Client, Row, value::Kind};
use verdict_proto::v1::StatusResponse;

use crate::{
    book::{Book, TREASURY},
    cluster_state::{all_at_one_index, equal_replicas, group_name, group_names, leader_of, wait_quiet},
    ctl::status::{replicas, replicas_differ},
    folder::{Folder, interrupted},
    processes::{self, Cluster, Plan},
    progress::Progress,
    script::{Item, Script},
    settle::{End, Run, SettleReport, TapeArgs, Work, fund, reason_name, totals_table},
    totals::{ROWS_PER_READ, Totals},
};

/// How many nodes there are.
const NODES: u64 = 3;
/// Trades of a tape that is made.
const TRADES_DEFAULT: u64 = 20_000;
/// When the killings happen, and how far the tape may run before each of them, in percent of the batches: so that there are
/// always batches in flight when a process dies, however short the tape is.
const FIRST_KILL_PERCENT: usize = 20;
const BEFORE_FIRST_KILL_PERCENT: usize = 40;
const SECOND_KILL_PERCENT: usize = 60;
const BEFORE_SECOND_KILL_PERCENT: usize = 80;
/// So many percent of the batches settle between the opening of the gate and the blow.
const FLOWING_PERCENT: usize = 2;
/// How long a killed process stays away.
const DOWN: Duration = Duration::from_secs(2);
/// How often the totals are read while batches settle.
const READ_INTERVAL: Duration = Duration::from_millis(250);
/// A pause between commits that begins in this time around a kill belongs to it, in seconds: a little before, since the last
/// commit was before the kill, or after, since batches that don't need the dead process go on for a while.
const PAUSE_BEFORE_KILL: f64 = 0.1;
const PAUSE_AFTER_KILL: f64 = 1.5;
/// The exit code after an interruption, as shells have it.
const INTERRUPTED: u8 = 130;
/// Differences that are listed; more are only counted.
const LISTED_MAX: usize = 5;

/// `verdict demo`.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// The tape
    #[command(flatten)]
    pub tape: TapeArgs,
    /// Shards of the cluster
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub shards: u32,
    /// Kill nobody
    #[arg(long)]
    pub no_kills: bool,
    /// Keep the nodes' data and logs
    #[arg(long)]
    pub keep: bool,
    /// An empty folder for the nodes' data and logs, which are kept there; without it, a temporary one
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// A killing and what followed.
#[derive(Debug)]
struct Kill {
    what: String,
    at: Instant,
    whole_at: Instant,
}

/// Reads while batches settled.
#[derive(Debug, Default)]
struct Reads {
    right: u64,
    /// No answer in time, as it may be while a leader is missing.
    unanswered: u64,
    wrong: Vec<String>,
}

/// What must hold, and whether it does.
#[derive(Debug, Default)]
struct Checks {
    lines: Vec<(bool, String)>,
}

impl Checks {
    fn add(&mut self, holds: bool, claim: impl Into<String>) {
        self.lines.push((holds, claim.into()));
    }

    fn all_hold(&self) -> bool {
        self.lines.iter().all(|(holds, _)| *holds)
    }
}

/// Runs the demo: 0 if everything holds, 1 if not, 130 if it was interrupted.
pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    // The tape is read before anything is started: a broken one costs nothing.
    let book = args.tape.book(TRADES_DEFAULT)?;
    let folder = Folder::make(args.data.as_deref(), args.keep, "verdict-demo-")?;
    let plan = Plan { name: "demo".into(), nodes: NODES, shards: args.shards, ..Plan::default() };
    let mut cluster = Cluster::prepare(folder.path(), plan)?;
    let result = tokio::select! {
        result = tell(&args, &book, &mut cluster, folder.path()) => Ok(result),
        reader = interrupted() => Err(reader),
    };
    cluster.end().await;
    match result {
        Ok(Ok(true)) => {
            folder.tell_if_kept();
            Ok(ExitCode::SUCCESS)
        }
        Ok(Ok(false)) => {
            folder.keep();
            Ok(ExitCode::FAILURE)
        }
        Ok(Err(error)) => {
            crate::err!("{}", cluster.log_tails().trim_end());
            folder.keep();
            Err(error)
        }
        Err(reader) => {
            if reader {
                crate::err!("interrupted: all nodes were ended");
            }
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

/// The whole story. Tells whether everything held.
async fn tell(args: &DemoArgs, book: &Book, cluster: &mut Cluster, folder: &Path) -> anyhow::Result<bool> {
    let addresses: Vec<String> = cluster.addresses().into_iter().map(|node| node.public).collect();
    let client = processes::client(addresses.clone())?;
    let script = Script::new(book);
    let tape = book.tape();
    say(&format!(
        "{}: {} trades of {} between {} users, and {} overdrafts",
        tape.name,
        tape.trades.len(),
        tape.symbol,
        book.needs().len(),
        script.overdrafts()
    ));
    if tape.skipped > 0 {
        say(&format!("{} broken lines were left out", tape.skipped));
    }
    let began = Instant::now();
    cluster.start_all(&client).await.context("start the nodes")?;
    let (addresses, seconds) = (addresses.join(", "), began.elapsed().as_secs_f64());
    say(&format!("three nodes are up after {seconds:.1} s: {addresses}; data in {}", folder.display()));

    let window = (args.tape.window as usize).min(script.count() / 8).max(1);
    fund(&client, book, window).await.context("fund the users")?;
    let accounts = book.accounts();
    let before = Totals::read(&client, &accounts).await?;

    let (run, kills, reads) = settle(args, &client, cluster, &script, window, &before).await?;
    wait_quiet(&client).await?;
    let again = submit_again(&client, &script, &run, window).await;
    wait_quiet(&client).await?;
    let after = Totals::read(&client, &accounts).await?;

    let mut checks = Checks::default();
    check_run(&mut checks, &script, &run);
    check_again(&mut checks, &again);
    check_totals(&mut checks, &before, &after, &reads);
    check_rows(&mut checks, &client, book, &script).await?;
    let status = equal_replicas(&client).await?;
    checks.add(true, "no part is in doubt, no row is held, every decision is confirmed");
    check_hashes(&mut checks, &status);
    print_summary(&run, &kills, &before, &after, &status, &checks);
    Ok(checks.all_hold())
}

/// Settles the script while processes are killed and balances are read.
async fn settle(
    args: &DemoArgs,
    client: &Client,
    cluster: &mut Cluster,
    script: &Script<'_>,
    window: usize,
    before: &Totals,
) -> anyhow::Result<(Run, Vec<Kill>, Reads)> {
    let (gate, limit) = watch::channel(usize::MAX);
    let make = |number: usize, id: &str| script.batch(number, id);
    let work =
        Work { label: "settling", count: script.count(), make: &make, ids: None, gate: Some(limit), window };
    let progress = Progress::new(work.label, script.count() as u64);
    let ended = AtomicBool::new(false);
    let running = async {
        let run = work.run(client, &progress).await;
        ended.store(true, Ordering::Relaxed);
        run
    };
    let killing = async {
        match args.no_kills {
            true => Ok(Vec::new()),
            false => kill_leaders(client, cluster, &progress, script.count(), gate).await,
        }
    };
    let reading = read_meanwhile(client, before, &ended);
    let (run, kills, reads) = tokio::join!(running, killing, reading);
    progress.finish();
    Ok((run, kills?, reads))
}

/// Kills the leader of the coordinator group, and later one that leads a shard. The gate is opened whatever happens: it is
/// dropped at the end.
async fn kill_leaders(
    client: &Client,
    cluster: &mut Cluster,
    progress: &Progress,
    count: usize,
    gate: watch::Sender<usize>,
) -> anyhow::Result<Vec<Kill>> {
    let percent = |percent: usize| (count * percent / 100).max(1);
    let mut kills = Vec::new();

    // While a leader is looked for, the tape may run out of batches: let them flow again before the blow.
    let open = async |limit: usize| {
        gate.send_replace(limit);
        let flowing = progress.done() + percent(FLOWING_PERCENT) as u64;
        // On a tiny tape the gate may already be as far open as it gets.
        wait_done(progress, usize::try_from(flowing).unwrap_or(usize::MAX).min(count).min(limit)).await;
    };

    gate.send_replace(percent(BEFORE_FIRST_KILL_PERCENT));
    wait_done(progress, percent(FIRST_KILL_PERCENT)).await;
    let (first, led) = leader_of(client, 0, cluster.shards()).await?;
    open(percent(BEFORE_SECOND_KILL_PERCENT)).await;
    kills.push(kill(client, cluster, progress, first, format!("it led {}", group_names(&led))).await?);

    wait_done(progress, percent(SECOND_KILL_PERCENT)).await;
    let (second, led) = shard_leader(client, cluster, first).await?;
    open(usize::MAX).await;
    kills.push(kill(client, cluster, progress, second, format!("it led {}", group_names(&led))).await?);
    Ok(kills)
}

/// A node that leads a shard: if it can be, neither the one that was killed before nor the leader of the coordinator group.
async fn shard_leader(
    client: &Client,
    cluster: &Cluster,
    killed_before: u64,
) -> anyhow::Result<(u64, Vec<u32>)> {
    let mut best: Option<(u32, u64, Vec<u32>)> = None;
    for shard in 1..=cluster.shards() {
        let (node, led) = leader_of(client, shard, cluster.shards()).await?;
        let cost = 2 * u32::from(led.contains(&0)) + u32::from(node == killed_before);
        if best.as_ref().is_none_or(|(least, _, _)| cost < *least) {
            best = Some((cost, node, led));
        }
    }
    best.map(|(_, node, led)| (node, led)).context("there are no shards")
}

async fn kill(
    client: &Client,
    cluster: &mut Cluster,
    progress: &Progress,
    node: u64,
    what: String,
) -> anyhow::Result<Kill> {
    let at = Instant::now();
    cluster.kill(node).await?;
    let what = format!("kill -9 of node {node}: {what}");
    progress.say(&what);
    sleep(DOWN).await;
    cluster.start(node)?;
    cluster.wait_whole(client).await.with_context(|| format!("after the {what}"))?;
    progress.say(&format!("node {node} is back after {:.1} s", at.elapsed().as_secs_f64()));
    Ok(Kill { what, at, whole_at: Instant::now() })
}

async fn wait_done(progress: &Progress, count: usize) {
    while progress.done() < count as u64 {
        sleep(Duration::from_millis(2)).await;
    }
}

/// Reads all balances at one position, over and over: they must add up to what they did before.
async fn read_meanwhile(client: &Client, before: &Totals, ended: &AtomicBool) -> Reads {
    let mut reads = Reads::default();
    let rows: Vec<Row> = before.balances.iter().map(|(row, _)| row.clone()).collect();
    if rows.len() > ROWS_PER_READ {
        return reads;
    }
    let client = client.with_timeout(Duration::from_secs(5));
    while !ended.load(Ordering::Relaxed) {
        match Totals::read(&client, &rows).await {
            Ok(totals)
                if totals.assets == before.assets && totals.below_zero_except(TREASURY).next().is_none() =>
            {
                reads.right += 1;
            }
            Ok(totals) => reads.wrong.push(format!("{:?} at position {:?}", totals.assets, totals.positions)),
            Err(_) => reads.unanswered += 1,
        }
        sleep(READ_INTERVAL).await;
    }
    reads
}

/// What came of submitting everything again.
struct Again {
    /// Under the ids under which each item came to its end: numbers whose answer was another one.
    changed: Vec<String>,
    same: usize,
    /// Under fresh ids: the trades alone.
    fresh: SettleReport,
}

async fn submit_again(client: &Client, script: &Script<'_>, run: &Run, window: usize) -> Again {
    // Ids that were given up for fresh ones must stay aborted, too.
    let mut expected: Vec<(usize, Uuid, End)> =
        run.ends.iter().enumerate().map(|(number, (id, end))| (number, *id, end.clone())).collect();
    expected.extend(run.given_up.iter().map(|(number, id, reason)| (*number, *id, End::Aborted(*reason))));
    let ids: Vec<Uuid> = expected.iter().map(|(_, id, _)| *id).collect();
    let make = |place: usize, id: &str| script.batch(expected[place].0, id);
    let work = Work { label: "same ids", count: ids.len(), make: &make, ids: Some(&ids), gate: None, window };
    let ends = run_shown(client, &work).await.ends;
    let differences = expected.iter().zip(&ends).filter(|((_, _, end), (_, now))| end != now);
    let changed: Vec<String> =
        differences.map(|((_, id, end), (_, now))| format!("{id}: {end:?}, then {now:?}")).collect();

    let trades: Vec<usize> =
        (0..script.count()).filter(|number| matches!(script.item(*number), Item::Trade(_))).collect();
    let make = |place: usize, id: &str| script.batch(trades[place], id);
    let work = Work { label: "fresh ids", count: trades.len(), make: &make, ids: None, gate: None, window };
    let fresh = run_shown(client, &work).await.report;
    Again { same: expected.len() - changed.len(), changed, fresh }
}

async fn run_shown(client: &Client, work: &Work<'_>) -> Run {
    let progress = Progress::new(work.label, work.count as u64);
    let run = work.run(client, &progress).await;
    progress.finish();
    run
}

fn check_run(checks: &mut Checks, script: &Script<'_>, run: &Run) {
    let overdrafts = script.overdrafts();
    let trades = script.count() - overdrafts;
    let mut committed = 0;
    let mut refused = 0;
    for (number, (_, end)) in run.ends.iter().enumerate() {
        match (script.item(number), end) {
            (Item::Trade(_), End::Committed(_)) => committed += 1,
            (Item::Overdraft(_), End::Aborted(AbortReason::ShortOfFunds)) => refused += 1,
            (Item::Trade(_) | Item::Overdraft(_), _) => {}
        }
    }
    checks.add(
        run.report.failed == 0,
        format!(
            "every batch has a definite outcome ({} of {})",
            run.report.batches - run.report.failed,
            run.report.batches
        ),
    );
    checks.add(committed == trades, format!("every trade is committed ({committed} of {trades})"));
    let short = reason_name(AbortReason::ShortOfFunds);
    checks.add(
        refused == overdrafts,
        format!("every overdraft is aborted with {short} ({refused} of {overdrafts})"),
    );
}

fn check_again(checks: &mut Checks, again: &Again) {
    let total = again.same + again.changed.len();
    checks.add(
        again.changed.is_empty(),
        format!("submitted again under the same ids: the same answer ({} of {total})", again.same),
    );
    for change in again.changed.iter().take(LISTED_MAX) {
        checks.add(false, change.clone());
    }
    let fresh = &again.fresh;
    checks.add(
        fresh.committed == 0 && fresh.already_settled == fresh.batches,
        format!(
            "submitted again under fresh ids: {} committed, {} of {} trades settled before",
            fresh.committed, fresh.already_settled, fresh.batches
        ),
    );
}

fn check_totals(checks: &mut Checks, before: &Totals, after: &Totals, reads: &Reads) {
    checks.add(before.assets == after.assets, "the total of each asset is unchanged to the last unit");
    checks.add(
        after.assets.values().all(|sum| *sum == 0),
        "and it is 0: what users have came from the treasury",
    );
    let below = after.below_zero_except(TREASURY).count();
    checks.add(below == 0, format!("no balance is below its floor ({} balances)", after.balances.len()));
    let seen = reads.right + reads.wrong.len() as u64;
    if seen == 0 {
        say(
            "not checked: whether all balances add up while batches settle (they don't fit into one read, or it was too quick)",
        );
        return;
    }
    checks.add(
        reads.wrong.is_empty(),
        format!(
            "{seen} reads of all balances while batches settled: each added up ({} had no answer in time)",
            reads.unanswered
        ),
    );
    for wrong in reads.wrong.iter().take(LISTED_MAX) {
        checks.add(false, wrong.clone());
    }
}

/// Every trade's record is there, and nothing of any overdraft.
async fn check_rows(
    checks: &mut Checks,
    client: &Client,
    book: &Book,
    script: &Script<'_>,
) -> anyhow::Result<()> {
    let trades: Vec<Row> = book.trades().iter().map(|trade| book.trade_row(trade)).collect();
    let recorded = count_records(client, &trades).await?;
    checks.add(
        recorded == trades.len(),
        format!("every trade has its record ({recorded} of {})", trades.len()),
    );
    let traces = count_records(client, &script.overdraft_rows()).await?;
    checks.add(traces == 0, format!("no overdraft left a record on another shard ({traces})"));
    Ok(())
}

async fn count_records(client: &Client, rows: &[Row]) -> anyhow::Result<usize> {
    let mut count = 0;
    for rows in rows.chunks(ROWS_PER_READ) {
        let values = client.read(rows.to_vec()).await.context("read records")?.values;
        let kinds = values.into_iter().filter_map(|value| value.value?.kind);
        count += kinds.filter(|kind| matches!(kind, Kind::Record(_))).count();
    }
    Ok(count)
}

fn check_hashes(checks: &mut Checks, status: &StatusResponse) {
    let equal = all_at_one_index(status) && !replicas_differ(status);
    checks.add(equal, "all replicas of each group have the same state hash at the same index");
}

fn print_summary(
    run: &Run,
    kills: &[Kill],
    before: &Totals,
    after: &Totals,
    status: &StatusResponse,
    checks: &Checks,
) {
    crate::out!("\n{}", run.report);
    for kill in kills {
        let at = kill.at.duration_since(run.began).as_secs_f64();
        let pause = run.report.longest_pause(at - PAUSE_BEFORE_KILL, at + PAUSE_AFTER_KILL);
        let pause = pause.map_or("under 0.1 s".to_owned(), |pause| format!("{:.1} s", pause.seconds));
        let whole = kill.whole_at.duration_since(kill.at).as_secs_f64();
        crate::out!(
            "{}, {at:.1} s into the run: {pause} without commits, all replicas back after {whole:.1} s",
            kill.what
        );
    }
    crate::out!("\n{}", totals_table(before, after));
    crate::out!("{}", hashes_table(status).trim_end());
    crate::out!();
    for (holds, claim) in &checks.lines {
        crate::out!("{} {claim}", if *holds { "ok    " } else { "FAILED" });
    }
    crate::out!("\n{}", if checks.all_hold() { "Everything holds." } else { "NOT EVERYTHING HOLDS." });
}

fn hashes_table(status: &StatusResponse) -> String {
    let groups: std::collections::BTreeSet<u32> = replicas(status).map(|(_, group)| group.group_id).collect();
    let mut text = String::new();
    for group in groups {
        let hashes =
            replicas(status).filter(|(_, replica)| replica.group_id == group).map(|(node, replica)| {
                let hash: String = replica.state_hash.chars().take(12).collect();
                format!("node {}: {hash}@{}", node.node_id, replica.state_hash_index)
            });
        text += &format!("{:<12} {}\n", group_name(group), hashes.collect::<Vec<_>>().join("  "));
    }
    text
}

fn say(line: &str) {
    crate::err!("{line}");
}
