//! The list of all nodes that a cluster has or ever had: part of the coordinator group's replicated state.
//!
//! Who votes in a group is Raft's own knowledge. This list remembers what Raft forgets: the ids of nodes that were removed. A node
//! that was removed may have voted, and acknowledged entries, which a fresh disk under its id would know nothing of; so an id is
//! never given to another node.
//!
//! Invariants:
//! - An id that is in the list stays in it. Once removed, it stays removed.
//! - The address of an id never changes.
//! - The version rises with each change, and nothing else changes the list.

use serde::{Deserialize, Serialize};

use crate::{
    ids::NodeId,
    machine::{decode, encode},
    store::{Store, StoreError},
};

const NODE_TABLE: u8 = 0x24;

/// A wish to change the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeChange {
    /// The nodes with which the cluster was set up, as the proposer is configured. They are taken over if the list is empty.
    pub founders: Vec<(NodeId, String)>,
    /// The node.
    pub node: NodeId,
    /// What shall become of it.
    pub wish: NodeWish,
}

/// What shall become of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NodeWish {
    /// It is new, and reached at this address (`host:port`).
    Add(String),
    /// It is gone, and never comes back.
    Remove,
}

/// Why the list was not changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeRefusal {
    /// The id belonged to a node that was removed.
    UsedBefore,
    /// The id belongs to a node at another address.
    OtherAddress(String),
    /// A node of the list is reached at this address already.
    AddressTaken(NodeId),
    /// No node has or had this id.
    Unknown,
}

/// A node of the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Where it is reached, or was.
    pub address: String,
    /// Whether it was removed.
    pub removed: bool,
    /// The index of the entry that changed this record last.
    pub changed: u64,
}

/// All nodes that the cluster has or had, in order. Empty as long as the nodes are those of the configuration.
pub fn nodes(store: &dyn Store) -> Result<Vec<(NodeId, NodeRecord)>, StoreError> {
    let (mut found, mut failed) = (Vec::new(), None);
    store.scan(&[NODE_TABLE], &[NODE_TABLE + 1], &mut |key, value| {
        match decode("node record", value) {
            Ok(record) => found.push((node_of(key), record)),
            Err(error) => failed = Some(error),
        }
        failed.is_none()
    })?;
    failed.map_or(Ok(found), Err)
}

/// Applies a wish. What is so already is changed by nothing and refused by nobody, so a wish may come twice.
pub(crate) fn change(
    store: &mut dyn Store,
    index: u64,
    change: NodeChange,
) -> Result<Result<(), NodeRefusal>, StoreError> {
    let mut known = nodes(store)?;
    if known.is_empty() {
        for (node, address) in change.founders {
            let record = NodeRecord { address, removed: false, changed: index };
            store.put(&node_key(node), &encode(&record))?;
            known.push((node, record));
        }
    }
    let record = known.iter().find(|(node, _)| *node == change.node).map(|(_, record)| record.clone());
    let record = match (change.wish, record) {
        (NodeWish::Add(_), Some(record)) if record.removed => return Ok(Err(NodeRefusal::UsedBefore)),
        (NodeWish::Add(address), Some(record)) if record.address != address => {
            return Ok(Err(NodeRefusal::OtherAddress(record.address)));
        }
        (NodeWish::Add(_), Some(_)) => return Ok(Ok(())),
        (NodeWish::Add(address), None) => {
            let taken = known.iter().find(|(_, record)| !record.removed && record.address == address);
            if let Some((node, _)) = taken {
                return Ok(Err(NodeRefusal::AddressTaken(*node)));
            }
            NodeRecord { address, removed: false, changed: index }
        }
        (NodeWish::Remove, None) => return Ok(Err(NodeRefusal::Unknown)),
        (NodeWish::Remove, Some(record)) if record.removed => return Ok(Ok(())),
        (NodeWish::Remove, Some(record)) => NodeRecord { removed: true, changed: index, ..record },
    };
    store.put(&node_key(change.node), &encode(&record))?;
    Ok(Ok(()))
}

fn node_key(node: NodeId) -> [u8; 9] {
    let mut key = [NODE_TABLE; 9];
    key[1..].copy_from_slice(&node.0.to_be_bytes());
    key
}

fn node_of(key: &[u8]) -> NodeId {
    NodeId(u64::from_be_bytes(key[1..9].try_into().expect("an id follows the table")))
}
