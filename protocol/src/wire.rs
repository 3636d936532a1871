//! Batches and parts in the form of the wire contract (`proto/verdict/v1/types.proto` and `participant.proto`).
//!
//! A batch is decoded once, by the node that a client sent it to, and each of its parts is encoded once, right then
//! ([`Batch::split`]). From there on a part is bytes ([`EncodedPart`]): through the coordinators to its shard, and into the log of
//! that, whose replicas decode it. So this is the hot path of every batch, and is read and written here without anything in between.
//!
//! Invariants:
//! - The same part is always encoded to the same bytes: the hash of a batch's contents is made of them. Fields stand in the order of
//!   their numbers; what has its default value is left out.
//! - What any encoder of Protocol Buffers makes of what is inside a client's batch is understood: fields in any order, unknown fields, fields that come
//!   twice (the last one counts, and messages are merged). Groups, which the third version doesn't have, are refused.
//! - Whatever is wrong is a [`BatchError`] with the name of the field.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    batch::{Batch, BatchError, Condition, Operation, OperationKind, Part, RowKey},
    ids::{BatchId, Stamp},
};

/// The operations of one shard, as `Part` of the contract.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EncodedPart(Bytes);

impl EncodedPart {
    /// Of operations, each with its place in the batch.
    pub fn new<'a>(operations: impl IntoIterator<Item = (u32, &'a Operation)>) -> EncodedPart {
        let mut bytes = Vec::with_capacity(256);
        operations.into_iter().for_each(|(place, operation)| write_operation(&mut bytes, place, operation));
        EncodedPart(bytes.into())
    }

    /// As it came from somebody who may have made it otherwise, or of something else: [`EncodedPart::decode`] tells.
    pub fn from_wire(bytes: Bytes) -> EncodedPart {
        EncodedPart(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// The operations. What records hold is copied, so that none of them keeps all of the part in memory. Keys of rows are taken as they are:
    /// [`RowKey::check`] tells whether they are any.
    pub fn decode(&self) -> Result<Part, BatchError> {
        let mut part = Part::with_capacity(4);
        let mut reader = Reader { left: &self.0 };
        while let Some((field, value)) = reader.next().map_err(|why| why.of("part"))? {
            if field == 1 {
                let inside = |error| within(format_args!("part.operations[{}]", part.len()), error);
                let one = value.message().map_err(|why| why.of("")).and_then(read_part_operation);
                part.push(one.map_err(inside)?);
            }
        }
        Ok(part)
    }
}

impl fmt::Debug for EncodedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.decode() {
            Ok(part) if part.iter().all(|(_, operation)| operation.row.check().is_ok()) => part.fmt(f),
            Ok(_) | Err(_) => write!(f, "{} bytes that are no part", self.0.len()),
        }
    }
}

/// As bytes in one piece.
impl Serialize for EncodedPart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for EncodedPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<EncodedPart, D::Error> {
        struct Piece;
        impl de::Visitor<'_> for Piece {
            type Value = EncodedPart;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an encoded part")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<EncodedPart, E> {
                Ok(EncodedPart(Bytes::copy_from_slice(bytes)))
            }
        }
        deserializer.deserialize_bytes(Piece)
    }
}

/// What of a batch is told of before it is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head<'a> {
    /// Its id, as it was sent. Empty if that can't be found.
    pub id: &'a str,
    /// How long the coordinator may try; 0: the default.
    pub timeout_ms: u32,
}

impl Head<'_> {
    /// Of a batch that may be anything: what can't be found is left at its default.
    pub fn of_wire(bytes: &[u8]) -> Head<'_> {
        let (mut head, mut reader) = (Head::default(), Reader { left: bytes });
        while let Ok(Some((field, value))) = reader.next() {
            match field {
                1 => head.id = value.text().unwrap_or_default(),
                2 => head.timeout_ms = value.number().unwrap_or_default() as u32,
                _ => {}
            }
        }
        head
    }
}

impl Batch {
    /// A batch as a client sent it (`Batch` of the contract), with at most so many operations. What records hold stays where it is. What
    /// concerns the batch as a whole (limits, clashes, `zero_sum`) is left to [`Batch::check`].
    pub fn from_wire(bytes: &Bytes, operations_max: usize) -> Result<Batch, BatchError> {
        let (mut id, mut timeout_ms, mut zero_sum, mut count) = ("", 0, false, 0);
        let mut operations = Vec::with_capacity(8);
        let mut reader = Reader { left: bytes };
        let malformed = |why: Malformed| why.of("batch");
        while let Some((field, value)) = reader.next().map_err(malformed)? {
            match field {
                1 => id = value.text().map_err(|why| why.of("batch.id"))?,
                2 => timeout_ms = value.number().map_err(|why| why.of("batch.timeout_ms"))? as u32,
                // Only counted: nothing is made of a batch that is too long.
                3 if count >= operations_max => count += 1,
                3 => {
                    count += 1;
                    let one = value.message().map_err(|why| why.of(""));
                    let one = one.and_then(|one| read_operation(one, |piece| bytes.slice_ref(piece)));
                    let place = operations.len();
                    operations
                        .push(one.map_err(|error| within(format_args!("batch.operations[{place}]"), error))?);
                }
                4 => zero_sum = value.number().map_err(|why| why.of("batch.zero_sum"))? != 0,
                _ => {}
            }
        }
        let id = batch_id("batch.id", id)?;
        if count > operations_max {
            let problem = format!("has {count} operations, at most {operations_max} are allowed");
            return Err(BatchError::new("batch.operations", problem));
        }
        Ok(Batch { id, timeout_ms, operations, zero_sum })
    }
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Malformed {
    /// They end too early.
    Cut,
    /// A number, a tag or a length is none.
    Number,
    /// A field has another type than the contract says.
    Type,
    /// A text is not UTF-8.
    Text,
}

impl Malformed {
    #[cold]
    fn of(self, field: &str) -> BatchError {
        let problem = match self {
            Malformed::Cut => "is no message of Protocol Buffers: it ends too early",
            Malformed::Number => "is no message of Protocol Buffers: a tag, a number or a length is none",
            Malformed::Type => "has another type than verdict/v1/types.proto says",
            Malformed::Text => "is not UTF-8",
        };
        BatchError::new(field, problem)
    }
}

/// Names the message that the field is in.
#[cold]
fn within(outer: impl fmt::Display, error: BatchError) -> BatchError {
    let dot = if error.field.is_empty() { "" } else { "." };
    BatchError { field: format!("{outer}{dot}{}", error.field), problem: error.problem }
}

/// The value of a field.
#[derive(Clone, Copy)]
enum Value<'a> {
    Number(u64),
    Piece(&'a [u8]),
    /// Of four or eight bytes: no field of ours.
    Fixed,
}

impl<'a> Value<'a> {
    fn number(self) -> Result<u64, Malformed> {
        match self {
            Value::Number(number) => Ok(number),
            Value::Piece(_) | Value::Fixed => Err(Malformed::Type),
        }
    }

    fn message(self) -> Result<&'a [u8], Malformed> {
        match self {
            Value::Piece(piece) => Ok(piece),
            Value::Number(_) | Value::Fixed => Err(Malformed::Type),
        }
    }

    fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.message()?).map_err(|_| Malformed::Text)
    }
}

/// Reads the fields of a message, one after the other.
struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// The number and the value of the next field; none at the end.
    #[inline]
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Malformed> {
        if self.left.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed::Cut)?;
                Value::Piece(self.take(length)?)
            }
            1 => self.take(8).map(|_| Value::Fixed)?,
            5 => self.take(4).map(|_| Value::Fixed)?,
            _ => return Err(Malformed::Number),
        };
        match tag >> 3 {
            0 => Err(Malformed::Number),
            field => Ok(Some((field, value))),
        }
    }

    #[inline]
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (piece, left) = self.left.split_at_checked(length).ok_or(Malformed::Cut)?;
        self.left = left;
        Ok(piece)
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, Malformed> {
        match *self.left {
            // By far the most.
            [byte @ ..0x80, ref left @ ..] => {
                self.left = left;
                Ok(u64::from(byte))
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, Malformed> {
        let mut number = 0;
        for (place, byte) in self.left.iter().enumerate().take(10) {
            number |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                self.left = &self.left[place + 1..];
                // The tenth byte has room for one bit.
                return if place == 9 && *byte > 1 { Err(Malformed::Number) } else { Ok(number) };
            }
        }
        Err(if self.left.len() < 10 { Malformed::Cut } else { Malformed::Number })
    }
}

/// `PartOperation`.
fn read_part_operation(bytes: &[u8]) -> Result<(u32, Operation), BatchError> {
    let (mut place, mut row, mut kind, mut floor, mut ceiling) = (0, None, None, None, None);
    let mut reader = Reader { left: bytes };
    while let Some((field, value)) = reader.next().map_err(|why| why.of(""))? {
        let piece = || value.message().map_err(|why| why.of("kind"));
        let number = || value.number().map_err(|why| why.of("kind"));
        match field {
            1 => place = value.number().map_err(|why| why.of("index"))? as u32,
            2 => row = Some(value.message().map_err(|why| why.of("row"))?),
            3 => {
                kind = Some(OperationKind::Add {
                    delta: integer("delta", piece()?)?,
                    floor: None,
                    ceiling: None,
                })
            }
            4 => kind = Some(OperationKind::Put(Bytes::copy_from_slice(piece()?))),
            5 => kind = Some(OperationKind::Insert(Bytes::copy_from_slice(piece()?))),
            6 => kind = (number()? != 0).then_some(OperationKind::Delete),
            7 => kind = Some(OperationKind::Require(Condition::Exists(number()? != 0))),
            8 => kind = Some(OperationKind::Require(Condition::VersionIs(Stamp(number()?)))),
            9 => kind = Some(OperationKind::Require(Condition::RecordIs(Bytes::copy_from_slice(piece()?)))),
            10 => {
                kind =
                    Some(OperationKind::Require(Condition::AtLeast(integer("balance_at_least", piece()?)?)))
            }
            11 => {
                kind = Some(OperationKind::Require(Condition::AtMost(integer("balance_at_most", piece()?)?)))
            }
            12 => {
                kind =
                    Some(OperationKind::Require(Condition::BalanceIs(integer("balance_equals", piece()?)?)))
            }
            13 => floor = Some(integer("floor", piece()?)?),
            14 => ceiling = Some(integer("ceiling", piece()?)?),
            _ => {}
        }
    }
    let row = row.ok_or_else(|| BatchError::new("row", "is missing"))?;
    let mut kind = kind.ok_or_else(|| BatchError::new("kind", "is missing"))?;
    if let OperationKind::Add { floor: lowest, ceiling: highest, .. } = &mut kind {
        (*lowest, *highest) = (floor, ceiling);
    }
    Ok((place, Operation { row: RowKey::from_encoded(row), kind }))
}

/// An integer in two's complement, the highest byte first.
fn integer(field: &str, bytes: &[u8]) -> Result<i128, BatchError> {
    if bytes.is_empty() || bytes.len() > 16 {
        return Err(BatchError::new(field, format!("is {} bytes long, not 1 to 16", bytes.len())));
    }
    let sign = if bytes[0] & 0x80 == 0 { 0 } else { -1 };
    Ok(bytes.iter().fold(sign, |number, byte| number << 8 | i128::from(*byte)))
}

/// What an operation does, before it is understood: the last kind counts, and a kind that comes twice is merged.
#[derive(Clone, Copy)]
enum Kind<'a> {
    Missing,
    Add { delta: &'a str, floor: Option<&'a str>, ceiling: Option<&'a str> },
    Put(&'a [u8]),
    Insert(&'a [u8]),
    Delete,
    Require(Option<Demand<'a>>),
}

/// A condition, before it is understood.
#[derive(Clone, Copy)]
enum Demand<'a> {
    Exists(bool),
    Version(u64),
    Value(&'a [u8]),
    AtLeast(&'a str),
    AtMost(&'a str),
    Equals(&'a str),
}

/// `Operation`. Its fields are named from within it (`add.delta`, `row.partition`).
fn read_operation(bytes: &[u8], contents: impl Fn(&[u8]) -> Bytes) -> Result<Operation, BatchError> {
    let (mut row, mut kind) = (None, Kind::Missing);
    let mut reader = Reader { left: bytes };
    while let Some((field, value)) = reader.next().map_err(|why| why.of(""))? {
        let name = match field {
            1 => "row",
            2 => "add",
            3 => "put",
            4 => "insert",
            5 => "delete",
            6 => "require",
            _ => continue,
        };
        let piece = value.message().map_err(|why| why.of(name))?;
        match field {
            1 => read_row(piece, row.get_or_insert_default())?,
            2 => read_add(piece, &mut kind)?,
            3 => {
                let before = if let Kind::Put(before) = kind { before } else { &[] };
                kind = Kind::Put(read_contents(piece, before).map_err(|why| why.of("put.value"))?);
            }
            4 => {
                let before = if let Kind::Insert(before) = kind { before } else { &[] };
                kind = Kind::Insert(read_contents(piece, before).map_err(|why| why.of("insert.value"))?);
            }
            5 => kind = Kind::Delete,
            _ => {
                let before = if let Kind::Require(before) = kind { before } else { None };
                kind = Kind::Require(read_demand(piece, before)?);
            }
        }
    }
    let (partition, name) = row.ok_or_else(|| BatchError::new("row", "is missing"))?;
    let row = RowKey::new(partition, name)
        .map_err(|(field, problem)| within("row", BatchError::new(field, problem)))?;
    let kind = match kind {
        Kind::Missing => {
            let problem =
                "is missing: one of add, put, insert, delete, require (or a newer one, unknown here)";
            return Err(BatchError::new("kind", problem));
        }
        Kind::Add { delta, floor, ceiling } => OperationKind::Add {
            delta: amount("add.delta", delta)?,
            floor: floor.map(|floor| amount("add.floor", floor)).transpose()?,
            ceiling: ceiling.map(|ceiling| amount("add.ceiling", ceiling)).transpose()?,
        },
        Kind::Put(value) => OperationKind::Put(contents(value)),
        Kind::Insert(value) => OperationKind::Insert(contents(value)),
        Kind::Delete => OperationKind::Delete,
        Kind::Require(None) => return Err(BatchError::new("require.condition", "is missing")),
        Kind::Require(Some(demand)) => OperationKind::Require(match demand {
            Demand::Exists(exists) => Condition::Exists(exists),
            Demand::Version(version) => Condition::VersionIs(Stamp(version)),
            Demand::Value(value) => Condition::RecordIs(contents(value)),
            Demand::AtLeast(least) => Condition::AtLeast(amount("require.balance_at_least", least)?),
            Demand::AtMost(most) => Condition::AtMost(amount("require.balance_at_most", most)?),
            Demand::Equals(equal) => Condition::BalanceIs(amount("require.balance_equals", equal)?),
        }),
    };
    Ok(Operation { row, kind })
}

fn read_row<'a>(bytes: &'a [u8], row: &mut (&'a str, &'a str)) -> Result<(), BatchError> {
    let mut reader = Reader { left: bytes };
    while let Some((field, value)) = reader.next().map_err(|why| why.of("row"))? {
        match field {
            1 => row.0 = value.text().map_err(|why| why.of("row.partition"))?,
            2 => row.1 = value.text().map_err(|why| why.of("row.name"))?,
            _ => {}
        }
    }
    Ok(())
}

fn read_add<'a>(bytes: &'a [u8], kind: &mut Kind<'a>) -> Result<(), BatchError> {
    let (mut delta, mut floor, mut ceiling) = match *kind {
        Kind::Add { delta, floor, ceiling } => (delta, floor, ceiling),
        _ => ("", None, None),
    };
    let mut reader = Reader { left: bytes };
    while let Some((field, value)) = reader.next().map_err(|why| why.of("add"))? {
        match field {
            1 => delta = value.text().map_err(|why| why.of("add.delta"))?,
            2 => floor = Some(value.text().map_err(|why| why.of("add.floor"))?),
            3 => ceiling = Some(value.text().map_err(|why| why.of("add.ceiling"))?),
            _ => {}
        }
    }
    *kind = Kind::Add { delta, floor, ceiling };
    Ok(())
}

/// `Put` and `Insert`.
fn read_contents<'a>(bytes: &'a [u8], before: &'a [u8]) -> Result<&'a [u8], Malformed> {
    let (mut contents, mut reader) = (before, Reader { left: bytes });
    while let Some((field, value)) = reader.next()? {
        if field == 1 {
            contents = value.message()?;
        }
    }
    Ok(contents)
}

/// `Require`.
fn read_demand<'a>(bytes: &'a [u8], before: Option<Demand<'a>>) -> Result<Option<Demand<'a>>, BatchError> {
    let (mut demand, mut reader) = (before, Reader { left: bytes });
    while let Some((field, value)) = reader.next().map_err(|why| why.of("require"))? {
        demand = Some(match field {
            1 => Demand::Exists(value.number().map_err(|why| why.of("require.exists"))? != 0),
            2 => Demand::Version(value.number().map_err(|why| why.of("require.version"))?),
            3 => Demand::Value(value.message().map_err(|why| why.of("require.value"))?),
            4 => Demand::AtLeast(value.text().map_err(|why| why.of("require.balance_at_least"))?),
            5 => Demand::AtMost(value.text().map_err(|why| why.of("require.balance_at_most"))?),
            6 => Demand::Equals(value.text().map_err(|why| why.of("require.balance_equals"))?),
            _ => continue,
        });
    }
    Ok(demand)
}

/// One operation of a part: a field of `Part` with a `PartOperation`.
pub(crate) fn write_operation(out: &mut Vec<u8>, place: u32, operation: &Operation) {
    message(out, 1, |out| {
        if place > 0 {
            number(out, 1, u64::from(place));
        }
        piece(out, 2, operation.row.as_bytes());
        match &operation.kind {
            OperationKind::Add { delta, floor, ceiling } => {
                write_integer(out, 3, *delta);
                floor.iter().for_each(|floor| write_integer(out, 13, *floor));
                ceiling.iter().for_each(|ceiling| write_integer(out, 14, *ceiling));
            }
            OperationKind::Put(value) => piece(out, 4, value),
            OperationKind::Insert(value) => piece(out, 5, value),
            OperationKind::Delete => number(out, 6, 1),
            OperationKind::Require(condition) => match condition {
                Condition::Exists(exists) => number(out, 7, u64::from(*exists)),
                Condition::VersionIs(stamp) => number(out, 8, stamp.0),
                Condition::RecordIs(value) => piece(out, 9, value),
                Condition::AtLeast(least) => write_integer(out, 10, *least),
                Condition::AtMost(most) => write_integer(out, 11, *most),
                Condition::BalanceIs(equal) => write_integer(out, 12, *equal),
            },
        }
    });
}

/// In as few bytes as hold it and its sign.
fn write_integer(out: &mut Vec<u8>, field: u8, integer: i128) {
    let spare = integer.leading_zeros().max(integer.leading_ones()) - 1;
    piece(out, field, &integer.to_be_bytes()[spare as usize / 8..]);
}

const NUMBER: u8 = 0;
const PIECE: u8 = 2;

fn number(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3 | NUMBER);
    varint(out, value);
}

fn piece(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | PIECE);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a field that has a length, with a number below 16: a message or a string, which is what `body` writes.
pub fn message(out: &mut Vec<u8>, field: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(field << 3 | PIECE);
    let place = out.len();
    // Most are shorter than 128 bytes; a longer length needs more room.
    out.push(0);
    body(out);
    let length = out.len() - place - 1;
    if length < 0x80 {
        out[place] = length as u8;
        return;
    }
    let mut longer = Vec::with_capacity(10);
    varint(&mut longer, length as u64);
    out.splice(place..=place, longer);
}

/// Parses an amount: a decimal integer in the smallest unit, within the range of a signed 128-bit integer. `-0` and leading
/// zeros are allowed; signs other than a leading `-`, spaces, points and exponents are not.
pub fn amount(field: &str, text: &str) -> Result<i128, BatchError> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let are_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if are_digits && let Ok(amount) = text.parse() {
        return Ok(amount);
    }
    let problem = if text.is_empty() {
        "is empty: an amount is a decimal integer in smallest units, for example -100".to_owned()
    } else if text.starts_with('+') {
        format!("is {}: a positive amount is written without a sign", shown(text))
    } else if !are_digits {
        format!("is {}, not a decimal integer: write it in smallest units, for example -100", shown(text))
    } else {
        format!("is {}, which is beyond the range of a signed 128-bit integer", shown(text))
    };
    Err(BatchError::new(field, problem))
}

/// What was sent, cut short if it is long.
fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 60;
    match text.char_indices().nth(SHOWN_MAX) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
    }
}

/// Parses the id of a batch: a UUIDv7 in its canonical text form (RFC 9562, section 4: lower-case hex digits, 8-4-4-4-12).
///
/// Upper case is refused, so that the id in an answer is always, character by character, the one that was sent.
pub fn batch_id(field: &str, text: &str) -> Result<BatchId, BatchError> {
    let problem = match uuid_bytes(text) {
        Some(bytes) if BatchId(bytes).is_v7() => return Ok(BatchId(bytes)),
        Some(_) => format!("{text} is not a UUID of version 7: its time keeps ids from being run twice"),
        None if text.is_empty() => {
            "is missing: make a UUID of version 7 and store it before the first try".to_owned()
        }
        None => {
            let example = "018bcfe5-687b-7fff-bfff-ffffffffffff";
            format!("{} is not a UUID in canonical lower-case form, for example {example}", shown(text))
        }
    };
    Err(BatchError::new(field, problem))
}

fn uuid_bytes(text: &str) -> Option<[u8; 16]> {
    let text = text.as_bytes();
    if text.len() != 36 {
        return None;
    }
    let mut bytes = [0; 16];
    let mut digits = 0;
    for (place, character) in text.iter().enumerate() {
        if matches!(place, 8 | 13 | 18 | 23) {
            if *character != b'-' {
                return None;
            }
            continue;
        }
        let digit = match character {
            b'0'..=b'9' => character - b'0',
            b'a'..=b'f' => character - b'a' + 10,
            _ => return None,
        };
        bytes[digits / 2] = bytes[digits / 2] << 4 | digit;
        digits += 1;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_at_the_edges() {
        let parsed = |text: &str| amount("add.delta", text).unwrap();
        assert_eq!(parsed("170141183460469231731687303715884105727"), i128::MAX);
        assert_eq!(parsed("-170141183460469231731687303715884105728"), i128::MIN);
        assert_eq!((parsed("-0"), parsed("007"), parsed("-100")), (0, 7, -100));
    }

    #[test]
    fn what_is_no_amount_is_refused_with_its_field() {
        let refused = |text: &str| amount("add.delta", text).unwrap_err().to_string();
        assert_eq!(
            refused("170141183460469231731687303715884105728"),
            "add.delta: is \"170141183460469231731687303715884105728\", which is beyond the range of a signed 128-bit integer"
        );
        assert!(refused("-170141183460469231731687303715884105729").contains("beyond the range"));
        assert!(refused("").starts_with("add.delta: is empty"));
        assert!(refused("+1").contains("without a sign"));
        for text in ["-", "--1", "1.5", "1e3", " 1", "1 ", "1_000", "0x10", "٣", "-+1", "NaN"] {
            assert!(refused(text).contains("not a decimal integer"), "{text}: {}", refused(text));
        }
        assert!(refused(&"9".repeat(5000)).len() < 200, "a long text is not shown whole");
    }

    #[test]
    fn ids_are_canonical_and_of_version_7() {
        let text = "018bcfe5-687b-7fff-bfff-ffffffffffff";
        assert_eq!(batch_id("batch.id", text).unwrap().to_string(), text);
        let refused = |text: &str| batch_id("batch.id", text).unwrap_err().to_string();
        assert!(refused("").starts_with("batch.id: is missing"));
        assert!(refused("018bcfe5-687b-4fff-bfff-ffffffffffff").contains("version 7"));
        assert!(refused("018bcfe5-687b-7fff-7fff-ffffffffffff").contains("version 7"), "wrong variant");
        for text in [
            "018BCFE5-687B-7FFF-BFFF-FFFFFFFFFFFF",
            "018bcfe5687b7fffbfffffffffffffff",
            "{018bcfe5-687b-7fff-bfff-ffffffffffff}",
            "018bcfe5-687b-7fff-bfff-fffffffffffg",
            "018bcfe5-687b-7fff-bfff0ffffffffffff",
        ] {
            assert!(refused(text).contains("canonical"), "{text}");
        }
    }

    /// The form is hashed and kept in logs: it never changes.
    #[test]
    fn the_form_of_a_part_is_fixed() {
        let row = RowKey::new("user:1", "USD").unwrap();
        let add = OperationKind::Add { delta: -5, floor: Some(0), ceiling: Some(300) };
        let delete = Operation { row: RowKey::new("r", "x").unwrap(), kind: OperationKind::Delete };
        let part = EncodedPart::new([(0, &Operation { row, kind: add }), (2, &delete)]);
        let expected = b"\x0a\x16\x12\x0auser:1\0USD\x1a\x01\xfb\x6a\x01\x00\x72\x02\x01\x2c\
            \x0a\x09\x08\x02\x12\x03r\0x\x30\x01";
        assert_eq!(part.bytes().as_ref(), expected);
    }

    #[test]
    fn integers_take_as_few_bytes_as_hold_them() {
        let edges = [(0, 1), (-1, 1), (127, 1), (128, 2), (-128, 1), (-129, 2), (32_767, 2), (32_768, 3)];
        for (integer, bytes) in edges.into_iter().chain([(i128::MAX, 16), (i128::MIN, 16)]) {
            let mut out = Vec::new();
            write_integer(&mut out, 3, integer);
            assert_eq!(out.len(), 2 + bytes, "{integer}");
            assert_eq!(super::integer("", &out[2..]).unwrap(), integer);
        }
        assert!(super::integer("", &[]).is_err() && super::integer("", &[0; 17]).is_err());
    }

    #[test]
    fn what_is_cut_or_garbled_is_refused_and_never_panics() {
        let row = RowKey::new("user:1", "USD").unwrap();
        let kind = OperationKind::Add { delta: -5, floor: Some(0), ceiling: Some(300) };
        let part = EncodedPart::new([(300, &Operation { row, kind })]);
        let bytes = part.bytes();
        for end in 1..bytes.len() {
            assert!(EncodedPart::from_wire(bytes.slice(..end)).decode().is_err(), "cut to {end} bytes");
        }
        for place in 0..bytes.len() {
            for bit in 0..8 {
                let mut wrong = bytes.to_vec();
                wrong[place] ^= 1 << bit;
                let _ = format!("{:?}", EncodedPart::from_wire(wrong.into()));
            }
        }
        let said =
            |bytes: &'static [u8]| Batch::from_wire(&Bytes::from_static(bytes), 10).unwrap_err().to_string();
        assert!(said(b"\x0b").starts_with("batch: is no message"), "a group");
        assert!(said(b"\x00\x00").starts_with("batch: is no message"), "field 0");
        assert!(said(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02").contains("number"), "beyond 64 bits");
        assert!(said(b"\x0a\x01\xff").starts_with("batch.id: is not UTF-8"));
        assert!(said(b"\x18\x01").starts_with("batch.operations[0]: has another type"));
        assert!(said(b"\x1a\x02\x0a\x05").starts_with("batch.operations[0]: is no message"));
        assert!(
            said(b"\x1a\x04\x0a\x02\x08\x05").starts_with("batch.operations[0].row.partition: has another")
        );
    }

    #[test]
    fn the_head_of_a_batch_is_found_before_it_is_decoded() {
        let head = |bytes: &'static [u8]| Head::of_wire(bytes);
        assert_eq!(head(b"\x1a\x03abc\x10\x07\x0a\x02id"), Head { id: "id", timeout_ms: 7 });
        assert_eq!(head(b""), Head::default());
        assert_eq!(head(b"\x0a\x02id\x1a\x7f"), Head { id: "id", timeout_ms: 0 }, "cut behind it");
    }

    proptest! {
        #[test]
        fn any_amount_comes_back(number: i128) {
            prop_assert_eq!(amount("", &number.to_string()).unwrap(), number);
        }

        #[test]
        fn garbage_is_refused_or_understood_and_never_panics(bytes: Vec<u8>) {
            let _ = Batch::from_wire(&bytes.clone().into(), 10);
            let _ = format!("{:?}", EncodedPart::from_wire(bytes.into()));
        }
    }
}
