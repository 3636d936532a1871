//! The receiving end of streams: understands what comes in, and passes it to the shards.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};
use verdict_proto::{
    convert::{ToldShard, not_leader_to_wire, to_shard_from_wire},
    v1::{self, participant_server},
};
use verdict_protocol::ids::ShardId;

use crate::{
    Hosted, Shared,
    check::{check_message, check_read},
    driver::Arrived,
    reads::ArrivedRead,
    streams::{Outgoing, StreamHandle},
};

/// Serves the streams of coordinators.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(crate) fn new(shared: Arc<Shared>) -> Service {
        Service { shared }
    }

    /// Takes messages until the stream ends.
    async fn listen(self, mut incoming: Streaming<v1::CoordinatorMessage>, stream: StreamHandle) {
        let end = loop {
            let message = tokio::select! {
                message = incoming.message() => message,
                () = stream.closed() => break Ok(()),
                () = self.shared.stop.cancelled() => break Err(Status::unavailable("the node is stopping")),
            };
            match message {
                Ok(Some(message)) => {
                    if let Err(status) = self.take(&stream, message) {
                        break Err(status);
                    }
                }
                Ok(None) => break Ok(()),
                Err(status) => {
                    tracing::debug!(?stream, %status, "the stream of a coordinator broke");
                    break Ok(());
                }
            }
        };
        stream.end(end);
        self.shared.streams.close(&stream);
    }

    /// Passes one message on. An error ends the stream.
    fn take(&self, stream: &StreamHandle, message: v1::CoordinatorMessage) -> Result<(), Status> {
        let (shard, bytes) = (ShardId(message.shard), message.encoded_len());
        let Some(hosted) = self.shared.shards.get(&shard) else {
            self.warn(&format!("a coordinator asks for shard {shard}, which has no replica here"));
            stream.send(not_leader_to_wire(shard, None));
            return Ok(());
        };
        let malformed =
            |error| Status::invalid_argument(format!("a message for shard {shard} is malformed: {error}"));
        let ToldShard { shard, message, reads } = to_shard_from_wire(message).map_err(malformed)?;
        let placement = self.shared.config.placement;
        check_message(placement, shard, &message)?;
        for (_, read) in &reads {
            check_read(placement, shard, read)?;
        }
        let coordinator = message.coordinator;
        if !message.is_empty() {
            self.pass_message(shard, hosted, stream, message, bytes);
        }
        for (request, read) in reads {
            let read = ArrivedRead { stream: stream.clone(), coordinator, request, read };
            if hosted.reads.try_send(read).is_err() {
                self.warn(&format!("shard {shard} has too many reads waiting: one is dropped"));
            }
        }
        Ok(())
    }

    /// Puts a message into the shard's queue if there is room. If not, it is as if it had been lost on its way.
    fn pass_message(
        &self,
        shard: ShardId,
        hosted: &Hosted,
        stream: &StreamHandle,
        message: verdict_protocol::messages::ToShard,
        bytes: usize,
    ) {
        // A message larger than everything that may wait goes alone.
        let units = bytes.min(self.shared.config.limits.message_bytes_max);
        let room = hosted.bytes.clone().try_acquire_many_owned(u32::try_from(units).unwrap_or(u32::MAX));
        let queued = room.ok().and_then(|room| {
            let arrived = Arrived { stream: stream.clone(), message, bytes, room };
            hosted.messages.try_send(arrived).ok()
        });
        if queued.is_none() {
            self.warn(&format!(
                "shard {shard} has too many messages waiting: one is dropped, to be sent again"
            ));
        }
    }

    fn warn(&self, text: &str) {
        if self.shared.warnings.admits(text) {
            tracing::warn!("{text}");
        }
    }
}

#[tonic::async_trait]
impl participant_server::Participant for Service {
    type ExchangeStream = Outgoing;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::CoordinatorMessage>>,
    ) -> Result<Response<Outgoing>, Status> {
        if self.shared.stop.is_cancelled() {
            return Err(Status::unavailable("the node is stopping"));
        }
        let (stream, outgoing) = self.shared.streams.open()?;
        tokio::spawn(self.clone().listen(request.into_inner(), stream));
        Ok(Response::new(outgoing))
    }
}
