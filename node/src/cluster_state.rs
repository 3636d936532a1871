//! What the status of a cluster says as a whole: who leads, whether everybody takes part, whether everything is finished.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::bail;
use tokio::time::sleep;
use verdict_client::Client;
use verdict_proto::v1::{ReplicaRole, StatusResponse};

use crate::ctl::status::{replicas, replicas_differ};

/// How long the cluster may take until every group has a leader on every node.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a group may be without a leader.
const LEADER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long all parts may take to be finished, and all replicas to be equal.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one node may take to tell the status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the cluster is asked while something is waited for.
const POLL: Duration = Duration::from_millis(100);

/// Who leads a group: of several that believe so, the one with the highest term.
pub fn leader_in(status: &StatusResponse, group: u32) -> Option<u64> {
    let leaders = replicas(status)
        .filter(|(_, replica)| replica.group_id == group && replica.role() == ReplicaRole::Leader);
    leaders.max_by_key(|(_, replica)| replica.term).map(|(node, _)| node.node_id)
}

/// What keeps the cluster from being whole, if anything does: every one of `nodes` answers, each group has a leader, and every
/// voter takes part.
pub fn not_whole(status: &StatusResponse, nodes: &[u64], shards: u32) -> Option<String> {
    for id in nodes {
        let Some(node) = status.nodes.iter().find(|node| node.node_id == *id) else {
            return Some(format!("node {id} isn't known"));
        };
        if !node.reachable {
            return Some(format!("node {id} doesn't answer: {}", node.error));
        }
        if let Some(group) = node.groups.iter().find(|group| group.leader == 0) {
            return Some(format!("node {id} knows no leader of group {}", group.group_id));
        }
    }
    (0..=shards).find_map(|group| group_not_whole(status, group))
}

fn group_not_whole(status: &StatusResponse, group: u32) -> Option<String> {
    let Some(leader) = leader_in(status, group) else {
        return Some(format!("group {group} has no leader"));
    };
    let of_group: Vec<_> = replicas(status).filter(|(_, replica)| replica.group_id == group).collect();
    let led = of_group.iter().find(|(node, _)| node.node_id == leader).map(|(_, replica)| *replica)?;
    if let Some(voter) = led.voters.iter().find(|id| of_group.iter().all(|(node, _)| node.node_id != **id)) {
        return Some(format!("node {voter} has no replica of group {group}"));
    }
    if let Some(silent) = led.silent_voters.first() {
        return Some(format!("the leader of group {group} doesn't hear from node {silent}"));
    }
    let astray = of_group.iter().find(|(_, replica)| replica.leader != leader);
    astray.map(|(node, _)| format!("node {} knows another leader of group {group}", node.node_id))
}

/// Waits until the cluster is whole. `check` ends the waiting early with an error.
pub async fn wait_whole(
    client: &Client,
    nodes: &[u64],
    shards: u32,
    mut check: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let client = client.with_timeout(STATUS_TIMEOUT);
    let started = Instant::now();
    let mut missing = String::from("no node answers");
    while started.elapsed() < WHOLE_TIMEOUT {
        check()?;
        match client.status().await {
            Ok(status) => match not_whole(&status, nodes, shards) {
                Some(what) => missing = what,
                None => return Ok(()),
            },
            Err(error) => missing = error.to_string(),
        }
        sleep(POLL).await;
    }
    bail!("the cluster isn't whole after {} s: {missing}", WHOLE_TIMEOUT.as_secs())
}

/// Waits until a node votes in each of its groups and has applied all that they had committed when this was asked. Gives the groups.
pub async fn wait_caught_up(client: &Client, node: u64) -> anyhow::Result<Vec<u32>> {
    let client = client.with_timeout(STATUS_TIMEOUT);
    let started = Instant::now();
    let mut goals = BTreeMap::new();
    let mut missing = String::from("no node answers");
    while started.elapsed() < WHOLE_TIMEOUT {
        match client.status().await {
            Ok(status) => {
                if goals.is_empty() {
                    goals = committed(&status);
                }
                match lags(&status, node, &goals) {
                    Some(what) => missing = what,
                    None => {
                        let groups = replicas(&status).filter(|(replica, _)| replica.node_id == node);
                        return Ok(groups.map(|(_, group)| group.group_id).collect());
                    }
                }
            }
            Err(error) => missing = error.to_string(),
        }
        sleep(POLL).await;
    }
    bail!("node {node} has not caught up after {} s: {missing}", WHOLE_TIMEOUT.as_secs())
}

/// Up to where each group has committed.
fn committed(status: &StatusResponse) -> BTreeMap<u32, u64> {
    let mut committed = BTreeMap::new();
    for (_, replica) in replicas(status) {
        let most = committed.entry(replica.group_id).or_default();
        *most = replica.committed_index.max(*most);
    }
    committed
}

/// What a node lacks of having caught up, if anything.
fn lags(status: &StatusResponse, node: u64, goals: &BTreeMap<u32, u64>) -> Option<String> {
    let Some(said) = status.nodes.iter().find(|status| status.node_id == node && status.reachable) else {
        return Some("it doesn't answer".to_owned());
    };
    let behind = said.groups.iter().find(|group| {
        let goal = goals.get(&group.group_id).copied().unwrap_or_default();
        !group.voters.contains(&node) || group.applied_index < goal
    });
    behind.map(|group| format!("{}: {} applied", group_name(group.group_id), group.applied_index))
}

/// The node that leads a group, and what else it leads.
pub async fn leader_of(client: &Client, group: u32, shards: u32) -> anyhow::Result<(u64, Vec<u32>)> {
    let started = Instant::now();
    let client = client.with_timeout(STATUS_TIMEOUT);
    while started.elapsed() < LEADER_TIMEOUT {
        if let Ok(status) = client.status().await
            && let Some(leader) = leader_in(&status, group)
        {
            let led = (0..=shards).filter(|group| leader_in(&status, *group) == Some(leader)).collect();
            return Ok((leader, led));
        }
        sleep(POLL).await;
    }
    bail!("group {group} has no leader for {} s", LEADER_TIMEOUT.as_secs())
}

/// Waits until no part is in doubt or waiting, no row is held, and every decision is confirmed by all participants.
pub async fn wait_quiet(client: &Client) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut missing = String::from("no node answers");
    while started.elapsed() < QUIET_TIMEOUT {
        match client.status().await {
            Ok(status) => match not_quiet(&status) {
                Some(what) => missing = what,
                None => return Ok(()),
            },
            Err(error) => missing = error.to_string(),
        }
        sleep(POLL).await;
    }
    bail!("not everything is finished after {} s: {missing}", QUIET_TIMEOUT.as_secs())
}

/// What isn't finished, if anything.
pub fn not_quiet(status: &StatusResponse) -> Option<String> {
    if let Some(node) = status.nodes.iter().find(|node| !node.reachable) {
        return Some(format!("node {} doesn't answer: {}", node.node_id, node.error));
    }
    let busy = replicas(status).find(|(_, group)| {
        group.in_doubt > 0 || group.held_locks > 0 || group.waiting > 0 || group.unfinished > 0
    });
    busy.map(|(node, group)| {
        format!(
            "group {} on node {}: {} in doubt, {} rows held, {} waiting, {} decisions not confirmed",
            group.group_id, node.node_id, group.in_doubt, group.held_locks, group.waiting, group.unfinished
        )
    })
}

/// Waits until all replicas of each group show a hash at the same index, or two of them differ.
pub async fn equal_replicas(client: &Client) -> anyhow::Result<StatusResponse> {
    let started = Instant::now();
    loop {
        let status = client.status().await?;
        if all_at_one_index(&status) || replicas_differ(&status) || started.elapsed() >= QUIET_TIMEOUT {
            return Ok(status);
        }
        sleep(POLL).await;
    }
}

/// Whether all replicas of each group show their hash at one index.
pub fn all_at_one_index(status: &StatusResponse) -> bool {
    replicas(status).all(|(_, one)| {
        let mut group = replicas(status).filter(|(_, other)| other.group_id == one.group_id);
        group.all(|(_, other)| other.state_hash_index == one.state_hash_index)
    })
}

/// What people call a group.
pub fn group_name(group: u32) -> String {
    if group == 0 { "coordinator".to_owned() } else { format!("shard {group}") }
}

/// What people call several groups.
pub fn group_names(groups: &[u32]) -> String {
    groups.iter().map(|group| group_name(*group)).collect::<Vec<_>>().join(", ")
}
