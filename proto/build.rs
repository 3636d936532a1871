//! Compiles the wire contract without protoc, and keeps its descriptor for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_types::{FileDescriptorSet, field_descriptor_proto::Type};

/// Messages that are passed on as they came, or decoded by `verdict_protocol::wire`: in Rust their fields are bytes. On the wire a message
/// within another one is nothing else.
const PASSED_ON: [&str; 2] = [".verdict.v1.Batch", ".verdict.v1.Part"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=verdict");
    let files = [
        "verdict/v1/types.proto",
        "verdict/v1/settlement.proto",
        "verdict/v1/admin.proto",
        "verdict/v1/participant.proto",
        "verdict/v1/forward.proto",
        "verdict/v1/raft.proto",
    ];
    let mut descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("verdict.bin"), descriptors.encode_to_vec())?;
    pass_on(&mut descriptors);
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}

/// Makes bytes of fields that hold one of these messages.
fn pass_on(descriptors: &mut FileDescriptorSet) {
    let messages = descriptors.file.iter_mut().flat_map(|file| &mut file.message_type);
    for field in messages.flat_map(|message| &mut message.field) {
        if PASSED_ON.contains(&field.type_name()) {
            field.set_type(Type::Bytes);
            field.type_name = None;
        }
    }
}
