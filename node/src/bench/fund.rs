//! Makes the accounts of a bench: every user gets so much of both assets that no trade is ever short.
//!
//! A batch has 500 users of one shard, the most that a batch may hold. So the load is written in one-shard batches of a thousand
//! rows, and takes the same memory however many accounts there are.

use std::time::Instant;

use anyhow::{Context as _, bail};
use futures::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use serde::Serialize;
use verdict_client::{Answer, Batch, BatchBuilder, Client, Outcome};

use super::trade::{ASSET, CASH, Population, user};
use crate::progress::Progress;

/// What each account gets: more than any run can move.
const FUNDS: i128 = 1_000_000_000_000_000_000;
/// A batch may have 1000 operations, two for each user.
const USERS_PER_BATCH: usize = 500;
/// Batches in flight.
const WINDOW: usize = 16;

/// How the accounts were made.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Funded {
    /// Accounts: two for each user.
    pub accounts: u64,
    /// How long it took.
    pub seconds: f64,
    /// Accounts per second.
    pub accounts_per_second: f64,
}

/// Makes the accounts of all users.
pub async fn fund(client: &Client, population: Population) -> anyhow::Result<Funded> {
    let began = Instant::now();
    let accounts = population.users * 2;
    let progress = Progress::new("accounts", accounts);
    let submitter = client.submitter(WINDOW);
    let mut buckets: Vec<Vec<u64>> = vec![Vec::new(); population.placement.shards as usize];
    let mut pending = FuturesUnordered::new();
    let mut shown = Instant::now();
    for number in 0..population.users {
        let bucket = &mut buckets[population.shard_of(number).0 as usize - 1];
        bucket.push(number);
        let is_last = number + 1 == population.users;
        let full = buckets.iter_mut().filter(|bucket| bucket.len() == USERS_PER_BATCH || is_last);
        for users in full.map(std::mem::take).filter(|users| !users.is_empty()) {
            let count = users.len() as u64 * 2;
            let answer = submitter.reserve().await.submit(batch(&users));
            pending.push(answer.map(move |answer| (answer, count)));
            while let Some(Some((answer, count))) = pending.next().now_or_never() {
                check(answer)?;
                progress.advance(count);
            }
            if shown.elapsed().as_millis() >= 100 {
                shown = Instant::now();
                progress.tick();
            }
        }
    }
    while let Some((answer, count)) = pending.next().await {
        check(answer)?;
        progress.advance(count);
        progress.tick();
    }
    progress.finish();
    let seconds = began.elapsed().as_secs_f64();
    Ok(Funded { accounts, seconds, accounts_per_second: accounts as f64 / seconds })
}

fn batch(users: &[u64]) -> Batch {
    let add = |batch: BatchBuilder, number: &u64| {
        batch.add(user(*number), CASH, FUNDS).add(user(*number), ASSET, FUNDS)
    };
    users.iter().fold(BatchBuilder::new(), add).build()
}

fn check(answer: Answer) -> anyhow::Result<()> {
    match answer.result.context("make accounts")? {
        Outcome::Committed { .. } => Ok(()),
        other => bail!("accounts could not be made: {other:?}"),
    }
}
