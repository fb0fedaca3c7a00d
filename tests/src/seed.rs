//! Random choices that can be had again: the seed is printed, and `BLKTIDE_SEED` replays it.

use anyhow::{Context, Result};

/// `SplitMix64`.
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The seed of `BLKTIDE_SEED`, else `default`; says which, for `what`.
    pub fn of(what: &str, default: u64) -> Result<Self> {
        let seed = match std::env::var("BLKTIDE_SEED") {
            Ok(text) => text.parse().context("BLKTIDE_SEED is a number")?,
            Err(_) => default,
        };
        #[expect(clippy::print_stderr, reason = "a failing seed must be seen")]
        {
            eprintln!("{what}: BLKTIDE_SEED={seed}");
        }
        Ok(Self(seed))
    }

    /// The stream of a number, said to nobody.
    pub fn stream(seed: u64) -> Self {
        Self(seed)
    }

    /// Another stream, for another thread.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.draw())
    }

    /// 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (0 if that is 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw().checked_rem(bound).unwrap_or(0)
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.draw().to_le_bytes();
            for (to, from) in chunk.iter_mut().zip(bytes) {
                *to = from;
            }
        }
    }
}
