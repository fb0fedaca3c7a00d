//! The marker beside a bitmap file: whether a life of the volume is running, and which one ended (P4).
//!
//! It is always 512 bytes and overwritten in place, so that a disk writes it whole or not at all. It is not deleted,
//! unless it cannot be written any more: no marker, no belief.
//! **Invariant**: `closed` names a life whose bitmap file is durable; whoever may write says `open` first.

use crate::{FormatError, on_disk};
use blktide_types::id::{BootId, LifeId, VolumeId};
use blktide_types::reason::Reason;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"BTmark\r\n";
/// Newest version written and read.
pub const VERSION: u16 = 1;
/// Bytes of the file.
pub const BYTES: usize = size_of::<MarkerBlock>();

const STATE_OPEN: u8 = 1;
const STATE_CLOSED: u8 = 2;

on_disk! {
    /// The whole marker.
    pub struct MarkerBlock: 512 {
        /// `BTmark\r\n`.
        0 => pub magic: [u8; 8],
        /// Format version, 1.
        8 => pub version: U16,
        /// 1 open, 2 closed.
        10 => pub state: u8,
        /// Number of the reason why the running life will not be believed; 0: none known.
        11 => pub reason: u8,
        /// Features without which it cannot be read; an unknown one set, it is refused.
        12 => pub incompat: U32,
        /// Features that may be ignored.
        16 => pub compat: U32,
        /// Zero.
        20 => pub reserved: U32,
        /// The volume.
        24 => pub volume_id: [u8; 16],
        /// The life that is open, or that ended with the bitmap file.
        40 => pub life_id: [u8; 16],
        /// The boot in which it was written.
        56 => pub boot_id: [u8; 16],
        /// Zero.
        72 => pub reserved_2: [u8; 432],
        /// CRC-64/XZ of bytes 0 to 503.
        504 => pub checksum: U64,
    }
}

/// Whether a life is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The volume may be written; no bitmap file is to be believed. With a reason, if one is known
    /// already why this life will not be.
    Open(Option<Reason>),
    /// It was stopped cleanly; the bitmap file of this life may be believed.
    Closed,
}

/// What a marker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker {
    /// Whether a life is running.
    pub state: State,
    /// The volume.
    pub volume: VolumeId,
    /// The life that is running, or that ended.
    pub life: LifeId,
    /// The boot in which this was written.
    pub boot: BootId,
}

/// The marker as it is stored.
pub fn encode(marker: &Marker) -> [u8; BYTES] {
    let (state, reason) = match marker.state {
        State::Open(reason) => (STATE_OPEN, reason.map_or(0, Reason::number)),
        State::Closed => (STATE_CLOSED, 0),
    };
    let mut block = MarkerBlock {
        magic: MAGIC,
        version: U16::new(VERSION),
        state,
        reason,
        incompat: U32::new(0),
        compat: U32::new(0),
        reserved: U32::new(0),
        volume_id: marker.volume.0,
        life_id: marker.life.0,
        boot_id: marker.boot.0,
        reserved_2: [0; 432],
        checksum: U64::new(0),
    };
    block.checksum = U64::new(checksum(&block));
    let mut bytes = [0; BYTES];
    bytes.copy_from_slice(block.as_bytes());
    bytes
}

/// The marker in `bytes`, once everything about it holds.
pub fn decode(bytes: &[u8]) -> Result<Marker, FormatError> {
    let Ok(block) = MarkerBlock::read_from_bytes(bytes) else {
        return Err(FormatError::Length {
            need: u64::try_from(BYTES).unwrap_or(u64::MAX),
            have: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        });
    };
    if block.magic != MAGIC {
        return Err(FormatError::Magic { found: block.magic });
    }
    if block.version.get() != VERSION {
        return Err(FormatError::Version {
            found: block.version.get(),
            supported: VERSION,
        });
    }
    let computed = checksum(&block);
    if block.checksum.get() != computed {
        return Err(FormatError::Checksum {
            found: block.checksum.get(),
            computed,
        });
    }
    if block.incompat.get() != 0 {
        return Err(FormatError::Feature {
            bits: block.incompat.get(),
        });
    }
    let state = match (block.state, block.reason) {
        (STATE_OPEN, reason) => State::Open(Reason::from_number(reason)),
        (STATE_CLOSED, 0) => State::Closed,
        (value, _) => {
            return Err(FormatError::Field {
                field: "state",
                value: value.into(),
            });
        }
    };
    Ok(Marker {
        state,
        volume: VolumeId(block.volume_id),
        life: LifeId(block.life_id),
        boot: BootId(block.boot_id),
    })
}

fn checksum(block: &MarkerBlock) -> u64 {
    let mut digest = crc64fast::Digest::new();
    let (covered, _) = block
        .as_bytes()
        .split_at(core::mem::offset_of!(MarkerBlock, checksum));
    digest.write(covered);
    digest.sum64()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: &[u8] = include_bytes!("../golden/v1/marker_open.bin");
    const CLOSED: &[u8] = include_bytes!("../golden/v1/marker_closed.bin");

    fn sample(state: State) -> Marker {
        Marker {
            state,
            volume: VolumeId(*b"0123456789abcdef"),
            life: LifeId(*b"a life, 16 bytes"),
            boot: BootId(*b"a boot, 16 bytes"),
        }
    }

    /// What version 1 wrote, byte for byte. These files never change.
    #[test]
    fn goldens_v1_are_still_what_we_write_and_read() {
        let open = sample(State::Open(Some(Reason::ForeignWrite)));
        assert_eq!(encode(&open), OPEN);
        assert_eq!(decode(OPEN), Ok(open));
        assert_eq!(encode(&sample(State::Closed)), CLOSED);
        assert_eq!(decode(CLOSED), Ok(sample(State::Closed)));
    }

    /// req A5, X6: every single-bit flip, every truncation, and more bytes than there should be.
    #[test]
    fn damage_is_refused() {
        for golden in [OPEN, CLOSED] {
            for bit in 0..golden.len() * 8 {
                let mut bytes = golden.to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                decode(&bytes).unwrap_err();
            }
            for len in 0..golden.len() {
                decode(&golden[..len]).unwrap_err();
            }
            decode(&[golden, &[0]].concat()).unwrap_err();
        }
    }
}
