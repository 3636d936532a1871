//! Answers what other nodes send.
//!
//! Invariants:
//! - Nobody is heard before its greeting was checked.
//! - The appends of a connection reach each group in the order in which they came, and are answered as they are done.
//! - What is being worked on is bounded; beyond that the connection isn't read.

use std::{pin::Pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use futures::{
    StreamExt,
    future::{BoxFuture, poll_fn},
    stream::FuturesUnordered,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use verdict_failpoints::failpoint;
use verdict_proto::v1::{self, raft_server};
use verdict_protocol::ids::{GroupId, NodeId};

use crate::{
    counters::MESSAGES_SENT,
    disk::apart,
    node::{Endpoint, Node, Refusal, stopping},
    peer::{FRAME_MESSAGES, FRAMES, kind},
    snapshot::{self, SnapshotFile},
    standing::Start,
    storage::{Open, Storage},
};

/// Requests of one connection that are being worked on.
const REQUESTS_MAX: usize = 4096;

/// Serves the other nodes' messages. Made by [`crate::Host::service`].
#[derive(Clone)]
pub struct Service {
    node: Arc<Node>,
}

impl Service {
    pub(crate) fn new(node: Arc<Node>) -> Service {
        Service { node }
    }

    async fn greeted(&self, hello: Option<v1::Hello>) -> Result<(NodeId, Start), Status> {
        let hello = hello.ok_or_else(|| Status::invalid_argument("the first message says who speaks"))?;
        match self.node.check_hello(&hello).await {
            Ok(start) => Ok((NodeId(hello.node), start)),
            Err(Refusal::Stranger(why)) => Err(Status::permission_denied(why)),
            Err(Refusal::OtherDisk(why) | Refusal::Removed(why)) => Err(Status::failed_precondition(why)),
            Err(Refusal::Stopped(why)) => Err(Status::unavailable(why)),
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.node.config.timing.request_timeout_ms)
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<v1::RaftFrame, Status>> + Send>>;

#[tonic::async_trait]
impl raft_server::Raft for Service {
    type ExchangeStream = Frames;

    async fn exchange(&self, request: Request<Streaming<v1::RaftFrame>>) -> Result<Response<Frames>, Status> {
        let mut incoming = request.into_inner();
        let first = timeout(self.patience(), incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no greeting"))??.unwrap_or_default();
        let (from, start) = self.greeted(first.hello).await?;
        let (outgoing, frames) = mpsc::channel(FRAMES);
        let greeting = self.node.frame(Some(self.node.hello(from.0)), Vec::new());
        outgoing.send(Ok(greeting)).await.map_err(|_| Status::cancelled("closed"))?;
        let conversation =
            Conversation { node: self.node.clone(), from, start, working: FuturesUnordered::new() };
        let (node, stop) = (self.node.clone(), stopping(self.node.stop.subscribe()));
        tokio::spawn(async move {
            tokio::select! {
                () = stop => {}
                () = conversation.run(incoming, outgoing) => lost(&node, from).await,
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<v1::SnapshotChunk>>,
    ) -> Result<Response<v1::SnapshotReply>, Status> {
        let mut incoming = request.into_inner();
        let first = timeout(self.patience(), incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no greeting"))??.unwrap_or_default();
        self.greeted(first.hello).await?;
        let endpoint =
            self.node.endpoint(first.group).ok_or_else(|| Status::not_found(no_group(first.group)))?;
        let (path, storage) = (endpoint.temporary(), &self.node.storage);
        let received = receive(&mut incoming, storage, &path, first.group, self.patience()).await;
        let installed = match received {
            Ok(file) => endpoint.install(first.header, file).await.map_err(Status::aborted),
            Err(status) => Err(status),
        };
        // Installed, all of it is in the state; else it is of no use. At the next start it would be removed, too.
        let _ = storage.remove(&path);
        Ok(Response::new(v1::SnapshotReply { body: installed?.into() }))
    }
}

fn no_group(group: u32) -> String {
    format!("no replica of group {group} here")
}

/// Somebody's connection broke: perhaps the node is gone. Groups that it leads needn't wait for its lease to end.
async fn lost(node: &Node, from: NodeId) {
    for endpoint in node.all_endpoints() {
        endpoint.lost(from).await;
    }
}

/// Writes what comes into a file, and checks the whole of it.
async fn receive(
    incoming: &mut Streaming<v1::SnapshotChunk>,
    storage: &Arc<dyn Storage>,
    path: &std::path::Path,
    group: u32,
    patience: Duration,
) -> Result<SnapshotFile, Status> {
    let failed = |error: std::io::Error| Status::internal(format!("receive a snapshot: {error}"));
    let file = storage.open(path, Open::Empty).map_err(failed)?;
    let mut written = 0;
    loop {
        let chunk = timeout(patience, incoming.message()).await;
        match chunk.map_err(|_| Status::deadline_exceeded("the snapshot doesn't go on"))?? {
            Some(chunk) => {
                let (file, offset) = (file.clone(), written);
                written += chunk.data.len() as u64;
                let writing = apart(storage, move || file.write_all_at(&chunk.data, offset));
                writing.await.map_err(|error| Status::internal(error.to_string()))?.map_err(failed)?;
                failpoint!(SNAPSHOT_RECEIVING, group);
            }
            None => break,
        }
    }
    let checked = apart(storage, move || snapshot::received(file, GroupId(group)));
    checked.await.map_err(|error| Status::internal(error.to_string()))?.map_err(failed)
}

struct Conversation {
    node: Arc<Node>,
    from: NodeId,
    start: Start,
    working: FuturesUnordered<BoxFuture<'static, v1::RaftMessage>>,
}

impl Conversation {
    async fn run(
        mut self,
        mut incoming: Streaming<v1::RaftFrame>,
        outgoing: mpsc::Sender<Result<v1::RaftFrame, Status>>,
    ) {
        let mut replies = Vec::new();
        loop {
            tokio::select! {
                // Answers first: they make room.
                biased;
                room = outgoing.reserve(), if !replies.is_empty() => {
                    let Ok(room) = room else { return };
                    let rest = replies.split_off(replies.len().min(FRAME_MESSAGES));
                    let messages = std::mem::replace(&mut replies, rest);
                    room.send(Ok(self.node.frame(None, messages)));
                    MESSAGES_SENT.count();
                }
                Some(reply) = self.working.next(), if replies.len() < REQUESTS_MAX => {
                    replies.push(reply);
                    self.take_done(&mut replies).await;
                }
                frame = incoming.message(), if self.working.len() < REQUESTS_MAX => {
                    let Ok(Some(frame)) = frame else { return };
                    self.node.standings.heard(self.from.0, self.start, frame.promises);
                    for message in frame.messages {
                        self.begin(message, &mut replies).await;
                    }
                }
            }
        }
    }

    /// Puts a request in line. Polling it once is what puts it there.
    async fn begin(&mut self, message: v1::RaftMessage, replies: &mut Vec<v1::RaftMessage>) {
        let endpoint = self.node.endpoint(message.group);
        let mut work = answer(endpoint, message);
        let polled = poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await;
        match polled {
            Poll::Ready(reply) => replies.push(reply),
            Poll::Pending => self.working.push(work),
        }
    }

    /// Takes what else is done, without waiting.
    async fn take_done(&mut self, replies: &mut Vec<v1::RaftMessage>) {
        poll_fn(|context| {
            while let Poll::Ready(Some(reply)) = self.working.poll_next_unpin(context) {
                replies.push(reply);
            }
            Poll::Ready(())
        })
        .await;
    }
}

fn answer(
    endpoint: Option<Arc<dyn Endpoint>>,
    message: v1::RaftMessage,
) -> BoxFuture<'static, v1::RaftMessage> {
    let v1::RaftMessage { group, request, kind: asked, body } = message;
    Box::pin(async move {
        let outcome = match endpoint {
            // The greeting that came before it has said all.
            _ if asked == kind::GREET => Ok(Vec::new()),
            Some(endpoint) => endpoint.handle(asked, body).await,
            None => Err(no_group(group)),
        };
        let (kind, body) = match outcome {
            Ok(body) => (kind::REPLY, Bytes::from(body)),
            Err(why) => (kind::ERROR, Bytes::from(why)),
        };
        v1::RaftMessage { group, request, kind, body }
    })
}
