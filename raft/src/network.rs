//! openraft's network, over the streams between nodes.
//!
//! Appends are pipelined: while earlier ones wait for their answers, later ones are on their way, in order. What says only how far
//! is committed waits a moment for company. Pre-votes are really asked. Every answer has a deadline of ours.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{
    Stream, StreamExt,
    future::{BoxFuture, Either, select},
    stream::BoxStream,
};
use openraft::{
    BasicNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2, Snapshot,
    alias::SnapshotOf,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
        TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout, timeout_at},
};
use verdict_failpoints::failpoint;
use verdict_proto::v1;
use verdict_protocol::ids::GroupId;

use crate::{
    disk::{apart, encode_behind},
    heard::Heard,
    node::Node,
    peer::{self, Answer, Peer, kind},
    snapshot::{Contents, SnapshotFile},
    storage::Storage,
    types::{LogId, Types, Vote},
};

/// Appends to one follower that wait for their answers.
const APPENDS_IN_FLIGHT: usize = 64;
/// So long may it take until followers hear what is committed, if nothing else is to be said. They apply it as much later, and nobody
/// waits for that: it is the leader that answers.
const COMMITTED_WAITS: Duration = Duration::from_millis(10);
/// So long after a snapshot was installed its leader sends the entries behind it, at the latest.
const REPLICATION_GOES_ON_WITHIN: Duration = Duration::from_secs(1);
/// A snapshot travels in pieces of this size.
const SNAPSHOT_CHUNK_BYTES: usize = 512 << 10;

type Error = RPCError<Types>;

/// Makes the ways to the other replicas of a group.
pub(crate) struct Network {
    pub(crate) node: Arc<Node>,
    pub(crate) group: GroupId,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Line;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Line {
        let peer = self.node.peer(target, &node.addr);
        let heard = self.node.heard(self.group);
        Line { node: self.node.clone(), peer, group: self.group.0, target, heard }
    }
}

/// The way to another replica of a group.
pub(crate) struct Line {
    node: Arc<Node>,
    peer: Arc<Peer>,
    group: u32,
    target: u64,
    heard: Arc<Heard>,
}

impl Line {
    /// An append was answered that had been handed in then.
    fn note(&self, term: u64, asked: Instant, reply: &AppendEntriesResponse<Types>) {
        if !matches!(reply, AppendEntriesResponse::HigherVote(_)) {
            self.heard.note(self.target, term, asked);
        }
    }

    /// Asks for a vote, once this node itself may vote.
    async fn ask_for_vote(
        &self,
        kind: u32,
        rpc: &VoteRequest<Types>,
        patience: Duration,
    ) -> Result<VoteResponse<Types>, Error> {
        self.node.gate(GroupId(self.group)).pass(patience).await.map_err(unreachable)?;
        self.call(kind, rpc, patience).await
    }

    async fn call<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        kind: u32,
        request: &Request,
        patience: Duration,
    ) -> Result<Reply, Error> {
        let asked = async {
            let answer = self.peer.request(self.group, kind, encode(request)).await;
            wait(answer, patience).await
        };
        timeout(patience, asked).await.unwrap_or_else(|_| Err(late()))
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.node.config.timing.request_timeout_ms)
    }

    /// Writes the state to a file and sends it. Only to a node that answers: what is written costs as much as reading the whole state.
    async fn give_snapshot(
        &self,
        vote: &Vote,
        Snapshot { meta, snapshot }: SnapshotOf<Types, Contents>,
    ) -> Result<SnapshotResponse<Types>, Error> {
        let stopped = || unreachable("this node stops".to_owned());
        let sending = self.node.endpoint(self.group).ok_or_else(stopped)?.send_snapshot();
        let asked = self.peer.request(self.group, kind::GREET, Vec::new()).await;
        wait_for_body(asked, self.patience()).await?;
        let writing = apart(&self.node.storage, move || snapshot.file(&meta)).await;
        let file = writing
            .map_err(|error| unreachable(error.to_string()))?
            .map_err(|error| unreachable(format!("write a snapshot: {error}")))?;
        let patience = Duration::from_millis(self.node.config.timing.snapshot_timeout_ms);
        let sent = timeout(patience, self.send_file(vote, file)).await;
        let reply = sent.unwrap_or_else(|_| Err(late()))?;
        tokio::spawn(async move {
            sleep(REPLICATION_GOES_ON_WITHIN).await;
            drop(sending);
        });
        Ok(reply)
    }

    async fn send_file(&self, vote: &Vote, file: SnapshotFile) -> Result<SnapshotResponse<Types>, Error> {
        let first = v1::SnapshotChunk {
            hello: Some(self.node.hello(self.peer.id())),
            group: self.group,
            header: encode(vote).into(),
            data: Default::default(),
        };
        let chunks = chunks(self.group, first, file, self.node.storage.clone());
        let mut client = peer::client(&self.node, self.peer.address()).map_err(unreachable)?;
        // Named: the compiler can't see through an opaque future that holds a stream.
        let sent: BoxFuture<'_, Result<_, tonic::Status>> = Box::pin(client.snapshot(chunks));
        let reply = sent.await.map_err(|status| {
            peer::heed(&self.node, &status);
            unreachable(status.to_string())
        })?;
        decode(&reply.into_inner().body)
    }
}

/// The file in pieces. One that can't be read ends the stream early; the other side finds the file cut.
fn chunks(
    group: u32,
    first: v1::SnapshotChunk,
    file: SnapshotFile,
    storage: Arc<dyn Storage>,
) -> BoxStream<'static, v1::SnapshotChunk> {
    let pieces = futures::stream::unfold(0, move |offset| {
        if offset > 0 {
            failpoint!(SNAPSHOT_SENDING, group);
        }
        let file = file.clone();
        let reading = apart(&storage, move || file.read_at(offset, SNAPSHOT_CHUNK_BYTES));
        async move {
            let data = reading.await.ok()?.ok().filter(|data| !data.is_empty())?;
            let next = offset + data.len() as u64;
            Some((v1::SnapshotChunk { data: data.into(), ..Default::default() }, next))
        }
    });
    futures::stream::once(std::future::ready(first)).chain(pieces).boxed()
}

impl RaftNetworkV2<Types> for Line {
    type SnapshotData = Contents;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, Error> {
        let (term, asked) = (rpc.vote.leader_id.term, Instant::now());
        let reply = self.call(kind::APPEND, &rpc, self.patience()).await?;
        self.note(term, asked, &reply);
        Ok(reply)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Types>, Error>>, Error>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let (line, patience): (&'s Line, Duration) = (self, self.patience());
        // Requests are handed in one after the other, so they keep their order; only the answers are waited for together.
        let asked = with_company(input).then(move |request| async move {
            let (prev, last) = range(&request);
            let at = (request.vote.leader_id.term, Instant::now());
            let answer = line.peer.request(line.group, kind::APPEND, encode(&request)).await;
            (answer, at, prev, last)
        });
        let answered = asked.map(move |(answer, (term, at), prev, last)| async move {
            let reply = wait::<AppendEntriesResponse<Types>>(answer, patience).await?;
            line.note(term, at, &reply);
            Ok((reply.into_stream_result(prev, last), last))
        });
        // After a refusal or a failure the rest makes no sense: the stream ends, and openraft begins another.
        let results = answered.buffered(APPENDS_IN_FLIGHT).scan(true, |go_on, item: Result<_, Error>| {
            if !*go_on {
                return std::future::ready(None);
            }
            let item = item.map(|(result, last)| {
                *go_on = matches!(&result, Ok(reached) if *reached == last);
                result
            });
            *go_on &= item.is_ok();
            std::future::ready(Some(item))
        });
        let results: BoxStream<'s, _> = Box::pin(results);
        Box::pin(std::future::ready(Ok(results)))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, Error> {
        self.ask_for_vote(kind::VOTE, &rpc, option.soft_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, Error> {
        self.ask_for_vote(kind::PRE_VOTE, &rpc, option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types, Contents>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let given = self.give_snapshot(&vote, snapshot);
        match select(Box::pin(given), Box::pin(cancel)).await {
            Either::Left((reply, _)) => Ok(reply?),
            Either::Right((closed, _)) => Err(closed.into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, Error> {
        self.call(kind::TRANSFER, &request, option.soft_ttl()).await
    }
}

/// Holds back requests without entries: they say only how far is committed, and so does whatever comes next. Of three entries that make a
/// batch, each would be followed by one to each follower.
fn with_company<S>(input: S) -> BoxStream<'static, AppendEntriesRequest<Types>>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
{
    let requests = futures::stream::unfold(input.fuse(), |mut input| async move {
        let mut request = input.next().await?;
        let until = Instant::now() + COMMITTED_WAITS;
        while request.entries.is_empty() {
            match timeout_at(until, input.next()).await {
                Ok(Some(later)) => request = later,
                Ok(None) | Err(_) => break,
            }
        }
        Some((request, input))
    });
    requests.boxed()
}

fn range(request: &AppendEntriesRequest<Types>) -> (Option<LogId>, Option<LogId>) {
    let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
    (request.prev_log_id, last)
}

async fn wait<Reply: DeserializeOwned>(
    answer: oneshot::Receiver<Answer>,
    patience: Duration,
) -> Result<Reply, Error> {
    decode(&wait_for_body(answer, patience).await?)
}

async fn wait_for_body(answer: oneshot::Receiver<Answer>, patience: Duration) -> Result<Bytes, Error> {
    match timeout(patience, answer).await {
        Ok(Ok(Answer::Reply(body))) => Ok(body),
        Ok(Ok(Answer::Error(why))) => Err(NetworkError::from_string(why).into()),
        Ok(Err(_)) => Err(unreachable("no connection".to_owned())),
        Err(_) => Err(late()),
    }
}

fn late() -> Error {
    NetworkError::from_string("no answer in time").into()
}

fn unreachable(why: String) -> Error {
    Unreachable::from_string(why).into()
}

/// The bodies of messages are in postcard's format.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    encode_behind(0, value)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    postcard::from_bytes(bytes).map_err(|error| NetworkError::from_string(format!("decode: {error}")).into())
}

#[cfg(test)]
mod tests {
    use openraft::{EntryPayload, entry::RaftEntry as _};

    use super::*;
    use crate::types::Entry;

    fn request(committed: u64, entry: Option<u64>) -> AppendEntriesRequest<Types> {
        let id = |index| openraft::testing::log_id::<Types>(1, 1, index);
        let entries = entry.map(|index| Entry::new(id(index), EntryPayload::Blank)).into_iter().collect();
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: None,
            entries,
            leader_commit: Some(id(committed)),
        }
    }

    /// Decision 0034: nothing that has entries waits, what has none is dropped for what comes next, and the last one is told.
    #[tokio::test]
    async fn the_committed_index_waits_for_company_and_is_told_in_the_end() {
        let requests =
            [request(1, Some(1)), request(2, None), request(3, None), request(3, Some(4)), request(5, None)];
        let open = futures::stream::iter(requests).chain(futures::stream::pending());
        let told = with_company(open)
            .map(|request| (request.leader_commit.map(|id| id.index), request.entries.len()));
        let told: Vec<_> =
            timeout(Duration::from_secs(30), told.take(3).collect()).await.expect("it is told");
        assert_eq!(told, [(Some(1), 1), (Some(3), 1), (Some(5), 0)]);
    }
}
