//! Single fields: amounts and ids.

use std::fmt::Display;

use bytes::Bytes;
use verdict_protocol::{
    batch::BatchError,
    ids::{BatchId, ContentHash},
};

/// A field that can't be understood: its name, as the wire contract has it, and the problem.
pub type FieldError = BatchError;

pub(super) type Field<T> = Result<T, FieldError>;

/// Names the message that the field is in.
pub(super) fn inside(outer: impl Display) -> impl FnOnce(FieldError) -> FieldError {
    move |error| {
        let dot = if error.field.is_empty() || error.field.starts_with('[') { "" } else { "." };
        BatchError { field: format!("{outer}{dot}{}", error.field), problem: error.problem }
    }
}

/// A field that must be there.
pub(super) fn required<T>(field: &str, value: Option<T>) -> Field<T> {
    value.ok_or_else(|| BatchError::new(field, "is missing"))
}

/// Parses an amount: a decimal integer in the smallest unit, within the range of a signed 128-bit integer. `-0` and leading
/// zeros are allowed; signs other than a leading `-`, spaces, points and exponents are not.
pub fn amount(field: &str, text: &str) -> Result<i128, FieldError> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let problem = if text.is_empty() {
        "is empty: an amount is a decimal integer in smallest units, for example -100".to_owned()
    } else if text.starts_with('+') {
        format!("is {}: a positive amount is written without a sign", shown(text))
    } else if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        format!("is {}, not a decimal integer: write it in smallest units, for example -100", shown(text))
    } else {
        match text.parse() {
            Ok(amount) => return Ok(amount),
            Err(_) => format!("is {}, which is beyond the range of a signed 128-bit integer", shown(text)),
        }
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
pub fn batch_id(field: &str, text: &str) -> Result<BatchId, FieldError> {
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

/// The id of a batch as nodes send it to each other: 16 bytes. Its version isn't looked at: the coordinator did.
pub fn batch_id_bytes(field: &str, bytes: &[u8]) -> Result<BatchId, FieldError> {
    exact(field, bytes).map(BatchId)
}

/// The hash of a batch's contents: 32 bytes.
pub fn content_hash(field: &str, bytes: &[u8]) -> Result<ContentHash, FieldError> {
    exact(field, bytes).map(ContentHash)
}

fn exact<const N: usize>(field: &str, bytes: &[u8]) -> Field<[u8; N]> {
    bytes.try_into().map_err(|_| BatchError::new(field, format!("is {} bytes long, not {N}", bytes.len())))
}

pub(super) fn id_to_wire(id: BatchId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
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

    proptest! {
        #[test]
        fn any_amount_comes_back(number: i128) {
            prop_assert_eq!(amount("", &number.to_string()).unwrap(), number);
        }
    }
}
