//! What goes over the simulated network.

use std::{fmt, rc::Rc};

use verdict_protocol::{
    batch::{Batch, RowKey, SplitBatch},
    ids::{BatchId, Epoch, GroupId, NodeId, ShardId, Stamp},
    leader::Reply,
    messages::{FromShard, ShardRead, ShardReadAnswer, ToShard},
};

use crate::raft;

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A node.
    Node(NodeId),
    /// A client.
    Client(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Node(node) => write!(f, "n{node}"),
            Place::Client(client) => write!(f, "c{client}"),
        }
    }
}

/// The stream of a coordinator's leader: answers go there, and only its epoch takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stream {
    /// The epoch.
    pub epoch: Epoch,
    /// The node that opened it.
    pub node: NodeId,
}

/// What a caller wants.
#[derive(Clone, Debug)]
pub enum Question {
    /// Settle a batch.
    Submit {
        /// The batch.
        batch: Rc<Batch>,
        /// The same, as it is settled.
        split: Rc<SplitBatch>,
    },
    /// Tell an outcome.
    Query {
        /// The batch.
        id: BatchId,
        /// Only when it is decided.
        wait: bool,
        /// Abort it if there is no trace of it.
        seal: bool,
    },
    /// Read rows.
    Read {
        /// The rows.
        rows: Vec<RowKey>,
    },
    /// Read a history.
    History {
        /// The row.
        row: RowKey,
        /// The first stamp.
        from: Stamp,
        /// How many changes.
        limit: usize,
    },
}

/// Why a node has no answer to hand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotServed {
    /// Nothing was taken: it doesn't lead.
    NotLeader,
    /// The leadership ended while the question was under way.
    Lost,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// What the leader said, or any replica of a recorded decision.
    Told(Reply),
    /// Nothing was proposed by this call.
    NotProposed,
    /// Ask again by id.
    Unknown,
}

/// What a shard's node says to a coordinator.
#[derive(Clone, Debug)]
pub enum Told {
    /// What the shard says.
    Message(FromShard),
    /// Answers to reads.
    Answers(Vec<(u64, ShardReadAnswer)>),
    /// This node doesn't lead the shard; who does, if known.
    NotLeader(Option<NodeId>),
}

/// A packet.
#[derive(Clone, Debug)]
pub enum Packet {
    /// Between the replicas of a group.
    Raft(GroupId, raft::Message),
    /// From a coordinator's leader to a shard.
    ToShard {
        /// The shard.
        shard: ShardId,
        /// Where answers go.
        stream: Stream,
        /// The message.
        message: ToShard,
        /// Reads.
        reads: Vec<(u64, ShardRead)>,
    },
    /// From a shard.
    FromShard {
        /// The shard.
        shard: ShardId,
        /// The epoch of the stream.
        epoch: Epoch,
        /// What it says.
        told: Told,
    },
    /// The connection to a node broke.
    Broken(NodeId),
    /// A client's call at a gateway.
    Call {
        /// The client's number for it.
        request: u64,
        /// The question.
        question: Question,
    },
    /// A gateway hands a call to the coordinators' leader.
    Forward {
        /// The gateway's number for it.
        call: u64,
        /// The question.
        question: Question,
    },
    /// What became of it.
    Served {
        /// The gateway's number.
        call: u64,
        /// The reply.
        reply: Result<Reply, NotServed>,
    },
    /// The answer to a client.
    Answer {
        /// The client's number.
        request: u64,
        /// The answer.
        answer: Answer,
    },
}
