//! Any node takes any call, and brings it to whoever leads.

use std::time::{Duration, Instant};

use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;
use verdict_proto::v1::{self, outcome, submit_answer::Result as StreamResult};
use verdict_tests::{
    api::{add, answers, balance, batch, commit, get_batch, history, kind_of, read, row, settle, stamp_of},
    cluster::{Cluster, Settings, leader_in, replicas_of},
    wait::eventually,
};

/// Makes every call at one node, and checks that the answers belong together.
async fn every_call(cluster: &Cluster, node: u64, tag: &str) {
    let rows: Vec<v1::Row> = cluster.partitions(tag).iter().map(|partition| row(partition, "USD")).collect();
    let mut client = cluster.settlement(node);
    let first = batch(rows.iter().map(|row| add(row, 7)).collect());
    let outcome = settle(&client, &first).await;
    let stamp = stamp_of(&outcome);

    let (good, poor) = (batch(vec![add(&rows[0], 1)]), batch(vec![add(&rows[0], -100)]));
    let requests = [&good, &poor].map(|batch| v1::SubmitStreamRequest::of([batch]));
    let answers = client.submit_stream(tokio_stream::iter(requests)).await.expect("a stream").into_inner();
    let answers: Vec<_> = self::answers(answers).map(|answer| answer.expect("an answer")).collect().await;
    assert_eq!(answers.len(), 2, "node {node}: {answers:?}");
    for answer in answers {
        let Some(StreamResult::Outcome(v1::Outcome { result: Some(result), .. })) = answer.result else {
            panic!("node {node}: {answer:?}")
        };
        assert_eq!(matches!(result, outcome::Result::Committed(_)), answer.batch_id == good.id, "{result:?}");
        assert_eq!(get_batch(&mut client, &answer.batch_id, 0).await.expect("an answer"), result);
    }
    assert_eq!(get_batch(&mut client, &first.id, 0).await.expect("an answer"), outcome);

    let held = read(&client, &rows).await;
    assert!(held.position > stamp, "node {node}");
    let expected: Vec<_> =
        rows.iter().enumerate().map(|(place, _)| balance(7 + i128::from(place == 0))).collect();
    assert_eq!(held.values.iter().map(kind_of).collect::<Vec<_>>(), expected, "node {node}");
    assert_eq!(history(&client, &rows[0]).await.1.len(), 2, "node {node}");

    let mut admin = cluster.admin(node);
    let list = v1::ListDecisionsRequest { from: 0, limit: 10_000 };
    let listed = admin.list_decisions(list).await.expect("a list").into_inner().decisions;
    let ids: Vec<&str> =
        listed.iter().filter_map(|decision| Some(decision.outcome.as_ref()?.batch_id.as_str())).collect();
    for id in [&first.id, &good.id, &poor.id] {
        assert!(ids.contains(&id.as_str()), "node {node} doesn't list {id}");
    }
    let in_doubt =
        admin.list_in_doubt(v1::ListInDoubtRequest { limit: 0 }).await.expect("a list").into_inner();
    assert!(in_doubt.unreachable_shards.is_empty(), "node {node}: {in_doubt:?}");
    let status = admin.status(v1::StatusRequest { local_only: false }).await.expect("a status").into_inner();
    assert_eq!(status.nodes.len(), cluster.nodes().count(), "node {node}");
    let local = admin.status(v1::StatusRequest { local_only: true }).await.expect("a status").into_inner();
    assert_eq!(local.nodes.iter().map(|local| local.node_id).collect::<Vec<_>>(), [node]);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_takes_any_call_wherever_the_leaders_are() {
    let cluster = Cluster::start().await;
    for leader in [1, 3] {
        cluster.move_leader(0, leader).await;
        cluster.move_leader(2, 4 - leader).await;
        for node in cluster.nodes() {
            every_call(&cluster, node, &format!("{leader}-{node}")).await;
        }
    }
    let snapshot = cluster.admin(2).trigger_snapshot(v1::TriggerSnapshotRequest { group_id: 1 }).await;
    let index = snapshot.expect("a snapshot").into_inner().index;
    assert!(index > 0, "it covers nothing");
    cluster.wait_quiet(Duration::from_secs(30)).await;
    let status = cluster.status().await.expect("a status");
    let replicas = replicas_of(&status, 1);
    let (_, replica) = replicas.iter().find(|(node, _)| *node == 2).expect("node 2 has a replica");
    assert_eq!(replica.snapshot_index, index);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_coordinator_or_without_any_replica_takes_any_call() {
    let settings = Settings {
        nodes: 5,
        lines: "coordinators = [1, 2, 3]".to_owned(),
        shard_replicas: "1 = [1, 2, 3]\n2 = [2, 3, 4]\n3 = [4]".to_owned(),
        ..Settings::default()
    };
    let mut cluster = Cluster::start_with(settings).await;
    let groups = async |node: u64| {
        let status = cluster.admin(node).status(v1::StatusRequest { local_only: true }).await;
        let status = status.expect("a status").into_inner();
        let ids: Vec<u32> = status.nodes[0].groups.iter().map(|group| group.group_id).collect();
        ids
    };
    assert_eq!(groups(4).await, [2, 3], "shards alone");
    assert_eq!(groups(5).await, [0; 0], "nothing at all");
    for node in [4, 5] {
        every_call(&cluster, node, &format!("gateway-{node}")).await;
    }
    // It finds the next leader too.
    let leader = cluster.leader(0).await;
    cluster.kill9(leader);
    let account = row("found", "USD");
    commit(&cluster.settlement(5), vec![add(&account, 1)]).await;
    assert_eq!(kind_of(&read(&cluster.settlement(4), &[account]).await.values[0]), balance(1));
    cluster.restart(leader);
    cluster.wait_whole().await;
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

/// Leaves node 1 alone; `leader` has led the coordinators before.
async fn alone(leader: u64) -> (Cluster, v1::Row) {
    let mut cluster = Cluster::start().await;
    let account = row("quorum", "USD");
    commit(&cluster.settlement(1), vec![add(&account, 1)]).await;
    cluster.move_leader(0, leader).await;
    cluster.kill9(2);
    cluster.kill9(3);
    (cluster, account)
}

/// Submits with the caller's own time limit.
async fn submit_within(
    cluster: &Cluster,
    batch: &v1::Batch,
    limit: Duration,
) -> Result<outcome::Result, tonic::Status> {
    let answer = within(limit, async |limit| {
        let mut request = Request::new(v1::SubmitRequest::of(batch));
        request.set_timeout(limit);
        cluster.settlement(1).submit(request).await
    });
    let answer = answer.await?.into_inner();
    Ok(answer.outcome.and_then(|outcome| outcome.result).expect("an answer has an outcome"))
}

/// A call with a time limit, before which the server answers. If the machine stands still just then the answer comes too late, and
/// the call is made again with more time.
async fn within<T>(
    limit: Duration,
    call: impl AsyncFn(Duration) -> Result<T, tonic::Status>,
) -> Result<T, tonic::Status> {
    for limit in [limit, 2 * limit] {
        match call(limit).await {
            Err(late) if matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled) => {}
            answer => return answer,
        }
    }
    call(4 * limit).await
}

async fn assert_no_read(cluster: &Cluster, account: &v1::Row) {
    let read = within(Duration::from_secs(2), async |limit| {
        let mut request = Request::new(v1::ReadRequest { rows: vec![account.clone()] });
        request.set_timeout(limit);
        cluster.settlement(1).read(request).await
    });
    let status = read.await.expect_err("there is no majority");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_leader_a_call_is_unavailable_and_nothing_was_proposed() {
    let (mut cluster, account) = alone(2).await;
    eventually("nobody leads", Duration::from_secs(30), || async {
        let status = cluster.status().await?;
        leader_in(&status, 0).map_or(Ok(()), |leader| Err(format!("node {leader} leads")))
    })
    .await;
    let one = batch(vec![add(&account, 2)]);
    let status = submit_within(&cluster, &one, Duration::from_secs(2)).await.expect_err("nobody leads");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let details = status.get_error_details();
    assert!(details.error_info().is_some_and(|info| info.domain == "verdict"), "{details:?}");
    assert!(details.retry_info().is_some_and(|info| info.retry_delay.is_some()), "when again? {details:?}");
    assert_no_read(&cluster, &account).await;

    cluster.restart(2);
    // It was not proposed, so it can't happen by itself, and may be submitted again.
    eventually("there is no trace of it", Duration::from_secs(30), || async {
        match get_batch(&mut cluster.settlement(1), &one.id, 0).await {
            Ok(outcome::Result::Undecided(undecided)) if undecided.state() == v1::UndecidedState::NotSeen => {
                Ok(())
            }
            Ok(definite @ (outcome::Result::Committed(_) | outcome::Result::Aborted(_))) => {
                panic!("nothing was proposed, they said: {definite:?}")
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    stamp_of(&settle(&cluster.settlement(2), &one).await);
    assert_eq!(kind_of(&read(&cluster.settlement(1), &[account]).await.values[0]), balance(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_majority_claims_nothing_and_ends_calls_in_time() {
    let (mut cluster, account) = alone(1).await;
    let one = batch(vec![add(&account, 2)]);
    let asked = Instant::now();
    let answer = submit_within(&cluster, &one, Duration::from_secs(2)).await;
    // More than the time limits of three tries.
    assert!(asked.elapsed() < Duration::from_secs(20), "it took {:?}", asked.elapsed());
    let said_nothing_was_proposed = match answer {
        Ok(outcome::Result::Undecided(_)) => false,
        Ok(definite) => panic!("decided by one of three: {definite:?}"),
        Err(status) => status.code() == Code::Unavailable,
    };
    assert_no_read(&cluster, &account).await;
    cluster.restart(2);
    if said_nothing_was_proposed {
        let told = get_batch(&mut cluster.settlement(2), &one.id, 5000).await;
        assert!(
            !matches!(told, Ok(outcome::Result::Committed(_))),
            "they said: nothing was proposed: {told:?}"
        );
    }
    // Under the same id it takes effect once, or never.
    let committed = matches!(settle(&cluster.settlement(2), &one).await, outcome::Result::Committed(_));
    let held = read(&cluster.settlement(1), &[account]).await;
    assert_eq!(kind_of(&held.values[0]), balance(if committed { 3 } else { 1 }));
}
