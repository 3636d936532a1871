//! Numbers of which some come much more often than others: Zipf's law, as YCSB draws it.

use crate::tape::Random;

/// How much more often: the number of rank k comes with a probability in proportion to 1 / k^THETA. YCSB's value.
const THETA: f64 = 0.99;

/// Draws numbers from 0 on, lower ones more often, by the method of Gray and others, "Quickly generating billion-record
/// synthetic databases" (SIGMOD 1994), section 3.2.
#[derive(Clone, Debug)]
pub struct Zipf {
    count: u64,
    zeta: f64,
    alpha: f64,
    eta: f64,
}

impl Zipf {
    /// For numbers below `count`, which is at least 2. Takes time in proportion to it: about 0.1 s for 5 million.
    pub fn new(count: u64) -> Zipf {
        assert!(count >= 2, "there is nothing to choose from");
        let zeta: f64 = (1..=count).map(|rank| 1.0 / (rank as f64).powf(THETA)).sum();
        let zeta_two = 1.0 + 0.5_f64.powf(THETA);
        let eta = (1.0 - (2.0 / count as f64).powf(1.0 - THETA)) / (1.0 - zeta_two / zeta);
        Zipf { count, zeta, alpha: 1.0 / (1.0 - THETA), eta }
    }

    /// A number.
    pub fn draw(&self, random: &mut Random) -> u64 {
        let unit = random.unit();
        let scaled = unit * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(THETA) {
            return 1;
        }
        let rank = self.count as f64 * (self.eta * unit - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.count - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_numbers_come_as_often_as_the_law_says() {
        for count in [2, 10, 1000, 100_000] {
            let (zipf, mut random) = (Zipf::new(count), Random(1));
            let mut seen = vec![0_u32; count as usize];
            const DRAWS: u32 = 200_000;
            for _ in 0..DRAWS {
                seen[zipf.draw(&mut random) as usize] += 1;
            }
            // The first two are exact; the rest is an approximation.
            for (rank, seen) in seen.iter().take(2).enumerate() {
                let expected = f64::from(DRAWS) / ((rank + 1) as f64).powf(THETA) / zipf.zeta;
                let ratio = f64::from(*seen) / expected;
                assert!((0.95..1.05).contains(&ratio), "{count}, {rank}: {ratio}");
            }
            let first_tenth: u32 = seen.iter().take((count as usize / 10).max(1)).sum();
            assert!(count < 1000 || first_tenth > DRAWS / 2, "{count}: {first_tenth}");
            let last_half: u32 = seen[count as usize / 2..].iter().sum();
            assert!(last_half > 0, "{count}: the rare ones never come");
        }
    }
}
