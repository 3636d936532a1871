//! Loss of power, full disks and failed syncs, on real files: each node stands on a disk that forgets what was not synced
//! (`disk/`).
//!
//! `VERDICT_POWER_LOSSES` says how many losses of each kind there are to be; `make power-loss` asks for a hundred.

use std::{
    env,
    time::{Duration, Instant},
};

use verdict_tests::{
    bank::{Bank, Pace, Shape},
    cluster::{Cluster, Settings, leader_in},
    random::Random,
    wait::eventually,
};

/// Losses of each kind, if nobody says otherwise.
const LOSSES: usize = 10;
/// After so many losses all that was settled is checked, and the load begins anew.
const LOSSES_PER_CHECK: usize = 10;
const RESOLVED_WITHIN: Duration = Duration::from_secs(20);

fn settings() -> Settings {
    Settings { layered: true, ..Settings::default() }
}

/// So small that logs are cut, and snapshots made and installed, between two losses.
fn small_snapshots() -> Settings {
    Settings { lines: "snapshot_after_entries = 100\nkeep_entries = 10".into(), ..settings() }
}

fn shape() -> Shape {
    Shape { rich: 4, poor: 2, counters: 1, ballast: 0 }
}

fn pace() -> Pace {
    Pace { workers: 16, rest: Duration::from_millis(2), readers: 1, reader_rest: Duration::from_millis(50) }
}

/// What the losses of one kind came to.
#[derive(Default)]
struct Row {
    losses: usize,
    committed: usize,
    files: u64,
    blocks_kept: u64,
    blocks_lost: u64,
    names_lost: u64,
    whole: Vec<Duration>,
    took: Duration,
}

impl Row {
    fn print(&mut self, kind: &str) {
        self.whole.sort();
        let at = |part: usize| self.whole.get(self.whole.len() * part / 100).or(self.whole.last());
        println!(
            "| {kind} | {} | {} | {} | {} | {} | {} | {:.2?} | {:.2?} | {:.0?} |",
            self.losses,
            self.committed,
            self.files,
            self.blocks_kept,
            self.blocks_lost,
            self.names_lost,
            at(50).copied().unwrap_or_default(),
            self.whole.last().copied().unwrap_or_default(),
            self.took
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_loss_of_power_takes_anything_that_was_answered() {
    let losses = env::var("VERDICT_POWER_LOSSES").ok().map(|count| count.parse().expect("a number"));
    let losses = losses.unwrap_or(LOSSES);
    let mut random = Random::announced();
    let mut table = Vec::new();
    for (kind, count, settings) in [
        ("one node", 1, small_snapshots()),
        ("two nodes", 2, small_snapshots()),
        ("all nodes", 3, small_snapshots()),
        ("all nodes, without snapshots", 3, settings()),
    ] {
        let makes_snapshots = !settings.lines.is_empty();
        let mut row = Row::default();
        let began = Instant::now();
        let mut cluster = Cluster::start_with(settings).await;
        while row.losses < losses {
            lose_and_check(&mut cluster, count, losses, &mut row, &mut random).await;
        }
        if makes_snapshots {
            assert!(
                newest_snapshot(&cluster).await > 0,
                "no snapshot was ever made: this has not tested much"
            );
        }
        row.took = began.elapsed();
        table.push((kind, row));
    }
    println!(
        "| power lost by | losses | batches committed | files torn | blocks kept | blocks lost | names lost | whole again p50 | max | took |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (kind, row) in &mut table {
        row.print(kind);
        assert!(row.blocks_lost > 0, "nothing was ever lost: this has not tested much");
    }
}

/// How far any replica's newest snapshot goes.
async fn newest_snapshot(cluster: &Cluster) -> u64 {
    let status = cluster.status().await.expect("the cluster is whole");
    let groups = status.nodes.iter().flat_map(|node| &node.groups);
    groups.map(|group| group.snapshot_index).max().unwrap_or_default()
}

/// Some losses under one load, then the account of all of it.
async fn lose_and_check(
    cluster: &mut Cluster,
    count: usize,
    losses: usize,
    row: &mut Row,
    random: &mut Random,
) {
    let bank = Bank::open(cluster, &format!("power-{count}-{}", row.losses), shape()).await;
    let load = bank.load(cluster, pace(), random);
    for _ in 0..LOSSES_PER_CHECK.min(losses - row.losses) {
        bank.commit_more(20 + random.below(60) as usize).await;
        tokio::time::sleep(Duration::from_millis(random.below(150))).await;
        let mut nodes: Vec<u64> = cluster.nodes().collect();
        while nodes.len() > count {
            let place = random.below(nodes.len() as u64) as usize;
            nodes.remove(place);
        }
        cluster.lose_power(&nodes, random);
        let began = Instant::now();
        for node in &nodes {
            cluster.restart(*node);
        }
        cluster.wait_whole().await;
        row.whole.push(began.elapsed());
        row.losses += 1;
        cluster.check_layers();
        for node in nodes {
            let lost = cluster.last_loss(node);
            row.files += lost["files"];
            row.blocks_kept += lost["blocks_kept"];
            row.blocks_lost += lost["blocks_lost"];
            row.names_lost += lost["names_lost"];
        }
    }
    bank.commit_more(20).await;
    load.end().await;
    cluster.wait_whole().await;
    let findings = bank.check(cluster).await;
    findings.assert_kept();
    row.committed += findings.committed;
    cluster.wait_quiet(RESOLVED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_sync_fails_or_whose_disk_is_full_stops_and_comes_back_with_all_that_was_answered() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start_with(settings()).await;
    let bank = Bank::open(&cluster, "faults", shape()).await;
    let load = bank.load(&cluster, pace(), &mut random);
    for (node, fault, told) in [
        (1, "fail_sync = 3", "Input/output error"),
        (2, "free_bytes = 20000", "No space left on device"),
        (3, "fail_syncs = true", "Input/output error"),
    ] {
        bank.commit_more(50).await;
        cluster.disk_fault(node, fault);
        let (status, took) = cluster.wait_end(node);
        println!("node {node} with `{fault}`: ended with {status} after {took:?}");
        assert!(!status.success(), "it ended as if all were well");
        let log = cluster.log(node);
        assert!(log.contains("this node has stopped") && log.contains(told), "{log}");
        // The other two go on.
        bank.commit_more(50).await;
        cluster.disk_fault(node, "");
        cluster.lose_power(&[node], &mut random);
        cluster.restart(node);
        cluster.wait_whole().await;
    }
    // All disks are full, then there is room again.
    for node in cluster.nodes() {
        cluster.disk_fault(node, "free_bytes = 50000");
    }
    // Once two have stopped, the third has no quorum, and so nothing more to write.
    let mut stopped = Vec::new();
    let began = Instant::now();
    while stopped.len() < 2 {
        assert!(began.elapsed() < RESOLVED_WITHIN, "only {stopped:?} have stopped");
        tokio::time::sleep(Duration::from_millis(20)).await;
        for node in cluster.nodes() {
            stopped.extend(cluster.has_ended(node).map(|status| (node, status)));
        }
    }
    assert!(stopped.iter().all(|(_, status)| !status.success()), "{stopped:?}");
    for node in cluster.nodes() {
        cluster.disk_fault(node, "");
        if stopped.iter().any(|(ended, _)| *ended == node) {
            cluster.restart(node);
        }
    }
    cluster.wait_whole().await;
    bank.commit_more(50).await;
    // A slow disk is only slow.
    cluster.disk_fault(1, "slow_sync_ms = 40");
    bank.commit_more(50).await;
    cluster.disk_fault(1, "");
    load.end().await;
    cluster.check_layers();
    bank.check(&cluster).await.assert_kept();
    cluster.wait_quiet(RESOLVED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vote_is_synced_by_the_candidate_and_then_by_the_voter_before_there_is_a_leader() {
    const SYNC: Duration = Duration::from_millis(200);
    let mut cluster = Cluster::start_with(Settings { shards: 1, ..settings() }).await;
    for group in 0..=cluster.shards() {
        cluster.move_leader(group, 1).await;
    }
    for node in [2, 3] {
        cluster.disk_fault(node, &format!("slow_sync_ms = {}", SYNC.as_millis()));
    }
    cluster.kill9(1);
    let began = Instant::now();
    let (_, took) = eventually("there is another leader", RESOLVED_WITHIN, || async {
        let status = cluster.status().await?;
        let led = (0..=cluster.shards()).any(|group| leader_in(&status, group).is_some());
        if led { Ok(()) } else { Err("no group has a leader".to_owned()) }
    })
    .await;
    assert!(began.elapsed() >= 2 * SYNC, "elected {took:?} after the kill: somebody voted without a sync");
    println!("elected {took:?} after the kill, with syncs of {SYNC:?}");
}
