//! `kill -9` of any process at any time, then of all at once: nothing answered is lost, nothing stays in doubt.

use std::time::{Duration, Instant};

use verdict_proto::v1::{self, AbortReason, outcome};
use verdict_tests::{
    api::{
        add, assert_aborted, balance_of, batch, get_batch, partition_on, read, row, settle, settlement_at,
        stamp_of,
    },
    cluster::{Cluster, Settings, replicas_of},
    ledger::Ledger,
    random::Random,
    syncs::can_trace,
    wait::eventually,
};

/// In-doubt parts are resolved so soon after a quorum is back.
const RESOLVED_WITHIN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_lost_when_each_process_and_then_all_at_once_are_killed() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "kills", 4).await;
    let load = ledger.load(&cluster, 24, &mut random);
    for node in cluster.nodes() {
        load.settle_more(&ledger, 200).await;
        cluster.kill9(node);
        // The two that are left go on by themselves.
        load.settle_more(&ledger, 200).await;
        cluster.restart(node);
        let whole = cluster.wait_whole().await;
        println!("node {node} was killed; whole again after {whole:?}; {} answers", ledger.answered());
    }
    load.settle_more(&ledger, 200).await;
    cluster.kill9_all();
    for node in cluster.nodes() {
        cluster.restart(node);
    }
    let whole = cluster.wait_whole().await;
    load.settle_more(&ledger, 200).await;
    load.end().await;
    let quiet = cluster.wait_quiet(RESOLVED_WITHIN).await;
    println!("all were killed; whole again after {whole:?}; quiet {quiet:?} after the load");
    let audit = ledger.audit(&cluster).await;
    println!("{audit:?}, calls that ended otherwise: {:?}", ledger.errors());
    assert!(audit.committed >= 1000, "{audit:?}");
    assert_eq!(audit.aborted_otherwise(), 0, "funds suffice and rows are hot only by deltas: {audit:?}");
    cluster.wait_quiet(RESOLVED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_all_are_killed_under_load_everything_in_doubt_is_resolved_within_seconds() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "doubt", 4).await;
    let load = ledger.load(&cluster, 32, &mut random);
    load.settle_more(&ledger, 300).await;
    cluster.kill9_all();
    // Nobody tries again after this: recovery alone must end what was under way.
    load.end().await;
    for node in cluster.nodes() {
        cluster.restart(node);
    }
    let whole = cluster.wait_whole().await;
    let quiet = cluster.wait_quiet(RESOLVED_WITHIN).await;
    println!("whole after {whole:?}, nothing in doubt {quiet:?} later");
    let listed = cluster.admin(2).list_in_doubt(v1::ListInDoubtRequest { limit: 0 }).await;
    let listed = listed.expect("a list").into_inner();
    assert_eq!((listed.parts.len(), listed.unreachable_shards.len()), (0, 0), "{listed:?}");
    let audit = ledger.audit(&cluster).await;
    assert!(audit.answered >= 300, "{audit:?}");
    println!("{audit:?}");
}

/// Shard 2 lives on node 4 alone, all else on nodes 1 to 3.
fn with_a_lonely_shard() -> Settings {
    Settings {
        nodes: 4,
        shards: 2,
        lines: "coordinators = [1, 2, 3]".to_owned(),
        shard_replicas: "1 = [1, 2, 3]\n2 = [4]".to_owned(),
        ..Settings::default()
    }
}

/// A part on shard 1 that has voted YES; shard 2 is down, so there can't be a decision yet.
async fn in_doubt_on_shard_1(cluster: &mut Cluster, rows: &[v1::Row; 2]) -> v1::Batch {
    stamp_of(&settle(&cluster.settlement(1), &batch(vec![add(&rows[0], 5), add(&rows[1], 5)])).await);
    cluster.wait_quiet(RESOLVED_WITHIN).await;
    cluster.kill9(4);
    let mut stuck = batch(vec![add(&rows[0], 1), add(&rows[1], 2)]);
    stuck.timeout_ms = 60_000;
    let (mut client, sent) = (cluster.settlement(2), stuck.clone());
    tokio::spawn(async move { client.submit(v1::SubmitRequest::of(&sent)).await });
    eventually("the part is in doubt", Duration::from_secs(30), || async {
        let parts = cluster.admin(1).list_in_doubt(v1::ListInDoubtRequest { limit: 0 }).await;
        let parts = parts.map_err(|status| status.to_string())?.into_inner().parts;
        let told: Vec<_> =
            parts.iter().map(|part| (part.shard, part.batch_id.as_str(), part.waiting)).collect();
        if told == [(1, stuck.id.as_str(), false)] { Ok(()) } else { Err(format!("{parts:?}")) }
    })
    .await;
    let status = cluster.status().await.expect("a status");
    for (node, replica) in replicas_of(&status, 1) {
        assert_eq!((replica.in_doubt, replica.held_locks), (1, 1), "node {node}: {replica:?}");
    }
    stuck
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_in_doubt_survives_the_death_of_all_and_is_then_resolved_without_the_shard_that_is_down() {
    let mut cluster = Cluster::start_with(with_a_lonely_shard()).await;
    let rows = [partition_on(1, 2, "stuck"), partition_on(2, 2, "stuck")].map(|name| row(&name, "USD"));
    let stuck = in_doubt_on_shard_1(&mut cluster, &rows).await;
    cluster.kill9_all();
    for node in 1..=3 {
        cluster.restart(node);
    }
    // With shard 2 still down nobody can know of its vote: after a little patience it is decided abort.
    let decided = async || {
        eventually("the batch is decided", Duration::from_secs(30), || async {
            match get_batch(&mut cluster.settlement(3), &stuck.id, 1000).await {
                Ok(outcome::Result::Undecided(undecided)) => Err(format!("{undecided:?}")),
                Ok(definite) => Ok(definite),
                Err(status) => Err(status.to_string()),
            }
        })
        .await
        .0
    };
    let led = async || {
        eventually("the groups have leaders", Duration::from_secs(30), || async {
            let status = cluster.status().await?;
            let missing =
                [0, 1].iter().find(|group| verdict_tests::cluster::leader_in(&status, **group).is_none());
            missing.map_or(Ok(()), |group| Err(format!("group {group} has no leader")))
        })
        .await
    };
    led().await;
    let began = Instant::now();
    let outcome = decided().await;
    println!("decided {:?} after there were leaders", began.elapsed());
    assert!(began.elapsed() < RESOLVED_WITHIN, "it took {:?}", began.elapsed());
    assert_aborted(&outcome, AbortReason::Interrupted, None, None);
    cluster.restart(4);
    cluster.wait_whole().await;
    cluster.wait_quiet(RESOLVED_WITHIN).await;
    let held: Vec<i128> = read(&cluster.settlement(4), &rows).await.values.iter().map(balance_of).collect();
    assert_eq!(held, [5, 5], "an aborted batch had an effect");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vote_survives_the_death_of_all_and_then_counts() {
    let mut cluster = Cluster::start_with(with_a_lonely_shard()).await;
    let rows = [partition_on(1, 2, "counts"), partition_on(2, 2, "counts")].map(|name| row(&name, "USD"));
    let stuck = in_doubt_on_shard_1(&mut cluster, &rows).await;
    // No leader changes: the vote of shard 1 is known, and that of shard 2 comes when it is back.
    cluster.restart(4);
    let answer = settle(&cluster.settlement(4), &stuck).await;
    stamp_of(&answer);
    cluster.kill9_all();
    for node in cluster.nodes() {
        cluster.restart(node);
    }
    cluster.wait_whole().await;
    cluster.wait_quiet(RESOLVED_WITHIN).await;
    for node in cluster.nodes() {
        assert_eq!(settle(&cluster.settlement(node), &stuck).await, answer, "answered otherwise before");
        let held = read(&cluster.settlement(node), &rows).await;
        assert_eq!(held.values.iter().map(balance_of).collect::<Vec<_>>(), [6, 7]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_own_disk_lags_behind_the_majority_comes_back_after_its_kill() {
    if let Err(why) = can_trace() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "slow", 2).await;
    cluster.kill9(1);
    cluster.restart_with_slow_syncs(1, Duration::from_millis(150));
    cluster.wait_whole().await;
    for group in 0..=cluster.shards() {
        cluster.move_leader(group, 1).await;
    }
    // The other two are a majority without node 1: what it leads is committed, and applied there, before its own log has it.
    let load = ledger.load(&cluster, 8, &mut random);
    load.settle_more(&ledger, 40).await;
    cluster.kill9(1);
    load.settle_more(&ledger, 40).await;
    cluster.restart(1);
    cluster.wait_whole().await;
    load.settle_more(&ledger, 40).await;
    load.end().await;
    let audit = ledger.audit(&cluster).await;
    assert_eq!(audit.aborted_otherwise(), 0, "{audit:?}");
    cluster.wait_quiet(RESOLVED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_changes_nothing() {
    let mut random = Random::announced();
    let cluster = Cluster::start().await;
    let partitions = cluster.partitions("hang-up");
    let (from, to) = (row(&partitions[0], "USD"), row(&partitions[1], "USD"));
    let count = 40;
    stamp_of(&settle(&cluster.settlement(1), &batch(vec![add(&from, (1 << count) - 1)])).await);

    let mut sent = Vec::new();
    for power in 0..count {
        let transfer = batch(vec![add(&from, -(1 << power)), add(&to, 1 << power)]);
        let mut client = settlement_at(cluster.address(1 + power % 3));
        // The connection stands, so that what follows is the call alone.
        let ask = v1::GetBatchRequest { batch_id: transfer.id.clone(), ..Default::default() };
        client.get_batch(ask).await.expect("an answer");
        let patience = Duration::from_micros(300 + random.below(6000));
        let request = v1::SubmitRequest::of(&transfer);
        let answered = tokio::time::timeout(patience, client.submit(request)).await.is_ok();
        // The call is cancelled, and the connection ends with its only client.
        drop(client);
        sent.push((power, transfer.id, answered));
    }
    let (mut moved, mut settled_unheard) = (0i128, 0);
    for (power, id, answered) in sent {
        let told = eventually("the batch is settled, or was never seen", Duration::from_secs(30), || async {
            match get_batch(&mut cluster.settlement(2), &id, 2000).await {
                Ok(outcome::Result::Undecided(undecided))
                    if undecided.state() != v1::UndecidedState::NotSeen =>
                {
                    Err(format!("{undecided:?}"))
                }
                other => other.map_err(|status| status.to_string()),
            }
        });
        match told.await.0 {
            outcome::Result::Committed(_) => {
                moved += 1 << power;
                settled_unheard += u32::from(!answered);
            }
            outcome::Result::Undecided(_) => assert!(!answered, "{id} was answered and is forgotten"),
            outcome::Result::Aborted(aborted) => panic!("hanging up aborted {id}: {aborted:?}"),
        }
    }
    println!("{settled_unheard} of {count} settled although nobody waited any more");
    assert!(settled_unheard >= 3, "hardly anybody hung up in time: the test has not tested much");
    let held = read(&cluster.settlement(3), &[from, to]).await;
    let held: Vec<i128> = held.values.iter().map(balance_of).collect();
    assert_eq!(held, [(1 << count) - 1 - moved, moved]);
    cluster.wait_quiet(RESOLVED_WITHIN).await;
}
