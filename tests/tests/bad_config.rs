//! A node that is set up wrongly says what is wrong, ends, and does no harm to the cluster.

use std::{fs, path::Path, time::Duration};

use verdict_tests::{
    api::{add, balance, commit, kind_of, read, row},
    cluster::{Cluster, free_address, run_to_end},
};

/// A start that can't succeed is over after this.
const BOUND: Duration = Duration::from_secs(60);

/// Starts a node that must fail, and gives what it said.
fn complaint(config: &Path) -> String {
    let output = run_to_end(&["node", "--config", config.to_str().expect("a path is text")], BOUND);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it ended without an error: {said}");
    assert!(output.status.code().is_some(), "it was killed: {:?}: {said}", output.status);
    assert!(!said.contains("panicked"), "it panicked: {said}");
    assert!(!said.trim().is_empty(), "it said nothing");
    said
}

#[test]
fn mistakes_in_the_configuration_are_named() {
    let folder = tempfile::tempdir().expect("make a folder");
    let (address, other) = (free_address(), free_address());
    let good = format!(
        "cluster = \"test\"\nnode = 1\nlisten = {address:?}\ndata = {:?}\nshards = 2\n[nodes]\n1 = {address:?}\n2 = {other:?}\n",
        folder.path().join("data")
    );
    let file = folder.path().join("node.toml");
    let mistakes: [(&str, &str, &[&str]); 14] = [
        ("shards = 2", "", &["shards"]),
        ("shards = 2", "shards = 0", &["`shards` is 0"]),
        ("shards = 2", "shards = 100000", &["`shards` is 100000"]),
        ("shards = 2", "shards = \"two\"", &["shards", "string"]),
        ("shards = 2", "shard = 2", &["shard", "unknown field"]),
        ("shards = 2", "shards = 2\ncoordinators = [7]", &["`coordinators`", "node 7"]),
        ("shards = 2", "shards = 2\nheartbeat_ms = 100000", &["heartbeat_ms"]),
        ("node = 1", "node = 9", &["`node` is 9"]),
        ("cluster = \"test\"", "cluster = \"\"", &["`cluster` is empty"]),
        ("[nodes]", "[nodes]\n3 = \"nowhere\"", &["node 3", "host:port"]),
        ("[nodes]", "[nodes]\nx = \"127.0.0.1:1\"", &["\"x\""]),
        ("[nodes]", "[shard_replicas]\n3 = [1]\n[nodes]", &["shard \"3\""]),
        ("[nodes]", "[shard_replicas]\n1 = [5]\n[nodes]", &["node 5"]),
        ("[nodes]", "[nodes", &["parse"]),
    ];
    for (before, after, pieces) in mistakes {
        let text = good.replacen(before, after, 1);
        assert_ne!(text, good, "the mistake is missing");
        fs::write(&file, text).expect("write");
        let said = complaint(&file);
        assert!(said.contains("node.toml"), "which file? {said}");
        for piece in pieces {
            assert!(said.contains(piece), "{after:?} is not named by {piece:?}: {said}");
        }
    }
    let same = good.replace(&other, &address);
    fs::write(&file, same).expect("write");
    assert!(complaint(&file).contains("same address"));

    let missing = folder.path().join("missing.toml");
    assert!(complaint(&missing).contains("missing.toml"));
    assert!(!folder.path().join("data").exists(), "a wrong configuration has made a data folder");

    // The data folder can't be made.
    fs::write(&file, &good).expect("write");
    fs::write(folder.path().join("data"), "a file in the way").expect("write");
    assert!(complaint(&file).contains("data"), "which folder?");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_a_folder_or_a_port_in_use_is_refused_and_the_first_goes_on() {
    let cluster = Cluster::start().await;
    let account = row("first", "USD");
    commit(&cluster.settlement(1), vec![add(&account, 1)]).await;

    let said = complaint(cluster.config(1));
    assert!(said.contains("listen on") && said.contains(cluster.address(1)), "{said}");

    let text = fs::read_to_string(cluster.config(1)).expect("read");
    let elsewhere = text.replacen(cluster.address(1), &free_address(), 1);
    let file = cluster.folder().join("second.toml");
    fs::write(&file, elsewhere).expect("write");
    let said = complaint(&file);
    println!("{said}");
    assert!(said.contains(cluster.data(1).to_str().expect("text")), "which folder? {said}");
    assert!(said.contains("another process") || said.contains("in use"), "why? {said}");

    let taken = text.replacen("node = 1", "node = 2", 1);
    let moved = taken.replacen(
        &format!("listen = {:?}", cluster.address(1)),
        &format!("listen = {:?}", free_address()),
        1,
    );
    fs::write(&file, moved).expect("write");
    complaint(&file);
    for node in cluster.nodes() {
        commit(&cluster.settlement(node), vec![add(&account, 1)]).await;
    }
    let held = read(&cluster.settlement(1), &[account]).await;
    assert_eq!(kind_of(&held.values[0]), balance(4));
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_another_node_cluster_or_number_of_shards_is_refused() {
    let mut cluster = Cluster::start().await;
    let account = row("same", "USD");
    commit(&cluster.settlement(1), vec![add(&account, 1)]).await;
    cluster.terminate(3);
    let good = fs::read_to_string(cluster.config(3)).expect("read");
    let data = cluster.data(3).to_str().expect("text").to_owned();
    let address = cluster.address(3);
    let listed = format!("[nodes]\n4 = {address:?}");
    let as_another = good.replacen("node = 3", "node = 4", 1).replacen("[nodes]", &listed, 1);
    let as_another = as_another.replacen(&format!("3 = {address:?}"), "", 1);
    for (text, pieces) in [
        (good.replacen("shards = 3", "shards = 4", 1), ["3 shards", "4"]),
        (good.replacen("shards = 3", "shards = 2", 1), ["3 shards", "2"]),
        (good.replacen("cluster = \"test\"", "cluster = \"other\"", 1), ["\"test\"", "\"other\""]),
        (as_another, ["node 3", "node 4"]),
    ] {
        assert_ne!(text, good, "nothing is wrong with it");
        let file = cluster.folder().join("wrong.toml");
        fs::write(&file, text).expect("write");
        let said = complaint(&file);
        println!("{said}");
        assert!(pieces.iter().all(|piece| said.contains(piece)), "{pieces:?}: {said}");
        assert!(Path::new(&data).exists());
        commit(&cluster.settlement(2), vec![add(&account, 1)]).await;
    }
    // As it was before, it is welcome.
    cluster.restart(3);
    cluster.wait_whole().await;
    cluster.wait_quiet(Duration::from_secs(30)).await;
    let held = read(&cluster.settlement(3), &[account]).await;
    assert_eq!(kind_of(&held.values[0]), balance(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_disk_under_an_old_id_is_refused_and_never_votes() {
    let mut cluster = Cluster::start().await;
    let account = row("wiped", "USD");
    commit(&cluster.settlement(1), vec![add(&account, 1)]).await;
    cluster.kill9(3);
    fs::remove_dir_all(cluster.data(3)).expect("wipe the disk of a node that was killed");
    cluster.restart(3);
    let (status, after) = cluster.wait_end(3);
    let log = cluster.log(3);
    println!("it ended after {after:?} with {status}: {log}");
    assert!(!status.success() && status.code().is_some(), "{status}");
    assert!(log.contains("another disk") && log.contains("new node id"), "{log}");
    assert!(!log.contains("panicked"), "{log}");

    // The two that are left are a majority, and the third was none of it: without node 2 there is no majority any more.
    commit(&cluster.settlement(2), vec![add(&account, 1)]).await;
    cluster.wait_quiet(Duration::from_secs(30)).await;
    cluster.kill9(2);
    cluster.restart(3);
    cluster.wait_end(3);
    let mut client = cluster.settlement(1);
    let mut request = tonic::Request::new(verdict_proto::v1::ReadRequest { rows: vec![account.clone()] });
    request.set_timeout(Duration::from_secs(3));
    let alone = client.read(request).await;
    assert!(alone.is_err(), "a read without a majority was answered: {alone:?}");
    cluster.restart(2);
    let held = read(&cluster.settlement(2), std::slice::from_ref(&account)).await;
    assert_eq!(kind_of(&held.values[0]), balance(2));
    commit(&cluster.settlement(1), vec![add(&account, 1)]).await;
}
