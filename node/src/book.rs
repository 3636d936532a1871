//! The book of a tape: who trades, what each trade moves, and what everybody needs beforehand.
//!
//! - Buyer and seller of a trade are derived from its id by a fixed hash over the number of users; they differ.
//! - A trade moves `quantity` of the base asset to the buyer and `quote` to the seller. The buyer pays the fee on top: `quote`
//!   times the rate, rounded down to the smallest unit. It goes to the one account of the exchange, so that account is hot.
//! - The trade's record is an `Insert`: settling a trade twice is impossible.
//! - Funding: each user gets exactly the sum of all that the tape takes from it, so no trade is short in any order. It is paid
//!   from the treasury, whose balances may be negative: the total of each asset over all accounts stays 0. The record of the
//!   funding is an `Insert` too, under the fingerprint of the book, so funding is paid once.
//!
//! Worked example: users 2, fee 10 basis points, one trade of 2 BTC for 100 USDT. The buyer needs 100.1 USDT, the seller
//! 2 BTC. After the trade the buyer has 2 BTC, the seller 100 USDT, the exchange 0.1 USDT, the treasury -100.1 USDT and -2 BTC.

use std::collections::BTreeMap;

use serde_json::json;
use verdict_client::{Batch, BatchBuilder, Row, row};

use crate::tape::{Symbol, Tape, Trade, amount_text, mix};

/// The account that gets the fees.
pub const FEE_ACCOUNT: &str = "exchange:fees";
/// The account that funds the users.
pub const TREASURY: &str = "treasury:main";
/// The treasury may go down to this: far beyond all money, and far from the end of the number range.
pub const TREASURY_FLOOR: i128 = -10_i128.pow(37);
/// Basis points in a whole.
const BASIS_POINTS: i128 = 10_000;
/// The largest fee: all of it.
pub const FEE_BPS_MAX: u32 = 10_000;
/// The fewest users, so that buyer and seller differ.
pub const USERS_MIN: u64 = 2;

/// A tape and all that is derived from it.
#[derive(Clone, Debug)]
pub struct Book {
    tape: Tape,
    users: u64,
    fee_bps: u32,
    needs: BTreeMap<u64, Need>,
    fingerprint: String,
}

/// What one user must have before the first trade, so that none is short in any order. Smallest units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Of the base asset.
    pub base: i128,
    /// Of the quote asset.
    pub quote: i128,
}

impl Book {
    /// The book of a tape, or why there is none.
    pub fn new(tape: Tape, users: u64, fee_bps: u32) -> Result<Book, String> {
        if users < USERS_MIN {
            return Err(format!("{users} users are too few: buyer and seller must differ"));
        }
        if fee_bps > FEE_BPS_MAX {
            return Err(format!("a fee of {fee_bps} basis points is more than all"));
        }
        let mut book = Book { tape, users, fee_bps, needs: BTreeMap::new(), fingerprint: String::new() };
        book.needs = book.sum_needs()?;
        book.fingerprint = book.hash();
        Ok(book)
    }

    /// The tape.
    pub fn tape(&self) -> &Tape {
        &self.tape
    }

    /// The trades.
    pub fn trades(&self) -> &[Trade] {
        &self.tape.trades
    }

    /// Names the tape, the users and the fee: equal books have equal fingerprints.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What each user needs.
    pub fn needs(&self) -> &BTreeMap<u64, Need> {
        &self.needs
    }

    /// Buyer and seller of a trade, as numbers from 1.
    pub fn parties(&self, trade: &Trade) -> (u64, u64) {
        let hash = mix(trade.id);
        let buyer = hash % self.users;
        let seller = (buyer + 1 + mix(hash) % (self.users - 1)) % self.users;
        (buyer + 1, seller + 1)
    }

    /// The fee of a trade, in smallest units of the quote asset.
    pub fn fee(&self, trade: &Trade) -> i128 {
        // In two steps, so that no product overflows: equal to quote * bps / 10,000, rounded down.
        let (bps, whole, rest) =
            (i128::from(self.fee_bps), trade.quote / BASIS_POINTS, trade.quote % BASIS_POINTS);
        whole * bps + rest * bps / BASIS_POINTS
    }

    /// The batch that settles a trade.
    pub fn batch(&self, trade: &Trade, id: &str) -> Batch {
        let Symbol { base, quote } = &self.tape.symbol;
        let (buyer, seller) = self.parties(trade);
        let (buyer, seller, fee) = (user(buyer), user(seller), self.fee(trade));
        let record = json!({
            "price": amount_text(trade.price),
            "quantity": amount_text(trade.quantity),
            "quote": amount_text(trade.quote),
            "fee": amount_text(fee),
            "time_us": trade.time_us,
            "buyer": buyer,
            "seller": seller,
            "maker": if trade.buyer_is_maker { "buyer" } else { "seller" },
        });
        BatchBuilder::with_id(id)
            .zero_sum()
            .insert(self.trade_partition(trade), "trade", record.to_string())
            .add(buyer.clone(), quote, -(trade.quote + fee))
            .add(seller.clone(), base, -trade.quantity)
            .add(seller, quote, trade.quote)
            .add(buyer, base, trade.quantity)
            .add(FEE_ACCOUNT, quote, fee)
            .build()
    }

    /// The row of a trade's record.
    pub fn trade_row(&self, trade: &Trade) -> Row {
        row(self.trade_partition(trade), "trade")
    }

    /// The batch that funds a user.
    pub fn funding(&self, number: u64, need: Need, id: &str) -> Batch {
        let Symbol { base, quote } = &self.tape.symbol;
        let record = json!({ "base": amount_text(need.base), "quote": amount_text(need.quote) });
        let marker = format!("funding:{}:{number}", self.fingerprint);
        let mut batch = BatchBuilder::with_id(id).zero_sum().insert(marker, "funding", record.to_string());
        for (asset, amount) in [(base, need.base), (quote, need.quote)] {
            if amount > 0 {
                batch = batch.add_within(TREASURY, asset, -amount, Some(TREASURY_FLOOR), None).add(
                    user(number),
                    asset,
                    amount,
                );
            }
        }
        batch.build()
    }

    /// All balances that the book touches: of the users, the exchange and the treasury.
    pub fn accounts(&self) -> Vec<Row> {
        let Symbol { base, quote } = &self.tape.symbol;
        let users = self.needs.keys().map(|number| user(*number));
        let partitions = users.chain([FEE_ACCOUNT.to_owned(), TREASURY.to_owned()]);
        partitions.flat_map(|partition| [row(partition.clone(), base), row(partition, quote)]).collect()
    }

    fn trade_partition(&self, trade: &Trade) -> String {
        format!("trade:{}:{}", self.tape.symbol, trade.id)
    }

    fn sum_needs(&self) -> Result<BTreeMap<u64, Need>, String> {
        let mut needs: BTreeMap<u64, Need> = BTreeMap::new();
        // Even the sum over a million users then stays above the treasury's floor.
        let need_max = -TREASURY_FLOOR / 1_000_000;
        let add = |sum: &mut i128, amount: i128| -> Result<(), String> {
            let grown = sum.checked_add(amount).filter(|grown| *grown < need_max);
            *sum = grown.ok_or("the tape moves more money than fits a balance")?;
            Ok(())
        };
        for trade in &self.tape.trades {
            let (buyer, seller) = self.parties(trade);
            let paid = trade.quote.checked_add(self.fee(trade)).ok_or("an amount is too large")?;
            add(&mut needs.entry(buyer).or_default().quote, paid)?;
            add(&mut needs.entry(seller).or_default().base, trade.quantity)?;
        }
        Ok(needs)
    }

    fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{} {} {}", self.tape.symbol, self.users, self.fee_bps).as_bytes());
        for trade in &self.tape.trades {
            hasher.update(&trade.id.to_le_bytes());
            for amount in [trade.price, trade.quantity, trade.quote] {
                hasher.update(&amount.to_le_bytes());
            }
        }
        hasher.finalize().to_hex()[..16].to_owned()
    }
}

/// The partition of a user.
pub fn user(number: u64) -> String {
    format!("user:{number}")
}

#[cfg(test)]
mod tests {
    use verdict_client::Batch;
    use verdict_proto::v1::{Add, operation::Kind};

    use super::*;

    fn book(seed: u64, count: usize, users: u64, fee_bps: u32) -> Book {
        Book::new(Tape::generate(seed, count), users, fee_bps).unwrap()
    }

    fn adds(batch: &Batch) -> impl Iterator<Item = (String, String, i128, Option<i128>)> {
        batch.operations.iter().filter_map(|operation| {
            let row = operation.row.clone().unwrap();
            let Some(Kind::Add(Add { delta, floor, .. })) = &operation.kind else { return None };
            let floor = floor.as_ref().map(|floor| floor.parse().unwrap());
            Some((row.partition, row.name, delta.parse().unwrap(), floor))
        })
    }

    type Balances = BTreeMap<(String, String), i128>;

    fn apply(balances: &mut Balances, batch: &Batch) {
        let mut sums: BTreeMap<String, i128> = BTreeMap::new();
        for (partition, name, delta, floor) in adds(batch) {
            *sums.entry(name.clone()).or_default() += delta;
            let balance = balances.entry((partition, name)).or_default();
            *balance += delta;
            let floor = floor.or((delta < 0).then_some(0));
            assert!(floor.is_none_or(|floor| *balance >= floor), "{batch:?} is short");
        }
        assert!(sums.values().all(|sum| *sum == 0), "{batch:?} makes or destroys money");
    }

    #[test]
    fn the_funding_suffices_in_any_order_and_nothing_is_made_or_lost() {
        for seed in 0..20 {
            let book = book(seed, 400, 2 + seed * seed, (seed * 7) as u32);
            let mut balances = Balances::new();
            for (number, need) in book.needs() {
                apply(&mut balances, &book.funding(*number, *need, "f"));
            }
            // The worst order: all outgoing legs first, none of the incoming ones.
            let mut worst = balances.clone();
            let batches: Vec<Batch> = book.trades().iter().map(|trade| book.batch(trade, "t")).collect();
            for (partition, name, delta, _) in batches.iter().flat_map(adds).filter(|add| add.2 < 0) {
                let balance = worst.get_mut(&(partition, name)).expect("whoever pays is funded");
                *balance += delta;
                assert!(*balance >= 0, "short in the worst order, seed {seed}");
            }
            let users = worst.iter().filter(|((partition, _), _)| partition.starts_with("user:"));
            assert!(users.clone().all(|(_, balance)| *balance == 0), "funded with more than is needed");
            for batch in batches.iter().rev() {
                apply(&mut balances, batch);
            }
            let accounts = book.accounts();
            for (partition, name) in balances.keys() {
                assert!(accounts.contains(&row(partition, name)), "{partition} is missing in the accounts");
            }
        }
    }

    #[test]
    fn fees_are_rounded_down_and_exact_for_large_amounts() {
        let mut tape = Tape::generate(1, 1);
        tape.trades[0].quote = 9_999;
        let book = Book::new(tape, 2, 10).unwrap();
        assert_eq!(book.fee(&book.trades()[0]), 9);
        let small = Trade { quote: 999, ..book.trades()[0].clone() };
        assert_eq!(book.fee(&small), 0);
        let large = Trade { quote: i128::MAX, ..book.trades()[0].clone() };
        assert_eq!(book.fee(&large), i128::MAX / 1000);
    }

    #[test]
    fn buyer_and_seller_differ_and_stay_the_same() {
        let book = book(3, 2000, 7, 10);
        for trade in book.trades() {
            let (buyer, seller) = book.parties(trade);
            assert!(buyer != seller && (1..=7).contains(&buyer) && (1..=7).contains(&seller));
        }
        let trade = Trade { id: 553287559, ..book.trades()[0].clone() };
        // A change here would let trades that are settled look different: the hash is fixed.
        assert_eq!(book.parties(&trade), (4, 5));
    }

    #[test]
    fn the_fingerprint_tells_books_apart() {
        let one = book(3, 100, 7, 10);
        assert_eq!(one.fingerprint(), book(3, 100, 7, 10).fingerprint());
        for other in [book(4, 100, 7, 10), book(3, 99, 7, 10), book(3, 100, 8, 10), book(3, 100, 7, 11)] {
            assert_ne!(one.fingerprint(), other.fingerprint());
        }
    }

    #[test]
    fn money_beyond_all_bounds_is_refused() {
        for amount in [i128::MAX, -TREASURY_FLOOR] {
            let mut tape = Tape::generate(1, 1);
            tape.trades[0].quote = amount;
            assert!(Book::new(tape, 2, 10).is_err());
        }
    }
}
