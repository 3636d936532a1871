//! The coordinator's side of one node, put together.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc, watch},
    task::JoinHandle,
};
use tonic::Status;
use verdict_proto::{
    connect::Connect,
    convert::encoded,
    v1::{
        self, admin_server::AdminServer, forward_server::ForwardServer, settlement_server::SettlementServer,
    },
};
use verdict_protocol::{
    batch::{BatchLimits, Placement},
    coordinator::Coordinator,
    ids::{GroupId, NodeId, ShardId},
    leader::LeaderConfig,
};
use verdict_raft::{Group, Host, HostError};

use crate::{
    admin::{AdminService, LocalStatus},
    admission::Admission,
    directory::{Directory, Replicas, View},
    driver::{Driver, DriverConfig},
    forward::ForwardService,
    gateway::{Gateway, GatewayConfig, Local, Origin},
    leaders::Leaders,
    router::Router,
    settlement::SettlementService,
    spread::Spread,
    submitter::{Submitter, SubmitterConfig},
};

/// What is added to twice the limit on a batch's bytes to get the limit on messages: names, ids, a list of decisions or of rows.
const MESSAGE_BYTES_SLACK: usize = 16 << 20;

/// Settings of the coordinator's side of a node.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// This node.
    pub node: NodeId,
    /// All nodes of the cluster, this one included, and where they listen (`host:port`).
    pub nodes: BTreeMap<NodeId, String>,
    /// Where partitions live. The same on all nodes, for ever.
    pub placement: Placement,
    /// The founders of each shard. A shard that isn't listed has a replica on every node.
    pub shard_voters: BTreeMap<ShardId, BTreeSet<NodeId>>,
    /// This node joins a cluster that others have founded: it founds nothing, and waits until it is added.
    pub joins: bool,
    /// Settings of the leader.
    pub leader: LeaderConfig,
    /// Limits on a batch.
    pub limits: BatchLimits,
    /// How often the leader looks at its clock, in milliseconds.
    pub tick_ms: u64,
    /// How long a node goes on looking for the end of a batch after the batch's own time, in milliseconds.
    pub grace_ms: u64,
    /// Batches in flight on one stream; while there are so many, the stream is read no further.
    pub stream_window: usize,
    /// Submissions that may wait at this node, whoever leads; more are refused.
    pub submissions_max: usize,
    /// The same in bytes.
    pub submission_bytes_max: usize,
    /// Calls that may wait for the local driver.
    pub requests_max: usize,
    /// The version of the program, as `Admin.Status` shows it.
    pub version: String,
}

impl CoordinatorConfig {
    /// The defaults.
    pub fn new(node: NodeId, nodes: BTreeMap<NodeId, String>, placement: Placement) -> CoordinatorConfig {
        CoordinatorConfig {
            node,
            nodes,
            placement,
            shard_voters: BTreeMap::new(),
            joins: false,
            leader: LeaderConfig::new(placement),
            limits: BatchLimits::default(),
            tick_ms: 20,
            grace_ms: 2000,
            stream_window: 16_384,
            submissions_max: 100_000,
            submission_bytes_max: 256 << 20,
            requests_max: 16_384,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn message_bytes_max(&self) -> usize {
        2 * self.limits.bytes_max + MESSAGE_BYTES_SLACK
    }

    fn check(&self, voters: &BTreeMap<NodeId, String>) -> Result<(), CoordinatorError> {
        let problem = if !self.nodes.contains_key(&self.node) {
            format!("node {} is not among the nodes", self.node)
        } else if voters.is_empty() {
            "the coordinator group has no voters".to_owned()
        } else if let Some(voter) = voters.keys().find(|voter| !self.nodes.contains_key(voter)) {
            format!("the voter {voter} is not among the nodes")
        } else if self.placement.shards == 0 {
            "the placement has no shards".to_owned()
        } else if self.leader.placement != self.placement {
            "the leader's placement is another one".to_owned()
        } else if [self.tick_ms as usize, self.stream_window, self.submissions_max, self.requests_max]
            .contains(&0)
        {
            "tick_ms, stream_window, submissions_max and requests_max must not be 0".to_owned()
        } else {
            return Ok(());
        };
        Err(CoordinatorError::Config(problem))
    }
}

/// Why the coordinator's side of a node can't start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoordinatorError {
    /// The settings contradict each other.
    #[error("configuration: {0}")]
    Config(String),
    /// The replica can't start.
    #[error("start the coordinator group: {0}")]
    Host(#[from] HostError),
}

/// The coordinator's side of one node: a replica of the coordinator group (or none), and everything that clients and operators call.
/// A cheap handle.
#[derive(Clone)]
pub struct CoordinatorNode {
    gateway: Arc<Gateway>,
    settlement: SettlementService,
    admin: AdminService,
    tasks: Arc<Tasks>,
    fatal: watch::Receiver<Option<String>>,
}

/// The tasks and their end.
struct Tasks {
    shutdown: watch::Sender<bool>,
    running: Mutex<Vec<JoinHandle<()>>>,
}

impl CoordinatorNode {
    /// Starts the replica if this node is one of `voters` (the founders of the coordinator group, with their addresses), and the
    /// gateway in any case. Must be called within a tokio runtime. Dropping all handles ends the tasks too.
    pub async fn start(
        config: CoordinatorConfig,
        host: &Host,
        voters: &BTreeMap<NodeId, String>,
        connect: Arc<dyn Connect>,
        local: Arc<dyn LocalStatus>,
    ) -> Result<CoordinatorNode, CoordinatorError> {
        config.check(voters)?;
        let view = first_view(&config, voters);
        let directory = Directory::new(config.node, view, connect).map_err(CoordinatorError::Config)?;
        let directory = Arc::new(directory);
        let founders = if config.joins { BTreeMap::new() } else { voters.clone() };
        let group: Option<Group<Coordinator>> = match voters.contains_key(&config.node) {
            true => Some(host.start_group(GroupId::COORDINATOR, (), &founders).await?),
            false => None,
        };
        let leadership = group.as_ref().map(Group::leadership);
        let leaders = Arc::new(Leaders::new(config.node, directory.clone(), leadership));
        let (shutdown, stop) = watch::channel(false);
        let (fatal, fatal_receiver) = watch::channel(None);
        let fatal = Arc::new(fatal);
        let mut running = Vec::new();
        let spread = Arc::new(Spread {
            node: config.node,
            cluster: host.cluster().to_owned(),
            directory: directory.clone(),
            coordinator: group.clone(),
            shards: local.clone(),
            removed: host.removed(),
            fatal: fatal.clone(),
        });
        spread.refresh();
        let task = tokio::spawn(spread.clone().run(stop.clone()));
        running.push(tokio::spawn(watch_over("the spread of the members", task, fatal.clone())));
        let local_group = group.map(|group| {
            let (driver, task) = start_driver(&config, group.clone(), directory.clone(), stop.clone());
            running.push(tokio::spawn(watch_over("the driver", task, fatal.clone())));
            Local { group, driver }
        });
        let submitting = SubmitterConfig {
            node: config.node,
            placement: config.placement,
            submissions_max: config.submissions_max,
            bytes_max: config.submission_bytes_max,
            message_bytes_max: config.message_bytes_max(),
        };
        let driver = local_group.as_ref().map(|local| local.driver.clone());
        let (submitter, submissions) = Submitter::new(submitting, leaders.clone(), driver);
        let task = tokio::spawn(submitter.run(stop));
        running.push(tokio::spawn(watch_over("the submitter", task, fatal)));
        let gateway = Gateway {
            config: gateway_config(&config),
            leaders,
            submissions,
            admission: Admission::new(config.submissions_max),
            at_door: Arc::new(tokio::sync::Semaphore::new(1 + config.submission_bytes_max / 1024)),
            local: local_group,
            warned: Default::default(),
        };
        let gateway = Arc::new(gateway);
        Ok(CoordinatorNode {
            settlement: SettlementService { gateway: gateway.clone(), window: config.stream_window },
            admin: AdminService {
                gateway: gateway.clone(),
                local,
                version: config.version,
                spread,
                founders: config.nodes.into_iter().collect(),
                joins: config.joins,
            },
            gateway,
            tasks: Arc::new(Tasks { shutdown, running: Mutex::new(running) }),
            fatal: fatal_receiver,
        })
    }

    /// The service for clients, to be added to the node's server.
    pub fn settlement_service(&self) -> SettlementServer<SettlementService> {
        let most = self.gateway.config.message_bytes_max;
        SettlementServer::new(self.settlement.clone())
            .max_decoding_message_size(most)
            .max_encoding_message_size(most)
    }

    /// The service for other nodes, to be added to the node's server.
    pub fn forward_service(&self) -> ForwardServer<ForwardService> {
        let most = self.gateway.config.message_bytes_max;
        let service = ForwardService { gateway: self.gateway.clone(), window: self.settlement.window };
        ForwardServer::new(service).max_decoding_message_size(most).max_encoding_message_size(most)
    }

    /// The service for operators, to be added to the node's server.
    pub fn admin_service(&self) -> AdminServer<AdminService> {
        self.admin.clone().server()
    }

    /// As `Settlement.Submit`. Dropping the future changes nothing about the batch.
    pub async fn submit(&self, batch: v1::Batch) -> Result<v1::Outcome, Status> {
        self.gateway.submit(encoded(&batch), Origin::EMBEDDED).await
    }

    /// As `Settlement.GetBatch`.
    pub async fn get_batch(&self, request: v1::GetBatchRequest) -> Result<v1::Outcome, Status> {
        self.gateway.get_batch(request, Origin::EMBEDDED).await
    }

    /// As `Settlement.Read`.
    pub async fn read(&self, request: v1::ReadRequest) -> Result<v1::ReadResponse, Status> {
        self.gateway.read(request, Origin::EMBEDDED).await
    }

    /// As `Settlement.History`.
    pub async fn history(&self, request: v1::HistoryRequest) -> Result<v1::HistoryResponse, Status> {
        self.gateway.history(request, Origin::EMBEDDED).await
    }

    /// Whether the replica on this node leads the coordinators, as far as it knows.
    pub fn leads(&self) -> bool {
        self.gateway.leaders.is_local()
    }

    /// The replica on this node.
    pub fn group(&self) -> Option<Group<Coordinator>> {
        self.gateway.local.as_ref().map(|local| local.group.clone())
    }

    /// The message of the defect that ended one of the tasks, once there is one: this node can't serve any more, and as it might go on
    /// leading without anybody who decides, the process should end.
    pub fn fatal(&self) -> watch::Receiver<Option<String>> {
        self.fatal.clone()
    }

    /// Ends the tasks. Callers who wait are told that their outcome isn't known here. The replica is left to the host.
    pub async fn shutdown(&self) {
        self.tasks.shutdown.send_replace(true);
        for task in self.tasks.running.lock().await.drain(..) {
            // What it watches over is told by `fatal`.
            let _ = task.await;
        }
    }
}

/// Says so if a task panics.
async fn watch_over(name: &'static str, task: JoinHandle<()>, fatal: Arc<watch::Sender<Option<String>>>) {
    if let Err(error) = task.await {
        let message = format!("{name} of the coordinators has failed: {error}");
        tracing::error!(message, "this node must stop");
        fatal.send_replace(Some(message));
    }
}

/// What is known of the members before anybody has told more.
fn first_view(config: &CoordinatorConfig, voters: &BTreeMap<NodeId, String>) -> View {
    let replicas = |voters| Replicas { voters, ..Replicas::default() };
    let shards = config.shard_voters.iter().map(|(shard, voters)| (shard.group(), replicas(voters.clone())));
    let coordinators = (GroupId::COORDINATOR, replicas(voters.keys().copied().collect()));
    let groups = shards.chain([coordinators]).collect();
    View { nodes: config.nodes.clone(), groups, ..View::default() }
}

fn gateway_config(config: &CoordinatorConfig) -> GatewayConfig {
    GatewayConfig {
        node: config.node,
        placement: config.placement,
        limits: config.limits,
        timeout_default: Duration::from_millis(config.leader.timeout_default_ms),
        timeout_max: Duration::from_millis(config.leader.timeout_max_ms),
        grace: Duration::from_millis(config.grace_ms),
        message_bytes_max: config.message_bytes_max(),
    }
}

fn start_driver(
    config: &CoordinatorConfig,
    group: Group<Coordinator>,
    directory: Arc<Directory>,
    shutdown: watch::Receiver<bool>,
) -> (mpsc::Sender<crate::driver::Request>, JoinHandle<()>) {
    let (sender, requests) = mpsc::channel(config.requests_max);
    let driver = Driver {
        config: DriverConfig {
            node: config.node,
            placement: config.placement,
            leader: config.leader,
            tick: Duration::from_millis(config.tick_ms),
        },
        leadership: group.leadership(),
        group,
        requests,
        router: Router::new(config.node, directory, config.placement),
        shutdown,
    };
    (sender, tokio::spawn(driver.run()))
}
