//! Who leads the coordinators, as this node believes, and how to reach it.
//!
//! A local replica's knowledge is taken whenever it changes. Where that is wrong or missing, the answers of the nodes that were
//! asked count: a hint, or else the next voter in turn. A wrong belief costs a try, nothing else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;
use tonic::transport::Channel;
use verdict_proto::connect::Connect;
use verdict_protocol::ids::NodeId;
use verdict_raft::Leadership;

use crate::failure::Hint;

/// The belief, without any connection.
#[derive(Debug)]
struct Finder {
    voters: Vec<NodeId>,
    believed: NodeId,
    /// Whether the belief rests on anything.
    known: bool,
}

impl Finder {
    fn new(voters: Vec<NodeId>, first: NodeId) -> Finder {
        assert!(!voters.is_empty(), "a coordinator group has voters");
        let believed = if voters.contains(&first) { first } else { voters[0] };
        Finder { voters, believed, known: false }
    }

    fn learned(&mut self, leader: NodeId) {
        if self.voters.contains(&leader) {
            self.believed = leader;
            self.known = true;
        }
    }

    /// `asked` doesn't lead or can't be reached. Moves on, unless somebody else has.
    fn failed(&mut self, asked: NodeId, hint: Option<NodeId>) {
        if self.believed != asked {
            return;
        }
        if let Some(hint) = hint.filter(|hint| *hint != asked && self.voters.contains(hint)) {
            return self.learned(hint);
        }
        let place = self.voters.iter().position(|voter| *voter == asked).unwrap_or(0);
        self.believed = self.voters[(place + 1) % self.voters.len()];
        self.known = false;
    }
}

/// Who leads, and channels to all nodes.
#[derive(Debug)]
pub(crate) struct Leaders {
    nodes: BTreeMap<NodeId, String>,
    channels: BTreeMap<NodeId, Channel>,
    local: Option<watch::Receiver<Leadership>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    finder: Finder,
    /// What the local replica knew when it was asked last.
    seen: Option<Leadership>,
}

impl Leaders {
    /// An error names the address that is malformed.
    pub(crate) fn new(
        node: NodeId,
        nodes: BTreeMap<NodeId, String>,
        voters: Vec<NodeId>,
        local: Option<watch::Receiver<Leadership>>,
        connect: &Arc<dyn Connect>,
    ) -> Result<Leaders, String> {
        let mut channels = BTreeMap::new();
        for (id, address) in &nodes {
            let channel = connect
                .channel(address)
                .map_err(|error| format!("the address {address:?} of node {id} is malformed: {error}"))?;
            channels.insert(*id, channel);
        }
        let finder = Finder::new(voters, node);
        Ok(Leaders { nodes, channels, local, state: Mutex::new(State { finder, seen: None }) })
    }

    /// The node to ask.
    pub(crate) fn target(&self) -> NodeId {
        let mut state = self.lock();
        if let Some(local) = &self.local {
            let now = *local.borrow();
            if state.seen != Some(now) {
                state.seen = Some(now);
                if let Some(leader) = now.leader {
                    state.finder.learned(leader);
                }
            }
        }
        state.finder.believed
    }

    /// The node that was asked doesn't lead or can't be reached.
    pub(crate) fn failed(&self, asked: NodeId, hint: Option<NodeId>) {
        self.lock().finder.failed(asked, hint);
    }

    /// The leader, for somebody else: what the local replica knows, or else what was learned.
    pub(crate) fn hint(&self, besides: Option<NodeId>) -> Option<Hint> {
        let local = self.local.as_ref().and_then(|local| local.borrow().leader);
        let learned = || {
            let state = self.lock();
            state.finder.known.then_some(state.finder.believed)
        };
        let node = local.or_else(learned).filter(|node| Some(*node) != besides)?;
        Some(Hint { node, address: self.nodes.get(&node)?.clone() })
    }

    /// A channel to a node of the cluster.
    pub(crate) fn channel(&self, node: NodeId) -> Option<Channel> {
        self.channels.get(&node).cloned()
    }

    /// All nodes and where they listen.
    pub(crate) fn nodes(&self) -> &BTreeMap<NodeId, String> {
        &self.nodes
    }

    /// Whether the local replica leads, as far as it knows.
    pub(crate) fn is_local(&self) -> bool {
        self.local.as_ref().is_some_and(|local| local.borrow().is_leader)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_followed_and_voters_asked_in_turn() {
        let mut finder = Finder::new(vec![NodeId(1), NodeId(2), NodeId(3)], NodeId(9));
        assert_eq!(finder.believed, NodeId(1));
        finder.failed(NodeId(1), Some(NodeId(3)));
        assert_eq!((finder.believed, finder.known), (NodeId(3), true));
        finder.failed(NodeId(1), Some(NodeId(2)));
        assert_eq!(finder.believed, NodeId(3), "a late failure of another node moves nothing");
        finder.failed(NodeId(3), Some(NodeId(8)));
        assert_eq!((finder.believed, finder.known), (NodeId(1), false), "nobody knows node 8");
        finder.learned(NodeId(2));
        assert_eq!(finder.believed, NodeId(2));
    }
}
