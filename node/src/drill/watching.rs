//! Asks the nodes about themselves while a drill runs: what is in doubt, what waits, which hashes they show.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::time::sleep;
use verdict_client::{Client, Options};
use verdict_proto::v1::{GroupStatus, ReplicaRole};

use super::{
    load::Load,
    record::{Doubt, Sample},
};

/// How often each node is asked.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_millis(700);
/// How long the list of parts in doubt may take: the node that makes it gives each other one a second, a dead one too.
const LIST_PATIENCE: Duration = Duration::from_millis(1500);
/// Parts that are listed for each shard, at most.
const PARTS_MAX: u32 = 10_000;

/// What was seen.
#[derive(Debug, Default)]
pub struct Watched {
    /// What the nodes said.
    pub samples: Vec<Sample>,
    /// What was in doubt.
    pub doubts: Vec<Doubt>,
    /// The hashes, by group and index, with the nodes that showed them.
    pub hashes: BTreeMap<(u32, u64), BTreeMap<String, BTreeSet<u64>>>,
}

/// Watches until it is ended.
pub struct Watch<'a> {
    /// The nodes, and where this program reaches them.
    pub nodes: &'a [(u64, String)],
    /// The nodes that can't take part at the moment: what they tell about others is old.
    pub impaired: &'a Mutex<BTreeSet<u64>>,
    /// Tells the memory of a node.
    pub memory: &'a (dyn Fn(u64) -> Option<u64> + Sync),
    /// The load, for its clock.
    pub load: &'a Load<'a>,
    /// Whether it is over.
    pub ended: &'a AtomicBool,
}

impl Watch<'_> {
    /// Watches.
    pub async fn run(&self) -> anyhow::Result<Watched> {
        let clients = self.clients(PATIENCE)?;
        let listing = self.clients(LIST_PATIENCE)?;
        let watched = Mutex::new(Watched::default());
        let nodes = clients.iter().map(|(node, client)| self.watch_node(*node, client, &watched));
        tokio::join!(join_all(nodes), self.watch_doubts(&listing, &watched));
        Ok(watched.into_inner().expect("nothing panics while it holds this lock"))
    }

    /// A client of each node alone.
    fn clients(&self, patience: Duration) -> anyhow::Result<Vec<(u64, Client)>> {
        let options = Options { timeout: patience, try_timeout: patience, ..Options::default() };
        let client = |(node, address): &(u64, String)| {
            Ok((*node, Client::connect([address.clone()], options.clone())?))
        };
        self.nodes.iter().map(client).collect()
    }

    async fn watch_node(&self, node: u64, client: &Client, watched: &Mutex<Watched>) {
        while !self.ended.load(Ordering::Relaxed) {
            let began = Instant::now();
            if let Ok(status) = client.status_of(&client.addresses()[0]).await
                && let Some(status) = status.nodes.into_iter().find(|status| status.node_id == node)
            {
                let mut sample =
                    Sample { at: self.load.now(), node, memory: (self.memory)(node), ..Sample::default() };
                let mut watched = watched.lock().expect("nothing panics while it holds this lock");
                for group in &status.groups {
                    add_group(&mut sample, group);
                    let shown = watched.hashes.entry((group.group_id, group.state_hash_index)).or_default();
                    shown.entry(group.state_hash.clone()).or_default().insert(node);
                }
                watched.samples.push(sample);
            }
            sleep(INTERVAL.saturating_sub(began.elapsed())).await;
        }
    }

    /// Asks one node after the other for the list, until one has asked all shards.
    async fn watch_doubts(&self, clients: &[(u64, Client)], watched: &Mutex<Watched>) {
        let mut place = 0;
        while !self.ended.load(Ordering::Relaxed) {
            let began = Instant::now();
            let at = self.load.now();
            let mut doubt = Doubt { at, ..Doubt::default() };
            for _ in 0..clients.len() {
                let (node, client) = &clients[place % clients.len()];
                let impaired =
                    self.impaired.lock().expect("nothing panics while it holds this lock").contains(node);
                if !impaired && let Some(since) = self.ask(client).await {
                    doubt = Doubt { at, since, complete: true };
                    break;
                }
                place += 1;
            }
            watched.lock().expect("nothing panics while it holds this lock").doubts.push(doubt);
            sleep(INTERVAL.saturating_sub(began.elapsed())).await;
        }
    }

    async fn ask(&self, client: &Client) -> Option<Vec<f64>> {
        let list = client.list_in_doubt(PARTS_MAX).await.ok()?;
        if !list.unreachable_shards.is_empty() {
            return None;
        }
        let (now, voted) = (self.load.now(), list.parts.iter().filter(|part| !part.waiting));
        Some(voted.map(|part| now - part.age_ms as f64 / 1000.0).collect())
    }
}

fn add_group(sample: &mut Sample, group: &GroupStatus) {
    // Followers know of a decision later, which says nothing about who is blocked.
    if group.role() == ReplicaRole::Leader {
        sample.in_doubt += group.in_doubt;
        sample.waiting += group.waiting;
        sample.unfinished += group.unfinished;
    }
}
