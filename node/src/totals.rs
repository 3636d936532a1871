//! The sum of all balances of each asset.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use verdict_client::{Client, Row, value::Kind};

/// As many rows as one `Read` takes.
pub const ROWS_PER_READ: usize = 1000;

/// Balances and their sums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// The sum for each asset, in smallest units.
    pub assets: BTreeMap<String, i128>,
    /// Each row with its balance, in the order in which they were asked for. A row that doesn't exist counts as 0.
    pub balances: Vec<(Row, i128)>,
    /// The position of each read. More than one: the sums hold only if nothing moved in between.
    pub positions: Vec<u64>,
}

impl Totals {
    /// Reads balances, up to [`ROWS_PER_READ`] at one position. More are read in pieces: to be done only while nothing moves.
    pub async fn read(client: &Client, rows: &[Row]) -> anyhow::Result<Totals> {
        let mut totals = Totals { assets: BTreeMap::new(), balances: Vec::new(), positions: Vec::new() };
        for rows in rows.chunks(ROWS_PER_READ) {
            let read = client.read(rows.to_vec()).await.context("read balances")?;
            if read.values.len() != rows.len() {
                bail!("asked for {} rows and got {}", rows.len(), read.values.len());
            }
            totals.positions.push(read.position);
            for (row, value) in rows.iter().zip(read.values) {
                totals.add(row, value.value.and_then(|value| value.kind))?;
            }
        }
        Ok(totals)
    }

    /// The accounts that are below 0, apart from those of this partition.
    pub fn below_zero_except<'a>(&'a self, partition: &'a str) -> impl Iterator<Item = &'a (Row, i128)> {
        self.balances.iter().filter(move |(row, balance)| *balance < 0 && row.partition != partition)
    }

    fn add(&mut self, row: &Row, value: Option<Kind>) -> anyhow::Result<()> {
        let balance = match value {
            Some(Kind::Balance(text)) => {
                text.parse().with_context(|| format!("{}#{} holds {text:?}", row.partition, row.name))?
            }
            Some(Kind::Absent(_)) => 0,
            Some(Kind::Record(_) | Kind::Version(_)) | None => {
                bail!("{}#{} holds no balance", row.partition, row.name)
            }
        };
        let asset = row.name.split('/').next().unwrap_or_default();
        let sum: &mut i128 = self.assets.entry(asset.to_owned()).or_default();
        *sum = sum.checked_add(balance).with_context(|| format!("the total of {asset} overflows"))?;
        self.balances.push((row.clone(), balance));
        Ok(())
    }
}
