//! What is answered: outcomes, values, histories.

use verdict_protocol::{
    batch::{BatchError, RowKey},
    ids::Stamp,
    messages::{Abort, AbortReason, Decision, Met, RowAt, RowChange, RowValue},
};

use super::{
    amount,
    batch::row_to_wire,
    batch_id,
    fields::{Field, FieldError, batch_id_bytes, id_to_wire, inside, required},
};
use crate::v1::{self, history_entry::Change, outcome, value::Kind};

/// The outcome of a decided batch.
pub fn outcome_to_wire(decision: &Decision) -> v1::Outcome {
    let result = match &decision.result {
        Ok(stamp) => outcome::Result::Committed(v1::Committed { stamp: stamp.0 }),
        Err(abort) => outcome::Result::Aborted(abort_to_wire(abort)),
    };
    v1::Outcome { batch_id: decision.id.to_string(), result: Some(result) }
}

/// Why a batch is aborted, with a sentence for people made of what the decision holds.
pub fn abort_to_wire(abort: &Abort) -> v1::Aborted {
    v1::Aborted {
        reason: reason_to_wire(abort.reason).into(),
        operation: abort.operation,
        met: abort.met.as_ref().map(met_to_wire),
        message: sentence(abort),
    }
}

/// The opposite of [`abort_to_wire`]. The sentence is dropped: it says nothing new.
pub fn abort_from_wire(aborted: v1::Aborted) -> Result<Abort, FieldError> {
    let met = aborted.met.map(met_from_wire).transpose().map_err(inside("met"))?;
    Ok(Abort { reason: reason_from_wire(aborted.reason)?, operation: aborted.operation, met })
}

fn reason_to_wire(reason: AbortReason) -> v1::AbortReason {
    match reason {
        AbortReason::ShortOfFunds => v1::AbortReason::ShortOfFunds,
        AbortReason::AboveCeiling => v1::AbortReason::AboveCeiling,
        AbortReason::Overflow => v1::AbortReason::Overflow,
        AbortReason::ConditionNotMet => v1::AbortReason::ConditionNotMet,
        AbortReason::RowExists => v1::AbortReason::RowExists,
        AbortReason::WrongKind => v1::AbortReason::WrongKind,
        AbortReason::Contention => v1::AbortReason::Contention,
        AbortReason::ParticipantUnavailable => v1::AbortReason::ParticipantUnavailable,
        AbortReason::Interrupted => v1::AbortReason::Interrupted,
        AbortReason::Cancelled => v1::AbortReason::Cancelled,
    }
}

fn reason_from_wire(reason: i32) -> Field<AbortReason> {
    match v1::AbortReason::try_from(reason) {
        Ok(v1::AbortReason::ShortOfFunds) => Ok(AbortReason::ShortOfFunds),
        Ok(v1::AbortReason::AboveCeiling) => Ok(AbortReason::AboveCeiling),
        Ok(v1::AbortReason::Overflow) => Ok(AbortReason::Overflow),
        Ok(v1::AbortReason::ConditionNotMet) => Ok(AbortReason::ConditionNotMet),
        Ok(v1::AbortReason::RowExists) => Ok(AbortReason::RowExists),
        Ok(v1::AbortReason::WrongKind) => Ok(AbortReason::WrongKind),
        Ok(v1::AbortReason::Contention) => Ok(AbortReason::Contention),
        Ok(v1::AbortReason::ParticipantUnavailable) => Ok(AbortReason::ParticipantUnavailable),
        Ok(v1::AbortReason::Interrupted) => Ok(AbortReason::Interrupted),
        Ok(v1::AbortReason::Cancelled) => Ok(AbortReason::Cancelled),
        Ok(v1::AbortReason::Unspecified) => Err(BatchError::new("reason", "is missing")),
        Err(_) => Err(BatchError::new("reason", format!("{reason} is not known here"))),
    }
}

/// For people: which operation, what went wrong, what is there.
fn sentence(abort: &Abort) -> String {
    let who = match abort.operation {
        Some(place) => format!("operations[{place}]"),
        None => "the batch".to_owned(),
    };
    let what = match abort.reason {
        AbortReason::ShortOfFunds => format!("{who} would take the balance below its floor"),
        AbortReason::AboveCeiling => format!("{who} would take the balance above its ceiling"),
        AbortReason::Overflow => {
            format!("{who} would take the balance beyond the range of a signed 128-bit integer")
        }
        AbortReason::ConditionNotMet => format!("{who} requires something that does not hold"),
        AbortReason::RowExists => format!("{who} inserts a row that already exists"),
        AbortReason::WrongKind => format!("{who} treats the row as something else than it is"),
        AbortReason::Contention => "rows stayed held by other batches until the deadline".to_owned(),
        AbortReason::ParticipantUnavailable => "a participant did not answer until the deadline".to_owned(),
        AbortReason::Interrupted => {
            "the coordinator's leader changed before all votes were in: nothing took effect, submit it again under a new id"
                .to_owned()
        }
        AbortReason::Cancelled => "the id was cancelled before the batch was seen".to_owned(),
    };
    match &abort.met {
        None => what,
        Some(Met::Balance(balance)) => format!("{what}: the balance is {balance}"),
        Some(Met::Record(record)) => format!("{what}: the row holds the record {}", shown(record)),
        Some(Met::Version(Stamp(0))) => format!("{what}: the row was never written (version 0)"),
        Some(Met::Version(version)) => format!("{what}: the row's version is {version}"),
        Some(Met::Absent) => format!("{what}: the row does not exist"),
    }
}

/// The beginning of a record, as text if it is text.
fn shown(record: &[u8]) -> String {
    const SHOWN_MAX: usize = 40;
    let (piece, more) = match record.get(..SHOWN_MAX) {
        Some(piece) if record.len() > SHOWN_MAX => (piece, "…"),
        _ => (record, ""),
    };
    format!("\"{}\"{more}", piece.escape_ascii())
}

fn met_to_wire(met: &Met) -> v1::Value {
    let kind = match met {
        Met::Balance(balance) => Kind::Balance(balance.to_string()),
        Met::Record(record) => Kind::Record(record.clone()),
        Met::Version(version) => Kind::Version(version.0),
        Met::Absent => Kind::Absent(true),
    };
    v1::Value { kind: Some(kind) }
}

fn met_from_wire(value: v1::Value) -> Field<Met> {
    Ok(match required("kind", value.kind)? {
        Kind::Balance(balance) => Met::Balance(amount("balance", &balance)?),
        Kind::Record(record) => Met::Record(record),
        Kind::Version(version) => Met::Version(Stamp(version)),
        Kind::Absent(_) => Met::Absent,
    })
}

/// The contents of a row.
pub fn value_to_wire(value: &RowValue) -> v1::Value {
    let kind = match value {
        RowValue::Absent => Kind::Absent(true),
        RowValue::Balance(balance) => Kind::Balance(balance.to_string()),
        RowValue::Record(record) => Kind::Record(record.clone()),
    };
    v1::Value { kind: Some(kind) }
}

/// The opposite of [`value_to_wire`].
pub fn value_from_wire(value: v1::Value) -> Result<RowValue, FieldError> {
    match required("kind", value.kind)? {
        Kind::Absent(_) => Ok(RowValue::Absent),
        Kind::Balance(balance) => Ok(RowValue::Balance(amount("balance", &balance)?)),
        Kind::Record(record) => Ok(RowValue::Record(record)),
        Kind::Version(_) => Err(BatchError::new("version", "is not what a row holds")),
    }
}

/// What a row holds, as `Read` answers it.
pub fn row_value_to_wire(row: &RowKey, at: &RowAt) -> v1::RowValue {
    v1::RowValue { row: Some(row_to_wire(row)), value: Some(value_to_wire(&at.value)), version: at.version.0 }
}

/// One change of a row, as `History` answers it.
pub fn history_to_wire(change: &RowChange) -> v1::HistoryEntry {
    let what = match (&change.delta, &change.result) {
        (Some(delta), _) => Some(Change::Delta(delta.to_string())),
        (None, RowValue::Record(record)) => Some(Change::Value(record.clone())),
        (None, RowValue::Absent) => Some(Change::Deleted(true)),
        // A balance changes by deltas alone; the result tells all the same.
        (None, RowValue::Balance(_)) => None,
    };
    v1::HistoryEntry {
        batch_id: change.id.to_string(),
        stamp: change.stamp.0,
        change: what,
        result: Some(value_to_wire(&change.result)),
    }
}

/// The opposite of [`history_to_wire`].
pub fn history_from_wire(entry: v1::HistoryEntry) -> Result<RowChange, FieldError> {
    let delta = match entry.change {
        Some(Change::Delta(delta)) => Some(amount("delta", &delta)?),
        Some(Change::Value(_) | Change::Deleted(_)) | None => None,
    };
    let result = value_from_wire(required("result", entry.result)?).map_err(inside("result"))?;
    Ok(RowChange { id: batch_id("batch_id", &entry.batch_id)?, stamp: Stamp(entry.stamp), delta, result })
}

/// One change of a row, as a participant tells the coordinator.
pub fn part_change_to_wire(change: &RowChange) -> v1::PartChange {
    v1::PartChange {
        batch_id: id_to_wire(change.id),
        stamp: change.stamp.0,
        delta: change.delta.map(|delta| delta.to_string()),
        result: Some(value_to_wire(&change.result)),
    }
}

/// The opposite of [`part_change_to_wire`].
pub fn part_change_from_wire(change: v1::PartChange) -> Result<RowChange, FieldError> {
    Ok(RowChange {
        id: batch_id_bytes("batch_id", &change.batch_id)?,
        stamp: Stamp(change.stamp),
        delta: change.delta.map(|delta| amount("delta", &delta)).transpose()?,
        result: value_from_wire(required("result", change.result)?).map_err(inside("result"))?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use proptest::{option, prelude::*, sample::select};
    use verdict_protocol::ids::{BatchId, Millis, Number};

    use super::{super::batch::tests::any_bytes, *};

    const REASONS: [AbortReason; 10] = [
        AbortReason::ShortOfFunds,
        AbortReason::AboveCeiling,
        AbortReason::Overflow,
        AbortReason::ConditionNotMet,
        AbortReason::RowExists,
        AbortReason::WrongKind,
        AbortReason::Contention,
        AbortReason::ParticipantUnavailable,
        AbortReason::Interrupted,
        AbortReason::Cancelled,
    ];

    pub fn any_abort() -> impl Strategy<Value = Abort> {
        let met = prop_oneof![
            any::<i128>().prop_map(Met::Balance),
            any_bytes().prop_map(Met::Record),
            any::<u64>().prop_map(|version| Met::Version(Stamp(version))),
            Just(Met::Absent),
        ];
        (select(REASONS.as_slice()), option::of(any::<u32>()), option::of(met))
            .prop_map(|(reason, operation, met)| Abort { reason, operation, met })
    }

    pub fn any_value() -> impl Strategy<Value = RowValue> {
        prop_oneof![
            Just(RowValue::Absent),
            any::<i128>().prop_map(RowValue::Balance),
            any_bytes().prop_map(RowValue::Record)
        ]
    }

    pub fn any_change() -> impl Strategy<Value = RowChange> {
        (any::<[u8; 10]>(), any::<u64>(), option::of(any::<i128>()), any_value()).prop_map(
            |(tail, stamp, delta, result)| RowChange {
                id: BatchId::from_parts(Millis(stamp >> 16), tail),
                stamp: Stamp(stamp),
                delta,
                result,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn answers_come_back(abort in any_abort(), change in any_change()) {
            prop_assert_eq!(abort_from_wire(abort_to_wire(&abort)).unwrap(), abort);
            prop_assert_eq!(&value_from_wire(value_to_wire(&change.result)).unwrap(), &change.result);
            prop_assert_eq!(&history_from_wire(history_to_wire(&change)).unwrap(), &change);
            prop_assert_eq!(&part_change_from_wire(part_change_to_wire(&change)).unwrap(), &change);
        }
    }

    #[test]
    fn an_abort_is_told_in_a_sentence() {
        let said = |reason, met| sentence(&Abort { reason, operation: Some(1), met });
        assert_eq!(
            said(AbortReason::ShortOfFunds, Some(Met::Balance(40))),
            "operations[1] would take the balance below its floor: the balance is 40"
        );
        assert_eq!(
            said(AbortReason::RowExists, Some(Met::Record(Bytes::from_static(b"paid\xff")))),
            "operations[1] inserts a row that already exists: the row holds the record \"paid\\xff\""
        );
        assert_eq!(
            said(AbortReason::ConditionNotMet, Some(Met::Version(Stamp(7)))),
            "operations[1] requires something that does not hold: the row's version is 7"
        );
        let record = Met::Record(Bytes::from(vec![b'x'; 1000]));
        assert!(said(AbortReason::WrongKind, Some(record)).len() < 150);
    }

    #[test]
    fn a_decision_is_an_outcome() {
        let id = BatchId::from_parts(Millis(1), [0; 10]);
        let mut decision =
            Decision { id, hash: None, shards: vec![], number: Number::default(), result: Ok(Stamp(9)) };
        let outcome = outcome_to_wire(&decision);
        assert_eq!(outcome.batch_id, id.to_string());
        assert_eq!(outcome.result, Some(outcome::Result::Committed(v1::Committed { stamp: 9 })));
        decision.result = Err(Abort::because(AbortReason::Cancelled));
        let Some(outcome::Result::Aborted(aborted)) = outcome_to_wire(&decision).result else { panic!() };
        assert_eq!(aborted.reason(), v1::AbortReason::Cancelled);
    }

    #[test]
    fn an_unknown_reason_is_an_error() {
        let wrong = |reason| abort_from_wire(v1::Aborted { reason, ..Default::default() }).unwrap_err();
        assert_eq!(wrong(0).to_string(), "reason: is missing");
        assert_eq!(wrong(99).to_string(), "reason: 99 is not known here");
    }
}
