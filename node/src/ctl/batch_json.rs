//! Batches as JSON, written by people.

use serde_json::{Map, Value as Json};
use uuid::Uuid;
use verdict_client::{Batch, Row, row};
use verdict_proto::v1::{Add, Delete, Insert, Operation, Put, Require, operation::Kind, require::Condition};

/// How a batch looks, for `--help`.
pub const HELP: &str = r#"A batch:
  {
    "zero_sum": true,
    "operations": [
      {"row": ["user:1", "USDT"], "add": {"delta": "-5"}},
      {"row": ["user:2", "USDT"], "add": {"delta": "5", "ceiling": "1000"}},
      {"row": ["payment:7", "record"], "insert": {"value": "user:1 pays user:2"}},
      {"row": ["limits:1", "state"], "require": {"value": "open"}}
    ]
  }

Also: "id" (a UUIDv7; made if it is missing), "timeout_ms".
Operations: add {delta, floor, ceiling}, put {value}, insert {value}, delete {},
require {exists | version | value | balance_at_least | balance_at_most | balance_equals}.
Amounts are whole numbers of the smallest unit, as text or as JSON numbers.
A value is text, or {"hex": "00ff"}. A row may also be written "user:1#USDT".

Exit codes: 0 committed, 1 aborted, 2 not decided, 3 error."#;

/// Reads a batch. An error names the place, for example `operations[2].add.delta: "x" is no whole number`.
pub fn parse_batch(text: &str) -> Result<Batch, String> {
    let json: Json = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let batch = Object::new("", &json, &["id", "timeout_ms", "operations", "zero_sum"])?;
    let id = match batch.get("id") {
        Some(id) => string(&batch.path("id"), id)?,
        None => Uuid::now_v7().to_string(),
    };
    let timeout_ms = match batch.get("timeout_ms") {
        Some(timeout) => {
            let number = timeout.as_u64().and_then(|number| u32::try_from(number).ok());
            number.ok_or_else(|| wrong("timeout_ms", timeout, "no number of milliseconds"))?
        }
        None => 0,
    };
    let zero_sum = match batch.get("zero_sum") {
        Some(flag) => flag.as_bool().ok_or_else(|| wrong("zero_sum", flag, "neither true nor false"))?,
        None => false,
    };
    let operations = batch.need("operations")?;
    let list = operations.as_array().ok_or_else(|| wrong("operations", operations, "no list"))?;
    let operation = |(place, json)| parse_operation(&format!("operations[{place}]"), json);
    let operations = list.iter().enumerate().map(operation).collect::<Result<_, _>>()?;
    Ok(Batch { id, timeout_ms, operations, zero_sum })
}

fn parse_operation(path: &str, json: &Json) -> Result<Operation, String> {
    const KINDS: [&str; 5] = ["add", "put", "insert", "delete", "require"];
    let operation = Object::new(path, json, &["row", "add", "put", "insert", "delete", "require"])?;
    let row = parse_row(&operation.path("row"), operation.need("row")?)?;
    let (name, body) = operation.one_of(&KINDS)?;
    let path = operation.path(name);
    let kind = match name {
        "add" => {
            let add = Object::new(&path, body, &["delta", "floor", "ceiling"])?;
            let bound = |name| add.get(name).map(|json| amount(&add.path(name), json)).transpose();
            Kind::Add(Add {
                delta: amount(&add.path("delta"), add.need("delta")?)?,
                floor: bound("floor")?,
                ceiling: bound("ceiling")?,
            })
        }
        "put" => Kind::Put(Put { value: written(&path, body)? }),
        "insert" => Kind::Insert(Insert { value: written(&path, body)? }),
        "delete" => {
            Object::new(&path, body, &[])?;
            Kind::Delete(Delete {})
        }
        "require" => Kind::Require(Require { condition: Some(parse_condition(&path, body)?) }),
        other => unreachable!("{other} is none of the kinds"),
    };
    Ok(Operation { row: Some(row), kind: Some(kind) })
}

fn parse_condition(path: &str, json: &Json) -> Result<Condition, String> {
    const CONDITIONS: [&str; 6] =
        ["exists", "version", "value", "balance_at_least", "balance_at_most", "balance_equals"];
    let (name, body) = Object::new(path, json, &CONDITIONS)?.one_of(&CONDITIONS)?;
    let path = format!("{path}.{name}");
    Ok(match name {
        "exists" => {
            Condition::Exists(body.as_bool().ok_or_else(|| wrong(&path, body, "neither true nor false"))?)
        }
        "version" => Condition::Version(body.as_u64().ok_or_else(|| wrong(&path, body, "no version"))?),
        "value" => Condition::Value(bytes(&path, body)?),
        "balance_at_least" => Condition::BalanceAtLeast(amount(&path, body)?),
        "balance_at_most" => Condition::BalanceAtMost(amount(&path, body)?),
        "balance_equals" => Condition::BalanceEquals(amount(&path, body)?),
        other => unreachable!("{other} is none of the conditions"),
    })
}

fn parse_row(path: &str, json: &Json) -> Result<Row, String> {
    match json {
        Json::String(text) => super::parse_row(text).map_err(|problem| format!("{path}: {problem}")),
        Json::Array(parts) => match parts.as_slice() {
            [Json::String(partition), Json::String(name)] => Ok(row(partition, name)),
            _ => Err(wrong(path, json, "no list of a partition and a row")),
        },
        _ => Err(wrong(path, json, "no row: write [\"user:1\", \"USDT\"]")),
    }
}

/// The value of a put or an insert.
fn written(path: &str, json: &Json) -> Result<bytes::Bytes, String> {
    let object = Object::new(path, json, &["value"])?;
    bytes(&object.path("value"), object.need("value")?)
}

fn bytes(path: &str, json: &Json) -> Result<bytes::Bytes, String> {
    if let Json::String(text) = json {
        return Ok(text.clone().into());
    }
    let object = Object::new(path, json, &["hex"])?;
    let (path, json) = (object.path("hex"), object.need("hex")?);
    let text = string(&path, json)?;
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    match digits {
        Some(digits) if digits.len() % 2 == 0 => {
            Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect::<Vec<_>>().into())
        }
        Some(_) | None => Err(wrong(&path, json, "no bytes as pairs of hex digits")),
    }
}

/// An amount, as the wire has it. A JSON number is taken if it is whole and was not rounded by the reader.
fn amount(path: &str, json: &Json) -> Result<String, String> {
    let number: Option<i128> = match json {
        Json::String(text) => text.parse().ok(),
        Json::Number(number) => number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from)),
        _ => None,
    };
    let problem = "no whole number of smallest units within 128 bits";
    number.map(|number| number.to_string()).ok_or_else(|| wrong(path, json, problem))
}

fn string(path: &str, json: &Json) -> Result<String, String> {
    json.as_str().map(str::to_owned).ok_or_else(|| wrong(path, json, "no text"))
}

fn wrong(path: &str, json: &Json, problem: &str) -> String {
    let mut shown: String = json.to_string().chars().take(60).collect();
    if shown.len() < json.to_string().len() {
        shown += "...";
    }
    format!("{path}: {shown} is {problem}")
}

/// A JSON object and its place in the batch.
struct Object<'a> {
    path: &'a str,
    map: &'a Map<String, Json>,
}

impl<'a> Object<'a> {
    /// An object that has no other fields than these.
    fn new(path: &'a str, json: &'a Json, fields: &[&str]) -> Result<Object<'a>, String> {
        let place = if path.is_empty() { "the batch" } else { path };
        let map = json.as_object().ok_or_else(|| wrong(place, json, "no object"))?;
        if let Some(unknown) = map.keys().find(|key| !fields.contains(&key.as_str())) {
            let known = if fields.is_empty() { "no fields".into() } else { fields.join(", ") };
            return Err(format!("{place}: there is no field {unknown:?} here, but {known}"));
        }
        Ok(Object { path, map })
    }

    fn path(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    fn get(&self, field: &str) -> Option<&'a Json> {
        self.map.get(field).filter(|json| !json.is_null())
    }

    fn need(&self, field: &str) -> Result<&'a Json, String> {
        self.get(field).ok_or_else(|| format!("{}: is missing", self.path(field)))
    }

    /// The one of several fields that is there.
    fn one_of(&self, fields: &[&'static str]) -> Result<(&'static str, &'a Json), String> {
        let mut found = fields.iter().filter_map(|field| self.get(field).map(|json| (*field, json)));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (Some((one, _)), Some((other, _))) => Err(format!("{}: has both {one} and {other}", self.path)),
            (None, _) => Err(format!("{}: needs one of {}", self.path, fields.join(", "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use verdict_client::BatchBuilder;

    use super::*;

    #[test]
    fn every_kind_of_operation_is_read() {
        let text = r#"{"id": "x", "timeout_ms": 5, "zero_sum": true, "operations": [
            {"row": ["user:1", "USDT"], "add": {"delta": "-170141183460469231731687303715884105728", "floor": -7, "ceiling": "9"}},
            {"row": "user:2#USDT", "add": {"delta": 5}},
            {"row": ["a", "b"], "put": {"value": "text"}},
            {"row": ["a", "c"], "insert": {"value": {"hex": "00ff"}}},
            {"row": ["a", "d"], "delete": {}},
            {"row": ["a", "e"], "require": {"exists": false}},
            {"row": ["a", "f"], "require": {"version": 7}},
            {"row": ["a", "g"], "require": {"value": "v"}},
            {"row": ["a", "h"], "require": {"balance_at_least": "1"}},
            {"row": ["a", "i"], "require": {"balance_at_most": "2"}},
            {"row": ["a", "j"], "require": {"balance_equals": "3"}}
        ]}"#;
        let expected = BatchBuilder::with_id("x")
            .timeout(std::time::Duration::from_millis(5))
            .zero_sum()
            .add_within("user:1", "USDT", i128::MIN, Some(-7), Some(9))
            .add("user:2", "USDT", 5)
            .put("a", "b", "text")
            .insert("a", "c", [0, 255])
            .delete("a", "d")
            .require_absent("a", "e")
            .require_version("a", "f", 7)
            .require_value("a", "g", "v")
            .require_at_least("a", "h", 1)
            .require_at_most("a", "i", 2)
            .require_equals("a", "j", 3)
            .build();
        assert_eq!(parse_batch(text), Ok(expected));
    }

    #[test]
    fn an_id_is_made_if_there_is_none() {
        let batch = parse_batch(r#"{"operations": []}"#).unwrap();
        assert_eq!(batch.id.parse::<Uuid>().unwrap().get_version_num(), 7);
    }

    #[test]
    fn errors_name_the_place() {
        for (operations, expected) in [
            (r#"{"row":["a","b"],"add":{"delta":"x"}}"#, "operations[0].add.delta: \"x\" is no whole number"),
            (r#"{"row":["a","b"],"add":{"delta":1.5}}"#, "operations[0].add.delta: 1.5 is no whole number"),
            (r#"{"row":["a","b"],"add":{"delta":1e40}}"#, "operations[0].add.delta: 1e"),
            (r#"{"row":["a","b"],"add":{}}"#, "operations[0].add.delta: is missing"),
            (
                r#"{"row":["a"],"delete":{}}"#,
                "operations[0].row: [\"a\"] is no list of a partition and a row",
            ),
            (r#"{"row":"a","delete":{}}"#, "operations[0].row: \"a\" is no row"),
            (r#"{"delete":{}}"#, "operations[0].row: is missing"),
            (r#"{"row":["a","b"]}"#, "operations[0]: needs one of add, put"),
            (r#"{"row":["a","b"],"delete":{},"put":{"value":""}}"#, "operations[0]: has both put and delete"),
            (r#"{"row":["a","b"],"ad":{}}"#, "operations[0]: there is no field \"ad\" here"),
            (
                r#"{"row":["a","b"],"put":{"value":{"hex":"0g"}}}"#,
                "operations[0].put.value.hex: \"0g\" is no bytes",
            ),
            (r#"{"row":["a","b"],"require":{"exists":1}}"#, "operations[0].require.exists: 1 is neither"),
        ] {
            let error = parse_batch(&format!(r#"{{"operations":[{operations}]}}"#)).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(parse_batch("{").unwrap_err().starts_with("not JSON: "));
        assert!(parse_batch("[]").unwrap_err().starts_with("the batch: [] is no object"));
        assert!(parse_batch("{}").unwrap_err().starts_with("operations: is missing"));
    }
}
