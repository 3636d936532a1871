//! Raft's election safety: one leader in a term, one vote of each replica in a term, and a leader has all that was committed.

use std::collections::BTreeMap;

use verdict_protocol::ids::{GroupId, NodeId};

use super::{Finding, Invariant};
use crate::witness::{Facts, Seen};

/// One leader and one vote in each term.
#[derive(Debug, Default)]
pub struct RaftElections {
    leaders: BTreeMap<(GroupId, u64), NodeId>,
    votes: BTreeMap<(GroupId, u64, NodeId), NodeId>,
}

impl Invariant for RaftElections {
    fn name(&self) -> &'static str {
        "Raft: elections"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        match seen {
            Seen::Elected { group, term, node, .. } => {
                let first = *self.leaders.entry((*group, *term)).or_insert(*node);
                if first == *node {
                    return Ok(());
                }
                Err(format!("group {group} has two leaders in term {term}: n{first} and n{node}"))
            }
            Seen::Voted { group, term, voter, candidate } => {
                let first = *self.votes.entry((*group, *term, *voter)).or_insert(*candidate);
                if first == *candidate {
                    return Ok(());
                }
                Err(format!("group {group}: n{voter} votes for n{first} and n{candidate} in term {term}"))
            }
            _ => Ok(()),
        }
    }
}
