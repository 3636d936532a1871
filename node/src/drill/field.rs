//! What a drill is played on: processes of its own, or the containers of the compose cluster.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use verdict_client::Client;

use super::{
    compose::Compose,
    disk::Disks,
    proxy::{Link, Network},
    scenario::{Scenario, Way},
};
use crate::{
    folder::Folder,
    processes::{self, Cluster, Plan},
};

/// The cluster under the drill.
#[derive(Debug)]
pub enum Field {
    /// Processes of its own.
    Local(Box<Local>),
    /// Containers.
    Compose(Compose),
}

/// Processes, with a relay between them.
#[derive(Debug)]
pub struct Local {
    cluster: Cluster,
    network: Network,
    /// None: the library for it isn't there.
    disks: Option<Disks>,
}

impl Field {
    /// Prepares processes in a folder. Nothing is started yet.
    pub async fn local(folder: &Folder, scenario: &Scenario) -> anyhow::Result<Field> {
        let plan = Plan {
            name: "drill".into(),
            nodes: scenario.nodes,
            shards: scenario.shards,
            place: scenario.place.clone(),
            spares: scenario.replacements().len() as u64,
            proxied: true,
        };
        let mut cluster = Cluster::prepare(folder.path(), plan)?;
        let nodes = cluster.nodes().into_iter().zip(cluster.addresses());
        let addresses: Vec<_> = nodes.chain(cluster.spares().cloned()).collect();
        let network = Network::start(&addresses).await.context("start the network between the nodes")?;
        let disks = match scenario.steps.iter().any(|step| step.action.needs_disk()) {
            true => Some(Disks::prepare(folder.path(), &mut cluster)?),
            false => None,
        };
        Ok(Field::Local(Box::new(Local { cluster, network, disks })))
    }

    /// Where clients reach the nodes.
    pub fn public_addresses(&self) -> Vec<String> {
        match self {
            Field::Local(local) => local.cluster.addresses().into_iter().map(|node| node.public).collect(),
            Field::Compose(compose) => compose.addresses().into_iter().map(|(_, address)| address).collect(),
        }
    }

    /// Where this program asks each node about itself, whatever is cut off.
    pub fn direct_addresses(&self) -> Vec<(u64, String)> {
        match self {
            Field::Local(local) => {
                let addresses = local.cluster.addresses().into_iter().map(|node| node.listen);
                local.cluster.nodes().into_iter().zip(addresses).collect()
            }
            Field::Compose(compose) => compose.addresses(),
        }
    }

    /// The spare nodes, which take the place of others later, and where this program asks each about itself.
    pub fn spares(&self) -> Vec<(u64, String)> {
        match self {
            Field::Local(local) => {
                let spares = local.cluster.spares();
                spares.map(|(node, addresses)| (*node, addresses.listen.clone())).collect()
            }
            Field::Compose(compose) => compose.spares(),
        }
    }

    /// The ids of the nodes.
    pub fn nodes(&self) -> Vec<u64> {
        self.direct_addresses().into_iter().map(|(node, _)| node).collect()
    }

    /// What it is, for people.
    pub fn name(&self) -> String {
        match self {
            Field::Local(local) => format!("{} local processes", local.cluster.nodes().len()),
            Field::Compose(compose) => format!("{} containers of {}", compose.nodes().len(), compose.name()),
        }
    }

    /// Starts what isn't running, and waits until it is whole.
    pub async fn start(&mut self, client: &Client) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => local.cluster.start_all(client).await,
            Field::Compose(compose) => compose.start_all(client).await,
        }
    }

    /// Kills nodes.
    pub async fn kill(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => local.cluster.kill_all(nodes).await,
            Field::Compose(compose) => compose.each(&["kill", "-s", "KILL"], nodes).await,
        }
    }

    /// Stops nodes in order.
    pub async fn stop(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => local.cluster.stop(nodes).await,
            Field::Compose(compose) => compose.each(&["stop", "-t", "20"], nodes).await,
        }
    }

    /// Starts a node that doesn't run.
    pub async fn start_node(&mut self, node: u64) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => local.cluster.start(node),
            Field::Compose(compose) => compose.each(&["start"], &[node]).await,
        }
    }

    /// Removes a node that doesn't run, disk and all, and starts a spare one on an empty disk, which waits to be let in. Gives the
    /// spare's id, and where the others reach it.
    pub async fn replace(&mut self, old: u64) -> anyhow::Result<(u64, String)> {
        match self {
            Field::Local(local) => {
                let new = local.cluster.replace(old)?;
                if let Some(disks) = &mut local.disks {
                    disks.add(new, &mut local.cluster)?;
                }
                local.cluster.start(new)?;
                let nodes = local.cluster.nodes().into_iter().zip(local.cluster.addresses());
                let address = nodes.into_iter().find(|(node, _)| *node == new);
                Ok((new, address.context("the new node has no address")?.1.public))
            }
            Field::Compose(compose) => compose.replace(old).await,
        }
    }

    /// Whether a node runs. One that has ended by itself doesn't.
    pub async fn runs(&mut self, node: u64) -> anyhow::Result<bool> {
        Ok(!self.running(&[node]).await?.is_empty())
    }

    /// Those of some nodes that run.
    pub async fn running(&mut self, nodes: &[u64]) -> anyhow::Result<Vec<u64>> {
        match self {
            Field::Local(local) => {
                let mut running = Vec::new();
                for node in nodes {
                    // It may have ended by itself.
                    local.cluster.ended(*node)?;
                    if local.cluster.runs(*node) {
                        running.push(*node);
                    }
                }
                Ok(running)
            }
            Field::Compose(compose) => compose.running(nodes).await,
        }
    }

    /// Lets nodes stand still.
    pub async fn pause(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => nodes.iter().try_for_each(|node| local.cluster.pause(*node)),
            Field::Compose(compose) => compose.pause(nodes).await,
        }
    }

    /// Lets them go on.
    pub async fn resume(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => nodes.iter().try_for_each(|node| local.cluster.resume(*node)),
            Field::Compose(compose) => compose.each(&["unpause"], nodes).await,
        }
    }

    /// Cuts nodes off from all others.
    pub async fn cut_off(&mut self, nodes: &[u64], way: Way) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => {
                let incoming = |_, to: u64| nodes.contains(&to);
                let outgoing = |from: u64, _| nodes.contains(&from);
                let cut = |link: &mut Link| link.cut = true;
                match way {
                    Way::Both => {
                        local.network.change(|from, to| incoming(from, to) || outgoing(from, to), cut)
                    }
                    Way::Incoming => local.network.change(incoming, cut),
                    Way::Outgoing => local.network.change(outgoing, cut),
                }
                Ok(())
            }
            Field::Compose(compose) => compose.cut_off(nodes, way).await,
        }
    }

    /// Makes what goes between these nodes and others slow.
    pub async fn slow_network(&mut self, nodes: &[u64], delay: Duration) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => {
                let touched = |from: u64, to: u64| nodes.contains(&from) || nodes.contains(&to);
                local.network.change(touched, |link| link.delay = delay);
                Ok(())
            }
            Field::Compose(compose) => compose.slow_network(nodes, delay).await,
        }
    }

    /// Undoes cuts and delays.
    pub async fn mend_network(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) => {
                let touched = |from: u64, to: u64| nodes.contains(&from) || nodes.contains(&to);
                local.network.change(touched, |link| *link = Link::default());
                Ok(())
            }
            Field::Compose(compose) => compose.mend_network(nodes).await,
        }
    }

    /// Makes each sync take longer.
    pub fn slow_disk(&mut self, nodes: &[u64], delay: Duration) -> anyhow::Result<()> {
        self.disks()?.set(nodes, &format!("slow_sync_ms = {}\n", delay.as_millis()))
    }

    /// Leaves no space.
    pub fn fill_disk(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        self.disks()?.set(nodes, "free_bytes = 0\n")
    }

    /// Undoes both.
    pub fn mend_disk(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        match self {
            Field::Local(local) if local.disks.is_none() => Ok(()),
            Field::Local(_) | Field::Compose(_) => self.disks()?.set(nodes, ""),
        }
    }

    /// The memory of a node's process, where it can be told.
    pub fn memory(&self, node: u64) -> Option<u64> {
        match self {
            Field::Local(local) => local.cluster.memory(node),
            Field::Compose(_) => None,
        }
    }

    /// Ends what was started here. Containers that were there before stay.
    pub async fn end(&mut self) {
        match self {
            Field::Local(local) => local.cluster.end().await,
            Field::Compose(_) => {}
        }
    }

    /// The ends of the nodes' logs.
    pub fn log_tails(&self) -> String {
        match self {
            Field::Local(local) => local.cluster.log_tails(),
            Field::Compose(compose) => format!("look at the logs with: docker logs {}-...\n", compose.name()),
        }
    }

    fn disks(&self) -> anyhow::Result<&Disks> {
        match self {
            Field::Local(local) => local.disks.as_ref().context("the disks were not prepared for faults"),
            Field::Compose(_) => anyhow::bail!(
                "slow and full disks can't be made for containers: run this scenario on local processes (without --compose)"
            ),
        }
    }
}

/// A client of the cluster, for all but the load.
pub fn client(field: &Field) -> anyhow::Result<Client> {
    processes::client(field.public_addresses())
}

/// A file that is found beside this program, or beside its folder as cargo has it.
pub fn beside_program(name: &str) -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let folder = program.parent()?;
    [folder.join(name), folder.join("deps").join(name)].into_iter().find(|path| path.is_file())
}
