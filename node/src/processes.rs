//! A cluster of node processes of this very program on loopback ports.
//!
//! Only processes that were started here are ever signalled, by their handles. They end with this process: on the way, at the
//! end, on errors and when it is interrupted (`kill_on_drop` covers what is left), and by themselves if it is killed (the
//! hidden flag `--ends-with-parent` of `verdict node`).

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, ChildStdin, Command};
use verdict_client::{Client, Options};

use crate::{cluster_state, config::Config, memory, usage::Usage};

/// Ports are looked for from here on, below those that systems hand out by themselves: a port that is free while its node is
/// down stays free.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How long a process may take to end in order.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// So much of a log is shown if something goes wrong.
const LOG_TAIL_BYTES: u64 = 2000;

/// What a cluster is like.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// How many nodes.
    pub nodes: u64,
    /// How many shards.
    pub shards: u32,
    /// Where the replicas of a group are; a group that isn't listed has one on every node. Group 0 is the coordinator.
    pub place: BTreeMap<u32, Vec<u64>>,
    /// How many more nodes there may be later, each in the place of another: they have an id and addresses from the start.
    pub spares: u64,
    /// Whether each node has an address of its own for what goes out, and others reach it at yet another address (see
    /// [`Addresses`]): so that a proxy can stand between.
    pub proxied: bool,
}

/// The addresses of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Where it listens.
    pub listen: String,
    /// Where others reach it.
    pub public: String,
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    processes: Vec<Process>,
    /// Those that were replaced.
    gone: Vec<Process>,
    /// The ids and addresses of the spare nodes.
    spares: VecDeque<(u64, Addresses)>,
    folder: PathBuf,
    plan: Plan,
}

/// One node.
#[derive(Debug)]
struct Process {
    node: u64,
    addresses: Addresses,
    config: PathBuf,
    data: PathBuf,
    log: PathBuf,
    environment: Vec<(String, String)>,
    child: Option<Child>,
    /// Open as long as this process lives: the child ends when it is closed.
    lifeline: Option<ChildStdin>,
}

impl Cluster {
    /// Writes the configurations into a folder. Nothing is started yet.
    pub fn prepare(folder: &Path, plan: Plan) -> anyhow::Result<Cluster> {
        let count = usize::try_from(plan.nodes + plan.spares).context("count the nodes")?;
        let ports = free_ports(count)?;
        let mut all = (1..).zip(ports).map(|(node, port)| (node, plan.addresses(node, port)));
        let founders = usize::try_from(plan.nodes).context("count the nodes")?;
        let nodes: Vec<(u64, Addresses)> = all.by_ref().take(founders).collect();
        let spares = all.collect();
        let mut cluster =
            Cluster { processes: Vec::new(), gone: Vec::new(), spares, folder: folder.to_owned(), plan };
        let list = listed(nodes.iter().map(|(node, addresses)| (*node, addresses)));
        for (node, addresses) in nodes {
            let process = cluster.prepare_node(node, addresses, list.clone(), false)?;
            cluster.processes.push(process);
        }
        Ok(cluster)
    }

    /// Writes the configuration of a node.
    fn prepare_node(
        &self,
        node: u64,
        addresses: Addresses,
        list: BTreeMap<String, String>,
        join: bool,
    ) -> anyhow::Result<Process> {
        let path = |name: String| self.folder.join(name);
        let (data, file) = (path(format!("node-{node}")), path(format!("node-{node}.toml")));
        let plan = &self.plan;
        let mut config = Config::new(&plan.name, node, &addresses.listen, data.clone(), plan.shards, list);
        config.join = join;
        config.threads = Some(threads_of_each(plan.nodes));
        config.row_cache_mib = Some(memory::row_cache_mib(plan.nodes));
        if plan.proxied {
            config.connect_from = Some(source_address(node).parse().context("make an address")?);
        }
        for (group, nodes) in &plan.place {
            match group {
                0 => config.coordinators.clone_from(nodes),
                shard => {
                    config.shard_replicas.insert(shard.to_string(), nodes.clone());
                }
            }
        }
        config.check()?;
        fs::create_dir_all(&data).with_context(|| format!("make {}", data.display()))?;
        fs::write(&file, toml::to_string(&config).context("write a configuration")?)
            .with_context(|| format!("write {}", file.display()))?;
        let (log, environment) = (path(format!("node-{node}.log")), Vec::new());
        let (child, lifeline) = (None, None);
        Ok(Process { node, addresses, config: file, data, log, environment, child, lifeline })
    }

    /// Removes a node that doesn't run, disk and all, and prepares a spare one in its place, on an empty disk. Gives the spare's
    /// id. It isn't started yet, and the others don't know of it.
    pub fn replace(&mut self, old: u64) -> anyhow::Result<u64> {
        anyhow::ensure!(self.find(old)?.child.is_none(), "node {old} still runs");
        let (new, addresses) = self.spares.pop_front().context("there is no spare node left")?;
        let (gone, stay) = std::mem::take(&mut self.processes).into_iter().partition(|it| it.node == old);
        self.processes = stay;
        for process in &gone {
            fs::remove_dir_all(&process.data).with_context(|| format!("remove the disk of node {old}"))?;
        }
        self.gone.extend(gone);
        for node in self.plan.place.values_mut().flatten().filter(|node| **node == old) {
            *node = new;
        }
        let others = self.processes.iter().map(|process| (process.node, &process.addresses));
        let list = listed(others.chain([(new, &addresses)]));
        let process = self.prepare_node(new, addresses, list, true)?;
        self.processes.push(process);
        Ok(new)
    }

    /// The ids and addresses of the spare nodes that are left.
    pub fn spares(&self) -> impl Iterator<Item = &(u64, Addresses)> {
        self.spares.iter()
    }

    /// The ids of the nodes.
    pub fn nodes(&self) -> Vec<u64> {
        self.processes.iter().map(|process| process.node).collect()
    }

    /// Where the nodes are reached.
    pub fn addresses(&self) -> Vec<Addresses> {
        self.processes.iter().map(|process| process.addresses.clone()).collect()
    }

    /// How many shards it has.
    pub fn shards(&self) -> u32 {
        self.plan.shards
    }

    /// The folder of a node's data.
    pub fn data(&self, node: u64) -> anyhow::Result<&Path> {
        Ok(&self.find(node)?.data)
    }

    /// Gives a node's process a variable of its environment, from its next start on.
    pub fn set_environment(&mut self, node: u64, name: &str, value: &str) -> anyhow::Result<()> {
        self.find_mut(node)?.environment.push((name.to_owned(), value.to_owned()));
        Ok(())
    }

    /// Starts all nodes and waits until all of them take part in all groups.
    pub async fn start_all(&mut self, client: &Client) -> anyhow::Result<()> {
        for node in self.nodes() {
            self.start(node)?;
        }
        self.wait_whole(client).await
    }

    /// Starts the process of a node, on whatever its folder holds.
    pub fn start(&mut self, node: u64) -> anyhow::Result<()> {
        self.find_mut(node)?.start()
    }

    /// Kills the process of a node (SIGKILL).
    pub async fn kill(&mut self, node: u64) -> anyhow::Result<()> {
        let mut child = self.find_mut(node)?.take_child()?;
        child.kill().await.with_context(|| format!("kill node {node}"))
    }

    /// Kills several at once, without waiting for the end of any before the last was killed.
    pub async fn kill_all(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        let mut children = Vec::new();
        for node in nodes {
            let mut child = self.find_mut(*node)?.take_child()?;
            child.start_kill().with_context(|| format!("kill node {node}"))?;
            children.push(child);
        }
        for mut child in children {
            child.wait().await.context("wait for the end of a killed process")?;
        }
        Ok(())
    }

    /// Asks processes to end (SIGTERM), and waits until they have. One that was paused must go on before: it would not notice.
    pub async fn stop(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        let mut children = Vec::new();
        for node in nodes {
            self.signal(*node, Signal::TERM)?;
            children.push((*node, self.find_mut(*node)?.take_child()?));
        }
        for (node, mut child) in children {
            let ended = tokio::time::timeout(STOP_TIMEOUT, child.wait()).await;
            let status = ended
                .with_context(|| {
                    format!("node {node} has not ended {} s after SIGTERM", STOP_TIMEOUT.as_secs())
                })?
                .with_context(|| format!("wait for the end of node {node}"))?;
            anyhow::ensure!(status.success(), "node {node} was asked to end, and ended with {status}");
        }
        Ok(())
    }

    /// Lets a process stand still (SIGSTOP).
    pub fn pause(&self, node: u64) -> anyhow::Result<()> {
        self.signal(node, Signal::STOP)
    }

    /// Lets it go on (SIGCONT).
    pub fn resume(&self, node: u64) -> anyhow::Result<()> {
        self.signal(node, Signal::CONT)
    }

    /// Whether the process of a node was started and not ended from here. It may have ended by itself.
    pub fn runs(&self, node: u64) -> bool {
        self.find(node).is_ok_and(|process| process.child.is_some())
    }

    /// The end of a process that has ended by itself, if it has.
    pub fn ended(&mut self, node: u64) -> anyhow::Result<Option<ExitStatus>> {
        let process = self.find_mut(node)?;
        let Some(child) = &mut process.child else { return Ok(None) };
        let status = child.try_wait().with_context(|| format!("look at node {node}"))?;
        if status.is_some() {
            (process.child, process.lifeline) = (None, None);
        }
        Ok(status)
    }

    /// The system's id of a node's process, if it runs.
    pub fn process(&self, node: u64) -> Option<u32> {
        self.find(node).ok()?.child.as_ref()?.id()
    }

    /// The memory of a process in bytes, if it runs and the system tells.
    pub fn memory(&self, node: u64) -> Option<u64> {
        Some(Usage::of(self.process(node)?).ok()?.resident_bytes)
    }

    /// Waits until every node takes part in every group, and every group has a leader.
    pub async fn wait_whole(&mut self, client: &Client) -> anyhow::Result<()> {
        let (nodes, shards) = (self.nodes(), self.shards());
        cluster_state::wait_whole(client, &nodes, shards, || self.check_running()).await
    }

    /// Ends all processes that are left.
    pub async fn end(&mut self) {
        for process in &mut self.processes {
            if let Ok(mut child) = process.take_child() {
                // It may have ended by itself.
                let _ = child.kill().await;
            }
        }
    }

    /// The ends of the nodes' logs, for people who look for what went wrong.
    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for process in self.gone.iter().chain(&self.processes) {
            let tail = tail(&process.log).unwrap_or_default();
            if !tail.trim().is_empty() {
                text += &format!("--- the end of {}\n{}\n", process.log.display(), tail.trim_end());
            }
        }
        text
    }

    fn find(&self, node: u64) -> anyhow::Result<&Process> {
        let found = self.processes.iter().find(|process| process.node == node);
        found.with_context(|| format!("there is no node {node}"))
    }

    fn find_mut(&mut self, node: u64) -> anyhow::Result<&mut Process> {
        let found = self.processes.iter_mut().find(|process| process.node == node);
        found.with_context(|| format!("there is no node {node}"))
    }

    fn signal(&self, node: u64, signal: Signal) -> anyhow::Result<()> {
        // The process is a child that nobody has waited for: its id can't belong to another one.
        let id = self.find(node)?.child.as_ref().and_then(Child::id);
        let id = id
            .and_then(|id| Pid::from_raw(id as i32))
            .with_context(|| format!("node {node} isn't running"))?;
        kill_process(id, signal).with_context(|| format!("signal node {node}"))
    }

    fn check_running(&mut self) -> anyhow::Result<()> {
        for node in self.nodes() {
            if let Some(status) = self.ended(node)? {
                bail!("node {node} has ended by itself: {status}");
            }
        }
        Ok(())
    }
}

impl Plan {
    fn addresses(&self, node: u64, port: u16) -> Addresses {
        match self.proxied {
            false => {
                let address = format!("127.0.0.1:{port}");
                Addresses { listen: address.clone(), public: address }
            }
            // The same port, so that nobody wonders.
            true => Addresses {
                listen: format!("{}:{port}", source_address(node)),
                public: format!("127.0.1.{node}:{port}"),
            },
        }
    }
}

/// So many threads has each of some nodes that share this machine. More would only wake each other up.
fn threads_of_each(nodes: u64) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / usize::try_from(nodes).unwrap_or(usize::MAX)).max(1)
}

/// The table `[nodes]` of a configuration.
fn listed<'a>(nodes: impl Iterator<Item = (u64, &'a Addresses)>) -> BTreeMap<String, String> {
    nodes.map(|(node, addresses)| (node.to_string(), addresses.public.clone())).collect()
}

/// From where a node of a proxied cluster connects. (All of 127.0.0.0/8 is this machine.)
pub fn source_address(node: u64) -> String {
    format!("127.0.2.{node}")
}

impl Process {
    fn start(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.child.is_none(), "node {} runs already", self.node);
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let program = std::env::current_exe().context("find this program's own file")?;
        let mut child = Command::new(program)
            .args(["node", "--ends-with-parent", "--config"])
            .arg(&self.config)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start node {}", self.node))?;
        self.lifeline = child.stdin.take();
        self.child = Some(child);
        Ok(())
    }

    fn take_child(&mut self) -> anyhow::Result<Child> {
        // The lifeline stays open until the next start: closing it would end a process that was asked to end in order.
        self.child.take().with_context(|| format!("node {} isn't running", self.node))
    }
}

/// A client of the cluster at these addresses.
pub fn client(addresses: Vec<String>) -> anyhow::Result<Client> {
    let options = Options { try_timeout: Duration::from_secs(3), ..Options::default() };
    Ok(Client::connect(addresses, options)?)
}

fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    // Clusters side by side begin at different places.
    let span = PORTS.end - PORTS.start;
    let offset = (std::process::id() as u16).wrapping_mul(31) % span;
    let ports = (0..span).map(|step| PORTS.start + (offset + step) % span);
    // Free on all addresses of this machine.
    let free: Vec<u16> =
        ports.filter(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok()).take(count).collect();
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
