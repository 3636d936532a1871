//! The cluster that is measured: three processes of this program's own, or one that runs already.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, bail};
use futures::future::join_all;
use tokio::time::{Duration, Instant, sleep};
use verdict_client::Client;
use verdict_proto::v1::{ProcessCounters, StatusResponse};

use crate::{
    cluster_state::{leader_in, wait_whole},
    ctl::status::replicas,
    processes::{self, Cluster, Plan},
    reach::reach,
    usage::Usage,
};

/// Nodes of a cluster of its own.
pub const NODES: u64 = 3;
/// How long moving the leaders of all groups may take.
const MOVE_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Nodes that use no more of a processor together than this do nothing but keep in touch.
const QUIET: f64 = 0.2;
/// How long they are looked at for that, and how long they may take to come to it.
const LOOK: Duration = Duration::from_secs(1);
const QUIET_TIMEOUT: Duration = Duration::from_secs(90);

/// The cluster.
#[derive(Debug)]
pub struct Target {
    client: Client,
    cluster: Option<Cluster>,
    /// Processes of this machine to look at, by node.
    processes: BTreeMap<u64, u32>,
    addresses: Vec<(u64, String)>,
    /// A node that isn't there for the moment.
    left_out: Option<u64>,
    shards: u32,
}

/// What all nodes have used, by node.
pub type Usages = BTreeMap<u64, Usage>;

impl Target {
    /// Starts a cluster of its own in a folder.
    pub async fn start(folder: &Path, shards: u32) -> anyhow::Result<Target> {
        let plan = Plan { name: "bench".into(), nodes: NODES, shards, ..Plan::default() };
        let mut cluster = Cluster::prepare(folder, plan)?;
        let addresses: Vec<String> = cluster.addresses().into_iter().map(|node| node.public).collect();
        let client = processes::client(addresses.clone())?;
        let addresses = cluster.nodes().into_iter().zip(addresses).collect();
        if let Err(error) = cluster.start_all(&client).await {
            crate::err!("{}", cluster.log_tails().trim_end());
            return Err(error.context("start the nodes"));
        }
        let (cluster, processes) = (Some(cluster), BTreeMap::new());
        let mut target = Target { client, cluster, processes, addresses, left_out: None, shards };
        target.find_processes();
        Ok(target)
    }

    /// A cluster that runs. `processes` are its nodes' on this machine, in the order of the nodes' ids.
    pub async fn connect(addresses: &[String], processes: &[u32]) -> anyhow::Result<Target> {
        let client = processes::client(addresses.to_vec())?;
        let status = reach(&client).await?;
        let shards = replicas(&status).map(|(_, group)| group.group_id).max().unwrap_or_default();
        let nodes: Vec<u64> = status.nodes.iter().map(|node| node.node_id).collect();
        wait_whole(&client, &nodes, shards, || Ok(())).await?;
        if !processes.is_empty() && processes.len() != nodes.len() {
            bail!("--pids has {} processes, and the cluster {} nodes", processes.len(), nodes.len());
        }
        let processes = nodes.into_iter().zip(processes.iter().copied()).collect();
        let addresses = status.nodes.into_iter().map(|node| (node.node_id, node.address)).collect();
        let target = Target { client, cluster: None, processes, addresses, left_out: None, shards };
        target.usages().context("--pids")?;
        Ok(target)
    }

    /// A client of it, for all but the load.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How many shards it has.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// What its nodes have used so far, as far as they can be looked at from here.
    pub fn usages(&self) -> anyhow::Result<Usages> {
        self.processes.iter().map(|(node, process)| Ok((*node, Usage::of(*process)?))).collect()
    }

    /// Waits until the nodes have done what is left to do after a load: mostly tables that are to be merged. Tells how long that took;
    /// None: they can't be looked at from here, or were not done in time.
    pub async fn quiet(&self) -> anyhow::Result<Option<Duration>> {
        if self.processes.is_empty() {
            return Ok(None);
        }
        let began = Instant::now();
        let mut before = self.usages()?;
        while began.elapsed() < QUIET_TIMEOUT {
            sleep(LOOK).await;
            let now = self.usages()?;
            let used = now.iter().filter_map(|(node, usage)| Some(usage.since(before.get(node)?).processor));
            if used.sum::<Duration>().as_secs_f64() < QUIET * LOOK.as_secs_f64() {
                return Ok(Some(began.elapsed()));
            }
            before = now;
        }
        Ok(None)
    }

    /// Asks this node for nothing, since it won't answer.
    pub fn leave_out(&mut self, node: Option<u64>) {
        self.left_out = node;
    }

    /// Synced writes and messages of all nodes so far, if all of them tell.
    pub async fn counters(&self) -> Option<(u64, u64)> {
        let asked = self.addresses.iter().filter(|(node, _)| Some(*node) != self.left_out);
        let statuses = join_all(asked.map(|(_, address)| self.client.status_of(address))).await;
        let (mut syncs, mut messages) = (0, 0);
        for status in statuses {
            let ProcessCounters { synced_writes, messages_sent } = status.ok()?.nodes.first()?.counters?;
            syncs += synced_writes;
            messages += messages_sent;
        }
        Some((syncs, messages))
    }

    /// Its processes, if they are its own.
    pub fn cluster(&mut self) -> Option<&mut Cluster> {
        self.cluster.as_mut()
    }

    /// Looks for the processes anew, after one was started.
    pub fn find_processes(&mut self) {
        if let Some(cluster) = &self.cluster {
            let found = cluster.nodes().into_iter().filter_map(|node| Some((node, cluster.process(node)?)));
            self.processes = found.collect();
        }
    }

    /// Where the node listens that leads the coordinators: the load talks to it, as clients do that look for the leader.
    pub async fn leader_address(&self) -> anyhow::Result<String> {
        let status = self.client.status().await.context("ask for the leader")?;
        let leader = leader_in(&status, 0).context("the coordinators have no leader")?;
        let node = status.nodes.iter().find(|node| node.node_id == leader);
        Ok(node.context("the leader is not in the list of nodes")?.address.clone())
    }

    /// Who leads which group.
    pub async fn leaders(&self) -> anyhow::Result<BTreeMap<u32, u64>> {
        let status = self.client.status().await.context("ask for the leaders")?;
        Ok(self.leaders_in(&status))
    }

    fn leaders_in(&self, status: &StatusResponse) -> BTreeMap<u32, u64> {
        (0..=self.shards).filter_map(|group| Some((group, leader_in(status, group)?))).collect()
    }

    /// Makes these nodes lead these groups.
    pub async fn move_leaders(&self, wanted: &BTreeMap<u32, u64>) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let leaders = self.leaders().await?;
            let astray = wanted.iter().filter(|(group, node)| leaders.get(group) != Some(node));
            let astray: Vec<(u32, u64)> = astray.map(|(group, node)| (*group, *node)).collect();
            let Some((group, node)) = astray.first() else { return Ok(()) };
            if began.elapsed() > MOVE_TIMEOUT {
                bail!("node {node} doesn't become the leader of group {group}");
            }
            for (group, node) in &astray {
                // It may have moved by itself meanwhile; the next look tells.
                let _ = self.client.transfer_leader(*group, *node).await;
            }
            sleep(POLL).await;
        }
    }

    /// Waits until all nodes take part in everything.
    pub async fn wait_whole(&mut self) -> anyhow::Result<()> {
        match &mut self.cluster {
            Some(cluster) => cluster.wait_whole(&self.client).await,
            None => {
                let status = self.client.status().await?;
                let nodes: Vec<u64> = status.nodes.iter().map(|node| node.node_id).collect();
                wait_whole(&self.client, &nodes, self.shards, || Ok(())).await
            }
        }
    }

    /// The ends of its logs, for people who look for what went wrong.
    pub fn log_tails(&self) -> String {
        self.cluster.as_ref().map(Cluster::log_tails).unwrap_or_default()
    }

    /// Ends what was started.
    pub async fn end(&mut self) {
        if let Some(cluster) = &mut self.cluster {
            cluster.end().await;
        }
    }
}
