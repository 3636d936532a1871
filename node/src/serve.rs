//! The gRPC servers of a node: one for everything, one for clients alone.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tonic::{
    Status,
    body::Body,
    codegen::http::Response,
    service::Routes,
    transport::{
        Server,
        server::{Router, TcpIncoming},
    },
};
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};
use tower::{
    layer::util::{Identity, Stack},
    util::MapResponseLayer,
};
use verdict_coordinator::message_too_large;

use crate::node::Node;

/// HTTP/2 flow control windows: of a connection as large as on the calling side; of a stream about a thousand batches, for what is in
/// a window has left its client and waits unseen.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// How often an idle connection is asked for a sign of life, and how long it may take to give one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long open streams may take to end when a server stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Calls that clients gave up before this node looked at them, on one connection at a time. More end the connection, and with it
/// everybody else's calls on it: a node that stood still for a moment finds thousands of them. Each takes about a kilobyte.
const GIVEN_UP_MAX: usize = 8192;

/// What each response goes through.
type Mending = MapResponseLayer<fn(Response<Body>) -> Response<Body>>;

/// A server of these services.
pub fn server(routes: Routes) -> Router<Stack<Mending, Identity>> {
    Server::builder()
        .layer(MapResponseLayer::new(tell_too_large as fn(Response<Body>) -> Response<Body>))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(GIVEN_UP_MAX))
        .add_routes(routes)
}

/// Puts a refusal of a message that is too large into the words of the contract.
fn tell_too_large(response: Response<Body>) -> Response<Body> {
    // Only a call that failed before anything was answered has its status among the headers.
    if !response.headers().contains_key(Status::GRPC_STATUS) {
        return response;
    }
    let said = Status::from_header_map(response.headers()).as_ref().and_then(message_too_large);
    said.map_or(response, Status::into_http)
}

/// The connections to a listener. Small answers leave at once: the kernel would keep them back until what was sent before is
/// acknowledged, up to 40 ms. (The server's own setting of that name doesn't reach connections that it is given.)
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// The standard services that every port has: health and reflection.
pub async fn standard_services(routes: &mut tonic::service::RoutesBuilder) -> Result<HealthReporter> {
    let (health, service) = health_reporter();
    set_health(&health, ServingStatus::Serving).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(verdict_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("describe the services")?;
    routes.add_service(service).add_service(reflection);
    Ok(health)
}

/// Sets the health of the node as a whole and of what clients call.
pub async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in ["", "verdict.v1.Settlement", "verdict.v1.Admin"] {
        health.set_service_status(service, status).await;
    }
}

/// Serves only what clients and operators call, until `shutdown` ends.
pub async fn serve_clients(
    node: &Node,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut routes = Routes::builder();
    let health = standard_services(&mut routes).await?;
    routes
        .add_service(node.coordinator().settlement_service())
        .add_service(node.coordinator().admin_service());
    let serving = server(routes.routes()).serve_with_incoming(incoming(listener));
    let mut serving = tokio::spawn(serving);
    tokio::select! {
        ended = &mut serving => ended.context("serve clients")?.context("serve clients")?,
        () = shutdown => {
            set_health(&health, ServingStatus::NotServing).await;
            let _ = tokio::time::timeout(STOP_PATIENCE, &mut serving).await;
            serving.abort();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, stream};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
        net::TcpStream,
    };
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::Code;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use verdict_proto::connect::{Connect as _, InProcess};

    use super::*;

    async fn health() -> Routes {
        let mut routes = Routes::builder();
        standard_services(&mut routes).await.unwrap();
        routes.routes()
    }

    #[tokio::test]
    async fn an_accepted_connection_keeps_nothing_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(incoming(listener).next().await.unwrap().unwrap().nodelay().unwrap());
    }

    #[tokio::test]
    async fn a_message_beyond_the_limit_is_malformed_and_told_with_the_limit() {
        let network = InProcess::default();
        let incoming = ReceiverStream::new(network.listen("n:1"));
        tokio::spawn(server(health().await).serve_with_incoming(incoming));
        let mut client = HealthClient::new(network.channel("n:1").unwrap());
        let mut ask = async |service: String| client.check(HealthCheckRequest { service }).await;
        let status = ask("x".repeat(5 << 20)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(status.message(), "the message has 5242885 bytes, at most 4194304 are taken");
        assert_eq!(ask("unknown".into()).await.unwrap_err().code(), Code::NotFound, "others are left alone");
        ask(String::new()).await.unwrap();
    }

    /// A frame of HTTP/2.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// The next frame that answers a PING or ends the connection: its kind.
    async fn answer_or_end(connection: &mut DuplexStream) -> u8 {
        loop {
            let mut header = [0; 9];
            connection.read_exact(&mut header).await.unwrap();
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
            connection.read_exact(&mut vec![0; length as usize]).await.unwrap();
            if let (6, 1) | (7, _) = (header[3], header[4]) {
                return header[3];
            }
        }
    }

    #[tokio::test]
    async fn calls_that_were_given_up_before_they_were_looked_at_dont_end_the_connection() {
        let [headers, reset, settings, ping] = [1, 3, 4, 6];
        // All of it waits when the server looks for the first time: it runs on the same thread.
        let (mut client, connection) = tokio::io::duplex(1 << 20);
        let incoming = stream::iter([Ok::<_, std::io::Error>(connection)]).chain(stream::pending());
        tokio::spawn(server(health().await).serve_with_incoming(incoming));
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        sent.extend(frame(settings, 0, 0, &[]));
        for stream in (1..).step_by(2).take(5000) {
            // POST, http, / of the static table; the end of the headers. Then CANCEL.
            sent.extend(frame(headers, 4, stream, &[0x83, 0x86, 0x84]));
            sent.extend(frame(reset, 0, stream, &8_u32.to_be_bytes()));
        }
        sent.extend(frame(ping, 0, 0, b"lives  ?"));
        client.write_all(&sent).await.unwrap();
        assert_eq!(answer_or_end(&mut client).await, ping, "the connection was ended");
    }
}
