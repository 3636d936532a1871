//! Strict serializability of transactions that read lists and append to them, inferred from what was read.
//!
//! A list tells its whole past: who reads `[1, 2]` knows that 1 was appended before 2, and that no 3 was there yet. From this
//! follow the edges of Adya's dependency graph (Weak Consistency, MIT 1999, section 3.1): write-write, write-read and
//! read-write; real time adds its own. The history is strictly serializable if there is no cycle and if nothing was read
//! that can't have been there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{
    graph::{Graph, Why},
    record::{Fate, Key, List, Transaction},
};

/// What is wrong with a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// An element was read that an aborted transaction had appended.
    Aborted(String),
    /// A transaction's appends to one key were seen in part.
    Partial(String),
    /// An element was read that nobody has appended, or twice in a list.
    Made(String),
    /// Two reads of a key don't agree about its past.
    Order(String),
    /// Each of these transactions must have come before the next, and the last before the first.
    Cycle(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, what) = match self {
            Violation::Aborted(what) => ("aborted read", what),
            Violation::Partial(what) => ("partial read", what),
            Violation::Made(what) => ("impossible read", what),
            Violation::Order(what) => ("incompatible order", what),
            Violation::Cycle(what) => ("cycle", what),
        };
        write!(f, "{name}: {what}")
    }
}

/// What a check has looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Transactions in the order: committed ones, and those of unknown fate whose appends were read.
    pub transactions: usize,
    /// Of these, the ones of unknown fate.
    pub unknown: usize,
    /// Dependencies between transactions, without those of real time.
    pub dependencies: usize,
}

/// Checks a history. Elements must be unique in the whole history.
pub fn check(history: &[Transaction<List>]) -> Result<Summary, Vec<Violation>> {
    let mut violations = Vec::new();
    let appenders = appenders(history);
    let reads = || {
        let committed = history.iter().enumerate().filter(|(_, one)| one.fate == Fate::Committed);
        committed.flat_map(|(number, one)| one.reads.iter().map(move |(key, list)| (number, *key, list)))
    };

    // What can't have been there; and the longest list of each key, which all others must be the beginning of.
    let mut longest: BTreeMap<Key, (usize, &List)> = BTreeMap::new();
    for (reader, key, list) in reads() {
        violations.extend(impossible(history, &appenders, reader, key, list));
        let known = longest.entry(key).or_insert((reader, list));
        let (short, long) =
            if list.len() > known.1.len() { (*known, (reader, list)) } else { ((reader, list), *known) };
        if !long.1.starts_with(short.1) {
            violations.push(Violation::Order(format!(
                "T{} read key {key} as {:?}, T{} as {:?}",
                short.0, short.1, long.0, long.1
            )));
        }
        *known = long;
    }
    if !violations.is_empty() {
        return Err(violations);
    }

    // Those that took effect. A commit that no read has seen comes after all that was seen.
    let seen: BTreeSet<u64> = longest.values().flat_map(|(_, list)| list.iter().copied()).collect();
    let in_effect = |number: usize| {
        let one = &history[number];
        one.fate == Fate::Committed
            || one.fate == Fate::Unknown && one.writes.iter().any(|(_, element)| seen.contains(element))
    };
    let mut unseen: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
    for (number, one) in history.iter().enumerate().filter(|(number, _)| in_effect(*number)) {
        for (key, element) in &one.writes {
            if !seen.contains(element) {
                unseen.entry(*key).or_default().push(number);
            }
        }
    }
    let empty = List::new();
    let order = |key: Key| longest.get(&key).map_or(&empty, |(_, list)| *list);
    let none = Vec::new();
    let unseen = |key: Key| unseen.get(&key).unwrap_or(&none);

    let mut graph = Graph::new(history.len());
    let keys: BTreeSet<Key> = history.iter().flat_map(|one| one.writes.iter().map(|(key, _)| *key)).collect();
    for key in keys {
        for pair in order(key).windows(2) {
            graph.add(appenders[&pair[0]], appenders[&pair[1]], Why::WriteWrite);
        }
        if let Some(last) = order(key).last() {
            for writer in unseen(key) {
                graph.add(appenders[last], *writer, Why::WriteWrite);
            }
        }
    }
    for (reader, key, list) in reads() {
        if let Some(last) = list.last() {
            graph.add(appenders[last], reader, Why::WriteRead);
        }
        match order(key).get(list.len()) {
            Some(next) => graph.add(reader, appenders[next], Why::ReadWrite),
            None => unseen(key).iter().for_each(|writer| graph.add(reader, *writer, Why::ReadWrite)),
        }
    }
    let dependencies = graph.count().values().sum();

    let spans: Vec<_> = (0..history.len())
        .filter(|number| in_effect(*number))
        .map(|number| {
            let one = &history[number];
            (number, one.invoked, one.completed.filter(|_| one.fate == Fate::Committed))
        })
        .collect();
    graph.add_real_time(&spans);
    let cycles = graph.cycles();
    if !cycles.is_empty() {
        return Err(cycles.iter().map(|cycle| Violation::Cycle(tell(history, cycle))).collect());
    }
    let unknown = spans.iter().filter(|(number, ..)| history[*number].fate == Fate::Unknown).count();
    Ok(Summary { transactions: spans.len(), unknown, dependencies })
}

/// Who appended each element.
fn appenders(history: &[Transaction<List>]) -> BTreeMap<u64, usize> {
    let mut appenders = BTreeMap::new();
    for (number, one) in history.iter().enumerate() {
        for (_, element) in &one.writes {
            let other = appenders.insert(*element, number);
            assert!(other.is_none(), "element {element} is appended twice: the history can't be checked");
        }
    }
    appenders
}

/// What is wrong with one list by itself.
fn impossible(
    history: &[Transaction<List>],
    appenders: &BTreeMap<u64, usize>,
    reader: usize,
    key: Key,
    list: &List,
) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut met = BTreeSet::new();
    for (place, element) in list.iter().enumerate() {
        let told = format!("T{reader} read key {key} as {list:?}");
        let writer = appenders.get(element).copied();
        let Some(writer) = writer.filter(|writer| history[*writer].writes.contains(&(key, *element))) else {
            violations.push(Violation::Made(format!("{told}, but nobody has appended {element} to it")));
            continue;
        };
        if !met.insert(element) {
            violations.push(Violation::Made(format!("{told}: {element} is in it twice")));
        }
        if writer == reader {
            violations.push(Violation::Made(format!("{told}, but it appended {element} itself, later")));
        }
        if history[writer].fate == Fate::Aborted {
            violations.push(Violation::Aborted(format!(
                "{told}, but T{writer}, which appended {element}, was aborted"
            )));
        }
        // Appends of one transaction to one key stand together, all of them.
        let own: List =
            history[writer].writes.iter().filter(|(at, _)| *at == key).map(|(_, own)| *own).collect();
        let first = own.iter().position(|own| own == element).unwrap_or_default();
        let whole = place >= first && list[place - first..].starts_with(&own);
        if !whole {
            violations
                .push(Violation::Partial(format!("{told}, but T{writer} appended {own:?} in one piece")));
        }
    }
    violations
}

fn tell(history: &[Transaction<List>], cycle: &[(usize, Why)]) -> String {
    let mut text = String::new();
    for (place, (number, why)) in cycle.iter().enumerate() {
        let next = cycle[(place + 1) % cycle.len()].0;
        let why = match why {
            Why::WriteWrite => "appended before",
            Why::WriteRead => "was seen by",
            Why::ReadWrite => "did not see",
            Why::RealTime => "had ended before the begin of",
        };
        text.push_str(&format!("\n  T{number} {why} T{next}"));
    }
    for (number, _) in cycle {
        let one = &history[*number];
        text.push_str(&format!(
            "\n  T{number}: process {}, {} to {:?}, {:?} at {:?}, read {:?}, appended {:?}",
            one.process, one.invoked, one.completed, one.fate, one.position, one.reads, one.writes
        ));
    }
    text
}
