//! A load that looks like trading, and everything that it was told, for [`promises`](crate::promises) to judge.
//!
//! Workers settle one batch after the other, each under one id until there is a definite answer: transfers between shards and inside
//! one, trades that all pay a fee into one hot account and insert their record, debits from poor accounts that are often short of
//! funds, counters that are raised only from the value that was seen, and records that change only while one on another shard is as it
//! was seen. Readers read all of it at one position, again and again. [`Bank::check`] then asks for the end of everything.
//!
//! It works on any cluster that it can reach ([`Nodes`]), whatever is done to it meanwhile.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use verdict_proto::v1::{
    self, AbortReason, outcome, require::Condition, settlement_client::SettlementClient, value,
};

use crate::{
    api::{
        add, batch, insert, kind_of, may_be_tried_again, partition_on, put, read, require, row,
        says_nothing_was_proposed, settle, shard_of, stamp_of, submit,
    },
    cluster::Cluster,
    promises::{Held, Notes, Reading, RowKey, Sent, Step, Violation, judge},
    random::Random,
};

/// What a rich account is given: more than it could ever lose.
const RICH: i128 = 1_000_000_000;
/// What a poor account is given.
const POOR: i128 = 40;
/// How long one try may take before it is given up and the id is sent again.
const TRY_WITHIN: Duration = Duration::from_secs(5);
/// How long there may be no end of one id, once the load has ended.
const END_WITHIN: Duration = Duration::from_secs(30);
/// The pause before an id is sent again.
const AGAIN: Duration = Duration::from_millis(15);
/// Questions that are asked at a time.
const QUESTIONS: usize = 32;
/// Rows that are asked for at a time.
const ROWS: usize = 500;

/// What there is, on each shard.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Accounts that never run out.
    pub rich: usize,
    /// Accounts that are often short.
    pub poor: usize,
    /// Counters.
    pub counters: usize,
    /// Records of 16 KiB that nobody changes: they make snapshots large.
    pub ballast: usize,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { rich: 4, poor: 2, counters: 2, ballast: 0 }
    }
}

/// How hard it is used.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Workers, each with one batch under way.
    pub workers: usize,
    /// How long a worker rests after each batch.
    pub rest: Duration,
    /// Readers, each with one read under way.
    pub readers: usize,
    /// How long a reader rests after each read.
    pub reader_rest: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        let (rest, reader_rest) = (Duration::from_millis(5), Duration::from_millis(25));
        Pace { workers: 16, rest, readers: 2, reader_rest }
    }
}

/// A cluster, as a load needs it.
pub trait Nodes {
    /// How many shards there are.
    fn shards(&self) -> u32;

    /// A way to each node.
    fn settlements(&self) -> Vec<SettlementClient<Channel>>;
}

impl Nodes for Cluster {
    fn shards(&self) -> u32 {
        Cluster::shards(self)
    }

    fn settlements(&self) -> Vec<SettlementClient<Channel>> {
        Cluster::settlements(self)
    }
}

/// The rows of the load and everything about it that was sent and told.
#[derive(Debug)]
pub struct Bank {
    shards: u32,
    rich: Vec<RowKey>,
    poor: Vec<RowKey>,
    fees: RowKey,
    counters: Vec<RowKey>,
    /// All of the above.
    rows: Arc<Vec<RowKey>>,
    /// What each counter was last seen to hold.
    seen: Vec<Mutex<String>>,
    trades: AtomicU64,
    tag: String,
    notes: Mutex<Notes>,
    /// When commits were answered, and the shards that they touched, as bits.
    commits: Mutex<Vec<(Instant, u64)>>,
    errors: Mutex<BTreeMap<String, u64>>,
}

/// Workers and readers that go on until they are ended.
#[derive(Debug)]
pub struct BankLoad {
    end: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

/// What everything has come to.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Batches that were sent.
    pub sent: usize,
    /// Those that are committed.
    pub committed: usize,
    /// Those that are aborted, by reason.
    pub aborted: BTreeMap<&'static str, usize>,
    /// Those that nobody had heard a definite answer about while the load ran: resolved by id.
    pub resolved_by_id: usize,
    /// Strict reads.
    pub readings: usize,
    /// What tries ended with instead of a definite answer, and how often.
    pub errors: BTreeMap<String, u64>,
    /// Promises that were not kept.
    pub violations: Vec<Violation>,
}

impl Findings {
    /// Fails if a promise was not kept.
    pub fn assert_kept(&self) {
        let told: Vec<String> = self.violations.iter().map(ToString::to_string).collect();
        assert!(told.is_empty(), "promises were not kept:\n{}", told.join("\n"));
    }
}

fn key(row: &v1::Row) -> RowKey {
    (row.partition.as_str().into(), row.name.as_str().into())
}

fn wire(key: &RowKey) -> v1::Row {
    row(&key.0, &key.1)
}

fn operation(step: &Step) -> v1::Operation {
    let row = wire(step.row());
    match step {
        Step::Add(_, delta) => add(&row, *delta),
        Step::Insert(_, value) => insert(&row, value),
        Step::Put(_, value) => put(&row, value),
        Step::Equals(_, value) => require(&row, Condition::Value(Bytes::copy_from_slice(value.as_bytes()))),
    }
}

fn held(value: &v1::RowValue) -> Held {
    match kind_of(value) {
        value::Kind::Balance(text) => Held::Balance(text.parse().expect("a balance is a decimal integer")),
        value::Kind::Record(bytes) => Held::Record(String::from_utf8_lossy(&bytes).into_owned()),
        value::Kind::Absent(_) => Held::Absent,
        value::Kind::Version(_) => unreachable!("no row holds a version"),
    }
}

impl Bank {
    /// Makes the rows and funds them. Several banks on one cluster need different tags.
    pub async fn open(cluster: &impl Nodes, tag: &str, shape: Shape) -> Arc<Bank> {
        let shards = cluster.shards();
        let on_each = |kind: &str, count: usize, name: &str| -> Vec<RowKey> {
            let names = (1..=shards).flat_map(|shard| (0..count).map(move |number| (shard, number)));
            let rows = names.map(|(shard, number)| {
                key(&row(&partition_on(shard, shards, &format!("{tag}-{kind}-{shard}-{number}")), name))
            });
            rows.collect()
        };
        let (rich, poor) = (on_each("rich", shape.rich, "USD"), on_each("poor", shape.poor, "USD"));
        let counters = on_each("counter", shape.counters, "count");
        let fees = key(&row(&partition_on(1, shards, &format!("{tag}-fees")), "USD"));
        let rows = rich.iter().chain(&poor).chain([&fees]).chain(&counters).cloned().collect();
        let bank = Bank {
            shards,
            seen: counters.iter().map(|_| Mutex::new("0".to_owned())).collect(),
            rich,
            poor,
            fees,
            counters,
            rows: Arc::new(rows),
            trades: AtomicU64::new(0),
            tag: tag.to_owned(),
            notes: Mutex::default(),
            commits: Mutex::default(),
            errors: Mutex::default(),
        };
        bank.fund(cluster, on_each("ballast", shape.ballast, "bytes")).await;
        Arc::new(bank)
    }

    async fn fund(&self, cluster: &impl Nodes, ballast: Vec<RowKey>) {
        let funds = self.rich.iter().map(|row| Step::Add(row.clone(), RICH));
        let funds = funds.chain(self.poor.iter().map(|row| Step::Add(row.clone(), POOR)));
        let steps: Vec<Step> =
            funds.chain(self.counters.iter().map(|row| Step::Put(row.clone(), "0".to_owned()))).collect();
        let client = cluster.settlements().swap_remove(0);
        let sent = batch(steps.iter().map(operation).collect());
        let began = Instant::now();
        let answer = settle(&client, &sent).await;
        stamp_of(&answer);
        let answer = Some((Instant::now(), answer));
        lock(&self.notes).sent.insert(sent.id, Sent { began, steps, answer, given_up: false });
        let weight = "ballast ".repeat(2048);
        for some in ballast.chunks(16) {
            let puts = some.iter().map(|key| put(&wire(key), &weight)).collect();
            stamp_of(&settle(&client, &batch(puts)).await);
        }
    }

    /// Starts workers and readers.
    pub fn load(self: &Arc<Bank>, cluster: &impl Nodes, pace: Pace, random: &mut Random) -> BankLoad {
        let end = Arc::new(AtomicBool::new(false));
        let worker = |_| {
            let (bank, end, random) = (self.clone(), end.clone(), random.split());
            tokio::spawn(bank.work(cluster.settlements(), end, random, pace.rest))
        };
        let mut tasks: Vec<_> = (0..pace.workers).map(worker).collect();
        let reader = |place: usize| {
            let nodes = cluster.settlements();
            let client = nodes[place % nodes.len()].clone();
            tokio::spawn(self.clone().look(client, end.clone(), pace.reader_rest))
        };
        tasks.extend((0..pace.readers).map(reader));
        BankLoad { end, tasks }
    }

    /// Commits that were answered so far.
    pub fn commits(&self) -> usize {
        lock(&self.commits).len()
    }

    /// Waits until so many more commits were answered.
    pub async fn commit_more(&self, count: usize) {
        let target = self.commits() + count;
        let enough = || async {
            let commits = self.commits();
            if commits >= target { Ok(()) } else { Err(format!("{commits} of {target} commits")) }
        };
        crate::wait::eventually("the load goes on", END_WITHIN, enough).await;
    }

    /// Commits that touch a shard (0: any) and were answered after `from`.
    pub fn commits_since(&self, shard: u32, from: Instant) -> usize {
        let commits = lock(&self.commits);
        commits.iter().rev().take_while(|(at, _)| *at > from).filter(|(_, on)| touches(*on, shard)).count()
    }

    /// The longest time between `from` and `to` in which no commit that touches a shard (0: any) was answered.
    pub fn longest_gap(&self, shard: u32, from: Instant, to: Instant) -> Duration {
        let commits = lock(&self.commits);
        let mut times: Vec<Instant> = commits
            .iter()
            .filter(|(at, on)| (from..=to).contains(at) && touches(*on, shard))
            .map(|(at, _)| *at)
            .collect();
        drop(commits);
        times.sort();
        let ends = times.iter().copied().chain([to]);
        let begins = [from].into_iter().chain(times.iter().copied());
        begins.zip(ends).map(|(begin, end)| end - begin).max().unwrap_or_default()
    }

    async fn work(
        self: Arc<Bank>,
        mut clients: Vec<SettlementClient<Channel>>,
        end: Arc<AtomicBool>,
        mut random: Random,
        rest: Duration,
    ) {
        let nodes = clients.len() as u64;
        while !end.load(Ordering::Relaxed) {
            let steps = self.choose(&mut random);
            let sent = self.noted(steps);
            let mut maybe_proposed = false;
            while !end.load(Ordering::Relaxed) {
                let client = &mut clients[random.below(nodes) as usize];
                match tokio::time::timeout(TRY_WITHIN, submit(client, &sent)).await {
                    Ok(Ok(outcome::Result::Undecided(_))) => {
                        maybe_proposed = true;
                        self.count_error("undecided");
                    }
                    Ok(Ok(definite)) => {
                        self.answered(&sent.id, definite);
                        break;
                    }
                    Ok(Err(status)) => {
                        assert!(may_be_tried_again(&status), "a good batch was refused: {status}");
                        self.count_error(&format!("{:?}", status.code()));
                        maybe_proposed |= !says_nothing_was_proposed(&status);
                        // Every other one is believed, and settled under another id, so to say.
                        if !maybe_proposed && sent.id.ends_with(['0', '2', '4', '6', '8', 'a', 'c', 'e']) {
                            self.given_up(&sent.id);
                            break;
                        }
                    }
                    Err(_) => {
                        maybe_proposed = true;
                        self.count_error("no answer");
                    }
                }
                tokio::time::sleep(AGAIN).await;
            }
            tokio::time::sleep(rest).await;
        }
    }

    /// Notes a batch that is about to be sent.
    pub fn noted(&self, steps: Vec<Step>) -> v1::Batch {
        let sent = batch(steps.iter().map(operation).collect());
        let began = Instant::now();
        lock(&self.notes).sent.insert(sent.id.clone(), Sent { began, steps, answer: None, given_up: false });
        sent
    }

    /// Notes that a batch is sent no more, and that each time the answer was that nothing was proposed.
    pub fn given_up(&self, id: &str) {
        lock(&self.notes).sent.get_mut(id).expect("it was noted before it was sent").given_up = true;
    }

    /// Chooses what to settle next.
    pub fn choose(&self, random: &mut Random) -> Vec<Step> {
        match random.below(100) {
            0..40 => self.transfer(&self.rich, 100, random),
            40..60 => self.trade(random),
            60..75 => self.transfer(&self.poor, 30, random),
            75..85 => self.count(random),
            85..93 => self.count_if(random),
            _ => self.transfer_on_one_shard(random),
        }
    }

    fn transfer(&self, accounts: &[RowKey], amount_max: u64, random: &mut Random) -> Vec<Step> {
        let (from, to) = two(accounts.len(), random);
        let amount = 1 + i128::from(random.below(amount_max));
        vec![Step::Add(accounts[from].clone(), -amount), Step::Add(accounts[to].clone(), amount)]
    }

    fn transfer_on_one_shard(&self, random: &mut Random) -> Vec<Step> {
        let each = self.rich.len() / self.shards as usize;
        let shard = random.below(u64::from(self.shards)) as usize;
        self.transfer(&self.rich[shard * each..(shard + 1) * each], 100, random)
    }

    fn trade(&self, random: &mut Random) -> Vec<Step> {
        let number = self.trades.fetch_add(1, Ordering::Relaxed);
        let trade: RowKey = (format!("{}-trade:{number}", self.tag).into(), "trade".into());
        let (buyer, seller) = two(self.rich.len(), random);
        let amount = 2 + i128::from(random.below(1000));
        vec![
            Step::Add(self.rich[buyer].clone(), -amount),
            Step::Add(self.rich[seller].clone(), amount - 1),
            Step::Add(self.fees.clone(), 1),
            Step::Insert(trade, format!("{amount} from {buyer} to {seller}")),
        ]
    }

    /// Raises a counter from the value that was seen.
    fn count(&self, random: &mut Random) -> Vec<Step> {
        let place = random.below(self.counters.len() as u64) as usize;
        let row = &self.counters[place];
        let from = lock(&self.seen[place]).clone();
        vec![Step::Equals(row.clone(), from), Step::Put(row.clone(), random.number().to_string())]
    }

    /// Writes a counter only if another one is as it was seen: two of these may not both see the old state of the other.
    fn count_if(&self, random: &mut Random) -> Vec<Step> {
        let (condition, change) = two(self.counters.len(), random);
        let seen = lock(&self.seen[condition]).clone();
        vec![
            Step::Equals(self.counters[condition].clone(), seen),
            Step::Put(self.counters[change].clone(), random.number().to_string()),
        ]
    }

    /// Notes the first definite answer about a batch.
    pub fn answered(&self, id: &str, outcome: outcome::Result) {
        let at = Instant::now();
        let mut notes = lock(&self.notes);
        let sent = notes.sent.get_mut(id).expect("it was noted before it was sent");
        match &outcome {
            outcome::Result::Committed(_) => {
                let on = sent.steps.iter().fold(0, |on, step| on | self.bit(step.row()));
                lock(&self.commits).push((at, on));
                for step in &sent.steps {
                    if let Step::Put(row, value) = step {
                        self.saw(row, value);
                    }
                }
            }
            // What a condition met is what the counter holds.
            outcome::Result::Aborted(aborted) if aborted.reason() == AbortReason::ConditionNotMet => {
                let step = aborted.operation.and_then(|place| sent.steps.get(place as usize));
                let met = aborted.met.as_ref().and_then(|met| met.kind.as_ref());
                if let (Some(step), Some(value::Kind::Record(record))) = (step, met) {
                    self.saw(step.row(), &String::from_utf8_lossy(record));
                }
            }
            _ => {}
        }
        sent.answer = Some((at, outcome));
    }

    fn saw(&self, row: &RowKey, value: &str) {
        if let Some(place) = self.counters.iter().position(|counter| counter == row) {
            value.clone_into(&mut lock(&self.seen[place]));
        }
    }

    fn bit(&self, row: &RowKey) -> u64 {
        1 << shard_of(&row.0, self.shards).min(63)
    }

    async fn look(
        self: Arc<Bank>,
        mut client: SettlementClient<Channel>,
        end: Arc<AtomicBool>,
        rest: Duration,
    ) {
        let rows: Vec<v1::Row> = self.rows.iter().map(wire).collect();
        while !end.load(Ordering::Relaxed) {
            let began = Instant::now();
            let request = v1::ReadRequest { rows: rows.clone() };
            match tokio::time::timeout(TRY_WITHIN, client.read(request)).await {
                Ok(Ok(answer)) => {
                    let answer = answer.into_inner();
                    let told: Vec<_> = answer.values.iter().filter_map(|value| value.row.clone()).collect();
                    assert_eq!(told, rows, "the values are of other rows than those that were asked for");
                    let reading = Reading {
                        began,
                        ended: Instant::now(),
                        position: answer.position,
                        rows: self.rows.clone(),
                        held: answer.values.iter().map(held).collect(),
                    };
                    lock(&self.notes).readings.push(reading);
                }
                Ok(Err(status)) => assert!(may_be_tried_again(&status), "a good read was refused: {status}"),
                Err(_) => {}
            }
            tokio::time::sleep(rest).await;
        }
    }

    /// Asks for the end of everything, and judges. The load must have ended, and the cluster must be able to answer.
    pub async fn check(&self, cluster: &impl Nodes) -> Findings {
        let notes = lock(&self.notes).clone();
        let outcomes = final_outcomes(&cluster.settlements(), notes.sent.keys().cloned()).await;
        let last = self.final_rows(&cluster.settlements()[0], &notes).await;
        let mut findings = Findings {
            sent: notes.sent.len(),
            readings: notes.readings.len(),
            resolved_by_id: notes.sent.values().filter(|sent| sent.answer.is_none()).count(),
            errors: lock(&self.errors).clone(),
            violations: judge(&notes, &outcomes, &last),
            ..Findings::default()
        };
        for outcome in outcomes.values() {
            match outcome {
                outcome::Result::Committed(_) => findings.committed += 1,
                outcome::Result::Aborted(aborted) => {
                    *findings.aborted.entry(aborted.reason().as_str_name()).or_default() += 1;
                }
                outcome::Result::Undecided(_) => {}
            }
        }
        findings
    }

    /// Every row that any batch would have changed.
    async fn final_rows(&self, client: &SettlementClient<Channel>, notes: &Notes) -> BTreeMap<RowKey, Held> {
        let steps = notes.sent.values().flat_map(|sent| &sent.steps);
        let rows: std::collections::BTreeSet<RowKey> = steps.map(|step| step.row().clone()).collect();
        let rows: Vec<RowKey> = rows.into_iter().collect();
        let mut last = BTreeMap::new();
        for some in rows.chunks(ROWS) {
            let asked: Vec<v1::Row> = some.iter().map(wire).collect();
            let answer = read(client, &asked).await;
            last.extend(some.iter().cloned().zip(answer.values.iter().map(held)));
        }
        last
    }

    fn count_error(&self, what: &str) {
        *lock(&self.errors).entry(what.to_owned()).or_default() += 1;
    }
}

impl BankLoad {
    /// Ends all, and leaves open what is under way. One that has panicked is the test's failure.
    pub async fn end(self) {
        self.end.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a worker ends without a panic");
        }
    }
}

/// The outcome of every id, at one node after the other; if there is no trace of one, its abort. One that has no end is left out.
async fn final_outcomes(
    clients: &[SettlementClient<Channel>],
    ids: impl Iterator<Item = String>,
) -> BTreeMap<String, outcome::Result> {
    let questions = ids.enumerate().map(|(place, id)| {
        let client = clients[place % clients.len()].clone();
        async move { Some((id.clone(), final_outcome(client, &id).await?)) }
    });
    stream::iter(questions).buffer_unordered(QUESTIONS).filter_map(std::future::ready).collect().await
}

async fn final_outcome(mut client: SettlementClient<Channel>, id: &str) -> Option<outcome::Result> {
    let began = Instant::now();
    while began.elapsed() < END_WITHIN {
        let request = v1::GetBatchRequest { batch_id: id.to_owned(), abort_if_not_seen: true, wait_ms: 5000 };
        if let Ok(answer) = client.get_batch(request).await {
            let outcome = answer.into_inner().outcome.expect("an answer has an outcome");
            assert_eq!(outcome.batch_id, id, "the answer is about another batch");
            match outcome.result {
                Some(outcome::Result::Undecided(_)) | None => {}
                definite => return definite,
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
    None
}

/// Two different places.
fn two(count: usize, random: &mut Random) -> (usize, usize) {
    let first = random.below(count as u64) as usize;
    (first, (first + 1 + random.below(count as u64 - 1) as usize) % count)
}

fn touches(on: u64, shard: u32) -> bool {
    shard == 0 || on & (1 << shard.min(63)) != 0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}
