//! The wire contract of Verdict, generated from `proto/verdict/v1/*.proto`; the documentation of every
//! field stands there.

// Generated code documents itself by the comments of the .proto files.
#[allow(missing_docs, clippy::all)]
/// Version 1 of the contract.
pub mod v1 {
    tonic::include_proto!("verdict.v1");
}

pub mod connect;
pub mod convert;

/// The encoded `FileDescriptorSet` of the contract, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/verdict.bin"));
