//! Clients: each does one thing after the other, through whatever node, and tries again under the same id until it knows the end.

use std::rc::Rc;

use verdict_protocol::{
    batch::{Batch, Placement},
    ids::{BatchId, ContentHash, NodeId, Stamp},
    leader::{Refusal, Reply},
};

use crate::{
    context::{Context, Event},
    faults::Fired,
    messages::{Answer, Packet, Place, Question},
    plan::{Act, Step, batch_id, row_key},
    raft::Time,
};

/// How often something is tried that was refused for the moment.
const TRIES_MAX: u32 = 8;

/// One thing that a client did, with its bounds in real time.
#[derive(Clone, Debug)]
pub struct Record {
    /// Who.
    pub client: u32,
    /// What.
    pub question: Question,
    /// When it began.
    pub invoked: Time,
    /// When an answer came that ended it.
    pub answered: Option<Time>,
    /// That answer.
    pub end: Option<Answer>,
    /// How many calls it took.
    pub calls: usize,
    /// Every answer that came, late ones too.
    pub answers: Vec<Answer>,
}

impl Record {
    /// The batch that it is about.
    pub fn id(&self) -> Option<BatchId> {
        match &self.question {
            Question::Submit { batch, .. } => Some(batch.id),
            Question::Query { id, .. } => Some(*id),
            Question::Read { .. } | Question::History { .. } => None,
        }
    }

    /// The submitted batch.
    pub fn submitted(&self) -> Option<(&Rc<Batch>, ContentHash)> {
        match &self.question {
            Question::Submit { batch, split } => Some((batch, split.hash)),
            Question::Query { .. } | Question::Read { .. } | Question::History { .. } => None,
        }
    }
}

/// What goes on at a client.
#[derive(Debug)]
struct Doing {
    record: usize,
    tries: u32,
    /// An answer is awaited until then; or the next try is made.
    until: Time,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    id: u32,
    steps: std::vec::IntoIter<Step>,
    next: Option<Step>,
    doing: Option<Doing>,
    wake: u64,
    last_request: u64,
    /// Which record each call was for.
    requests: Vec<usize>,
}

impl Client {
    /// A client that has not begun.
    pub fn new(id: u32, steps: Vec<Step>) -> Client {
        let steps = steps.into_iter();
        Client { id, steps, next: None, doing: None, wake: 0, last_request: 0, requests: Vec::new() }
    }

    /// Whether everything is done and known.
    pub fn is_done(&self) -> bool {
        self.doing.is_none() && self.next.is_none() && self.steps.as_slice().is_empty()
    }

    /// Begins, or goes on.
    pub fn go_on(&mut self, cx: &mut Context) {
        self.next = self.steps.next();
        if let Some(step) = &self.next {
            let at = cx.now + step.after_ms * 1000;
            self.wake_at(at, cx);
        }
    }

    fn wake_at(&mut self, at: Time, cx: &mut Context) {
        self.wake += 1;
        cx.at(at, Event::Client { client: self.id, wake: self.wake });
    }

    /// Time is up: for the next step, or for the present try.
    pub fn woken(&mut self, wake: u64, cx: &mut Context) {
        if wake != self.wake {
            return;
        }
        if self.doing.is_none() {
            let Some(step) = self.next.take() else { return };
            let question = question(step.what, cx);
            let (client, invoked) = (self.id, cx.now);
            let record = Record {
                client,
                question,
                invoked,
                answered: None,
                end: None,
                calls: 0,
                answers: Vec::new(),
            };
            let record = cx.witness.began(record);
            self.doing = Some(Doing { record, tries: 0, until: 0 });
        }
        self.attempt(cx);
    }

    fn attempt(&mut self, cx: &mut Context) {
        let patience = cx.random.range(200, 2_500) * 1000;
        let Some(doing) = &mut self.doing else { return };
        doing.tries += 1;
        doing.until = cx.now + patience;
        let (record, until) = (doing.record, doing.until);
        self.send(record, cx);
        self.wake_at(until, cx);
    }

    fn send(&mut self, record: usize, cx: &mut Context) {
        let node = NodeId(cx.random.range(1, cx.plan.nodes));
        self.last_request += 1;
        self.requests.push(record);
        let question = cx.witness.called(record);
        let request = self.last_request;
        cx.trace.line(cx.now, || format!("c{} asks n{node}: {}", self.id, in_words(&question)));
        cx.send(Place::Client(self.id), Place::Node(node), Packet::Call { request, question });
    }

    /// Sends its last batches once more, whatever is known of them.
    pub fn storm(&mut self, last: u64, cx: &mut Context) {
        let mut records: Vec<usize> = self.requests.clone();
        records.dedup();
        records.retain(|record| cx.witness.record(*record).submitted().is_some());
        for record in records.into_iter().rev().take(last as usize) {
            cx.tally.count(Fired::Storm);
            self.send(record, cx);
        }
    }

    /// An answer has come.
    pub fn answered(&mut self, request: u64, answer: Answer, cx: &mut Context) {
        let record = self.requests[request as usize - 1];
        cx.witness.answer(record, answer.clone(), cx.now);
        let Some(doing) = self.doing.as_ref().filter(|doing| doing.record == record) else { return };
        let tries_left = doing.tries < TRIES_MAX;
        let again = match &answer {
            Answer::Unknown => true,
            Answer::NotProposed => tries_left,
            Answer::Told(Reply::Refused(Refusal::Overloaded | Refusal::Unavailable { .. })) => tries_left,
            Answer::Told(Reply::InProgress) => true,
            Answer::Told(
                Reply::Decided(_)
                | Reply::NotSeen
                | Reply::Refused(_)
                | Reply::Rows { .. }
                | Reply::History { .. },
            ) => false,
        };
        if again {
            let at = cx.now + cx.random.range(20, 300) * 1000;
            self.wake_at(at, cx);
            return;
        }
        cx.witness.ended(record, answer, cx.now);
        self.doing = None;
        self.go_on(cx);
    }
}

fn question(what: Act, cx: &Context) -> Question {
    match what {
        Act::Submit(contents) => {
            let batch = Rc::new(contents.batch(cx.plan.settings.timeout_ms));
            let split = Rc::new(batch.split(Placement { shards: cx.plan.shards() }));
            Question::Submit { batch, split }
        }
        Act::Query { id, made_ms, wait, seal } => Question::Query { id: batch_id(id, made_ms), wait, seal },
        Act::Read { rows } => Question::Read { rows: rows.iter().map(|row| row_key(row)).collect() },
        Act::History { row } => Question::History { row: row_key(&row), from: Stamp(0), limit: 10_000 },
    }
}

fn in_words(question: &Question) -> String {
    match question {
        Question::Submit { batch, .. } => {
            let operations = batch.operations.iter();
            let operations = operations.map(|operation| format!("{:?} {:?}", operation.row, operation.kind));
            format!("submit {}: {}", batch.id, operations.collect::<Vec<_>>().join("; "))
        }
        Question::Query { id, wait, seal } => format!("outcome of {id}, wait {wait}, seal {seal}"),
        Question::Read { rows } => format!("read {rows:?}"),
        Question::History { row, .. } => format!("history of {row:?}"),
    }
}
