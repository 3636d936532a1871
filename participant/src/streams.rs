//! The open streams of coordinators, and what goes out on them.

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{mpsc, watch};
use tonic::Status;
use verdict_proto::v1;
use verdict_raft::counters::MESSAGES_SENT;

/// What the transport takes messages from.
pub type Outgoing = Pin<Box<dyn futures::Stream<Item = Result<v1::ParticipantMessage, Status>> + Send>>;

/// How a stream ends: in order, or with an error for the coordinator.
type End = Result<(), Status>;

/// The sending end of one stream. A cheap handle.
#[derive(Clone)]
pub struct StreamHandle {
    /// Grows with each stream that is opened.
    serial: u64,
    queue: mpsc::Sender<v1::ParticipantMessage>,
    end: watch::Sender<Option<End>>,
}

impl fmt::Debug for StreamHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {}", self.serial)
    }
}

impl StreamHandle {
    /// The stream's place in the order in which streams were opened.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Queues a message. If there is no room, the coordinator doesn't read: the stream is ended, and whatever was on its way is
    /// sent again on the next one.
    pub fn send(&self, message: v1::ParticipantMessage) {
        match self.queue.try_send(message) {
            Ok(()) => MESSAGES_SENT.count(),
            Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.end(Err(Status::resource_exhausted("the answers are not read: connect again")));
            }
        }
    }

    /// Queues messages that must come in this order.
    pub fn send_all(&self, messages: impl IntoIterator<Item = v1::ParticipantMessage>) {
        for message in messages {
            if self.is_ended() {
                return;
            }
            self.send(message);
        }
    }

    /// Ends the stream. The first end stands.
    pub fn end(&self, end: End) {
        self.end.send_if_modified(|standing| {
            let first = standing.is_none();
            if first {
                // UNAVAILABLE: this node stops, which is nothing to act upon.
                if let Err(status) = &end
                    && status.code() != tonic::Code::Unavailable
                {
                    tracing::warn!(stream = self.serial, %status, "end the stream of a coordinator");
                }
                *standing = Some(end);
            }
            first
        });
    }

    fn is_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Waits until the stream is ended by either side.
    pub async fn closed(&self) {
        let mut end = self.end.subscribe();
        tokio::select! {
            () = self.queue.closed() => {}
            _ = end.wait_for(Option::is_some) => {}
        }
    }
}

/// All open streams of a node.
#[derive(Debug)]
pub struct Streams {
    open: Mutex<BTreeMap<u64, StreamHandle>>,
    opened: AtomicU64,
    streams_max: usize,
    outgoing_max: usize,
}

impl Streams {
    /// None are open.
    pub fn new(streams_max: usize, outgoing_max: usize) -> Streams {
        Streams { open: Mutex::default(), opened: AtomicU64::new(0), streams_max, outgoing_max }
    }

    /// Opens a stream: the handle to send by, and what the transport takes. The caller closes it by [`Streams::close`].
    pub fn open(&self) -> Result<(StreamHandle, Outgoing), Status> {
        let mut open = self.lock();
        if open.len() >= self.streams_max {
            return Err(Status::resource_exhausted(format!("{} streams are open already", open.len())));
        }
        let serial = 1 + self.opened.fetch_add(1, Ordering::Relaxed);
        let (queue, queued) = mpsc::channel(self.outgoing_max);
        let (end, ended) = watch::channel(None);
        let handle = StreamHandle { serial, queue, end };
        open.insert(serial, handle.clone());
        Ok((handle, outgoing(queued, ended)))
    }

    /// Forgets a stream.
    pub fn close(&self, handle: &StreamHandle) {
        self.lock().remove(&handle.serial);
    }

    /// Queues a message on every open stream.
    pub fn send_to_all(&self, message: &v1::ParticipantMessage) {
        for handle in self.lock().values() {
            handle.send(message.clone());
        }
    }

    /// Ends every open stream.
    pub fn end_all(&self, status: &Status) {
        for handle in self.lock().values() {
            handle.end(Err(status.clone()));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, StreamHandle>> {
        self.open.lock().expect("nothing panics while it holds this lock")
    }
}

fn outgoing(queued: mpsc::Receiver<v1::ParticipantMessage>, ended: watch::Receiver<Option<End>>) -> Outgoing {
    let stream = futures::stream::unfold(Some((queued, ended)), |state| async {
        let (mut queued, mut ended) = state?;
        let end = async {
            let end = ended.wait_for(Option::is_some).await;
            // Nobody is left who could send.
            end.map_or(Ok(()), |end| end.clone().unwrap_or(Ok(())))
        };
        tokio::select! {
            biased;
            end = end => end.err().map(|status| (Err(status), None)),
            message = queued.recv() => message.map(|message| (Ok(message), Some((queued, ended)))),
        }
    });
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tonic::Code;

    use super::*;

    fn message(shard: u32) -> v1::ParticipantMessage {
        v1::ParticipantMessage { shard, ..Default::default() }
    }

    #[tokio::test]
    async fn a_stream_that_is_not_read_is_ended() {
        let streams = Streams::new(1, 2);
        let (handle, mut outgoing) = streams.open().unwrap();
        assert_eq!(streams.open().err().unwrap().code(), Code::ResourceExhausted);
        handle.send(message(1));
        assert_eq!(outgoing.next().await.unwrap().unwrap(), message(1));
        handle.send_all([message(2), message(3), message(4), message(5)]);
        handle.closed().await;
        assert_eq!(outgoing.next().await.unwrap().unwrap_err().code(), Code::ResourceExhausted);
        assert!(outgoing.next().await.is_none());
        streams.close(&handle);
        assert!(streams.open().is_ok(), "there is room again");
    }

    #[tokio::test]
    async fn a_stream_ends_in_order_and_only_once() {
        let streams = Streams::new(8, 8);
        let (handle, mut outgoing) = streams.open().unwrap();
        handle.end(Ok(()));
        streams.end_all(&Status::unavailable("too late"));
        assert!(outgoing.next().await.is_none());
        drop(outgoing);
        handle.send(message(1));
    }
}
