//! Which node a shard's messages go to: what the router believes, without any connection.
//!
//! Any voter of a shard may lead it. A shard has one believed leader at a time; a node that says it doesn't lead, a
//! broken stream or a long silence moves the belief on. After each move everything is sent again, so a wrong belief costs time and
//! nothing else.
//!
//! - Only what the present node of a shard says about leading it counts: answers to what was sent earlier to another node don't.
//! - The first redirection with a hint is followed at once. The next ones, and those without a hint, wait a little longer each
//!   time, so that two nodes that point at each other are not asked in a tight loop.
//! - A node whose stream has just broken is not asked for a short time, whoever hints at it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use verdict_protocol::ids::{NodeId, ShardId};

/// The pause after the first redirection that isn't followed at once; it grows with each one...
const PAUSE: Duration = Duration::from_millis(20);
/// ...up to this.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// How long a node is left alone after its stream broke.
const DOWN: Duration = Duration::from_millis(200);
/// After this time without any word from a shard that was asked, another node is tried.
const SILENT: Duration = Duration::from_millis(1500);

/// The believed leaders of all shards.
#[derive(Debug)]
pub(crate) struct Routes {
    nodes: BTreeSet<NodeId>,
    /// The nodes that are asked in turn, for each shard.
    voters: BTreeMap<ShardId, Vec<NodeId>>,
    shards: BTreeMap<ShardId, Route>,
    /// Nodes whose streams broke lately, and until when they are left alone.
    down: BTreeMap<NodeId, Instant>,
}

#[derive(Debug)]
struct Route {
    node: NodeId,
    /// Redirections since the shard was last heard.
    redirects: u32,
    /// Set: nothing is sent before this time.
    ready_at: Option<Instant>,
    /// When the shard was asked first since it was last heard.
    asked_at: Option<Instant>,
}

impl Routes {
    /// Starts with `first`, which is asked to begin with about every shard in which it votes. A shard without voters here has one on
    /// every node.
    pub(crate) fn new(
        nodes: BTreeSet<NodeId>,
        voters: BTreeMap<ShardId, Vec<NodeId>>,
        first: NodeId,
        shards: impl Iterator<Item = ShardId>,
    ) -> Routes {
        let mut routes = Routes { nodes, voters, shards: BTreeMap::new(), down: BTreeMap::new() };
        for shard in shards {
            let candidates = routes.candidates(shard);
            let node = if candidates.contains(&first) { first } else { candidates[0] };
            routes.shards.insert(shard, Route { node, redirects: 0, ready_at: None, asked_at: None });
        }
        routes
    }

    /// The members have changed.
    pub(crate) fn update(
        &mut self,
        nodes: BTreeSet<NodeId>,
        voters: BTreeMap<ShardId, Vec<NodeId>>,
        now: Instant,
    ) {
        (self.nodes, self.voters) = (nodes, voters);
        let gone: Vec<ShardId> = self
            .shards
            .iter()
            .filter(|(_, route)| !self.nodes.contains(&route.node))
            .map(|(shard, _)| *shard)
            .collect();
        for shard in gone {
            let node = self.candidates(shard)[0];
            self.shards.insert(shard, Route { node, redirects: 1, ready_at: Some(now), asked_at: None });
        }
    }

    /// The nodes to be asked about a shard.
    fn candidates(&self, shard: ShardId) -> Vec<NodeId> {
        let voters = self.voters.get(&shard).filter(|voters| !voters.is_empty());
        let candidates = voters.cloned().unwrap_or_else(|| self.nodes.iter().copied().collect());
        assert!(!candidates.is_empty(), "a cluster has nodes");
        candidates
    }

    /// Forgets what was awaited, but not who leads: for a new epoch.
    pub(crate) fn restart(&mut self) {
        self.down.clear();
        for route in self.shards.values_mut() {
            (route.redirects, route.ready_at, route.asked_at) = (0, None, None);
        }
    }

    /// Where a message for the shard goes now; nowhere while the route has to wait.
    pub(crate) fn of(&mut self, shard: ShardId, now: Instant) -> Option<NodeId> {
        let route = self.shards.get_mut(&shard)?;
        if route.ready_at.is_some() {
            return None;
        }
        route.asked_at.get_or_insert(now);
        Some(route.node)
    }

    /// The shard has answered through this node.
    pub(crate) fn heard(&mut self, node: NodeId, shard: ShardId) {
        if let Some(route) = self.shards.get_mut(&shard)
            && route.node == node
        {
            route.redirects = 0;
            route.asked_at = None;
        }
    }

    /// A node says that it doesn't lead the shard. True: there is a new route, to be used at once.
    pub(crate) fn not_leader(
        &mut self,
        node: NodeId,
        shard: ShardId,
        hint: Option<NodeId>,
        now: Instant,
    ) -> bool {
        let Some(route) = self.shards.get(&shard) else { return false };
        if route.node != node || route.ready_at.is_some() {
            return false;
        }
        let redirects = route.redirects + 1;
        let hint =
            hint.filter(|hint| *hint != node && self.nodes.contains(hint) && !self.is_down(*hint, now));
        let to = hint.unwrap_or_else(|| self.after(node, shard, now));
        let at_once = hint.is_some() && redirects == 1;
        let ready_at = (!at_once).then(|| now + pause(redirects));
        self.shards.insert(shard, Route { node: to, redirects, ready_at, asked_at: None });
        at_once
    }

    /// The stream to a node broke: all its shards are asked elsewhere, after a pause.
    pub(crate) fn broken(&mut self, node: NodeId, now: Instant) {
        self.down.insert(node, now + DOWN);
        let there: Vec<(ShardId, u32)> = self
            .shards
            .iter()
            .filter(|(_, route)| route.node == node)
            .map(|(shard, route)| (*shard, route.redirects + 1))
            .collect();
        for (shard, redirects) in there {
            let (node, ready_at) = (self.after(node, shard, now), Some(now + pause(redirects)));
            self.shards.insert(shard, Route { node, redirects, ready_at, asked_at: None });
        }
    }

    /// The shards that have a new route since the last call.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<ShardId> {
        self.down.retain(|_, until| *until > now);
        let silent: Vec<ShardId> = self
            .shards
            .iter()
            .filter(|(_, route)| route.asked_at.is_some_and(|asked| now >= asked + SILENT))
            .map(|(shard, _)| *shard)
            .collect();
        for shard in silent {
            let node = self.shards[&shard].node;
            let redirects = self.shards[&shard].redirects + 1;
            let to = self.after(node, shard, now);
            self.shards.insert(shard, Route { node: to, redirects, ready_at: Some(now), asked_at: None });
        }
        let mut due = Vec::new();
        for (shard, route) in &mut self.shards {
            if route.ready_at.is_some_and(|at| at <= now) {
                if self.down.contains_key(&route.node) {
                    continue;
                }
                route.ready_at = None;
                due.push(*shard);
            }
        }
        due
    }

    /// The next voter in order that isn't down; the next one at all if all are.
    fn after(&self, node: NodeId, shard: ShardId, now: Instant) -> NodeId {
        let nodes = self.candidates(shard);
        let place = nodes.iter().position(|known| *known == node).map_or(0, |place| place + 1);
        let mut others = (0..nodes.len()).map(|step| nodes[(place + step) % nodes.len()]);
        let first = others.clone().next().expect("a shard has voters");
        others.find(|other| !self.is_down(*other, now)).unwrap_or(first)
    }

    fn is_down(&self, node: NodeId, now: Instant) -> bool {
        self.down.get(&node).is_some_and(|until| *until > now)
    }
}

fn pause(redirects: u32) -> Duration {
    (PAUSE * redirects).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(1);

    fn routes() -> (Routes, Instant) {
        let nodes = (1..=3).map(NodeId).collect();
        (Routes::new(nodes, BTreeMap::new(), NodeId(1), [SHARD].into_iter()), Instant::now())
    }

    fn later(now: Instant, ms: u64) -> Instant {
        now + Duration::from_millis(ms)
    }

    #[test]
    fn the_first_hint_is_followed_at_once() {
        let (mut routes, now) = routes();
        assert_eq!(routes.of(SHARD, now), Some(NodeId(1)));
        assert!(routes.not_leader(NodeId(1), SHARD, Some(NodeId(3)), now));
        assert_eq!(routes.of(SHARD, now), Some(NodeId(3)));
        assert!(
            !routes.not_leader(NodeId(1), SHARD, Some(NodeId(2)), now),
            "a late answer of the node before"
        );
        assert_eq!(routes.of(SHARD, now), Some(NodeId(3)));
    }

    #[test]
    fn nodes_that_point_at_each_other_are_asked_with_pauses() {
        let (mut routes, now) = routes();
        assert!(routes.not_leader(NodeId(1), SHARD, Some(NodeId(2)), now));
        assert!(!routes.not_leader(NodeId(2), SHARD, Some(NodeId(1)), now));
        assert_eq!(routes.of(SHARD, now), None);
        assert!(routes.due(now).is_empty());
        assert_eq!(routes.due(later(now, 50)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(1)));
        routes.heard(NodeId(1), SHARD);
        assert!(routes.not_leader(NodeId(1), SHARD, Some(NodeId(2)), now), "the count starts again");
    }

    #[test]
    fn without_a_hint_the_nodes_are_asked_in_turn() {
        let (mut routes, mut now) = routes();
        for next in [2, 3, 1, 2] {
            let node = routes.of(SHARD, now).unwrap();
            assert!(!routes.not_leader(node, SHARD, None, now));
            now = later(now, 50);
            assert_eq!(routes.due(now), vec![SHARD]);
            assert_eq!(routes.of(SHARD, now), Some(NodeId(next)));
        }
    }

    #[test]
    fn a_broken_node_is_left_alone_for_a_while_even_if_hinted_at() {
        let (mut routes, now) = routes();
        routes.broken(NodeId(1), now);
        assert_eq!(routes.of(SHARD, now), None);
        assert_eq!(routes.due(later(now, 50)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(2)));
        assert!(!routes.not_leader(NodeId(2), SHARD, Some(NodeId(1)), later(now, 60)));
        assert_eq!(routes.due(later(now, 120)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(3)));
        assert!(!routes.not_leader(NodeId(3), SHARD, Some(NodeId(1)), later(now, 300)), "up again");
        assert_eq!(routes.due(later(now, 350)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(1)));
    }

    #[test]
    fn a_single_node_is_asked_again_after_its_stream_broke() {
        let now = Instant::now();
        let mut routes = Routes::new([NodeId(7)].into(), BTreeMap::new(), NodeId(7), [SHARD].into_iter());
        routes.broken(NodeId(7), now);
        assert!(routes.due(later(now, 100)).is_empty());
        assert_eq!(routes.due(later(now, 250)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(7)));
    }

    #[test]
    fn a_silent_node_is_given_up() {
        let (mut routes, now) = routes();
        assert_eq!(routes.of(SHARD, now), Some(NodeId(1)));
        assert!(routes.due(later(now, 1400)).is_empty());
        assert_eq!(routes.due(later(now, 1600)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, later(now, 1600)), Some(NodeId(2)));
        routes.heard(NodeId(2), SHARD);
        assert!(routes.due(later(now, 9000)).is_empty(), "nobody asked it since");
    }

    #[test]
    fn only_voters_are_asked_in_turn_and_members_may_change() {
        let now = Instant::now();
        let nodes = |ids: &[u64]| ids.iter().map(|id| NodeId(*id)).collect::<BTreeSet<_>>();
        let voters = |ids: &[u64]| [(SHARD, ids.iter().map(|id| NodeId(*id)).collect())].into();
        let mut routes = Routes::new(nodes(&[1, 2, 3, 4]), voters(&[2, 3]), NodeId(1), [SHARD].into_iter());
        assert_eq!(routes.of(SHARD, now), Some(NodeId(2)), "node 1 has no replica");
        assert!(!routes.not_leader(NodeId(2), SHARD, None, now));
        assert_eq!(routes.due(later(now, 50)), vec![SHARD]);
        assert_eq!(routes.of(SHARD, now), Some(NodeId(3)));
        routes.update(nodes(&[1, 2, 4]), voters(&[2, 4]), now);
        assert_eq!(routes.due(now), vec![SHARD], "node 3 is gone, so all is sent again");
        assert_eq!(routes.of(SHARD, now), Some(NodeId(2)));
        routes.heard(NodeId(2), SHARD);
        assert!(routes.not_leader(NodeId(2), SHARD, Some(NodeId(4)), now));
        assert_eq!(routes.of(SHARD, now), Some(NodeId(4)));
    }
}
