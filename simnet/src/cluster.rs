//! The hosts of a simulation: on each a real node on a disk that outlives it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
};

use tokio::runtime::{Handle, Id};
use verdict_node::{
    config::Config,
    node::{Node, Surroundings},
};
use verdict_proto::connect::Connect as _;
use verdict_proto::v1::settlement_client::SettlementClient;
use verdict_protocol::ids::{GroupId, ShardId};
use verdict_raft::{GroupStatus, Limits};
use verdict_tests::{bank::Nodes, random::Random};

use crate::{
    disk::Disk,
    nature,
    net::{SimulatedTcp, incoming},
    trace,
};

/// The port of every node.
const PORT: u16 = 7401;

/// How a cluster is built: drawn from the seed.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) nodes: u64,
    pub(crate) shards: u32,
    /// The voters of each group, the coordinators first. Empty: all nodes.
    pub(crate) voters: Vec<Vec<u64>>,
    pub(crate) limits: Limits,
}

impl Shape {
    pub(crate) fn draw(random: &mut Random) -> Shape {
        let nodes = if random.below(4) == 0 { 5 } else { 3 };
        let shards = 1 + random.below(3) as u32;
        let voters = (0..=shards)
            .map(|_| {
                let first = random.below(nodes);
                if nodes == 3 { Vec::new() } else { (0..3).map(|next| 1 + (first + next) % nodes).collect() }
            })
            .collect();
        let limits = Limits {
            snapshot_after_entries: 30 + random.below(300),
            keep_entries: 5 + random.below(60),
            tail_bytes: *random.pick(&[2 << 10, 64 << 10, 32 << 20]),
            state_cache_bytes: *random.pick(&[4 << 10, 1 << 20]),
            ..Limits::default()
        };
        Shape { nodes, shards, voters, limits }
    }

    /// The names of all hosts with a node.
    pub(crate) fn names(&self) -> Vec<String> {
        (1..=self.nodes).map(name).collect()
    }

    fn address(node: u64) -> String {
        format!("{}:{PORT}", name(node))
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        (1..=self.nodes).map(Shape::address).collect()
    }

    fn config(&self, node: u64) -> Config {
        let all: BTreeMap<String, String> =
            (1..=self.nodes).map(|node| (node.to_string(), Shape::address(node))).collect();
        let listen = format!("0.0.0.0:{PORT}");
        let mut config = Config::new("simulated", node, &listen, PathBuf::from("/data"), self.shards, all);
        config.coordinators = self.voters[0].clone();
        for (shard, voters) in self.voters.iter().enumerate().skip(1).filter(|(_, voters)| !voters.is_empty())
        {
            config.shard_replicas.insert(shard.to_string(), voters.clone());
        }
        config
    }

    /// All groups, the coordinators first.
    pub(crate) fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..=self.shards).map(GroupId)
    }

    /// How many replicas a group has.
    pub(crate) fn replicas(&self, group: GroupId) -> usize {
        let voters = &self.voters[group.0 as usize];
        if voters.is_empty() { self.nodes as usize } else { voters.len() }
    }
}

impl Nodes for Shape {
    fn shards(&self) -> u32 {
        self.shards
    }

    fn settlements(&self) -> Vec<SettlementClient<tonic::transport::Channel>> {
        let channel = |address: String| SimulatedTcp.channel(&address).expect("host:port is an address");
        self.addresses().into_iter().map(|address| SettlementClient::new(channel(address))).collect()
    }
}

pub(crate) fn name(node: u64) -> String {
    format!("node-{node}")
}

/// A host with a node.
pub(crate) struct Host {
    pub(crate) number: u64,
    pub(crate) disk: Disk,
    config: Config,
    limits: Limits,
    node: RefCell<Option<Arc<Node>>>,
    stopped: RefCell<Option<String>>,
    wall_clock_off: Cell<i64>,
    runtime: Cell<Option<Id>>,
}

impl Host {
    pub(crate) fn new(shape: &Shape, number: u64, random: &mut Random) -> Rc<Host> {
        let others: Vec<String> = shape.names().into_iter().filter(|other| *other != name(number)).collect();
        let disk = Disk::new(random.split(), move || {
            // The machine is dead from this very moment: nothing that its node says from now on leaves it.
            for other in &others {
                turmoil::partition(name(number), other.as_str());
            }
        });
        Rc::new(Host {
            number,
            disk,
            config: shape.config(number),
            limits: shape.limits.clone(),
            node: RefCell::default(),
            stopped: RefCell::default(),
            wall_clock_off: Cell::new(0),
            runtime: Cell::new(None),
        })
    }

    /// What the host runs: its node, until that stops by itself.
    pub(crate) async fn run(self: Rc<Host>) -> turmoil::Result {
        *self.stopped.borrow_mut() = None;
        self.runtime.set(Some(Handle::current().id()));
        self.set_wall_clock(self.wall_clock_off.get());
        let listener = turmoil::net::TcpListener::bind(("0.0.0.0", PORT)).await?;
        let surroundings = Surroundings {
            connect: Arc::new(SimulatedTcp),
            storage: Arc::new(self.disk.start()),
            limits: self.limits.clone(),
        };
        let why = match Node::start_in(&self.config, surroundings, incoming(listener)).await {
            Err(error) => format!("no start: {error:#}"),
            Ok(node) => {
                let node = Arc::new(node);
                trace::note(format_args!("{} is ready", name(self.number)));
                *self.node.borrow_mut() = Some(node.clone());
                node.failed().await
            }
        };
        *self.stopped.borrow_mut() = Some(why);
        // A process ends here; the world makes the host end.
        std::future::pending().await
    }

    /// Puts the wall clock off.
    pub(crate) fn set_wall_clock(&self, off_seconds: i64) {
        self.wall_clock_off.set(off_seconds);
        if let Some(runtime) = self.runtime.get() {
            nature::set_wall_clock(runtime, off_seconds);
        }
    }

    /// Why the node stopped by itself.
    pub(crate) fn stopped(&self) -> Option<String> {
        self.stopped.borrow().clone()
    }

    /// Lets go of the node, before its host is crashed.
    pub(crate) fn forget(&self) {
        *self.node.borrow_mut() = None;
        *self.stopped.borrow_mut() = None;
    }

    /// How the replica of a group looks, if there is one.
    pub(crate) fn status(&self, group: GroupId) -> Option<GroupStatus> {
        let node = self.node.borrow().clone()?;
        if group == GroupId(0) {
            return node.coordinator().group().map(|group| group.status());
        }
        node.participant().group(ShardId(group.0)).map(|group| group.status())
    }
}
