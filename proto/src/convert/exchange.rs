//! What a coordinator and a participant say to each other on their stream.
//!
//! Long messages are split, in order, so that none comes near the limit of the transport: [`to_shard_to_wire`] by bytes,
//! [`from_shard_to_wire`] by items. Of all things said only a greeting must be whole before it may be used; the
//! [`Assembler`] of the receiving side sees to that.

use std::collections::BTreeMap;

use prost::Message as _;
use verdict_protocol::{
    batch::{BatchError, Placement},
    ids::{Epoch, GroupId, NodeId, Number, ShardId, Stamp},
    messages::{
        Abort, AbortReason, Done, FromShard, Greeting, HeldPart, PartOutcome, Prepare, RowAt, ShardQuery,
        ShardRead, ShardReadAnswer, ToShard, Vote, VoteKind,
    },
    wire::EncodedPart,
};

use super::{
    answer::{
        abort_from_wire, abort_to_wire, part_change_from_wire, part_change_to_wire, value_from_wire,
        value_to_wire,
    },
    batch::{row_from_wire, row_to_wire},
    fields::{Field, FieldError, batch_id_bytes, content_hash, id_to_wire, inside, required},
};
use crate::v1;

/// The largest message that both ends of an `Exchange` stream should accept, in bytes: the one that splits stays below
/// `SPLIT_BYTES` plus one prepare or one answer to a read.
pub const EXCHANGE_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The most items that one list of a participant's message holds.
pub const ITEMS_PER_MESSAGE_MAX: usize = 1000;

/// A coordinator's message is split when it has this many bytes.
const SPLIT_BYTES: usize = 4 << 20;

/// The longest greeting that is put together, in parts: beyond every setting of how many a shard may hold.
const GREETING_PARTS_MAX: usize = 4_000_000;

/// What a coordinator said to one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToldShard {
    /// The shard that is meant.
    pub shard: ShardId,
    /// What goes into its log; may say nothing ([`ToShard::is_empty`]).
    pub message: ToShard,
    /// Reads, with their request numbers.
    pub reads: Vec<(u64, ShardRead)>,
}

/// What a participant said to a coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardTold {
    /// The shard that speaks.
    pub shard: ShardId,
    /// Answers of its log; may say nothing. A greeting is here only when it is complete.
    pub message: FromShard,
    /// Answers to reads, by request number.
    pub reads: Vec<(u64, ShardReadAnswer)>,
    /// Set: the node doesn't lead the shard; who does, if it knows.
    pub not_leader: Option<Option<NodeId>>,
}

/// Messages of a coordinator to one shard, in the order in which they must be sent. Empty if there is nothing to say.
pub fn to_shard_to_wire(
    shard: ShardId,
    message: &ToShard,
    reads: &[(u64, ShardRead)],
) -> Vec<v1::CoordinatorMessage> {
    if message.is_empty() && reads.is_empty() {
        return Vec::new();
    }
    let empty = v1::CoordinatorMessage {
        coordinator: message.coordinator.0,
        shard: shard.0,
        epoch: message.epoch.0,
        mark: Some(number_to_wire(message.mark)),
        shards: message.placement.shards,
        history: message.history.0,
        ..Default::default()
    };
    let mut pieces = vec![v1::CoordinatorMessage { greet: message.greet, ..empty.clone() }];
    let mut bytes = 0;
    let mut piece = |size: usize| {
        if bytes > 0 && bytes + size > SPLIT_BYTES {
            pieces.push(empty.clone());
            bytes = 0;
        }
        bytes += size;
        pieces.len() - 1
    };
    let outcomes: Vec<_> =
        message.outcomes.iter().map(outcome_to_wire).map(|one| (piece(one.encoded_len()), one)).collect();
    let prepares: Vec<_> =
        message.prepares.iter().map(prepare_to_wire).map(|one| (piece(one.encoded_len()), one)).collect();
    let reads: Vec<_> = reads
        .iter()
        .map(|(request, read)| read_to_wire(*request, read))
        .map(|one| (piece(one.encoded_len()), one))
        .collect();
    outcomes.into_iter().for_each(|(place, outcome)| pieces[place].outcomes.push(outcome));
    prepares.into_iter().for_each(|(place, prepare)| pieces[place].prepares.push(prepare));
    reads.into_iter().for_each(|(place, read)| pieces[place].reads.push(read));
    pieces
}

/// A message of a coordinator.
pub fn to_shard_from_wire(message: v1::CoordinatorMessage) -> Result<ToldShard, FieldError> {
    let mark = message.mark.map(number_from_wire).transpose().map_err(inside("mark"))?;
    if message.history == u64::MAX {
        // Nobody counts so far, and there is a stamp behind every mark.
        return Err(BatchError::new("history", "is out of range"));
    }
    Ok(ToldShard {
        shard: ShardId(message.shard),
        message: ToShard {
            coordinator: GroupId(message.coordinator),
            placement: Placement { shards: message.shards },
            epoch: Epoch(message.epoch),
            mark: mark.unwrap_or_default(),
            history: Stamp(message.history),
            greet: message.greet,
            outcomes: list("outcomes", message.outcomes, outcome_from_wire)?,
            prepares: list("prepares", message.prepares, prepare_from_wire)?,
        },
        reads: list("reads", message.reads, read_from_wire)?,
    })
}

fn list<W, T>(field: &str, items: Vec<W>, convert: impl Fn(W) -> Field<T>) -> Field<Vec<T>> {
    let convert = |(place, item)| convert(item).map_err(inside(format_args!("{field}[{place}]")));
    items.into_iter().enumerate().map(convert).collect()
}

/// A number.
pub fn number_to_wire(number: Number) -> v1::Number {
    v1::Number { epoch: number.epoch.0, sequence: number.sequence }
}

/// The opposite of [`number_to_wire`]. The greatest sequence is refused: nobody counts so far, and the next one would overflow.
pub fn number_from_wire(number: v1::Number) -> Result<Number, FieldError> {
    if number.sequence == u64::MAX {
        return Err(BatchError::new("sequence", "is out of range"));
    }
    Ok(Number { epoch: Epoch(number.epoch), sequence: number.sequence })
}

fn number_in(number: Option<v1::Number>) -> Field<Number> {
    number_from_wire(required("number", number)?).map_err(inside("number"))
}

fn shards_to_wire(shards: &[ShardId]) -> Vec<u32> {
    shards.iter().map(|shard| shard.0).collect()
}

fn shards_from_wire(shards: Vec<u32>) -> Vec<ShardId> {
    shards.into_iter().map(ShardId).collect()
}

fn prepare_to_wire(prepare: &Prepare) -> v1::Prepare {
    v1::Prepare {
        number: Some(number_to_wire(prepare.number)),
        batch_id: id_to_wire(prepare.id),
        hash: bytes::Bytes::copy_from_slice(&prepare.hash.0),
        shards: shards_to_wire(&prepare.shards),
        gives_up: prepare.gives_up.iter().copied().map(number_to_wire).collect(),
        part: prepare.part.bytes().clone(),
        sole: prepare.sole.unwrap_or_default().0,
    }
}

/// The part is not looked into.
fn prepare_from_wire(prepare: v1::Prepare) -> Field<Prepare> {
    Ok(Prepare {
        number: number_in(prepare.number)?,
        id: batch_id_bytes("batch_id", &prepare.batch_id)?,
        hash: content_hash("hash", &prepare.hash)?,
        shards: shards_from_wire(prepare.shards),
        gives_up: list("gives_up", prepare.gives_up, number_from_wire)?,
        sole: (prepare.sole != 0).then_some(Stamp(prepare.sole)),
        part: EncodedPart::from_wire(prepare.part),
    })
}

fn outcome_to_wire(outcome: &PartOutcome) -> v1::PartOutcome {
    debug_assert!(
        outcome.commit != Some(Stamp(0)),
        "no batch commits at stamp 0, which means abort on the wire"
    );
    v1::PartOutcome {
        batch_id: id_to_wire(outcome.id),
        number: Some(number_to_wire(outcome.number)),
        stamp: outcome.commit.unwrap_or_default().0,
        gives_up: outcome.gives_up.iter().copied().map(number_to_wire).collect(),
    }
}

fn outcome_from_wire(outcome: v1::PartOutcome) -> Field<PartOutcome> {
    Ok(PartOutcome {
        id: batch_id_bytes("batch_id", &outcome.batch_id)?,
        number: number_in(outcome.number)?,
        commit: (outcome.stamp != 0).then_some(Stamp(outcome.stamp)),
        gives_up: list("gives_up", outcome.gives_up, number_from_wire)?,
    })
}

/// A read of one shard.
pub fn read_to_wire(request: u64, read: &ShardRead) -> v1::ReadPart {
    let (rows, history) = match &read.query {
        ShardQuery::Rows(rows) => (rows.iter().map(row_to_wire).collect(), None),
        ShardQuery::History { row, from, limit } => {
            let limit = u32::try_from(*limit).unwrap_or(u32::MAX);
            (vec![row_to_wire(row)], Some(v1::HistoryPart { from: from.0, limit }))
        }
    };
    v1::ReadPart {
        request,
        position: read.position.0,
        known: read.known,
        wait_for: read.wait_for.iter().copied().map(id_to_wire).collect(),
        rows,
        history,
    }
}

/// The opposite of [`read_to_wire`]: the request number and the read.
pub fn read_from_wire(read: v1::ReadPart) -> Result<(u64, ShardRead), FieldError> {
    let mut rows = list("rows", read.rows, row_from_wire)?;
    let query = match read.history {
        None if rows.is_empty() => return Err(BatchError::new("rows", "is empty")),
        None => ShardQuery::Rows(rows),
        Some(history) => match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => {
                ShardQuery::History { row, from: Stamp(history.from), limit: history.limit as usize }
            }
            _ => return Err(BatchError::new("rows", "must be exactly one row for a history")),
        },
    };
    let wait_for = list("wait_for", read.wait_for, |id| batch_id_bytes("", &id))?;
    Ok((read.request, ShardRead { position: Stamp(read.position), known: read.known, wait_for, query }))
}

/// Messages of a shard to a coordinator, in the order in which they must be sent. Empty if there is nothing to say.
///
/// No list has more than [`ITEMS_PER_MESSAGE_MAX`] items. The greeting goes first, and is complete before votes follow.
pub fn from_shard_to_wire(shard: ShardId, message: &FromShard) -> Vec<v1::ParticipantMessage> {
    let empty = v1::ParticipantMessage { shard: shard.0, ..Default::default() };
    let mut messages = Vec::new();
    if let Some(greeting) = &message.greeting {
        let epoch = greeting.epoch.0;
        let mut left = greeting.parts.as_slice();
        loop {
            let (now, rest) = left.split_at(left.len().min(ITEMS_PER_MESSAGE_MAX));
            let parts = now.iter().map(held_to_wire).collect();
            let greeting = v1::Greeting { epoch, parts, more: !rest.is_empty() };
            messages.push(v1::ParticipantMessage { greeting: Some(greeting), ..empty.clone() });
            left = rest;
            if left.is_empty() {
                break;
            }
        }
    }
    let mut votes = message.votes.chunks(ITEMS_PER_MESSAGE_MAX);
    let mut done = message.done.chunks(ITEMS_PER_MESSAGE_MAX);
    let mut asks = message.asks.chunks(ITEMS_PER_MESSAGE_MAX);
    loop {
        let now = (votes.next(), done.next(), asks.next());
        if let (None, None, None) = now {
            return messages;
        }
        let (votes, done, asks) =
            (now.0.unwrap_or_default(), now.1.unwrap_or_default(), now.2.unwrap_or_default());
        // The end of a greeting and the first of the rest share a message.
        let last = match messages.last_mut() {
            Some(last) if last.votes.is_empty() && last.done.is_empty() && last.asks.is_empty() => last,
            _ => {
                messages.push(empty.clone());
                messages.last_mut().expect("was just pushed")
            }
        };
        last.votes = votes.iter().map(vote_to_wire).collect();
        last.done = done.iter().map(done_to_wire).collect();
        last.asks = asks.iter().map(held_to_wire).collect();
    }
}

/// "This node doesn't lead the shard", and who does if it is known.
pub fn not_leader_to_wire(shard: ShardId, leader: Option<NodeId>) -> v1::ParticipantMessage {
    let not_leader = v1::NotLeader { leader: leader.unwrap_or_default().0 };
    v1::ParticipantMessage { shard: shard.0, not_leader: Some(not_leader), ..Default::default() }
}

/// Puts together what comes on one stream from participants: greetings that were split, mainly. Make a new one for each stream.
#[derive(Clone, Debug, Default)]
pub struct Assembler {
    /// Greetings of which more is to come.
    greetings: BTreeMap<ShardId, Greeting>,
}

impl Assembler {
    /// Takes one message of the stream, in the order in which they came. After an error the stream must not be used any more.
    pub fn take(&mut self, message: v1::ParticipantMessage) -> Result<ShardTold, FieldError> {
        let shard = ShardId(message.shard);
        let not_leader = message.not_leader.map(|said| (said.leader != 0).then_some(NodeId(said.leader)));
        if not_leader.is_some() {
            // Whatever greeting was under way will not be completed.
            self.greetings.remove(&shard);
        }
        let greeting = match message.greeting {
            None => None,
            Some(greeting) => self.greeting(shard, greeting).map_err(inside("greeting"))?,
        };
        Ok(ShardTold {
            shard,
            message: FromShard {
                greeting,
                votes: list("votes", message.votes, vote_from_wire)?,
                done: list("done", message.done, done_from_wire)?,
                asks: list("asks", message.asks, held_from_wire)?,
            },
            reads: list("reads", message.reads, read_answer_from_wire)?,
            not_leader,
        })
    }

    fn greeting(&mut self, shard: ShardId, piece: v1::Greeting) -> Field<Option<Greeting>> {
        let epoch = Epoch(piece.epoch);
        let parts = list("parts", piece.parts, held_from_wire)?;
        let mut greeting = match self.greetings.remove(&shard) {
            Some(begun) if begun.epoch == epoch => begun,
            // The beginning of another one is not completed any more.
            _ => Greeting { epoch, parts: Vec::new() },
        };
        if greeting.parts.len() + parts.len() > GREETING_PARTS_MAX {
            return Err(BatchError::new("parts", format!("are more than {GREETING_PARTS_MAX}")));
        }
        greeting.parts.extend(parts);
        if piece.more {
            self.greetings.insert(shard, greeting);
            return Ok(None);
        }
        Ok(Some(greeting))
    }
}

fn held_to_wire(part: &HeldPart) -> v1::HeldPart {
    v1::HeldPart {
        number: Some(number_to_wire(part.number)),
        batch_id: id_to_wire(part.id),
        hash: bytes::Bytes::copy_from_slice(&part.hash.0),
        shards: shards_to_wire(&part.shards),
        vote: kind_to_wire(&part.vote).into(),
        stamp: stamp_of(&part.vote),
    }
}

/// The reason of a NO is not on the wire: who lists a part that voted NO is told that it is interrupted.
fn held_from_wire(part: v1::HeldPart) -> Field<HeldPart> {
    let no = |_| Ok(Abort::because(AbortReason::Interrupted));
    Ok(HeldPart {
        number: number_in(part.number)?,
        id: batch_id_bytes("batch_id", &part.batch_id)?,
        hash: content_hash("hash", &part.hash)?,
        shards: shards_from_wire(part.shards),
        vote: kind_from_wire("vote", part.vote, part.stamp, None, no)?,
    })
}

fn vote_to_wire(vote: &Vote) -> v1::Vote {
    let aborted = match &vote.kind {
        VoteKind::No(abort) => Some(abort_to_wire(abort)),
        _ => None,
    };
    v1::Vote {
        batch_id: id_to_wire(vote.id),
        number: Some(number_to_wire(vote.number)),
        kind: kind_to_wire(&vote.kind).into(),
        aborted,
        stamp: stamp_of(&vote.kind),
    }
}

fn vote_from_wire(vote: v1::Vote) -> Field<Vote> {
    let no = |aborted| abort_from_wire(required("aborted", aborted)?).map_err(inside("aborted"));
    Ok(Vote {
        id: batch_id_bytes("batch_id", &vote.batch_id)?,
        number: number_in(vote.number)?,
        kind: kind_from_wire("kind", vote.kind, vote.stamp, vote.aborted, no)?,
    })
}

/// The stamp of a commit; 0 for all other votes.
fn stamp_of(kind: &VoteKind) -> u64 {
    match kind {
        VoteKind::Committed(stamp) => stamp.0,
        _ => 0,
    }
}

fn kind_to_wire(kind: &VoteKind) -> v1::VoteKind {
    match kind {
        VoteKind::Yes => v1::VoteKind::Yes,
        VoteKind::No(_) => v1::VoteKind::No,
        VoteKind::Waiting => v1::VoteKind::Waiting,
        VoteKind::Conflict => v1::VoteKind::Conflict,
        VoteKind::OldEpoch => v1::VoteKind::OldEpoch,
        VoteKind::Finished => v1::VoteKind::Finished,
        VoteKind::Held => v1::VoteKind::Held,
        VoteKind::Overloaded => v1::VoteKind::Overloaded,
        VoteKind::Committed(_) => v1::VoteKind::Committed,
    }
}

fn kind_from_wire(
    field: &str,
    kind: i32,
    stamp: u64,
    aborted: Option<v1::Aborted>,
    no: impl FnOnce(Option<v1::Aborted>) -> Field<Abort>,
) -> Field<VoteKind> {
    Ok(match v1::VoteKind::try_from(kind) {
        Ok(v1::VoteKind::Yes) => VoteKind::Yes,
        Ok(v1::VoteKind::No) => VoteKind::No(no(aborted)?),
        Ok(v1::VoteKind::Waiting) => VoteKind::Waiting,
        Ok(v1::VoteKind::Conflict) => VoteKind::Conflict,
        Ok(v1::VoteKind::OldEpoch) => VoteKind::OldEpoch,
        Ok(v1::VoteKind::Finished) => VoteKind::Finished,
        Ok(v1::VoteKind::Held) => VoteKind::Held,
        Ok(v1::VoteKind::Committed) if stamp == 0 => return Err(BatchError::new("stamp", "is missing")),
        Ok(v1::VoteKind::Committed) => VoteKind::Committed(Stamp(stamp)),
        Ok(v1::VoteKind::Overloaded) => VoteKind::Overloaded,
        Ok(v1::VoteKind::Unspecified) => return Err(BatchError::new(field, "is missing")),
        Err(_) => return Err(BatchError::new(field, format!("{kind} is not known here"))),
    })
}

fn done_to_wire(done: &Done) -> v1::Done {
    v1::Done { batch_id: id_to_wire(done.id), number: Some(number_to_wire(done.number)), lost: done.lost }
}

fn done_from_wire(done: v1::Done) -> Field<Done> {
    Ok(Done {
        id: batch_id_bytes("batch_id", &done.batch_id)?,
        number: number_in(done.number)?,
        lost: done.lost,
    })
}

/// The answer to a read. An answer of no rows at all can't be told from an empty history; nobody asks for no rows.
pub fn read_answer_to_wire(request: u64, answer: &ShardReadAnswer) -> v1::ReadAnswer {
    let empty = v1::ReadAnswer { request, ..Default::default() };
    match answer {
        ShardReadAnswer::InDoubt(ids) => {
            v1::ReadAnswer { in_doubt: ids.iter().copied().map(id_to_wire).collect(), ..empty }
        }
        ShardReadAnswer::Rows(rows) => {
            let value =
                |at: &RowAt| v1::PartValue { value: Some(value_to_wire(&at.value)), version: at.version.0 };
            v1::ReadAnswer { values: rows.iter().map(value).collect(), ..empty }
        }
        ShardReadAnswer::History { changes, next, oldest } => v1::ReadAnswer {
            changes: changes.iter().map(part_change_to_wire).collect(),
            next: next.unwrap_or_default().0,
            oldest: oldest.0,
            ..empty
        },
        ShardReadAnswer::TooLarge => v1::ReadAnswer { too_large: true, ..empty },
        ShardReadAnswer::Pruned { history } => v1::ReadAnswer { pruned: history.0, ..empty },
    }
}

/// The opposite of [`read_answer_to_wire`]: the request number and the answer.
pub fn read_answer_from_wire(answer: v1::ReadAnswer) -> Result<(u64, ShardReadAnswer), FieldError> {
    let kinds = [!answer.in_doubt.is_empty(), !answer.values.is_empty(), !answer.changes.is_empty()];
    let request = answer.request;
    Ok((
        request,
        match kinds {
            [true, false, false] => {
                ShardReadAnswer::InDoubt(list("in_doubt", answer.in_doubt, |id| batch_id_bytes("", &id))?)
            }
            [false, true, false] => {
                let value = |part: v1::PartValue| {
                    let value = value_from_wire(required("value", part.value)?).map_err(inside("value"))?;
                    Ok(RowAt { version: Stamp(part.version), value })
                };
                ShardReadAnswer::Rows(list("values", answer.values, value)?)
            }
            [false, false, false] if answer.too_large => ShardReadAnswer::TooLarge,
            [false, false, false] if answer.pruned > 0 => {
                ShardReadAnswer::Pruned { history: Stamp(answer.pruned) }
            }
            [false, false, _] => ShardReadAnswer::History {
                changes: list("changes", answer.changes, part_change_from_wire)?,
                next: (answer.next != 0).then_some(Stamp(answer.next)),
                oldest: Stamp(answer.oldest),
            },
            _ => return Err(BatchError::new("values", "are mixed with changes or batches in doubt")),
        },
    ))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::{collection::vec, option, prelude::*};
    use verdict_protocol::{
        batch::{Operation, OperationKind},
        ids::{BatchId, ContentHash, Millis},
        messages::RowValue,
    };

    use super::{
        super::{
            answer::tests::{any_abort, any_change, any_value},
            batch::tests::{any_operation, any_row},
        },
        *,
    };

    fn any_number() -> impl Strategy<Value = Number> {
        (any::<u64>(), 0..u64::MAX).prop_map(|(epoch, sequence)| Number { epoch: Epoch(epoch), sequence })
    }

    fn any_id() -> impl Strategy<Value = BatchId> {
        any::<[u8; 16]>().prop_map(BatchId)
    }

    fn any_shards() -> impl Strategy<Value = Vec<ShardId>> {
        vec(any::<u32>().prop_map(ShardId), 0..4)
    }

    fn any_prepare() -> impl Strategy<Value = Prepare> {
        let operations = vec((any::<u32>(), any_operation()), 0..4);
        let sole = option::of((1u64..).prop_map(Stamp));
        (any_number(), any_id(), any::<[u8; 32]>(), any_shards(), vec(any_number(), 0..3), sole, operations)
            .prop_map(|(number, id, hash, shards, gives_up, sole, operations)| Prepare {
                number,
                id,
                hash: ContentHash(hash),
                shards,
                gives_up,
                sole,
                part: EncodedPart::new(operations.iter().map(|(place, operation)| (*place, operation))),
            })
    }

    fn any_outcome() -> impl Strategy<Value = PartOutcome> {
        (any_id(), any_number(), option::of((1u64..).prop_map(Stamp)), vec(any_number(), 0..3))
            .prop_map(|(id, number, commit, gives_up)| PartOutcome { id, number, commit, gives_up })
    }

    fn any_read() -> impl Strategy<Value = (u64, ShardRead)> {
        let query = prop_oneof![
            vec(any_row(), 1..4).prop_map(ShardQuery::Rows),
            (any_row(), any::<u64>(), any::<u32>()).prop_map(|(row, from, limit)| ShardQuery::History {
                row,
                from: Stamp(from),
                limit: limit as usize
            }),
        ];
        (any::<u64>(), any::<u64>(), any::<bool>(), vec(any_id(), 0..3), query).prop_map(
            |(request, position, known, wait_for, query)| {
                (request, ShardRead { position: Stamp(position), known, wait_for, query })
            },
        )
    }

    fn any_kind() -> impl Strategy<Value = VoteKind> {
        prop_oneof![
            Just(VoteKind::Yes),
            any_abort().prop_map(VoteKind::No),
            Just(VoteKind::Waiting),
            Just(VoteKind::Conflict),
            Just(VoteKind::OldEpoch),
            Just(VoteKind::Finished),
            Just(VoteKind::Held),
            Just(VoteKind::Overloaded),
            (1u64..).prop_map(|stamp| VoteKind::Committed(Stamp(stamp))),
        ]
    }

    fn any_held() -> impl Strategy<Value = HeldPart> {
        let vote = prop_oneof![
            Just(VoteKind::Yes),
            Just(VoteKind::Waiting),
            (1u64..).prop_map(|stamp| VoteKind::Committed(Stamp(stamp))),
        ];
        (any_number(), any_id(), any::<[u8; 32]>(), any_shards(), vote).prop_map(
            |(number, id, hash, shards, vote)| HeldPart { number, id, hash: ContentHash(hash), shards, vote },
        )
    }

    fn any_from_shard() -> impl Strategy<Value = FromShard> {
        let greeting = (any::<u64>(), vec(any_held(), 0..3))
            .prop_map(|(epoch, parts)| Greeting { epoch: Epoch(epoch), parts });
        let vote =
            (any_id(), any_number(), any_kind()).prop_map(|(id, number, kind)| Vote { id, number, kind });
        let done =
            (any_id(), any_number(), any::<bool>()).prop_map(|(id, number, lost)| Done { id, number, lost });
        (option::of(greeting), vec(vote, 0..3), vec(done, 0..3), vec(any_held(), 0..3))
            .prop_map(|(greeting, votes, done, asks)| FromShard { greeting, votes, done, asks })
    }

    fn any_answer() -> impl Strategy<Value = ShardReadAnswer> {
        let at =
            (any::<u64>(), any_value()).prop_map(|(version, value)| RowAt { version: Stamp(version), value });
        let next = option::of((1u64..).prop_map(Stamp));
        prop_oneof![
            vec(any_id(), 1..3).prop_map(ShardReadAnswer::InDoubt),
            vec(at, 1..4).prop_map(ShardReadAnswer::Rows),
            (vec(any_change(), 0..3), next, any::<u64>()).prop_map(|(changes, next, oldest)| {
                ShardReadAnswer::History { changes, next, oldest: Stamp(oldest) }
            }),
            Just(ShardReadAnswer::TooLarge),
            (1u64..).prop_map(|history| ShardReadAnswer::Pruned { history: Stamp(history) }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_a_coordinator_says_comes_back(
            (coordinator, epoch, mark, history, greet) in
                (any::<u32>(), any::<u64>(), any_number(), any::<u64>(), any::<bool>()),
            outcomes in vec(any_outcome(), 0..3),
            prepares in vec(any_prepare(), 0..3),
            reads in vec(any_read(), 0..3),
        ) {
            let (coordinator, epoch, history) = (GroupId(coordinator), Epoch(epoch), Stamp(history));
            let placement = Placement { shards: 4 };
            let message = ToShard { coordinator, placement, epoch, mark, history, greet, outcomes, prepares };
            let pieces = to_shard_to_wire(ShardId(3), &message, &reads);
            if message.is_empty() && reads.is_empty() {
                prop_assert!(pieces.is_empty());
            } else {
                let told = to_shard_from_wire(pieces[0].clone()).unwrap();
                prop_assert_eq!(pieces.len(), 1);
                prop_assert_eq!(told, ToldShard { shard: ShardId(3), message, reads });
            }
        }

        #[test]
        fn what_a_shard_says_comes_back(
            message in any_from_shard(),
            answers in vec((any::<u64>(), any_answer()), 0..3),
        ) {
            let mut wire = from_shard_to_wire(ShardId(3), &message);
            if wire.is_empty() {
                wire.push(v1::ParticipantMessage { shard: 3, ..Default::default() });
            }
            wire[0].reads =
                answers.iter().map(|(request, answer)| read_answer_to_wire(*request, answer)).collect();
            prop_assert_eq!(wire.len(), 1);
            let told = Assembler::default().take(wire.remove(0)).unwrap();
            prop_assert_eq!(told, ShardTold { shard: ShardId(3), message, reads: answers, not_leader: None });
        }
    }

    fn held(sequence: u64) -> HeldPart {
        let id = BatchId::from_parts(Millis(sequence), [0; 10]);
        let number = Number { epoch: Epoch(1), sequence };
        HeldPart { number, id, hash: ContentHash([7; 32]), shards: vec![ShardId(1)], vote: VoteKind::Yes }
    }

    #[test]
    fn a_long_greeting_is_split_and_put_together() {
        let parts: Vec<HeldPart> = (1..=2500).map(held).collect();
        let vote = Vote { id: parts[0].id, number: parts[0].number, kind: VoteKind::Yes };
        let message = FromShard {
            greeting: Some(Greeting { epoch: Epoch(9), parts }),
            votes: vec![vote; 1001],
            ..Default::default()
        };
        let wire = from_shard_to_wire(ShardId(2), &message);
        let shape: Vec<_> = wire
            .iter()
            .map(|one| (one.greeting.as_ref().map(|piece| (piece.parts.len(), piece.more)), one.votes.len()))
            .collect();
        let expected =
            [(Some((1000, true)), 0), (Some((1000, true)), 0), (Some((500, false)), 1000), (None, 1)];
        assert_eq!(shape, expected);

        let mut assembler = Assembler::default();
        let mut heard = FromShard::default();
        for (place, one) in wire.into_iter().enumerate() {
            let told = assembler.take(one).unwrap();
            assert_eq!(told.message.greeting.is_some(), place == 2, "a greeting is whole or not there");
            heard.greeting = heard.greeting.or(told.message.greeting);
            heard.votes.extend(told.message.votes);
        }
        assert!(heard == message);
    }

    #[test]
    fn half_a_greeting_of_a_deposed_leader_is_dropped() {
        let piece = |epoch, sequence, more| v1::ParticipantMessage {
            shard: 2,
            greeting: Some(v1::Greeting { epoch, parts: vec![held_to_wire(&held(sequence))], more }),
            ..Default::default()
        };
        let mut assembler = Assembler::default();
        assert_eq!(assembler.take(piece(5, 1, true)).unwrap().message.greeting, None);
        let told = assembler.take(not_leader_to_wire(ShardId(2), Some(NodeId(3)))).unwrap();
        assert_eq!(told.not_leader, Some(Some(NodeId(3))));
        let whole = Greeting { epoch: Epoch(5), parts: vec![held(2)] };
        assert_eq!(assembler.take(piece(5, 2, false)).unwrap().message.greeting, Some(whole));
        assembler.take(piece(5, 1, true)).unwrap();
        let newer = Greeting { epoch: Epoch(6), parts: vec![held(3)] };
        assert_eq!(assembler.take(piece(6, 3, false)).unwrap().message.greeting, Some(newer));
        let unknown = assembler.take(not_leader_to_wire(ShardId(2), None)).unwrap();
        assert_eq!(unknown.not_leader, Some(None));
    }

    #[test]
    fn a_long_message_to_a_shard_is_split_in_order() {
        let row = verdict_protocol::batch::RowKey::new("a", "x").unwrap();
        let kind = OperationKind::Put(Bytes::from(vec![0; 1 << 20]));
        let prepare = |sequence| Prepare {
            number: Number { epoch: Epoch(1), sequence },
            id: held(sequence).id,
            hash: ContentHash([0; 32]),
            shards: vec![ShardId(1)],
            gives_up: vec![],
            sole: Some(Stamp(sequence)),
            part: EncodedPart::new([(0, &Operation { row: row.clone(), kind: kind.clone() })]),
        };
        let mark = Number { epoch: Epoch(1), sequence: 1 };
        let message =
            ToShard { mark, greet: true, prepares: (2..12).map(prepare).collect(), ..Default::default() };
        let pieces = to_shard_to_wire(ShardId(1), &message, &[]);
        assert_eq!(pieces.iter().map(|piece| piece.greet).collect::<Vec<_>>(), [true, false, false, false]);
        assert!(pieces.iter().all(|piece| piece.encoded_len() <= SPLIT_BYTES + 100));
        let told: Vec<_> =
            pieces.into_iter().map(|piece| to_shard_from_wire(piece).unwrap().message).collect();
        assert!(told.iter().all(|piece| piece.mark == mark));
        assert!(told.into_iter().flat_map(|piece| piece.prepares).eq(message.prepares));
    }

    #[test]
    fn a_commit_of_the_only_participant_carries_its_stamp() {
        let kind = VoteKind::Committed(Stamp(77));
        let part = HeldPart { vote: kind.clone(), ..held(1) };
        assert_eq!(held_from_wire(held_to_wire(&part)).unwrap(), part);
        let vote = Vote { id: part.id, number: part.number, kind };
        let wire = vote_to_wire(&vote);
        assert_eq!(vote_from_wire(wire.clone()).unwrap(), vote);
        let refused = vote_from_wire(v1::Vote { stamp: 0, ..wire }).unwrap_err();
        assert_eq!(refused.to_string(), "stamp: is missing");
    }

    #[test]
    fn a_malformed_message_names_its_field() {
        let refused = |message| to_shard_from_wire(message).unwrap_err().to_string();
        let prepare = prepare_to_wire(&Prepare {
            number: Number { epoch: Epoch(1), sequence: 1 },
            id: held(1).id,
            hash: ContentHash([0; 32]),
            shards: vec![],
            gives_up: vec![],
            sole: None,
            part: EncodedPart::default(),
        });
        let with = |prepares| v1::CoordinatorMessage { prepares, ..Default::default() };
        let short = v1::Prepare { batch_id: Bytes::from_static(b"123"), ..prepare.clone() };
        assert_eq!(
            refused(with(vec![prepare.clone(), short])),
            "prepares[1].batch_id: is 3 bytes long, not 16"
        );
        let no_number = v1::Prepare { number: None, ..prepare };
        assert_eq!(refused(with(vec![no_number])), "prepares[0].number: is missing");
        let last = Some(v1::Number { epoch: 1, sequence: u64::MAX });
        assert_eq!(
            refused(v1::CoordinatorMessage { mark: last, ..Default::default() }),
            "mark.sequence: is out of range"
        );
        let history = v1::CoordinatorMessage { history: u64::MAX, ..Default::default() };
        assert_eq!(refused(history), "history: is out of range");
        let empty = v1::CoordinatorMessage { reads: vec![v1::ReadPart::default()], ..Default::default() };
        assert_eq!(refused(empty), "reads[0].rows: is empty");

        let refused = |message| Assembler::default().take(message).unwrap_err().to_string();
        let vote = |kind| v1::Vote {
            batch_id: id_to_wire(held(1).id),
            number: Some(v1::Number { epoch: 1, sequence: 1 }),
            kind,
            aborted: None,
            stamp: 0,
        };
        let voted = |kind| v1::ParticipantMessage { votes: vec![vote(kind)], ..Default::default() };
        assert_eq!(refused(voted(0)), "votes[0].kind: is missing");
        assert_eq!(refused(voted(77)), "votes[0].kind: 77 is not known here");
        assert_eq!(refused(voted(v1::VoteKind::No.into())), "votes[0].aborted: is missing");
        let mut both = read_answer_to_wire(1, &ShardReadAnswer::InDoubt(vec![held(1).id]));
        both.values = read_answer_to_wire(1, &ShardReadAnswer::Rows(vec![RowAt::default()])).values;
        let mixed = v1::ParticipantMessage { reads: vec![both.clone()], ..Default::default() };
        assert!(refused(mixed).starts_with("reads[0].values: are mixed"));
        both.in_doubt.clear();
        both.values[0].value = Some(v1::Value { kind: None });
        let empty = v1::ParticipantMessage { reads: vec![both], ..Default::default() };
        assert_eq!(refused(empty), "reads[0].values[0].value.kind: is missing");
        assert_eq!(RowAt::default().value, RowValue::Absent);
    }
}
