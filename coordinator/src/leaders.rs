//! Who leads the coordinators, as this node believes, and how to reach it.
//!
//! A local replica's knowledge is taken whenever it changes. Where that is wrong or missing, the answers of the nodes that were
//! asked count: a hint, or else the next voter in turn. A wrong belief costs a try, nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;
use tonic::transport::Channel;
use verdict_protocol::ids::{GroupId, NodeId};
use verdict_raft::Leadership;

use crate::{
    directory::{Directory, View},
    failure::Hint,
};

/// The belief, without any connection.
#[derive(Debug)]
struct Finder {
    voters: Vec<NodeId>,
    nodes: BTreeSet<NodeId>,
    believed: NodeId,
    /// Whether the belief rests on anything.
    known: bool,
}

impl Finder {
    fn new(voters: Vec<NodeId>, nodes: BTreeSet<NodeId>, first: NodeId) -> Finder {
        assert!(!voters.is_empty(), "a coordinator group has voters");
        let believed = if voters.contains(&first) { first } else { voters[0] };
        Finder { voters, nodes, believed, known: false }
    }

    /// The members have changed.
    fn update(&mut self, voters: Vec<NodeId>, nodes: BTreeSet<NodeId>) {
        assert!(!voters.is_empty(), "a coordinator group has voters");
        if !nodes.contains(&self.believed) {
            (self.believed, self.known) = (voters[0], false);
        }
        (self.voters, self.nodes) = (voters, nodes);
    }

    /// It may have become a voter just now, so any node that is known will do.
    fn learned(&mut self, leader: NodeId) {
        if self.nodes.contains(&leader) {
            self.believed = leader;
            self.known = true;
        }
    }

    /// `asked` doesn't lead or can't be reached. Moves on, unless somebody else has.
    fn failed(&mut self, asked: NodeId, hint: Option<NodeId>) {
        if self.believed != asked {
            return;
        }
        if let Some(hint) = hint.filter(|hint| *hint != asked && self.nodes.contains(hint)) {
            return self.learned(hint);
        }
        // One that is no voter any more is followed by the first.
        let place = self.voters.iter().position(|voter| *voter == asked);
        self.believed = self.voters[place.map_or(0, |place| (place + 1) % self.voters.len())];
        self.known = false;
    }
}

/// Who leads.
#[derive(Debug)]
pub(crate) struct Leaders {
    directory: Arc<Directory>,
    local: Option<watch::Receiver<Leadership>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    finder: Finder,
    /// What the local replica knew when it was asked last.
    seen: Option<Leadership>,
    members: watch::Receiver<View>,
}

impl Leaders {
    pub(crate) fn new(
        node: NodeId,
        directory: Arc<Directory>,
        local: Option<watch::Receiver<Leadership>>,
    ) -> Leaders {
        let mut members = directory.watch();
        let (voters, nodes) = voters_and_nodes(&members.borrow_and_update());
        let state = State { finder: Finder::new(voters, nodes, node), seen: None, members };
        Leaders { directory, local, state: Mutex::new(state) }
    }

    /// The node to ask.
    pub(crate) fn target(&self) -> NodeId {
        let mut state = self.lock();
        // An error means that the node stops.
        if state.members.has_changed().unwrap_or(false) {
            let (voters, nodes) = voters_and_nodes(&state.members.borrow_and_update());
            state.finder.update(voters, nodes);
        }
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
        Some(Hint { node, address: self.directory.address(node)? })
    }

    /// A channel to a node of the cluster.
    pub(crate) fn channel(&self, node: NodeId) -> Option<Channel> {
        self.directory.channel(node)
    }

    /// All nodes and where they listen.
    pub(crate) fn nodes(&self) -> BTreeMap<NodeId, String> {
        self.directory.nodes()
    }

    /// Whether the local replica leads, as far as it knows.
    pub(crate) fn is_local(&self) -> bool {
        self.local.as_ref().is_some_and(|local| local.borrow().is_leader)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }
}

/// The voters of the coordinator group, and all nodes.
fn voters_and_nodes(view: &View) -> (Vec<NodeId>, BTreeSet<NodeId>) {
    let voters = view.voters(GroupId::COORDINATOR).map(|voters| voters.iter().copied().collect());
    let nodes: BTreeSet<NodeId> = view.nodes.keys().copied().collect();
    (voters.unwrap_or_else(|| nodes.iter().copied().collect()), nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_followed_and_voters_asked_in_turn() {
        let mut finder =
            Finder::new(vec![NodeId(1), NodeId(2), NodeId(3)], (1..=4).map(NodeId).collect(), NodeId(9));
        assert_eq!(finder.believed, NodeId(1));
        finder.failed(NodeId(1), Some(NodeId(3)));
        assert_eq!((finder.believed, finder.known), (NodeId(3), true));
        finder.failed(NodeId(1), Some(NodeId(2)));
        assert_eq!(finder.believed, NodeId(3), "a late failure of another node moves nothing");
        finder.failed(NodeId(3), Some(NodeId(8)));
        assert_eq!((finder.believed, finder.known), (NodeId(1), false), "nobody knows node 8");
        finder.learned(NodeId(2));
        assert_eq!(finder.believed, NodeId(2));
        finder.learned(NodeId(4));
        assert_eq!(finder.believed, NodeId(4), "it may have got its vote just now");
        finder.update(vec![NodeId(5), NodeId(2)], [NodeId(2), NodeId(5)].into());
        assert_eq!((finder.believed, finder.known), (NodeId(5), false), "the one believed is gone");
    }
}
