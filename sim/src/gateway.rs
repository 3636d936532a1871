//! The gateway that every node has: takes clients' calls, hands them to the coordinators' leader, wherever it is, and answers.
//!
//! A recorded decision is told from the local replica. "Nothing was proposed" is said only if every node that was asked has refused;
//! otherwise a call without an answer in time is UNKNOWN.

use std::collections::BTreeMap;

use verdict_protocol::{
    ids::NodeId,
    leader::{Refusal, Reply},
};

use crate::{
    context::{Context, Timer},
    driver::Caller,
    messages::{Answer, NotServed, Packet, Place, Question},
    raft::Time,
};

/// After this time without a word a call is handed in again.
const SILENT: Time = 700_000;
/// The pause after a refusal.
const PAUSE: Time = 30_000;
/// How long a call may take.
const CALL_MAX: Time = 4_000_000;

#[derive(Debug)]
struct Call {
    client: u32,
    request: u64,
    question: Question,
    until: Time,
    /// Not handed in again before this.
    due: Time,
    /// Tries that may have reached a leader's core and of which nothing was heard.
    open: u32,
    /// One of them was lost.
    lost: bool,
}

/// Where a call goes.
#[derive(Debug)]
pub enum Handed {
    /// To the driver of this node.
    Here(Caller, Question),
    /// Into the network, or nowhere for the moment.
    Elsewhere,
}

/// The gateway of one node. Nothing of it survives a crash.
#[derive(Debug, Default)]
pub struct Gateway {
    calls: BTreeMap<u64, Call>,
    last: u64,
    /// Whom to ask next if no leader is known.
    turn: usize,
}

impl Gateway {
    /// A call has come. Gives its number.
    pub fn take(&mut self, life: u64, client: u32, request: u64, question: Question, now: Time) -> u64 {
        self.last += 1;
        let number = (life << 32) | self.last;
        let until = now + CALL_MAX;
        let call = Call { client, request, question, until, due: now, open: 0, lost: false };
        self.calls.insert(number, call);
        number
    }

    /// Hands a call to the leader, as far as it is known here.
    pub fn hand_in(
        &mut self,
        number: u64,
        node: NodeId,
        life: u64,
        leader: Option<NodeId>,
        cx: &mut Context,
    ) -> Handed {
        let Some(call) = self.calls.get_mut(&number) else { return Handed::Elsewhere };
        if cx.now < call.due {
            return Handed::Elsewhere;
        }
        if cx.now >= call.until {
            let certain = call.open == 0 && !call.lost;
            self.answer(number, node, if certain { Answer::NotProposed } else { Answer::Unknown }, cx);
            return Handed::Elsewhere;
        }
        let seats = &cx.plan.seats[0];
        let to = leader.unwrap_or_else(|| {
            self.turn += 1;
            NodeId(seats[self.turn % seats.len()])
        });
        call.open += 1;
        let question = call.question.clone();
        let again = call.until.min(cx.now + SILENT);
        call.due = again;
        cx.timer(again, node, life, Timer::Call(number));
        if to == node {
            return Handed::Here(Caller { node, call: number }, question);
        }
        cx.send(Place::Node(node), Place::Node(to), Packet::Forward { call: number, question });
        Handed::Elsewhere
    }

    /// A leader has answered, or refused.
    pub fn served(
        &mut self,
        number: u64,
        reply: Result<Reply, NotServed>,
        node: NodeId,
        life: u64,
        cx: &mut Context,
    ) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        call.open = call.open.saturating_sub(1);
        match reply {
            Err(refused) => {
                call.lost |= refused == NotServed::Lost;
                call.due = cx.now + PAUSE;
                cx.timer(call.due, node, life, Timer::Call(number));
            }
            // Not taken now; an earlier try may have been.
            Ok(Reply::Refused(Refusal::Overloaded | Refusal::FromTheFuture { .. }))
                if call.open > 0 || call.lost =>
            {
                self.answer(number, node, Answer::Unknown, cx);
            }
            Ok(reply) => self.answer(number, node, Answer::Told(reply), cx),
        }
    }

    /// Answers a call, which ends it.
    pub fn answer(&mut self, number: u64, node: NodeId, answer: Answer, cx: &mut Context) {
        let Some(call) = self.calls.remove(&number) else { return };
        let packet = Packet::Answer { request: call.request, answer };
        cx.send(Place::Node(node), Place::Client(call.client), packet);
    }
}
