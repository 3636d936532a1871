//! `verdict ctl member`: shows the members of a cluster, and replaces one.
//!
//! Every command makes small steps, each of which may be made twice, and tells what it does. One that didn't come to its end is
//! given again as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Subcommand;
use serde_json::{Value as Json, json};
use verdict_client::{Client, ClientError};
use verdict_proto::v1::{ClusterView, MembersResponse};

use super::show;

/// The pause between two steps.
const PAUSE: Duration = Duration::from_millis(300);

/// What `verdict ctl member` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum MemberCommand {
    /// List all nodes, those that were removed too, and the groups in which they have replicas
    List,
    /// Let a new node in, with a vote in each group of which its configuration gives it a replica
    Add {
        /// Its id, never used before, and where it is reached
        #[arg(value_name = "ID=HOST:PORT", value_parser = parse_node)]
        node: (u64, String),
        /// How long to try, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        patience: u64,
    },
    /// Take a node out of all groups for good. Its id is never used again
    Remove {
        /// Its id
        node: u64,
        /// How long to try, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        patience: u64,
    },
    /// Let a new node take the place of another, which may be dead, in each of its groups
    Replace {
        /// The id of the node that goes. It is never used again
        old: u64,
        /// The id of the new node, never used before, and where it is reached
        #[arg(value_name = "ID=HOST:PORT", value_parser = parse_node)]
        new: (u64, String),
        /// How long to try, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        patience: u64,
    },
}

impl MemberCommand {
    /// How long it may try, if it says so itself.
    pub fn patience(&self) -> Option<Duration> {
        match self {
            MemberCommand::List => None,
            MemberCommand::Add { patience, .. }
            | MemberCommand::Remove { patience, .. }
            | MemberCommand::Replace { patience, .. } => Some(Duration::from_secs(*patience)),
        }
    }
}

fn parse_node(text: &str) -> Result<(u64, String), String> {
    let wrong = || format!("{text:?} is no node: write ID=HOST:PORT, like 4=10.0.0.4:7400");
    let (id, address) = text.split_once('=').ok_or_else(wrong)?;
    let id = id.parse().ok().filter(|id| *id > 0).ok_or_else(wrong)?;
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    port.map(|_| (id, address.to_owned())).ok_or_else(wrong)
}

/// Runs a command.
pub async fn run(client: &Client, command: MemberCommand, as_json: bool) -> anyhow::Result<()> {
    let within = |patience| Instant::now() + Duration::from_secs(patience);
    let tell = |line: &str| crate::out!("{line}");
    match command {
        MemberCommand::List => {
            let members = client.members().await?;
            if as_json { show(&json(&members)) } else { list(&members.view.unwrap_or_default()) }
        }
        MemberCommand::Add { node: (node, address), patience } => {
            let change =
                Change { client, add: Some(node), remove: None, deadline: within(patience), tell: &tell };
            let hosted = change.let_in(node, &address).await?;
            change.in_groups(&hosted).await?;
            crate::out!("node {node} is a member");
            Ok(())
        }
        MemberCommand::Remove { node, patience } => {
            let change =
                Change { client, add: None, remove: Some(node), deadline: within(patience), tell: &tell };
            let groups = groups_of(&known(client, node).await?, node);
            change.in_groups(&groups).await?;
            change.note_removed(node).await
        }
        MemberCommand::Replace { old, new: (new, address), patience } => {
            replace(client, old, (new, &address), within(patience), &tell).await.map(drop)
        }
    }
}

/// Lets a new node take the place of another, in each of its groups, and tells each step. Gives these groups. What was done already
/// isn't done again.
pub async fn replace(
    client: &Client,
    old: u64,
    (new, address): (u64, &str),
    deadline: Instant,
    tell: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<BTreeSet<u32>> {
    ensure!(old != new, "a node can't take its own place: the new one needs an id that was never used");
    let change = Change { client, add: Some(new), remove: Some(old), deadline, tell };
    let view = known(client, old).await?;
    let hosted = change.let_in(new, address).await?;
    let groups = groups_of(&view, old);
    let missing: Vec<&u32> = groups.difference(&hosted).collect();
    ensure!(
        missing.is_empty(),
        "node {old} has replicas of groups {missing:?} and node {new} is not set up for them: name it in `coordinators` or \
         [shard_replicas] of its configuration"
    );
    change.in_groups(&groups).await?;
    change.note_removed(old).await?;
    Ok(groups)
}

/// One change, on its way.
struct Change<'a> {
    client: &'a Client,
    add: Option<u64>,
    remove: Option<u64>,
    deadline: Instant,
    /// Hears of each step.
    tell: &'a (dyn Fn(&str) + Sync),
}

impl Change<'_> {
    /// Writes the new node into the list. Gives the groups of which it has a replica.
    async fn let_in(&self, node: u64, address: &str) -> anyhow::Result<BTreeSet<u32>> {
        (self.tell)(&format!("node {node} at {address}: let in"));
        let answer = self.client.change_node(node, address, false).await;
        let answer = answer.with_context(|| format!("let node {node} in"))?;
        ensure!(!answer.groups.is_empty(), "node {node} has no replica of any group: see its configuration");
        Ok(answer.groups.into_iter().collect())
    }

    /// Goes from group to group.
    async fn in_groups(&self, groups: &BTreeSet<u32>) -> anyhow::Result<()> {
        for group in groups {
            if let Err(error) = self.in_group(*group).await {
                let left: Vec<&u32> = groups.range(group..).collect();
                return Err(
                    error.context(format!("not done yet in groups {left:?}; give the same command again"))
                );
            }
        }
        Ok(())
    }

    /// Steps until a group is as wished. A leader that is missing for a while is waited for; a refusal is final.
    async fn in_group(&self, group: u32) -> anyhow::Result<()> {
        let mut told = String::new();
        loop {
            let step = match self.client.change_replica(group, self.add, self.remove).await {
                Ok(answer) if answer.done => {
                    (self.tell)(&format!("group {group}: done"));
                    return Ok(());
                }
                Ok(answer) => answer.step,
                Err(error @ ClientError::Unavailable { .. }) => error.to_string(),
                Err(error) => bail!("group {group}: {error}"),
            };
            if step != told {
                (self.tell)(&format!("group {group}: {step}"));
                told = step;
            }
            ensure!(Instant::now() < self.deadline, "group {group}: not done in time: {told}");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn note_removed(&self, node: u64) -> anyhow::Result<()> {
        loop {
            match self.client.change_node(node, "", true).await {
                Ok(_) => {
                    (self.tell)(&format!("node {node} is removed; its id is never used again"));
                    return Ok(());
                }
                Err(ClientError::Unavailable { .. }) if Instant::now() < self.deadline => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    let what = format!("note that node {node} is removed; give the same command again");
                    return Err(anyhow::Error::from(error).context(what));
                }
            }
        }
    }
}

/// What is known of the members, if this node is or was one of them.
async fn known(client: &Client, node: u64) -> anyhow::Result<ClusterView> {
    let view = client.members().await?.view.unwrap_or_default();
    ensure!(view.nodes.iter().any(|record| record.node_id == node), "there is no node {node}");
    Ok(view)
}

fn groups_of(view: &ClusterView, node: u64) -> BTreeSet<u32> {
    let member =
        view.groups.iter().filter(|group| group.voters.contains(&node) || group.learners.contains(&node));
    member.map(|group| group.group_id).collect()
}

fn list(view: &ClusterView) -> anyhow::Result<()> {
    let mut votes: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for group in &view.groups {
        for node in &group.voters {
            votes.entry(*node).or_default().push(group.group_id.to_string());
        }
        for node in &group.learners {
            votes.entry(*node).or_default().push(format!("{} (no vote yet)", group.group_id));
        }
    }
    crate::out!("{:<6} {:<24} {:<8} groups", "node", "address", "state");
    for record in &view.nodes {
        let state = if record.removed { "removed" } else { "member" };
        let groups = votes.get(&record.node_id).map(|groups| groups.join(", ")).unwrap_or_default();
        crate::out!("{:<6} {:<24} {state:<8} {groups}", record.node_id, record.address);
    }
    Ok(())
}

fn json(members: &MembersResponse) -> Json {
    let view = members.view.clone().unwrap_or_default();
    let nodes = view.nodes.iter().map(
        |record| json!({ "node": record.node_id, "address": record.address, "removed": record.removed }),
    );
    let groups = view.groups.iter().map(|group| {
        json!({ "group": group.group_id, "voters": group.voters, "learners": group.learners, "index": group.index })
    });
    json!({
        "cluster": members.cluster,
        "version": view.version,
        "nodes": nodes.collect::<Vec<_>>(),
        "groups": groups.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_an_id_and_an_address() {
        assert_eq!(parse_node("4=10.0.0.4:7400"), Ok((4, "10.0.0.4:7400".to_owned())));
        for text in ["4", "4=", "0=a:1", "x=a:1", "4=a", "4=a:b", "=a:1"] {
            assert!(parse_node(text).is_err(), "{text:?} was taken");
        }
    }
}
