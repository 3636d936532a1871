//! etcd as a user would do it: three nodes, one transaction for each trade, which takes effect only if no balance was changed
//! since it was read.
//!
//! etcd has no shards: all is in one Raft group, and a trade takes one round of it. Its settings are as delivered, but for three:
//! room (`--quota-backend-bytes`); a longer election timeout, so that load on a small machine doesn't look like a dead leader;
//! and smaller batches towards its database (`--backend-batch-...`), since version 3.4 copies what waits there for every
//! transaction: with the default of 100 ms it settles a third as many trades.

mod client;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use rustix::process::Signal;
use tokio::process::Command;
use tonic::transport::{Channel, Endpoint};

pub use self::client::Transactions;
use self::{
    client::{balance_key, prefix_end},
    wire::{
        PutRequest, RangeRequest, RequestOp, StatusRequest, TxnRequest, kv_client::KvClient,
        maintenance_client::MaintenanceClient, request_op::Request,
    },
};
use crate::{
    process::{Servers, User, find_program, free_ports},
    trade::{ASSETS, INITIAL_BALANCE},
};

/// How many nodes.
const NODES: usize = 3;
/// How long the cluster may take to have a leader.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Keys written in one transaction while the balances are made; etcd's limit is 128.
const PUTS_PER_TRANSACTION: usize = 100;
/// Such transactions in flight.
const FILLS_IN_FLIGHT: usize = 16;
/// Keys on one page when all are read.
const PAGE: i64 = 10_000;
/// Connections, at most; clients share them, as HTTP/2 lets them.
const CONNECTIONS_MAX: usize = 8;

/// etcd's interface.
mod wire {
    tonic::include_proto!("etcdserverpb");
}

/// A cluster.
#[derive(Debug)]
pub struct Etcd {
    channels: Vec<Channel>,
    users: u64,
}

/// Where the program is.
#[derive(Clone, Debug)]
pub struct Installation(PathBuf);

impl Installation {
    /// Looks for etcd in `PATH`.
    pub fn find() -> anyhow::Result<Installation> {
        let found = find_program(&["etcd"]);
        Ok(Installation(found.context("etcd is missing: install the package `etcd-server` (or `etcd`)")?))
    }

    /// "etcd 3.4.23" or the like.
    pub async fn version(&self) -> anyhow::Result<String> {
        let out =
            Command::new(&self.0).arg("--version").output().await.context("ask etcd for its version")?;
        let text = String::from_utf8_lossy(&out.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: "));
        Ok(format!("etcd {}", version.context("understand etcd's version")?))
    }
}

impl Etcd {
    /// Makes, starts and fills a cluster in `folder`.
    pub async fn start(
        installation: &Installation,
        servers: &mut Servers,
        folder: &Path,
        users: u64,
    ) -> anyhow::Result<Etcd> {
        User::Same.make_folder(folder)?;
        let ports = free_ports(2 * NODES)?;
        let (client_ports, peer_ports) = ports.split_at(NODES);
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let members: Vec<String> =
            peer_ports.iter().zip(1..).map(|(port, node)| format!("node{node}={}", url(port))).collect();
        for (node, (client_port, peer_port)) in (1..).zip(client_ports.iter().zip(peer_ports)) {
            let name = format!("node{node}");
            let mut command = User::Same.command(&installation.0, "KILL");
            command.args(["--name", &name, "--data-dir"]).arg(folder.join(&name));
            command.args(["--listen-client-urls", &url(client_port)]);
            command.args(["--advertise-client-urls", &url(client_port)]);
            command.args(["--listen-peer-urls", &url(peer_port)]);
            command.args(["--initial-advertise-peer-urls", &url(peer_port)]);
            command.args(["--initial-cluster", &members.join(","), "--initial-cluster-state", "new"]);
            command.args(["--quota-backend-bytes", &(8_u64 << 30).to_string()]);
            command.args(["--backend-batch-interval", "10ms", "--backend-batch-limit", "200"]);
            command.args(["--heartbeat-interval", "100", "--election-timeout", "3000"]);
            command.args(["--logger", "zap", "--log-level", "error", "--log-outputs", "stderr"]);
            let log = folder.join(format!("{name}.log"));
            servers.start(&format!("etcd's {name}"), command, log, Signal::KILL)?;
        }
        let urls: Vec<String> = client_ports.iter().map(url).collect();
        let leader = wait_for_leader(servers, &urls).await?;
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            channels.push(connect(&leader).await?);
        }
        let etcd = Etcd { channels, users };
        etcd.fill().await?;
        Ok(etcd)
    }

    /// Clients.
    pub fn clients(&self, count: usize) -> Vec<Transactions> {
        let channels = self.channels.iter().cycle().take(count);
        channels.zip(0..).map(|(channel, seed)| Transactions::new(channel.clone(), seed)).collect()
    }

    /// Whether what was answered is there, once, and no money was made or lost.
    pub async fn check(&self, answered: u64) -> anyhow::Result<()> {
        let mut client = KvClient::new(self.channels[0].clone());
        let count = RangeRequest {
            key: b"trade/".to_vec(),
            range_end: prefix_end(b"trade/"),
            count_only: true,
            ..RangeRequest::default()
        };
        let trades = client.range(count).await.context("count the trades")?.into_inner().count;
        anyhow::ensure!(
            u64::try_from(trades) == Ok(answered),
            "{answered} trades were answered, {trades} are recorded"
        );
        for asset in ASSETS {
            let prefix = balance_key(asset, None);
            let (mut sum, mut keys, mut from) = (0_i128, 0, prefix.clone());
            loop {
                let page = RangeRequest {
                    key: from,
                    range_end: prefix_end(&prefix),
                    limit: PAGE,
                    ..RangeRequest::default()
                };
                let page = client.range(page).await.context("read the balances")?.into_inner();
                for pair in &page.kvs {
                    sum += i128::from(client::parse_balance(&pair.value)?);
                }
                keys += page.kvs.len() as u64;
                match page.kvs.last() {
                    // The next key in order: the last one with a byte more.
                    Some(last) if page.more => from = [last.key.as_slice(), &[0]].concat(),
                    Some(_) | None => break,
                }
            }
            let initial = i128::from(INITIAL_BALANCE) * i128::from(self.users);
            anyhow::ensure!(keys == self.users, "{keys} balances of an asset are there, not {}", self.users);
            anyhow::ensure!(sum == initial, "the balances add up to {sum}, not {initial}");
        }
        Ok(())
    }

    async fn fill(&self) -> anyhow::Result<()> {
        let keys = ASSETS.iter().flat_map(|asset| (0..self.users).map(|user| (*asset, user)));
        let puts = keys.map(|(asset, user)| PutRequest {
            key: balance_key(asset, Some(user)),
            value: INITIAL_BALANCE.to_string().into_bytes(),
        });
        let operations: Vec<RequestOp> =
            puts.map(|put| RequestOp { request: Some(Request::RequestPut(put)) }).collect();
        let transactions = operations.chunks(PUTS_PER_TRANSACTION).map(|chunk| {
            let mut client = KvClient::new(self.channels[0].clone());
            let request = TxnRequest { success: chunk.to_vec(), ..TxnRequest::default() };
            async move { client.txn(request).await.map(drop) }
        });
        let filled = stream::iter(transactions).buffer_unordered(FILLS_IN_FLIGHT).try_collect::<()>();
        filled.await.context("make the balances")
    }
}

/// The address of the node that leads, once all nodes know one.
async fn wait_for_leader(servers: &mut Servers, urls: &[String]) -> anyhow::Result<String> {
    let until = Instant::now() + START_TIMEOUT;
    loop {
        servers.check_running()?;
        let mut leader = None;
        let mut answers = 0;
        for url in urls {
            let Ok(status) = status(url).await else { continue };
            answers += usize::from(status.leader != 0);
            if status.header.is_some_and(|header| header.member_id == status.leader) {
                leader = Some(url.clone());
            }
        }
        if let Some(leader) = leader.filter(|_| answers == urls.len()) {
            return Ok(leader);
        }
        anyhow::ensure!(Instant::now() < until, "etcd has no leader after {} s", START_TIMEOUT.as_secs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn status(url: &str) -> anyhow::Result<wire::StatusResponse> {
    let mut client = MaintenanceClient::new(connect(url).await?);
    Ok(client.status(StatusRequest {}).await.context("ask for the status")?.into_inner())
}

async fn connect(url: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned()).context("understand an address")?;
    endpoint.tcp_nodelay(true).connect().await.with_context(|| format!("connect to {url}"))
}
