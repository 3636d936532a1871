//! Whether the cluster's books agree with what it answered: balances of users that are followed, and records of trades.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde::Serialize;
use verdict_client::{Client, Row, row, value::Kind};

use super::{
    tally::Ledger,
    trade::{ASSET, CASH, Trade, user},
};
use crate::totals::{ROWS_PER_READ, Totals};

/// Users that are followed, at most: so many can be read in a moment.
const FOLLOWED_MAX: u64 = 5000;
/// Findings that are told; more are only counted.
const TOLD_MAX: usize = 5;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Balances that were compared with what the committed trades moved.
    pub balances: u64,
    /// Whether these are all, so that nothing can have come from elsewhere or gone there.
    pub is_all: bool,
    /// Balances that nothing can be said of: a trade was not answered.
    pub doubtful: u64,
    /// Records of committed trades that were looked for.
    pub records: u64,
    /// What is wrong, the first few.
    pub wrong: Vec<String>,
    /// How much is wrong.
    pub wrong_count: u64,
}

/// The books as they were before the load.
#[derive(Debug)]
pub struct Books {
    before: BTreeMap<u64, (i128, i128)>,
    is_all: bool,
}

impl Books {
    /// How many users are followed, of so many.
    pub fn followed(users: u64) -> u64 {
        users.min(FOLLOWED_MAX)
    }

    /// Reads them.
    pub async fn open(client: &Client, users: u64) -> anyhow::Result<Books> {
        let followed = Books::followed(users);
        Ok(Books { before: balances(client, followed).await?, is_all: followed == users })
    }

    /// Compares them with what was answered meanwhile.
    pub async fn compare(
        &self,
        client: &Client,
        ledger: &Ledger,
        sample: &[Trade],
    ) -> anyhow::Result<Findings> {
        let after = balances(client, ledger.users()).await?;
        let mut findings = Findings { is_all: self.is_all, ..Findings::default() };
        for (number, before) in &self.before {
            let (now, change) = (after.get(number), ledger.change(*number));
            findings.compare(*number, *before, now.copied().unwrap_or_default(), change);
        }
        for trades in sample.chunks(ROWS_PER_READ) {
            let rows: Vec<Row> = trades.iter().map(Trade::record).collect();
            let read = client.read(rows).await.context("read records")?;
            if read.values.len() != trades.len() {
                bail!("asked for {} records and got {}", trades.len(), read.values.len());
            }
            for (trade, value) in trades.iter().zip(read.values) {
                findings.record(trade, value.value.and_then(|value| value.kind));
            }
        }
        Ok(findings)
    }
}

impl Findings {
    fn compare(&mut self, number: u64, before: (i128, i128), now: (i128, i128), change: Option<(i64, i64)>) {
        let Some((cash, asset)) = change else {
            self.doubtful += 2;
            return;
        };
        self.balances += 2;
        let due = (before.0 + i128::from(cash), before.1 + i128::from(asset));
        for (name, due, now) in [(CASH, due.0, now.0), (ASSET, due.1, now.1)] {
            if due != now {
                self.tell(format!("{}#{name} holds {now}, and must hold {due}", user(number)));
            }
        }
    }

    fn record(&mut self, trade: &Trade, found: Option<Kind>) {
        self.records += 1;
        match found {
            Some(Kind::Record(bytes)) if bytes == trade.record_value() => {}
            other => self.tell(format!("the record {} holds {other:?}", trade.record().partition)),
        }
    }

    fn tell(&mut self, what: String) {
        self.wrong_count += 1;
        if self.wrong.len() < TOLD_MAX {
            self.wrong.push(what);
        }
    }
}

/// The cash and the asset of users 0 to this number.
async fn balances(client: &Client, users: u64) -> anyhow::Result<BTreeMap<u64, (i128, i128)>> {
    let rows = |number: u64| [row(user(number), CASH), row(user(number), ASSET)];
    let rows: Vec<Row> = (0..users).flat_map(rows).collect();
    let totals = Totals::read(client, &rows).await?;
    let pairs = totals.balances.chunks(2).map(|pair| (pair[0].1, pair[1].1));
    Ok((0..users).zip(pairs).collect())
}

#[cfg(test)]
mod tests {
    use verdict_protocol::batch::Placement;

    use super::*;
    use crate::bench::trade::{Maker, Mix, Population};

    #[test]
    fn a_balance_that_is_off_by_one_is_found_and_a_doubtful_one_is_not_judged() {
        let mut findings = Findings::default();
        findings.compare(1, (100, 50), (93, 51), Some((-7, 1)));
        assert_eq!((findings.balances, findings.wrong_count), (2, 0));
        findings.compare(2, (100, 50), (94, 51), Some((-7, 1)));
        assert_eq!(findings.wrong, ["bench-user:2#USD holds 94, and must hold 93"]);
        findings.compare(3, (100, 50), (0, 0), None);
        assert_eq!((findings.balances, findings.doubtful, findings.wrong_count), (4, 2, 1));
    }

    #[test]
    fn a_missing_or_other_record_is_found() {
        let population = Population { users: 50, placement: Placement { shards: 2 } };
        let trade = Maker::new(population, Mix::Uniform, false).make(3);
        let mut findings = Findings::default();
        findings.record(&trade, Some(Kind::Record(trade.record_value().into())));
        assert_eq!((findings.records, findings.wrong_count), (1, 0));
        findings.record(&trade, Some(Kind::Absent(true)));
        findings.record(&trade, Some(Kind::Record("other".into())));
        findings.record(&trade, None);
        assert_eq!((findings.records, findings.wrong_count), (4, 3));
    }
}
