//! Which of the pending changes a power cut keeps.

use crate::seed::Seed;
use core::fmt;

/// A power cut: for each pending change, oldest first, whether it is kept. Printed as `1` and `0`.
#[derive(Clone, PartialEq, Eq)]
pub struct Cut {
    kept: Vec<bool>,
}

impl Cut {
    /// A cut of which the test says itself what is kept, oldest change first; missing ones are lost.
    pub const fn keeping(kept: Vec<bool>) -> Self {
        Self { kept }
    }

    /// What is kept, oldest change first.
    pub fn kept(&self) -> &[bool] {
        &self.kept
    }
}

impl fmt::Debug for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cut(")?;
        for kept in &self.kept {
            f.write_str(if *kept { "1" } else { "0" })?;
        }
        f.write_str(")")
    }
}

/// See [`super::SimDisk::cuts`].
pub(super) fn cuts(pending: usize, limit: usize, seed: Seed) -> Vec<Cut> {
    let all = u32::try_from(pending)
        .ok()
        .and_then(|bits| 1_usize.checked_shl(bits))
        .filter(|n| *n <= limit);
    if let Some(count) = all {
        return (0..count)
            .map(|mask| Cut::keeping((0..pending).map(|i| mask >> i & 1 == 1).collect()))
            .collect();
    }
    let mut chosen = vec![
        Cut::keeping(vec![false; pending]),
        Cut::keeping(vec![true; pending]),
    ];
    for odd in 0..pending {
        for rest in [false, true] {
            chosen.push(Cut::keeping(
                (0..pending).map(|i| (i == odd) != rest).collect(),
            ));
        }
    }
    let mut numbers = seed.numbers();
    while chosen.len() < limit {
        chosen.push(Cut::keeping(
            (0..pending).map(|_| numbers.chance(1, 2)).collect(),
        ));
    }
    chosen
}
