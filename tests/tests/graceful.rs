//! SIGTERM ends a node within seconds, and a rolling restart under load loses nothing.

use std::time::Duration;

use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use verdict_proto::v1::{self, outcome, submit_answer::Result as StreamResult};
use verdict_tests::{
    api::{add, answers, batch, commit, kind_of, read, row},
    cluster::Cluster,
    ledger::Ledger,
    random::Random,
};

/// A node that is asked to end has ended after this.
const END_WITHIN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_asked_to_end_ends_within_seconds_though_streams_are_open() {
    let mut cluster = Cluster::start().await;
    let account = row("open", "USD");
    let mut streams = Vec::new();
    for node in cluster.nodes() {
        let (sender, requests) = tokio::sync::mpsc::channel(4);
        let one = v1::SubmitStreamRequest::of([&batch(vec![add(&account, 1)])]);
        sender.send(one).await.expect("there is room");
        let opened = cluster.settlement(node).submit_stream(ReceiverStream::new(requests)).await;
        let mut answers = answers(opened.expect("a stream").into_inner());
        let answer = answers.next().await.expect("an answer").expect("an answer").result;
        let Some(StreamResult::Outcome(v1::Outcome { result: Some(outcome::Result::Committed(_)), .. })) =
            answer
        else {
            panic!("{answer:?}")
        };
        streams.push((sender, answers));
    }
    for node in cluster.nodes() {
        let (status, took) = cluster.terminate(node);
        println!("node {node} ended after {took:?}");
        assert!(status.success(), "node {node}: {status}");
        assert!(took < END_WITHIN, "node {node} took {took:?}");
    }
    for node in cluster.nodes() {
        cluster.restart(node);
    }
    cluster.wait_whole().await;
    let held = read(&cluster.settlement(1), &[account]).await;
    assert_eq!(kind_of(&held.values[0]), verdict_tests::api::balance(3));
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_nothing() {
    let mut random = Random::announced();
    let mut cluster = Cluster::start().await;
    let ledger = Ledger::open(&cluster, "rolling", 4).await;
    let load = ledger.load(&cluster, 16, &mut random);
    for node in cluster.nodes() {
        load.settle_more(&ledger, 150).await;
        let (status, took) = cluster.terminate(node);
        assert!(status.success(), "node {node}: {status}");
        assert!(took < END_WITHIN, "node {node} took {took:?}");
        load.settle_more(&ledger, 150).await;
        cluster.restart(node);
        let whole = cluster.wait_whole().await;
        println!("node {node} ended in {took:?}, the cluster was whole {whole:?} after its start");
    }
    load.settle_more(&ledger, 150).await;
    load.end().await;
    let audit = ledger.audit(&cluster).await;
    println!("{audit:?}, calls that ended otherwise: {:?}", ledger.errors());
    assert_eq!(audit.aborted_otherwise(), 0, "{audit:?}");
    assert!(audit.committed >= 1000, "{audit:?}");
    // A call ends with an answer, with UNAVAILABLE, or with its connection (which tonic calls UNKNOWN or CANCELLED).
    let excused = ["Unavailable", "Unknown", "Cancelled", "undecided"];
    let errors = ledger.errors();
    let other: Vec<_> = errors.keys().filter(|error| !excused.contains(&error.as_str())).collect();
    assert!(other.is_empty(), "{other:?} of {errors:?}");
    cluster.wait_quiet(Duration::from_secs(30)).await;
    commit(&cluster.settlement(1), vec![add(&row("after", "USD"), 1)]).await;
}
