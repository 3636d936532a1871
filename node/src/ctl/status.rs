//! The state of a cluster as a table, and whether its replicas are equal.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};
use verdict_proto::v1::{GroupKind, GroupStatus, NodeStatus, ReplicaRole, StatusResponse};

/// Characters of a hash that the table shows.
const HASH_SHOWN: usize = 8;

/// How a replica's hash compares with those of the other replicas of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Equality {
    /// Another replica shows the same hash at the same index.
    Equal,
    /// Another replica shows another hash at the same index: the group has diverged.
    Different,
    /// No other replica shows a hash at this index: nothing can be said at this moment.
    Alone,
}

/// Compares a replica with the others of its group.
pub fn equality(status: &StatusResponse, node_id: u64, group: &GroupStatus) -> Equality {
    let others = status.nodes.iter().filter(|node| node.node_id != node_id);
    let at_index = others
        .flat_map(|node| &node.groups)
        .filter(|other| other.group_id == group.group_id && other.state_hash_index == group.state_hash_index);
    at_index.fold(Equality::Alone, |found, other| match (found, other.state_hash == group.state_hash) {
        (Equality::Different, _) | (_, false) => Equality::Different,
        (Equality::Alone | Equality::Equal, true) => Equality::Equal,
    })
}

/// Whether any two replicas of a group show different hashes at the same index.
pub fn replicas_differ(status: &StatusResponse) -> bool {
    replicas(status).any(|(node, group)| equality(status, node.node_id, group) == Equality::Different)
}

/// All replicas of all nodes.
pub fn replicas(status: &StatusResponse) -> impl Iterator<Item = (&NodeStatus, &GroupStatus)> {
    status.nodes.iter().flat_map(|node| node.groups.iter().map(move |group| (node, group)))
}

/// The table: one line for each replica, by group, then a line for each node.
pub fn table(status: &StatusResponse) -> String {
    let header = [
        "group",
        "node",
        "role",
        "term",
        "leader",
        "last",
        "committed",
        "applied",
        "hash@index",
        "equal",
        "in doubt",
        "locks",
        "waiting",
        "unfinished",
    ];
    let mut groups: BTreeMap<u32, Vec<(&NodeStatus, &GroupStatus)>> = BTreeMap::new();
    for (node, group) in replicas(status) {
        groups.entry(group.group_id).or_default().push((node, group));
    }
    let mut lines = vec![header.map(str::to_owned)];
    for (node, group) in groups.into_values().flatten() {
        lines.push(replica_line(status, node, group));
    }
    let widths: Vec<usize> = (0..header.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text.push('\n');
    for node in &status.nodes {
        text += &node_line(node);
    }
    text
}

fn replica_line(status: &StatusResponse, node: &NodeStatus, group: &GroupStatus) -> [String; 14] {
    let is_shard = group.kind() == GroupKind::Shard;
    let shard_only = |number: u32| if is_shard { number.to_string() } else { String::new() };
    let in_doubt = match group.in_doubt {
        0 => shard_only(0),
        count => format!("{count} ({} ms)", group.in_doubt_age_max_ms),
    };
    let hash: String = group.state_hash.chars().take(HASH_SHOWN).collect();
    let equal = match equality(status, node.node_id, group) {
        Equality::Equal => "yes",
        Equality::Different => "DIFFERENT",
        Equality::Alone => "?",
    };
    let leader = if group.leader == 0 { "none".to_owned() } else { group.leader.to_string() };
    [
        if is_shard { format!("shard {}", group.group_id) } else { "coordinator".to_owned() },
        node.node_id.to_string(),
        role_text(group),
        group.term.to_string(),
        leader,
        group.last_index.to_string(),
        group.committed_index.to_string(),
        group.applied_index.to_string(),
        format!("{hash}@{}", group.state_hash_index),
        equal.to_owned(),
        in_doubt,
        shard_only(group.held_locks),
        shard_only(group.waiting),
        if is_shard { String::new() } else { group.unfinished.to_string() },
    ]
}

fn node_line(node: &NodeStatus) -> String {
    if node.reachable {
        format!("node {} at {}: version {}\n", node.node_id, node.address, node.version)
    } else {
        format!("node {} at {}: NOT REACHABLE: {}\n", node.node_id, node.address, node.error)
    }
}

/// The role for people. A leader that hears no quorum can't do anything, and another one may lead.
fn role_text(group: &GroupStatus) -> String {
    match hears_quorum(group) {
        Some(false) => "leader, hears no quorum".to_owned(),
        Some(true) | None => role_name(group.role()).to_owned(),
    }
}

/// Whether a leader hears a majority of the voters, itself included; none of those that don't lead.
fn hears_quorum(group: &GroupStatus) -> Option<bool> {
    let heard = group.voters.len().saturating_sub(group.silent_voters.len());
    (group.role() == ReplicaRole::Leader).then_some(2 * heard > group.voters.len())
}

fn role_name(role: ReplicaRole) -> &'static str {
    match role {
        ReplicaRole::Leader => "leader",
        ReplicaRole::Follower => "follower",
        ReplicaRole::Candidate => "candidate",
        ReplicaRole::Learner => "learner",
        ReplicaRole::Stopped => "STOPPED",
        ReplicaRole::Unspecified => "?",
    }
}

/// The same as JSON.
pub fn json(status: &StatusResponse) -> Json {
    let nodes = status.nodes.iter().map(|node| {
        let groups = node.groups.iter().map(|group| group_json(status, node, group));
        json!({
            "node": node.node_id,
            "address": node.address,
            "reachable": node.reachable,
            "error": node.error,
            "version": node.version,
            "groups": groups.collect::<Vec<_>>(),
        })
    });
    json!({ "nodes": nodes.collect::<Vec<_>>(), "replicas_differ": replicas_differ(status) })
}

fn group_json(status: &StatusResponse, node: &NodeStatus, group: &GroupStatus) -> Json {
    let equal = match equality(status, node.node_id, group) {
        Equality::Equal => json!(true),
        Equality::Different => json!(false),
        Equality::Alone => Json::Null,
    };
    json!({
        "group": group.group_id,
        "kind": if group.kind() == GroupKind::Shard { "shard" } else { "coordinator" },
        "term": group.term,
        "role": role_name(group.role()),
        "leader": group.leader,
        "last_index": group.last_index,
        "committed_index": group.committed_index,
        "applied_index": group.applied_index,
        "state_hash": group.state_hash,
        "state_hash_index": group.state_hash_index,
        "equal": equal,
        "snapshot_index": group.snapshot_index,
        "voters": group.voters,
        "silent_voters": group.silent_voters,
        "hears_quorum": hears_quorum(group),
        "in_doubt": group.in_doubt,
        "in_doubt_age_max_ms": group.in_doubt_age_max_ms,
        "held_locks": group.held_locks,
        "waiting": group.waiting,
        "unfinished": group.unfinished,
        "decisions": group.decisions,
        "epoch": group.epoch,
        "horizon_ms": group.horizon_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(hashes: &[(u64, &str)]) -> StatusResponse {
        let nodes = hashes.iter().enumerate().map(|(place, (index, hash))| NodeStatus {
            node_id: place as u64 + 1,
            reachable: true,
            groups: vec![GroupStatus {
                group_id: 1,
                kind: GroupKind::Shard.into(),
                state_hash: (*hash).to_owned(),
                state_hash_index: *index,
                ..GroupStatus::default()
            }],
            ..NodeStatus::default()
        });
        StatusResponse { nodes: nodes.collect() }
    }

    #[test]
    fn a_leader_without_a_quorum_is_told_apart() {
        let told = |role: ReplicaRole, silent_voters: Vec<u64>| {
            let mut status = status(&[(5, "aa")]);
            let group = &mut status.nodes[0].groups[0];
            (group.voters, group.silent_voters) = (vec![1, 2, 3], silent_voters);
            group.role = role.into();
            (
                table(&status).contains("leader, hears no quorum"),
                json(&status)["nodes"][0]["groups"][0]["hears_quorum"].clone(),
            )
        };
        assert_eq!(told(ReplicaRole::Leader, vec![]), (false, json!(true)));
        assert_eq!(told(ReplicaRole::Leader, vec![2]), (false, json!(true)));
        assert_eq!(told(ReplicaRole::Leader, vec![2, 3]), (true, json!(false)));
        assert_eq!(told(ReplicaRole::Follower, vec![]), (false, Json::Null));
    }

    #[test]
    fn replicas_differ_only_if_their_hashes_do_at_one_index() {
        assert!(!replicas_differ(&status(&[(5, "aa"), (5, "aa"), (4, "bb")])));
        assert!(replicas_differ(&status(&[(5, "aa"), (5, "aa"), (5, "bb")])));
        let text = table(&status(&[(5, "aa"), (5, "bb"), (4, "cc")]));
        assert_eq!((text.matches("DIFFERENT").count(), text.matches('?').count()), (2, 4));
    }
}
