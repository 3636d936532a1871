//! No batch is answered before a majority of the disks it needs was synced: once for the votes, once more for the decision.

use std::time::Duration;

use tonic::Request;
use verdict_proto::v1::{self, outcome};
use verdict_tests::{
    api::{add, balance_of, batch, get_batch, read, row, settle, stamp_of, submit},
    cluster::{Cluster, Settings},
    syncs::{Sync, can_trace, now, parse, voted_then_decided},
    wait::eventually,
};

/// Lone batches whose syncs are looked at.
const BATCHES: usize = 15;
/// So long a frozen majority is watched.
const FROZEN: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_after_two_syncs_in_a_row_on_a_majority_of_disks() {
    if let Err(why) = can_trace() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    let cluster = Cluster::start_with(Settings { traced: true, ..Settings::default() }).await;
    let partitions = cluster.partitions("synced");
    let rows: Vec<v1::Row> = partitions.iter().map(|partition| row(partition, "USD")).collect();
    let mut client = cluster.settlement(1);
    stamp_of(&settle(&client, &batch(rows.iter().map(|row| add(row, 100)).collect())).await);
    cluster.wait_quiet(Duration::from_secs(30)).await;
    let quiet_from = now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let quiet_to = now();

    let mut calls = Vec::new();
    for round in 0..BATCHES {
        let transfer = batch(vec![add(&rows[round % 3], -1), add(&rows[(round + 1) % 3], 1)]);
        let asked = now();
        let outcome = submit(&mut client, &transfer).await.expect("an answer to a lone batch");
        calls.push((asked, now()));
        stamp_of(&outcome);
        // Nothing of one batch shall be taken for a sync of the next.
        cluster.wait_quiet(Duration::from_secs(30)).await;
    }
    // strace writes a line when the call has returned, and the program may be a little ahead of that.
    let last = calls.last().expect("there were calls").1;
    let (nodes, _) = eventually("strace has written all down", Duration::from_secs(30), || async {
        let nodes: Vec<Vec<Sync>> = cluster.nodes().map(|node| parse(&cluster.trace(node))).collect();
        let late = nodes.iter().filter(|syncs| syncs.last().is_some_and(|sync| sync.ended + 500_000 > last));
        if late.count() >= 2 {
            Ok(nodes)
        } else {
            Err("there are no syncs as late as the last answer on two nodes".to_owned())
        }
    })
    .await;
    for (number, (asked, answered)) in calls.iter().enumerate() {
        if let Err(missing) = voted_then_decided(&nodes, *asked, *answered) {
            panic!("batch {number} was answered too early: {missing}");
        }
    }
    // What was counted belongs to batches: an idle cluster syncs nothing, but for the horizon now and then.
    for (node, syncs) in (1..).zip(&nodes) {
        let count =
            |from: u64, to: u64| syncs.iter().filter(|sync| sync.begun >= from && sync.ended <= to).count();
        let (idle, busy) = (count(quiet_from, quiet_to), count(quiet_to, u64::MAX));
        println!("node {node}: {busy} syncs for {BATCHES} batches, {idle} in an idle second");
        assert!(idle <= 3, "node {node} synced {idle} times in an idle second");
    }
    let enough = nodes
        .iter()
        .filter(|syncs| syncs.iter().filter(|sync| sync.begun >= quiet_to).count() >= 2 * BATCHES);
    assert!(enough.count() >= 2, "fewer than two syncs for a batch on a majority of nodes");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_disk_of_three_there_is_no_answer_and_with_two_there_is() {
    let cluster = Cluster::start().await;
    for group in 0..=cluster.shards() {
        cluster.move_leader(group, 1).await;
    }
    let partitions = cluster.partitions("frozen");
    let rows: Vec<v1::Row> = partitions.iter().map(|partition| row(partition, "USD")).collect();
    let mut client = cluster.settlement(1);
    stamp_of(&settle(&client, &batch(rows.iter().map(|row| add(row, 100)).collect())).await);

    cluster.freeze(2);
    let transfer = batch(vec![add(&rows[0], -1), add(&rows[1], 1)]);
    // Two nodes of three suffice.
    stamp_of(&settle(&client, &transfer).await);

    cluster.freeze(3);
    // Both kinds of batches: on one shard, and on all.
    let alone = batch(vec![add(&rows[2], -1)]);
    let across = batch(vec![add(&rows[0], -4), add(&rows[1], 2), add(&rows[2], 2)]);
    for batch in [&alone, &across] {
        let mut request = Request::new(v1::SubmitRequest::of(batch));
        request.set_timeout(FROZEN);
        // No answer, or an error, says nothing.
        if let Ok(Ok(answer)) = tokio::time::timeout(2 * FROZEN, client.submit(request)).await {
            let result = answer.into_inner().outcome.and_then(|outcome| outcome.result);
            let undecided = matches!(result, Some(outcome::Result::Undecided(_)));
            assert!(undecided, "answered by one disk alone: {result:?}");
        }
        let told = tokio::time::timeout(FROZEN / 3, get_batch(&mut client, &batch.id, 0)).await;
        assert!(
            !matches!(told, Ok(Ok(outcome::Result::Committed(_) | outcome::Result::Aborted(_)))),
            "told by one disk alone: {told:?}"
        );
    }
    cluster.thaw(2);
    cluster.thaw(3);
    let mut expected = [99, 101, 100];
    for (batch, deltas) in [(&alone, [0, 0, -1]), (&across, [-4, 2, 2])] {
        if let outcome::Result::Committed(_) = settle(&cluster.settlement(2), batch).await {
            expected.iter_mut().zip(deltas).for_each(|(amount, delta)| *amount += delta);
        }
    }
    cluster.wait_whole().await;
    let held = read(&cluster.settlement(3), &rows).await;
    assert_eq!(held.values.iter().map(balance_of).collect::<Vec<_>>(), expected);
    cluster.wait_quiet(Duration::from_secs(30)).await;
}
