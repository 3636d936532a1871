//! The way to one other node: one stream for the requests of all groups.
//!
//! Everything that waits travels in one frame. Requests are paired with replies by number; a request whose connection breaks
//! is answered "unreachable" at once, and openraft asks again.
//!
//! Invariants:
//! - Requests leave in the order in which they were handed in.
//! - Nothing is sent before the other side has greeted, with the incarnation that is known of it.
//! - The queue is bounded, every answer has a deadline, and a silent connection is given up.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};
use verdict_proto::v1::{self, raft_client::RaftClient};

use crate::{
    counters::MESSAGES_SENT,
    node::{Node, Refusal, stopping},
    standing::Start,
};

/// Kinds of messages.
pub(crate) mod kind {
    pub(crate) const APPEND: u32 = 1;
    pub(crate) const VOTE: u32 = 2;
    pub(crate) const PRE_VOTE: u32 = 3;
    pub(crate) const TRANSFER: u32 = 4;
    /// Asks for nothing but the greeting that comes before it.
    pub(crate) const GREET: u32 = 5;
    /// The answer to any of them.
    pub(crate) const REPLY: u32 = 64;
    /// The request couldn't be answered; the body says why.
    pub(crate) const ERROR: u32 = 65;
}

/// A frame is closed at this size.
pub(crate) const FRAME_BYTES: usize = 1 << 20;
pub(crate) const FRAME_MESSAGES: usize = 1024;
/// The largest frame that is taken: one message more than fits, and that one may hold a single large entry.
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 << 20;
/// Frames on their way into the connection.
pub(crate) const FRAMES: usize = 4;
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Answer {
    Reply(Bytes),
    Error(String),
}

struct Request {
    group: u32,
    kind: u32,
    body: Vec<u8>,
    answer: oneshot::Sender<Answer>,
}

/// The way to one other node.
#[derive(Debug)]
pub(crate) struct Peer {
    id: u64,
    address: String,
    queue: mpsc::Sender<Request>,
}

impl Peer {
    pub(crate) fn start(node: Arc<Node>, id: u64, address: &str) -> Arc<Peer> {
        let (queue, requests) = mpsc::channel(node.config.limits.peer_queue);
        let peer = Arc::new(Peer { id, address: address.to_owned(), queue });
        let task =
            Task { node: Arc::downgrade(&node), id, address: address.to_owned(), requests, next_request: 0 };
        tokio::spawn(task.run(stopping(node.stop.subscribe())));
        peer
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Hands a request in; waits while the queue is full. The receiver fails if the connection does.
    pub(crate) async fn request(&self, group: u32, kind: u32, body: Vec<u8>) -> oneshot::Receiver<Answer> {
        let (answer, receiver) = oneshot::channel();
        // If the peer's task has ended, the request is dropped, and with it the sender of the answer.
        let _ = self.queue.send(Request { group, kind, body, answer }).await;
        receiver
    }
}

/// A client of the other node's service over a fresh connection.
pub(crate) fn client(node: &Node, address: &str) -> Result<RaftClient<Channel>, String> {
    let channel = node.connect.channel(address).map_err(|error| format!("address {address}: {error}"))?;
    let client = RaftClient::new(channel);
    Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
}

/// An answer that says this node was refused because of its disk ends this node.
pub(crate) fn heed(node: &Node, status: &tonic::Status) {
    if status.code() == Code::FailedPrecondition {
        node.fatal.raise(status.message());
    }
}

struct Task {
    node: Weak<Node>,
    id: u64,
    address: String,
    requests: mpsc::Receiver<Request>,
    next_request: u64,
}

impl Task {
    async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = stop => {}
            () = self.keep_connected() => {}
        }
    }

    async fn keep_connected(&mut self) {
        let mut backoff = BACKOFF_MIN;
        // A connection is opened when there is something to say.
        while let Some(first) = self.requests.recv().await {
            let Some(node) = self.node.upgrade() else { return };
            let begun = Instant::now();
            let error = self.session(&node, first).await;
            drop(node);
            tracing::debug!(peer = self.id, address = self.address, error, "connection ended");
            if begun.elapsed() > BACKOFF_MAX {
                backoff = BACKOFF_MIN;
            }
            self.fail_until(Instant::now() + backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Fails what arrives, until it is time to try again.
    async fn fail_until(&mut self, until: Instant) {
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                request = self.requests.recv() => if request.is_none() { return },
            }
        }
    }

    /// Talks until the connection breaks, and says why.
    async fn session(&mut self, node: &Arc<Node>, first: Request) -> String {
        let patience = Duration::from_millis(node.config.timing.request_timeout_ms);
        let (frames, outgoing) = mpsc::channel(FRAMES);
        let opened = timeout(patience, open(node, self.id, &self.address, &frames, outgoing)).await;
        let (incoming, start) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return error,
            Err(_) => return "nobody answers".to_owned(),
        };
        node.accept(self.id);
        let pending = Pending::default();
        let id = self.id;
        let heard = |promises| node.standings.heard(id, start, promises);
        tokio::select! {
            error = read_replies(incoming, &pending, patience, heard) => error,
            error = self.write_requests(node, first, frames, &pending) => error,
        }
    }

    async fn write_requests(
        &mut self,
        node: &Node,
        first: Request,
        frames: mpsc::Sender<v1::RaftFrame>,
        pending: &Pending,
    ) -> String {
        let mut next = Some(first);
        loop {
            let Some(request) = next.take() else { return "nobody needs it any more".to_owned() };
            // Room first: while the connection is busy, the frame grows.
            let Ok(room) = frames.reserve().await else { return "closed".to_owned() };
            let mut frame = node.frame(None, Vec::new());
            let mut bytes = self.add(&mut frame, request, pending);
            while bytes < FRAME_BYTES && frame.messages.len() < FRAME_MESSAGES {
                match self.requests.try_recv() {
                    Ok(request) => bytes += self.add(&mut frame, request, pending),
                    Err(_) => break,
                }
            }
            room.send(frame);
            MESSAGES_SENT.count();
            next = self.requests.recv().await;
        }
    }

    fn add(&mut self, frame: &mut v1::RaftFrame, request: Request, pending: &Pending) -> usize {
        let bytes = request.body.len();
        self.next_request += 1;
        pending.insert(self.next_request, request.answer);
        frame.messages.push(v1::RaftMessage {
            group: request.group,
            request: self.next_request,
            kind: request.kind,
            body: request.body.into(),
        });
        bytes
    }
}

async fn open(
    node: &Node,
    id: u64,
    address: &str,
    frames: &mpsc::Sender<v1::RaftFrame>,
    outgoing: mpsc::Receiver<v1::RaftFrame>,
) -> Result<(Streaming<v1::RaftFrame>, Start), String> {
    let greeting = node.frame(Some(node.hello(id)), Vec::new());
    frames.send(greeting).await.map_err(|_| "closed".to_owned())?;
    let mut client = client(node, address)?;
    let opened = client.exchange(ReceiverStream::new(outgoing)).await;
    let mut incoming = opened.map_err(|status| told(node, id, &status))?.into_inner();
    let greeting = incoming.message().await.map_err(|status| told(node, id, &status))?;
    let hello = greeting.and_then(|frame| frame.hello).ok_or("the other side didn't greet")?;
    if hello.node != id {
        return Err(format!("node {} answers where node {id} was expected", hello.node));
    }
    match node.check_hello(&hello).await {
        Ok(start) => Ok((incoming, start)),
        Err(
            Refusal::Stranger(why) | Refusal::OtherDisk(why) | Refusal::Removed(why) | Refusal::Stopped(why),
        ) => {
            tracing::warn!(peer = id, why, "not talking to a node");
            Err(why)
        }
    }
}

fn told(node: &Node, id: u64, status: &tonic::Status) -> String {
    heed(node, status);
    if status.code() == Code::PermissionDenied {
        tracing::warn!(peer = id, why = status.message(), "refused by a node");
    }
    status.to_string()
}

async fn read_replies(
    mut incoming: Streaming<v1::RaftFrame>,
    pending: &Pending,
    patience: Duration,
    heard: impl Fn(u64),
) -> String {
    loop {
        let frame = match timeout(patience / 2, incoming.message()).await {
            Err(_) if pending.waits_longer_than(patience) => return "no answer in time".to_owned(),
            Err(_) => continue,
            Ok(Err(status)) => return status.to_string(),
            Ok(Ok(None)) => return "the other side ended the stream".to_owned(),
            Ok(Ok(Some(frame))) => frame,
        };
        heard(frame.promises);
        for message in frame.messages {
            if let Some(answer) = pending.remove(message.request) {
                let outcome = match message.kind {
                    kind::REPLY => Answer::Reply(message.body),
                    _ => Answer::Error(String::from_utf8_lossy(&message.body).into_owned()),
                };
                // Whoever asked may have given up.
                let _ = answer.send(outcome);
            }
        }
    }
}

/// Requests that wait for their answers, by number.
#[derive(Default)]
struct Pending {
    requests: Mutex<BTreeMap<u64, (Instant, oneshot::Sender<Answer>)>>,
}

impl Pending {
    fn insert(&self, request: u64, answer: oneshot::Sender<Answer>) {
        self.lock().insert(request, (Instant::now(), answer));
    }

    fn remove(&self, request: u64) -> Option<oneshot::Sender<Answer>> {
        self.lock().remove(&request).map(|(_, answer)| answer)
    }

    fn waits_longer_than(&self, patience: Duration) -> bool {
        self.lock().first_key_value().is_some_and(|(_, (since, _))| since.elapsed() > patience)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (Instant, oneshot::Sender<Answer>)>> {
        self.requests.lock().expect("nothing panics while it holds this lock")
    }
}
