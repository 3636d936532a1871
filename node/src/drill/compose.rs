//! The containers of the compose cluster (`docker/` of the repository), by the `docker` program.
//!
//! Names, ports and networks are those of `docker/README.md`: a container `NAME-coordinator-1` is node 1, `NAME-shard-2-3` is
//! node 23; from the host, node N is reached at port PORTS followed by N in two digits. A container with a replica's number above 3
//! that was created and never started is a spare one: it can take the place of a node of its group.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use tokio::process::Command;
use verdict_client::Client;

use super::scenario::{Action, Scenario, Step, Target, Way};
use crate::cluster_state;

/// Replicas of a group in a new cluster; the spare ones have higher numbers.
const FOUNDERS_PER_GROUP: u64 = 3;
/// Where a node listens inside its container.
const PORT: u16 = 7400;
/// How long one `docker` command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a container is tried to be paused, and the time between.
const PAUSE_TRIES: u32 = 20;
const PAUSE_AGAIN: Duration = Duration::from_millis(100);

/// The containers.
#[derive(Debug)]
pub struct Compose {
    name: String,
    nodes: Vec<Container>,
    spares: Vec<Container>,
    shards: u32,
}

#[derive(Clone, Debug)]
struct Container {
    node: u64,
    /// Such as `shard-2-3`.
    service: String,
    address: String,
}

impl Compose {
    /// Looks for the containers.
    pub async fn find() -> anyhow::Result<Compose> {
        let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
        let (name, ports) = (variable("VERDICT_NAME", "verdict"), variable("VERDICT_PORTS", "74"));
        let filter = format!("name=^{name}-(coordinator|shard)-");
        let listed = docker(&["ps", "-a", "--filter", &filter, "--format", "{{.Names}} {{.State}}"]).await?;
        let (mut nodes, mut spares) = (Vec::new(), Vec::new());
        for line in listed.lines() {
            let (container, state) = line.split_once(' ').unwrap_or((line, ""));
            let service = container.strip_prefix(&name).and_then(|rest| rest.strip_prefix('-'));
            let Some((service, node)) = service.and_then(|service| Some((service, node_of(service)?))) else {
                continue;
            };
            let address = format!("127.0.0.1:{ports}{node:02}");
            let container = Container { node, service: service.to_owned(), address };
            let is_spare = node % 10 > FOUNDERS_PER_GROUP && state == "created";
            if is_spare { &mut spares } else { &mut nodes }.push(container);
        }
        nodes.sort_by_key(|container| container.node);
        if nodes.is_empty() {
            bail!(
                "there are no containers {name}-coordinator-1 and so on: start the cluster with docker/up.sh"
            );
        }
        let shards =
            nodes.iter().filter(|container| container.node > 10).map(|container| container.node / 10);
        let shards = u32::try_from(shards.max().unwrap_or_default()).context("count the shards")?;
        Ok(Compose { name, nodes, spares, shards })
    }

    /// Whether the scenario can be played on containers, here. Nothing of the cluster is touched.
    pub async fn check(&self, scenario: &Scenario) -> anyhow::Result<()> {
        let error = |step: &Step, problem| scenario.error(step, problem);
        for step in &scenario.steps {
            let possible = match &step.action {
                Action::SlowDisk(..) | Action::FillDisk(_) | Action::MendDisk(_) => {
                    Err(anyhow::anyhow!("disks of containers can't be made slow or full"))
                }
                Action::CutOff(_, Way::Incoming | Way::Outgoing) => {
                    let rule = ["iptables", "-I", "INPUT", "-s", "127.0.0.0/8", "-j", "DROP"];
                    let needs = "one-way cuts of containers need root on this machine, nsenter and iptables";
                    host_can(&rule).await.context(needs)
                }
                Action::SlowNetwork(..) => {
                    let delay = ["tc", "qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1ms"];
                    let needs = "slow networks of containers need root on this machine, nsenter, tc and the kernel's netem \
                                 (module sch_netem)";
                    host_can(&delay).await.context(needs)
                }
                Action::Kill(_)
                | Action::Stop(_)
                | Action::Start(_)
                | Action::Restart(_)
                | Action::Pause(_)
                | Action::Resume(_)
                | Action::CutOff(_, Way::Both)
                | Action::MendNetwork(_)
                | Action::Replace(_)
                | Action::MoveLeader(_)
                | Action::WaitWhole => Ok(()),
            };
            possible.map_err(|why| {
                let advice = "run this scenario on local processes (without --compose)";
                error(step, format!("{why:#}; nothing was started: {advice}"))
            })?;
        }
        let mut left: Vec<u64> = self.spares.iter().map(|spare| group_of(spare.node)).collect();
        for (step, target) in scenario.replacements() {
            let group = match target {
                Target::Node(node) => group_of(*node),
                Target::Leader(group) | Target::Follower(group) => u64::from(*group),
                Target::All | Target::It | Target::Replicas(_) => continue,
            };
            let Some(place) = left.iter().position(|spare| *spare == group) else {
                let text = "there is no spare container left for this group; nothing was started: docker/up.sh makes one \
                            for each group, and after `docker/down.sh --volumes` all are new";
                return Err(error(step, text.to_owned()).into());
            };
            left.swap_remove(place);
        }
        Ok(())
    }

    /// The name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many shards there are.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// The ids of the nodes.
    pub fn nodes(&self) -> Vec<u64> {
        self.nodes.iter().map(|container| container.node).collect()
    }

    /// The spare containers, and where they are reached from here once they run.
    pub fn spares(&self) -> Vec<(u64, String)> {
        self.spares.iter().map(|container| (container.node, container.address.clone())).collect()
    }

    /// Where the nodes are reached from here.
    pub fn addresses(&self) -> Vec<(u64, String)> {
        self.nodes.iter().map(|container| (container.node, container.address.clone())).collect()
    }

    /// Starts what doesn't run, and waits until the cluster is whole.
    pub async fn start_all(&self, client: &Client) -> anyhow::Result<()> {
        for node in self.nodes() {
            if !self.runs(node).await? {
                self.each(&["start"], &[node]).await?;
            }
        }
        cluster_state::wait_whole(client, &self.nodes(), self.shards, || Ok(())).await
    }

    /// Runs one `docker` command on the containers of nodes.
    pub async fn each(&self, command: &[&str], nodes: &[u64]) -> anyhow::Result<()> {
        self.ask_each(command, nodes).await.map(drop)
    }

    async fn ask_each(&self, command: &[&str], nodes: &[u64]) -> anyhow::Result<String> {
        let containers =
            nodes.iter().map(|node| self.container(*node)).collect::<anyhow::Result<Vec<String>>>()?;
        let mut arguments = command.to_vec();
        arguments.extend(containers.iter().map(String::as_str));
        docker(&arguments).await
    }

    /// Pauses containers. Under load the kernel may not get to freeze one in time; the next try does.
    pub async fn pause(&self, nodes: &[u64]) -> anyhow::Result<()> {
        for node in nodes {
            let mut tries = 0;
            while let Err(error) = self.each(&["pause"], &[*node]).await {
                tries += 1;
                if tries == PAUSE_TRIES {
                    return Err(error);
                }
                tokio::time::sleep(PAUSE_AGAIN).await;
            }
        }
        Ok(())
    }

    /// Whether a container runs. A paused one does.
    pub async fn runs(&self, node: u64) -> anyhow::Result<bool> {
        Ok(!self.running(&[node]).await?.is_empty())
    }

    /// Those of some nodes whose containers run.
    pub async fn running(&self, nodes: &[u64]) -> anyhow::Result<Vec<u64>> {
        if nodes.is_empty() {
            return Ok(Vec::new());
        }
        // One line for each, in their order.
        let said = self.ask_each(&["inspect", "-f", "{{.State.Running}}"], nodes).await?;
        let running = nodes.iter().zip(said.lines()).filter(|(_, said)| said.trim() == "true");
        Ok(running.map(|(node, _)| *node).collect())
    }

    /// Removes a container with its volume, and starts a spare one of its group. Gives its node and where the others reach it.
    pub async fn replace(&mut self, old: u64) -> anyhow::Result<(u64, String)> {
        let container = self.container(old)?;
        let volume = format!("{}_{}", self.name, self.find_node(old)?.service);
        let spare = self.spares.iter().position(|spare| group_of(spare.node) == group_of(old));
        let spare =
            spare.with_context(|| format!("there is no spare container for the group of node {old}"))?;
        docker(&["rm", "-f", &container]).await?;
        docker(&["volume", "rm", &volume]).await?;
        self.nodes.retain(|container| container.node != old);
        let spare = self.spares.remove(spare);
        self.nodes.push(spare.clone());
        self.each(&["start"], &[spare.node]).await?;
        Ok((spare.node, format!("{}.cluster:{PORT}", spare.service)))
    }

    /// Cuts containers off from all others.
    pub async fn cut_off(&self, nodes: &[u64], way: Way) -> anyhow::Result<()> {
        let network = self.network();
        let subnet = "{{(index .IPAM.Config 0).Subnet}}";
        let subnet = docker(&["network", "inspect", "-f", subnet, &network]).await?;
        for node in nodes {
            let container = self.container(*node)?;
            match way {
                Way::Both => docker(&["network", "disconnect", &network, &container]).await.map(drop)?,
                Way::Incoming => {
                    self.in_network(*node, &["iptables", "-I", "INPUT", "-s", subnet.trim(), "-j", "DROP"])
                        .await?;
                }
                Way::Outgoing => {
                    self.in_network(*node, &["iptables", "-I", "OUTPUT", "-d", subnet.trim(), "-j", "DROP"])
                        .await?;
                }
            }
        }
        Ok(())
    }

    /// Makes the network of containers slow.
    pub async fn slow_network(&self, nodes: &[u64], delay: Duration) -> anyhow::Result<()> {
        for node in nodes {
            let delay = format!("{}ms", delay.as_millis());
            for device in self.devices(*node).await? {
                let command = ["tc", "qdisc", "replace", "dev", &device, "root", "netem", "delay", &delay];
                self.in_network(*node, &command).await?;
            }
        }
        Ok(())
    }

    /// Undoes cuts and delays.
    pub async fn mend_network(&self, nodes: &[u64]) -> anyhow::Result<()> {
        let network = self.network();
        for node in nodes {
            let (container, service) = (self.container(*node)?, &self.find_node(*node)?.service);
            let networks = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}";
            let connected = docker(&["inspect", "-f", networks, &container]).await?;
            if !connected.split_whitespace().any(|name| name == network) {
                let alias = format!("{service}.cluster");
                docker(&["network", "connect", "--alias", &alias, &network, &container]).await?;
            }
            if !self.runs(*node).await? {
                continue;
            }
            // Only what this program has put there: nothing else uses these tables inside a container. Without the right to
            // do so there is nothing to undo either.
            let _ = self.in_network(*node, &["iptables", "-F"]).await;
            for device in self.devices(*node).await? {
                let _ = self.in_network(*node, &["tc", "qdisc", "del", "dev", &device, "root"]).await;
            }
        }
        Ok(())
    }

    fn network(&self) -> String {
        format!("{}_cluster", self.name)
    }

    fn find_node(&self, node: u64) -> anyhow::Result<&Container> {
        let found = self.nodes.iter().find(|container| container.node == node);
        found.with_context(|| format!("there is no container of node {node}"))
    }

    fn container(&self, node: u64) -> anyhow::Result<String> {
        Ok(format!("{}-{}", self.name, self.find_node(node)?.service))
    }

    /// Runs a program of the host inside the network of a container, which takes the host's root.
    async fn in_network(&self, node: u64, command: &[&str]) -> anyhow::Result<String> {
        let process = docker(&["inspect", "-f", "{{.State.Pid}}", &self.container(node)?]).await?;
        let mut arguments = vec!["-t", process.trim(), "-n"];
        arguments.extend(command);
        run("nsenter", &arguments).await.context("this needs root on the host, and its nsenter")
    }

    async fn devices(&self, node: u64) -> anyhow::Result<Vec<String>> {
        let links = self.in_network(node, &["ip", "-o", "link"]).await?;
        let names = links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        Ok(names.filter(|name| *name != "lo").map(str::to_owned).collect())
    }
}

/// `coordinator-1` is node 1, `shard-2-3` is node 23.
fn node_of(service: &str) -> Option<u64> {
    if let Some(number) = service.strip_prefix("coordinator-") {
        return number.parse().ok();
    }
    let (shard, replica) = service.strip_prefix("shard-")?.split_once('-')?;
    Some(shard.parse::<u64>().ok()? * 10 + replica.parse::<u64>().ok()?)
}

/// The group of a node: 0 is the coordinator.
fn group_of(node: u64) -> u64 {
    node / 10
}

/// Whether this machine can do something to a network: it is tried in a new one, which ends with the command.
async fn host_can(command: &[&str]) -> anyhow::Result<()> {
    let mut arguments = vec!["--net=/proc/self/ns/net", "unshare", "--net"];
    arguments.extend(command);
    run("nsenter", &arguments).await.map(drop)
}

async fn docker(arguments: &[&str]) -> anyhow::Result<String> {
    run("docker", arguments).await
}

async fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(COMMAND_TIMEOUT, command.output()).await;
    let output = ended.with_context(|| format!("{} takes too long", shown()))?.with_context(shown)?;
    if !output.status.success() {
        bail!("{}: {}", shown(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_containers_can_t_do_is_refused_before_anything_starts() {
        let container = |node: u64| Container { node, service: String::new(), address: String::new() };
        let nodes = [1, 2, 3, 11, 12, 13].map(container).into();
        let compose = Compose { name: "x".into(), nodes, spares: vec![container(14)], shards: 1 };
        let told = |text: &'static str| {
            let (scenario, compose) = (Scenario::parse("x", text).unwrap(), &compose);
            async move { compose.check(&scenario).await.err().map(|error| error.to_string()) }
        };
        assert_eq!(told("at 1s kill leader of shard 1\nat 2s replace it\nat 3s cut off it").await, None);
        for (text, why) in [
            ("at 1s slow disk of all by 5ms", "x: line 1: disks of containers can't be made slow or full;"),
            ("at 1s fill disk of node 1", "run this scenario on local processes"),
            ("at 1s replace node 2", "line 1: there is no spare container left for this group;"),
            ("at 1s replace node 12\nthen replace it", "line 2: there is no spare container left"),
        ] {
            let told = told(text).await.unwrap_or_default();
            assert!(told.contains(why), "{text:?} gives {told:?}, which lacks {why:?}");
        }
    }

    #[test]
    fn containers_are_nodes_by_their_names() {
        assert_eq!(node_of("coordinator-3"), Some(3));
        assert_eq!(node_of("shard-2-1"), Some(21));
        assert_eq!((group_of(4), group_of(24)), (0, 2));
        assert_eq!(
            (node_of("shard-2"), node_of("prometheus-1"), node_of("coordinator-x")),
            (None, None, None)
        );
    }
}
