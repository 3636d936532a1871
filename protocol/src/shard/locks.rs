//! Who holds which row, and who waits for it.
//!
//! Deltas of any number of undecided batches may stand on one balance (*escrow*, after O'Neil, "The Escrow Transactional Method",
//! TODS 11:4, 1986). Conditions share a row; everything else has it alone. All of this follows from the prepared parts, which are
//! replicated, so no lock is lost with a leader.
//!
//! Invariants, for each row:
//! - Holders are compatible with each other.
//! - With `S` the settled balance and `O`, `I` the sums of undecided outgoing and incoming deltas, every holder's own bounds hold
//!   for every subset of the *other* holders that may commit: `S - O >= lowest` and `S + I <= highest`.
//! - Whoever waits, waits for lower numbers of the same coordinator only, so there is no circle, across shards either.

use std::collections::BTreeMap;

use super::holders::Holders;
use crate::ids::{GroupId, Number};

/// Who stands in line: its number, and the coordinator that gave it. Numbers of different coordinators have no order, so
/// batches of different coordinators never wait for each other; the later one is refused (CONFLICT).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket {
    /// The number.
    pub number: Number,
    /// Who gave it.
    pub coordinator: GroupId,
}

/// How a part uses a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Only deltas: any number side by side.
    Add,
    /// Only conditions: any number side by side, but not beside deltas.
    Shared,
    /// Alone.
    Exclusive,
}

impl Mode {
    fn goes_with(self, other: Mode) -> bool {
        matches!((self, other), (Mode::Add, Mode::Add) | (Mode::Shared, Mode::Shared))
    }
}

/// What a part claims of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// How it uses the row.
    pub mode: Mode,
    /// The sum of its deltas.
    pub delta: i128,
    /// The balance without this part must be at least this.
    pub lowest: i128,
    /// The balance without this part must be at most this.
    pub highest: i128,
    /// Whether somebody set the lower bound (a floor), and not just the range of the numbers.
    pub has_floor: bool,
    /// Whether somebody set the upper bound.
    pub has_ceiling: bool,
    /// Whether an outcome changes the row.
    pub writes: bool,
}

impl Claim {
    /// What it takes away: negative or 0.
    pub fn outgoing(&self) -> i128 {
        self.delta.min(0)
    }

    /// What it brings.
    pub fn incoming(&self) -> i128 {
        self.delta.max(0)
    }

    /// The bound that `S - O` must keep, `O` counting this holder too: `lowest` holds without its own outgoing part.
    pub fn low_mark(&self) -> i128 {
        self.lowest.saturating_add(self.outgoing())
    }

    /// The bound that `S + I` must keep, `I` counting this holder too.
    pub fn high_mark(&self) -> i128 {
        self.highest.saturating_add(self.incoming())
    }
}

/// Whether a claim can be granted, from the locks and the settled balance alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Yes.
    Granted,
    /// It has to wait for lower numbers.
    Waits,
    /// A higher number (or another coordinator's) is in the way.
    Conflict,
    /// The balance is too low even if everything incoming commits and nothing outgoing does.
    TooLow,
    /// The balance is too high even in the best case.
    TooHigh,
}

/// The line at one row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowLock {
    holders: Holders,
    waiters: BTreeMap<Ticket, Claim>,
}

impl RowLock {
    /// Nobody is there.
    pub const FREE: RowLock = RowLock { holders: Holders::None, waiters: BTreeMap::new() };

    /// Whether nobody holds the row or waits for it.
    pub fn is_free(&self) -> bool {
        self.holders.is_empty() && self.waiters.is_empty()
    }

    /// Whether somebody holds it.
    pub fn is_held(&self) -> bool {
        !self.holders.is_empty()
    }

    /// Whether somebody waits for it.
    pub fn is_waited_for(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// Who waits, in order.
    pub fn waiting(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.waiters.keys().copied()
    }

    /// Holders whose outcome may change the row.
    pub fn writers(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.holders.iter().filter(|(_, claim)| claim.writes).map(|(ticket, _)| ticket)
    }

    /// Lets a part hold the row.
    pub fn hold(&mut self, ticket: Ticket, claim: Claim) {
        self.holders.insert(ticket, claim);
    }

    /// Puts a part in line.
    pub fn wait(&mut self, ticket: Ticket, claim: Claim) {
        self.waiters.insert(ticket, claim);
    }

    /// Takes a part out, wherever it stands.
    pub fn remove(&mut self, ticket: Ticket) {
        self.waiters.remove(&ticket);
        self.holders.remove(ticket);
    }

    /// Whether the claim's mode and its place in line permit it to be looked at now.
    pub fn admits(&self, ticket: Ticket, claim: &Claim) -> Answer {
        // All holders go with each other, so if one fits, all do.
        if self.holders.first().is_some_and(|(_, first)| !first.mode.goes_with(claim.mode)) {
            let in_order = self.holders.iter().all(|(holder, _)| is_before(holder, ticket));
            return if in_order { Answer::Waits } else { Answer::Conflict };
        }
        // Mostly the first one in line decides.
        let mut before = self.waiters.range(..ticket);
        match before.find(|(_, theirs)| !may_pass(claim, theirs)) {
            None => Answer::Granted,
            Some((waiter, _)) if is_before(*waiter, ticket) => Answer::Waits,
            Some(_) => Answer::Conflict,
        }
    }

    /// Whether the deltas fit, given the settled balance. Only for claims that are admitted.
    pub fn fits(&self, ticket: Ticket, claim: &Claim, settled: i128) -> Answer {
        if self.best(settled) < claim.lowest {
            return Answer::TooLow;
        }
        if self.least(settled) > claim.highest {
            return Answer::TooHigh;
        }
        let outgoing = self.holders.outgoing().checked_add(claim.outgoing());
        let incoming = self.holders.incoming().checked_add(claim.incoming());
        let least = outgoing.and_then(|outgoing| settled.checked_add(outgoing));
        let greatest = incoming.and_then(|incoming| settled.checked_add(incoming));
        let own = self.least(settled) >= claim.lowest && self.best(settled) <= claim.highest;
        let others = least.is_some_and(|least| self.holders.low_mark().is_none_or(|mark| least >= mark))
            && greatest.is_some_and(|greatest| self.holders.high_mark().is_none_or(|mark| greatest <= mark));
        if own && others {
            return Answer::Granted;
        }
        // Not sure yet. Waiting is for lower numbers only: with a higher one on the row there would be no order.
        let later = self.holders.last().is_some_and(|holder| !is_before(holder, ticket));
        let foreign = self.holders.iter().any(|(holder, _)| holder.coordinator != ticket.coordinator);
        if foreign || (later && !self.waits_for_lower(ticket, claim, settled)) {
            Answer::Conflict
        } else {
            Answer::Waits
        }
    }

    /// The most that the balance can be, as far as anything is undecided. All that was answered by now is settled or counted here, so a
    /// rejection by it is true now.
    pub fn best(&self, settled: i128) -> i128 {
        settled.saturating_add(self.holders.incoming())
    }

    /// The least that the balance can be.
    pub fn least(&self, settled: i128) -> i128 {
        settled.saturating_add(self.holders.outgoing())
    }

    /// Whether the answer is open because of holders with lower numbers: not if those with higher ones alone make it so.
    fn waits_for_lower(&self, ticket: Ticket, claim: &Claim, settled: i128) -> bool {
        let (outgoing, incoming) = self.sums_before(ticket);
        let (least, best) = (settled.saturating_add(outgoing), settled.saturating_add(incoming));
        let possible = best >= claim.lowest && least <= claim.highest;
        possible && (least < claim.lowest || best > claim.highest)
    }

    fn sums_before(&self, ticket: Ticket) -> (i128, i128) {
        if self.holders.last().is_none_or(|last| last < ticket) {
            return (self.holders.outgoing(), self.holders.incoming());
        }
        let before = self.holders.iter().take_while(|(holder, _)| *holder < ticket).map(|(_, claim)| claim);
        before.fold((0, 0), |(outgoing, incoming), claim| {
            (outgoing + claim.outgoing(), incoming + claim.incoming())
        })
    }
}

/// Whether one that comes later may go ahead of one that waits.
///
/// A delta that waits, waits for the balance to move away from a bound. One that moves it there as well only helps; one that moves it
/// towards the bound would starve it. The range of the numbers is no such bound: whoever asks for amounts of that size waits alone.
fn may_pass(claim: &Claim, waiting: &Claim) -> bool {
    match (claim.mode, waiting.mode) {
        (Mode::Add, Mode::Add) => {
            (claim.delta >= 0 || !waiting.has_floor) && (claim.delta <= 0 || !waiting.has_ceiling)
        }
        (Mode::Shared, Mode::Shared) => true,
        _ => false,
    }
}

fn is_before(one: Ticket, other: Ticket) -> bool {
    one.coordinator == other.coordinator && one.number < other.number
}
