//! Which node a shard's messages go to: what the router believes, without any connection.
//!
//! Every node of the cluster may lead every shard. A shard has one believed leader at a time; a node that says it doesn't lead, a
//! broken stream or a long silence moves the belief on. After each move everything is sent again, so a wrong belief costs time and
//! nothing else.
//!
//! - Only what the present node of a shard says about leading it counts: answers to what was sent earlier to another node don't.
//! - The first redirection with a hint is followed at once. The next ones, and those without a hint, wait a little longer each
//!   time, so that two nodes that point at each other are not asked in a tight loop.
//! - A node whose stream has just broken is not asked for a short time, whoever hints at it.

use std::{
    collections::BTreeMap,
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
    nodes: Vec<NodeId>,
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
    /// Starts with `first`, which is asked about every shard to begin with.
    pub(crate) fn new(
        nodes: impl IntoIterator<Item = NodeId>,
        first: NodeId,
        shards: impl Iterator<Item = ShardId>,
    ) -> Routes {
        let nodes: Vec<NodeId> = nodes.into_iter().collect();
        assert!(!nodes.is_empty(), "a cluster has nodes");
        let first = if nodes.contains(&first) { first } else { nodes[0] };
        let route = |shard| (shard, Route { node: first, redirects: 0, ready_at: None, asked_at: None });
        Routes { nodes, shards: shards.map(route).collect(), down: BTreeMap::new() }
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
        let to = hint.unwrap_or_else(|| self.after(node, now));
        let at_once = hint.is_some() && redirects == 1;
        let ready_at = (!at_once).then(|| now + pause(redirects));
        self.shards.insert(shard, Route { node: to, redirects, ready_at, asked_at: None });
        at_once
    }

    /// The stream to a node broke: all its shards are asked elsewhere, after a pause.
    pub(crate) fn broken(&mut self, node: NodeId, now: Instant) {
        self.down.insert(node, now + DOWN);
        let to = self.after(node, now);
        for route in self.shards.values_mut().filter(|route| route.node == node) {
            let redirects = route.redirects + 1;
            *route = Route { node: to, redirects, ready_at: Some(now + pause(redirects)), asked_at: None };
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
            let to = self.after(node, now);
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

    /// The next node in order that isn't down; the next one at all if all are.
    fn after(&self, node: NodeId, now: Instant) -> NodeId {
        let place = self.nodes.iter().position(|known| *known == node).unwrap_or(0);
        let mut others = (1..=self.nodes.len()).map(|step| self.nodes[(place + step) % self.nodes.len()]);
        let first = others.clone().next().expect("a cluster has nodes");
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
        (Routes::new([NodeId(1), NodeId(2), NodeId(3)], NodeId(1), [SHARD].into_iter()), Instant::now())
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
        let mut routes = Routes::new([NodeId(7)], NodeId(7), [SHARD].into_iter());
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
}
