//! Who must have come before whom, and whether that is possible.

use std::collections::{BTreeMap, VecDeque};

/// Why one transaction must have come before another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// Both wrote a key, in this order.
    WriteWrite,
    /// The second read what the first had written.
    WriteRead,
    /// The first did not see what the second wrote.
    ReadWrite,
    /// The first had ended before the second began.
    RealTime,
}

/// Transactions, and moments between them.
///
/// Real time orders nearly all pairs of a long history. So that not every pair needs an edge, each end of a transaction is a node
/// too, a *moment*: transaction, its moment, the next moment, and so on, and from the last moment before a transaction
/// began to that transaction.
#[derive(Debug)]
pub(crate) struct Graph {
    transactions: usize,
    edges: Vec<Vec<(usize, Why)>>,
}

impl Graph {
    pub(crate) fn new(transactions: usize) -> Graph {
        Graph { transactions, edges: vec![Vec::new(); transactions] }
    }

    /// `before` must have come before `after`.
    pub(crate) fn add(&mut self, before: usize, after: usize, why: Why) {
        if before != after {
            self.edges[before].push((after, why));
        }
    }

    /// Real time: `spans` are the transactions that count, with beginning and end.
    pub(crate) fn add_real_time(&mut self, spans: &[(usize, u64, Option<u64>)]) {
        let mut ends: Vec<(u64, usize)> =
            spans.iter().filter_map(|(node, _, end)| Some(((*end)?, *node))).collect();
        ends.sort_unstable();
        let first = self.edges.len();
        for (place, (_, node)) in ends.iter().enumerate() {
            self.edges.push(Vec::new());
            self.edges[*node].push((first + place, Why::RealTime));
            if place > 0 {
                self.edges[first + place - 1].push((first + place, Why::RealTime));
            }
        }
        for (node, begin, _) in spans {
            let ended = ends.partition_point(|(end, _)| end < begin);
            if ended > 0 {
                self.edges[first + ended - 1].push((*node, Why::RealTime));
            }
        }
    }

    /// How many edges of each kind there are between transactions; real time has those of its moments.
    pub(crate) fn count(&self) -> BTreeMap<Why, usize> {
        let mut count = BTreeMap::new();
        for (_, why) in self.edges.iter().flatten() {
            *count.entry(*why).or_default() += 1;
        }
        count
    }

    /// A cycle in each strongly connected component that has one: transactions, each with why it comes before the next.
    pub(crate) fn cycles(&self) -> Vec<Vec<(usize, Why)>> {
        let component = self.components();
        let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (node, its) in component.iter().enumerate().take(self.transactions) {
            members.entry(*its).or_default().push(node);
        }
        let cyclic = members.into_values().filter(|nodes| nodes.len() > 1);
        cyclic.map(|nodes| self.shortest_cycle(&nodes, &component)).collect()
    }

    /// The number of the strongly connected component of each node: Tarjan's algorithm (SIAM Journal on Computing 1972), with a
    /// stack of its own, since histories are longer than the machine's.
    fn components(&self) -> Vec<usize> {
        const NONE: usize = usize::MAX;
        let count = self.edges.len();
        let (mut index, mut low, mut component) = (vec![NONE; count], vec![0; count], vec![NONE; count]);
        let (mut next, mut components) = (0, 0);
        let mut open: Vec<usize> = Vec::new();
        let mut calls: Vec<(usize, usize)> = Vec::new();
        for root in 0..count {
            if index[root] != NONE {
                continue;
            }
            calls.push((root, 0));
            while let Some((node, edge)) = calls.pop() {
                if edge == 0 {
                    (index[node], low[node]) = (next, next);
                    next += 1;
                    open.push(node);
                }
                if let Some((target, _)) = self.edges[node].get(edge) {
                    calls.push((node, edge + 1));
                    if index[*target] == NONE {
                        calls.push((*target, 0));
                    } else if component[*target] == NONE {
                        low[node] = low[node].min(index[*target]);
                    }
                    continue;
                }
                if low[node] == index[node] {
                    while let Some(member) = open.pop() {
                        component[member] = components;
                        if member == node {
                            break;
                        }
                    }
                    components += 1;
                }
                if let Some((caller, _)) = calls.last() {
                    low[*caller] = low[*caller].min(low[node]);
                }
            }
        }
        component
    }

    /// The shortest cycle through one of these nodes of a component, moments left out.
    fn shortest_cycle(&self, nodes: &[usize], component: &[usize]) -> Vec<(usize, Why)> {
        const ROOTS: usize = 50; // enough to find a short one
        let cycles = nodes.iter().take(ROOTS).map(|root| self.cycle_through(*root, component));
        cycles.min_by_key(Vec::len).expect("a component has a node")
    }

    fn cycle_through(&self, root: usize, component: &[usize]) -> Vec<(usize, Why)> {
        let mut from: BTreeMap<usize, (usize, Why)> = BTreeMap::new();
        let mut queue = VecDeque::from([root]);
        'search: while let Some(node) = queue.pop_front() {
            for (target, why) in &self.edges[node] {
                if component[*target] == component[root] && !from.contains_key(target) {
                    from.insert(*target, (node, *why));
                    if *target == root {
                        break 'search;
                    }
                    queue.push_back(*target);
                }
            }
        }
        let mut path = Vec::new();
        let mut node = root;
        loop {
            let (before, why) = from[&node];
            if before < self.transactions {
                path.push((before, why));
            }
            node = before;
            if node == root {
                break;
            }
        }
        path.reverse();
        path
    }
}
