//! The types with which callers and replicas talk: settings, errors, states.

use std::{fmt, path::PathBuf};

use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Position,
};

/// What a node must know to open its part of the Raft groups.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// The cluster's name. Nodes of different clusters refuse each other.
    pub cluster: String,
    /// This node.
    pub node: NodeId,
    /// Where other nodes reach this node (`host:port`).
    pub address: String,
    /// Where everything is kept. Made if it doesn't exist. Only one process may use it at a time.
    pub directory: PathBuf,
    /// Intervals and timeouts.
    pub timing: Timing,
    /// Bounds.
    pub limits: Limits,
}

/// Intervals and timeouts, in milliseconds.
#[derive(Clone, Debug)]
pub struct Timing {
    /// How often an idle leader tells that it lives.
    pub heartbeat_ms: u64,
    /// A follower that hears nothing for at least this long stands for election...
    pub election_timeout_min_ms: u64,
    /// ...and at the latest after this long; each takes a random time in between.
    pub election_timeout_max_ms: u64,
    /// How long the answer to a message may take before its connection is given up.
    pub request_timeout_ms: u64,
    /// How long a snapshot may take to be sent and installed.
    pub snapshot_timeout_ms: u64,
    /// How long a read may wait for the confirmation of the leadership and for the machine to catch up.
    pub read_timeout_ms: u64,
    /// How long a proposal may wait for a fresh leader to be confirmed by a quorum.
    pub propose_retry_ms: u64,
    /// How long a replica that was just started waits for those voters that can't be reached, before it votes with the rest.
    pub greeting_patience_ms: u64,
    /// How long a voter may be silent before [`GroupStatus::silent_voters`] lists it.
    pub silent_after_ms: u64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat_ms: 100,
            election_timeout_min_ms: 400,
            election_timeout_max_ms: 800,
            request_timeout_ms: 1500,
            snapshot_timeout_ms: 120_000,
            read_timeout_ms: 3000,
            propose_retry_ms: 1000,
            greeting_patience_ms: 1500,
            silent_after_ms: 2000,
        }
    }
}

/// Bounds on what a node keeps and queues.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The largest command of one entry, in bytes.
    pub command_bytes_max: usize,
    /// Recent entries kept in memory for each group, in bytes.
    pub tail_bytes: usize,
    /// A snapshot is made when the entries since the last one have this many bytes in all...
    pub snapshot_after_bytes: u64,
    /// ...or are this many.
    pub snapshot_after_entries: u64,
    /// Entries kept behind a snapshot for slow followers, in bytes.
    pub keep_bytes: u64,
    /// Entries kept behind a snapshot for slow followers.
    pub keep_entries: u64,
    /// Requests to the log writer that may wait.
    pub writer_queue: usize,
    /// Messages to one other node that may wait.
    pub peer_queue: usize,
    /// Proposals of one group that may wait for their outcome.
    pub proposals_in_flight: usize,
    /// The same, in bytes.
    pub proposal_bytes_in_flight: usize,
    /// RocksDB's block cache, in bytes.
    pub block_cache_bytes: usize,
    /// What the machine of each group may keep in memory of what was used lately and stands in the database too, in bytes.
    pub state_cache_bytes: usize,
    /// Changes of each group's state that gather in memory before they are written, in bytes...
    pub state_behind_bytes: usize,
    /// ...or in entries that were applied. After a crash so much is applied again from the log.
    pub state_behind_entries: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            command_bytes_max: 32 << 20,
            tail_bytes: 32 << 20,
            snapshot_after_bytes: 256 << 20,
            snapshot_after_entries: 200_000,
            keep_bytes: 32 << 20,
            keep_entries: 20_000,
            writer_queue: 4096,
            peer_queue: 4096,
            proposals_in_flight: 4096,
            proposal_bytes_in_flight: 128 << 20,
            block_cache_bytes: 64 << 20,
            state_cache_bytes: 128 << 20,
            state_behind_bytes: 2 << 20,
            state_behind_entries: 4096,
        }
    }
}

/// What a confirmed leadership says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmed {
    /// The replica has applied everything up to this index, which holds all that was committed when the confirmation was asked for.
    pub index: u64,
    /// The term in which this replica was confirmed to lead. Whoever keeps things in memory for one leadership compares it.
    pub term: u64,
}

/// What an applied command answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied<R> {
    /// The index of the entry.
    pub index: u64,
    /// The machine's answer.
    pub reply: R,
}

/// Who leads a group, as this replica knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// The current Raft term.
    pub term: u64,
    /// This replica leads, and has applied everything that was committed before its term began: it can serve. It may
    /// have been deposed without knowing it; only a proposal or [`crate::Group::read_barrier`] tells.
    pub is_leader: bool,
}

/// The part that a replica plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Leads.
    Leader,
    /// Follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Follows without a vote.
    Learner,
    /// Was stopped, or met a fatal error.
    Stopped,
}

/// How a group looks from this replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// The group.
    pub group: GroupId,
    /// The current Raft term.
    pub term: u64,
    /// The part that this replica plays.
    pub role: Role,
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// The index of the last entry in this replica's log; 0: none.
    pub last_index: u64,
    /// The index up to which this replica knows entries to be committed.
    pub committed_index: u64,
    /// The index of the last applied entry, Raft's own entries included.
    pub applied_index: u64,
    /// Where the machine stands, with its running hash.
    pub position: Position,
    /// The index of the last entry in the newest snapshot; 0: none.
    pub snapshot_index: u64,
    /// The index of the last entry that was purged from this replica's log; 0: none.
    pub purged_index: u64,
    /// Everybody who votes.
    pub voters: Vec<NodeId>,
    /// Voters that the leader hasn't heard of for [`Timing::silent_after_ms`]. Empty on replicas that don't lead.
    pub silent_voters: Vec<NodeId>,
}

/// A host or a group couldn't start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Another process uses the directory.
    #[error("{} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// What is on the disk is damaged or belongs to something else.
    #[error("the data can't be used: {0}")]
    Damaged(String),
    /// Reading or writing failed.
    #[error("storage failed: {0}")]
    Storage(String),
    /// The settings contradict each other or what is on the disk.
    #[error("{0}")]
    Config(String),
    /// The host was stopped, or met a fatal error before.
    #[error("stopped: {0}")]
    Stopped(String),
}

/// Why a proposal has no outcome to tell.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This replica doesn't lead. Nothing was appended.
    #[error("not the leader of the group{}", leader_text(.leader))]
    NotLeader {
        /// The leader, if one is known.
        leader: Option<NodeId>,
    },
    /// Too much is waiting, or the command is too large. Nothing was appended.
    #[error("refused: {0}")]
    Refused(String),
    /// The entry may or may not be applied, now or later.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// The replica has stopped. Earlier proposals may or may not be applied; this one wasn't appended by this replica.
    #[error("stopped: {0}")]
    Stopped(String),
}

/// Why a read can't be served here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// This replica doesn't lead.
    #[error("not the leader of the group{}", leader_text(.leader))]
    NotLeader {
        /// The leader, if one is known.
        leader: Option<NodeId>,
    },
    /// No quorum confirmed the leadership in time, or the machine didn't catch up in time.
    #[error("not confirmed: {0}")]
    Unavailable(String),
    /// The replica has stopped.
    #[error("stopped: {0}")]
    Stopped(String),
}

/// Why an operator's request to a group failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// This replica doesn't lead.
    #[error("not the leader of the group{}", leader_text(.leader))]
    NotLeader {
        /// The leader, if one is known.
        leader: Option<NodeId>,
    },
    /// It isn't possible now, or makes no sense.
    #[error("{0}")]
    Refused(String),
    /// It was begun, and nobody knows whether it will be done.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// The replica has stopped.
    #[error("stopped: {0}")]
    Stopped(String),
}

fn leader_text(leader: &Option<NodeId>) -> impl fmt::Display {
    match leader {
        Some(node) => format!("; node {node} is"),
        None => String::new(),
    }
}
