//! Node processes on loopback ports, each with its own folder.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tonic::transport::Channel;
use verdict_proto::v1::{
    self, GroupStatus, ReplicaRole, StatusResponse, admin_client::AdminClient,
    settlement_client::SettlementClient,
};

use crate::{
    api::{channel, partition_on},
    random::Random,
    wait::eventually,
};

/// Ports are looked for from here on, below those that systems hand out by themselves: a port that is free while its node is
/// down stays free.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How long a cluster may take until every group has a leader that all know. A loaded machine gets more than it should need.
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// How long a process may take to end by itself.
const END_WITHIN: Duration = Duration::from_secs(30);
/// What strace looks at.
const SYNCS: &str = "trace=fsync,fdatasync,sync_file_range";
/// So much of a log is shown when a test fails.
const LOG_TAIL_BYTES: u64 = 4000;

/// What a cluster is like.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How many nodes.
    pub nodes: u64,
    /// How many shards.
    pub shards: u32,
    /// Further lines of the configuration.
    pub lines: String,
    /// The section `[shard_replicas]`.
    pub shard_replicas: String,
    /// Whether strace writes down the synced writes.
    pub traced: bool,
    /// Whether failpoints can be armed.
    pub failpoints: bool,
    /// Whether the disk layer is under each node, so that power can be lost and disks can fail.
    pub layered: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            nodes: 3,
            shards: 3,
            lines: String::new(),
            shard_replicas: String::new(),
            traced: false,
            failpoints: false,
            layered: false,
        }
    }
}

/// A cluster. Its processes end with it; if a test fails, the ends of their logs are printed.
#[derive(Debug)]
pub struct Cluster {
    processes: Vec<Process>,
    settings: Settings,
    // Removed when everything above has ended.
    folder: TempDir,
}

#[derive(Debug)]
struct Process {
    node: u64,
    address: String,
    config: PathBuf,
    data: PathBuf,
    log: PathBuf,
    trace: Option<PathBuf>,
    /// Says what is armed.
    failpoints: Option<PathBuf>,
    layer: Option<Layer>,
    child: Option<Child>,
    channel: Channel,
}

/// The disk layer under one node.
#[derive(Debug)]
struct Layer {
    /// What it watches; the node's data is inside.
    folder: PathBuf,
    shadow: PathBuf,
    control: PathBuf,
    /// Power was lost: what the next start chooses by.
    loss: Option<u64>,
}

/// A node that a cluster was told to leave out.
#[derive(Debug)]
pub struct LeftOut(Process);

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

impl Process {
    /// Ends it, if it runs.
    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Writes the configuration.
    fn prepare(
        settings: &Settings,
        folder: &Path,
        node: u64,
        address: &str,
        others: &[(u64, String)],
        joins: bool,
    ) -> Process {
        let path = |name: String| folder.join(name);
        let disk = path(format!("node-{node}"));
        let data = if settings.layered { disk.join("data") } else { disk.clone() };
        let config = path(format!("node-{node}.toml"));
        let list: BTreeMap<u64, &str> =
            others.iter().map(|(id, address)| (*id, address.as_str())).chain([(node, address)]).collect();
        let list: String = list.iter().map(|(id, address)| format!("{id} = {address:?}\n")).collect();
        let Settings { shards, lines, shard_replicas, .. } = settings;
        let join = if joins { "join = true" } else { "" };
        let text = format!(
            "cluster = \"test\"\nnode = {node}\nlisten = {address:?}\ndata = {data:?}\nshards = {shards}\n{join}\n\
             {lines}\n[nodes]\n{list}\n[shard_replicas]\n{shard_replicas}\n"
        );
        fs::write(&config, text).expect("write a configuration");
        Process {
            node,
            channel: channel(address),
            address: address.to_owned(),
            config,
            data,
            log: path(format!("node-{node}.log")),
            trace: settings.traced.then(|| path(format!("node-{node}.strace"))),
            failpoints: settings.failpoints.then(|| path(format!("node-{node}.failpoints"))),
            layer: settings.layered.then(|| Layer {
                folder: disk,
                shadow: path(format!("node-{node}.shadow")),
                control: path(format!("node-{node}.control")),
                loss: None,
            }),
            child: None,
        }
    }
}

impl Cluster {
    /// Three nodes, three shards, ready to settle.
    pub async fn start() -> Cluster {
        Cluster::start_with(Settings::default()).await
    }

    /// A cluster that is ready to settle.
    pub async fn start_with(settings: Settings) -> Cluster {
        let mut cluster = Cluster::prepare(settings);
        for node in cluster.nodes() {
            cluster.restart(node);
        }
        cluster.wait_whole().await;
        cluster
    }

    /// Writes the configurations. Nothing is started yet.
    pub fn prepare(settings: Settings) -> Cluster {
        let folder = tempfile::tempdir().expect("make a folder for the cluster");
        let addresses: Vec<String> = (0..settings.nodes).map(|_| free_address()).collect();
        let all: Vec<(u64, String)> = (1..).zip(addresses).collect();
        let process = |(node, address): &(u64, String)| {
            Process::prepare(&settings, folder.path(), *node, address, &all, false)
        };
        let processes = all.iter().map(process).collect();
        Cluster { processes, settings, folder }
    }

    /// The ids of all nodes.
    pub fn nodes(&self) -> impl Iterator<Item = u64> + use<> {
        let nodes: Vec<u64> = self.processes.iter().map(|process| process.node).collect();
        nodes.into_iter()
    }

    /// Writes the configuration of one more node, which joins, and starts it. It becomes a member only when somebody says so.
    pub fn join(&mut self, node: u64) {
        let known: Vec<(u64, String)> =
            self.processes.iter().map(|process| (process.node, process.address.clone())).collect();
        let process =
            Process::prepare(&self.settings, self.folder.path(), node, &free_address(), &known, true);
        self.processes.push(process);
        self.restart(node);
    }

    /// Leaves a node out of everything from now on. Its process, if it runs, goes on until it is dropped.
    pub fn leave_out(&mut self, node: u64) -> LeftOut {
        let place = self.processes.iter().position(|process| process.node == node);
        LeftOut(self.processes.remove(place.expect("there is such a node")))
    }

    /// Takes a node in again that was left out.
    pub fn take_in(&mut self, node: LeftOut) {
        self.processes.push(node.0);
    }

    /// How many shards there are.
    pub fn shards(&self) -> u32 {
        self.settings.shards
    }

    /// A partition on each shard, in order of the shards; others for each tag.
    pub fn partitions(&self, tag: &str) -> Vec<String> {
        (1..=self.shards()).map(|shard| partition_on(shard, self.shards(), tag)).collect()
    }

    /// Where a node listens.
    pub fn address(&self, node: u64) -> &str {
        &self.process(node).address
    }

    /// A node's configuration file.
    pub fn config(&self, node: u64) -> &Path {
        &self.process(node).config
    }

    /// The folder of a node's data.
    pub fn data(&self, node: u64) -> &Path {
        &self.process(node).data
    }

    /// A folder for whatever else a test needs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What strace has written about a node so far.
    pub fn trace(&self, node: u64) -> String {
        let path = self.process(node).trace.as_ref().expect("this cluster is not traced");
        fs::read_to_string(path).expect("read what strace wrote")
    }

    /// What a node has written to its log so far.
    pub fn log(&self, node: u64) -> String {
        fs::read_to_string(&self.process(node).log).unwrap_or_default()
    }

    /// Settlement at a node.
    pub fn settlement(&self, node: u64) -> SettlementClient<Channel> {
        SettlementClient::new(self.process(node).channel.clone())
    }

    /// Settlement at each node.
    pub fn settlements(&self) -> Vec<SettlementClient<Channel>> {
        self.nodes().map(|node| self.settlement(node)).collect()
    }

    /// Administration at a node.
    pub fn admin(&self, node: u64) -> AdminClient<Channel> {
        AdminClient::new(self.process(node).channel.clone())
    }

    /// A way to a node, for other services.
    pub fn channel(&self, node: u64) -> Channel {
        self.process(node).channel.clone()
    }

    /// Ends a process at once (SIGKILL).
    pub fn kill9(&mut self, node: u64) {
        let mut child = self.process_mut(node).child.take().expect("the node runs");
        child.kill().expect("kill a process that was started here");
        child.wait().expect("a killed process ends");
    }

    /// Ends all processes, one right after the other, without waiting for the end of any before the last was killed.
    pub fn kill9_all(&mut self) {
        let mut children: Vec<Child> =
            self.processes.iter_mut().filter_map(|process| process.child.take()).collect();
        for child in &mut children {
            child.kill().expect("kill a process that was started here");
        }
        for child in &mut children {
            child.wait().expect("a killed process ends");
        }
    }

    /// Takes power away from these nodes, one right after the other: their processes end, and when they are started again their disks
    /// have forgotten what was not synced. The seed chooses what of that survives all the same.
    pub fn lose_power(&mut self, nodes: &[u64], random: &mut Random) {
        let mut children = Vec::new();
        for node in nodes {
            let process = self.process_mut(*node);
            process.layer.as_mut().expect("this cluster has no disk layer").loss = Some(random.number());
            children.extend(process.child.take());
        }
        for child in &mut children {
            child.kill().expect("kill a process that was started here");
        }
        for child in &mut children {
            child.wait().expect("a killed process ends");
        }
    }

    /// What the last loss of power took from a node: the counts that the disk layer wrote down.
    pub fn last_loss(&self, node: u64) -> BTreeMap<String, u64> {
        let text = fs::read_to_string(self.layer(node).shadow.join("last-loss")).expect("power was lost");
        let count = |word: &str| {
            let (name, count) = word.split_once('=').expect("a name and a count");
            (name.to_owned(), count.parse().expect("a count"))
        };
        text.split_whitespace().map(count).collect()
    }

    /// Makes a node's disk fail as these lines say; none: it is well again.
    pub fn disk_fault(&self, node: u64, lines: &str) {
        let control = &self.layer(node).control;
        let new = control.with_extension("new");
        fs::write(&new, lines).expect("write what the disk is to do");
        fs::rename(&new, control).expect("say what the disk is to do");
    }

    fn layer(&self, node: u64) -> &Layer {
        self.process(node).layer.as_ref().expect("this cluster has no disk layer")
    }

    /// Fails if a disk layer isn't under its node, or has met something that it can't follow.
    pub fn check_layers(&self) {
        for process in &self.processes {
            let Some(layer) = &process.layer else { continue };
            if let Ok(why) = fs::read_to_string(layer.shadow.join("failed")) {
                panic!("the disk layer of node {} has failed: {why}", process.node);
            }
            if let Some(child) = &process.child {
                let attached = fs::read_to_string(layer.shadow.join("attached")).unwrap_or_default();
                assert_eq!(attached, child.id().to_string(), "node {} runs without the layer", process.node);
            }
        }
    }

    /// Starts a process on whatever its folder holds.
    pub fn restart(&mut self, node: u64) {
        let command = match &self.process(node).trace {
            None => Command::new(program()),
            Some(trace) => traced(&["-ttt", "-T", "-A", "-e", SYNCS, "-o"], trace),
        };
        self.spawn(node, command);
    }

    /// Starts a process on whatever its folder holds, with a disk that takes so much longer for each sync.
    pub fn restart_with_slow_syncs(&mut self, node: u64, delay: Duration) {
        let delay = format!("inject=fsync,fdatasync,sync_file_range:delay_enter={}", delay.as_micros());
        self.spawn(node, traced(&["-e", SYNCS, "-e", &delay, "-o"], Path::new("/dev/null")));
    }

    fn spawn(&mut self, node: u64, mut command: Command) {
        let process = self.process_mut(node);
        assert!(process.child.is_none(), "node {node} runs already");
        if let Some(layer) = &mut process.layer {
            command.env("LD_PRELOAD", disk_layer()).env("VERDICT_DISK_FOLDER", &layer.folder);
            command.env("VERDICT_DISK_SHADOW", &layer.shadow).env("VERDICT_DISK_CONTROL", &layer.control);
            if let Some(seed) = layer.loss.take() {
                command.env("VERDICT_DISK_LOSE_POWER", seed.to_string());
            }
        }
        let log = OpenOptions::new().create(true).append(true).open(&process.log).expect("open a log");
        command.arg("node").arg("--config").arg(&process.config).stdin(Stdio::null());
        if let Some(path) = &process.failpoints {
            command.env(verdict_failpoints::VARIABLE, format!("@{}", path.display()));
        }
        command.stdout(log.try_clone().expect("use the log twice")).stderr(log);
        process.child = Some(command.spawn().expect("start a node"));
    }

    /// Asks a process to end (SIGTERM), and waits for that. Gives its exit status and how long it took.
    pub fn terminate(&mut self, node: u64) -> (ExitStatus, Duration) {
        self.signal(node, "TERM");
        self.wait_end(node)
    }

    /// Waits until a process has ended by itself. Gives its exit status and how long that took.
    pub fn wait_end(&mut self, node: u64) -> (ExitStatus, Duration) {
        let began = Instant::now();
        let process = self.process_mut(node);
        let child = process.child.as_mut().expect("the node runs");
        while began.elapsed() < END_WITHIN {
            if let Some(status) = child.try_wait().expect("look at a process") {
                process.child = None;
                return (status, began.elapsed());
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("node {node} has not ended within {END_WITHIN:?}");
    }

    /// Arms exactly these failpoints of a node, as `verdict_failpoints` reads them; it need not run. The cluster must have been started
    /// with failpoints.
    pub fn arm(&self, node: u64, orders: &str) {
        let path = self.process(node).failpoints.as_ref().expect("this cluster has failpoints");
        let aside = path.with_extension("new");
        fs::write(&aside, orders).expect("write what is armed");
        fs::rename(&aside, path).expect("put it into place");
    }

    /// Whether a process has ended by itself. Then it can be started again.
    pub fn has_ended(&mut self, node: u64) -> Option<ExitStatus> {
        let process = self.process_mut(node);
        let status = process.child.as_mut()?.try_wait().expect("look at a process")?;
        process.child = None;
        Some(status)
    }

    /// Whether a process was started and has not been seen to end.
    pub fn runs(&self, node: u64) -> bool {
        self.process(node).child.is_some()
    }

    /// Freezes a process (SIGSTOP).
    pub fn freeze(&self, node: u64) {
        self.signal(node, "STOP");
    }

    /// Lets a frozen process go on (SIGCONT).
    pub fn thaw(&self, node: u64) {
        self.signal(node, "CONT");
    }

    fn signal(&self, node: u64, signal: &str) {
        // The process is a child that nobody has waited for: its id can't belong to another one.
        let id = self.process(node).child.as_ref().expect("the node runs").id();
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status();
        assert!(sent.expect("run sh").success(), "send SIG{signal} to node {node}");
    }

    /// The state of the cluster, as one of the nodes that run tells it.
    pub async fn status(&self) -> Result<StatusResponse, String> {
        let running = self.processes.iter().find(|process| process.child.is_some());
        let mut admin = self.admin(running.ok_or("no node runs")?.node);
        let answer = admin.status(v1::StatusRequest { local_only: false }).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.to_string())
    }

    /// Waits until every replica of every group that runs knows one and the same leader, who agrees.
    pub async fn wait_whole(&self) -> Duration {
        eventually("all groups have leaders", WHOLE_WITHIN, || async { self.whole(&self.status().await?) })
            .await
            .1
    }

    fn whole(&self, status: &StatusResponse) -> Result<(), String> {
        for process in self.processes.iter().filter(|process| process.child.is_some()) {
            let node = status.nodes.iter().find(|node| node.node_id == process.node);
            let node = node.ok_or_else(|| format!("node {} is not listed", process.node))?;
            if !node.reachable {
                return Err(format!("node {} doesn't answer: {}", node.node_id, node.error));
            }
        }
        for group in 0..=self.shards() {
            let replicas = replicas_of(status, group);
            let leader = leader_in(status, group).ok_or_else(|| format!("group {group} has no leader"))?;
            if let Some((node, _)) = replicas.iter().find(|(_, replica)| replica.leader != leader) {
                return Err(format!("node {node} knows another leader of group {group}"));
            }
        }
        Ok(())
    }

    /// The node that leads a group.
    pub async fn leader(&self, group: u32) -> u64 {
        let leader = || async {
            let status = self.status().await?;
            leader_in(&status, group).ok_or_else(|| format!("group {group} has no leader"))
        };
        eventually("the group has a leader", WHOLE_WITHIN, leader).await.0
    }

    /// Makes a node the leader of a group, and waits until all know.
    pub async fn move_leader(&self, group: u32, to_node: u64) {
        let moved = || async {
            let status = self.status().await?;
            if leader_in(&status, group) == Some(to_node) {
                return self.whole(&status);
            }
            let wish = v1::TransferLeaderRequest { group_id: group, to_node };
            // Refused, it is tried again.
            let answer = self.admin(to_node).transfer_leader(wish).await;
            Err(format!("another node leads group {group}; asked to change: {answer:?}"))
        };
        eventually("a leadership moves", WHOLE_WITHIN, moved).await;
    }

    /// Waits until nothing is held, waits, is in doubt or unfinished anywhere, and the replicas of each group that run have equal
    /// hashes at equal indexes. Gives how long that took.
    pub async fn wait_quiet(&self, bound: Duration) -> Duration {
        eventually("nothing is left over", bound, || async { self.quiet(&self.status().await?) }).await.1
    }

    fn quiet(&self, status: &StatusResponse) -> Result<(), String> {
        self.whole(status)?;
        for group in 0..=self.shards() {
            let replicas = replicas_of(status, group);
            let (_, first) = replicas.first().ok_or_else(|| format!("group {group} has no replica"))?;
            for (node, replica) in &replicas {
                let left = [replica.in_doubt, replica.held_locks, replica.waiting, replica.unfinished];
                if left != [0; 4] {
                    return Err(format!(
                        "group {group} on node {node}: in doubt, locks, waiting, unfinished: {left:?}"
                    ));
                }
                if replica.state_hash_index != first.state_hash_index
                    || replica.applied_index != replica.last_index
                {
                    return Err(format!("the replicas of group {group} stand at different indexes"));
                }
                assert!(!replica.state_hash.is_empty(), "there is no hash");
                assert_eq!(
                    replica.state_hash, first.state_hash,
                    "group {group} differs between nodes at index {}",
                    first.state_hash_index
                );
            }
        }
        Ok(())
    }

    /// The ends of all logs.
    pub fn log_tails(&self) -> String {
        let tail = |process: &Process| {
            let text = tail(&process.log).unwrap_or_default();
            format!("--- the end of the log of node {}\n{}\n", process.node, text.trim_end())
        };
        self.processes.iter().map(tail).collect()
    }

    fn process(&self, node: u64) -> &Process {
        self.processes.iter().find(|process| process.node == node).expect("there is such a node")
    }

    fn process_mut(&mut self, node: u64) -> &mut Process {
        self.processes.iter_mut().find(|process| process.node == node).expect("there is such a node")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.processes.iter_mut().for_each(Process::end);
        if thread::panicking() {
            eprintln!("{}", self.log_tails());
        }
    }
}

/// The program, followed by strace.
fn traced(flags: &[&str], output: &Path) -> Command {
    let mut command = Command::new("strace");
    // -D: the process started here is the node, and strace follows it from aside.
    command.args(["-D", "-f"]).args(flags).arg(output).arg(program());
    command
}

/// All replicas of a group that could be asked, with their nodes.
pub fn replicas_of(status: &StatusResponse, group: u32) -> Vec<(u64, &GroupStatus)> {
    let of_node = |node: &'_ v1::NodeStatus| node.node_id;
    let nodes = status.nodes.iter().filter(|node| node.reachable);
    nodes
        .flat_map(|node| node.groups.iter().map(move |replica| (of_node(node), replica)))
        .filter(|(_, replica)| replica.group_id == group)
        .collect()
}

/// Who leads a group: of several that believe so, the one with the highest term.
pub fn leader_in(status: &StatusResponse, group: u32) -> Option<u64> {
    let replicas = replicas_of(status, group).into_iter();
    let leaders = replicas.filter(|(_, replica)| replica.role() == ReplicaRole::Leader);
    leaders.max_by_key(|(_, replica)| replica.term).map(|(node, _)| node)
}

/// Runs the program until it ends by itself, with a bound.
pub fn run_to_end(arguments: &[&str], bound: Duration) -> Output {
    let folder = tempfile::tempdir().expect("make a folder for output");
    let file = |name: &str| File::create(folder.path().join(name)).expect("make a file for output");
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
    let mut child = command.spawn().expect("start the program");
    let began = Instant::now();
    let read = |name: &str| fs::read(folder.path().join(name)).expect("read the output");
    loop {
        if let Some(status) = child.try_wait().expect("look at a process") {
            return Output { status, stdout: read("out"), stderr: read("err") };
        }
        if began.elapsed() > bound {
            // It was started here, and has not been waited for.
            let _ = child.kill();
            let _ = child.wait();
            let said = String::from_utf8_lossy(&read("err")).into_owned();
            panic!("`verdict {}` has not ended within {bound:?}:\n{said}", arguments.join(" "));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// An address of this machine that nobody listens on.
pub fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let span = PORTS.end - PORTS.start;
    // Test programs side by side begin at different places.
    let offset = (std::process::id() as u16).wrapping_mul(31) % span;
    for _ in 0..span {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORTS.start + ((u32::from(offset) + u32::from(step)) % u32::from(span)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return format!("127.0.0.1:{port}");
        }
    }
    panic!("there is no free port in {PORTS:?}");
}

/// The program under test: `VERDICT_BIN`, or the debug build beside this test program.
pub fn program() -> PathBuf {
    let program = env::var_os("VERDICT_BIN").map(PathBuf::from).unwrap_or_else(|| {
        let this = env::current_exe().expect("this program has a path");
        // Programs lie in debug/, test programs in debug/deps/.
        let beside = this.with_file_name("verdict");
        let debug = this.parent().and_then(Path::parent).expect("programs lie somewhere");
        if beside.exists() { beside } else { debug.join("verdict") }
    });
    assert!(program.exists(), "{} is missing: run `cargo build -p verdict` first", program.display());
    program
}

/// The disk layer, beside the program.
fn disk_layer() -> PathBuf {
    let library = program().with_file_name("libverdict_disk.so");
    assert!(library.exists(), "{} is missing: run `cargo build -p verdict-disk` first", library.display());
    library
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
