//! What all parts of a host share: who this node is, whom it knows, whether it must stop.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, RwLock},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::watch;
use verdict_proto::{connect::Connect, v1};
use verdict_protocol::ids::{GroupId, NodeId};

use crate::{
    api::HostConfig,
    disk::{Identity, incarnation_key, seal},
    fatal::Fatal,
    gate::Gate,
    heard::Heard,
    peer::Peer,
    snapshot::{Sending, SnapshotFile},
    standing::{Greeted, Life, Standing, Standings, Start, standing_key},
    storage::Storage,
    writer::{Operation, Writer},
};

/// A replica, whatever its machine, as the transport sees it.
pub(crate) trait Endpoint: Send + Sync {
    /// Answers a request of another node. The request takes its place in line when the future is first polled.
    fn handle(&self, kind: u32, body: Bytes) -> BoxFuture<'static, Result<Vec<u8>, String>>;

    /// A name for a file that is being received.
    fn temporary(&self) -> std::path::PathBuf;

    /// Keeps the log behind the newest snapshot for as long as what is given lives.
    fn send_snapshot(&self) -> Sending;

    /// Installs a snapshot that was received whole.
    fn install(&self, vote: Bytes, file: SnapshotFile) -> BoxFuture<'static, Result<Vec<u8>, String>>;

    /// The connection from that node was lost.
    fn lost(&self, node: NodeId) -> BoxFuture<'static, ()>;

    /// Stops the replica, and lets go of the database.
    fn stop(&self) -> BoxFuture<'static, ()>;
}

/// Why another node isn't listened to.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It was configured for something else.
    Stranger(String),
    /// It has another disk than before, or an older copy of it.
    OtherDisk(String),
    /// It was removed from the cluster.
    Removed(String),
    /// This node has stopped.
    Stopped(String),
}

/// Whose disk this is, and what is known of the others'.
pub(crate) struct Disks {
    pub(crate) identity: Identity,
    /// The starts of its disk.
    pub(crate) life: Life,
    pub(crate) incarnations: BTreeMap<u64, Vec<u8>>,
    pub(crate) standings: Arc<Standings>,
}

/// What all parts of a host share.
pub(crate) struct Node {
    pub(crate) config: HostConfig,
    pub(crate) identity: Identity,
    /// The starts of its disk.
    pub(crate) life: Life,
    pub(crate) standings: Arc<Standings>,
    pub(crate) fatal: Fatal,
    pub(crate) writer: Writer,
    pub(crate) connect: Arc<dyn Connect>,
    pub(crate) storage: Arc<dyn Storage>,
    /// True once the host stops.
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) endpoints: RwLock<BTreeMap<GroupId, Arc<dyn Endpoint>>>,
    /// Nodes that were removed from the cluster: nobody listens to them.
    pub(crate) removed: watch::Sender<BTreeSet<NodeId>>,
    /// The nodes that have taken this one's greeting.
    accepted: watch::Sender<BTreeSet<u64>>,
    gates: Mutex<BTreeMap<GroupId, Gate>>,
    heard: Mutex<BTreeMap<GroupId, Arc<Heard>>>,
    known: Mutex<BTreeMap<u64, Vec<u8>>>,
    peers: Mutex<BTreeMap<u64, Arc<Peer>>>,
}

impl Node {
    pub(crate) fn new(
        config: HostConfig,
        disks: Disks,
        fatal: Fatal,
        writer: Writer,
        connect: Arc<dyn Connect>,
        storage: Arc<dyn Storage>,
    ) -> Node {
        Node {
            config,
            identity: disks.identity,
            life: disks.life,
            standings: disks.standings,
            fatal,
            writer,
            connect,
            storage,
            stop: watch::Sender::new(false),
            endpoints: RwLock::default(),
            removed: watch::Sender::default(),
            accepted: watch::Sender::default(),
            gates: Mutex::default(),
            heard: Mutex::default(),
            known: Mutex::new(disks.incarnations),
            peers: Mutex::default(),
        }
    }

    /// The greeting to `to`.
    pub(crate) fn hello(&self, to: u64) -> v1::Hello {
        v1::Hello {
            cluster: self.identity.cluster.clone(),
            node: self.identity.node,
            to,
            incarnation: self.identity.incarnation.clone().into(),
            start: self.life.now.number,
            nonce: self.life.now.nonce.to_vec().into(),
            past: self.life.past.iter().map(past_to_wire).collect(),
        }
    }

    /// A frame to another node. What it answers is on disk already: so `promises` counts it.
    pub(crate) fn frame(&self, hello: Option<v1::Hello>, messages: Vec<v1::RaftMessage>) -> v1::RaftFrame {
        v1::RaftFrame { hello, messages, promises: self.writer.promises() }
    }

    /// Another node has taken this one's greeting.
    pub(crate) fn accept(&self, id: u64) {
        self.accepted.send_if_modified(|accepted| accepted.insert(id));
    }

    /// Who has taken this node's greeting.
    pub(crate) fn accepted(&self) -> watch::Receiver<BTreeSet<u64>> {
        self.accepted.subscribe()
    }

    /// What keeps the replica of a group from voting.
    pub(crate) fn gate(&self, group: GroupId) -> Gate {
        lock(&self.gates).entry(group).or_insert_with(Gate::new).clone()
    }

    /// What the other replicas of a group have answered.
    pub(crate) fn heard(&self, group: GroupId) -> Arc<Heard> {
        lock(&self.heard).entry(group).or_default().clone()
    }

    /// Checks a greeting, and gives the start that speaks. The first incarnation of a node that was ever seen, and each of its starts,
    /// are remembered, durably, before anything else is heard from it.
    pub(crate) async fn check_hello(&self, hello: &v1::Hello) -> Result<Start, Refusal> {
        if let Some(message) = self.fatal.get() {
            return Err(Refusal::Stopped(message));
        }
        if hello.cluster != self.identity.cluster {
            return Err(Refusal::Stranger(format!(
                "node {} belongs to cluster {:?}, node {} to cluster {:?}",
                hello.node, hello.cluster, self.identity.node, self.identity.cluster
            )));
        }
        if hello.to != self.identity.node {
            return Err(Refusal::Stranger(format!(
                "node {} was reached where node {} was expected",
                self.identity.node, hello.to
            )));
        }
        if self.removed.borrow().contains(&NodeId(hello.node)) {
            return Err(Refusal::Removed(format!(
                "node {} was removed from the cluster, and its id is never used again",
                hello.node
            )));
        }
        let fresh = {
            let mut known = lock(&self.known);
            match known.get(&hello.node) {
                Some(incarnation) if *incarnation == hello.incarnation[..] => false,
                Some(_) => {
                    let why = format!("node {} came back with another disk", hello.node);
                    return Err(Refusal::OtherDisk(with_way_back(&why)));
                }
                None => {
                    known.insert(hello.node, hello.incarnation.to_vec());
                    true
                }
            }
        };
        let stopped = |error: io::Error| Refusal::Stopped(error.to_string());
        if fresh {
            let key = incarnation_key(hello.node);
            self.remember(&key, seal(&key, &hello.incarnation.to_vec())).await.map_err(stopped)?;
        }
        let told = life_from_wire(hello)
            .ok_or_else(|| Refusal::Stranger(format!("node {} speaks another version", hello.node)))?;
        let start = told.now;
        match self.standings.greeted(hello.node, &told) {
            Ok(Greeted::Known) => Ok(start),
            Ok(Greeted::Remember(standing)) => {
                let key = standing_key(hello.node);
                self.remember(&key, seal(&key, &standing)).await.map_err(stopped)?;
                self.standings.remembered(hello.node, start);
                Ok(start)
            }
            Err(why) => {
                let why = format!("an older copy of a disk: {why}");
                Err(Refusal::OtherDisk(with_way_back(&why)))
            }
        }
    }

    async fn remember(&self, key: &[u8], value: Vec<u8>) -> io::Result<()> {
        self.writer.perform(|done| Operation::Meta { key: key.to_vec(), value, done }).await
    }

    /// The way to another node. A new address replaces the old one.
    pub(crate) fn peer(self: &Arc<Node>, id: u64, address: &str) -> Arc<Peer> {
        let mut peers = lock(&self.peers);
        match peers.get(&id) {
            Some(peer) if peer.address() == address => peer.clone(),
            _ => {
                let peer = Peer::start(self.clone(), id, address);
                peers.insert(id, peer.clone());
                peer
            }
        }
    }

    /// The addresses of all nodes that this one has reason to talk to.
    pub(crate) fn addresses(&self) -> BTreeMap<NodeId, String> {
        let peers = lock(&self.peers);
        peers.iter().map(|(id, peer)| (NodeId(*id), peer.address().to_owned())).collect()
    }

    /// Forgets all peers, so that their tasks end.
    pub(crate) fn forget_peers(&self) {
        lock(&self.peers).clear();
    }

    /// The replica of a group.
    pub(crate) fn endpoint(&self, group: u32) -> Option<Arc<dyn Endpoint>> {
        let endpoints = self.endpoints.read().expect("nothing panics while it holds this lock");
        endpoints.get(&GroupId(group)).cloned()
    }

    /// All replicas, in the order of their groups.
    pub(crate) fn all_endpoints(&self) -> Vec<Arc<dyn Endpoint>> {
        let endpoints = self.endpoints.read().expect("nothing panics while it holds this lock");
        endpoints.values().cloned().collect()
    }
}

fn past_to_wire(past: &Standing) -> v1::PastStart {
    let Standing { start, promises } = past;
    v1::PastStart { start: start.number, nonce: start.nonce.to_vec().into(), promises: *promises }
}

fn life_from_wire(hello: &v1::Hello) -> Option<Life> {
    let start = |number, nonce: &[u8]| Some(Start { number, nonce: nonce.try_into().ok()? });
    let past = hello
        .past
        .iter()
        .map(|past| Some(Standing { start: start(past.start, &past.nonce)?, promises: past.promises }));
    Some(Life { now: start(hello.start, &hello.nonce)?, past: past.collect::<Option<_>>()? })
}

fn with_way_back(why: &str) -> String {
    format!(
        "{why}. It must not vote under this id again: remove it from the cluster, and add it under a new node id, with an empty data \
         folder"
    )
}

/// Waits until the host stops.
pub(crate) async fn stopping(mut stop: watch::Receiver<bool>) {
    // An error means that the host is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}
