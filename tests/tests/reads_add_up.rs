//! Reads across shards see whole batches only, in one order, and never an older state than one that was already answered.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinHandle;
use tonic::transport::Channel;
use verdict_proto::v1::{self, settlement_client::SettlementClient};
use verdict_tests::{
    api::{add, balance_of, batch, history, kind_of, put, read, record, row, settle, stamp_of},
    cluster::Cluster,
    ledger::Ledger,
    random::Random,
};

/// Readers, each at one node.
struct Readers {
    end: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<u64>>,
}

impl Readers {
    fn start(cluster: &Cluster, ledger: &Arc<Ledger>) -> Readers {
        let end = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(AtomicU64::new(0));
        let readers = cluster
            .settlements()
            .into_iter()
            .map(|client| tokio::spawn(read_until(client, ledger.clone(), end.clone(), seen.clone())));
        Readers { tasks: readers.collect(), end }
    }

    /// How many reads there were. One that didn't add up is the test's failure.
    async fn end(self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        let mut count = 0;
        for task in self.tasks {
            count += task.await.expect("a reader ends without a panic");
        }
        count
    }
}

/// Reads all accounts again and again. `seen` is the greatest position that any reader was answered.
async fn read_until(
    client: SettlementClient<Channel>,
    ledger: Arc<Ledger>,
    end: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
) -> u64 {
    let mut count = 0;
    let mut versions = vec![0; ledger.accounts().len()];
    while !end.load(Ordering::Relaxed) {
        let before = seen.load(Ordering::SeqCst);
        let answer = read(&client, ledger.accounts()).await;
        seen.fetch_max(answer.position, Ordering::SeqCst);
        let held: Vec<i128> = answer.values.iter().map(balance_of).collect();
        assert_eq!(held.iter().sum::<i128>(), ledger.total(), "at {}: {held:?}", answer.position);
        assert!(held.iter().all(|amount| *amount >= 0), "below the floor: {held:?}");
        assert!(
            answer.position >= before,
            "the position went back from {before}, which was answered, to {}",
            answer.position
        );
        for (value, version) in answer.values.iter().zip(&mut versions) {
            assert!(value.version <= answer.position, "{value:?} is newer than the position");
            assert!(value.version >= *version, "{value:?} went back from version {version}");
            *version = value.version;
        }
        count += 1;
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_across_shards_add_up_and_never_go_back_while_leaders_are_killed() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "sum", 4).await;
    let load = ledger.load(&cluster, 12, &mut random);
    let readers = Readers::start(&cluster, &ledger);
    load.settle_more(&ledger, 300).await;
    for group in [0, 1] {
        let leader = cluster.leader(group).await;
        cluster.kill9(leader);
        load.settle_more(&ledger, 150).await;
        cluster.restart(leader);
        cluster.wait_whole().await;
        load.settle_more(&ledger, 150).await;
    }
    load.end().await;
    let reads = readers.end().await;
    println!("{} transfers answered, {reads} reads", ledger.answered());
    assert!(reads >= 100, "only {reads} reads: the test has not tested much");
    let audit = ledger.audit(&cluster).await;
    assert!(audit.committed >= 500, "{audit:?}");
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_seen_at_once_at_every_other_node() {
    let cluster = Cluster::start().await;
    let clients = cluster.settlements();
    let partitions = cluster.partitions("seen");
    let rows: Vec<v1::Row> = partitions.iter().map(|partition| row(partition, "note")).collect();
    let mut last = 0;
    for round in 0..60 {
        let (writer, reader) = (round % 3, (round + 1 + round / 3 % 2) % 3);
        assert_ne!(writer, reader, "the test reads where it wrote");
        let text = format!("round {round}");
        let write = batch(rows.iter().map(|row| put(row, &text)).collect());
        let stamp = stamp_of(&settle(&clients[writer], &write).await);
        assert!(stamp > last, "the stamp went back from {last} to {stamp}");
        let answer = read(&clients[reader], &rows).await;
        assert!(answer.position >= stamp, "read at {}, before {stamp}", answer.position);
        for value in &answer.values {
            assert_eq!((kind_of(value), value.version), (record(&text), stamp), "{value:?}");
        }
        last = answer.position;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_agrees_with_the_values_read_at_a_position() {
    let mut random = Random::announced();
    let cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "history", 1).await;
    let load = ledger.load(&cluster, 6, &mut random);
    let mut readings = Vec::new();
    for node in [1, 2, 3, 1, 2, 3] {
        load.settle_more(&ledger, 15).await;
        readings.push(read(&cluster.settlement(node), ledger.accounts()).await);
    }
    // During the load too.
    compare(&cluster, &ledger, &readings).await;
    load.end().await;
    cluster.wait_quiet(Duration::from_secs(30)).await;
    readings.push(read(&cluster.settlement(1), ledger.accounts()).await);
    compare(&cluster, &ledger, &readings).await;

    // A transfer shows under the same stamp on both sides, which is that of the answer.
    let mut sides: BTreeMap<String, Vec<(u64, i128)>> = BTreeMap::new();
    for account in ledger.accounts() {
        for entry in history(&cluster.settlement(2), account).await.1 {
            let Some(v1::history_entry::Change::Delta(delta)) = &entry.change else { panic!("{entry:?}") };
            let delta: i128 = delta.parse().expect("a delta is a decimal integer");
            sides.entry(entry.batch_id).or_default().push((entry.stamp, delta));
        }
    }
    let funding = sides.values().filter(|sides| sides.len() == ledger.accounts().len()).count();
    assert_eq!(funding, 1, "one batch has funded all accounts");
    for (id, sides) in sides.iter().filter(|(_, sides)| sides.len() != ledger.accounts().len()) {
        let [(stamp, delta), (other_stamp, other_delta)] = sides[..] else {
            panic!("{id} is half: {sides:?}")
        };
        assert_eq!((stamp, delta), (other_stamp, -other_delta), "the sides of {id} differ");
    }
    let one = add(&ledger.accounts()[0], 1);
    let last = batch(vec![one]);
    let stamp = stamp_of(&settle(&cluster.settlement(3), &last).await);
    let (position, entries) = history(&cluster.settlement(1), &ledger.accounts()[0]).await;
    let newest = entries.last().expect("a history");
    assert_eq!((newest.batch_id.as_str(), newest.stamp), (last.id.as_str(), stamp));
    assert!(position >= stamp, "complete up to {position} only");
}

/// The last change at or below each position has left what was read there.
async fn compare(cluster: &Cluster, ledger: &Ledger, readings: &[v1::ReadResponse]) {
    for (place, account) in ledger.accounts().iter().enumerate() {
        let (position, entries) = history(&cluster.settlement(1 + place as u64 % 3), account).await;
        assert!(entries.is_sorted_by_key(|entry| entry.stamp), "the history isn't in order");
        let mut sum = 0;
        for entry in &entries {
            let Some(v1::history_entry::Change::Delta(delta)) = &entry.change else { panic!("{entry:?}") };
            sum += delta.parse::<i128>().expect("a delta is a decimal integer");
            let result = entry.result.clone().and_then(|value| value.kind).expect("a result");
            assert_eq!(result, verdict_tests::api::balance(sum), "{entry:?}");
        }
        for reading in readings {
            assert!(position >= reading.position, "the history ends before what was read");
            let value = &reading.values[place];
            let last = entries.iter().rfind(|entry| entry.stamp <= reading.position);
            let last = last.expect("every account was funded before the first reading");
            assert_eq!(last.stamp, value.version, "at {}", reading.position);
            let result = last.result.clone().and_then(|value| value.kind).expect("a result");
            assert_eq!(result, kind_of(value), "at {}", reading.position);
        }
    }
}
