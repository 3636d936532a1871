//! Tells a disk from an older copy of itself.
//!
//! A copy of a disk has the same identity. It lacks what the node promised after the copy was made: votes and entries. Nobody can
//! tell that from the copy alone, so the others remember:
//!
//! - which *start* of a node they have seen last. Every start of a process has a number, one above the last one on its disk, and a
//!   random nonce, and is synced before it is told.
//! - how many *promises* it has told in that start: batches of its log writer that held a vote, entries or a truncation, counted over
//!   all starts. Each frame says so after the sync of what it answers.
//!
//! A disk lists its starts, each with the promises that it held at the end of it. A node that comes back must list the start that was
//! seen last, with all the promises that were told then. What an older copy does later, and be it that it is started again and again,
//! makes neither come back.
//!
//! A start is remembered durably before anything else is heard. Promises are remembered in memory at once, and durably with the next
//! batch of the log, or after [`SAVE_AFTER`].
//!
//! No false alarm: a start and a promise are told only after they were synced, so neither a kill nor a loss of power takes them away.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, seal};

/// What was heard of others is made durable so soon if there is nothing else to write.
pub(crate) const SAVE_AFTER: Duration = Duration::from_secs(1);

/// So many starts are listed. Whoever has seen only older ones compares promises with the oldest one listed.
const PAST_MAX: usize = 1000;

/// The key in `meta` of this node's own starts.
const STARTS: &[u8] = &[0x04];
/// The key in `meta` of the number of promises.
pub(crate) const PROMISES: &[u8] = &[0x06];
/// The first byte of the keys in `meta` of what is known of others.
pub(crate) const STANDING: u8 = 0x05;

/// One start of a node's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Counts from 1.
    pub(crate) number: u64,
    pub(crate) nonce: [u8; 16],
}

/// How far a node is known to have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Standing {
    pub(crate) start: Start,
    pub(crate) promises: u64,
}

/// All starts of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    /// The present one.
    pub(crate) now: Start,
    /// Those before it, oldest first, and the promises that the disk held when the next one began.
    pub(crate) past: Vec<Standing>,
}

impl Life {
    /// Begins the next start of this disk, synced.
    pub(crate) fn begin(disk: &Disk) -> io::Result<Life> {
        let Life { now: before, mut past } = disk.read_meta(STARTS)?.unwrap_or_default();
        if before.number > 0 {
            past.push(Standing { start: before, promises: disk.read_meta(PROMISES)?.unwrap_or(0) });
        }
        past.drain(..past.len().saturating_sub(PAST_MAX));
        let now = Start { number: before.number + 1, nonce: *uuid::Uuid::new_v4().as_bytes() };
        let life = Life { now, past };
        disk.write_meta(STARTS, &life)?;
        Ok(life)
    }

    /// How the present start began.
    fn standing(&self) -> Standing {
        Standing { start: self.now, promises: self.past.last().map_or(0, |before| before.promises) }
    }

    /// Whether this is the disk that had come so far, in an earlier start.
    fn continues(&self, known: Standing) -> Result<(), String> {
        let listed = self.past.iter().find(|past| past.start == known.start);
        let oldest = self.past.first().filter(|past| past.start.number > known.start.number);
        match listed.or(oldest) {
            None => Err(format!(
                "it comes with start {}, and its disk knows nothing of start {} as it was seen",
                self.now.number, known.start.number
            )),
            Some(past) if past.promises < known.promises => Err(format!(
                "it had made {} batches of promises, and its disk holds only {}",
                known.promises, past.promises
            )),
            Some(_) => Ok(()),
        }
    }
}

/// What is known of all other nodes.
#[derive(Default)]
pub(crate) struct Standings {
    known: Mutex<BTreeMap<u64, Known>>,
}

struct Known {
    standing: Standing,
    /// What is on disk of it, or on its way there.
    saved: Option<Standing>,
    /// The start is on disk.
    durable: bool,
}

/// What to do with a node that has greeted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeted {
    /// It may speak.
    Known,
    /// It may speak once this is on disk.
    Remember(Standing),
}

impl Standings {
    pub(crate) fn new(known: BTreeMap<u64, Standing>) -> Standings {
        let known = known.into_iter();
        let known =
            known.map(|(node, standing)| (node, Known { standing, saved: Some(standing), durable: true }));
        Standings { known: Mutex::new(known.collect()) }
    }

    /// Compares a greeting with what is known. The error says why the node must not be heard.
    pub(crate) fn greeted(&self, node: u64, told: &Life) -> Result<Greeted, String> {
        let mut all = self.lock();
        if let Some(known) = all.get(&node) {
            if told.now == known.standing.start {
                return Ok(if known.durable { Greeted::Known } else { Greeted::Remember(known.standing) });
            }
            told.continues(known.standing).map_err(|why| format!("node {node}: {why}"))?;
        }
        let standing = told.standing();
        all.insert(node, Known { standing, saved: None, durable: false });
        Ok(Greeted::Remember(standing))
    }

    /// That start of a node is on disk here.
    pub(crate) fn remembered(&self, node: u64, start: Start) {
        if let Some(known) = self.lock().get_mut(&node).filter(|known| known.standing.start == start) {
            known.durable = true;
        }
    }

    /// A node, of that start, has told so many promises.
    pub(crate) fn heard(&self, node: u64, start: Start, promises: u64) {
        if let Some(known) = self.lock().get_mut(&node).filter(|known| known.standing.start == start) {
            known.standing.promises = known.standing.promises.max(promises);
        }
    }

    /// Whether something was heard that isn't saved.
    pub(crate) fn has_unsaved(&self) -> bool {
        self.lock().values().any(|known| known.saved != Some(known.standing))
    }

    /// What is to be saved, as keys and values of `meta`. It counts as saved: if the write fails, the node stops.
    pub(crate) fn take_unsaved(&self) -> Vec<([u8; 9], Vec<u8>)> {
        let mut taken = Vec::new();
        for (node, known) in self.lock().iter_mut() {
            if known.saved != Some(known.standing) {
                known.saved = Some(known.standing);
                let key = standing_key(*node);
                taken.push((key, seal(&key, &known.standing)));
            }
        }
        taken
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Known>> {
        self.known.lock().expect("nothing panics while it holds this lock")
    }
}

/// The key in `meta` of what is known of another node.
pub(crate) fn standing_key(node: u64) -> [u8; 9] {
    let mut key = [STANDING; 9];
    key[1..].copy_from_slice(&node.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(number: u64, nonce: u8, promises: u64) -> Standing {
        Standing { start: Start { number, nonce: [nonce; 16] }, promises }
    }

    /// The start of that number and nonce, after these.
    fn life(number: u64, nonce: u8, past: &[Standing]) -> Life {
        Life { now: Start { number, nonce: [nonce; 16] }, past: past.to_vec() }
    }

    #[test]
    fn only_a_disk_that_lists_what_was_seen_with_all_that_was_told_is_heard() {
        let standings = Standings::new(BTreeMap::new());
        let (before, first) = (standing(2, 6, 10), standing(3, 7, 10));
        let remember = |standing| Ok(Greeted::Remember(standing));
        assert_eq!(standings.greeted(1, &life(3, 7, &[before])), remember(first));
        assert_eq!(standings.greeted(1, &life(3, 7, &[before])), remember(first), "it isn't durable yet");
        standings.remembered(1, first.start);
        assert_eq!(standings.greeted(1, &life(3, 7, &[before])), Ok(Greeted::Known));
        standings.heard(1, first.start, 15);
        // A greeting of the same process says how it began.
        assert_eq!(standings.greeted(1, &life(3, 7, &[before])), Ok(Greeted::Known));
        assert!(standings.greeted(1, &life(3, 8, &[before])).is_err(), "another copy, of the start before");
        assert!(standings.greeted(1, &life(2, 6, &[])).is_err(), "an older copy");
        let copy = [before, standing(3, 8, 90), standing(4, 8, 99)];
        assert!(standings.greeted(1, &life(5, 8, &copy)).is_err(), "one that was started again and again");
        let running = [before, standing(3, 7, 14), standing(4, 8, 99)];
        assert!(standings.greeted(1, &life(5, 8, &running)).is_err(), "a copy of the running process");
        let next = [before, standing(3, 7, 15)];
        assert_eq!(standings.greeted(1, &life(4, 9, &next)), remember(standing(4, 9, 15)));
        standings.heard(1, first.start, 99);
        let later = [standing(4, 9, 15), standing(5, 2, 15), standing(8, 3, 20)];
        assert_eq!(standings.greeted(1, &life(9, 1, &later)), remember(standing(9, 1, 20)));
        standings.heard(1, later[0].start, 99);
        let listed_no_longer = [standing(70, 4, 20)];
        assert_eq!(
            standings.greeted(1, &life(71, 5, &listed_no_longer)),
            remember(standing(71, 5, 20)),
            "an old process says nothing any more"
        );
    }

    #[test]
    fn what_was_saved_is_known_after_a_restart() {
        let standings = Standings::new(BTreeMap::new());
        let first = standing(1, 1, 0);
        standings.greeted(2, &life(1, 1, &[])).unwrap();
        standings.heard(2, first.start, 5);
        assert_eq!(standings.take_unsaved().len(), 1);
        assert!(!standings.has_unsaved());
        standings.heard(2, first.start, 6);
        assert!(standings.has_unsaved());
        let again = Standings::new(BTreeMap::from([(2, standing(1, 1, 5))]));
        assert!(again.greeted(2, &life(2, 2, &[standing(1, 1, 4)])).is_err());
        assert!(again.greeted(2, &life(2, 2, &[standing(1, 1, 5)])).is_ok());
    }
}
