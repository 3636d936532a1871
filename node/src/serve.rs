//! The gRPC servers of a node: one for everything, one for clients alone.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tonic::{
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

/// A server of these services.
pub fn server(routes: Routes) -> Router {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes)
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
    use futures::StreamExt as _;
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn an_accepted_connection_keeps_nothing_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(incoming(listener).next().await.unwrap().unwrap().nodelay().unwrap());
    }
}
