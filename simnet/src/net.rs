//! The simulated network: turmoil's TCP under the same gRPC as in the product.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::Stream;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};
use verdict_proto::connect::{Connect, endpoint};

use crate::trace;

/// Opens connections from wherever it is called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SimulatedTcp;

impl Connect for SimulatedTcp {
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let target = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let target = target.clone();
            async move { TcpStream::connect(target).await.map(|stream| TokioIo::new(Wire::new(stream))) }
        });
        Ok(endpoint(address)?.connect_with_connector_lazy(connector))
    }
}

/// The connections that come in.
pub(crate) fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Wire>> + Send + 'static {
    futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Wire::new(stream));
        Some((accepted, listener))
    })
}

/// A connection whose bytes are part of the trace.
pub(crate) struct Wire {
    stream: TcpStream,
    from: String,
    to: String,
}

impl Wire {
    fn new(stream: TcpStream) -> Wire {
        let name = |address: io::Result<std::net::SocketAddr>| {
            address.map(|address| address.to_string()).unwrap_or_default()
        };
        let (from, to) = (name(stream.local_addr()), name(stream.peer_addr()));
        Wire { stream, from, to }
    }
}

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        trace::sent(&self.from, &self.to, &bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
