//! Health (v1) and reflection (v1) are served on a node's port, for tools that know nothing of Verdict.

use std::collections::BTreeSet;

use prost::Message as _;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use verdict_tests::cluster::Cluster;

#[tokio::test(flavor = "multi_thread")]
async fn every_node_tells_its_health_and_describes_its_services() {
    let cluster = Cluster::start().await;
    for node in cluster.nodes() {
        let mut health = HealthClient::new(cluster.channel(node));
        for service in ["", "verdict.v1.Settlement", "verdict.v1.Admin"] {
            let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await;
            let answer = answer.expect("health is served").into_inner();
            assert_eq!(answer.status(), ServingStatus::Serving, "{service:?} on node {node}");
        }
        let unknown = health.check(HealthCheckRequest { service: "no.such.Service".to_owned() }).await;
        assert_eq!(unknown.expect_err("there is no such service").code(), Code::NotFound);

        let list = MessageRequest::ListServices(String::new());
        let MessageResponse::ListServicesResponse(listed) = reflect(&cluster, node, list).await else {
            panic!("node {node} doesn't list its services")
        };
        let names: BTreeSet<String> = listed.service.into_iter().map(|service| service.name).collect();
        for service in
            ["verdict.v1.Settlement", "verdict.v1.Admin", "verdict.v1.Participant", "grpc.health.v1.Health"]
        {
            assert!(names.contains(service), "{service} is not among {names:?}");
        }

        let symbol = MessageRequest::FileContainingSymbol("verdict.v1.Batch".to_owned());
        let MessageResponse::FileDescriptorResponse(files) = reflect(&cluster, node, symbol).await else {
            panic!("node {node} doesn't describe a batch")
        };
        let described = files.file_descriptor_proto.iter().any(|file| {
            let file = prost_types_file(file);
            file.contains("verdict/v1/types.proto")
        });
        assert!(described, "the file of the batch is missing");
    }
}

async fn reflect(cluster: &Cluster, node: u64, question: MessageRequest) -> MessageResponse {
    let mut client = ServerReflectionClient::new(cluster.channel(node));
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let answers = client.server_reflection_info(tokio_stream::iter([request])).await;
    let mut answers = answers.expect("reflection is served").into_inner();
    let answer = answers.message().await.expect("an answer").expect("an answer");
    answer.message_response.expect("an answer says something")
}

/// The name of a described file: the first field of a `FileDescriptorProto`.
fn prost_types_file(file: &[u8]) -> String {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Named {
        #[prost(string, optional, tag = "1")]
        name: Option<String>,
    }
    Named::decode(file).expect("a description of a file").name.unwrap_or_default()
}
