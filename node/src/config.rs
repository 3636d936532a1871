//! What a node reads at its start.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use verdict_protocol::{
    batch::{BatchLimits, Placement},
    coordinator::Keep,
    ids::{NodeId, ShardId},
    leader::LeaderConfig,
};
use verdict_raft::{Limits, Timing};

use crate::memory;

/// The most shards a cluster may have: a node keeps what each of its groups has acknowledged in one block of its disk, which has room for
/// so many, and some.
const SHARDS_MAX: u32 = 256;

/// The most memory that a cache may be given, in MiB: more must be a mistake of units.
const CACHE_MIB_MAX: usize = 512 << 10;
const THREADS_MAX: usize = 1024;

/// The configuration file of a node (TOML). docs/operations.md explains each setting.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster's name: nodes of different clusters refuse each other.
    pub cluster: String,
    /// This node's id. Never used again after its disk is lost.
    pub node: u64,
    /// Where it listens, for clients and for other nodes.
    pub listen: String,
    /// The address of this machine from which it connects to other nodes. None: the system chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_from: Option<IpAddr>,
    /// The folder of everything that it keeps.
    pub data: PathBuf,
    /// How many shards the cluster has. Fixed when it is set up.
    pub shards: u32,
    /// This node joins a cluster that others have set up: it founds no group, and waits until `verdict ctl member` adds it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub join: bool,
    /// Nodes with a replica of the coordinator group. Empty: all; a file leaves it out then.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "some_nodes")]
    pub coordinators: Vec<u64>,
    /// How long a decision is remembered, in seconds: older ids are refused.
    #[serde(default = "default_retention")]
    pub retention_seconds: u64,
    /// How many decisions are remembered: those with the oldest ids make room, and their ids are refused.
    #[serde(default = "default_kept")]
    pub decisions_max: u64,
    /// Of how many of the latest commits the history of rows is kept.
    #[serde(default = "default_history")]
    pub history_max: u64,
    /// Batches that may be in flight at the leader; more are refused with RESOURCE_EXHAUSTED.
    #[serde(default = "default_batches")]
    pub batches_in_flight_max: usize,
    /// Parts that a shard may hold; more are refused.
    #[serde(default = "default_parts")]
    pub parts_per_shard_max: u32,
    /// Operations per batch.
    #[serde(default = "default_operations")]
    pub operations_per_batch_max: usize,
    /// Participants per batch.
    #[serde(default = "default_participants")]
    pub participants_per_batch_max: usize,
    /// Bytes per batch.
    #[serde(default = "default_batch_bytes")]
    pub bytes_per_batch_max: usize,
    /// How often an idle Raft leader tells that it lives, in milliseconds.
    #[serde(default = "default_heartbeat")]
    pub heartbeat_ms: u64,
    /// After how long without a sign of its leader a follower stands for election: from this...
    #[serde(default = "default_election_min")]
    pub election_timeout_min_ms: u64,
    /// ...to this, in milliseconds.
    #[serde(default = "default_election_max")]
    pub election_timeout_max_ms: u64,
    /// A snapshot is made when a group's log has so many entries since the last one.
    #[serde(default = "default_snapshot_after")]
    pub snapshot_after_entries: u64,
    /// So many entries are kept behind a snapshot, for replicas that lag.
    #[serde(default = "default_keep")]
    pub keep_entries: u64,
    /// How much memory the rows that were used lately may take, in MiB: each shard of this node has an equal part. None: a quarter of
    /// what this process may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_cache_mib: Option<usize>,
    /// How much memory blocks of tables may take that were read lately, in MiB.
    #[serde(default = "default_block_cache")]
    pub block_cache_mib: usize,
    /// How many threads run the node's tasks. None: as many as there are processors. Several nodes on one machine should share them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// All nodes and where they listen, this one included.
    pub nodes: BTreeMap<String, String>,
    /// Which nodes have a replica of a shard. A shard that isn't listed has one on every node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shard_replicas: BTreeMap<String, Vec<u64>>,
}

/// A list that a file has must say something: an empty one could be meant to say "none".
fn some_nodes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
    let nodes = Vec::deserialize(from)?;
    if nodes.is_empty() {
        return Err(D::Error::custom("the list of nodes is empty: leave it out if all nodes are meant"));
    }
    Ok(nodes)
}

fn default_retention() -> u64 {
    24 * 3600
}

fn default_kept() -> u64 {
    Keep::default().decisions_max
}

fn default_history() -> u64 {
    Keep::default().history_max
}

fn default_batches() -> usize {
    100_000
}

fn default_parts() -> u32 {
    200_000
}

fn default_operations() -> usize {
    BatchLimits::default().operations_max
}

fn default_participants() -> usize {
    BatchLimits::default().participants_max
}

fn default_batch_bytes() -> usize {
    BatchLimits::default().bytes_max
}

fn default_heartbeat() -> u64 {
    Timing::default().heartbeat_ms
}

fn default_election_min() -> u64 {
    Timing::default().election_timeout_min_ms
}

fn default_election_max() -> u64 {
    Timing::default().election_timeout_max_ms
}

fn default_snapshot_after() -> u64 {
    Limits::default().snapshot_after_entries
}

fn default_keep() -> u64 {
    Limits::default().keep_entries
}

fn default_block_cache() -> usize {
    Limits::default().block_cache_bytes >> 20
}

impl Config {
    /// A configuration with defaults, for programs that make their own.
    pub fn new(
        cluster: &str,
        node: u64,
        listen: &str,
        data: PathBuf,
        shards: u32,
        nodes: BTreeMap<String, String>,
    ) -> Config {
        Config {
            cluster: cluster.to_owned(),
            node,
            listen: listen.to_owned(),
            connect_from: None,
            data,
            shards,
            join: false,
            coordinators: Vec::new(),
            retention_seconds: default_retention(),
            decisions_max: default_kept(),
            history_max: default_history(),
            batches_in_flight_max: default_batches(),
            parts_per_shard_max: default_parts(),
            operations_per_batch_max: default_operations(),
            participants_per_batch_max: default_participants(),
            bytes_per_batch_max: default_batch_bytes(),
            heartbeat_ms: default_heartbeat(),
            election_timeout_min_ms: default_election_min(),
            election_timeout_max_ms: default_election_max(),
            snapshot_after_entries: default_snapshot_after(),
            keep_entries: default_keep(),
            row_cache_mib: None,
            block_cache_mib: default_block_cache(),
            threads: None,
            nodes,
            shard_replicas: BTreeMap::new(),
        }
    }

    /// Reads and checks a file. `node` says which node this is, instead of the file: then one file serves all nodes.
    pub fn load(path: &Path, node: Option<u64>) -> Result<Config> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let config = Config::parse(&text, node).with_context(|| format!("parse {}", path.display()))?;
        config.check().with_context(|| format!("check {}", path.display()))?;
        Ok(config)
    }

    fn parse(text: &str, node: Option<u64>) -> Result<Config> {
        let Some(node) = node else { return Ok(toml::from_str(text)?) };
        let mut file: toml::Table = toml::from_str(text)?;
        ensure!(
            !file.contains_key("node"),
            "the file says which `node` this is, and so does --node: take one away"
        );
        file.insert(
            "node".to_owned(),
            toml::Value::Integer(i64::try_from(node).context("--node is too large")?),
        );
        Ok(file.try_into()?)
    }

    /// Checks what the types don't.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.cluster.is_empty(), "`cluster` is empty: give the cluster a name");
        ensure!(
            (1..=SHARDS_MAX).contains(&self.shards),
            "`shards` is {}, it must be 1 to {SHARDS_MAX}",
            self.shards
        );
        ensure!(
            self.retention_seconds > 0,
            "`retention_seconds` is 0: then no id would be remembered, and no batch could be settled"
        );
        ensure!(
            self.decisions_max > 0,
            "`decisions_max` is 0: then no id would be remembered, and no batch could be settled"
        );
        let nodes = self.nodes()?;
        let Some(address) = nodes.get(&NodeId(self.node)) else {
            bail!("`node` is {}, which [nodes] doesn't list", self.node);
        };
        if address.split(':').next_back() != self.listen.split(':').next_back() {
            tracing::warn!(listen = %self.listen, %address, "[nodes] gives this node another port than `listen`");
        }
        let distinct: BTreeSet<&String> = nodes.values().collect();
        ensure!(distinct.len() == nodes.len(), "[nodes] gives two nodes the same address");
        for (what, ids) in std::iter::once(("`coordinators`".to_owned(), &self.coordinators))
            .chain(self.shard_replicas.iter().map(|(shard, ids)| (format!("[shard_replicas] {shard}"), ids)))
        {
            let distinct: BTreeSet<&u64> = ids.iter().collect();
            ensure!(distinct.len() == ids.len(), "{what} names a node twice");
            for id in ids {
                ensure!(
                    nodes.contains_key(&NodeId(*id)),
                    "{what} names node {id}, which [nodes] doesn't list"
                );
            }
        }
        ensure!(self.snapshot_after_entries > 0, "`snapshot_after_entries` is 0, it must be at least 1");
        for (setting, mib) in
            [("row_cache_mib", self.row_cache_mib), ("block_cache_mib", Some(self.block_cache_mib))]
        {
            ensure!(
                mib.is_none_or(|mib| (1..=CACHE_MIB_MAX).contains(&mib)),
                "`{setting}` is {}, it must be 1 to {CACHE_MIB_MAX}, in MiB",
                mib.unwrap_or_default()
            );
        }
        ensure!(
            self.threads.is_none_or(|threads| (1..=THREADS_MAX).contains(&threads)),
            "`threads` is {}, it must be 1 to {THREADS_MAX}; left out, there is one for each processor",
            self.threads.unwrap_or_default()
        );
        for (shard, ids) in &self.shard_replicas {
            ensure!(
                !ids.is_empty(),
                "[shard_replicas] {shard} is empty: name its nodes, or leave it out if all nodes are meant"
            );
            let known = shard.parse::<u32>().is_ok_and(|shard| (1..=self.shards).contains(&shard));
            ensure!(known, "[shard_replicas] names shard {shard:?}, there are shards 1 to {}", self.shards);
        }
        ensure!(
            self.election_timeout_min_ms > 2 * self.heartbeat_ms
                && self.election_timeout_max_ms > self.election_timeout_min_ms,
            "`heartbeat_ms`, `election_timeout_min_ms` and `election_timeout_max_ms` must grow in this order, \
             the second more than twice the first"
        );
        Ok(())
    }

    /// All nodes.
    pub fn nodes(&self) -> Result<BTreeMap<NodeId, String>> {
        let parse = |(id, address): (&String, &String)| {
            let id: u64 = id
                .parse()
                .ok()
                .filter(|id| *id > 0)
                .with_context(|| format!("[nodes] has the id {id:?}: ids are numbers from 1"))?;
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            ensure!(port.is_some(), "[nodes] gives node {id} the address {address:?}: it must be host:port");
            Ok((NodeId(id), address.clone()))
        };
        self.nodes.iter().map(parse).collect()
    }

    /// The voters of the coordinator group.
    pub fn coordinator_voters(&self) -> Result<BTreeMap<NodeId, String>> {
        self.pick(&self.coordinators)
    }

    /// The voters of a shard.
    pub fn shard_voters(&self, shard: ShardId) -> Result<BTreeMap<NodeId, String>> {
        self.pick(self.shard_replicas.get(&shard.0.to_string()).map_or(&[], Vec::as_slice))
    }

    /// The voters of every shard.
    pub fn shard_voters_of_all(&self) -> Result<BTreeMap<ShardId, BTreeMap<NodeId, String>>> {
        self.placement().all().map(|shard| Ok((shard, self.shard_voters(shard)?))).collect()
    }

    fn pick(&self, ids: &[u64]) -> Result<BTreeMap<NodeId, String>> {
        let mut nodes = self.nodes()?;
        if !ids.is_empty() {
            nodes.retain(|node, _| ids.contains(&node.0));
        }
        Ok(nodes)
    }

    /// Where partitions live.
    pub fn placement(&self) -> Placement {
        Placement { shards: self.shards }
    }

    /// The shards that have a replica here.
    pub fn own_shards(&self) -> Result<Vec<ShardId>> {
        let mut own = Vec::new();
        for shard in self.placement().all() {
            if self.shard_voters(shard)?.contains_key(&NodeId(self.node)) {
                own.push(shard);
            }
        }
        Ok(own)
    }

    /// The limits on batches.
    pub fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            operations_max: self.operations_per_batch_max,
            participants_max: self.participants_per_batch_max,
            bytes_max: self.bytes_per_batch_max,
        }
    }

    /// The settings of a coordinator's leader.
    pub fn leader(&self) -> LeaderConfig {
        LeaderConfig {
            batches_max: self.batches_in_flight_max,
            retention_ms: self.retention_seconds.saturating_mul(1000),
            keep: Keep { decisions_max: self.decisions_max, history_max: self.history_max },
            ..LeaderConfig::new(self.placement())
        }
    }

    /// The bounds of Raft's logs and queues, and of what is kept in memory.
    pub fn raft_limits(&self) -> Result<Limits> {
        let row_cache_mib = self.row_cache_mib.unwrap_or_else(|| memory::row_cache_mib(1));
        Ok(Limits {
            snapshot_after_entries: self.snapshot_after_entries,
            keep_entries: self.keep_entries,
            block_cache_bytes: self.block_cache_mib << 20,
            state_cache_bytes: (row_cache_mib << 20) / self.own_shards()?.len().max(1),
            ..Limits::default()
        })
    }

    /// The intervals of Raft.
    pub fn timing(&self) -> Timing {
        Timing {
            heartbeat_ms: self.heartbeat_ms,
            election_timeout_min_ms: self.election_timeout_min_ms,
            election_timeout_max_ms: self.election_timeout_max_ms,
            ..Timing::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "demo"
        node = 1
        listen = "127.0.0.1:7401"
        data = "/data"
        shards = 4
        [nodes]
        1 = "127.0.0.1:7401"
        2 = "127.0.0.1:7402"
        3 = "127.0.0.1:7403"
    "#;

    fn problem(change: impl Fn(&str) -> String) -> String {
        match toml::from_str::<Config>(&change(GOOD)) {
            Err(error) => error.to_string(),
            Ok(config) => format!("{:#}", config.check().unwrap_err()),
        }
    }

    #[test]
    fn a_good_file_passes() {
        let config: Config = toml::from_str(GOOD).unwrap();
        config.check().unwrap();
        assert_eq!(config.own_shards().unwrap().len(), 4);
        assert_eq!(config.coordinator_voters().unwrap().len(), 3);
    }

    #[test]
    fn the_shards_of_a_node_share_its_memory() {
        let mut config: Config = toml::from_str(GOOD).unwrap();
        let quarter = memory::row_cache_mib(1) << 20;
        assert_eq!(config.raft_limits().unwrap().state_cache_bytes, quarter / 4);
        config.shard_replicas.insert("2".to_owned(), vec![2, 3]);
        config.row_cache_mib = Some(30);
        assert_eq!(config.raft_limits().unwrap().state_cache_bytes, 10 << 20);
    }

    #[test]
    fn one_file_serves_all_nodes() {
        let shared = GOOD.replace("node = 1", "");
        assert_eq!(Config::parse(&shared, Some(3)).unwrap().node, 3);
        assert!(Config::parse(&shared, None).unwrap_err().to_string().contains("missing field `node`"));
        assert!(Config::parse(GOOD, Some(1)).unwrap_err().to_string().contains("--node"));
    }

    #[test]
    fn every_mistake_is_named() {
        assert!(problem(|text| text.replace("node = 1", "node = 9")).contains("which [nodes] doesn't list"));
        assert!(problem(|text| text.replace("7402", "7403")).contains("same address"));
        assert!(problem(|text| text.replace("shards = 4", "shards = 0")).contains("`shards` is 0"));
        assert!(problem(|text| text.replace("shards = 4", "shard = 4")).contains("shard"));
        for setting in ["retention_seconds", "decisions_max", "threads", "row_cache_mib", "block_cache_mib"] {
            let told = problem(|text| text.replace("shards = 4", &format!("shards = 4\n{setting} = 0")));
            assert!(told.contains(&format!("`{setting}` is 0")), "{told}");
        }
        let bytes = problem(|text| text.replace("shards = 4", "shards = 4\nrow_cache_mib = 2147483648"));
        assert!(bytes.contains("in MiB"), "{bytes}");
        assert!(
            problem(|text| text.replace("shards = 4", "shards = 4\nthreads = 100000")).contains("1 to 1024")
        );
        assert!(problem(|text| text.replace("\"127.0.0.1:7402\"", "\"nowhere\"")).contains("host:port"));
        assert!(
            problem(|text| text.replace("shards = 4", "shards = 4\ncoordinators = [7]")).contains("node 7")
        );
        let told = problem(|text| text.replace("shards = 4", "shards = 4\ncoordinators = []"));
        assert!(told.contains("coordinators = []") && told.contains("leave it out"), "{told}");
        let told = problem(|text| text.replace("shards = 4", "shards = 4\ncoordinators = [1, 1]"));
        assert!(told.contains("`coordinators` names a node twice"), "{told}");
        let told = problem(|text| format!("{text}\n[shard_replicas]\n2 = []"));
        assert!(told.contains("[shard_replicas] 2 is empty"), "{told}");
    }
}
