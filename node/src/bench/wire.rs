//! How the load talks to a node: orders are written straight into the connection's buffer, and of an answer that says COMMITTED
//! nothing is decoded but the id. Any other answer is decoded as a whole.

use std::time::Duration;

use prost::{
    Message as _,
    encoding::{DecodeContext, decode_key, decode_varint, skip_field},
};
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use tonic_types::StatusExt as _;
use uuid::Uuid;
use verdict_proto::v1::{CallError, Outcome, SubmitAnswer, SubmitResponse, outcome, submit_answer};

use super::trade::Order;

use bytes::{Buf as _, BufMut as _};

const SUBMIT: PathAndQuery = PathAndQuery::from_static("/verdict.v1.Settlement/Submit");
const SUBMIT_STREAM: PathAndQuery = PathAndQuery::from_static("/verdict.v1.Settlement/SubmitStream");
/// A canonical UUID takes so many bytes.
const ID_BYTES: u8 = 36;
/// When to try again after a refusal that doesn't say it.
const RETRY_DEFAULT: Duration = Duration::from_millis(20);

/// What was said about one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is committed.
    Committed,
    /// This try was not proposed: there is too much in flight. The same batch may come again.
    Refused {
        /// When, as the server advises.
        retry_after: Duration,
    },
    /// Anything else, in a word or two.
    Other(String),
}

/// The answer to one batch of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The batch's id.
    pub id: Option<Uuid>,
    /// What was said.
    pub said: Said,
}

/// One unary call.
pub async fn submit(grpc: &mut Grpc<Channel>, order: Order) -> Said {
    if let Err(error) = grpc.ready().await {
        return Said::Other(format!("no connection: {error}"));
    }
    match grpc.unary(Request::new(vec![order]), SUBMIT, Wire(of_unary)).await {
        Ok(response) => response.into_inner(),
        Err(status) => said_by_status(&status),
    }
}

/// Opens a stream. Orders that are ready at the same time share a message, and so do answers.
pub async fn submit_stream(
    grpc: &mut Grpc<Channel>,
    orders: impl futures::Stream<Item = Vec<Order>> + Send + 'static,
) -> Result<Streaming<Vec<Answer>>, Status> {
    grpc.ready().await.map_err(|error| Status::unavailable(format!("no connection: {error}")))?;
    Ok(grpc.streaming(Request::new(orders), SUBMIT_STREAM, Wire(of_stream)).await?.into_inner())
}

type Read<A> = fn(&[u8]) -> Result<A, prost::DecodeError>;

/// Writes orders and reads answers.
struct Wire<A>(Read<A>);

struct Writer {
    bytes: Vec<u8>,
}

struct Reader<A>(Read<A>);

impl<A: Send + 'static> Codec for Wire<A> {
    type Encode = Vec<Order>;
    type Decode = A;
    type Encoder = Writer;
    type Decoder = Reader<A>;

    fn encoder(&mut self) -> Writer {
        Writer { bytes: Vec::with_capacity(512) }
    }

    fn decoder(&mut self) -> Reader<A> {
        Reader(self.0)
    }
}

impl Encoder for Writer {
    type Item = Vec<Order>;
    type Error = Status;

    fn encode(&mut self, orders: Vec<Order>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        self.bytes.clear();
        orders.iter().for_each(|order| order.write(&mut self.bytes));
        out.put_slice(&self.bytes);
        Ok(())
    }
}

impl<A> Decoder for Reader<A> {
    type Item = A;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<A>, Status> {
        let bytes = input.copy_to_bytes(input.remaining());
        let answer = (self.0)(&bytes);
        answer.map(Some).map_err(|error| Status::internal(format!("an answer can't be read: {error}")))
    }
}

fn of_unary(bytes: &[u8]) -> Result<Said, prost::DecodeError> {
    if committed_id(bytes, 0).is_some() {
        return Ok(Said::Committed);
    }
    let outcome = SubmitResponse::decode(bytes)?.outcome;
    Ok(outcome.map_or_else(|| Said::Other("no outcome".into()), said_in))
}

fn of_stream(mut bytes: &[u8]) -> Result<Vec<Answer>, prost::DecodeError> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let (field, wire) = decode_key(&mut bytes)?;
        if field != 1 {
            skip_field(wire, field, &mut bytes, DecodeContext::default())?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut bytes)?).unwrap_or(usize::MAX);
        // One that is cut is told by whoever decodes it as a whole.
        let (answer, rest) = bytes.split_at(length.min(bytes.len()));
        answers.push(of_answer(answer)?);
        bytes = rest;
    }
    Ok(answers)
}

fn of_answer(bytes: &[u8]) -> Result<Answer, prost::DecodeError> {
    // The batch's id comes first, then the outcome, with the id again.
    let outcome_at = 2 + usize::from(ID_BYTES);
    if let Some(id) = committed_id(bytes, outcome_at) {
        return Ok(Answer { id: Uuid::try_parse_ascii(id).ok(), said: Said::Committed });
    }
    let answer = SubmitAnswer::decode(bytes)?;
    let said = match answer.result {
        Some(submit_answer::Result::Outcome(outcome)) => said_in(outcome),
        Some(submit_answer::Result::Error(CallError { code, retry_after_ms, .. })) => {
            let retry_after = Duration::from_millis(u64::from(retry_after_ms));
            said_by_code(Code::from_i32(code), Some(retry_after).filter(|after| !after.is_zero()))
        }
        None => Said::Other("no outcome".into()),
    };
    Ok(Answer { id: Uuid::try_parse(&answer.batch_id).ok(), said })
}

/// The id in the outcome that stands at this place, if it says COMMITTED and has the usual form.
fn committed_id(bytes: &[u8], at: usize) -> Option<&[u8]> {
    const LENGTH_DELIMITED: u8 = 2;
    let [_, length, field, id_bytes, rest @ ..] = bytes.get(at..)? else { return None };
    let is_usual = *length < 0x80 && *field == 1 << 3 | LENGTH_DELIMITED && *id_bytes == ID_BYTES;
    let (id, rest) = rest.split_at_checked(usize::from(ID_BYTES)).filter(|_| is_usual)?;
    (rest.first() == Some(&(2 << 3 | LENGTH_DELIMITED))).then_some(id)
}

fn said_in(outcome: Outcome) -> Said {
    match outcome.result {
        Some(outcome::Result::Committed(_)) => Said::Committed,
        Some(outcome::Result::Aborted(aborted)) => {
            let name = aborted.reason().as_str_name();
            Said::Other(format!("ABORTED {}", name.strip_prefix("ABORT_REASON_").unwrap_or(name)))
        }
        Some(outcome::Result::Undecided(_)) => Said::Other("UNKNOWN".into()),
        None => Said::Other("no outcome".into()),
    }
}

fn said_by_status(status: &Status) -> Said {
    let details = status.get_error_details();
    // Broken connections make statuses too: only those with details are a node's own word.
    if details.error_info().is_none() && details.retry_info().is_none() {
        return Said::Other(format!("{:?}", status.code()));
    }
    said_by_code(status.code(), details.retry_info().and_then(|info| info.retry_delay))
}

fn said_by_code(code: Code, retry_after: Option<Duration>) -> Said {
    match code {
        Code::ResourceExhausted => Said::Refused { retry_after: retry_after.unwrap_or(RETRY_DEFAULT) },
        other => Said::Other(format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;
    use verdict_proto::v1::{AbortReason, Aborted, Committed, SubmitStreamResponse, Undecided};

    use super::*;

    const ID: &str = "01a1f936-de90-7f17-a270-2a2f00000014";

    fn outcome(result: Option<outcome::Result>) -> Outcome {
        Outcome { batch_id: ID.into(), result }
    }

    fn committed(stamp: u64) -> Outcome {
        outcome(Some(outcome::Result::Committed(Committed { stamp })))
    }

    fn in_stream(result: submit_answer::Result) -> Answer {
        let answer = SubmitAnswer { batch_id: ID.into(), result: Some(result) };
        let message = SubmitStreamResponse { answers: vec![answer.clone(), answer] };
        let [one, other] = of_stream(&message.encode_to_vec()).unwrap().try_into().unwrap();
        assert_eq!(one, other);
        one
    }

    #[test]
    fn the_short_way_says_what_the_long_way_says() {
        for stamp in [0, 1, 300, u64::MAX] {
            let answer = in_stream(submit_answer::Result::Outcome(committed(stamp)));
            assert_eq!(answer, Answer { id: ID.parse().ok(), said: Said::Committed });
            let unary = SubmitResponse { outcome: Some(committed(stamp)) };
            assert_eq!(of_unary(&unary.encode_to_vec()).unwrap(), Said::Committed);
        }
        let bytes = SubmitResponse { outcome: Some(committed(7)) }.encode_to_vec();
        assert_eq!(committed_id(&bytes, 0), Some(ID.as_bytes()), "the short way is the one that is taken");
    }

    #[test]
    fn nothing_but_committed_is_taken_for_committed() {
        let reason = AbortReason::ShortOfFunds as i32;
        let aborted = Aborted { reason, message: "x".repeat(300), ..Aborted::default() };
        let others = [
            (outcome(Some(outcome::Result::Aborted(aborted))), "ABORTED SHORT_OF_FUNDS"),
            (outcome(Some(outcome::Result::Undecided(Undecided::default()))), "UNKNOWN"),
            (outcome(None), "no outcome"),
            (Outcome::default(), "no outcome"),
        ];
        for (outcome, expected) in others {
            let unary = SubmitResponse { outcome: Some(outcome.clone()) };
            assert_eq!(of_unary(&unary.encode_to_vec()).unwrap(), Said::Other(expected.into()));
            let answer = in_stream(submit_answer::Result::Outcome(outcome));
            assert_eq!(answer, Answer { id: ID.parse().ok(), said: Said::Other(expected.into()) });
        }
        assert!(of_stream(&[0xff; 3]).is_err());
    }

    #[test]
    fn a_refusal_says_when_to_come_again() {
        for (retry_after_ms, expected) in [(200, Duration::from_millis(200)), (0, RETRY_DEFAULT)] {
            let code = Code::ResourceExhausted as i32;
            let refused = CallError { code, retry_after_ms, ..CallError::default() };
            let said = in_stream(submit_answer::Result::Error(refused)).said;
            assert_eq!(said, Said::Refused { retry_after: expected });
        }
        let hint = Duration::from_millis(200);
        let details = ErrorDetails::with_retry_info(Some(hint));
        let status = Status::with_error_details(Code::ResourceExhausted, "full", details);
        assert_eq!(said_by_status(&status), Said::Refused { retry_after: hint });
        // Perhaps the connection's word, and the batch is on its way.
        let status = Status::resource_exhausted("calm down");
        assert_eq!(said_by_status(&status), Said::Other("ResourceExhausted".into()));
    }
}
