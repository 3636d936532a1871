//! What a part claims of each of its rows, and whether its conditions hold.
//!
//! A row that a part uses by deltas alone is judged by bounds (see [`super::locks`]); a row that it has to itself, or shares for
//! conditions, is judged by running the operations on the settled value.

use smallvec::SmallVec;

use crate::{
    batch::{Condition, OperationKind, Part, RowKey},
    messages::{Abort, AbortReason, Met, RowAt, RowValue},
};

use super::locks::{Claim, Mode};

/// The longest piece of a record that a rejection shows, in bytes.
const MET_BYTES_MAX: usize = 1024;

/// What a part does with one row.
pub struct Use<'a> {
    /// The row.
    pub row: &'a RowKey,
    /// The operations on it, with their places, in the order of the batch.
    pub operations: Operations<'a>,
    /// What they claim of it.
    pub claim: Claim,
}

/// The operations on one row; mostly it is one.
pub type Operations<'a> = SmallVec<[(u32, &'a OperationKind); 2]>;

/// A part, row by row in key order.
pub type ByRow<'a> = SmallVec<[Use<'a>; 4]>;

/// Groups the operations of a part by row.
pub fn by_row(part: &Part) -> ByRow<'_> {
    let mut sorted: SmallVec<[_; 8]> =
        part.iter().map(|(place, operation)| (&operation.row, *place, &operation.kind)).collect();
    sorted.sort_by_key(|(row, _, _)| *row);
    let of_one_row = sorted.chunk_by(|(one, _, _), (other, _, _)| one == other);
    let uses = of_one_row.map(|group| {
        let operations: Operations<'_> = group.iter().map(|(_, place, kind)| (*place, *kind)).collect();
        Use { row: group[0].0, claim: claim(&operations), operations }
    });
    uses.collect()
}

/// What the operations on one row claim of it.
fn claim(operations: &[(u32, &OperationKind)]) -> Claim {
    let adds = operations.iter().filter(|(_, kind)| matches!(kind, OperationKind::Add { .. })).count();
    let requires = operations.iter().filter(|(_, kind)| matches!(kind, OperationKind::Require(_))).count();
    if adds == operations.len() {
        let nothing = Claim {
            mode: Mode::Add,
            delta: 0,
            lowest: i128::MIN,
            highest: i128::MAX,
            has_floor: false,
            has_ceiling: false,
            writes: true,
        };
        return bounds(operations).fold(nothing, |claim, bound| Claim {
            delta: bound.sum,
            lowest: claim.lowest.max(bound.lowest),
            highest: claim.highest.min(bound.highest),
            has_floor: claim.has_floor || !bound.range_is_floor,
            has_ceiling: claim.has_ceiling || !bound.range_is_ceiling,
            ..claim
        });
    }
    let shared = requires == operations.len();
    let mode = if shared { Mode::Shared } else { Mode::Exclusive };
    Claim {
        mode,
        delta: 0,
        lowest: i128::MIN,
        highest: i128::MAX,
        has_floor: false,
        has_ceiling: false,
        writes: !shared,
    }
}

/// Between what a balance must be, before the batch, for one of its deltas to fit.
struct Bound {
    place: u32,
    /// The sum of the deltas up to and with this one.
    sum: i128,
    lowest: i128,
    highest: i128,
    /// Whether the floor, or the ceiling, is the range of the numbers.
    range_is_floor: bool,
    range_is_ceiling: bool,
}

/// The bounds of deltas, in their order.
fn bounds(operations: &[(u32, &OperationKind)]) -> impl Iterator<Item = Bound> {
    let mut sum: i128 = 0;
    operations.iter().filter_map(move |(place, kind)| {
        let OperationKind::Add { delta, floor, ceiling } = kind else { return None };
        sum = sum.checked_add(*delta).expect("a checked batch's deltas on a row fit in 128 bits");
        let floor = floor.unwrap_or(if *delta < 0 { 0 } else { i128::MIN });
        let ceiling = ceiling.unwrap_or(i128::MAX);
        // base + sum >= floor and base + sum <= ceiling. Where a difference leaves the range of numbers, every base will do: that
        // none would is refused by `Batch::check`.
        Some(Bound {
            place: *place,
            sum,
            lowest: floor.saturating_sub(sum),
            highest: ceiling.saturating_sub(sum),
            range_is_floor: floor == i128::MIN,
            range_is_ceiling: ceiling == i128::MAX,
        })
    })
}

/// The rejection of deltas that don't fit on a balance of `settled`, at best `best`.
pub fn too_low(operations: &[(u32, &OperationKind)], best: i128, settled: i128) -> Abort {
    let bounds: Vec<Bound> = bounds(operations).collect();
    let failed = bounds.iter().find(|bound| best < bound.lowest).unwrap_or(&bounds[0]);
    let reason = if failed.range_is_floor { AbortReason::Overflow } else { AbortReason::ShortOfFunds };
    Abort { reason, operation: Some(failed.place), met: Some(Met::Balance(settled)) }
}

/// The rejection of deltas that would take a balance of `settled`, at least `least`, too high.
pub fn too_high(operations: &[(u32, &OperationKind)], least: i128, settled: i128) -> Abort {
    let bounds: Vec<Bound> = bounds(operations).collect();
    let failed = bounds.iter().find(|bound| least > bound.highest).unwrap_or(&bounds[0]);
    let reason = if failed.range_is_ceiling { AbortReason::Overflow } else { AbortReason::AboveCeiling };
    Abort { reason, operation: Some(failed.place), met: Some(Met::Balance(settled)) }
}

/// The rejection of an operation that treats a row as what it isn't.
pub fn wrong_kind(operations: &[(u32, &OperationKind)], row: &RowAt) -> Abort {
    let place = operations.first().map(|(place, _)| *place);
    Abort { reason: AbortReason::WrongKind, operation: place, met: Some(met(row)) }
}

/// Runs operations on a row's settled value: what it holds afterwards, or the first operation that fails.
pub fn run(operations: &[(u32, &OperationKind)], row: &RowAt) -> Result<RowValue, Abort> {
    let mut now = row.clone();
    for (place, kind) in operations {
        now.value = run_one(kind, &now).map_err(|reason| Abort {
            reason,
            operation: Some(*place),
            met: Some(if let OperationKind::Require(Condition::VersionIs(_)) = kind {
                Met::Version(now.version)
            } else {
                met(&now)
            }),
        })?;
    }
    Ok(now.value)
}

fn run_one(kind: &OperationKind, now: &RowAt) -> Result<RowValue, AbortReason> {
    match kind {
        OperationKind::Add { delta, floor, ceiling } => {
            let after = balance(now)?.checked_add(*delta).ok_or(AbortReason::Overflow)?;
            if after < floor.unwrap_or(if *delta < 0 { 0 } else { i128::MIN }) {
                return Err(AbortReason::ShortOfFunds);
            }
            if after > ceiling.unwrap_or(i128::MAX) {
                return Err(AbortReason::AboveCeiling);
            }
            Ok(RowValue::Balance(after))
        }
        OperationKind::Put(value) => record(now).map(|_| RowValue::Record(value.clone())),
        OperationKind::Insert(value) => match now.value {
            RowValue::Absent => Ok(RowValue::Record(value.clone())),
            RowValue::Record(_) | RowValue::Balance(_) => Err(AbortReason::RowExists),
        },
        OperationKind::Delete => record(now).map(|()| RowValue::Absent),
        OperationKind::Require(condition) => {
            if holds(condition, now)? {
                Ok(now.value.clone())
            } else {
                Err(AbortReason::ConditionNotMet)
            }
        }
    }
}

fn holds(condition: &Condition, now: &RowAt) -> Result<bool, AbortReason> {
    Ok(match condition {
        Condition::Exists(wanted) => (now.value != RowValue::Absent) == *wanted,
        Condition::VersionIs(version) => now.version == *version,
        Condition::RecordIs(wanted) => match &now.value {
            RowValue::Record(value) => value == wanted,
            RowValue::Absent => false,
            RowValue::Balance(_) => return Err(AbortReason::WrongKind),
        },
        Condition::AtLeast(amount) => balance(now)? >= *amount,
        Condition::AtMost(amount) => balance(now)? <= *amount,
        Condition::BalanceIs(amount) => balance(now)? == *amount,
    })
}

fn balance(now: &RowAt) -> Result<i128, AbortReason> {
    match now.value {
        RowValue::Absent => Ok(0),
        RowValue::Balance(amount) => Ok(amount),
        RowValue::Record(_) => Err(AbortReason::WrongKind),
    }
}

fn record(now: &RowAt) -> Result<(), AbortReason> {
    match now.value {
        RowValue::Absent | RowValue::Record(_) => Ok(()),
        RowValue::Balance(_) => Err(AbortReason::WrongKind),
    }
}

fn met(now: &RowAt) -> Met {
    match &now.value {
        RowValue::Absent => Met::Absent,
        RowValue::Balance(amount) => Met::Balance(*amount),
        RowValue::Record(bytes) => Met::Record(bytes.slice(..bytes.len().min(MET_BYTES_MAX))),
    }
}
