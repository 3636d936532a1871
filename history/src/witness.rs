//! Strict serializability by the order that the database itself claims.
//!
//! A committed batch has a stamp, a read has a position, and both say: "this is where I stand". So nothing is inferred: the history
//! is run through a sequential model in that order, and must give what was read, and the order must agree with real time.

use std::collections::BTreeMap;

use crate::record::{Cell, Fate, Key, Transaction, apply};

/// What a check has looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Transactions that wrote.
    pub writers: usize,
    /// Values that were compared with the model's.
    pub values: usize,
}

/// Checks a history in which every fate is known, and gives the final state. `start` is what the keys held before it.
pub fn check<C: Cell>(
    start: &BTreeMap<Key, C>,
    history: &[Transaction<C>],
) -> Result<(Summary, BTreeMap<Key, C>), Vec<String>> {
    let mut wrong = Vec::new();
    let mut order = Vec::new();
    for (number, one) in history.iter().enumerate() {
        match (one.fate, one.position) {
            (Fate::Committed, Some(position)) => order.push((position, one.writes.is_empty(), number)),
            (Fate::Committed, None) => wrong.push(format!("T{number} was committed without a position")),
            (Fate::Aborted, _) => {}
            (Fate::Unknown, _) => wrong.push(format!("nobody has told what became of T{number}")),
        }
    }
    // At one position: the one that wrote there, then those that read there, which see it.
    order.sort_unstable();
    for pair in order.windows(2) {
        if let [(position, false, one), (same, false, other)] = pair
            && position == same
        {
            wrong.push(format!("T{one} and T{other} have one stamp, {position}"));
        }
    }
    let mut state = start.clone();
    let mut summary = Summary::default();
    for (position, _, number) in &order {
        let one = &history[*number];
        for (key, value) in &one.reads {
            let expected = state.get(key).cloned().unwrap_or_default();
            summary.values += 1;
            if expected != *value {
                wrong.push(format!(
                    "T{number} at {position} read key {key} as {value:?}, but it held {expected:?}"
                ));
            }
        }
        summary.writers += usize::from(!one.writes.is_empty());
        apply(&mut state, one);
    }
    wrong.extend(against_real_time(history, &order));
    if wrong.is_empty() { Ok((summary, state)) } else { Err(wrong) }
}

/// Whoever began after another had ended stands behind it.
fn against_real_time<C: Cell>(history: &[Transaction<C>], order: &[(u64, bool, usize)]) -> Vec<String> {
    let mut events = Vec::new();
    for (place, (_, _, number)) in order.iter().enumerate() {
        let one = &history[*number];
        events.push((one.invoked, true, place));
        events.extend(one.completed.map(|completed| (completed, false, place)));
    }
    events.sort_unstable();
    let mut wrong = Vec::new();
    let mut latest: Option<usize> = None;
    let mut bound: BTreeMap<usize, Option<usize>> = BTreeMap::new();
    for (_, begins, place) in events {
        if begins {
            bound.insert(place, latest);
            continue;
        }
        latest = latest.max(Some(place));
    }
    for (place, before) in bound {
        let Some(before) = before else { continue };
        let ((earlier, earlier_reads, one), (later, later_reads, other)) = (order[before], order[place]);
        // Two reads at one position see the same, in whatever order they stand here.
        if place < before && !(earlier == later && earlier_reads && later_reads) {
            wrong.push(format!(
                "T{one} at {earlier} had ended before T{other} began, which stands at {later}"
            ));
        }
    }
    wrong
}
