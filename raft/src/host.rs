//! Everything of one node that has to do with Raft.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use verdict_proto::{
    connect::Connect,
    v1::{self, raft_server},
};
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
};

use crate::{
    api::{HostConfig, HostError},
    group::Group,
};

/// Everything of one node that has to do with Raft: the database, the log writer, the transport, the groups.
pub struct Host {}

impl Host {
    /// Opens the directory, and starts the log writer and the transport. Groups are started one by one after it.
    pub async fn open(config: HostConfig, connect: Arc<dyn Connect>) -> Result<Host, HostError> {
        let _ = (config, connect);
        todo!()
    }

    /// Starts the replica of a group on this node, from disk if it was here before. `voters` (with their addresses) founds
    /// the group if this replica has neither a log nor a vote; all nodes may do so at the same time with the same voters.
    pub async fn start_group<M: Machine>(
        &self,
        group: GroupId,
        machine: M::Config,
        voters: &BTreeMap<NodeId, String>,
    ) -> Result<Group<M>, HostError> {
        let _ = (group, machine, voters);
        todo!()
    }

    /// The gRPC service for other nodes' messages, to be added to the node's server.
    pub fn service(&self) -> raft_server::RaftServer<Service> {
        todo!()
    }

    /// The addresses of all nodes that were named as replicas of any group here.
    pub fn addresses(&self) -> BTreeMap<NodeId, String> {
        todo!()
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        todo!()
    }

    /// The message of the error that stops this node, once there is one: nothing is acknowledged after it, and the process
    /// should end.
    pub fn fatal(&self) -> watch::Receiver<Option<String>> {
        todo!()
    }

    /// Stops the groups, the writer and the transport, and closes the database.
    pub async fn shutdown(&self) {
        todo!()
    }
}

/// Serves the other nodes' messages.
#[derive(Clone)]
pub struct Service {}

type Frames = Pin<Box<dyn Stream<Item = Result<v1::RaftFrame, Status>> + Send>>;

#[tonic::async_trait]
impl raft_server::Raft for Service {
    type ExchangeStream = Frames;

    async fn exchange(&self, _: Request<Streaming<v1::RaftFrame>>) -> Result<Response<Frames>, Status> {
        todo!()
    }

    async fn snapshot(
        &self,
        _: Request<Streaming<v1::SnapshotChunk>>,
    ) -> Result<Response<v1::SnapshotReply>, Status> {
        todo!()
    }
}
