//! Nodes are replaced by new ones under load: nothing answered is lost, everything goes on, and an id that was used is refused.

use std::{
    fs,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use verdict_proto::v1::GroupStatus;
use verdict_tests::{
    bank::{Bank, Pace, Shape},
    cluster::{Cluster, replicas_of, run_to_end},
    random::Random,
    wait::eventually,
};

/// A command may take so long.
const DONE_WITHIN: Duration = Duration::from_secs(90);
/// Nothing is in doubt so soon after the load.
const QUIET_WITHIN: Duration = Duration::from_secs(30);
/// Clients see no longer pause: some elections, on a busy machine.
const PAUSE_MAX: Duration = Duration::from_secs(8);
const PACE: Pace =
    Pace { workers: 8, rest: Duration::from_millis(5), readers: 2, reader_rest: Duration::from_millis(50) };

/// `verdict ctl member ...`, by any of the nodes.
fn member(cluster: &Cluster, arguments: &[&str]) -> Output {
    let addresses: Vec<&str> = cluster.nodes().map(|node| cluster.address(node)).collect();
    let connect = addresses.join(",");
    run_to_end(&[&["ctl", "--connect", &connect, "member"], arguments].concat(), DONE_WITHIN)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
fn assert_done(output: &Output) {
    assert!(output.status.success(), "the command failed:\n{}", said(output));
}

#[track_caller]
fn assert_refused(output: &Output, why: &str) {
    let said = said(output);
    assert!(!output.status.success() && said.contains(why), "not refused for {why:?}:\n{said}");
}

/// Waits until each group has exactly these voters, as all its replicas know.
async fn assert_voters(cluster: &Cluster, voters: &[u64]) {
    let as_expected = || async {
        let status = cluster.status().await?;
        for group in 0..=cluster.shards() {
            for (node, replica) in replicas_of(&status, group) {
                if replica.voters != voters {
                    return Err(format!(
                        "on node {node} the voters of group {group} are {:?}",
                        replica.voters
                    ));
                }
            }
        }
        Ok(())
    };
    eventually("the voters are as expected", QUIET_WITHIN, as_expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_node_is_replaced_under_load_and_its_id_is_never_used_again() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let bank = Bank::open(&cluster, "dead", Shape { rich: 4, poor: 2, counters: 2, ballast: 0 }).await;
    let load = bank.load(&cluster, PACE, &mut random);
    bank.commit_more(100).await;
    // The one that leads the coordinators: all that it knew is gone.
    let dead = cluster.leader(0).await;
    cluster.kill9(dead);
    bank.commit_more(50).await;

    let from = Instant::now();
    let left_out = cluster.leave_out(dead);
    cluster.join(4);
    let at = format!("4={}", cluster.address(4));
    let replaced = member(&cluster, &["replace", &dead.to_string(), &at]);
    println!("replaced within {:?}:\n{}", from.elapsed(), said(&replaced));
    assert_done(&replaced);
    let voters: Vec<u64> = (1..=4).filter(|node| *node != dead).collect();
    assert_voters(&cluster, &voters).await;
    bank.commit_more(100).await;
    let pause = bank.longest_gap(0, from, Instant::now());
    assert!(pause < PAUSE_MAX, "no commit for {pause:?} while a node was replaced");
    println!("the longest pause that clients saw was {pause:?}");
    // It may be said again, and then changes nothing.
    assert_done(&member(&cluster, &["replace", &dead.to_string(), &at]));

    // The new node counts: without another one, it is needed for a majority.
    let other = voters[0];
    cluster.kill9(other);
    bank.commit_more(100).await;
    cluster.restart(other);
    cluster.wait_whole().await;

    // The old one comes back on its old disk: it is told so, and stops; nobody else minds.
    cluster.take_in(left_out);
    cluster.restart(dead);
    let (status, _) = cluster.wait_end(dead);
    assert_eq!(status.code(), Some(1), "{}", cluster.log(dead));
    assert!(cluster.log(dead).contains("removed from the cluster"), "{}", cluster.log(dead));
    bank.commit_more(50).await;

    // Nor may another disk have its id, whatever its address.
    fs::remove_dir_all(cluster.data(dead)).expect("the folder of a process that has ended");
    let old = cluster.leave_out(dead);
    cluster.join(dead);
    let fresh = format!("{dead}={}", cluster.address(dead));
    assert_refused(&member(&cluster, &["add", &fresh]), "never used again");
    assert_refused(&member(&cluster, &["replace", &other.to_string(), &fresh]), "never used again");
    drop(old);
    let (status, _) = cluster.wait_end(dead);
    assert_eq!(status.code(), Some(1), "it hears that its id was removed: {}", cluster.log(dead));
    drop(cluster.leave_out(dead));

    bank.commit_more(50).await;
    load.end().await;
    cluster.wait_whole().await;
    assert_voters(&cluster, &voters).await;
    let findings = bank.check(&cluster).await;
    findings.assert_kept();
    println!("{findings:?}");
    cluster.wait_quiet(QUIET_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_is_replaced_in_turn_under_load_and_the_new_ones_stand_alone() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let bank = Bank::open(&cluster, "turn", Shape { rich: 4, poor: 2, counters: 2, ballast: 0 }).await;
    let load = bank.load(&cluster, PACE, &mut random);
    bank.commit_more(50).await;
    let mut gone = Vec::new();
    for (old, new) in [(1u64, 4u64), (2, 5), (3, 6)] {
        let from = Instant::now();
        cluster.join(new);
        // The first one is alive meanwhile, and may lead; the others are dead.
        if old > 1 {
            cluster.kill9(old);
        }
        let left_out = cluster.leave_out(old);
        let replaced =
            member(&cluster, &["replace", &old.to_string(), &format!("{new}={}", cluster.address(new))]);
        println!("node {old} by node {new} within {:?}:\n{}", from.elapsed(), said(&replaced));
        assert_done(&replaced);
        let load = bank.load(&cluster, PACE, &mut random);
        bank.commit_more(50).await;
        load.end().await;
        gone.push(left_out);
    }
    load.end().await;
    assert_voters(&cluster, &[4, 5, 6]).await;
    cluster.wait_quiet(QUIET_WITHIN).await;

    // Alive when it was replaced, it has heard of that, and has ended.
    cluster.take_in(gone.remove(0));
    let (status, _) = cluster.wait_end(1);
    assert_eq!(status.code(), Some(1), "{}", cluster.log(1));
    // All old ones come back together, a majority of what the cluster once was. They decide nothing, and stop.
    for left_out in gone {
        cluster.take_in(left_out);
    }
    for node in 1..=3 {
        cluster.restart(node);
    }
    for node in 1..=3 {
        let (status, _) = cluster.wait_end(node);
        assert_eq!(status.code(), Some(1), "{}", cluster.log(node));
    }
    for node in 1..=3 {
        drop(cluster.leave_out(node));
    }

    // What the new ones know outlives them all: their configurations name nodes that are gone.
    cluster.kill9_all();
    for node in cluster.nodes() {
        cluster.restart(node);
    }
    cluster.wait_whole().await;
    let load = bank.load(&cluster, PACE, &mut random);
    bank.commit_more(50).await;
    load.end().await;
    let findings = bank.check(&cluster).await;
    findings.assert_kept();
    println!("{findings:?}");
    cluster.wait_quiet(QUIET_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_lose_a_quorum_or_let_a_stranger_in_is_refused() {
    let mut cluster = Cluster::start().await;
    cluster.kill9(3);
    let silent = || async {
        let status = cluster.status().await?;
        let heard = |(_, replica): &(u64, &GroupStatus)| replica.silent_voters == [3];
        match (0..=cluster.shards()).all(|group| replicas_of(&status, group).iter().any(heard)) {
            true => Ok(()),
            false => Err("the leaders have not missed node 3 yet".to_owned()),
        }
    };
    eventually("node 3 is missed", QUIET_WITHIN, silent).await;
    // Nodes 1 and 3 would be left, and node 3 is dead.
    assert_refused(&member(&cluster, &["remove", "2"]), "no majority");
    assert_refused(&member(&cluster, &["remove", "9"]), "no node 9");
    assert_refused(
        &member(&cluster, &["replace", "3", &format!("2={}", cluster.address(2))]),
        "a vote already",
    );
    assert_refused(&member(&cluster, &["replace", "3", "4=127.0.0.1:1"]), "doesn't answer");
    let one = cluster.address(1).to_owned();
    assert_refused(&member(&cluster, &["replace", "3", &format!("4={one}")]), "node 1 of cluster");
    // A node of another cluster, and one that was not set up to join.
    join_with(&mut cluster, 4, |text| text.replace("cluster = \"test\"", "cluster = \"other\""));
    let four = format!("4={}", cluster.address(4));
    assert_refused(&member(&cluster, &["replace", "3", &four]), "cluster");
    assert_voters_unchanged(&cluster).await;
    cluster.kill9(4);
    drop(cluster.leave_out(4));
    join_with(&mut cluster, 5, |text| text.replace("join = true", ""));
    let five = format!("5={}", cluster.address(5));
    assert_refused(&member(&cluster, &["replace", "3", &five]), "set up to join");
    cluster.kill9(5);
    drop(cluster.leave_out(5));
    // One that can't have all that the old one had.
    join_with(&mut cluster, 6, |text| text.replace("[shard_replicas]", "[shard_replicas]\n2 = [1, 2]"));
    let six = format!("6={}", cluster.address(6));
    assert_refused(&member(&cluster, &["replace", "3", &six]), "groups [2]");
    assert_voters_unchanged(&cluster).await;
}

async fn assert_voters_unchanged(cluster: &Cluster) {
    let status = cluster.status().await.expect("a status");
    for (node, replica) in (0..=cluster.shards()).flat_map(|group| replicas_of(&status, group)) {
        let known = replica.voters == [1, 2, 3] || (node > 3 && replica.voters.is_empty());
        assert!(known, "node {node}, group {}: {:?}", replica.group_id, replica.voters);
    }
}

/// Starts a node whose configuration is changed before.
fn join_with(cluster: &mut Cluster, node: u64, change: impl Fn(&str) -> String) {
    cluster.join(node);
    cluster.kill9(node);
    let (config, data) = (cluster.config(node).to_owned(), cluster.data(node).to_owned());
    let text = fs::read_to_string(&config).expect("read a configuration");
    let changed = change(&text);
    assert_ne!(changed, text, "the change changes something");
    fs::write(&config, changed).expect("write a configuration");
    remove_folder(&data);
    cluster.restart(node);
    std::thread::sleep(Duration::from_secs(1));
}

fn remove_folder(path: &Path) {
    if path.exists() {
        fs::remove_dir_all(path).expect("the folder of a process that has ended");
    }
}
