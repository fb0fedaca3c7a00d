//! Numbers that look random and replay: `SplitMix64`, started from a seed that a failing test prints.
//!
//! A test says `let seed = Seed::of_test("name");`, prints it in every assertion (`{seed}`), and draws from
//! `seed.numbers()`. `BLKTIDE_SEED=…` in the environment replays one.

use core::fmt;
use core::str::FromStr;

/// Where a run's numbers start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

impl Seed {
    /// The seed of `BLKTIDE_SEED`, else one made of the test's name: the same in each run.
    pub fn of_test(name: &str) -> Self {
        match std::env::var("BLKTIDE_SEED") {
            Ok(text) => text
                .parse()
                .unwrap_or_else(|_| panic!("BLKTIDE_SEED={text} is not a number")),
            Err(_) => Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })),
        }
    }

    /// The numbers that begin here.
    pub const fn numbers(self) -> Numbers {
        Numbers { state: self.0 }
    }

    /// The `n`-th seed derived from this one: for tests that run many small worlds.
    #[must_use]
    pub fn nth(self, n: u64) -> Self {
        Self(
            Numbers {
                state: self.0 ^ n.wrapping_mul(0xd134_2543_de82_ef95),
            }
            .next_u64(),
        )
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BLKTIDE_SEED={:#x}", self.0)
    }
}

impl FromStr for Seed {
    type Err = core::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).map(Self),
            None => text.parse().map(Self),
        }
    }
}

/// A `SplitMix64` sequence.
#[derive(Clone, Debug)]
pub struct Numbers {
    state: u64,
}

impl Numbers {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0 .. end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        // Multiply and shift: the bias is below 2^-40 for every bound a test has.
        let wide = u128::from(self.next_u64()) * u128::from(end);
        u64::try_from(wide >> 64).expect("the upper half of a product of two u64")
    }

    /// An index in `0 .. end`; 0 if `end` is 0.
    pub fn index(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("a length");
        usize::try_from(self.below(end)).expect("below a usize")
    }

    /// True in `of` of `out_of` cases.
    pub fn chance(&mut self, of: u64, out_of: u64) -> bool {
        self.below(out_of) < of
    }

    /// One of `items`, which must not be empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.index(items.len())]
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    /// `items` in another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.index(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of Vigna's reference code for the seed 1234567.
    #[test]
    fn is_splitmix64() {
        let mut numbers = Seed(1_234_567).numbers();
        let first: Vec<u64> = (0..3).map(|_| numbers.next_u64()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn bounds_hold_and_everything_is_reached() {
        let mut numbers = Seed(1).numbers();
        let mut seen = [false; 7];
        for _ in 0..1000 {
            seen[numbers.index(7)] = true;
        }
        assert_eq!(seen, [true; 7]);
        assert_eq!("0x10".parse(), Ok(Seed(16)));
        assert_eq!("16".parse(), Ok(Seed(16)));
    }
}
