//! Raft's log: all replicas apply the same entry at an index, what is committed is on the disks of a majority, and whoever is elected
//! has it.

use std::collections::BTreeMap;

use verdict_protocol::ids::GroupId;

use super::{Finding, Invariant};
use crate::{
    raft::Entry,
    witness::{Facts, Seen},
};

/// Log matching, and durability of what is committed.
#[derive(Debug, Default)]
pub struct RaftLog {
    committed: BTreeMap<GroupId, BTreeMap<u64, Entry>>,
    /// Up to where leaders of a term have committed.
    by_term: BTreeMap<GroupId, BTreeMap<u64, u64>>,
}

impl Invariant for RaftLog {
    fn name(&self) -> &'static str {
        "Raft: log"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        match seen {
            Seen::Entry { group, node, index, entry } => {
                let known = self.committed.entry(*group).or_default();
                match known.get(index) {
                    Some(first) if first != *entry => Err(format!(
                        "group {group}: n{node} applies an entry of term {} at {index}, another replica one of term {}",
                        entry.term, first.term
                    )),
                    Some(_) => Ok(()),
                    None => {
                        known.insert(*index, (*entry).clone());
                        Ok(())
                    }
                }
            }
            Seen::Elected { group, term, node, log } => {
                // A leader has what was committed in earlier terms. It may be elected late, by votes that were long on their way, when
                // later terms have gone on without it.
                let Some(known) = self.committed.get(group) else { return Ok(()) };
                let by_term = self.by_term.entry(*group).or_default();
                let upto = by_term.range(..*term).map(|(_, index)| *index).max().unwrap_or(0);
                let (first, last) = (log.base.0, log.last().0);
                for (index, entry) in known.range(first + 1..).take_while(|(index, _)| **index <= upto) {
                    if *index > last || log.term_at(*index) != Some(entry.term) {
                        return Err(format!(
                            "group {group}: n{node} is elected in term {term} without the committed entry {index}"
                        ));
                    }
                }
                Ok(())
            }
            Seen::Committed { group, term, index } => {
                let upto = self.by_term.entry(*group).or_default().entry(*term).or_default();
                *upto = (*upto).max(*index);
                Ok(())
            }
            Seen::Copies { group, index, copies, voters } if *copies <= voters / 2 => Err(format!(
                "group {group}: entry {index} counts as committed, but is on {copies} of {voters} disks"
            )),
            _ => Ok(()),
        }
    }
}
