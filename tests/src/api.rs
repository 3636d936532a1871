//! Calls and values, by the generated types alone.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use uuid::{NoContext, Timestamp, Uuid};
use verdict_proto::v1::{
    self, AbortReason, operation::Kind, outcome, require::Condition, settlement_client::SettlementClient,
    value,
};

/// The longest that anybody waits for one answer.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The pause before an id is submitted again.
const PAUSE: Duration = Duration::from_millis(25);

/// A way to an address, opened when it is first used and whenever it broke.
pub fn channel(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("host:port makes an address");
    endpoint.connect_timeout(Duration::from_secs(2)).timeout(PATIENCE).connect_lazy()
}

/// Settlement at an address, on a connection of its own.
pub fn settlement_at(address: &str) -> SettlementClient<Channel> {
    SettlementClient::new(channel(address))
}

/// A fresh id.
pub fn new_id() -> String {
    Uuid::now_v7().to_string()
}

/// A fresh id that carries the time of so many seconds from now.
pub fn id_at(seconds_from_now: i64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs().checked_add_signed(seconds_from_now).expect("a time after 1970");
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, 0)).to_string()
}

/// The shard of a partition, as ARCHITECTURE promises that it stays: FNV-1a (64 bits), mixed, scaled. A test compares it with what
/// the cluster says.
pub fn shard_of(partition: &str, shards: u32) -> u32 {
    let fnv = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let mut hash = partition.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    1 + ((u128::from(hash) * u128::from(shards)) >> 64) as u32
}

/// A partition of a shard; another one for each tag.
pub fn partition_on(shard: u32, shards: u32, tag: &str) -> String {
    let names = (0..10_000).map(|number| format!("{tag}:{number}"));
    let mut fitting = names.filter(|name| shard_of(name, shards) == shard);
    fitting.next().expect("one of so many names lies on any shard")
}

/// A row.
pub fn row(partition: &str, name: &str) -> v1::Row {
    v1::Row { partition: partition.to_owned(), name: name.to_owned() }
}

fn operation(row: &v1::Row, kind: Kind) -> v1::Operation {
    v1::Operation { row: Some(row.clone()), kind: Some(kind) }
}

/// Adds to a balance, with the default floor.
pub fn add(row: &v1::Row, delta: i128) -> v1::Operation {
    add_within(row, &delta.to_string(), None, None)
}

/// Adds to a balance, as text.
pub fn add_within(row: &v1::Row, delta: &str, floor: Option<&str>, ceiling: Option<&str>) -> v1::Operation {
    let (floor, ceiling) = (floor.map(str::to_owned), ceiling.map(str::to_owned));
    operation(row, Kind::Add(v1::Add { delta: delta.to_owned(), floor, ceiling }))
}

/// Writes a record.
pub fn put(row: &v1::Row, value: &str) -> v1::Operation {
    operation(row, Kind::Put(v1::Put { value: Bytes::copy_from_slice(value.as_bytes()) }))
}

/// Writes a record that must not exist.
pub fn insert(row: &v1::Row, value: &str) -> v1::Operation {
    operation(row, Kind::Insert(v1::Insert { value: Bytes::copy_from_slice(value.as_bytes()) }))
}

/// Removes a record.
pub fn delete(row: &v1::Row) -> v1::Operation {
    operation(row, Kind::Delete(v1::Delete {}))
}

/// Demands something.
pub fn require(row: &v1::Row, condition: Condition) -> v1::Operation {
    operation(row, Kind::Require(v1::Require { condition: Some(condition) }))
}

/// A batch with a fresh id.
pub fn batch(operations: Vec<v1::Operation>) -> v1::Batch {
    v1::Batch { id: new_id(), timeout_ms: 0, operations, zero_sum: false }
}

/// The answers of a stream, one by one.
pub fn answers(
    stream: Streaming<v1::SubmitStreamResponse>,
) -> impl Stream<Item = Result<v1::SubmitAnswer, Status>> + Unpin {
    stream.flat_map(|message| match message {
        Ok(message) => stream::iter(message.answers.into_iter().map(Ok).collect::<Vec<_>>()),
        Err(status) => stream::iter(vec![Err(status)]),
    })
}

/// Submits once.
pub async fn submit(
    client: &mut SettlementClient<Channel>,
    batch: &v1::Batch,
) -> Result<outcome::Result, Status> {
    let request = v1::SubmitRequest::of(batch);
    let outcome = client.submit(request).await?.into_inner().outcome.expect("an answer has an outcome");
    assert_eq!(outcome.batch_id, batch.id, "the answer is about another batch");
    Ok(outcome.result.expect("an outcome has a result"))
}

/// Asks for an outcome once.
pub async fn get_batch(
    client: &mut SettlementClient<Channel>,
    id: &str,
    wait_ms: u32,
) -> Result<outcome::Result, Status> {
    let request = v1::GetBatchRequest { batch_id: id.to_owned(), abort_if_not_seen: false, wait_ms };
    let outcome = client.get_batch(request).await?.into_inner().outcome.expect("an answer has an outcome");
    assert_eq!(outcome.batch_id, id, "the answer is about another batch");
    Ok(outcome.result.expect("an outcome has a result"))
}

/// Submits under the same id until there is a definite answer, to one client after the other.
pub async fn settle_at(clients: &mut [SettlementClient<Channel>], batch: &v1::Batch) -> outcome::Result {
    let began = Instant::now();
    for turn in 0.. {
        let client = &mut clients[turn % clients.len()];
        let last = match submit(client, batch).await {
            Ok(outcome::Result::Undecided(undecided)) => format!("{undecided:?}"),
            Ok(definite) => return definite,
            Err(status) => {
                assert!(may_be_tried_again(&status), "batch {} was refused: {status}", batch.id);
                status.to_string()
            }
        };
        assert!(began.elapsed() < PATIENCE, "no definite answer about {} in {PATIENCE:?}: {last}", batch.id);
        tokio::time::sleep(PAUSE).await;
    }
    unreachable!("the loop ends by itself")
}

/// Submits to one node until there is a definite answer.
pub async fn settle(client: &SettlementClient<Channel>, batch: &v1::Batch) -> outcome::Result {
    settle_at(&mut [client.clone()], batch).await
}

/// Submits one that must commit. Gives the stamp.
pub async fn commit(client: &SettlementClient<Channel>, operations: Vec<v1::Operation>) -> u64 {
    stamp_of(&settle(client, &batch(operations)).await)
}

/// Whether an error leaves open what has become of the batch, or says that nothing was proposed and the id may be tried again.
pub fn may_be_tried_again(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::InvalidArgument
            | Code::AlreadyExists
            | Code::OutOfRange
            | Code::NotFound
            | Code::Unimplemented
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::DataLoss
    )
}

/// Whether a node has said that nothing of a batch was proposed. A status that a broken connection makes says nothing.
pub fn says_nothing_was_proposed(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
        && status.get_error_details().error_info().is_some_and(|info| info.domain == "verdict")
}

/// The stamp of an outcome that must be COMMITTED.
pub fn stamp_of(outcome: &outcome::Result) -> u64 {
    match outcome {
        outcome::Result::Committed(committed) => committed.stamp,
        other => panic!("not committed: {other:?}"),
    }
}

/// What is told of an outcome that must be ABORTED.
pub fn aborted(outcome: &outcome::Result) -> &v1::Aborted {
    match outcome {
        outcome::Result::Aborted(aborted) => aborted,
        other => panic!("not aborted: {other:?}"),
    }
}

/// Asserts an abort in full: reason, place of the operation, value met.
pub fn assert_aborted(
    outcome: &outcome::Result,
    reason: AbortReason,
    operation: Option<u32>,
    met: Option<value::Kind>,
) {
    let aborted = aborted(outcome);
    let value = aborted.met.clone().and_then(|value| value.kind);
    assert_eq!((aborted.reason(), aborted.operation, value), (reason, operation, met), "{aborted:?}");
    assert!(!aborted.message.is_empty(), "there is no sentence for people");
}

/// Reads rows at one position, trying again while no leader is found.
pub async fn read(client: &SettlementClient<Channel>, rows: &[v1::Row]) -> v1::ReadResponse {
    let mut client = client.clone();
    let began = Instant::now();
    loop {
        match client.read(v1::ReadRequest { rows: rows.to_vec() }).await {
            Ok(response) => {
                let response = response.into_inner();
                let told: Vec<_> = response.values.iter().filter_map(|value| value.row.clone()).collect();
                assert_eq!(told, rows, "the values are of other rows than those that were asked for");
                return response;
            }
            Err(status) => {
                assert!(may_be_tried_again(&status), "read refused: {status}");
                assert!(began.elapsed() < PATIENCE, "no read in {PATIENCE:?}: {status}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// The whole history of a row, and the position up to which it is complete.
pub async fn history(client: &SettlementClient<Channel>, row: &v1::Row) -> (u64, Vec<v1::HistoryEntry>) {
    let mut client = client.clone();
    let (mut entries, mut from, mut position) = (Vec::new(), 0, u64::MAX);
    let began = Instant::now();
    loop {
        let request = v1::HistoryRequest { row: Some(row.clone()), from, limit: 1000 };
        match client.history(request).await {
            Ok(response) => {
                let response = response.into_inner();
                entries.extend(response.entries);
                position = position.min(response.position);
                from = response.next;
                if from == 0 {
                    return (position, entries);
                }
            }
            Err(status) => {
                assert!(may_be_tried_again(&status), "history refused: {status}");
                assert!(began.elapsed() < PATIENCE, "no history in {PATIENCE:?}: {status}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// What a row holds.
pub fn kind_of(value: &v1::RowValue) -> value::Kind {
    let value = value.value.clone().and_then(|value| value.kind);
    value.expect("a row's value has a kind")
}

/// The balance in a row; one that doesn't exist is 0.
pub fn balance_of(value: &v1::RowValue) -> i128 {
    match kind_of(value) {
        value::Kind::Balance(text) => text.parse().expect("a balance is a decimal integer"),
        value::Kind::Absent(_) => 0,
        other => panic!("not a balance: {other:?}"),
    }
}

/// A balance as it is told.
pub fn balance(amount: i128) -> value::Kind {
    value::Kind::Balance(amount.to_string())
}

/// A record as it is told.
pub fn record(text: &str) -> value::Kind {
    value::Kind::Record(Bytes::copy_from_slice(text.as_bytes()))
}

/// The field that `google.rpc.BadRequest` names in `grpc-status-details-bin`.
pub fn field_of(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    let violation = details.bad_request()?.field_violations.first()?;
    assert!(!violation.description.is_empty(), "the violation says nothing");
    Some(violation.field.clone())
}
