//! Bad input is refused with a clear error that names the thing; nothing is lost or changed, and the server goes on.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_stream::StreamExt as _;
use tonic::{
    Code, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use tonic_types::StatusExt as _;
use verdict_proto::v1::{
    self, AbortReason, require::Condition, settlement_client::SettlementClient,
    submit_answer::Result as StreamResult,
};
use verdict_tests::{
    api::{
        add, add_within, answers, assert_aborted, balance, batch, commit, delete, field_of, get_batch,
        history, id_at, insert, kind_of, new_id, partition_on, put, read, require, row, settle, stamp_of,
        submit,
    },
    cluster::{Cluster, Settings},
    random::Random,
    wait::eventually,
};

const MAX: &str = "170141183460469231731687303715884105727";
const MIN: &str = "-170141183460469231731687303715884105728";

/// A row that good operations of bad batches would write.
fn bystander() -> v1::Row {
    row("bystander", "USD")
}

/// All that the cluster remembers: the decisions, and the rows that bad batches would have written.
async fn state(cluster: &Cluster) -> (usize, Vec<v1::RowValue>) {
    let request = v1::ListDecisionsRequest { from: 0, limit: 10_000 };
    let listed = cluster.admin(1).list_decisions(request).await.expect("a list").into_inner();
    assert_eq!(listed.next, 0, "there are more decisions than this test can count");
    let rows = [bystander(), row("a", "USD"), row("a", "note")];
    (listed.decisions.len(), read(&cluster.settlement(1), &rows).await.values)
}

/// The error of a unary call and of a stream: the same code, field and sentence.
async fn refusal(client: &SettlementClient<Channel>, batch: &v1::Batch) -> Status {
    let status = submit(&mut client.clone(), batch).await.expect_err("a bad batch was taken");
    let good = self::batch(vec![require(&bystander(), Condition::Exists(false))]);
    let requests = [batch, &good].map(|batch| v1::SubmitStreamRequest::of([batch]));
    let answers = client.clone().submit_stream(tokio_stream::iter(requests)).await.expect("a stream");
    let answers: Vec<_> = self::answers(answers.into_inner()).collect().await;
    let mut refused = false;
    for answer in &answers {
        match answer.as_ref().expect("the stream goes on").result.as_ref().expect("a result") {
            StreamResult::Error(error) => {
                assert_eq!(Code::from_i32(error.code), status.code(), "{error:?}");
                let field = field_of(&status);
                assert_eq!(Some(&error.field), field.as_ref(), "{error:?}");
                // Times pass between the two, and some sentences tell them.
                let words = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
                assert!(words(status.message()).contains(&words(&error.message)), "{error:?}, {status}");
                refused = true;
            }
            StreamResult::Outcome(outcome) => assert_eq!(outcome.batch_id, good.id, "{outcome:?}"),
        }
    }
    assert!(refused, "the stream took it: {answers:?}");
    assert_eq!(answers.len(), 2, "one bad batch has ended the stream: {answers:?}");
    status
}

/// A name for people, the batch, the field that is to be named, and a piece of the message.
type Case = (&'static str, v1::Batch, &'static str, &'static str);

fn amounts() -> Vec<Case> {
    let bad = |delta: &str, piece: &'static str| -> Case {
        let operations = vec![add(&bystander(), 1), add_within(&row("a", "USD"), delta, None, None)];
        ("an amount", batch(operations), "batch.operations[1].add.delta", piece)
    };
    let mut cases = vec![
        bad("170141183460469231731687303715884105728", "128-bit"),
        bad("-170141183460469231731687303715884105729", "128-bit"),
        bad(&"9".repeat(10_000), "128-bit"),
        bad("", "empty"),
        bad("+1", "sign"),
    ];
    cases.extend(
        ["1.0", "1e3", "0x10", " 1", "1 ", "--1", "-", "NaN", "1_000", "½", "\u{0}"]
            .map(|text| bad(text, "integer")),
    );
    let within = |floor, ceiling, field| -> Case {
        let operations = vec![add(&bystander(), 1), add_within(&row("a", "USD"), "1", floor, ceiling)];
        ("a bound", batch(operations), field, "")
    };
    cases.push(within(Some("x"), None, "batch.operations[1].add.floor"));
    cases.push(within(None, Some("1.5"), "batch.operations[1].add.ceiling"));
    cases.push(within(Some("2"), Some("1"), "batch.operations[1].add.floor"));
    let condition = Condition::BalanceAtLeast("many".to_owned());
    let operations = vec![add(&bystander(), 1), require(&row("a", "USD"), condition)];
    cases.push(("a condition", batch(operations), "batch.operations[1].require.balance_at_least", "integer"));
    cases
}

fn contents() -> Vec<Case> {
    let (money, note) = (row("a", "USD"), row("a", "note"));
    let with = |operations: Vec<v1::Operation>| {
        batch(std::iter::once(add(&bystander(), 1)).chain(operations).collect())
    };
    let kindless = v1::Operation { row: Some(note.clone()), kind: None };
    let rowless = v1::Operation { row: None, ..add(&money, 1) };
    let demanding_nothing = v1::Operation {
        row: Some(note.clone()),
        kind: Some(v1::operation::Kind::Require(v1::Require { condition: None })),
    };
    let mut unbalanced = with(vec![add(&row("a", "USD/margin"), -2)]);
    unbalanced.zero_sum = true;
    let many = (0..1001).map(|number| add(&row(&format!("many:{number}"), "USD"), 1));
    let large = "x".repeat(5 << 20);
    vec![
        ("nothing at all", batch(vec![]), "batch.operations", "empty"),
        ("too many operations", batch(many.collect()), "batch.operations", "1001"),
        ("too many bytes", with(vec![put(&note, &large)]), "batch.operations", "bytes"),
        ("two writes", with(vec![put(&note, "1"), put(&note, "2")]), "batch.operations[2]", "operations[1]"),
        (
            "insert and delete",
            with(vec![insert(&note, "1"), delete(&note)]),
            "batch.operations[2]",
            "operations[1]",
        ),
        (
            "balance and record",
            with(vec![add(&money, 1), put(&money, "x")]),
            "batch.operations[2]",
            "operations[1]",
        ),
        ("creates money", unbalanced, "batch.zero_sum", "USD"),
        ("no kind", with(vec![kindless]), "batch.operations[1].kind", "missing"),
        ("no row", with(vec![rowless]), "batch.operations[1].row", "missing"),
        ("no condition", with(vec![demanding_nothing]), "batch.operations[1].require.condition", "missing"),
        (
            "deltas that overflow together",
            with(vec![add_within(&money, MAX, None, None), add(&money, 1)]),
            "batch.operations[2].add.delta",
            "overflow",
        ),
    ]
}

fn names() -> Vec<Case> {
    let named = |partition: &str, name: &str, field, piece| -> Case {
        ("a name", batch(vec![add(&bystander(), 1), add(&row(partition, name), 1)]), field, piece)
    };
    let (partition, name) = ("batch.operations[1].row.partition", "batch.operations[1].row.name");
    vec![
        named("", "USD", partition, "empty"),
        named("a", "", name, "empty"),
        named(&"p".repeat(257), "USD", partition, "257"),
        named("a", &"é".repeat(129), name, "258"),
        named("a\u{0}b", "USD", partition, "control"),
        named("a", "U\nSD", name, "control"),
    ]
}

fn ids() -> Vec<Case> {
    let with = |what, id: &str, piece| -> Case {
        (what, v1::Batch { id: id.to_owned(), ..batch(vec![add(&bystander(), 1)]) }, "batch.id", piece)
    };
    let good = new_id();
    vec![
        with("no id", "", "missing"),
        with("not a UUID", "hello", "canonical"),
        with("version 4", "7e5b9a1c-3f4d-4a6b-8c2d-1e0f9a8b7c6d", "version 7"),
        with("version 0", "00000000-0000-0000-0000-000000000000", "version 7"),
        with("upper case", &good.to_uppercase(), "canonical"),
        with("braces", &format!("{{{good}}}"), "canonical"),
        with("no hyphens", &good.replace('-', ""), "canonical"),
        with("too long", &"0".repeat(100_000), "canonical"),
        with("tomorrow", &id_at(24 * 3600), "ahead"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_batches_are_refused_by_field_and_nothing_changes() {
    let cluster = Cluster::start().await;
    let before = state(&cluster).await;
    let cases: Vec<Case> = [amounts(), contents(), names(), ids()].concat();
    for (place, (what, batch, field, piece)) in cases.iter().enumerate() {
        // Each node checks by itself.
        let client = cluster.settlement(1 + place as u64 % 3);
        let status = refusal(&client, batch).await;
        let said = format!("{what}: {status}");
        assert_eq!(status.code(), Code::InvalidArgument, "{said}");
        assert_eq!(field_of(&status).as_deref(), Some(*field), "{said}");
        assert!(status.message().contains(field) && status.message().contains(piece), "{said}");
        assert!(status.message().len() < 600, "too long a message: {said}");
    }
    let missing = cluster.settlement(2).submit(v1::SubmitRequest::default()).await;
    assert_eq!(field_of(&missing.expect_err("there is no batch")).as_deref(), Some("batch"));
    // The good batch on each stream is the only one that was decided. Its shard committed it, and that is recorded a moment later.
    let expected = (before.0 + cases.len(), before.1);
    let ask = || async {
        let found = state(&cluster).await;
        assert!(found.0 <= expected.0, "a bad batch has left something: {found:?}, not {expected:?}");
        if found == expected { Ok(()) } else { Err(format!("{found:?}, not {expected:?}")) }
    };
    eventually("the good batches are recorded, and nothing else", Duration::from_secs(10), ask).await;
    for case in &cases {
        let told = get_batch(&mut cluster.settlement(1), &case.1.id, 0).await;
        match told {
            Ok(v1::outcome::Result::Undecided(undecided)) => {
                assert_eq!(undecided.state(), v1::UndecidedState::NotSeen, "{}", case.0);
            }
            Ok(decided) => panic!("{}: {decided:?}", case.0),
            Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status}"),
        }
    }
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn amounts_beyond_the_number_range_are_aborted_never_wrapped() {
    let cluster = Cluster::start().await;
    let client = cluster.settlement(1);
    let partitions = cluster.partitions("edge");
    let (high, low, other) =
        (row(&partitions[0], "USD"), row(&partitions[1], "USD"), row(&partitions[2], "USD"));
    let bottom = |delta: &str| add_within(&low, delta, Some(MIN), None);
    commit(&client, vec![add_within(&high, MAX, None, None), bottom(MIN)]).await;
    let overflow = AbortReason::Overflow;
    for (operation, met) in [
        (add(&high, 1), i128::MAX),
        (add_within(&high, MAX, None, None), i128::MAX),
        (bottom("-1"), i128::MIN),
        (bottom(MIN), i128::MIN),
    ] {
        let outcome = settle(&client, &batch(vec![add(&other, 1), operation])).await;
        assert_aborted(&outcome, overflow, Some(1), Some(balance(met)));
    }
    let held = read(&client, &[high.clone(), low.clone(), other]).await;
    let held: Vec<_> = held.values.iter().map(kind_of).collect();
    assert_eq!(held, [balance(i128::MAX), balance(i128::MIN), v1::value::Kind::Absent(true)]);
    // The edges themselves are good amounts, and there is a way back from them.
    commit(&client, vec![add(&high, -1), bottom("1")]).await;
    commit(&client, vec![add(&high, 1), bottom("-1")]).await;
    let held = read(&client, &[high, low]).await;
    assert_eq!(held.values.iter().map(kind_of).collect::<Vec<_>>(), [balance(i128::MAX), balance(i128::MIN)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_older_than_the_horizon_is_refused_never_run_again() {
    let settings = Settings { lines: "retention_seconds = 6".to_owned(), ..Settings::default() };
    let cluster = Cluster::start_with(settings).await;
    let client = cluster.settlement(1);
    let account = row("old", "USD");
    let first = batch(vec![add(&account, 1)]);
    stamp_of(&settle(&client, &first).await);
    let ancient = v1::Batch { id: id_at(-3600), ..batch(vec![add(&account, 2)]) };
    for old in [&first, &ancient] {
        for node in cluster.nodes() {
            let client = cluster.settlement(node);
            let (status, _) = eventually("the id is refused", Duration::from_secs(30), || async {
                match submit(&mut client.clone(), old).await {
                    Err(status) if status.code() == Code::OutOfRange => Ok(status),
                    // It is still remembered.
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
            assert!(status.message().contains(&old.id) && status.message().contains("older"), "{status}");
            // A follower remembers a moment longer, and answers by itself what it still knows.
            eventually("the id is forgotten", Duration::from_secs(10), || async {
                match get_batch(&mut client.clone(), &old.id, 0).await {
                    Err(status) if status.code() == Code::OutOfRange => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
        }
    }
    let held = read(&client, std::slice::from_ref(&account)).await;
    assert_eq!(kind_of(&held.values[0]), balance(1), "an old id had an effect, or had it twice");
    assert_eq!(history(&client, &account).await.1.len(), 1);
    commit(&client, vec![add(&account, 1)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_in_flight_is_refused_early_with_the_time_to_try_again() {
    const MOST: usize = 3;
    let settings = Settings {
        nodes: 4,
        shards: 2,
        lines: format!("coordinators = [1, 2, 3]\nbatches_in_flight_max = {MOST}"),
        shard_replicas: "1 = [1, 2, 3]\n2 = [4]".to_owned(),
        ..Settings::default()
    };
    let mut cluster = Cluster::start_with(settings).await;
    let rows = [partition_on(1, 2, "full"), partition_on(2, 2, "full")].map(|name| row(&name, "USD"));
    commit(&cluster.settlement(1), vec![add(&rows[0], 100), add(&rows[1], 100)]).await;
    cluster.wait_quiet(Duration::from_secs(30)).await;
    // Shard 2 is down: what touches it stays in flight.
    cluster.kill9(4);
    let mut stuck = Vec::new();
    for _ in 0..MOST {
        let mut one = batch(vec![add(&rows[0], 1), add(&rows[1], 1)]);
        one.timeout_ms = 60_000;
        let client = cluster.settlement(2);
        let id = one.id.clone();
        stuck.push(tokio::spawn(async move { settle(&client, &one).await }));
        eventually("it is in progress", Duration::from_secs(30), || async {
            match get_batch(&mut cluster.settlement(1), &id, 0).await {
                Ok(v1::outcome::Result::Undecided(undecided))
                    if undecided.state() == v1::UndecidedState::InProgress =>
                {
                    Ok(())
                }
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    let one_more = batch(vec![add(&rows[0], 1)]);
    for node in 1..=3 {
        let status = submit(&mut cluster.settlement(node), &one_more).await.expect_err("one more was taken");
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        let advice = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
        assert!(advice.is_some_and(|delay| !delay.is_zero()), "when to try again? {status}");
    }
    cluster.restart(4);
    for settled in stuck {
        stamp_of(&settled.await.expect("a caller ends without a panic"));
    }
    stamp_of(&settle(&cluster.settlement(3), &one_more).await);
    let held = read(&cluster.settlement(1), &rows).await;
    assert_eq!(held.values.iter().map(kind_of).collect::<Vec<_>>(), [balance(104), balance(103)]);
    cluster.wait_quiet(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_that_make_no_sense_are_refused_by_field() {
    let cluster = Cluster::start().await;
    let (mut client, mut admin) = (cluster.settlement(2), cluster.admin(3));
    fn assert_field<T: std::fmt::Debug>(answer: Result<T, Status>, field: &str) {
        let status = answer.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(field_of(&status).as_deref(), Some(field), "{status}");
    }
    let rows = |count: usize| vec![bystander(); count];
    let ask = |rows| v1::ReadRequest { rows };
    assert_field(client.read(ask(rows(0))).await, "rows");
    assert_field(client.read(ask(rows(1001))).await, "rows");
    assert_field(client.read(ask(vec![bystander(), row("a", "")])).await, "rows[1].name");
    assert_field(client.read(ask(vec![row(&"p".repeat(300), "x")])).await, "rows[0].partition");
    assert_eq!(
        client.read(ask(rows(1000))).await.expect("1,000 are allowed").into_inner().values.len(),
        1000
    );

    let ask = |row, limit| v1::HistoryRequest { row, from: 0, limit };
    assert_field(client.history(ask(None, 1)).await, "row");
    assert_field(client.history(ask(Some(row("a\tb", "x")), 1)).await, "row.partition");
    assert_field(client.history(ask(Some(bystander()), 10_001)).await, "limit");
    client.history(ask(Some(bystander()), 0)).await.expect("0 is the default");
    client.history(ask(Some(bystander()), 10_000)).await.expect("10,000 are allowed");

    let ask = |id: &str| v1::GetBatchRequest { batch_id: id.to_owned(), abort_if_not_seen: true, wait_ms: 0 };
    assert_field(client.get_batch(ask("")).await, "batch_id");
    assert_field(client.get_batch(ask("7e5b9a1c-3f4d-4a6b-8c2d-1e0f9a8b7c6d")).await, "batch_id");

    let limit = 10_001;
    assert_field(admin.list_decisions(v1::ListDecisionsRequest { from: 0, limit }).await, "limit");
    assert_field(admin.list_in_doubt(v1::ListInDoubtRequest { limit }).await, "limit");
    assert_field(admin.trigger_snapshot(v1::TriggerSnapshotRequest { group_id: 4 }).await, "group_id");
    let wish = |group_id, to_node| v1::TransferLeaderRequest { group_id, to_node };
    assert_field(admin.transfer_leader(wish(4, 1)).await, "group_id");
    assert_field(admin.transfer_leader(wish(0, 9)).await, "to_node");
}

/// Bytes as they are, so that messages can be sent that the generated types can't say.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// Calls a method with bytes of one's own.
async fn call(channel: &Channel, method: &'static str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
    let path = PathAndQuery::from_static(method);
    grpc.unary(tonic::Request::new(message), path, Raw).await.map(tonic::Response::into_inner)
}

const SUBMIT: &str = "/verdict.v1.Settlement/Submit";

/// A field with a number that the contract doesn't know: length-delimited, number 99.
fn unknown_field() -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::string::encode(99, &"from the future".to_owned(), &mut bytes);
    bytes
}

/// A message inside another one.
fn nested(number: u32, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::bytes::encode(number, &message.to_vec(), &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_no_messages_are_refused_and_unknown_fields_do_not_hide_an_operation() {
    let mut random = Random::announced();
    let cluster = Cluster::start().await;
    let channel = cluster.channel(1);
    let before = state(&cluster).await;
    for length in [1usize, 7, 100, 5000] {
        let garbage: Vec<u8> = (0..length).map(|_| random.number() as u8 | 7).collect();
        let status = call(&channel, SUBMIT, garbage).await.expect_err("garbage was taken");
        assert!(!matches!(status.code(), Code::Ok | Code::Unknown | Code::Unavailable), "{status}");
    }
    // More than the limit on messages.
    let huge = call(&channel, SUBMIT, vec![0; 64 << 20]).await.expect_err("64 MiB were taken");
    assert_eq!(huge.code(), Code::InvalidArgument, "nobody should try that again: {huge}");
    assert_eq!(huge.message(), "the message has 67108864 bytes, at most 18874368 are taken");
    let nowhere = call(&channel, "/verdict.v1.Settlement/Nothing", vec![]).await;
    assert_eq!(nowhere.expect_err("there is no such method").code(), Code::Unimplemented);

    // An operation of a kind that only a newer client knows must not be left out of the batch.
    let mut strange = row("a", "USD").encode_to_vec();
    strange = [nested(1, &strange), nested(99, b"hold")].concat();
    let mut message = batch(vec![add(&bystander(), 1)]).encode_to_vec();
    message.extend(nested(3, &strange));
    let status = call(&channel, SUBMIT, nested(1, &message)).await.expect_err("half a batch was taken");
    assert_eq!(field_of(&status).as_deref(), Some("batch.operations[1].kind"), "{status}");
    assert_eq!(state(&cluster).await, before, "a bad message has left something");

    // Another unknown field is no reason to refuse (proto3).
    let good = batch(vec![add(&row("b", "USD"), 1)]);
    let message = [good.encode_to_vec(), unknown_field()].concat();
    let answer = call(&channel, SUBMIT, [nested(1, &message), unknown_field()].concat()).await;
    let answer = v1::SubmitResponse::decode(&answer.expect("an answer")[..]).expect("a response");
    stamp_of(&answer.outcome.and_then(|outcome| outcome.result).expect("an outcome"));
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_half_open_connections_hurt_nobody() {
    let mut random = Random::announced();
    let cluster = Cluster::start().await;
    let client = cluster.settlement(1);
    let connect = async || TcpStream::connect(cluster.address(1)).await.expect("connect");
    let account = row("patient", "USD");

    let mut http1 = connect().await;
    http1.write_all(b"GET / HTTP/1.1\r\nHost: verdict\r\n\r\n").await.expect("write");
    // Whatever it says, it ends the connection or answers, and doesn't hang for ever.
    let mut said = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(15), http1.read_to_end(&mut said)).await;
    assert!(ended.is_ok() || !said.is_empty(), "an HTTP/1.1 request hangs");

    for round in 0..20 {
        let mut garbage = vec![0; 1 << 14];
        garbage.fill_with(|| random.number() as u8);
        if round % 2 == 0 {
            // Behind a good beginning.
            garbage.splice(..0, *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        }
        // It may be cut off at any moment.
        let _ = connect().await.write_all(&garbage).await;
    }
    let mut open = Vec::new();
    for round in 0..60 {
        let mut half_open = connect().await;
        if round % 2 == 0 {
            half_open.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0").await.expect("write");
        }
        open.push(half_open);
    }
    // Not one call is disturbed, neither on old connections nor on new ones.
    for round in 0..10 {
        let mut fresh = verdict_tests::api::settlement_at(cluster.address(1));
        let one = batch(vec![add(&account, 1)]);
        let client = if round % 2 == 0 { &mut fresh } else { &mut client.clone() };
        stamp_of(&submit(client, &one).await.expect("the server serves"));
    }
    let held = read(&cluster.settlement(2), &[account]).await;
    assert_eq!(kind_of(&held.values[0]), balance(10));
    drop(open);
    cluster.wait_quiet(Duration::from_secs(30)).await;
}
