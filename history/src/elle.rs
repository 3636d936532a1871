//! The same question, answered by the `adya` crate: an implementation of Elle by other people.

use serde_json::{Value, json};

use crate::record::{Fate, List, Transaction};

/// The history in the format that Elle reads: one event a line. A transaction of unknown fate gets a process of its own, since
/// a process there ends with the first answer that it doesn't get.
pub fn json_lines(history: &[Transaction<List>]) -> String {
    let processes = history.iter().map(|one| one.process + 1).max().unwrap_or_default();
    let mut events: Vec<(u64, Value)> = Vec::new();
    for (number, one) in history.iter().enumerate() {
        let operations = |told: bool| -> Vec<Value> {
            let reads = one
                .reads
                .iter()
                .map(|(key, list)| if told { json!(["r", key, list]) } else { json!(["r", key, null]) });
            reads.chain(one.writes.iter().map(|(key, element)| json!(["append", key, element]))).collect()
        };
        let process = if one.fate == Fate::Unknown { processes + number as u64 } else { one.process };
        let event = |kind: &str, told| json!({ "type": kind, "process": process, "value": operations(told) });
        events.push((one.invoked, event("invoke", false)));
        let end = match one.fate {
            Fate::Committed => Some("ok"),
            Fate::Aborted => Some("fail"),
            Fate::Unknown => None,
        };
        if let (Some(end), Some(completed)) = (end, one.completed) {
            events.push((completed, event(end, end == "ok")));
        } else {
            // Nobody knows when, so at the end of all.
            events.push((u64::MAX, event("info", false)));
        }
    }
    events.sort_by_key(|(time, _)| *time);
    events.into_iter().map(|(_, event)| format!("{event}\n")).collect()
}

/// Checks a history for strict serializability. An error tells the anomalies, each with its explanation.
pub fn check(history: &[Transaction<List>]) -> Result<(), String> {
    let parsed = adya::History::from_json(&json_lines(history)).map_err(|error| error.to_string())?;
    let report = adya::check(&parsed, adya::Workload::ListAppend, &adya::Opts::default());
    match report.valid {
        adya::Valid::True => Ok(()),
        adya::Valid::Unknown => Err(format!("no verdict: {:?}", report.anomaly_types)),
        adya::Valid::False => {
            let told = report.anomalies.values().flatten();
            Err(told.map(|anomaly| format!("{anomaly:?}\n")).collect())
        }
    }
}
