//! How the knowledge of the members reaches all nodes: each asks a few others in turn, and tells what it knows itself.
//!
//! Each message may come twice, late or never: what is older than what is known changes nothing, and the next round asks again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::{sync::watch, time::MissedTickBehavior};
use verdict_proto::v1::{self, admin_client::AdminClient};
use verdict_protocol::{
    coordinator::Coordinator,
    ids::{GroupId, NodeId},
    roster,
};
use verdict_raft::Group;

use crate::{
    admin::{LocalStatus, within},
    directory::{Directory, View},
};

/// How often other nodes are asked...
const INTERVAL: Duration = Duration::from_secs(1);
/// ...and how many of them.
const ASKED: usize = 3;

/// Keeps the directory of a node up to date.
pub(crate) struct Spread {
    pub(crate) node: NodeId,
    pub(crate) cluster: String,
    pub(crate) directory: Arc<Directory>,
    pub(crate) coordinator: Option<Group<Coordinator>>,
    pub(crate) shards: Arc<dyn LocalStatus>,
    /// Nodes that were removed, for the transport.
    pub(crate) removed: watch::Sender<BTreeSet<NodeId>>,
    /// Told when this node itself was removed.
    pub(crate) fatal: Arc<watch::Sender<Option<String>>>,
}

impl Spread {
    pub(crate) async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = self.node;
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                _ = tick.tick() => {}
            }
            self.refresh();
            let next = self.next_after(last);
            last = next.last().copied().unwrap_or(last);
            self.ask(next).await;
        }
    }

    /// Takes over what this node's own replicas know.
    pub(crate) fn refresh(&self) {
        let own = self.coordinator.as_ref().and_then(Group::members);
        self.directory.merge(View::of_groups(self.shards.members().into_iter().chain(own)));
        // The store of a node that is stopping fails.
        let roster = self.coordinator.as_ref().map(|group| group.read(|_, store| roster::nodes(store)));
        if let Some(Ok(records)) = roster {
            self.directory.merge(View::of_roster(&records));
        }
        self.heed();
    }

    /// Tells all other nodes what is known here, and takes over what they know. Who doesn't answer hears of it later.
    pub(crate) async fn ask_all(&self) {
        self.refresh();
        self.ask(self.others()).await;
    }

    /// Takes over what another node has told.
    pub(crate) fn take(&self, view: v1::ClusterView) {
        self.directory.merge(View::from_wire(view));
        self.heed();
    }

    /// What this node tells of itself.
    pub(crate) fn answer(&self, joins: bool) -> v1::MembersResponse {
        let mut groups: Vec<u32> = self.shards.hosted().iter().map(|group| group.0).collect();
        groups.extend(self.coordinator.as_ref().map(|_| GroupId::COORDINATOR.0));
        groups.sort_unstable();
        let (cluster, view) = (self.cluster.clone(), self.directory.view().to_wire());
        v1::MembersResponse { cluster, node_id: self.node.0, joins, groups, view: Some(view) }
    }

    fn others(&self) -> Vec<NodeId> {
        self.directory.nodes().into_keys().filter(|node| *node != self.node).collect()
    }

    /// The next few in order, round and round.
    fn next_after(&self, last: NodeId) -> Vec<NodeId> {
        let others = self.others();
        let place = others.iter().position(|node| *node > last).unwrap_or(0);
        others.iter().cycle().skip(place).take(others.len().min(ASKED)).copied().collect()
    }

    async fn ask(&self, nodes: Vec<NodeId>) {
        let question =
            v1::MembersRequest { cluster: self.cluster.clone(), view: Some(self.directory.view().to_wire()) };
        let asked = nodes.into_iter().filter_map(|node| {
            let mut client = AdminClient::new(self.directory.channel(node)?);
            let question = question.clone();
            Some(async move { within(client.members(question)).await.ok() })
        });
        for answer in join_all(asked).await.into_iter().flatten() {
            if answer.cluster == self.cluster {
                self.take(answer.view.unwrap_or_default());
            }
        }
    }

    /// Removed nodes aren't listened to, and one that finds itself among them stops.
    fn heed(&self) {
        let removed: BTreeSet<NodeId> = self.directory.view().removed.into_keys().collect();
        if removed.contains(&self.node) {
            let message = format!("node {} was removed from the cluster", self.node);
            self.fatal.send_if_modified(|before| before.is_none() && before.replace(message).is_none());
        }
        self.removed.send_if_modified(|before| {
            let news = *before != removed;
            *before = removed;
            news
        });
    }
}
