//! Everything of one node that has to do with Raft.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use openraft::{Config, Raft, SnapshotPolicy};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use verdict_proto::{connect::Connect, v1::raft_server};
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
};

use crate::{
    acknowledged::{Acknowledged, Mark},
    api::{HostConfig, HostError},
    disk::{Disk, Identity, apart, host_error, snapshot_directory},
    fatal::Fatal,
    group::Group,
    log::{GroupLog, LogStore},
    network::Network,
    node::{Disks, Node},
    on_disk::OnDisk,
    peer::MESSAGE_BYTES_MAX,
    replica::{Replica, StateMachine},
    service::Service,
    snapshot::{self, Snapshots},
    standing::{Life, SAVE_AFTER, Standings},
    state::StoreLimits,
    storage::Storage,
    writer::{Operation, Running, Writer},
};

/// How long closing waits for the last user of the database.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
const CLOSE_PAUSE: Duration = Duration::from_millis(1);
/// Entries in one message to a follower; its bytes are bounded as well.
const ENTRIES_PER_MESSAGE: u64 = 1024;

/// Everything of one node that has to do with Raft: the database, the log writer, the transport, the groups.
pub struct Host {
    node: Arc<Node>,
    open: Mutex<Option<Open>>,
}

/// What is closed by [`Host::shutdown`].
struct Open {
    disk: Arc<Disk>,
    /// What had been acknowledged of each group when the host opened.
    marks: BTreeMap<u32, Mark>,
    writer: Running,
}

impl Host {
    /// Opens the directory on the disk of this machine: see [`Host::open_on`].
    pub async fn open(config: HostConfig, connect: Arc<dyn Connect>) -> Result<Host, HostError> {
        Host::open_on(config, connect, Arc::new(OnDisk)).await
    }

    /// Opens the directory, and starts the log writer and the transport. Groups are started one by one after it.
    pub async fn open_on(
        config: HostConfig,
        connect: Arc<dyn Connect>,
        storage: Arc<dyn Storage>,
    ) -> Result<Host, HostError> {
        let fatal = Fatal::new();
        let (prepared, prepared_fatal, prepared_storage) = (config.clone(), fatal.clone(), storage.clone());
        let opening = apart(&storage, move || {
            let (config, storage) = (prepared, prepared_storage);
            storage.create_folder(&config.directory).map_err(host_error)?;
            let disk = Disk::open(storage.clone(), &config.directory, config.limits.block_cache_bytes)?;
            snapshot::clean_up(&*storage, &snapshot_directory(&config.directory)).map_err(host_error)?;
            let identity = Identity::establish(&disk, &config)?;
            let incarnations = disk.incarnations().map_err(host_error)?;
            let acknowledged = Acknowledged::open(&*storage, &config.directory).map_err(host_error)?;
            let marks = acknowledged.marks();
            let queue = config.limits.writer_queue;
            let standings = Arc::new(Standings::new(disk.standings().map_err(host_error)?));
            let life = Life::begin(&disk).map_err(host_error)?;
            let started = Writer::start(disk.clone(), acknowledged, standings.clone(), prepared_fatal, queue);
            let (writer, running) = started.map_err(host_error)?;
            let open = Open { disk, marks, writer: running };
            Ok((open, Disks { identity, life, incarnations, standings }, writer))
        });
        let opened = opening.await.map_err(|error| HostError::Storage(error.to_string()))?;
        let (open, disks, writer) = opened?;
        let node = Arc::new(Node::new(config, disks, fatal, writer, connect, storage));
        tokio::spawn(save_standings(node.clone()));
        Ok(Host { node, open: Mutex::new(Some(open)) })
    }

    /// Starts the replica of a group on this node, from disk if it was here before. `voters` (with their addresses) founds
    /// the group if this replica has neither a log nor a vote; all nodes may do so at the same time with the same voters.
    /// A node that isn't among the voters waits until the group's leader adds it.
    pub async fn start_group<M: Machine>(
        &self,
        group: GroupId,
        machine: M::Config,
        voters: &BTreeMap<NodeId, String>,
    ) -> Result<Group<M>, HostError> {
        if let Some(message) = self.node.fatal.get() {
            return Err(HostError::Stopped(message));
        }
        let (log, replica) = self.recover::<M>(group, machine).await?;
        let pristine = log.is_pristine() && replica.applied().borrow().is_none();
        let config = raft_config(&self.node.config)?;
        let network = Network { node: self.node.clone(), group };
        let store = LogStore::new(log.clone(), self.node.writer.clone());
        let replica = Arc::new(replica);
        let machine = StateMachine(replica.clone());
        let raft = Raft::build(self.node.config.node.0, Arc::new(config), network, store, machine).await;
        let raft = raft.map_err(|error| HostError::Storage(error.to_string()))?;
        raft.run();
        let founders = voters.iter().map(|(id, address)| (id.0, address.clone())).collect();
        let started = Group::start(group, self.node.clone(), raft, replica, log, founders);
        {
            let mut endpoints = self.node.endpoints.write().expect("nothing panics while it holds this lock");
            endpoints.insert(group, started.endpoint());
        }
        if pristine && voters.contains_key(&self.node.config.node) {
            // Another node may have refused this one meanwhile.
            let stopped = |error| self.node.fatal.get().map_or(HostError::Storage(error), HostError::Stopped);
            started.found(voters).await.map_err(stopped)?;
        }
        Ok(started)
    }

    async fn recover<M: Machine>(
        &self,
        group: GroupId,
        machine: M::Config,
    ) -> Result<(Arc<GroupLog>, Replica<M>), HostError> {
        let ((disk, acknowledged), node) = (self.disk(group)?, self.node.clone());
        let recovering = apart(&self.node.storage, move || {
            let limits = &node.config.limits;
            let folder = snapshot_directory(&node.config.directory);
            let snapshots = Snapshots::new(node.storage.clone(), &folder, group);
            let log = GroupLog::open(disk.clone(), group, limits.tail_bytes, acknowledged)?;
            let fatal = node.fatal.clone();
            let replica = Replica::open(disk, group, machine, snapshots, StoreLimits::of(limits), fatal)?;
            replica.check_reaches(log.purged())?;
            // The log may end before what was applied: a leader applies what a majority of the others has on disk, before its own disk
            // has it, and a snapshot is installed before the log is cut. Raft's library then goes on behind what was applied.
            // What this node had acknowledged is another matter: that is checked by `GroupLog::open`.
            Ok((log, replica))
        });
        let recovered = recovering.await.map_err(|error| HostError::Storage(error.to_string()))?;
        recovered.map_err(host_error)
    }

    fn disk(&self, group: GroupId) -> Result<(Arc<Disk>, Mark), HostError> {
        let open = self.open.lock().expect("nothing panics while it holds this lock");
        let open = open.as_ref().ok_or_else(|| HostError::Stopped("the host was shut down".to_owned()))?;
        Ok((open.disk.clone(), open.marks.get(&group.0).copied().unwrap_or_default()))
    }

    /// The gRPC service for other nodes' messages, to be added to the node's server.
    pub fn service(&self) -> raft_server::RaftServer<Service> {
        raft_server::RaftServer::new(Service::new(self.node.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The addresses of all other nodes that this one has reason to talk to.
    pub fn addresses(&self) -> BTreeMap<NodeId, String> {
        self.node.addresses()
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.node.config.cluster
    }

    /// Where to put the nodes that were removed from the cluster: from then on they are told so and not listened to. One that runs
    /// and hears it stops.
    pub fn removed(&self) -> watch::Sender<BTreeSet<NodeId>> {
        self.node.removed.clone()
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.node.config.node
    }

    /// The message of the error that stops this node, once there is one: nothing is acknowledged after it, and the process
    /// should end.
    pub fn fatal(&self) -> watch::Receiver<Option<String>> {
        self.node.fatal.subscribe()
    }

    /// Makes the next sync of the log fail, for tests.
    #[doc(hidden)]
    pub fn fail_next_sync(&self) {
        self.node.writer.fail_next_sync();
    }

    /// Stops the groups, the writer and the transport, and closes the database. Handles of groups stay valid, but everything
    /// asked of them fails.
    pub async fn shutdown(&self) {
        let taken = self.open.lock().expect("nothing panics while it holds this lock").take();
        let Some(Open { disk, writer, .. }) = taken else { return };
        self.node.stop.send_replace(true);
        for endpoint in self.node.all_endpoints() {
            endpoint.stop().await;
        }
        self.node.endpoints.write().expect("nothing panics while it holds this lock").clear();
        self.node.forget_peers();
        self.node.writer.stop().await;
        writer.ended().await;
        let begun = Instant::now();
        while Arc::strong_count(&disk) > 1 && begun.elapsed() < CLOSE_PATIENCE {
            sleep(CLOSE_PAUSE).await;
        }
        if Arc::strong_count(&disk) > 1 {
            tracing::warn!("the database is still in use");
        }
        // Closing waits for the database's own threads.
        drop(apart(&self.node.storage, move || drop(disk)).await);
    }
}

/// What others have told is kept even if there is nothing else to write, a little later.
async fn save_standings(node: Arc<Node>) {
    let mut stop = node.stop.subscribe();
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = sleep(SAVE_AFTER) => {}
        }
        // An error means that the node stops.
        if node.standings.has_unsaved() && node.writer.submit(Operation::Standings).await.is_err() {
            return;
        }
    }
}

fn raft_config(config: &HostConfig) -> Result<Config, HostError> {
    let timing = &config.timing;
    let raft = Config {
        cluster_name: config.cluster.clone(),
        heartbeat_interval: timing.heartbeat_ms,
        election_timeout_min: timing.election_timeout_min_ms,
        election_timeout_max: timing.election_timeout_max_ms,
        install_snapshot_timeout: timing.snapshot_timeout_ms,
        max_payload_entries: ENTRIES_PER_MESSAGE,
        // Snapshots are triggered and the log is purged by `tend_snapshots`, which counts bytes as well.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        enable_pre_vote: Some(true),
        // A restarted leader has lost what it kept in memory: it must not go on in its old term.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    raft.validate().map_err(|error| HostError::Config(error.to_string()))
}
