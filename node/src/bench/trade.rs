//! The trades of a bench: who trades with whom, and how an order to settle one is written on the wire.
//!
//! A trade has 5 operations on 3 partitions: the buyer's cash goes down and its asset up, the seller's asset goes down and its
//! cash up, and the trade's record is inserted. Buyer and seller live on different shards, except in one-shard batches. With a
//! fee there is a sixth operation, on the one account of the exchange. To see what larger batches cost there are trades of many
//! parties, who pay or get cash by turns.
//!
//! The load generator shares the machine with what it measures, so an order is a small value without pointers, and is written
//! straight into the connection's buffer: nothing is allocated for it. [`Order::batch`] is the same in the SDK's words; a test
//! holds the two together.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;
use verdict_client::{Batch, BatchBuilder, Row, row};
use verdict_protocol::{batch::Placement, ids::ShardId, wire::message};

use super::zipf::Zipf;
use crate::tape::Random;

/// The asset that is paid with.
pub const CASH: &str = "USD";
/// The asset that is traded.
pub const ASSET: &str = "BTC";
/// The name of a trade's record.
const RECORD: &str = "trade";
/// The account of the exchange.
pub const FEE_ACCOUNT: &str = "bench-fees";
/// The fee of a trade, in smallest units.
const FEE: i64 = 1;
/// Users are looked for so often until their shards fit.
const TRIES_MAX: usize = 10_000;
/// A part of a trade has its place in the last bits of the id.
const PART_BITS: u32 = 2;
/// One past the last sequence that an id has room for.
pub const SEQUENCE_END: u32 = 1 << (32 - PART_BITS);

/// Which users trade.
#[derive(Clone, Debug)]
pub enum Mix {
    /// Any two, each as often as any other.
    Uniform,
    /// User 0 is a party of every trade, by turns as buyer and as seller.
    Hot,
    /// Some much more often than others.
    Skewed(Arc<Zipf>),
    /// Buyer, seller and record on one shard.
    OneShard,
    /// So many users in a row, an even number: the buyer and every other one after it pay, the others get as much.
    Legs(u32),
}

/// How a trade is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One batch.
    Atomic,
    /// One batch for each shard that it touches, independent of each other.
    Independent,
}

/// The users of a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Population {
    /// How many there are: 0 to this number.
    pub users: u64,
    /// Where they live.
    pub placement: Placement,
}

impl Population {
    /// The shard of a user.
    pub fn shard_of(&self, user: u64) -> ShardId {
        self.placement.shard_of(&self::user(user))
    }

    /// Whether every shard has two users at least, so that a partner is found for whoever is chosen.
    pub fn is_rich_enough(&self) -> bool {
        let mut counts = vec![0_u32; self.placement.shards as usize];
        for user in 0..self.users {
            counts[self.shard_of(user).0 as usize - 1] += 1;
            if counts.iter().all(|count| *count >= 2) {
                return true;
            }
        }
        false
    }
}

/// One trade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trade {
    /// Who buys.
    pub buyer: u64,
    /// Who sells.
    pub seller: u64,
    /// How much.
    pub quantity: u32,
    /// For how much each.
    pub price: u32,
    /// Whether the exchange gets its fee.
    pub has_fee: bool,
    /// So many users from the buyer on pay or get cash by turns; 0: only buyer and seller trade.
    legs: u32,
    /// Names the load that it belongs to.
    nonce: u32,
    /// Its number in the load.
    pub sequence: u32,
    /// Chosen so that the record's shard fits.
    salt: u32,
}

/// Makes the trades of a load.
#[derive(Debug)]
pub struct Maker {
    population: Population,
    mix: Mix,
    has_fee: bool,
    nonce: u32,
    random: Random,
}

impl Maker {
    /// One that makes other trades than all others that ever were, from this machine or others.
    pub fn new(population: Population, mix: Mix, has_fee: bool) -> Maker {
        let seed = Uuid::new_v4().as_u64_pair().0;
        // 30 bits of it fit into an id.
        Maker { population, mix, has_fee, nonce: (seed >> 34) as u32, random: Random(seed) }
    }

    /// The trade with this number. Asked for twice, it is another one.
    pub fn make(&mut self, sequence: u32) -> Trade {
        let (buyer, seller) = self.parties(sequence);
        let mut trade = Trade {
            buyer,
            seller,
            quantity: 1 + self.random.below(100) as u32,
            price: 30_000 + self.random.below(1000) as u32,
            has_fee: self.has_fee,
            legs: if let Mix::Legs(count) = self.mix { count } else { 0 },
            nonce: self.nonce,
            sequence,
            salt: 0,
        };
        if matches!(self.mix, Mix::OneShard) {
            let shard = self.population.shard_of(buyer);
            while trade.record_shard(self.population.placement) != shard {
                trade.salt += 1;
            }
        }
        trade
    }

    fn parties(&mut self, sequence: u32) -> (u64, u64) {
        for _ in 0..TRIES_MAX {
            let (buyer, seller) = match &self.mix {
                Mix::Uniform | Mix::OneShard => (self.any(), self.any()),
                Mix::Skewed(zipf) => (zipf.draw(&mut self.random), zipf.draw(&mut self.random)),
                Mix::Hot if sequence.is_multiple_of(2) => (0, self.any()),
                Mix::Hot => (self.any(), 0),
                Mix::Legs(count) => {
                    let first = self.random.below(self.population.users + 1 - u64::from(*count));
                    (first, first + 1)
                }
            };
            let is_same_shard = self.population.shard_of(buyer) == self.population.shard_of(seller);
            if buyer != seller && is_same_shard == matches!(self.mix, Mix::OneShard) {
                return (buyer, seller);
            }
        }
        unreachable!("a population that is rich enough has partners for everybody")
    }

    fn any(&mut self) -> u64 {
        self.random.below(self.population.users)
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug)]
enum What {
    Add(i64),
    Insert,
}

/// Which partition it is on.
#[derive(Clone, Copy, Debug)]
enum Where {
    User(u64),
    Record,
    Fees,
}

type Operation = (Where, &'static str, What);

impl Trade {
    /// What the buyer pays to the seller.
    pub fn quote(&self) -> i64 {
        i64::from(self.quantity) * i64::from(self.price)
    }

    /// What the buyer pays in all.
    pub fn paid(&self) -> i64 {
        self.quote() + if self.has_fee { FEE } else { 0 }
    }

    /// By how much it changes the cash and the asset of its users.
    pub fn changes(&self) -> impl Iterator<Item = (u64, i64, i64)> + use<> {
        let (quantity, quote) = (i64::from(self.quantity), self.quote());
        let has_legs = self.legs > 0;
        let pair = [(self.buyer, -self.paid(), quantity), (self.seller, quote, -quantity)];
        let others =
            (self.buyer..self.buyer + u64::from(self.legs)).skip(2).zip([-quote, quote].into_iter().cycle());
        let pair = pair.map(|(user, cash, asset)| (user, cash, if has_legs { 0 } else { asset }));
        pair.into_iter().chain(others.map(|(user, cash)| (user, cash, 0)))
    }

    /// The row of its record.
    pub fn record(&self) -> Row {
        row(self.partition(Where::Record), RECORD)
    }

    /// What its record holds.
    pub fn record_value(&self) -> Vec<u8> {
        text(|out| write_value(out, self)).into_bytes()
    }

    /// The orders that settle it.
    pub fn orders(&self, form: Form, placement: Placement) -> Orders {
        let shards = match form {
            Form::Atomic => [None; 4],
            Form::Independent => {
                let mut shards = [None; 4];
                for (place, shard) in self.shards(placement).into_iter().enumerate() {
                    shards[place] = Some(shard);
                }
                shards
            }
        };
        let count = shards.iter().flatten().count().max(1);
        Orders { trade: *self, placement, shards, count, next: 0 }
    }

    /// The one of its orders that was sent under this id, to be sent again.
    pub fn order(&self, id: Uuid, form: Form, placement: Placement) -> Option<Order> {
        let order = self.orders(form, placement).nth(part_of(id))?;
        Some(Order { id, ..order })
    }

    /// The shards that it touches, in order.
    pub fn shards(&self, placement: Placement) -> Vec<ShardId> {
        let mut shards: Vec<ShardId> =
            self.operations().map(|(place, ..)| self.shard(place, placement)).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    fn record_shard(&self, placement: Placement) -> ShardId {
        self.shard(Where::Record, placement)
    }

    fn shard(&self, place: Where, placement: Placement) -> ShardId {
        placement.shard_of(&self.partition(place))
    }

    fn partition(&self, place: Where) -> String {
        text(|out| write_partition(out, self, place))
    }

    fn operations(&self) -> impl Iterator<Item = Operation> + use<> {
        let changes = self.changes().flat_map(|(user, cash, asset)| {
            let change = |name, delta| (Where::User(user), name, What::Add(delta));
            [change(CASH, cash), change(ASSET, asset)].into_iter().take(if asset == 0 { 1 } else { 2 })
        });
        let record = (Where::Record, RECORD, What::Insert);
        let fee = self.has_fee.then_some((Where::Fees, CASH, What::Add(FEE)));
        changes.chain([record]).chain(fee)
    }
}

/// The orders of one trade.
#[derive(Clone, Copy, Debug)]
pub struct Orders {
    trade: Trade,
    placement: Placement,
    shards: [Option<ShardId>; 4],
    count: usize,
    next: usize,
}

impl Orders {
    /// How many there are in all.
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Iterator for Orders {
    type Item = Order;

    fn next(&mut self) -> Option<Order> {
        if self.next == self.count {
            return None;
        }
        let only = self.shards[self.next].map(|shard| (shard, self.placement));
        let part = self.next as u32;
        self.next += 1;
        Some(Order { id: id(self.trade.nonce, self.trade.sequence, part), trade: self.trade, only })
    }
}

/// One batch to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Its id.
    pub id: Uuid,
    /// The trade that it settles, or a part of it.
    pub trade: Trade,
    /// Only the operations of this shard.
    only: Option<(ShardId, Placement)>,
}

/// A UUIDv7 of now, with the load and the number in the place of its random bits.
fn id(nonce: u32, sequence: u32, part: u32) -> Uuid {
    debug_assert!(sequence < SEQUENCE_END && nonce < 1 << 30 && part < 1 << PART_BITS);
    // A clock before 1970 is refused by the cluster, not here.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let high = (now << 16) | 0x7000 | u64::from(nonce & 0xfff);
    let low = (0b10 << 62) | (u64::from(nonce) << 32) | u64::from(sequence << PART_BITS | part);
    Uuid::from_u64_pair(high, low)
}

/// The number of the trade that an id was made for.
pub fn sequence_of(id: Uuid) -> u32 {
    id.as_u64_pair().1 as u32 >> PART_BITS
}

/// Which part of the trade it was made for.
fn part_of(id: Uuid) -> usize {
    (id.as_u64_pair().1 & ((1 << PART_BITS) - 1)) as usize
}

impl Order {
    /// The batch, in the SDK's words.
    pub fn batch(&self) -> Batch {
        let mut batch = BatchBuilder::with_id(self.id.to_string());
        if self.is_whole() {
            batch = batch.zero_sum();
        }
        self.for_each(|place, name, what| {
            let (builder, partition) = (std::mem::take(&mut batch), self.trade.partition(place));
            batch = match what {
                What::Add(delta) => builder.add(partition, name, i128::from(delta)),
                What::Insert => builder.insert(partition, name, self.trade.record_value()),
            };
        });
        batch.build()
    }

    /// Whether all operations of the trade are in it.
    fn is_whole(&self) -> bool {
        self.only.is_none()
    }

    fn for_each(&self, mut take: impl FnMut(Where, &'static str, What)) {
        for (place, name, what) in self.trade.operations() {
            let is_here =
                self.only.is_none_or(|(shard, placement)| self.trade.shard(place, placement) == shard);
            if is_here {
                take(place, name, what);
            }
        }
    }

    /// Writes a `SubmitRequest` with its batch. One of a `SubmitStreamRequest` looks the same on the wire.
    pub fn write(&self, out: &mut Vec<u8>) {
        message(out, 1, |out| {
            message(out, 1, |out| {
                let mut text = [0; 36];
                out.extend_from_slice(self.id.hyphenated().encode_lower(&mut text).as_bytes());
            });
            self.for_each(|place, name, what| {
                message(out, 3, |out| {
                    message(out, 1, |out| {
                        message(out, 1, |out| write_partition(out, &self.trade, place));
                        message(out, 2, |out| out.extend_from_slice(name.as_bytes()));
                    });
                    match what {
                        What::Add(delta) => {
                            message(out, 2, |out| message(out, 1, |out| write_amount(out, delta)));
                        }
                        What::Insert => {
                            message(out, 4, |out| message(out, 1, |out| write_value(out, &self.trade)));
                        }
                    }
                });
            });
            if self.is_whole() {
                out.extend_from_slice(&[4 << 3, 1]);
            }
        });
    }
}

fn write_partition(out: &mut Vec<u8>, trade: &Trade, place: Where) {
    match place {
        Where::User(user) => write_user(out, user),
        Where::Fees => out.extend_from_slice(FEE_ACCOUNT.as_bytes()),
        Where::Record => {
            out.extend_from_slice(b"bench-trade:");
            write_number(out, u64::from(trade.nonce));
            out.push(b'-');
            write_number(out, u64::from(trade.sequence));
            if trade.salt > 0 {
                out.push(b'-');
                write_number(out, u64::from(trade.salt));
            }
        }
    }
}

fn write_user(out: &mut Vec<u8>, user: u64) {
    out.extend_from_slice(b"bench-user:");
    write_number(out, user);
}

fn write_value(out: &mut Vec<u8>, trade: &Trade) {
    out.extend_from_slice(b"price ");
    write_number(out, u64::from(trade.price));
    out.extend_from_slice(b" quantity ");
    write_number(out, u64::from(trade.quantity));
    out.extend_from_slice(b" buyer ");
    write_number(out, trade.buyer);
    out.extend_from_slice(b" seller ");
    write_number(out, trade.seller);
}

fn write_amount(out: &mut Vec<u8>, amount: i64) {
    if amount < 0 {
        out.push(b'-');
    }
    write_number(out, amount.unsigned_abs());
}

fn write_number(out: &mut Vec<u8>, number: u64) {
    let (mut digits, mut first, mut rest) = ([0; 20], 20, number);
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[first..]);
}

/// The partition of a user.
pub fn user(number: u64) -> String {
    text(|out| write_user(out, number))
}

fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = Vec::with_capacity(64);
    write(&mut out);
    String::from_utf8(out).expect("it is made of ASCII")
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use verdict_proto::v1::{Add, SubmitRequest, SubmitStreamRequest, operation::Kind};
    use verdict_protocol::batch::{self as protocol, BatchLimits};

    use super::*;

    fn population(users: u64, shards: u32) -> Population {
        Population { users, placement: Placement { shards } }
    }

    fn all_kinds() -> Vec<(Mix, Form, bool)> {
        let skewed = Mix::Skewed(Arc::new(Zipf::new(200)));
        let mixes = [Mix::Uniform, Mix::Hot, skewed, Mix::OneShard, Mix::Legs(2), Mix::Legs(64)];
        let kinds = mixes.into_iter().flat_map(|mix| {
            [Form::Atomic, Form::Independent].map(|form| [false, true].map(|fee| (mix.clone(), form, fee)))
        });
        kinds.flatten().collect()
    }

    #[test]
    fn what_is_written_is_what_the_sdk_would_send_and_what_the_cluster_takes() {
        for (mix, form, fee) in all_kinds() {
            let people = population(200, 4);
            let mut maker = Maker::new(people, mix, fee);
            for sequence in [0, 1, 77, 1_000_000, SEQUENCE_END - 1] {
                for order in maker.make(sequence).orders(form, people.placement) {
                    let mut bytes = Vec::new();
                    order.write(&mut bytes);
                    let request = SubmitRequest::of(&order.batch());
                    assert_eq!(SubmitRequest::decode(&*bytes).unwrap(), request);
                    let same = SubmitStreamRequest::of([&order.batch()]);
                    assert_eq!(bytes, same.encode_to_vec(), "not the shortest form");
                    let batch = protocol::Batch::from_wire(&request.batch, 1000).unwrap();
                    batch.check(&BatchLimits::default(), people.placement).unwrap();
                    assert_eq!(sequence_of(order.id), sequence);
                    let again = order.trade.order(order.id, form, people.placement).unwrap();
                    assert_eq!(again.batch(), order.batch());
                }
            }
        }
    }

    #[test]
    fn parties_and_shards_are_what_the_mix_says() {
        for shards in [2, 3, 16] {
            for (mix, _, fee) in all_kinds() {
                let people = population(200, shards);
                assert!(people.is_rich_enough());
                let mut maker = Maker::new(people, mix.clone(), fee);
                for sequence in 0..500 {
                    let trade = maker.make(sequence);
                    assert!(trade.buyer != trade.seller && trade.buyer.max(trade.seller) < 200);
                    let of = |user| people.shard_of(user);
                    match mix {
                        Mix::OneShard => {
                            let mut touched = trade.shards(people.placement);
                            touched.retain(|shard| !fee || *shard != people.placement.shard_of(FEE_ACCOUNT));
                            assert!(touched.iter().all(|shard| *shard == of(trade.buyer)), "{touched:?}");
                            assert_eq!(of(trade.buyer), of(trade.seller));
                        }
                        Mix::Hot => assert!([trade.buyer, trade.seller].contains(&0)),
                        Mix::Uniform | Mix::Skewed(_) | Mix::Legs(_) => {}
                    }
                    if !matches!(mix, Mix::OneShard) {
                        assert_ne!(of(trade.buyer), of(trade.seller), "a trade touches two shards at least");
                    }
                }
            }
        }
    }

    #[test]
    fn independent_orders_have_all_operations_of_the_trade_and_one_shard_each() {
        let people = population(200, 8);
        let mut maker = Maker::new(people, Mix::Uniform, true);
        for sequence in 0..500 {
            let trade = maker.make(sequence);
            let whole = trade.orders(Form::Atomic, people.placement).next().unwrap().batch();
            let orders = trade.orders(Form::Independent, people.placement);
            assert_eq!(orders.count(), trade.shards(people.placement).len());
            let (mut operations, mut ids) = (Vec::new(), Vec::new());
            for batch in orders.map(|order| order.batch()) {
                let shard = |operation: &verdict_proto::v1::Operation| {
                    people.placement.shard_of(&operation.row.as_ref().unwrap().partition)
                };
                let first = shard(&batch.operations[0]);
                assert!(batch.operations.iter().all(|operation| shard(operation) == first));
                assert!(!batch.zero_sum, "a part of a trade moves money in or out of its shard");
                ids.push(batch.id);
                operations.extend(batch.operations);
            }
            let by_row = |operation: &verdict_proto::v1::Operation| {
                let row = operation.row.clone().unwrap();
                (row.partition, row.name)
            };
            operations.sort_by_key(by_row);
            let mut all = whole.operations.clone();
            all.sort_by_key(by_row);
            assert_eq!(operations, all);
            ids.dedup();
            assert_eq!(ids.len(), trade.shards(people.placement).len());
        }
    }

    #[test]
    fn no_trade_makes_or_destroys_money() {
        let people = population(200, 4);
        for (mix, _, fee) in all_kinds() {
            let mut maker = Maker::new(people, mix, fee);
            let batch = maker.make(5).orders(Form::Atomic, people.placement).next().unwrap().batch();
            for asset in [CASH, ASSET] {
                let deltas = batch.operations.iter().filter_map(|operation| match &operation.kind {
                    Some(Kind::Add(Add { delta, .. })) => {
                        let row = operation.row.as_ref().unwrap();
                        (row.name == asset).then(|| delta.parse::<i64>().unwrap())
                    }
                    _ => None,
                });
                assert_eq!(deltas.sum::<i64>(), 0);
            }
        }
    }

    #[test]
    fn legs_are_so_many_balances_of_different_users_and_what_is_followed_is_what_is_sent() {
        let people = population(100, 2);
        for (count, fee) in [(2, false), (8, true), (64, false)] {
            let mut maker = Maker::new(people, Mix::Legs(count), fee);
            for sequence in 0..100 {
                let trade = maker.make(sequence);
                let batch = trade.orders(Form::Atomic, people.placement).next().unwrap().batch();
                assert_eq!(batch.operations.len(), count as usize + 1 + usize::from(fee));
                let mut users: Vec<u64> = trade.changes().map(|(user, ..)| user).collect();
                users.dedup();
                assert!(users.len() == count as usize && users.iter().all(|user| *user < 100), "{users:?}");
                let followed = trade.changes().map(|(_, cash, _)| cash.to_string());
                let sent = batch.operations.iter().filter_map(|operation| match &operation.kind {
                    Some(Kind::Add(Add { delta, .. })) => Some(delta.clone()),
                    _ => None,
                });
                assert!(followed.eq(sent.take(count as usize)));
            }
        }
    }

    #[test]
    fn two_loads_never_make_the_same_id() {
        let people = population(50, 2);
        let ids = |maker: &mut Maker| -> Vec<Uuid> {
            let orders = (0..100).flat_map(|sequence| {
                maker.make(sequence).orders(Form::Independent, people.placement).collect::<Vec<_>>()
            });
            orders.map(|order| order.id).collect()
        };
        let mut all: Vec<Uuid> =
            (0..20).flat_map(|_| ids(&mut Maker::new(people, Mix::Uniform, false))).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
