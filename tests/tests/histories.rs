//! What concurrent clients see while nodes are killed, paused and restarted is strictly serializable: histories of lists and of
//! accounts, judged by three checks that know nothing of each other (the crate `history`).
//!
//! `VERDICT_HISTORY_SECONDS` makes it longer (`make histories`).

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tonic::transport::Channel;
use verdict_history::{Cell, Fate, Key, List, Recorder, appends, elle, witness};
use verdict_proto::v1::{self, outcome, require::Condition, settlement_client::SettlementClient, value};
use verdict_tests::{
    api::{add, balance_of, batch, commit, kind_of, put, read, require, row, submit},
    cluster::Cluster,
    random::Random,
};

/// Lists that are in use at a time, and how many appends each gets before another takes its place: short ones quickly tell who
/// came first, long ones only cost.
const LISTS: u64 = 8;
const APPENDS_PER_LIST: u64 = 30;
const ACCOUNTS: u64 = 9;
const FUNDS: i128 = 10_000;
const WORKERS: u64 = 10;
/// How long anybody goes on with one transaction.
const ONE_WITHIN: Duration = Duration::from_secs(30);

type Clients = Vec<SettlementClient<Channel>>;

/// What the workers share.
struct Shared<C: Cell> {
    recorder: Recorder<C>,
    rows: Box<dyn Fn(Key) -> v1::Row + Send + Sync>,
    elements: AtomicU64,
    end: AtomicBool,
}

impl<C: Cell> Shared<C> {
    fn new(rows: impl Fn(Key) -> v1::Row + Send + Sync + 'static) -> Arc<Shared<C>> {
        Arc::new(Shared {
            recorder: Recorder::default(),
            rows: Box::new(rows),
            elements: AtomicU64::new(0),
            end: AtomicBool::new(false),
        })
    }

    fn ended(&self) -> bool {
        self.end.load(Ordering::Relaxed)
    }

    fn committed(&self) -> usize {
        self.recorder.history().iter().filter(|one| one.fate == Fate::Committed).count()
    }

    /// Reads keys in one transaction of their own.
    async fn read(
        &self,
        process: u64,
        client: &SettlementClient<Channel>,
        keys: Vec<Key>,
        cell: fn(&v1::RowValue) -> C,
    ) {
        let number = self.recorder.invoke(process, Vec::new());
        let rows: Vec<v1::Row> = keys.iter().map(|key| (self.rows)(*key)).collect();
        let answer = read(client, &rows).await;
        let values = keys.into_iter().zip(answer.values.iter().map(cell)).collect();
        self.recorder.read(number, values, Vec::new());
        self.recorder.complete(number, Fate::Committed, Some(answer.position));
    }

    /// Submits a batch, and goes on until its fate is known: by submitting it again, or by asking for it by its id alone.
    async fn settle(&self, number: usize, clients: &mut Clients, batch: &v1::Batch, random: &mut Random) {
        let began = Instant::now();
        let again = random.below(2) == 0;
        let mut tries = 0;
        while began.elapsed() < ONE_WITHIN {
            let place = random.below(clients.len() as u64) as usize;
            let answer = if tries == 0 || again {
                submit(&mut clients[place], batch).await.ok()
            } else {
                let request = v1::GetBatchRequest {
                    batch_id: batch.id.clone(),
                    abort_if_not_seen: true,
                    wait_ms: 1000,
                };
                let answer = clients[place].get_batch(request).await.ok();
                answer.and_then(|answer| answer.into_inner().outcome?.result)
            };
            match answer {
                Some(outcome::Result::Committed(committed)) => {
                    return self.recorder.complete(number, Fate::Committed, Some(committed.stamp));
                }
                Some(outcome::Result::Aborted(_)) => {
                    return self.recorder.complete(number, Fate::Aborted, None);
                }
                Some(outcome::Result::Undecided(_)) | None => {}
            }
            tries += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("batch {} has no fate after {ONE_WITHIN:?}", batch.id);
    }
}

/// Elements are stored as decimal text, with commas.
fn list_of(value: &v1::RowValue) -> List {
    match kind_of(value) {
        value::Kind::Record(bytes) => {
            let text = String::from_utf8(bytes.to_vec()).expect("we wrote text");
            text.split(',').map(|element| element.parse().expect("we wrote numbers")).collect()
        }
        value::Kind::Absent(_) => List::new(),
        other => panic!("not a list: {other:?}"),
    }
}

fn text_of(list: &List) -> String {
    list.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

/// Reads lists and appends to some of them, on the condition that nobody has changed any of them meanwhile.
async fn append(shared: Arc<Shared<List>>, process: u64, mut clients: Clients, mut random: Random) {
    while !shared.ended() {
        let base = shared.elements.load(Ordering::Relaxed) / (LISTS * APPENDS_PER_LIST) * LISTS;
        let keys: BTreeSet<Key> = (0..=random.below(3)).map(|_| base + random.below(LISTS)).collect();
        let node = random.below(clients.len() as u64) as usize;
        if random.below(3) == 0 {
            shared.read(process, &clients[node], keys.into_iter().collect(), list_of).await;
            continue;
        }
        let number = shared.recorder.invoke(process, Vec::new());
        let rows: Vec<v1::Row> = keys.iter().map(|key| (shared.rows)(*key)).collect();
        let answer = read(&clients[node], &rows).await;
        let (mut reads, mut writes, mut operations) = (Vec::new(), Vec::new(), Vec::new());
        for (place, ((key, row), value)) in keys.iter().zip(&rows).zip(&answer.values).enumerate() {
            let list = list_of(value);
            operations.push(require(row, Condition::Version(value.version)));
            if place == 0 || random.below(2) == 0 {
                let mut longer = list.clone();
                for _ in 0..=random.below(2) {
                    let element = shared.elements.fetch_add(1, Ordering::Relaxed) + 1;
                    longer.push(element);
                    writes.push((*key, element));
                }
                operations.push(put(row, &text_of(&longer)));
            }
            reads.push((*key, list));
        }
        shared.recorder.read(number, reads, writes);
        shared.settle(number, &mut clients, &batch(operations), &mut random).await;
    }
}

/// Moves money between two or three accounts, or reads all of them.
async fn transfer(shared: Arc<Shared<i128>>, process: u64, mut clients: Clients, mut random: Random) {
    while !shared.ended() {
        if random.below(4) == 0 {
            let node = random.below(clients.len() as u64) as usize;
            shared.read(process, &clients[node], (0..ACCOUNTS).collect(), balance_of).await;
            continue;
        }
        let mut writes = BTreeMap::<Key, i128>::new();
        let from = random.below(ACCOUNTS);
        for _ in 0..=random.below(2) {
            let amount = 1 + i128::from(random.below(3000));
            *writes.entry(from).or_default() -= amount;
            *writes.entry((from + 1 + random.below(ACCOUNTS - 1)) % ACCOUNTS).or_default() += amount;
        }
        let mut moved = batch(writes.iter().map(|(key, delta)| add(&(shared.rows)(*key), *delta)).collect());
        moved.zero_sum = true;
        let number = shared.recorder.invoke(process, writes.into_iter().collect());
        shared.settle(number, &mut clients, &moved, &mut random).await;
    }
}

/// Kills, pauses and restarts, one after the other, until the time is up and enough has happened.
async fn disturb(
    cluster: &mut Cluster,
    seconds: u64,
    random: &mut Random,
    enough: impl Fn() -> bool,
) -> BTreeMap<&'static str, u32> {
    let mut faults = BTreeMap::new();
    let began = Instant::now();
    let within = |times: u64| began.elapsed() < Duration::from_secs(seconds * times);
    let mut turn = 0;
    // A busy machine gets more time.
    while within(1) || within(4) && !enough() {
        tokio::time::sleep(Duration::from_millis(700 + random.below(600))).await;
        let group = random.below(u64::from(cluster.shards()) + 1) as u32;
        let node = cluster.leader(group).await;
        let kind = ["leader killed", "leader paused", "leadership moved", "all killed"][turn % 4];
        turn += 1;
        match kind {
            "leader killed" => {
                cluster.kill9(node);
                tokio::time::sleep(Duration::from_millis(300 + random.below(700))).await;
                cluster.restart(node);
            }
            "leader paused" => {
                cluster.freeze(node);
                tokio::time::sleep(Duration::from_millis(500 + random.below(2500))).await;
                cluster.thaw(node);
            }
            "leadership moved" => cluster.move_leader(group, 1 + node % 3).await,
            _ => {
                cluster.kill9_all();
                for node in cluster.nodes() {
                    cluster.restart(node);
                }
            }
        }
        *faults.entry(kind).or_default() += 1;
        cluster.wait_whole().await;
    }
    faults
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_see_under_faults_is_strictly_serializable() {
    let seconds = env::var("VERDICT_HISTORY_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    // A key's shard follows from its number, so that most transactions touch several.
    let names = cluster.partitions("history");
    let partitions = names.clone();
    let rows = move |key: Key| row(&partitions[key as usize % partitions.len()], &format!("list-{key}"));
    let lists = Shared::<List>::new(rows);
    let partitions = names;
    let rows = move |key: Key| row(&partitions[key as usize % partitions.len()], &format!("USD/{key}"));
    let accounts = Shared::<i128>::new(rows);
    let fund = (0..ACCOUNTS).map(|key| add(&(accounts.rows)(key), FUNDS)).collect();
    commit(&cluster.settlement(1), fund).await;

    let mut workers: Vec<JoinHandle<()>> = Vec::new();
    for process in 0..WORKERS {
        let clients = cluster.settlements();
        workers.push(tokio::spawn(append(lists.clone(), process, clients.clone(), random.split())));
        workers.push(tokio::spawn(transfer(accounts.clone(), process, clients, random.split())));
    }
    let enough = || lists.committed() >= 300 && accounts.committed() >= 500;
    let faults = disturb(&mut cluster, seconds, &mut random, enough).await;
    lists.end.store(true, Ordering::Relaxed);
    accounts.end.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.expect("a worker ends without a panic");
    }
    // A last look at everything.
    let client = cluster.settlement(1);
    let used = lists.elements.load(Ordering::Relaxed) / (LISTS * APPENDS_PER_LIST) * LISTS + LISTS;
    for keys in (0..used).collect::<Vec<_>>().chunks(100) {
        lists.read(WORKERS, &client, keys.to_vec(), list_of).await;
    }
    accounts.read(WORKERS, &client, (0..ACCOUNTS).collect(), balance_of).await;
    let lists = lists.recorder.history();
    let accounts = accounts.recorder.history();

    // In case of a violation the history stays, for a longer look (by Elle itself, for example).
    let kept = env::temp_dir().join(format!("verdict-history-{}.jsonl", std::process::id()));
    let inferred = appends::check(&lists).unwrap_or_else(|violations| {
        std::fs::write(&kept, elle::json_lines(&lists)).expect("write the history");
        panic!("{kept:?} is not strictly serializable: {violations:#?}");
    });
    elle::check(&lists).expect("adya finds something where our check finds nothing");
    let (claimed, _) = witness::check(&BTreeMap::new(), &lists).expect("the stamps of the lists hold");
    let start = (0..ACCOUNTS).map(|key| (key, FUNDS)).collect();
    let (money, end) = witness::check(&start, &accounts).expect("the stamps of the accounts hold");
    assert_eq!(end.values().sum::<i128>(), FUNDS * i128::from(ACCOUNTS));
    for one in accounts.iter().filter(|one| one.fate == Fate::Committed) {
        assert!(one.reads.iter().all(|(_, held)| *held >= 0), "below the floor: {one:?}");
    }
    let reads = |wanted: usize| accounts.iter().filter(|one| one.reads.len() == wanted).count();
    println!(
        "{} transactions on lists with {} dependencies, {} of them writers; {} transfers, {} sums; faults: {faults:?}",
        inferred.transactions,
        inferred.dependencies,
        claimed.writers,
        money.writers,
        reads(ACCOUNTS as usize),
    );
    assert!(claimed.writers >= 100 && money.writers >= 200, "too little has happened for a test");
    cluster.wait_quiet(Duration::from_secs(30)).await;
}
