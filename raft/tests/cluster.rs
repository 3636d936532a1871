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
use verdict_raft::{Group, Host, HostConfig, HostError, Limits, Progress, ProposeError, Timing};

const GROUP: GroupId = GroupId(0);
/// Far longer than anything takes here, on a machine that stands still for seconds too.
const PATIENCE: Duration = Duration::from_secs(60);

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
        if let Some(path) = command.strip_prefix(b"wait ") {
            let path = Path::new(std::str::from_utf8(path).unwrap());
            let begun = Instant::now();
            std::fs::write(path.with_extension("entered"), "").unwrap();
            tokio::task::block_in_place(|| {
                while path.exists() && begun.elapsed() < PATIENCE {
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        self.applied += 1;
        let (key, value) = command.split_at(command.len().min(2));
        store.put(&[b"\x11", key].concat(), value)?;
        store.note(&[b"\x10count", &self.applied.to_be_bytes()]);
        Ok(self.applied)
    }

    /// How many there were is kept in memory in between.
    fn flush(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        store.bring(b"\x10count", Some(&self.applied.to_be_bytes()))
    }

    fn trim(&mut self, _: usize) {}
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
        let voters = (1..=3).map(|node| (NodeId(node), address(node))).collect();
        let group = match host.start_group::<Registers>(GROUP, (), &voters).await {
            Ok(group) => group,
            Err(error) => {
                host.shutdown().await;
                return Err(error);
            }
        };
        // As in a node: nobody is answered before everything was found whole.
        let incoming = ReceiverStream::new(self.network.listen(&address(node)));
        let (server, stop) = oneshot::channel::<()>();
        let router = tonic::transport::Server::builder().add_service(host.service());
        let task = tokio::spawn(async move {
            let stop = async { drop(stop.await) };
            router.serve_with_incoming_shutdown(incoming, stop).await.unwrap();
        });
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
    assert!(begun.elapsed() < PATIENCE);
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
    let (begun, mut round) = (Instant::now(), 0);
    let status = loop {
        for call in 0..30 {
            cluster.propose(&format!("{:02}{round}", call)).await;
        }
        let status = cluster.group(leader).status();
        if status.snapshot_index > 100 {
            break status;
        }
        assert!(begun.elapsed() < PATIENCE, "{status:?}");
        round += 1;
        sleep(Duration::from_millis(50)).await;
    };
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
async fn a_replica_that_fell_far_behind_catches_up_from_the_disk_while_the_load_goes_on() {
    // Memory holds some twenty entries.
    let mut cluster = Cluster::start_three(Limits { tail_bytes: 2048, ..Limits::default() }).await;
    cluster.propose("a=0").await;
    let leader = cluster.leader().await;
    let behind = (1..=3).find(|node| *node != leader).unwrap();
    cluster.stop(behind).await;
    let group = cluster.group(leader);
    let calls: Vec<_> = (0..3000).map(|call| group.start_propose(format!("k={call}").into_bytes())).collect();
    for call in calls {
        call.await.unwrap();
    }
    let goal = group.status().applied_index;
    cluster.start(behind).await;
    let begun = Instant::now();
    while cluster.group(behind).status().applied_index < goal {
        cluster.propose("b=1").await;
        assert!(begun.elapsed() < PATIENCE, "it never catches up: {:?}", cluster.group(behind).status());
    }
    cluster.converge().await;
    let status = cluster.group(leader).status();
    assert_eq!(status.snapshot_index, 0, "it came by a snapshot: {status:?}");
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
    let message = cluster.start_refused(other).await;
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

/// Whoever leads now may not have applied yet what the leader before has answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_confirms_reads_only_when_it_has_applied_what_was_committed() {
    let cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose("a=1").await;
    cluster.converge().await;
    let leader = cluster.leader().await;
    let held_back = cluster.directory.path().join("held-back");
    std::fs::write(&held_back, "").unwrap();
    let group = cluster.group(leader).clone();
    let wait = format!("wait {}", held_back.display()).into_bytes();
    let proposals = [group.start_propose(wait), group.start_propose(b"b=2".to_vec())];
    // What is applied is committed. (A replica can't be asked while it applies.) And a moment for the one behind it.
    let begun = Instant::now();
    while !held_back.with_extension("entered").exists() {
        assert!(begun.elapsed() < PATIENCE / 2, "it is not committed");
        sleep(Duration::from_millis(5)).await;
    }
    sleep(Duration::from_millis(500)).await;
    let heir = (1..=3).find(|node| *node != leader).unwrap();
    while let Err(error) = group.transfer_leader(Some(NodeId(heir))).await
        && group.leadership().borrow().leader != Some(NodeId(heir))
    {
        assert!(begun.elapsed() < PATIENCE / 2, "{error}");
        sleep(Duration::from_millis(50)).await;
    }
    let heir = cluster.group(heir).clone();
    let early = timeout(Duration::from_millis(400), heir.read_barrier()).await;
    std::fs::remove_file(&held_back).unwrap();
    assert!(!matches!(early, Ok(Ok(_))), "it has not applied what its predecessor has committed: {early:?}");
    while let Err(error) = heir.read_barrier().await {
        assert!(begun.elapsed() < PATIENCE, "{error}");
    }
    heir.read(|_, store| assert_eq!(store.get(b"\x11b=").unwrap().unwrap(), "2"));
    drop(proposals);
    cluster.stop_all().await;
}

fn open_database(path: &Path) -> DB {
    let families = ["default", "log", "meta"];
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

/// Who looks at a group and who applies to it take the same locks: in the same order, or both would wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_can_be_looked_at_all_the_time_while_entries_are_applied() {
    let cluster = Cluster::start_three(Limits::default()).await;
    let groups: Vec<_> = (1..=3).map(|node| cluster.group(node).clone()).collect();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    // On a thread of its own: what hangs here must not hang the test.
    let looks = std::thread::spawn(move || {
        let mut looks = 0_u64;
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            looks += groups.iter().filter(|group| group.status().applied_index > 0).count() as u64;
        }
        looks
    });
    for call in 0..500 {
        let command = format!("a={call}");
        let proposed = tokio::time::timeout(PATIENCE, cluster.propose(&command));
        proposed.await.expect("nobody waits for ever");
    }
    stop.send(()).unwrap();
    assert!(looks.join().unwrap() > 500);
    cluster.stop_all().await;
}

/// The newest write-ahead log with something in it.
fn write_ahead_log(path: &Path) -> PathBuf {
    let files = std::fs::read_dir(path.join("db")).unwrap().map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.filter(|path| path.metadata().unwrap().len() > 0).max().unwrap()
}

/// A node that has made a snapshot and purged the log behind it, stopped.
async fn with_a_purged_log() -> Cluster {
    let mut cluster = Cluster::start_three(small_snapshots()).await;
    let begun = Instant::now();
    while cluster.group(1).status().purged_index == 0 {
        for call in 0..30 {
            cluster.propose(&format!("{call:02}{call}")).await;
        }
        assert!(begun.elapsed() < PATIENCE, "the log isn't purged");
    }
    cluster.converge().await;
    cluster.stop(1).await;
    cluster
}

/// All of its state is gone, and that it was there is forgotten.
fn lose_state(path: &Path) {
    std::fs::remove_dir_all(path.join("state")).unwrap();
    std::fs::remove_file(path.join("synced-state")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_state_is_behind_its_purged_log_is_refused() {
    let cluster = with_a_purged_log().await;
    lose_state(&cluster.path(1));
    let refused = cluster.try_start(1).await.err().unwrap();
    assert!(
        matches!(&refused, HostError::Damaged(why) if why.contains("was purged up to") && why.contains("ends at nothing")),
        "{refused}"
    );
    cluster.propose("a=1").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_log_is_whole_applies_it_again_if_the_state_is_gone() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    for call in 0..20 {
        cluster.propose(&format!("{call:02}{call}")).await;
    }
    let position = cluster.converge().await;
    cluster.stop(1).await;
    lose_state(&cluster.path(1));
    cluster.start(1).await;
    assert!(cluster.converge().await.index >= position.index);
    cluster.stop_all().await;
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

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if path.is_dir() {
            copy_folder(&path, &to.join(name));
        } else {
            std::fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

fn put_back(copy: &Path, to: &Path) {
    std::fs::remove_dir_all(to).unwrap();
    copy_folder(copy, to);
}

impl Cluster {
    async fn propose_some(&self, tag: &str) {
        for call in 0..5 {
            self.propose(&format!("a={tag}{call}")).await;
        }
        self.converge().await;
    }

    /// Starts a node whose disk must not be used, waits until it has stopped, and gives the reason.
    async fn start_refused(&mut self, node: u64) -> String {
        let running = match self.try_start(node).await {
            Ok(running) => running,
            // Others were quicker than the founding of its group.
            Err(HostError::Stopped(message)) => return message,
            Err(error) => panic!("{error}"),
        };
        let mut fatal = running.host.fatal();
        let message = timeout(PATIENCE, fatal.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
        assert!(!running.group.leadership().borrow().is_leader);
        running.stop().await;
        message.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_a_disk_is_refused_and_stops() {
    let mut cluster = Cluster::start_three(Limits::default()).await;
    cluster.propose_some("before").await;
    let copy = cluster.directory.path().join("copy");
    cluster.stop(3).await;
    copy_folder(&cluster.path(3), &copy);
    cluster.start(3).await;
    cluster.propose_some("after").await;
    cluster.stop(3).await;
    put_back(&copy, &cluster.path(3));
    let why = cluster.start_refused(3).await;
    assert!(why.contains("an older copy of a disk") && why.contains("under a new node id"), "{why}");
    // Nor does it help to start it again and again, until its starts have as high a number.
    for _ in 0..3 {
        let why = cluster.start_refused(3).await;
        assert!(why.contains("an older copy of a disk"), "{why}");
    }
    cluster.propose("b=1").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_running_disk_is_refused_even_after_the_others_were_restarted() {
    for restart_others in [false, true] {
        let mut cluster = Cluster::start_three(Limits::default()).await;
        cluster.propose_some("before").await;
        let copy = cluster.directory.path().join("copy");
        copy_folder(&cluster.path(3), &copy);
        cluster.propose_some("after").await;
        // What others have told is on disk a second later at the latest.
        sleep(Duration::from_millis(if restart_others { 2500 } else { 0 })).await;
        cluster.stop(3).await;
        if restart_others {
            for node in [1, 2] {
                cluster.stop(node).await;
            }
            for node in [1, 2] {
                cluster.start(node).await;
            }
        }
        put_back(&copy, &cluster.path(3));
        let why = cluster.start_refused(3).await;
        assert!(why.contains("batches of promises"), "{why}");
        cluster.propose("b=1").await;
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_of_one_of_two_and_of_all_are_no_older_copies() {
    let mut cluster = Cluster::start_three(small_snapshots()).await;
    for round in 0..4 {
        for together in [&[1][..], &[2, 3], &[1, 2, 3]] {
            cluster.propose_some(&format!("{round}-{}-", together.len())).await;
            for node in together {
                cluster.stop(*node).await;
            }
            for node in together {
                cluster.start(*node).await;
            }
            cluster.converge().await;
        }
    }
    for running in cluster.nodes.values() {
        assert_eq!(*running.host.fatal().borrow(), None);
    }
    // One that is gone doesn't keep the others from voting after their restart.
    cluster.stop(1).await;
    for node in [2, 3] {
        cluster.stop(node).await;
    }
    for node in [2, 3] {
        cluster.start(node).await;
    }
    let began = Instant::now();
    cluster.propose("b=1").await;
    println!("two of three settled {:?} after their restart", began.elapsed());
    cluster.stop_all().await;
}

/// A step of a simple generator of numbers (SplitMix64).
fn number(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What kind of file this is; None: nothing depends on it.
fn kind(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?;
    let of_state = path.parent().is_some_and(|folder| folder.ends_with("state"));
    match name {
        "acknowledged" => Some("acknowledged"),
        "synced" => Some("synced"),
        "synced-state" => Some("synced-state"),
        "CURRENT" if of_state => Some("CURRENT of the state"),
        "CURRENT" => Some("CURRENT"),
        _ if name.starts_with("MANIFEST") && of_state => Some("manifest of the state"),
        _ if name.starts_with("MANIFEST") => Some("manifest"),
        _ if name.ends_with(".sst") && of_state => Some("table of the state"),
        _ if name.ends_with(".sst") => Some("table"),
        _ if name.ends_with(".log") => Some("log"),
        _ => None,
    }
}

const KINDS: [&str; 10] = [
    "log",
    "table",
    "table of the state",
    "manifest",
    "manifest of the state",
    "CURRENT",
    "CURRENT of the state",
    "acknowledged",
    "synced",
    "synced-state",
];

/// The files of that kind that aren't empty.
fn files_of(folder: &Path, wanted: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_of(&path, wanted));
        } else if kind(&path) == Some(wanted) && path.metadata().unwrap().len() > 0 {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Flips a bit somewhere, or cuts the file off there. Gives what was done.
fn damage(path: &Path, seed: &mut u64) -> String {
    let mut bytes = std::fs::read(path).unwrap();
    let place = number(seed) as usize % bytes.len();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    if number(seed).is_multiple_of(3) {
        bytes.truncate(place);
        std::fs::write(path, bytes).unwrap();
        return format!("{name} cut at {place}");
    }
    let bit = number(seed) % 8;
    bytes[place] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
    format!("{name} flipped at {place}, bit {bit}")
}

/// Everything that a machine keeps, what it has in memory alone included.
fn contents(group: &Group<Registers>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, StoreError> {
    group.read(|machine, store| {
        let mut found = BTreeMap::new();
        store.scan(b"\x10", b"\x12", &mut |key, value| {
            found.insert(key.to_vec(), value.to_vec());
            true
        })?;
        found.insert(b"\x10count".to_vec(), machine.applied.to_be_bytes().to_vec());
        Ok(found)
    })
}

impl Cluster {
    /// Whether a node stands where the leader stands, or stops before.
    async fn catches_up_or_stops(&self, node: u64) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            let fatal = self.nodes[&node].host.fatal().borrow().clone();
            if let Some(why) = fatal {
                return Err(why);
            }
            let leader = self.leader().await;
            let (here, there) = (self.group(node).status(), self.group(leader).status());
            if here.position == there.position && here.applied_index == there.applied_index {
                return Ok(());
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "node {node} neither catches up nor stops: {here:?} {there:?}"
            );
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// The documented way back: the node is replaced by a new one, with an empty folder.
    async fn replace(&mut self, old: u64, new: u64) {
        self.start(new).await;
        let begun = Instant::now();
        loop {
            let leader = self.leader().await;
            let add = Some((NodeId(new), address(new)));
            if let Ok(Progress::Done) = self.group(leader).change_members(add, Some(NodeId(old))).await {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "node {old} is not replaced by {new}");
            sleep(Duration::from_millis(20)).await;
        }
        self.converge().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_anywhere_is_refused_or_harmless_and_never_spreads() {
    let rounds: usize = std::env::var("VERDICT_DAMAGES").ok().map_or(30, |rounds| rounds.parse().unwrap());
    let mut seed = std::env::var("VERDICT_SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    println!("VERDICT_SEED={seed}");
    let mut cluster = Cluster::start_three(small_snapshots()).await;
    let (mut next_node, mut proposed) = (4, 0);
    let mut outcomes: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for round in 0..rounds {
        for _ in 0..25 {
            cluster.propose(&format!("{:02}{round}", proposed % 100)).await;
            proposed += 1;
        }
        cluster.converge().await;
        let nodes: Vec<u64> = cluster.nodes.keys().copied().collect();
        let node = nodes[number(&mut seed) as usize % nodes.len()];
        if round % 3 == 0 {
            // What is in the log now is in tables after it.
            cluster.stop(node).await;
            cluster.start(node).await;
            cluster.propose("zz").await;
            proposed += 1;
            cluster.converge().await;
        }
        cluster.stop(node).await;
        let wanted = KINDS[round % KINDS.len()];
        let files = files_of(&cluster.path(node), wanted);
        if files.is_empty() {
            cluster.start(node).await;
            continue;
        }
        let pristine = cluster.directory.path().join("pristine");
        let _ = std::fs::remove_dir_all(&pristine);
        copy_folder(&cluster.path(node), &pristine);
        let file = &files[number(&mut seed) as usize % files.len()];
        let done = damage(file, &mut seed);
        let outcome = match cluster.try_start(node).await {
            Err(refused) => {
                let why = refused.to_string();
                assert!(matches!(refused, HostError::Damaged(_) | HostError::Storage(_)), "{done}: {why}");
                assert!(why.len() > 20, "{done}: {why:?} tells nothing");
                // Nobody has heard of that start: the same disk, whole, is as good as before.
                put_back(&pristine, &cluster.path(node));
                cluster.start(node).await;
                "refused at start"
            }
            Ok(running) => {
                cluster.nodes.insert(node, running);
                for call in 0..5 {
                    cluster.propose(&format!("{:02}{call}", proposed % 100)).await;
                    proposed += 1;
                }
                let stood = match cluster.catches_up_or_stops(node).await {
                    // All of it is read, as for a replica that needs it.
                    Ok(()) => contents(cluster.group(node)).map_err(|error| error.to_string()),
                    Err(why) => Err(why),
                };
                match stood {
                    Ok(found) => {
                        let other = *cluster.nodes.keys().find(|other| **other != node).unwrap();
                        assert!(found == contents(cluster.group(other)).unwrap(), "{done}: other contents");
                        "harmless"
                    }
                    Err(_) => {
                        cluster.stop(node).await;
                        cluster.replace(node, next_node).await;
                        next_node += 1;
                        "stopped when it was read"
                    }
                }
            }
        };
        println!("{done}: {outcome}");
        *outcomes.entry((wanted, outcome)).or_default() += 1;
    }
    cluster.converge().await;
    let states: Vec<_> = cluster.nodes.values().map(|running| contents(&running.group).unwrap()).collect();
    assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "the replicas differ");
    assert_eq!(states[0][&b"\x10count"[..]], (proposed as u64).to_be_bytes());
    println!("| file | what became of it | times |\n|---|---|---|");
    for ((kind, outcome), times) in &outcomes {
        println!("| {kind} | {outcome} | {times} |");
    }
    for kind in ["log", "manifest", "CURRENT", "manifest of the state", "CURRENT of the state"] {
        assert!(outcomes.contains_key(&(kind, "refused at start")), "damage to {kind} was never refused");
    }
    cluster.stop_all().await;
}
