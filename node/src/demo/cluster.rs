//! Three node processes of this very program on loopback ports.
//!
//! Only processes that were started here are ever ended, by their handles: on the way, at the end, on errors and when the
//! demo is interrupted (`kill_on_drop` covers what is left).

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};
use verdict_client::{Client, Options};
use verdict_proto::v1::{NodeStatus, ReplicaRole, StatusResponse};

use crate::ctl::status::replicas;

/// How many nodes there are.
const NODES: usize = 3;
/// Ports are looked for from here on, below those that systems hand out by themselves: a port that is free while its node is
/// down stays free.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How long the cluster may take until every group has a leader on every node.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a group may be without a leader.
const LEADER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often the cluster is asked.
const POLL: Duration = Duration::from_millis(100);
/// So much of a log is shown if something goes wrong.
const LOG_TAIL_BYTES: u64 = 2000;

/// The cluster of a demo.
#[derive(Debug)]
pub struct Cluster {
    processes: Vec<Process>,
    shards: u32,
}

/// One node.
#[derive(Debug)]
struct Process {
    node: u64,
    address: String,
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Cluster {
    /// Writes the configurations into a folder. Nothing is started yet.
    pub fn prepare(folder: &Path, shards: u32) -> anyhow::Result<Cluster> {
        let ports = free_ports(NODES)?;
        let addresses: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let list: String =
            (1..).zip(&addresses).map(|(node, address)| format!("{node} = {address:?}\n")).collect();
        let mut processes = Vec::new();
        for (node, address) in (1..).zip(addresses) {
            let data = folder.join(format!("node-{node}"));
            fs::create_dir_all(&data).with_context(|| format!("make {}", data.display()))?;
            let data = toml::Value::String(data.to_string_lossy().into_owned());
            let text = format!(
                "cluster = \"demo\"\nnode = {node}\nlisten = {address:?}\ndata = {data}\nshards = {shards}\n\n[nodes]\n{list}"
            );
            let config = folder.join(format!("node-{node}.toml"));
            fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
            let log = folder.join(format!("node-{node}.log"));
            processes.push(Process { node, address, config, log, child: None });
        }
        Ok(Cluster { processes, shards })
    }

    /// Where the nodes listen.
    pub fn addresses(&self) -> Vec<String> {
        self.processes.iter().map(|process| process.address.clone()).collect()
    }

    /// How many shards it has.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// Starts all nodes and waits until all of them take part in all groups.
    pub async fn start(&mut self, client: &Client) -> anyhow::Result<()> {
        for process in &mut self.processes {
            process.start()?;
        }
        self.wait_whole(client).await
    }

    /// Kills the process of a node (SIGKILL).
    pub async fn kill(&mut self, node: u64) -> anyhow::Result<()> {
        let process = self.process(node)?;
        let mut child = process.child.take().with_context(|| format!("node {node} isn't running"))?;
        child.kill().await.with_context(|| format!("kill node {node}"))
    }

    /// Starts the process of a node again, on its old disk.
    pub fn restart(&mut self, node: u64) -> anyhow::Result<()> {
        self.process(node)?.start()
    }

    /// Waits until every node takes part in every group, and every group has a leader.
    pub async fn wait_whole(&mut self, client: &Client) -> anyhow::Result<()> {
        let started = Instant::now();
        let client = client.with_timeout(Duration::from_secs(2));
        let mut missing = String::from("no node answers");
        while started.elapsed() < READY_TIMEOUT {
            self.check_running()?;
            match client.status().await {
                Ok(status) => match self.not_whole(&status) {
                    Some(what) => missing = what,
                    None => return Ok(()),
                },
                Err(error) => missing = error.to_string(),
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("the cluster isn't whole after {} s: {missing}", READY_TIMEOUT.as_secs())
    }

    /// The node that leads a group, and what else it leads.
    pub async fn leader_of(&self, client: &Client, group: u32) -> anyhow::Result<(u64, Vec<u32>)> {
        let started = Instant::now();
        let client = client.with_timeout(Duration::from_secs(2));
        while started.elapsed() < LEADER_TIMEOUT {
            if let Ok(status) = client.status().await
                && let Some(leader) = leader_in(&status, group)
            {
                let groups = 0..=self.shards;
                let led = groups.filter(|group| leader_in(&status, *group) == Some(leader)).collect();
                return Ok((leader, led));
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("group {group} has no leader for {} s", LEADER_TIMEOUT.as_secs())
    }

    /// Ends all processes that are left.
    pub async fn end(&mut self) {
        for process in &mut self.processes {
            if let Some(mut child) = process.child.take() {
                // It may have ended by itself.
                let _ = child.kill().await;
            }
        }
    }

    /// The ends of the nodes' logs, for people who look for what went wrong.
    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for process in &self.processes {
            let tail = tail(&process.log).unwrap_or_default();
            if !tail.trim().is_empty() {
                text += &format!("--- the end of {}\n{}\n", process.log.display(), tail.trim_end());
            }
        }
        text
    }

    fn process(&mut self, node: u64) -> anyhow::Result<&mut Process> {
        let found = self.processes.iter_mut().find(|process| process.node == node);
        found.with_context(|| format!("there is no node {node}"))
    }

    fn check_running(&mut self) -> anyhow::Result<()> {
        for process in &mut self.processes {
            if let Some(child) = &mut process.child
                && let Some(status) = child.try_wait()?
            {
                process.child = None;
                bail!("node {} has ended by itself: {status}", process.node);
            }
        }
        Ok(())
    }

    /// What is missing, if anything is.
    fn not_whole(&self, status: &StatusResponse) -> Option<String> {
        if status.nodes.len() != self.processes.len() {
            return Some(format!("{} nodes are known", status.nodes.len()));
        }
        status.nodes.iter().find_map(|node| self.node_not_whole(node)).or_else(|| {
            let leaderless = (0..=self.shards).find(|group| leader_in(status, *group).is_none());
            leaderless.map(|group| format!("group {group} has no leader"))
        })
    }

    fn node_not_whole(&self, node: &NodeStatus) -> Option<String> {
        let id = node.node_id;
        if !node.reachable {
            return Some(format!("node {id} doesn't answer: {}", node.error));
        }
        if node.groups.len() != self.shards as usize + 1 {
            return Some(format!("node {id} takes part in {} groups", node.groups.len()));
        }
        let lost = node.groups.iter().find(|group| group.leader == 0);
        lost.map(|group| format!("node {id} knows no leader of group {}", group.group_id))
    }
}

impl Process {
    fn start(&mut self) -> anyhow::Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let program = std::env::current_exe().context("find this program's own file")?;
        let child = Command::new(program)
            .arg("node")
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start node {}", self.node))?;
        self.child = Some(child);
        Ok(())
    }
}

/// A client of the cluster.
pub fn client(cluster: &Cluster) -> anyhow::Result<Client> {
    let options = Options { try_timeout: Duration::from_secs(3), ..Options::default() };
    Ok(Client::connect(cluster.addresses(), options)?)
}

/// Who leads a group: of several that believe so, the one with the highest term.
fn leader_in(status: &StatusResponse, group: u32) -> Option<u64> {
    let leaders = replicas(status)
        .filter(|(_, replica)| replica.group_id == group && replica.role() == ReplicaRole::Leader);
    leaders.max_by_key(|(_, replica)| replica.term).map(|(node, _)| node.node_id)
}

fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    // Demos side by side begin at different places.
    let span = PORTS.end - PORTS.start;
    let offset = (std::process::id() as u16).wrapping_mul(31) % span;
    let ports = (0..span).map(|step| PORTS.start + (offset + step) % span);
    let free: Vec<u16> =
        ports.filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).take(count).collect();
    anyhow::ensure!(free.len() == count, "there are no free ports from {} to {}", PORTS.start, PORTS.end);
    Ok(free)
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
