//! Messages, decisions and replies in words, and the words of golden scripts as rows and operations: for tests, models and
//! traces. Nothing of the product depends on how they look.

use bytes::Bytes;

use crate::{
    batch::{Condition, Operation, OperationKind, Placement, RowKey},
    ids::{BatchId, Number, ShardId, Stamp},
    leader::Reply,
    messages::{Abort, Decision, FromShard, Met, RowValue, ShardRead, ShardReadAnswer, ToShard, VoteKind},
};

/// A short name: tests and models make ids that end with a letter. Other ids are shown whole.
pub fn name_of(id: BatchId) -> String {
    let last = char::from(id.0[15]);
    if last.is_ascii_alphanumeric() { last.to_string() } else { id.to_string() }
}

fn names_of(ids: &[BatchId]) -> String {
    ids.iter().map(|id| name_of(*id)).collect::<Vec<_>>().join(" ")
}

/// What a coordinator's leader says to a shard.
pub fn to_shard(message: &ToShard) -> String {
    let mut parts = vec![format!("mark {}", message.mark)];
    if message.history.0 > 0 {
        parts.push(format!("history {}", message.history));
    }
    if message.greet {
        parts.push(format!("greet {}", message.epoch));
    }
    for outcome in &message.outcomes {
        let commit = outcome.commit.map_or("abort".to_owned(), |stamp| format!("commit at {stamp}"));
        parts.push(format!(
            "outcome {} {} {commit}{}",
            name_of(outcome.id),
            outcome.number,
            given(&outcome.gives_up)
        ));
    }
    for prepare in &message.prepares {
        let sole = prepare.sole.map_or(String::new(), |stamp| format!(" alone at {stamp}"));
        let given = given(&prepare.gives_up);
        parts.push(format!("prepare {} {}{sole}{given}", name_of(prepare.id), prepare.number));
    }
    parts.join(", ")
}

fn given(numbers: &[Number]) -> String {
    if numbers.is_empty() {
        return String::new();
    }
    let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    format!(" giving up {}", numbers.join(" "))
}

/// What a shard says to a coordinator's leader.
pub fn from_shard(message: &FromShard) -> String {
    let mut parts = Vec::new();
    if let Some(greeting) = &message.greeting {
        let held: Vec<String> = greeting
            .parts
            .iter()
            .map(|part| format!("{} {} {}", name_of(part.id), part.number, vote(&part.vote)))
            .collect();
        parts.push(format!("greeting {} [{}]", greeting.epoch, held.join("; ")));
    }
    for done in &message.done {
        let lost = if done.lost { " LOST" } else { "" };
        parts.push(format!("done {} {}{lost}", name_of(done.id), done.number));
    }
    for one in &message.votes {
        parts.push(format!("vote {} {} {}", name_of(one.id), one.number, vote(&one.kind)));
    }
    parts.join(", ")
}

/// A vote, or a refusal.
pub fn vote(kind: &VoteKind) -> String {
    match kind {
        VoteKind::No(why) => format!("NO {}", abort(why)),
        VoteKind::Yes => "YES".to_owned(),
        VoteKind::Committed(stamp) => format!("COMMITTED at {stamp}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn abort(abort: &Abort) -> String {
    let place = abort.operation.map_or(String::new(), |place| format!(" operation {place}"));
    let met = match &abort.met {
        None => String::new(),
        Some(Met::Balance(balance)) => format!(" met {balance}"),
        Some(Met::Record(bytes)) => format!(" met {}", String::from_utf8_lossy(bytes)),
        Some(Met::Version(version)) => format!(" met version {version}"),
        Some(Met::Absent) => " met nothing".to_owned(),
    };
    format!("{:?}{place}{met}", abort.reason)
}

/// A decision.
pub fn decision(decision: &Decision) -> String {
    match &decision.result {
        Ok(stamp) => format!("COMMITTED at {stamp}"),
        Err(why) => format!("ABORTED {}", abort(why)),
    }
}

/// A reply to a caller.
pub fn answer(reply: &Reply) -> String {
    match reply {
        Reply::Decided(it) => decision(it),
        Reply::Rows { position, rows } => {
            let values: Vec<String> = rows.iter().map(|row| value(&row.value)).collect();
            format!("at {position} [{}]", values.join(", "))
        }
        other => format!("{other:?}"),
    }
}

/// What a row holds.
pub fn value(value: &RowValue) -> String {
    match value {
        RowValue::Absent => "nothing".to_owned(),
        RowValue::Balance(balance) => balance.to_string(),
        RowValue::Record(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// A read of a shard.
pub fn read(read: &ShardRead) -> String {
    if read.known {
        format!("read at {} after [{}]", read.position, names_of(&read.wait_for))
    } else {
        format!("read at {}", read.position)
    }
}

/// A shard's answer to a read.
pub fn read_answer(answer: &ShardReadAnswer) -> String {
    match answer {
        ShardReadAnswer::InDoubt(ids) => format!("in doubt [{}]", names_of(ids)),
        ShardReadAnswer::Rows(rows) => {
            let values: Vec<String> = rows.iter().map(|row| value(&row.value)).collect();
            format!("values [{}]", values.join(", "))
        }
        ShardReadAnswer::TooLarge => "too large".to_owned(),
        ShardReadAnswer::Pruned { history } => format!("nothing is kept below {history}"),
        ShardReadAnswer::History { changes, .. } => format!("{} changes", changes.len()),
    }
}

/// `name@shard` or `name@shard/r`: a partition that the placement puts on that shard. Panics if it isn't one.
pub fn row_of(placement: Placement, text: &str) -> RowKey {
    let (text, name) = text.strip_suffix("/r").map_or((text, "USD"), |text| (text, "r"));
    let (user, shard) = text.split_once('@').unwrap_or_else(|| panic!("{text} is no row"));
    let shard = ShardId(shard.parse().expect("a shard is a number"));
    let mut partitions = (0..).map(|place| format!("{user}@{shard}.{place}"));
    let partition =
        partitions.find(|partition| placement.shard_of(partition) == shard).expect("there is one");
    RowKey::new(&partition, name).expect("it is short")
}

/// `add ROW DELTA [floor N] [ceiling N]`, `put|insert ROW TEXT`, `delete ROW`, `exists|absent ROW`, `version ROW N`, `is ROW TEXT`,
/// `atleast|atmost|equals ROW N`. Panics at anything else.
pub fn operation_of(placement: Placement, text: &str) -> Operation {
    let mut words = text.split_whitespace();
    let mut word = || words.next().unwrap_or_else(|| panic!("{text:?} is too short"));
    let (verb, row) = (word(), row_of(placement, word()));
    let number = |text: &str| text.parse::<i128>().unwrap_or_else(|_| panic!("{text:?} is no number"));
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let kind = match verb {
        "add" => {
            let delta = number(word());
            let rest: Vec<&str> = words.collect();
            let bound =
                |name: &str| rest.iter().position(|word| *word == name).map(|place| number(rest[place + 1]));
            OperationKind::Add { delta, floor: bound("floor"), ceiling: bound("ceiling") }
        }
        "put" => OperationKind::Put(bytes(word())),
        "insert" => OperationKind::Insert(bytes(word())),
        "delete" => OperationKind::Delete,
        "exists" => OperationKind::Require(Condition::Exists(true)),
        "absent" => OperationKind::Require(Condition::Exists(false)),
        "version" => OperationKind::Require(Condition::VersionIs(Stamp(number(word()) as u64))),
        "is" => OperationKind::Require(Condition::RecordIs(bytes(word()))),
        "atleast" => OperationKind::Require(Condition::AtLeast(number(word()))),
        "atmost" => OperationKind::Require(Condition::AtMost(number(word()))),
        "equals" => OperationKind::Require(Condition::BalanceIs(number(word()))),
        _ => panic!("{verb} is no operation"),
    };
    Operation { row, kind }
}
