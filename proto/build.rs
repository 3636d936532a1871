//! Compiles the wire contract without protoc, and keeps its descriptor for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=verdict");
    let files = [
        "verdict/v1/types.proto",
        "verdict/v1/settlement.proto",
        "verdict/v1/admin.proto",
        "verdict/v1/participant.proto",
        "verdict/v1/raft.proto",
    ];
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("verdict.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
