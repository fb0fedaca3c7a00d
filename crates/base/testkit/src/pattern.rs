//! Bytes that say where they belong and which write they come from.
//!
//! Each 512-byte sector of a stamped buffer is its own witness: sequence, sector of the volume, then numbers made
//! of both. So a torn, misplaced or stale sector is recognised without knowing what should be there.

use crate::seed::{Numbers, Seed};

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

/// What a sector says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamp {
    /// All zero.
    Zero,
    /// Written whole, by write number `sequence`, for sector `sector` of the volume.
    Written {
        /// Number of the write.
        sequence: u64,
        /// Sector of the volume that it was meant for.
        sector: u64,
    },
    /// Neither.
    Garbage,
}

/// Fills `out`, which begins at byte `offset_bytes` of the volume (a multiple of 512), as write `sequence`
/// would. `sequence` must not be 0.
pub fn stamp(out: &mut [u8], offset_bytes: u64, sequence: u64) {
    for (sector, bytes) in (offset_bytes / 512..).zip(out.chunks_mut(SECTOR_BYTES)) {
        let whole = sector_bytes(sequence, sector);
        bytes.copy_from_slice(&whole[..bytes.len()]);
    }
}

/// A stamped buffer of `len_bytes`.
pub fn stamped(len_bytes: usize, offset_bytes: u64, sequence: u64) -> Vec<u8> {
    let mut out = vec![0; len_bytes];
    stamp(&mut out, offset_bytes, sequence);
    out
}

/// What the 512 bytes of `sector` say.
pub fn look(sector: &[u8]) -> Stamp {
    if sector.iter().all(|b| *b == 0) {
        return Stamp::Zero;
    }
    let word = |at: usize| {
        sector
            .get(at..at + 8)
            .map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
    };
    match (word(0), word(8)) {
        (Some(sequence), Some(number)) if sector == sector_bytes(sequence, number) => {
            Stamp::Written {
                sequence,
                sector: number,
            }
        }
        _ => Stamp::Garbage,
    }
}

/// `len_bytes` of numbers of `seed`: do not compress.
pub fn noise(len_bytes: usize, seed: Seed) -> Vec<u8> {
    let mut out = vec![0; len_bytes];
    seed.numbers().fill(&mut out);
    out
}

fn sector_bytes(sequence: u64, sector: u64) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let mut numbers: Numbers = Seed(sequence ^ sector.rotate_left(32)).numbers();
    numbers.fill(&mut bytes);
    bytes[..8].copy_from_slice(&sequence.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_knows_its_write_and_a_torn_one_is_seen() {
        let mut bytes = stamped(1536, 4096, 7);
        let said = |bytes: &[u8]| bytes.chunks(512).map(look).collect::<Vec<_>>();
        let expected = (8..11).map(|sector| Stamp::Written {
            sequence: 7,
            sector,
        });
        assert_eq!(said(&bytes), expected.collect::<Vec<_>>());
        bytes[700] ^= 1;
        assert_eq!(said(&bytes)[1], Stamp::Garbage);
        assert_eq!(look(&[0; 512]), Stamp::Zero);
    }
}
