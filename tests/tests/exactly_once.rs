//! An id takes effect at most once, however often, wherever and in whatever order it is submitted, and whatever is lost on the way.

use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio_stream::StreamExt as _;
use tonic::{Code, transport::Channel};
use verdict_proto::v1::{
    self, outcome, settlement_client::SettlementClient, submit_answer::Result as StreamResult,
};
use verdict_tests::{
    api::{
        add, answers, balance_of, batch, get_batch, history, may_be_tried_again, new_id, partition_on, read,
        row, settle, settle_at, settlement_at, stamp_of, submit,
    },
    cluster::{Cluster, Settings},
    proxy::Proxy,
    random::Random,
    wait::eventually,
};

/// Batches of the test; batch k moves 2^k, so the balance tells which took effect, and any that did so twice.
const BATCHES: usize = 48;
/// Callers who submit the same id at the same time.
const CALLERS: usize = 6;
/// How long one caller goes on.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn an_id_submitted_by_many_while_replies_are_lost_and_a_leader_dies_takes_effect_once() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let mut proxies = Vec::new();
    for node in cluster.nodes() {
        proxies.push(Proxy::start(cluster.address(node).to_owned(), 6, random.split()).await);
    }
    let addresses: Vec<String> = proxies.iter().map(|proxy| proxy.address().to_owned()).collect();
    let partitions = cluster.partitions("once");
    let source = row(&partitions[0], "USD");
    let sinks = [row(&partitions[1], "USD"), row(&partitions[2], "USD")];
    let funds = (1i128 << BATCHES) - 1;
    stamp_of(&settle(&cluster.settlement(1), &batch(vec![add(&source, funds)])).await);

    let batches: Vec<v1::Batch> = (0..BATCHES)
        .map(|power| batch(vec![add(&source, -(1 << power)), add(&sinks[power % 2], 1 << power)]))
        .collect();
    let mut submissions = Vec::new();
    for (place, batch) in batches.iter().enumerate() {
        // Some wait, so that submissions go on before, during and after the kill.
        let delay = Duration::from_millis(40 * place as u64);
        let callers = (0..CALLERS).map(|caller| {
            let (batch, random) = (batch.clone(), random.split());
            let addresses = addresses.clone();
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                match caller % 3 {
                    2 => by_stream(addresses, batch, random).await,
                    _ => one_by_one(addresses, batch, random).await,
                }
            })
        });
        submissions.push(join_all(callers.collect::<Vec<_>>()));
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    let leader = cluster.leader(0).await;
    cluster.kill9(leader);
    tokio::time::sleep(Duration::from_millis(700)).await;
    cluster.restart(leader);

    let (mut committed, mut moved) = (0, 0i128);
    for (power, (batch, answers)) in batches.iter().zip(join_all(submissions).await).enumerate() {
        let answers: Vec<outcome::Result> =
            answers.into_iter().map(|answer| answer.expect("a caller ends without a panic")).collect();
        for answer in &answers {
            assert_eq!(answer, &answers[0], "two answers about batch {}", batch.id);
        }
        for node in cluster.nodes() {
            let told = eventually("the outcome is told", PATIENCE, || async {
                get_batch(&mut cluster.settlement(node), &batch.id, 1000)
                    .await
                    .map_err(|status| status.to_string())
            });
            assert_eq!(told.await.0, answers[0], "node {node} tells another outcome of {}", batch.id);
        }
        if let outcome::Result::Committed(_) = answers[0] {
            committed += 1;
            moved += 1 << power;
        }
    }
    println!(
        "{committed} of {BATCHES} committed; replies lost: {:?}",
        proxies.iter().map(Proxy::lost).collect::<Vec<_>>()
    );
    assert!(committed > BATCHES / 2, "only {committed} committed: the test has not tested much");
    assert!(proxies.iter().map(Proxy::lost).sum::<u64>() > 20, "hardly a reply was lost");

    let rows = [source.clone(), sinks[0].clone(), sinks[1].clone()];
    let held: Vec<i128> = read(&cluster.settlement(1), &rows).await.values.iter().map(balance_of).collect();
    assert_eq!(held[0], funds - moved, "left at the source: {:#b}, moved: {moved:#b}", held[0]);
    assert_eq!(held[1] + held[2], moved, "what arrived is not what left");
    let (_, entries) = history(&cluster.settlement(2), &source).await;
    let mut ids: Vec<&str> = entries.iter().map(|entry| entry.batch_id.as_str()).collect();
    assert_eq!(ids.len(), committed + 1, "the history shows an effect twice, or misses one");
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), committed + 1, "the history shows an id twice");
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

/// Submits by unary calls, each to any node, until there is a definite answer.
async fn one_by_one(addresses: Vec<String>, batch: v1::Batch, mut random: Random) -> outcome::Result {
    let mut clients: Vec<SettlementClient<Channel>> =
        addresses.iter().map(|address| settlement_at(address)).collect();
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let node = random.below(clients.len() as u64) as usize;
        match submit(&mut clients[node], &batch).await {
            Ok(outcome::Result::Undecided(_)) => {}
            Ok(definite) => return definite,
            Err(status) => assert!(may_be_tried_again(&status), "{status}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no answer about {} within {PATIENCE:?}", batch.id)
}

/// Submits by streams, on each of which the batch is sent twice.
async fn by_stream(addresses: Vec<String>, batch: v1::Batch, mut random: Random) -> outcome::Result {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let mut client = settlement_at(random.pick::<String>(&addresses));
        let request = v1::SubmitStreamRequest::of([&batch]);
        let requests = tokio_stream::iter(vec![request.clone(), request]);
        if let Ok(response) = client.submit_stream(requests).await {
            let mut answers = answers(response.into_inner());
            let mut first = None;
            while let Some(Ok(answer)) = answers.next().await {
                assert_eq!(answer.batch_id, batch.id, "an answer about a batch that was not sent");
                match answer.result.expect("an answer has a result") {
                    StreamResult::Outcome(outcome) => {
                        match outcome.result.expect("an outcome has a result") {
                            outcome::Result::Undecided(_) => {}
                            definite => {
                                let first = first.get_or_insert_with(|| definite.clone());
                                assert_eq!(first, &definite, "two answers on one stream");
                            }
                        }
                    }
                    StreamResult::Error(error) => {
                        let status = tonic::Status::new(Code::from_i32(error.code), error.message);
                        assert!(may_be_tried_again(&status), "{status}");
                    }
                }
            }
            if let Some(definite) = first {
                return definite;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no answer about {} within {PATIENCE:?}", batch.id)
}

/// Shard 2 lives on node 4 alone, all else on nodes 1 to 3: while node 4 is down, batches that touch shard 2 stay undecided.
fn with_a_lonely_shard() -> Settings {
    Settings {
        nodes: 4,
        shards: 2,
        lines: "coordinators = [1, 2, 3]".to_owned(),
        shard_replicas: "1 = [1, 2, 3]\n2 = [4]".to_owned(),
        ..Settings::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_with_other_contents_is_refused_before_and_after_the_decision_on_every_node() {
    let mut cluster = Cluster::start_with(with_a_lonely_shard()).await;
    let rows = [partition_on(1, 2, "other"), partition_on(2, 2, "other")].map(|name| row(&name, "USD"));
    let client = cluster.settlement(1);
    stamp_of(&settle(&client, &batch(vec![add(&rows[0], 5), add(&rows[1], 5)])).await);

    cluster.kill9(4);
    let mut first = batch(vec![add(&rows[0], 1), add(&rows[1], 2)]);
    first.timeout_ms = 30_000;
    let waiting = tokio::spawn({
        let (first, client) = (first.clone(), client.clone());
        async move { settle(&client, &first).await }
    });
    eventually("the batch is in progress", Duration::from_secs(30), || async {
        match get_batch(&mut cluster.settlement(2), &first.id, 0).await {
            Ok(outcome::Result::Undecided(undecided))
                if undecided.state() == v1::UndecidedState::InProgress =>
            {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    let others = other_contents(&first);
    for node in 1..=3 {
        assert_refused(&cluster, node, &others).await;
    }
    assert!(!waiting.is_finished(), "it was decided too early for this test");

    cluster.restart(4);
    let answer = waiting.await.expect("the caller ends without a panic");
    stamp_of(&answer);
    cluster.wait_whole().await;
    for node in cluster.nodes() {
        assert_refused(&cluster, node, &others).await;
        let mut retried = first.clone();
        retried.timeout_ms = 7;
        assert_eq!(settle(&cluster.settlement(node), &retried).await, answer, "the same contents, once more");
    }
    let held: Vec<i128> = read(&client, &rows).await.values.iter().map(balance_of).collect();
    assert_eq!(held, [6, 7], "one effect, of the first contents");
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_behind_a_try_that_was_proposed_never_hears_that_nothing_was_proposed() {
    let mut cluster = Cluster::start_with(with_a_lonely_shard()).await;
    let rows = [partition_on(1, 2, "retry"), partition_on(2, 2, "retry")].map(|name| row(&name, "USD"));
    stamp_of(&settle(&cluster.settlement(1), &batch(vec![add(&rows[0], 5), add(&rows[1], 5)])).await);

    cluster.kill9(4);
    let mut slow = batch(vec![add(&rows[0], 1), add(&rows[1], 2)]);
    slow.timeout_ms = 30_000;
    // A client with a time limit of its own that tries again under the same id, as the contract tells it to.
    for node in 1..=3 {
        for round in 0..3 {
            let mut request = tonic::Request::new(v1::SubmitRequest::of(&slow));
            request.set_timeout(Duration::from_millis(700));
            match cluster.settlement(node).submit(request).await {
                Ok(answer) => {
                    let result = answer.into_inner().outcome.and_then(|outcome| outcome.result);
                    assert!(matches!(result, Some(outcome::Result::Undecided(_))), "{result:?}");
                }
                // The client's own clock.
                Err(status) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) => {}
                Err(status) => panic!(
                    "try {round} at node {node}, while the batch is being prepared, was told that nothing was proposed: {status}"
                ),
            }
        }
    }
    cluster.restart(4);
    stamp_of(&settle(&cluster.settlement(1), &slow).await);
}

/// Batches with the same id and something else in them.
fn other_contents(first: &v1::Batch) -> Vec<v1::Batch> {
    let with = |change: &dyn Fn(&mut v1::Batch)| {
        let mut other = first.clone();
        change(&mut other);
        assert_ne!(&other, first, "the contents are the same");
        other
    };
    vec![
        with(&|batch| batch.operations.reverse()),
        with(&|batch| batch.operations.truncate(1)),
        with(&|batch| batch.operations[0] = add(batch.operations[0].row.as_ref().expect("a row"), 1 << 60)),
        with(&|batch| batch.operations[1].row.as_mut().expect("a row").name = "EUR".to_owned()),
    ]
}

async fn assert_refused(cluster: &Cluster, node: u64, others: &[v1::Batch]) {
    for other in others {
        let unary = eventually("there is an answer", Duration::from_secs(30), || async {
            match submit(&mut cluster.settlement(node), other).await {
                Err(status) if status.code() != Code::Unavailable => Ok(status),
                not_yet => Err(format!("{not_yet:?}")),
            }
        });
        let status = unary.await.0;
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
        assert!(status.message().contains(&other.id), "which id? {status}");
        let requests = tokio_stream::iter([v1::SubmitStreamRequest::of([other])]);
        let answers = cluster.settlement(node).submit_stream(requests).await.expect("a stream");
        let answer = self::answers(answers.into_inner()).next().await.expect("an answer").expect("an answer");
        let Some(StreamResult::Error(error)) = answer.result else { panic!("{answer:?}") };
        assert_eq!((answer.batch_id, error.code), (other.id.clone(), Code::AlreadyExists as i32));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_aborted_unseen_is_answered_aborted_when_it_arrives_at_last() {
    let cluster = Cluster::start().await;
    let account = row("late", "USD");
    let mut late = batch(vec![add(&account, 1)]);
    late.id = new_id();
    let ask =
        |abort_if_not_seen| v1::GetBatchRequest { batch_id: late.id.clone(), abort_if_not_seen, wait_ms: 0 };
    // Only when all shards have answered can a leader know that there is no trace.
    eventually("there is no trace of it", Duration::from_secs(30), || async {
        let answer =
            cluster.settlement(1).get_batch(ask(false)).await.map_err(|status| status.to_string())?;
        let result = answer.into_inner().outcome.and_then(|outcome| outcome.result);
        let Some(outcome::Result::Undecided(undecided)) = result else {
            panic!("decided unseen: {result:?}")
        };
        match undecided.state() {
            v1::UndecidedState::NotSeen => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    let answer = cluster.settlement(2).get_batch(ask(true)).await.expect("an answer").into_inner();
    let cancelled = answer.outcome.and_then(|outcome| outcome.result).expect("a result");
    verdict_tests::api::assert_aborted(&cancelled, v1::AbortReason::Cancelled, None, None);
    assert_eq!(settle_at(&mut cluster.settlements(), &late).await, cancelled, "it has run after all");
    let held = read(&cluster.settlement(3), &[account]).await;
    assert_eq!(balance_of(&held.values[0]), 0);
}
