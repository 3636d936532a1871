//! The calls, one at a time. Each is tried on one node after the other until the caller's time runs out.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Request, Response, Status, transport::Channel};
use verdict_proto::{
    connect::{Connect, Tcp},
    v1::{
        Batch, ChangeNodeRequest, ChangeNodeResponse, ChangeReplicaRequest, ChangeReplicaResponse,
        GetBatchRequest, HistoryRequest, HistoryResponse, ListDecisionsRequest, ListDecisionsResponse,
        ListInDoubtRequest, ListInDoubtResponse, MembersRequest, MembersResponse, ReadRequest, ReadResponse,
        Row, StatusRequest, StatusResponse, SubmitRequest, TransferLeaderRequest, TransferLeaderResponse,
        TriggerSnapshotRequest, TriggerSnapshotResponse, admin_client::AdminClient,
        settlement_client::SettlementClient,
    },
};

use crate::{
    ClientError, Outcome, Submitter,
    failure::Failure,
    nodes::Nodes,
    retry,
    tries::{Next, Place, Tries},
};

/// The largest answer that is taken, in bytes: 1,000 rows of the largest records fit many times over.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// How long a step of a change of members may take at the server.
const MEMBERS_WAIT: Duration = Duration::from_secs(10);

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How nodes are reached.
    pub connect: Arc<dyn Connect>,
    /// The time of a call, over all its tries.
    pub timeout: Duration,
    /// The time after which another node is asked.
    pub try_timeout: Duration,
}

impl Default for Options {
    /// TCP, 30 s for a call, 5 s for a try.
    fn default() -> Self {
        Options {
            connect: Arc::new(Tcp),
            timeout: Duration::from_secs(30),
            try_timeout: Duration::from_secs(5),
        }
    }
}

/// A client of one cluster. Cheap to clone; all clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    nodes: Arc<Nodes>,
    options: Options,
}

impl Client {
    /// A client of the cluster whose nodes (some or all) listen at these addresses (`host:port`). Connections are made when
    /// they are needed. Must be called inside a tokio runtime. An error names an address that is malformed.
    pub fn connect<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
        options: Options,
    ) -> Result<Client, ClientError> {
        let addresses = addresses.into_iter().map(Into::into).collect();
        let nodes = Nodes::new(options.connect.clone(), addresses)?;
        Ok(Client { nodes: Arc::new(nodes), options })
    }

    /// The same client with another time for a call.
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        let options = Options { timeout, ..self.options.clone() };
        Client { nodes: self.nodes.clone(), options }
    }

    /// The addresses that were given.
    pub fn addresses(&self) -> &[String] {
        self.nodes.addresses()
    }

    /// What is wrong at present, for people: what a node said last instead of an answer, or else to which nodes there was no
    /// connection when they were last asked. None as long as nothing is wrong.
    pub fn trouble(&self) -> Option<String> {
        self.nodes.trouble()
    }

    /// Whether any node has ever answered, if only by a refusal.
    pub fn is_reached(&self) -> bool {
        self.nodes.is_reached()
    }

    /// Settles a batch: tries under its one id, over the nodes, until it is committed or aborted or the time runs out.
    pub async fn submit(&self, batch: &Batch) -> Result<Outcome, ClientError> {
        let deadline = self.deadline();
        let mut address = self.nodes.preferred();
        let mut tries = Tries::default();
        loop {
            let request = SubmitRequest::of(batch);
            let limit = self.try_deadline(deadline, Duration::ZERO);
            let end = self.once(&address, limit, request, |channel, request| async move {
                settlement(channel).submit(request).await
            });
            match tries.after(&batch.id, end.await.map(|response| response.outcome)) {
                Next::Answer(answer) => return answer,
                Next::Again { pause, .. } if Instant::now() + pause + retry::TRY_MIN >= deadline => {
                    return tries.give_up(|| self.nodes.nobody());
                }
                Next::Again { pause, place } => {
                    address = self.nodes.next(&address, place);
                    sleep(pause).await;
                }
            }
        }
    }

    /// Keeps up to `window` batches in flight on one stream.
    pub fn submitter(&self, window: usize) -> Submitter {
        Submitter::start(self.clone(), window)
    }

    /// Asks for the outcome of an id, waiting up to `wait` while the batch is in progress. With `abort_if_not_seen`, an id of
    /// which there is no trace is aborted (CANCELLED) for good.
    pub async fn get_batch(
        &self,
        id: &str,
        abort_if_not_seen: bool,
        wait: Duration,
    ) -> Result<Outcome, ClientError> {
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let request = GetBatchRequest { batch_id: id.to_owned(), abort_if_not_seen, wait_ms };
        let response =
            self.ask(wait, request, |channel, request| async move {
                settlement(channel).get_batch(request).await
            })
            .await?;
        Ok(Outcome::from_wire(id, response.outcome).unwrap_or_else(Outcome::unknown))
    }

    /// Reads rows at one position.
    pub async fn read(&self, rows: Vec<Row>) -> Result<ReadResponse, ClientError> {
        let request = ReadRequest { rows };
        self.ask(Duration::ZERO, request, |channel, request| async move {
            settlement(channel).read(request).await
        })
        .await
    }

    /// Lists changes of a row, oldest first: those with the stamp `from` or a later one (0: all that are kept), at most
    /// `limit` (0: the server's default).
    pub async fn history(&self, row: Row, from: u64, limit: u32) -> Result<HistoryResponse, ClientError> {
        let request = HistoryRequest { row: Some(row), from, limit };
        self.ask(Duration::ZERO, request, |channel, request| async move {
            settlement(channel).history(request).await
        })
        .await
    }

    /// The state of every group on every node, as any one node sees it.
    pub async fn status(&self) -> Result<StatusResponse, ClientError> {
        let request = StatusRequest { local_only: false };
        self.ask(
            Duration::ZERO,
            request,
            |channel, request| async move { admin(channel).status(request).await },
        )
        .await
    }

    /// The state of the groups on the node at `address`, in its own words. One try.
    pub async fn status_of(&self, address: &str) -> Result<StatusResponse, ClientError> {
        let request = StatusRequest { local_only: true };
        self.ask_node(
            address,
            request,
            |channel, request| async move { admin(channel).status(request).await },
        )
        .await
    }

    /// Lists decisions in the order in which they were recorded, from a position on.
    pub async fn list_decisions(&self, from: u64, limit: u32) -> Result<ListDecisionsResponse, ClientError> {
        let request = ListDecisionsRequest { from, limit };
        self.ask(Duration::ZERO, request, |channel, request| async move {
            admin(channel).list_decisions(request).await
        })
        .await
    }

    /// Lists the parts that shards hold in doubt.
    pub async fn list_in_doubt(&self, limit: u32) -> Result<ListInDoubtResponse, ClientError> {
        let request = ListInDoubtRequest { limit };
        self.ask(Duration::ZERO, request, |channel, request| async move {
            admin(channel).list_in_doubt(request).await
        })
        .await
    }

    /// Makes another replica the leader of a group; `to_node` 0: any.
    pub async fn transfer_leader(
        &self,
        group_id: u32,
        to_node: u64,
    ) -> Result<TransferLeaderResponse, ClientError> {
        let request = TransferLeaderRequest { group_id, to_node };
        self.ask(Duration::ZERO, request, |channel, request| async move {
            admin(channel).transfer_leader(request).await
        })
        .await
    }

    /// What is known of the members of the cluster.
    pub async fn members(&self) -> Result<MembersResponse, ClientError> {
        let request = MembersRequest::default();
        self.ask(
            Duration::ZERO,
            request,
            |channel, request| async move { admin(channel).members(request).await },
        )
        .await
    }

    /// Lets a node in, or notes that one is removed for good. What is so already is done.
    pub async fn change_node(
        &self,
        node_id: u64,
        address: &str,
        remove: bool,
    ) -> Result<ChangeNodeResponse, ClientError> {
        let request = ChangeNodeRequest { node_id, address: address.to_owned(), remove };
        self.ask(MEMBERS_WAIT, request, |channel, request| async move {
            admin(channel).change_node(request).await
        })
        .await
    }

    /// Makes the next step so that `add` votes in a group and `remove` is no member of it.
    pub async fn change_replica(
        &self,
        group_id: u32,
        add: Option<u64>,
        remove: Option<u64>,
    ) -> Result<ChangeReplicaResponse, ClientError> {
        let (add_node, remove_node) = (add.unwrap_or_default(), remove.unwrap_or_default());
        let request = ChangeReplicaRequest { group_id, add_node, remove_node };
        self.ask(MEMBERS_WAIT, request, |channel, request| async move {
            admin(channel).change_replica(request).await
        })
        .await
    }

    /// Makes the node at `address` build a snapshot of its replica of a group. One try.
    pub async fn trigger_snapshot(
        &self,
        address: &str,
        group_id: u32,
    ) -> Result<TriggerSnapshotResponse, ClientError> {
        let request = TriggerSnapshotRequest { group_id };
        self.ask_node(address, request, |channel, request| async move {
            admin(channel).trigger_snapshot(request).await
        })
        .await
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    /// When a try that starts now ends. `wait` is what the server was asked to wait.
    fn try_deadline(&self, deadline: Instant, wait: Duration) -> Instant {
        deadline.min(Instant::now() + wait + self.options.try_timeout)
    }

    /// A call that may be repeated at will: on one node after the other until one answers or the time runs out.
    async fn ask<Q: Clone, A, F>(
        &self,
        wait: Duration,
        request: Q,
        call: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let deadline = self.deadline();
        let mut address = self.nodes.preferred();
        // What a node said tells more than a node that wasn't reached.
        let mut said = None;
        for tries in 0.. {
            let limit = self.try_deadline(deadline, wait);
            let (place, advice) = match self.once(&address, limit, request.clone(), &call).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Unreached(_)) => (Place::Other, None),
                Err(Failure::Lost(message)) => {
                    said = Some(ClientError::Unavailable { message });
                    (Place::Other, None)
                }
                Err(Failure::Refused { error, retry_after, leader }) => {
                    said = Some(error);
                    (leader.map_or(Place::Other, Place::Leader), retry_after)
                }
            };
            let pause = retry::pause(tries, advice);
            if Instant::now() + pause + retry::TRY_MIN >= deadline {
                return Err(said.unwrap_or_else(|| self.nodes.nobody()));
            }
            address = self.nodes.next(&address, place);
            sleep(pause).await;
        }
        unreachable!("the loop ends with its time")
    }

    /// One try of a call that is meant for one node.
    async fn ask_node<Q, A, F>(
        &self,
        address: &str,
        request: Q,
        call: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let limit = self.try_deadline(self.deadline(), Duration::ZERO);
        match self.once(address, limit, request, call).await {
            Ok(answer) => Ok(answer),
            Err(Failure::Final(error) | Failure::Refused { error, .. }) => Err(error),
            Err(Failure::Lost(message)) => Err(ClientError::Unavailable { message }),
            Err(Failure::Unreached(why)) => {
                let message = format!("no connection to {address} ({why})");
                Err(ClientError::Unavailable { message })
            }
        }
    }

    /// One try. The server is told how long it has; a try without an answer is lost.
    async fn once<Q, A, F>(
        &self,
        address: &str,
        limit: Instant,
        request: Q,
        call: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Failure>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let channel = self.nodes.channel(address).map_err(Failure::Final)?;
        let mut request = Request::new(request);
        request.set_timeout(limit.saturating_duration_since(Instant::now()));
        let end = match timeout_at(limit, call(channel, request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Failure::of_status(&status)),
            Err(_) => Err(Failure::Lost(format!("no answer from {address} in time"))),
        };
        self.nodes.note(address, end.as_ref().err());
        end
    }
}

pub(crate) fn settlement(channel: Channel) -> SettlementClient<Channel> {
    SettlementClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

fn admin(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}
