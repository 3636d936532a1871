//! What the demo and the drills settle: the trades of a tape, and now and then an overdraft that must be refused.

use verdict_client::{Batch, BatchBuilder, Row, row};

use crate::book::{Book, FEE_ACCOUNT, user};

/// One overdraft comes after so many trades.
const TRADES_PER_OVERDRAFT: usize = 100;
/// What an overdraft asks for, in smallest units: more than a tape can move, and so little that the sum of all that are in
/// flight is far from the end of the number range.
const OVERDRAFT: i128 = 10_i128.pow(33);

/// One item of the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// The trade with this number.
    Trade(usize),
    /// The overdraft with this number.
    Overdraft(usize),
}

/// The items: numbered from 0.
#[derive(Clone, Debug)]
pub struct Script<'a> {
    book: &'a Book,
    users: Vec<u64>,
}

impl<'a> Script<'a> {
    /// The script of a book.
    pub fn new(book: &'a Book) -> Script<'a> {
        Script { book, users: book.needs().keys().copied().collect() }
    }

    /// How many overdrafts there are: one in a hundred, at least one.
    pub fn overdrafts(&self) -> usize {
        (self.book.trades().len() / TRADES_PER_OVERDRAFT).max(1)
    }

    /// How many items there are.
    pub fn count(&self) -> usize {
        self.book.trades().len() + self.overdrafts()
    }

    /// An item by its number.
    pub fn item(&self, number: usize) -> Item {
        let round = TRADES_PER_OVERDRAFT + 1;
        if number % round == TRADES_PER_OVERDRAFT {
            return Item::Overdraft(number / round);
        }
        let trade = number - number / round;
        // A tape of less than a hundred trades ends with its overdraft.
        if trade == self.book.trades().len() { Item::Overdraft(0) } else { Item::Trade(trade) }
    }

    /// The batch of an item.
    pub fn batch(&self, number: usize, id: &str) -> Batch {
        match self.item(number) {
            Item::Trade(trade) => self.book.batch(&self.book.trades()[trade], id),
            Item::Overdraft(overdraft) => self.overdraft(overdraft, id),
        }
    }

    /// The rows that would exist if an overdraft had left a trace.
    pub fn overdraft_rows(&self) -> Vec<Row> {
        (0..self.overdrafts()).map(|overdraft| self.overdraft_row(overdraft)).collect()
    }

    /// A user pays far more than it has: a record, another user and the hot account would gain, on other shards.
    fn overdraft(&self, overdraft: usize, id: &str) -> Batch {
        let payer = user(self.users[overdraft % self.users.len()]);
        let payee = user(self.users[(overdraft + 1) % self.users.len()]);
        let asset = &self.book.tape().symbol.quote;
        let marker = self.overdraft_row(overdraft);
        BatchBuilder::with_id(id)
            .zero_sum()
            .insert(marker.partition, marker.name, "this must never be seen")
            .add(payer, asset, -OVERDRAFT)
            .add(payee, asset, OVERDRAFT - 1)
            .add(FEE_ACCOUNT, asset, 1)
            .build()
    }

    fn overdraft_row(&self, overdraft: usize) -> Row {
        row(format!("overdraft:{}:{overdraft}", self.book.fingerprint()), "marker")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Tape;

    #[test]
    fn every_trade_comes_once_and_every_hundredth_is_followed_by_an_overdraft() {
        for count in [1, 2, 99, 100, 101, 199, 200, 201, 1000, 2001] {
            let book = Book::new(Tape::generate(1, count), 5, 10).unwrap();
            let script = Script::new(&book);
            let items: Vec<Item> = (0..script.count()).map(|number| script.item(number)).collect();
            let trades: Vec<usize> = items.iter().filter_map(trade).collect();
            assert_eq!(trades, (0..count).collect::<Vec<_>>());
            let overdrafts: Vec<usize> = items.iter().filter_map(overdraft).collect();
            assert_eq!(overdrafts, (0..script.overdrafts()).collect::<Vec<_>>());
        }
    }

    fn trade(item: &Item) -> Option<usize> {
        match item {
            Item::Trade(number) => Some(*number),
            Item::Overdraft(_) => None,
        }
    }

    fn overdraft(item: &Item) -> Option<usize> {
        match item {
            Item::Trade(_) => None,
            Item::Overdraft(number) => Some(*number),
        }
    }
}
