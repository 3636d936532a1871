//! `verdict dev`: the embedded cluster on one client port.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::net::TcpListener;

use crate::{embedded::Cluster, node::interrupted, serve::serve_clients};

/// Flags of `verdict dev`.
#[derive(Args, Clone, Debug)]
pub struct DevArgs {
    /// Where clients connect.
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// The folder in which the three nodes keep their data.
    #[arg(long, default_value = "verdict-data")]
    pub data: PathBuf,
    /// How many shards; fixed when the folder is set up.
    #[arg(long, default_value_t = 4)]
    pub shards: u32,
}

/// Runs until SIGINT or SIGTERM.
pub async fn run(args: DevArgs) -> Result<ExitCode> {
    let began = Instant::now();
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("listen on {}", args.listen))?;
    let cluster = Cluster::start(&args.data, args.shards).await?;
    crate::out!(
        "verdict dev: ready on {} after {:.1} s (three nodes in this process, {} shards, data in {})",
        listener.local_addr().context("ask for the port")?,
        began.elapsed().as_secs_f64(),
        args.shards,
        args.data.display()
    );
    tokio::select! {
        served = serve_clients(cluster.node(), listener, interrupted()?) => served?,
        why = cluster.failed() => bail!("a node of this cluster has stopped: {why}"),
    }
    crate::out!("verdict dev: stopping");
    cluster.stop().await;
    Ok(ExitCode::SUCCESS)
}
