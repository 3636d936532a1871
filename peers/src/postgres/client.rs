//! Two-phase commit between two instances, by a client that has a connection to each.
//!
//! What can be done at once is: the parts of both instances are prepared side by side, each in one message and one round trip,
//! and so are the two commits. All statements are prepared once for each connection.
//!
//! 1. On both: BEGIN, two balances, on one of them the trade's record, PREPARE TRANSACTION.
//! 2. On one of them, by the trade's number: the decision row, committed.
//! 3. On both: COMMIT PREPARED. Then the trade is answered: from here on every reader sees it.
//!
//! In a hot load everybody waits for the same row. Locks are then taken in one order, the first instance before the second, for
//! else clients would wait for each other in a circle that no instance sees. The hot account is on the second, so it is held as
//! briefly as can be, and the first instance's PREPARE runs beside the second's part. In a uniform load circles are so rare that
//! a time-out is the better remedy.

use std::{fmt::Write as _, time::Instant};

use anyhow::Context as _;
use tokio_postgres::{Client as Connection, Error, error::SqlState};

use super::instance::Instance;
use crate::{
    load::{Answer, Client},
    trade::{Load, SHARDS, Trade, shard_of},
};

/// The most tries for one trade.
const TRIES_MAX: u64 = 100;
/// How long a lock is waited for where circles are possible, in milliseconds.
const LOCK_TIMEOUT_MS: u32 = 2_000;

/// A client.
#[derive(Debug)]
pub struct TwoPhase {
    connections: [Connection; SHARDS as usize],
    load: Load,
}

/// What became of one instance's part.
enum Part {
    Prepared,
    Failed(Error),
    NotBegun,
}

impl From<Result<(), Error>> for Part {
    fn from(result: Result<(), Error>) -> Part {
        result.map_or_else(Part::Failed, |()| Part::Prepared)
    }
}

impl TwoPhase {
    /// Connects to both instances.
    pub async fn connect(instances: &[Instance], load: Load) -> anyhow::Result<TwoPhase> {
        let [first, second] = instances else { anyhow::bail!("there must be two instances") };
        let connections = [first.connect().await?, second.connect().await?];
        let lock_timeout = match load {
            Load::Uniform => LOCK_TIMEOUT_MS,
            Load::Hot => 0,
        };
        let set_up = format!(
            "SET lock_timeout = {lock_timeout};
             PREPARE leg(bigint, bigint, bigint) AS
                 UPDATE balances SET balance = balance + $3 WHERE owner = $1 AND asset = $2;
             PREPARE record(bigint, text) AS INSERT INTO trades VALUES ($1, $2);
             PREPARE decide(bigint) AS INSERT INTO decisions VALUES ($1);"
        );
        for connection in &connections {
            connection.batch_execute(&set_up).await.context("set up a connection")?;
        }
        Ok(TwoPhase { connections, load })
    }

    /// Has both instances prepare their parts. Tells which have.
    async fn prepare(&self, trade: &Trade, name: &str) -> [Part; SHARDS as usize] {
        let [first, second] = &self.connections;
        let [first_part, second_part] = [part(trade, 0), part(trade, 1)];
        let end = format!("PREPARE TRANSACTION '{name}'");
        match self.load {
            Load::Uniform => {
                let (first_part, second_part) = (first_part + &end, second_part + &end);
                let both =
                    futures::join!(first.batch_execute(&first_part), second.batch_execute(&second_part));
                [both.0.into(), both.1.into()]
            }
            Load::Hot => {
                if let Err(error) = first.batch_execute(&first_part).await {
                    return [Part::Failed(error), Part::NotBegun];
                }
                let second_part = second_part + &end;
                let both = futures::join!(first.batch_execute(&end), second.batch_execute(&second_part));
                [both.0.into(), both.1.into()]
            }
        }
    }

    /// Undoes what was prepared, if the rest could not be.
    async fn undo(&self, parts: &[Part], name: &str) -> anyhow::Result<()> {
        for (connection, part) in self.connections.iter().zip(parts) {
            let undone = match part {
                Part::Prepared => connection.batch_execute(&format!("ROLLBACK PREPARED '{name}'")).await,
                Part::Failed(_) => connection.batch_execute("ROLLBACK").await,
                Part::NotBegun => Ok(()),
            };
            undone.context("undo a part")?;
        }
        Ok(())
    }

    async fn decide_and_commit(&self, trade: &Trade, name: &str) -> anyhow::Result<()> {
        let decides = &self.connections[(trade.id % SHARDS) as usize];
        let decision = format!("EXECUTE decide({})", trade.id);
        decides.batch_execute(&decision).await.context("record the decision")?;
        let commit = format!("COMMIT PREPARED '{name}'");
        let [first, second] = &self.connections;
        let both = futures::try_join!(first.batch_execute(&commit), second.batch_execute(&commit));
        both.context("commit a prepared part")?;
        Ok(())
    }
}

impl Client for TwoPhase {
    async fn settle(&mut self, trade: &Trade, give_up: Instant) -> anyhow::Result<Answer> {
        for failed_tries in 0..TRIES_MAX {
            let name = format!("{}-{failed_tries}", trade.id);
            let parts = self.prepare(trade, &name).await;
            if parts.iter().all(|part| matches!(part, Part::Prepared)) {
                self.decide_and_commit(trade, &name).await?;
                return Ok(Answer::Settled { failed_tries });
            }
            for part in &parts {
                if let Part::Failed(error) = part
                    && !is_about_locks(error)
                {
                    anyhow::bail!("prepare a part: {}", text(error));
                }
            }
            self.undo(&parts, &name).await?;
            if Instant::now() > give_up {
                return Ok(Answer::GivenUp { failed_tries: failed_tries + 1 });
            }
        }
        anyhow::bail!("{TRIES_MAX} tries had no effect")
    }
}

/// The statements of one instance's part, without its end.
fn part(trade: &Trade, shard: usize) -> String {
    let mut sql = String::from("BEGIN;");
    for leg in trade.legs().iter().filter(|leg| shard_of(leg.user) == shard) {
        // Writing to a string can't fail.
        let _ = write!(sql, "EXECUTE leg({},{},{});", leg.user, leg.asset as u8, leg.delta);
    }
    if shard_of(trade.buyer) == shard {
        let _ = write!(sql, "EXECUTE record({},'{}');", trade.id, trade.record());
    }
    sql
}

fn is_about_locks(error: &Error) -> bool {
    let codes = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
    error.code().is_some_and(|code| codes.contains(code))
}

fn text(error: &Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trade::Trades;

    #[test]
    fn the_two_parts_hold_all_of_a_trade_once() {
        let mut trades = Trades::new(3, 10, Load::Uniform);
        for id in 0..100 {
            let trade = trades.next(id);
            let parts = [part(&trade, 0), part(&trade, 1)];
            for sql in &parts {
                assert!(sql.starts_with("BEGIN;") && sql.matches("EXECUTE leg(").count() == 2, "{sql}");
            }
            let both = parts.concat();
            assert_eq!(both.matches("EXECUTE record(").count(), 1, "{both}");
            for leg in trade.legs() {
                let text = format!("leg({},{},{})", leg.user, leg.asset as u8, leg.delta);
                assert_eq!(both.matches(&text).count(), 1, "{both}");
            }
        }
    }

    #[test]
    fn the_record_needs_no_quoting() {
        let trade = Trades::new(3, 10, Load::Hot).next(u64::MAX / 2);
        assert!(!trade.record().contains(['\'', '\\']), "{}", trade.record());
    }
}
