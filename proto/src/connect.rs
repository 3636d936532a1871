//! How a node reaches another: over TCP, or inside one process without any socket.
//!
//! Everything that nodes say to each other is gRPC over some byte stream; this module is the one place that knows which. A
//! simulated network is another implementation of [`Connect`].

use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tonic::transport::{Channel, Endpoint, Uri};

/// Opens channels to nodes. A channel connects when it is first used, and again after it was lost.
pub trait Connect: fmt::Debug + Send + Sync + 'static {
    /// A channel to the node that listens at `address` (`host:port`). An error means that the address is malformed.
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error>;
}

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// A peer that is silent for the interval is asked for a sign of life, and is given up after the timeout.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 flow control windows: large enough that a stream is never held up by a round trip.
const WINDOW_BYTES: u32 = 16 << 20;
/// Capacity of each direction of a connection inside a process, in bytes.
const DUPLEX_BYTES: usize = 256 << 10;
/// Connections that wait to be accepted inside a process.
const BACKLOG: usize = 64;

/// What all connections to a node have in common, whatever carries them.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}

/// TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Connect for Tcp {
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        Ok(endpoint(address)?.connect_lazy())
    }
}

/// TCP, from a chosen address of this machine.
#[derive(Clone, Copy, Debug)]
pub struct TcpFrom(pub IpAddr);

impl Connect for TcpFrom {
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        Ok(endpoint(address)?.local_address(Some(self.0)).connect_lazy())
    }
}

type Listeners = BTreeMap<String, mpsc::Sender<io::Result<DuplexStream>>>;

/// Connections inside one process: no socket is opened.
#[derive(Clone, Debug, Default)]
pub struct InProcess {
    listeners: Arc<Mutex<Listeners>>,
}

impl InProcess {
    /// Listens at `address`, any unique text of the form `name:number`. A later listener at the same address replaces the
    /// earlier one. Dropping the receiver ends the listening.
    pub fn listen(&self, address: &str) -> mpsc::Receiver<io::Result<DuplexStream>> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        self.lock().insert(address.to_owned(), sender);
        receiver
    }

    async fn connect(self, address: String) -> io::Result<TokioIo<DuplexStream>> {
        let refused =
            || io::Error::new(io::ErrorKind::ConnectionRefused, format!("nobody listens at {address}"));
        let listener = self.lock().get(&address).cloned().ok_or_else(refused)?;
        let (ours, theirs) = tokio::io::duplex(DUPLEX_BYTES);
        listener.send(Ok(theirs)).await.map_err(|_| refused())?;
        Ok(TokioIo::new(ours))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Listeners> {
        self.listeners.lock().expect("nothing panics while it holds this lock")
    }
}

impl Connect for InProcess {
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let (network, target) = (self.clone(), address.to_owned());
        let connector = tower::service_fn(move |_: Uri| network.clone().connect(target.clone()));
        Ok(endpoint(address)?.connect_with_connector_lazy(connector))
    }
}
