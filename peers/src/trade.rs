//! Trades: two users on two shards, four balance changes, one record.
//!
//! User `n` belongs to shard `n % 2`. The buyer pays `quote` and gets `base`, the seller the other way round, so each asset's
//! sum over all users stays what it was. In a hot load the user whom PostgreSQL locks last, [`HOT_USER`], is one side of every
//! trade.

/// How many shards there are: the two instances of PostgreSQL.
pub const SHARDS: u64 = 2;
/// What every user holds of each asset at first: far more than any run moves, so that no trade is short of funds.
pub const INITIAL_BALANCE: i64 = 1_000_000_000_000;
/// The user in every trade of a hot load, on the last shard, whose locks are taken last and held shortest.
pub const HOT_USER: u64 = SHARDS - 1;
/// The largest amount of the base asset in a trade.
const BASE_MAX: u64 = 100;
/// The largest price of one unit of it.
const PRICE_MAX: u64 = 1_000;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asset {
    /// What is bought.
    Base = 0,
    /// What is paid with.
    Quote = 1,
}

/// Both assets.
pub const ASSETS: [Asset; 2] = [Asset::Base, Asset::Quote];

/// How the trades are spread over the users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// All users alike.
    Uniform,
    /// One user in every trade, the other side uniform.
    Hot,
}

/// One trade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trade {
    /// Its number, given once.
    pub id: u64,
    /// The user who gets `base` and pays `quote`.
    pub buyer: u64,
    /// The user who gets `quote` and gives `base`.
    pub seller: u64,
    /// How much is bought.
    pub base: i64,
    /// How much is paid.
    pub quote: i64,
}

/// A change of one balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Whose.
    pub user: u64,
    /// Of what.
    pub asset: Asset,
    /// By how much.
    pub delta: i64,
}

impl Trade {
    /// The four changes: two on each shard, in the order of the assets.
    pub fn legs(&self) -> [Leg; 4] {
        let leg = |user, asset, delta| Leg { user, asset, delta };
        [
            leg(self.buyer, Asset::Base, self.base),
            leg(self.buyer, Asset::Quote, -self.quote),
            leg(self.seller, Asset::Base, -self.base),
            leg(self.seller, Asset::Quote, self.quote),
        ]
    }

    /// What is stored about it, about 100 bytes of JSON.
    pub fn record(&self) -> String {
        let Trade { id, buyer, seller, base, quote } = self;
        format!(
            r#"{{"trade":{id},"buyer":"user:{buyer}","seller":"user:{seller}","quantity":"{base}","quote":"{quote}","maker":"buyer"}}"#
        )
    }
}

/// The shard of a user.
pub fn shard_of(user: u64) -> usize {
    (user % SHARDS) as usize
}

/// A source of trades: the same seed gives the same ones.
#[derive(Debug)]
pub struct Trades {
    random: Random,
    users: u64,
    load: Load,
}

impl Trades {
    /// Trades among `users` users, an even number from 4 on.
    pub fn new(seed: u64, users: u64, load: Load) -> Trades {
        assert!(users >= 4 && users.is_multiple_of(SHARDS), "both shards must have several users");
        Trades { random: Random(mix(seed)), users, load }
    }

    /// The next trade, under this number.
    pub fn next(&mut self, id: u64) -> Trade {
        let per_shard = self.users / SHARDS;
        let first = self.random.below(per_shard) * SHARDS;
        let second = match self.load {
            Load::Uniform => self.random.below(per_shard) * SHARDS + 1,
            Load::Hot => HOT_USER,
        };
        let (buyer, seller) = if self.random.below(2) == 0 { (first, second) } else { (second, first) };
        let base = self.random.below(BASE_MAX) + 1;
        let quote = base * (self.random.below(PRICE_MAX) + 1);
        Trade { id, buyer, seller, base: base as i64, quote: quote as i64 }
    }
}

/// Random numbers that are the same for the same seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers from a seed.
    pub fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    /// The next one, from 0 to below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_trade_has_a_side_on_each_shard_and_makes_no_money() {
        for load in [Load::Uniform, Load::Hot] {
            let mut trades = Trades::new(7, 100, load);
            for id in 0..2000 {
                let trade = trades.next(id);
                assert_ne!(shard_of(trade.buyer), shard_of(trade.seller), "{trade:?}");
                assert!(trade.buyer < 100 && trade.seller < 100 && trade.base > 0 && trade.quote > 0);
                for asset in ASSETS {
                    let legs = trade.legs();
                    let sum: i64 = legs.iter().filter(|leg| leg.asset == asset).map(|leg| leg.delta).sum();
                    assert_eq!(sum, 0, "{trade:?}");
                }
                if load == Load::Hot {
                    assert!([trade.buyer, trade.seller].contains(&HOT_USER), "{trade:?}");
                }
            }
        }
    }

    #[test]
    fn both_sides_are_spread_over_all_users() {
        let mut trades = Trades::new(1, 20, Load::Uniform);
        let mut seen = [0; 20];
        for id in 0..4000 {
            let trade = trades.next(id);
            seen[trade.buyer as usize] += 1;
            seen[trade.seller as usize] += 1;
        }
        // 400 each on average; ten standard deviations are 190.
        assert!(seen.iter().all(|times| (210..590).contains(times)), "{seen:?}");
    }
}
