//! Three hosts in one process, over connections inside the process and databases on disk.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rocksdb::{ColumnFamilyDescriptor, DB, Options};
use tempfile::TempDir;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use verdict_proto::connect::InProcess;
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::{Machine, Position},
    store::{Store, StoreError},
};
use verdict_raft::{Group, Host, HostConfig, HostError, Limits, ProposeError, Timing};

const GROUP: GroupId = GroupId(0);
const PATIENCE: Duration = Duration::from_secs(15);

/// Keeps the value that was last written to each key, and a counter that it also keeps in memory.
struct Registers {
    applied: u64,
}

impl Machine for Registers {
    /// How many commands were applied, this one included.
    type Reply = u64;
    type Config = ();

    fn open((): &(), store: &dyn Store) -> Result<Registers, StoreError> {
        let bytes = store.get(b"\x10count")?;
        let applied = bytes.map_or(0, |bytes| u64::from_be_bytes(bytes[..].try_into().unwrap()));
        Ok(Registers { applied })
    }

    fn apply(&mut self, store: &mut dyn Store, _: u64, command: &[u8]) -> Result<u64, StoreError> {
        assert!(command != b"panic", "asked to panic");
        self.applied += 1;
        let (key, value) = command.split_at(command.len().min(2));
        store.put(&[b"\x11", key].concat(), value)?;
        store.put(b"\x10count", &self.applied.to_be_bytes())?;
        Ok(self.applied)
    }
}

struct Running {
    host: Host,
    group: Group<Registers>,
    server: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn stop(mut self) {
        drop(self.server.take());
        self.host.shutdown().await;
        self.task.abort();
        let _ = self.task.await;
    }
}

struct Cluster {
    network: InProcess,
    directory: TempDir,
    limits: Limits,
    nodes: BTreeMap<u64, Running>,
}

fn address(node: u64) -> String {
    format!("node{node}:1")
}

fn init_tracing() {
    if std::env::var_os("RUST_LOG").is_some() {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
    }
}

impl Cluster {
    fn new(limits: Limits) -> Cluster {
        init_tracing();
        Cluster {
            network: InProcess::default(),
            directory: tempfile::tempdir().unwrap(),
            limits,
            nodes: BTreeMap::new(),
        }
    }

    async fn start_three(limits: Limits) -> Cluster {
        let mut cluster = Cluster::new(limits);
        for node in 1..=3 {
            cluster.start(node).await;
        }
        cluster
    }

    fn path(&self, node: u64) -> PathBuf {
        self.directory.path().join(format!("node{node}"))
    }

    async fn try_start(&self, node: u64) -> Result<Running, HostError> {
        let config = HostConfig {
            cluster: "test".to_owned(),
            node: NodeId(node),
            address: address(node),
            directory: self.path(node),
            timing: Timing::default(),
            limits: self.limits.clone(),
        };
        let host = Host::open(config, Arc::new(self.network.clone())).await?;
        let incoming = ReceiverStream::new(self.network.listen(&address(node)));
        let (server, stop) = oneshot::channel::<()>();
        let router = tonic::transport::Server::builder().add_service(host.service());
        let task = tokio::spawn(async move {
            let stop = async { drop(stop.await) };
            router.serve_with_incoming_shutdown(incoming, stop).await.unwrap();
        });
        let voters = (1..=3).map(|node| (NodeId(node), address(node))).collect();
        let group = match host.start_group::<Registers>(GROUP, (), &voters).await {
            Ok(group) => group,
            Err(error) => {
                host.shutdown().await;
                return Err(error);
            }
        };
        Ok(Running { host, group, server: Some(server), task })
    }

    async fn start(&mut self, node: u64) {
        let running = self.try_start(node).await.unwrap();
        self.nodes.insert(node, running);
    }

    async fn stop(&mut self, node: u64) {
        self.nodes.remove(&node).unwrap().stop().await;
    }

    async fn stop_all(mut self) {
        while let Some((_, running)) = self.nodes.pop_first() {
            running.stop().await;
        }
    }

    fn group(&self, node: u64) -> &Group<Registers> {
        &self.nodes[&node].group
    }

    async fn leader(&self) -> u64 {
        let begun = Instant::now();
        loop {
            for (node, running) in &self.nodes {
                if running.group.leadership().borrow().is_leader {
                    return *node;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "no leader");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn propose(&self, command: &str) -> u64 {
        let begun = Instant::now();
        loop {
            let leader = self.leader().await;
            match self.group(leader).propose(command.as_bytes().to_vec()).await {
                Ok(applied) => return applied.reply,
                Err(ProposeError::NotLeader { .. }) => sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{error}"),
            }
            assert!(begun.elapsed() < PATIENCE, "nobody takes the proposal");
        }
    }

    /// Waits until all running replicas stand where the leader stands, and gives where.
    async fn converge(&self) -> Position {
        let begun = Instant::now();
        let index = loop {
            let leader = self.leader().await;
            match self.group(leader).read_barrier().await {
                Ok(confirmed) => break confirmed.index,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
        };
        loop {
            let positions: Vec<_> = self.nodes.values().map(|running| running.group.status()).collect();
            if positions.iter().all(|status| status.applied_index >= index) {
                let first = positions[0].position;
                if positions.iter().all(|status| status.position == first) {
                    return first;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "replicas don't converge: {positions:#?}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn small_snapshots() -> Limits {
    Limits {
        snapshot_after_entries: 50,
        keep_entries: 5,
        keep_bytes: 4096,
        tail_bytes: 2048,
        ..Limits::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_elect_replicate_restart_and_agree() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    assert_eq!(cluster.propose("a=one").await, 1);
    assert_eq!(cluster.propose("b=two").await, 2);
    let before = cluster.converge().await;
    for running in cluster.nodes.values() {
        running.group.read(|machine, store| {
            assert_eq!(machine.applied, 2);
            assert_eq!(store.get(b"\x11a=").unwrap().unwrap(), "one");
            let mut keys = Vec::new();
            store
                .scan(b"\x11", b"\x12", &mut |key, _| {
                    keys.push(key.to_vec());
                    true
                })
                .unwrap();
            assert_eq!(keys, [b"\x11a=", b"\x11b="]);
            assert_eq!(store.last(b"\x11", b"\x12").unwrap().unwrap().0, &b"\x11b="[..]);
        });
    }

    // A follower goes and comes back.
    let leader = cluster.leader().await;
    let follower = (1..=3).find(|node| *node != leader).unwrap();
    cluster.stop(follower).await;
    assert_eq!(cluster.propose("c=three").await, 3);
    cluster.start(follower).await;
    let after = cluster.converge().await;
    assert_ne!(before, after);

    // The leader goes: another one takes over in time.
    let leader = cluster.leader().await;
    cluster.stop(leader).await;
    let begun = Instant::now();
    assert_eq!(cluster.propose("d=four").await, 4);
    println!("a proposal succeeded {:?} after the leader had stopped", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5));
    cluster.start(leader).await;
    let together = cluster.converge().await;

    // All go, all come back.
    for node in 1..=3 {
        cluster.stop(node).await;
    }
    for node in 1..=3 {
        cluster.start(node).await;
    }
    assert_eq!(cluster.converge().await, together);
    assert_eq!(cluster.propose("e=five").await, 5);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_proposals_are_applied_in_the_order_of_the_calls() {
    let cluster = Cluster::start_three(Limits::default()).await;
    let leader = cluster.leader().await;
    let group = cluster.group(leader);
    let calls: Vec<_> = (0..2000).map(|call| group.start_propose(format!("k={call}").into_bytes())).collect();
    let mut last = (0, 0);
    for call in calls {
        let applied = call.await.unwrap();
        assert!(last.0 < applied.index && last.1 + 1 == applied.reply);
        last = (applied.index, applied.reply);
    }
    let other = (1..=3).find(|node| *node != leader).unwrap();
    let refused = cluster.group(other).propose(b"x=1".to_vec()).await;
    assert_eq!(refused, Err(ProposeError::NotLeader { leader: Some(NodeId(leader)) }));
    assert!(cluster.group(other).read_barrier().await.is_err());
    let moved = group.transfer_leader(None).await.unwrap();
    assert_ne!(moved, NodeId(leader));
    cluster.converge().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_behind_the_purged_log_converges_by_snapshot() {
    let mut cluster = Cluster::start_three(small_snapshots()).await;
    cluster.propose("a=0").await;
    let leader = cluster.leader().await;
    let behind = (1..=3).find(|node| *node != leader).unwrap();
    cluster.stop(behind).await;
    let mut status = cluster.group(leader).status();
    for round in 0..20 {
        for call in 0..30 {
            cluster.propose(&format!("{:02}{round}", call)).await;
        }
        status = cluster.group(leader).status();
        if status.snapshot_index > 100 {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    assert!(status.snapshot_index > 100, "{status:?}");
    let index = cluster.group(leader).trigger_snapshot().await.unwrap();
    assert!(index >= status.snapshot_index);
    // Purging waits for replication to let go of the entries.
    let begun = Instant::now();
    while cluster.nodes.values().any(|running| running.group.status().purged_index < 50) {
        assert!(begun.elapsed() < PATIENCE, "the log isn't purged");
        sleep(Duration::from_millis(20)).await;
    }
    cluster.start(behind).await;
    cluster.converge().await;
    let status = cluster.group(behind).status();
    assert!(status.snapshot_index > 100, "it caught up without a snapshot: {status:?}");
    cluster.propose("a=1").await;
    // It was installed as a new generation of the state, and is there after a restart.
    cluster.stop(behind).await;
    {
        let db = open_database(&cluster.path(behind));
        let generation = db.get_cf(db.cf_handle("meta").unwrap(), [0x10, 0, 0, 0, 0, 4]).unwrap();
        assert!(generation.is_some(), "no snapshot was installed");
    }
    cluster.start(behind).await;
    cluster.converge().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_another_disk_is_refused_and_stops() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose("a=1").await;
    let leader = cluster.leader().await;
    let other = (1..=3).find(|node| *node != leader).unwrap();
    cluster.stop(other).await;
    std::fs::remove_dir_all(cluster.path(other)).unwrap();
    cluster.start(other).await;
    let mut fatal = cluster.nodes[&other].host.fatal();
    let message = timeout(PATIENCE, fatal.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert!(message.contains(&format!("node {other} came back with another disk")), "{message}");
    cluster.propose("a=2").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_is_final() {
    let cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose("a=1").await;
    let leader = cluster.leader().await;
    let node = &cluster.nodes[&leader];
    node.host.fail_next_sync();
    let outcome = timeout(PATIENCE, node.group.propose(b"a=2".to_vec())).await;
    // The followers may have made it durable without this node; it may not say so itself.
    println!("proposed while the sync failed: {outcome:?}");
    let mut fatal = node.host.fatal();
    let message = timeout(PATIENCE, fatal.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert!(message.contains("injected failure"), "{message}");
    assert!(matches!(node.group.propose(b"a=3".to_vec()).await, Err(ProposeError::Stopped(_))));
    let begun = Instant::now();
    while node.group.leadership().borrow().is_leader {
        assert!(begun.elapsed() < PATIENCE);
        sleep(Duration::from_millis(10)).await;
    }
    cluster.propose("a=4").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_while_applying_stops_the_node() {
    let cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose("a=1").await;
    let leader = cluster.leader().await;
    let outcome = timeout(PATIENCE, cluster.group(leader).propose(b"panic".to_vec())).await.unwrap();
    assert!(matches!(outcome, Err(ProposeError::Unknown(_))), "{outcome:?}");
    let mut fatal = cluster.nodes[&leader].host.fatal();
    timeout(PATIENCE, fatal.wait_for(Option::is_some)).await.unwrap().unwrap();
    cluster.stop_all().await;
}

fn open_database(path: &Path) -> DB {
    let families = ["default", "log", "meta", "state"];
    let families = families.map(|name| ColumnFamilyDescriptor::new(name, Options::default()));
    DB::open_cf_descriptors(&Options::default(), path.join("db"), families).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_or_missing_entry_is_refused_at_start() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    for call in 0..10 {
        cluster.propose(&format!("a={call}")).await;
    }
    cluster.converge().await;
    cluster.stop(1).await;
    let path = cluster.path(1);
    let key = [&0_u32.to_be_bytes()[..], &5_u64.to_be_bytes()].concat();
    let whole = {
        let db = open_database(&path);
        let log = db.cf_handle("log").unwrap();
        let whole = db.get_cf(log, &key).unwrap().unwrap();
        let mut broken = whole.clone();
        *broken.last_mut().unwrap() ^= 1;
        db.put_cf(log, &key, broken).unwrap();
        whole
    };
    let refused = cluster.try_start(1).await.err().unwrap();
    assert!(matches!(&refused, HostError::Damaged(why) if why.contains("entry 5 of group 0")), "{refused}");
    {
        let db = open_database(&path);
        db.delete_cf(db.cf_handle("log").unwrap(), &key).unwrap();
    }
    let refused = cluster.try_start(1).await.err().unwrap();
    assert!(matches!(&refused, HostError::Damaged(why) if why.contains("entry 5")), "{refused}");
    {
        let db = open_database(&path);
        db.put_cf(db.cf_handle("log").unwrap(), &key, whole).unwrap();
    }
    cluster.start(1).await;
    cluster.converge().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_ends_before_what_was_applied_leaves_no_hole_behind_the_snapshot() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    for call in 0..20 {
        cluster.propose(&format!("a={call}")).await;
    }
    let leader = cluster.leader().await;
    let lagging = (1..=3).find(|node| *node != leader).unwrap();
    cluster.converge().await;
    let older = cluster.group(lagging).trigger_snapshot().await.unwrap();
    for call in 0..20 {
        cluster.propose(&format!("b={call}")).await;
    }
    let position = cluster.converge().await;
    cluster.stop(lagging).await;
    // As a kill leaves it if the others are quicker: applied, and the last entries not yet written here.
    {
        let db = open_database(&cluster.path(lagging));
        for index in position.index - 4..=position.index {
            let key = [&0_u32.to_be_bytes()[..], &index.to_be_bytes()].concat();
            db.delete_cf(db.cf_handle("log").unwrap(), key).unwrap();
        }
        db.delete_cf(db.cf_handle("meta").unwrap(), [0x10, 0, 0, 0, 0, 3]).unwrap();
    }
    std::fs::remove_file(cluster.path(lagging).join("acknowledged")).unwrap();
    cluster.start(lagging).await;
    cluster.propose("c=0").await;
    cluster.converge().await;
    let status = cluster.group(lagging).status();
    assert!(status.purged_index > older, "the log was not dropped, nothing was tested: {status:?}");
    assert!(status.snapshot_index >= status.purged_index, "what is dropped is in no snapshot: {status:?}");
    cluster.stop_all().await;
}

/// The newest write-ahead log with something in it.
fn write_ahead_log(path: &Path) -> PathBuf {
    let files = std::fs::read_dir(path.join("db")).unwrap().map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.filter(|path| path.metadata().unwrap().len() > 0).max().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_or_flipped_write_ahead_log_is_refused_at_start() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    for call in 0..20 {
        cluster.propose(&format!("a={call}")).await;
    }
    cluster.converge().await;
    cluster.stop(1).await;
    let log = write_ahead_log(&cluster.path(1));
    let whole = std::fs::read(&log).unwrap();
    for place in [whole.len() / 3, whole.len() / 2] {
        let mut flipped = whole.clone();
        flipped[place] ^= 0x10;
        std::fs::write(&log, flipped).unwrap();
        let refused = cluster.try_start(1).await.err().unwrap();
        assert!(matches!(refused, HostError::Damaged(_)), "flipped at {place}: {refused}");
    }
    std::fs::write(&log, &whole[..whole.len() / 2]).unwrap();
    let refused = cluster.try_start(1).await.err().unwrap();
    assert!(matches!(refused, HostError::Damaged(_)), "cut: {refused}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_belongs_to_one_process_and_one_node() {
    let mut cluster = Cluster::new(Limits::default());
    cluster.start(1).await;
    let second = cluster.try_start(1).await.err().unwrap();
    assert!(matches!(second, HostError::Locked(_)), "{second}");
    cluster.stop(1).await;
    std::fs::rename(cluster.path(1), cluster.path(2)).unwrap();
    let stranger = cluster.try_start(2).await.err().unwrap();
    assert!(matches!(stranger, HostError::Config(_)), "{stranger}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_commits_nothing_and_confirms_nothing() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose("a=1").await;
    cluster.converge().await;
    let leader = cluster.leader().await;
    let position = cluster.group(leader).status().position;
    for node in (1..=3).filter(|node| *node != leader) {
        cluster.stop(node).await;
    }
    let group = cluster.group(leader).clone();
    let moment = Duration::from_secs(2);
    let read = timeout(moment, group.read_barrier());
    let proposed = timeout(moment, group.propose(b"b=2".to_vec()));
    let (read, proposed) = tokio::join!(read, proposed);
    assert!(!matches!(read, Ok(Ok(_))), "one of three confirms that it leads: {read:?}");
    assert!(!matches!(proposed, Ok(Ok(_))), "one of three commits: {proposed:?}");
    assert_eq!(group.status().position, position, "and applies it");
    cluster.stop_all().await;
}
