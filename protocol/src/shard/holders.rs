//! Who holds a row.
//!
//! Most rows have one holder, and one is kept in place; only where there are more is there anything to sort and to add up.

use std::collections::BTreeMap;

use super::locks::{Claim, Ticket};

/// The holders of a row, with what their deltas come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Holders {
    /// Nobody.
    #[default]
    None,
    /// One.
    One(Ticket, Claim),
    /// Two or more.
    Many(Box<Crowd>),
}

/// Several holders.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Crowd {
    claims: BTreeMap<Ticket, Claim>,
    /// Sums over the holders; outgoing is negative or 0.
    outgoing: i128,
    incoming: i128,
    /// The holders' marks, counted: the greatest low one and the least high one bind.
    low_marks: BTreeMap<i128, u32>,
    high_marks: BTreeMap<i128, u32>,
}

impl Holders {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        matches!(self, Holders::None)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Ticket, &Claim)> {
        let (one, many) = match self {
            Holders::None => (None, None),
            Holders::One(ticket, claim) => (Some((*ticket, claim)), None),
            Holders::Many(crowd) => (None, Some(crowd.claims.iter().map(|(ticket, claim)| (*ticket, claim)))),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// The lowest.
    pub fn first(&self) -> Option<(Ticket, &Claim)> {
        self.iter().next()
    }

    /// The highest.
    pub fn last(&self) -> Option<Ticket> {
        match self {
            Holders::None => None,
            Holders::One(ticket, _) => Some(*ticket),
            Holders::Many(crowd) => crowd.claims.keys().next_back().copied(),
        }
    }

    /// What all take away together: negative or 0.
    pub fn outgoing(&self) -> i128 {
        match self {
            Holders::None => 0,
            Holders::One(_, claim) => claim.outgoing(),
            Holders::Many(crowd) => crowd.outgoing,
        }
    }

    /// What all bring together.
    pub fn incoming(&self) -> i128 {
        match self {
            Holders::None => 0,
            Holders::One(_, claim) => claim.incoming(),
            Holders::Many(crowd) => crowd.incoming,
        }
    }

    /// The greatest low mark.
    pub fn low_mark(&self) -> Option<i128> {
        match self {
            Holders::None => None,
            Holders::One(_, claim) => Some(claim.low_mark()),
            Holders::Many(crowd) => crowd.low_marks.keys().next_back().copied(),
        }
    }

    /// The least high mark.
    pub fn high_mark(&self) -> Option<i128> {
        match self {
            Holders::None => None,
            Holders::One(_, claim) => Some(claim.high_mark()),
            Holders::Many(crowd) => crowd.high_marks.keys().next().copied(),
        }
    }

    /// Adds one.
    pub fn insert(&mut self, ticket: Ticket, claim: Claim) {
        match self {
            Holders::None => *self = Holders::One(ticket, claim),
            Holders::One(first, theirs) => {
                let mut crowd = Crowd::default();
                crowd.insert(*first, *theirs);
                crowd.insert(ticket, claim);
                *self = Holders::Many(Box::new(crowd));
            }
            Holders::Many(crowd) => crowd.insert(ticket, claim),
        }
    }

    /// Removes one, if it is there.
    pub fn remove(&mut self, ticket: Ticket) {
        match self {
            Holders::One(one, _) if *one == ticket => *self = Holders::None,
            Holders::None | Holders::One(..) => {}
            Holders::Many(crowd) => {
                crowd.remove(ticket);
                if crowd.claims.len() == 1 {
                    let (ticket, claim) = crowd.claims.pop_first().expect("there is one");
                    *self = Holders::One(ticket, claim);
                }
            }
        }
    }
}

impl Crowd {
    fn insert(&mut self, ticket: Ticket, claim: Claim) {
        self.outgoing = self.outgoing.saturating_add(claim.outgoing());
        self.incoming = self.incoming.saturating_add(claim.incoming());
        *self.low_marks.entry(claim.low_mark()).or_default() += 1;
        *self.high_marks.entry(claim.high_mark()).or_default() += 1;
        let before = self.claims.insert(ticket, claim);
        assert!(before.is_none(), "{ticket:?} holds the row already");
    }

    fn remove(&mut self, ticket: Ticket) {
        let Some(claim) = self.claims.remove(&ticket) else { return };
        self.outgoing -= claim.outgoing();
        self.incoming -= claim.incoming();
        uncount(&mut self.low_marks, claim.low_mark());
        uncount(&mut self.high_marks, claim.high_mark());
    }
}

fn uncount(marks: &mut BTreeMap<i128, u32>, mark: i128) {
    let count = marks.get_mut(&mark).expect("every holder's mark is counted");
    *count -= 1;
    if *count == 0 {
        marks.remove(&mark);
    }
}
