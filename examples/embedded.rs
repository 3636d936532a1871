//! A trading service with Verdict inside it: a durable three-node cluster in this process, no socket to the outside.
//!
//! ```text
//! scripts/rocksdb.sh cargo run --locked --release -p verdict --example embedded
//! ```
//!
//! Run it twice: the folder `embedded-data` keeps what was settled, and the same trade is not settled again.

use std::path::Path;

use anyhow::{Result, ensure};
use verdict_client::{BatchBuilder, Client, Outcome, row};
use verdict_node::embedded::Cluster;

const SHARDS: u32 = 4;
/// How far the account of the outside world may be overdrawn.
const OVERDRAFT: i128 = -1_000_000_000;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "embedded-data".to_owned());
    let cluster = Cluster::start(Path::new(&folder), SHARDS).await?;
    let service = Exchange { client: cluster.client()? };

    service.deposit("alice", "USDT", 2_000).await?;
    service.deposit("bob", "BTC", 5).await?;
    let first = service.trade(1, "alice", "bob", 2, 800).await?;
    println!("alice buys 2 BTC of bob for 800 USDT: {first:?}");
    let short = service.trade(2, "alice", "bob", 3, 1_200_000).await?;
    println!("alice buys 3 BTC of bob for 1,200,000 USDT: {short:?}");
    ensure!(matches!(short, Outcome::Aborted { .. }), "alice can't pay that");
    println!("alice has {}", service.balances("alice").await?);
    println!("bob has {}", service.balances("bob").await?);

    cluster.stop().await;
    Ok(())
}

/// The service.
struct Exchange {
    client: Client,
}

impl Exchange {
    /// Money comes from outside, which is the one account that may be overdrawn; so all accounts always add up to 0.
    async fn deposit(&self, user: &str, asset: &str, amount: i128) -> Result<()> {
        let batch = BatchBuilder::new()
            .add_within("outside", asset, -amount, Some(OVERDRAFT), None)
            .add(format!("user:{user}"), asset, amount)
            .insert(format!("deposit:{user}:{asset}"), "deposit", amount.to_string())
            .zero_sum()
            .build();
        // Where the deposit's record exists it has been booked before, by an earlier run.
        self.client.submit(&batch).await?;
        Ok(())
    }

    /// Both sides change hands together with the trade's record, or nothing does.
    async fn trade(
        &self,
        number: u64,
        buyer: &str,
        seller: &str,
        quantity: i128,
        price: i128,
    ) -> Result<Outcome> {
        let (buyer, seller) = (format!("user:{buyer}"), format!("user:{seller}"));
        let batch = BatchBuilder::new()
            .add(&buyer, "USDT", -price)
            .add(&seller, "USDT", price)
            .add(&seller, "BTC", -quantity)
            .add(&buyer, "BTC", quantity)
            .insert(format!("trade:{number}"), "trade", format!("{buyer} {seller} {quantity} {price}"))
            .zero_sum()
            .build();
        Ok(self.client.submit(&batch).await?)
    }

    /// Both balances at one position.
    async fn balances(&self, user: &str) -> Result<String> {
        let partition = format!("user:{user}");
        let rows = vec![row(&partition, "BTC"), row(&partition, "USDT")];
        let read = self.client.read(rows).await?;
        let values: Vec<String> = read
            .values
            .iter()
            .map(|value| {
                let name = value.row.as_ref().map_or("", |row| row.name.as_str());
                match value.value.as_ref().and_then(|value| value.kind.as_ref()) {
                    Some(verdict_client::value::Kind::Balance(balance)) => format!("{balance} {name}"),
                    _ => format!("no {name}"),
                }
            })
            .collect();
        Ok(format!("{} at position {}", values.join(" and "), read.position))
    }
}
