//! The containers of the compose cluster (`docker/` of the repository), by the `docker` program.
//!
//! Names, ports and networks are those of `docker/README.md`: a container `NAME-coordinator-1` is node 1, `NAME-shard-2-3` is
//! node 23; from the host, node N is reached at port PORTS followed by N in two digits.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use tokio::process::Command;
use verdict_client::Client;

use super::scenario::Way;
use crate::cluster_state;

/// How long one `docker` command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// The containers.
#[derive(Debug)]
pub struct Compose {
    name: String,
    nodes: Vec<Container>,
    shards: u32,
}

#[derive(Debug)]
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
        let listed = docker(&["ps", "-a", "--filter", &filter, "--format", "{{.Names}}"]).await?;
        let mut nodes: Vec<Container> = listed
            .lines()
            .filter_map(|container| container.strip_prefix(&name)?.strip_prefix('-'))
            .filter_map(|service| {
                let node = node_of(service)?;
                let address = format!("127.0.0.1:{ports}{node:02}");
                Some(Container { node, service: service.to_owned(), address })
            })
            .collect();
        nodes.sort_by_key(|container| container.node);
        if nodes.is_empty() {
            bail!(
                "there are no containers {name}-coordinator-1 and so on: start the cluster with docker/up.sh"
            );
        }
        let shards =
            nodes.iter().filter(|container| container.node > 10).map(|container| container.node / 10);
        let shards = u32::try_from(shards.max().unwrap_or_default()).context("count the shards")?;
        Ok(Compose { name, nodes, shards })
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
        let containers =
            nodes.iter().map(|node| self.container(*node)).collect::<anyhow::Result<Vec<String>>>()?;
        let mut arguments = command.to_vec();
        arguments.extend(containers.iter().map(String::as_str));
        docker(&arguments).await.map(drop)
    }

    /// Whether a container runs.
    pub async fn runs(&self, node: u64) -> anyhow::Result<bool> {
        let said = docker(&["inspect", "-f", "{{.State.Running}}", &self.container(node)?]).await?;
        Ok(said.trim() == "true")
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
                self.in_network(*node, &command).await.context(
                    "delays need the kernel's netem (module sch_netem): where it is absent, run this scenario on local \
                     processes (without --compose)",
                )?;
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

    #[test]
    fn containers_are_nodes_by_their_names() {
        assert_eq!(node_of("coordinator-3"), Some(3));
        assert_eq!(node_of("shard-2-1"), Some(21));
        assert_eq!(
            (node_of("shard-2"), node_of("prometheus-1"), node_of("coordinator-x")),
            (None, None, None)
        );
    }
}
