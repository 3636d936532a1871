//! One trade as one transaction, optimistically: read the four balances, then write them if they are still the same.
//!
//! - The first read asks no quorum (`serializable`): what it tells may be old, and the comparison finds that out.
//! - If the comparison fails, the same answer brings the balances as they are now, so no second read is needed. It brings the
//!   trade's record too: should an earlier try that seemed to fail have had effect after all, it is seen.
//! - After a failure a client waits a little, at random, the longer the more often: without it clients of a hot account mostly
//!   disturb each other.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use tonic::{Code, Status, transport::Channel};

use super::wire::{
    Compare, KeyValue, PutRequest, RangeRequest, RequestOp, ResponseOp, TxnRequest, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    kv_client::KvClient,
    request_op::Request,
    response_op::Response,
};
use crate::{
    load::{Answer, Client},
    trade::{Asset, Leg, Random, Trade},
};

/// The most tries for one trade.
const TRIES_MAX: u64 = 100_000;
/// The most answers that leave open what happened, for one trade.
const UNCERTAIN_MAX: u64 = 100;
/// The pause after such an answer.
const UNCERTAIN_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause after the first failure, and how often it doubles. Few doublings: who waits long meets one that doesn't
/// wait at all each time, and never gets its turn.
const PAUSE_US: u64 = 1_000;
const PAUSE_DOUBLINGS_MAX: u64 = 2;

/// A client.
#[derive(Debug)]
pub struct Transactions {
    client: KvClient<Channel>,
    random: Random,
}

/// A balance as it was read.
#[derive(Clone, Copy, Debug)]
struct Seen {
    balance: i64,
    revision: i64,
}

impl Transactions {
    /// A client on this connection.
    pub fn new(channel: Channel, seed: u64) -> Transactions {
        Transactions { client: KvClient::new(channel), random: Random::new(seed) }
    }

    async fn read(&mut self, trade: &Trade) -> anyhow::Result<Now> {
        let reads = TxnRequest { success: reads(trade, true), ..TxnRequest::default() };
        let answer = self.client.txn(reads).await.context("read the balances")?;
        understand(answer.into_inner())
    }

    async fn pause(&mut self, failed_tries: u64) {
        let longest = PAUSE_US << failed_tries.min(PAUSE_DOUBLINGS_MAX);
        let pause = self.random.below(longest);
        tokio::time::sleep(Duration::from_micros(pause)).await;
    }
}

impl Client for Transactions {
    async fn settle(&mut self, trade: &Trade, give_up: Instant) -> anyhow::Result<Answer> {
        let mut now = self.read(trade).await?;
        let (mut failed_tries, mut uncertain) = (0, 0);
        while failed_tries < TRIES_MAX {
            match self.client.txn(write(trade, &now.seen)?).await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    if answer.succeeded {
                        return Ok(Answer::Settled { failed_tries });
                    }
                    now = understand(answer)?;
                }
                Err(status) if is_uncertain(&status) && uncertain < UNCERTAIN_MAX => {
                    uncertain += 1;
                    tokio::time::sleep(UNCERTAIN_PAUSE).await;
                    continue;
                }
                Err(status) => return Err(status).context("write the balances"),
            }
            if now.is_recorded {
                return Ok(Answer::Settled { failed_tries });
            }
            failed_tries += 1;
            // A try that left open what happened may still be on its way: then the trade isn't given up.
            if Instant::now() > give_up && uncertain == 0 {
                return Ok(Answer::GivenUp { failed_tries });
            }
            self.pause(failed_tries).await;
        }
        anyhow::bail!("{TRIES_MAX} tries had no effect")
    }
}

/// The key of a balance, or what the keys of an asset's balances begin with.
pub fn balance_key(asset: Asset, user: Option<u64>) -> Vec<u8> {
    let user = user.map(|user| user.to_string()).unwrap_or_default();
    format!("balance/{}/{user}", asset as u8).into_bytes()
}

/// The end of the range of keys that begin with `prefix`.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        // Prefixes here end with a slash.
        *last += 1;
    }
    end
}

/// A balance from its text.
pub fn parse_balance(value: &[u8]) -> anyhow::Result<i64> {
    let text = std::str::from_utf8(value).context("read a balance")?;
    text.parse().with_context(|| format!("{text:?} is no balance"))
}

fn trade_key(trade: &Trade) -> Vec<u8> {
    format!("trade/{}", trade.id).into_bytes()
}

/// What a trade's keys hold.
#[derive(Clone, Debug)]
struct Now {
    /// In the order of the legs.
    seen: [Seen; 4],
    is_recorded: bool,
}

fn key_of(leg: &Leg) -> Vec<u8> {
    balance_key(leg.asset, Some(leg.user))
}

/// Reads of the four balances, and of the record.
fn reads(trade: &Trade, serializable: bool) -> Vec<RequestOp> {
    let keys = trade.legs().iter().map(key_of).chain([trade_key(trade)]).collect::<Vec<_>>();
    let ranges = keys.into_iter().map(|key| RangeRequest { key, serializable, ..RangeRequest::default() });
    ranges.map(|range| RequestOp { request: Some(Request::RequestRange(range)) }).collect()
}

/// The transaction that settles the trade if its balances are still these.
fn write(trade: &Trade, seen: &[Seen; 4]) -> anyhow::Result<TxnRequest> {
    let put = |key, value| RequestOp { request: Some(Request::RequestPut(PutRequest { key, value })) };
    let mut request = TxnRequest { failure: reads(trade, false), ..TxnRequest::default() };
    for (leg, seen) in trade.legs().iter().zip(seen) {
        let balance = seen.balance + leg.delta;
        anyhow::ensure!(balance >= 0, "user {} is short", leg.user);
        request.compare.push(Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key_of(leg),
            target_union: Some(TargetUnion::ModRevision(seen.revision)),
        });
        request.success.push(put(key_of(leg), balance.to_string().into_bytes()));
    }
    request.compare.push(Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: trade_key(trade),
        target_union: Some(TargetUnion::CreateRevision(0)),
    });
    request.success.push(put(trade_key(trade), trade.record().into_bytes()));
    Ok(request)
}

/// Takes apart the answer to [`reads`].
fn understand(answer: TxnResponse) -> anyhow::Result<Now> {
    let pair = |response: &ResponseOp| -> Option<KeyValue> {
        match &response.response {
            Some(Response::ResponseRange(range)) => range.kvs.first().cloned(),
            Some(Response::ResponsePut(_)) | None => None,
        }
    };
    let mut seen = Vec::with_capacity(4);
    for response in answer.responses.iter().take(4) {
        let pair = pair(response).context("a balance isn't there")?;
        seen.push(Seen { balance: parse_balance(&pair.value)?, revision: pair.mod_revision });
    }
    let count = seen.len();
    let seen = seen.try_into().ok().with_context(|| format!("{count} balances were answered"))?;
    Ok(Now { seen, is_recorded: answer.responses.get(4).and_then(pair).is_some() })
}

/// Whether the transaction may have taken effect, or may be tried again.
fn is_uncertain(status: &Status) -> bool {
    [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Unknown].contains(&status.code())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trade::{INITIAL_BALANCE, Load, Trades};

    fn trade() -> Trade {
        Trades::new(5, 10, Load::Uniform).next(77)
    }

    #[test]
    fn a_transaction_compares_all_that_it_writes() {
        let trade = trade();
        let seen = [1, 2, 3, 4].map(|revision| Seen { balance: INITIAL_BALANCE, revision });
        let request = write(&trade, &seen).unwrap();
        let compared: Vec<&[u8]> = request.compare.iter().map(|compare| compare.key.as_slice()).collect();
        let written: Vec<&[u8]> = request
            .success
            .iter()
            .map(|operation| match &operation.request {
                Some(Request::RequestPut(put)) => put.key.as_slice(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(compared, written);
        assert_eq!(written.len(), 5);
        assert_eq!(request.compare[2].target_union, Some(TargetUnion::ModRevision(3)));
        assert_eq!(request.compare[4].target_union, Some(TargetUnion::CreateRevision(0)));
    }

    #[test]
    fn who_is_short_writes_nothing() {
        let seen = [0; 4].map(|balance| Seen { balance, revision: 1 });
        assert!(write(&trade(), &seen).is_err());
    }

    #[test]
    fn a_prefix_ends_before_the_next_one() {
        let prefix = balance_key(Asset::Base, None);
        let end = prefix_end(&prefix);
        for user in [0, 9, 10, 12_345, u64::MAX] {
            let key = balance_key(Asset::Base, Some(user));
            assert!(prefix <= key && key < end, "{user}");
            assert!(balance_key(Asset::Quote, Some(user)) >= end, "{user}");
        }
    }
}
