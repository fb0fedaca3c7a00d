//! Evidence against foreign writes (P5): what a volume looks like when it is let go, and again when it is taken up.
//!
//! ```text
//! clean stop: collect ──▶ bitmap file        attach: collect ──compare──▶ same · changed · unknown
//! ```
//! A digest over whole structures, never over chosen fields: a journal's replay elsewhere moves neither write time
//! nor mount count. **Strong** means that a mount which writes moves something in it: ext4 and XFS with an internal
//! log, cleanly unmounted. All else is **weak**. No evidence sees a write past the file system (`dd`, `debugfs`).
//!
//! And evidence against a mark that was missed where the kernel marks (P14): [`Vector`] and [`Belief`].
//!
//! **Invariant**: what cannot be read, or not be understood, is never taken for unchanged.

mod belief;
mod ext4;
mod reader;
mod vector;
mod xfs;

pub use belief::{Belief, Occasion, Verdict};
pub use reader::ReadAt;
pub use vector::{Check, Proof, Sectors, Vector, compare as compare_vectors};

use blktide_format::bitmap_file::EvidenceBlock;
use blktide_types::id::Digest;
use blktide_types::reason::Reason;
use reader::Collector;
use zerocopy::little_endian::{U16, U32, U64};

/// Version of the rules below. What was taken by others cannot be compared.
const RULES: u16 = 1;

/// Bytes at each end of a volume of which nothing is known that its evidence covers.
const ENDS_BYTES: u64 = 64 << 10;

/// What was found on the volume. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The device could not be read where it had to be.
    Unreadable = 0,
    /// No file system that we know.
    Unknown = 1,
    /// ext2, ext3 or ext4.
    Ext4 = 2,
    /// XFS.
    Xfs = 3,
}

/// How much it proves. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Every mount that writes changes it.
    Strong = 1,
    /// Equal evidence proves nothing.
    Weak = 2,
}

/// What a volume looks like at an instant at which nobody writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    kind: Kind,
    class: Class,
    digest: Digest,
    covered_bytes: u64,
}

impl Evidence {
    /// Evidence that is equal to none: the device could not be read.
    pub const UNREADABLE: Self = Self {
        kind: Kind::Unreadable,
        class: Class::Weak,
        digest: Digest::NONE,
        covered_bytes: 0,
    };

    /// Evidence that sees nothing and says strong: the hand-over must hold by itself.
    #[cfg(all(test, not(loom)))]
    pub(crate) const fn blind() -> Self {
        Self {
            kind: Kind::Ext4,
            class: Class::Strong,
            digest: Digest::NONE,
            covered_bytes: 0,
        }
    }

    /// What was found.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// How much it proves.
    pub const fn class(&self) -> Class {
        self.class
    }

    /// How the bitmap file keeps it.
    pub const fn block(&self) -> EvidenceBlock {
        EvidenceBlock {
            kind: self.kind as u8,
            class: self.class as u8,
            rules: U16::new(RULES),
            reserved: U32::new(0),
            digest: self.digest.0,
            covered_bytes: U64::new(self.covered_bytes),
            reserved_2: [0; 16],
        }
    }
}

/// Takes the evidence of a volume that nobody writes.
///
/// Waits: for a few reads of the device, some hundred KiB on a usual file system, 2 KiB for each XFS group and the
/// descriptors of each ext4 group on a large one; never more than 64 MiB.
pub fn collect(device: &dyn ReadAt) -> Evidence {
    let mut collector = Collector::new(device);
    let found = ext4::collect(&mut collector)
        .or_else(|| xfs::collect(&mut collector))
        .unwrap_or_else(|| {
            let len = device.len_bytes();
            let tail = len.saturating_sub(ENDS_BYTES);
            collector.cover(0, ENDS_BYTES.min(len));
            collector.cover(tail, len.saturating_sub(tail));
            (Kind::Unknown, Class::Weak)
        });
    collector.finish(found)
}

/// Whether the volume was written since `stored` was taken: `Ok` if believed not to have been.
///
/// Errors: [`Reason::ForeignWrite`] if it was; [`Reason::ForeignWriteUnknown`] if nothing here could show it. The second is waived by
/// `exclusive`: the administrator's word that nothing else ever writes this device.
pub fn compare(stored: &EvidenceBlock, now: &Evidence, exclusive: bool) -> Result<(), Reason> {
    let unreadable = Kind::Unreadable as u8;
    if stored.rules.get() != RULES || stored.kind == unreadable || now.kind == Kind::Unreadable {
        return Err(Reason::ForeignWriteUnknown);
    }
    if *stored != now.block() {
        return Err(Reason::ForeignWrite);
    }
    match now.class {
        Class::Strong => Ok(()),
        Class::Weak if exclusive => Ok(()),
        Class::Weak => Err(Reason::ForeignWriteUnknown),
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
