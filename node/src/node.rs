//! One node: the roles that its configuration gives it, behind one port.
//!
//! The caller gives the connections that come in and the way to other nodes, so the same node runs as a process on TCP, and with
//! others inside one process without any socket.

use std::{
    collections::BTreeMap, future::Future, path::PathBuf, process::ExitCode, sync::Arc, time::Duration,
};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{service::Routes, transport::server::Connected};
use tonic_health::{ServingStatus, server::HealthReporter};
use verdict_coordinator::{CoordinatorConfig, CoordinatorNode};
use verdict_participant::{Participant, ParticipantConfig, ParticipantLimits};
use verdict_proto::connect::{Connect, Tcp, TcpFrom};
use verdict_protocol::ids::NodeId;
use verdict_raft::{Host, HostConfig, Limits, OnDisk, storage::Storage};

use crate::{
    config::Config,
    local::Local,
    serve::{incoming, server, set_health, standard_services},
};

/// How long open streams may take to end when the node stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// What a node finds around itself.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The way to other nodes.
    pub connect: Arc<dyn Connect>,
    /// The disk on which its folder is.
    pub storage: Arc<dyn Storage>,
    /// Bounds on what its Raft groups keep and queue.
    pub limits: Limits,
}

impl Surroundings {
    /// The disk of this machine, and the usual bounds.
    pub fn of_this_machine(connect: Arc<dyn Connect>) -> Surroundings {
        Surroundings { connect, storage: Arc::new(OnDisk), limits: Limits::default() }
    }
}

/// A node that runs.
pub struct Node {
    host: Arc<Host>,
    participant: Participant,
    coordinator: CoordinatorNode,
    health: HealthReporter,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Node {
    /// Starts a node on the connections that come in. It restarts from what its folder holds.
    pub async fn start<I, S>(config: &Config, connect: Arc<dyn Connect>, incoming: S) -> Result<Node>
    where
        I: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        S: Stream<Item = std::io::Result<I>> + Send + 'static,
    {
        let surroundings = Surroundings::of_this_machine(connect);
        Node::start_in(config, Surroundings { limits: config.raft_limits()?, ..surroundings }, incoming).await
    }

    /// The same, in other surroundings.
    pub async fn start_in<I, S>(config: &Config, surroundings: Surroundings, incoming: S) -> Result<Node>
    where
        I: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        S: Stream<Item = std::io::Result<I>> + Send + 'static,
    {
        let Surroundings { connect, storage, limits } = surroundings;
        config.check()?;
        let node = NodeId(config.node);
        let nodes = config.nodes()?;
        let host_config = HostConfig {
            cluster: config.cluster.clone(),
            node,
            address: nodes[&node].clone(),
            directory: config.data.clone(),
            timing: config.timing(),
            limits,
        };
        let opened = Host::open_on(host_config, connect.clone(), storage).await;
        let host = opened.with_context(|| format!("open the data folder {}", config.data.display()));
        let host = Arc::new(host?);
        let started = Node::start_on(config, host.clone(), connect, incoming).await;
        if started.is_err() {
            // A process that ends while the database is open may be aborted by it, instead of ending with the error.
            host.shutdown().await;
        }
        started
    }

    /// Starts the roles on an open folder.
    async fn start_on<I, S>(
        config: &Config,
        host: Arc<Host>,
        connect: Arc<dyn Connect>,
        incoming: S,
    ) -> Result<Node>
    where
        I: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        S: Stream<Item = std::io::Result<I>> + Send + 'static,
    {
        let (node, nodes) = (NodeId(config.node), config.nodes()?);
        let participant_config = ParticipantConfig {
            node,
            placement: config.placement(),
            shards: config.own_shards()?,
            limits: ParticipantLimits {
                parts_max: config.parts_per_shard_max,
                ..ParticipantLimits::default()
            },
        };
        let voters = config.shard_voters_of_all()?;
        let shard_voters = voters.iter().map(|(shard, voters)| (*shard, voters.keys().copied().collect()));
        let shard_voters = shard_voters.collect();
        // Whoever joins founds nothing.
        let founders = match config.join {
            true => voters.keys().map(|shard| (*shard, BTreeMap::new())).collect(),
            false => voters,
        };
        let participant = Participant::start(participant_config, &host, &founders).await?;
        let coordinator_config = CoordinatorConfig {
            limits: config.batch_limits(),
            leader: config.leader(),
            shard_voters,
            joins: config.join,
            ..CoordinatorConfig::new(node, nodes, config.placement())
        };
        let local = Arc::new(Local { participant: participant.clone() });
        let coordinator =
            CoordinatorNode::start(coordinator_config, &host, &config.coordinator_voters()?, connect, local)
                .await?;
        let mut routes = Routes::builder();
        let health = standard_services(&mut routes).await?;
        routes
            .add_service(host.service())
            .add_service(participant.service())
            .add_service(coordinator.settlement_service())
            .add_service(coordinator.forward_service())
            .add_service(coordinator.admin_service());
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = server(routes.routes()).serve_with_incoming_shutdown(incoming, async {
            // A dropped sender stops it too.
            let _ = stopped.await;
        });
        let server = tokio::spawn(serving);
        Ok(Node { host, participant, coordinator, health, stop, server })
    }

    /// The shards' side, for use inside this process.
    pub fn participant(&self) -> &Participant {
        &self.participant
    }

    /// The coordinator's side, for use inside this process.
    pub fn coordinator(&self) -> &CoordinatorNode {
        &self.coordinator
    }

    /// Ends when the node has stopped by itself, with the reason: an error of its disk, or a defect.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let told = |mut fatal: watch::Receiver<Option<String>>| async move {
            let message =
                fatal.wait_for(Option::is_some).await.map(|message| message.clone().unwrap_or_default());
            match message {
                Ok(message) => message,
                Err(_) => std::future::pending().await,
            }
        };
        let host = told(self.host.fatal());
        let (participant, coordinator) = (told(self.participant.fatal()), told(self.coordinator.fatal()));
        async move {
            tokio::select! {
                message = host => message,
                message = participant => message,
                message = coordinator => message,
            }
        }
    }

    /// Stops the node cleanly: nothing new is taken, what is on disk is closed.
    pub async fn stop(self) {
        set_health(&self.health, ServingStatus::NotServing).await;
        self.coordinator.shutdown().await;
        self.participant.shutdown().await;
        let _ = self.stop.send(());
        let mut server = self.server;
        // Streams of clients and other nodes may stay open for ever; they are cut after a moment.
        if tokio::time::timeout(STOP_PATIENCE, &mut server).await.is_err() {
            server.abort();
        }
        self.host.shutdown().await;
    }

    /// Runs until `shutdown` ends, or until the node stops by itself.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let failed = self.failed();
        tokio::select! {
            () = shutdown => {
                self.stop().await;
                Ok(())
            }
            // Rule R9: it never says another word, so nothing is shut down politely either.
            message = failed => Err(anyhow!("this node has stopped: {message}")),
        }
    }
}

/// `verdict node`.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// The configuration file (TOML); docs/operations.md explains it.
    #[arg(long)]
    pub config: PathBuf,
    /// Which node of the cluster this is, if the file doesn't say so: then one file serves all nodes.
    #[arg(long, value_name = "ID")]
    pub node: Option<u64>,
    /// End at once when the process that started this one has ended, or has closed this one's stdin.
    #[arg(long, hide = true)]
    pub ends_with_parent: bool,
}

impl NodeArgs {
    /// The configuration.
    pub fn load(&self) -> Result<Config> {
        Config::load(&self.config, self.node)
    }
}

/// Runs `verdict node`.
pub async fn run(args: NodeArgs, config: Config) -> Result<ExitCode> {
    if args.ends_with_parent {
        end_with_parent()?;
    }
    verdict_failpoints::start().map_err(|error| anyhow!(error)).context(verdict_failpoints::VARIABLE)?;
    // Before anything that takes time: process 1 of a container ignores the signals that nobody waits for.
    let interrupted = interrupted()?;
    let listener =
        TcpListener::bind(&config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    let connect: Arc<dyn Connect> = match config.connect_from {
        Some(address) => Arc::new(TcpFrom(address)),
        None => Arc::new(Tcp),
    };
    let node = Node::start(&config, connect, incoming(listener)).await?;
    crate::out!("verdict node {} of cluster {:?} is ready on {}", config.node, config.cluster, config.listen);
    node.run_until(interrupted).await?;
    crate::out!("verdict node {} has stopped", config.node);
    Ok(ExitCode::SUCCESS)
}

/// Ends this process as a kill would, as soon as its parent is gone. A kill loses nothing that was answered.
fn end_with_parent() -> Result<()> {
    #[cfg(target_os = "linux")]
    {
        // This ends a process that stands still, too.
        let signal = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(signal)
            .context("ask to be ended with the parent")?;
    }
    // The parent may have ended before that; and not every system has it.
    let watch = || {
        let end = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        tracing::debug!(?end, "the parent has ended");
        std::process::exit(1);
    };
    std::thread::Builder::new().name("parent".into()).spawn(watch).context("watch the parent")?;
    Ok(())
}

/// Ends with the first SIGINT or SIGTERM.
pub fn interrupted() -> Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
