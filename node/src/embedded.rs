//! A durable three-node cluster inside one process, for services that embed Verdict and for trying things out.
//!
//! The nodes are the same as those of a real cluster: real Raft, real disks, real gRPC; only their connections stay inside the
//! process. It survives `kill -9` and loss of power as any node does. What it can't survive is the loss of its disk, which a real
//! cluster would.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio_stream::wrappers::ReceiverStream;
use verdict_client::{Client, Options, row};
use verdict_proto::connect::InProcess;
use verdict_protocol::{batch::Placement, ids::ShardId};

use crate::{config::Config, memory, node::Node};

/// How many nodes there are: one may fail.
const NODES: u64 = 3;
/// How long the cluster may take to elect its leaders.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// The cluster.
pub struct Cluster {
    nodes: Vec<Node>,
    network: InProcess,
    addresses: Vec<String>,
    placement: Placement,
}

impl Cluster {
    /// Starts the cluster from what `directory` holds, or founds it there, and waits until it can settle. `shards` can't change
    /// afterwards.
    pub async fn start(directory: &Path, shards: u32) -> Result<Cluster> {
        let network = InProcess::default();
        let address = |node: u64| format!("node-{node}:1");
        let all: BTreeMap<String, String> =
            (1..=NODES).map(|node| (node.to_string(), address(node))).collect();
        let mut nodes = Vec::new();
        for node in 1..=NODES {
            let data: PathBuf = directory.join(format!("node-{node}"));
            let mut config = Config::new("embedded", node, &address(node), data, shards, all.clone());
            config.row_cache_mib = Some(memory::row_cache_mib(NODES));
            let incoming = ReceiverStream::new(network.listen(&address(node)));
            let started = Node::start(&config, Arc::new(network.clone()), incoming).await;
            nodes.push(started.with_context(|| format!("start node {node} of the cluster in this process"))?);
        }
        let cluster = Cluster {
            nodes,
            network,
            addresses: (1..=NODES).map(address).collect(),
            placement: Placement { shards },
        };
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// A client whose connections stay inside the process.
    pub fn client(&self) -> Result<Client> {
        let options = Options { connect: Arc::new(self.network.clone()), ..Options::default() };
        Ok(Client::connect(self.addresses.clone(), options)?)
    }

    /// One of the nodes; any of them takes any call.
    pub fn node(&self) -> &Node {
        &self.nodes[0]
    }

    /// Ends when one of the nodes has stopped by itself, with the reason. The others go on, but nothing may fail any more: a program
    /// that embeds the cluster should end.
    pub async fn failed(&self) -> String {
        let nodes = self.nodes.iter().map(|node| Box::pin(node.failed()));
        futures::future::select_all(nodes).await.0
    }

    /// Stops all nodes cleanly.
    pub async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }

    /// Waits until every shard can be read, so that the first batch meets leaders everywhere.
    async fn wait_until_ready(&self) -> Result<()> {
        let client = self.client()?;
        let mut unseen: BTreeSet<ShardId> = self.placement.all().collect();
        let mut rows = Vec::new();
        for probe in 0u64.. {
            let partition = format!("probe:{probe}");
            if unseen.remove(&self.placement.shard_of(&partition)) {
                rows.push(row(partition, "probe"));
            }
            if unseen.is_empty() {
                break;
            }
        }
        let began = Instant::now();
        loop {
            match client.read(rows.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if began.elapsed() > READY_PATIENCE => {
                    bail!("the cluster in this process has no leaders after {READY_PATIENCE:?}: {error}")
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}
