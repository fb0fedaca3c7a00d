//! Reading a volume in bounds, and a digest of what was read.

use super::{Class, Evidence, Kind};
use blktide_types::id::Digest;
use std::io;

/// Bytes that offsets and lengths of a read are multiples of.
const ALIGN: u64 = 4096;
/// Bytes of one read at most.
const PIECE_BYTES: u64 = 256 << 10;
/// Bytes that a volume's evidence may cover; a superblock that asks for more is not believed.
const COVERED_BYTES_MAX: u64 = 64 << 20;

/// A device, or a file with its bytes.
pub trait ReadAt {
    /// Its length in bytes.
    fn len_bytes(&self) -> u64;

    /// Fills `buf` from `offset_bytes`, past any cache that could hold older bytes than the device.
    ///
    /// The offset is a multiple of 4096; the length, too, or what is left up to the end. Waits: for the device.
    fn read_exact_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// Digests ranges of a device. One failed read makes all of it worth nothing; a range that is not there, or one too
/// many, makes it weak.
pub(super) struct Collector<'a> {
    device: &'a dyn ReadAt,
    hasher: blake3::Hasher,
    covered_bytes: u64,
    /// The piece read last: structures lie close together.
    last: (u64, Vec<u8>),
    coverage: Coverage,
}

/// How much of what should be covered was; it only gets worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Coverage {
    Whole,
    Incomplete,
    Unreadable,
}

impl<'a> Collector<'a> {
    pub(super) fn new(device: &'a dyn ReadAt) -> Self {
        Self {
            device,
            hasher: blake3::Hasher::new(),
            covered_bytes: 0,
            last: (0, Vec::new()),
            coverage: Coverage::Whole,
        }
    }

    /// Reads without covering: for finding out where things lie. `None` past the end, or if it cannot be read.
    pub(super) fn read(&mut self, offset_bytes: u64, len_bytes: u64) -> Option<Vec<u8>> {
        let end = offset_bytes.checked_add(len_bytes)?;
        let device_bytes = self.device.len_bytes();
        if end > device_bytes || len_bytes > PIECE_BYTES {
            return None;
        }
        let start = offset_bytes - offset_bytes % ALIGN;
        let stop = end.checked_next_multiple_of(ALIGN)?.min(device_bytes);
        if self.last.0 != start || wide(&self.last.1) != stop.checked_sub(start)? {
            let mut buf = vec![0; usize::try_from(stop.checked_sub(start)?).ok()?];
            if self.device.read_exact_at(start, &mut buf).is_err() {
                self.coverage = Coverage::Unreadable;
                return None;
            }
            self.last = (start, buf);
        }
        let from = usize::try_from(offset_bytes - start).ok()?;
        let to = from.checked_add(usize::try_from(len_bytes).ok()?)?;
        self.last.1.get(from..to).map(<[u8]>::to_vec)
    }

    /// Digests a range, with where it lies. False if it is not there, cannot be read, or is one too many.
    pub(super) fn cover(&mut self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.covered_bytes = self.covered_bytes.saturating_add(len_bytes);
        if self.covered_bytes > COVERED_BYTES_MAX {
            self.coverage = self.coverage.max(Coverage::Incomplete);
            return false;
        }
        self.hasher.update(&offset_bytes.to_le_bytes());
        self.hasher.update(&len_bytes.to_le_bytes());
        let mut done = 0;
        while done < len_bytes {
            let piece = PIECE_BYTES.min(len_bytes - done);
            let Some(bytes) = self.read(offset_bytes.saturating_add(done), piece) else {
                self.coverage = self.coverage.max(Coverage::Incomplete);
                return false;
            };
            self.hasher.update(&bytes);
            done = done.saturating_add(piece);
        }
        true
    }

    pub(super) fn finish(self, (kind, class): (Kind, Class)) -> Evidence {
        let class = match self.coverage {
            Coverage::Whole => class,
            Coverage::Incomplete => Class::Weak,
            Coverage::Unreadable => return Evidence::UNREADABLE,
        };
        Evidence {
            kind,
            class,
            digest: Digest(*self.hasher.finalize().as_bytes()),
            covered_bytes: self.covered_bytes,
        }
    }
}

fn wide(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// A structure's fields by offset; what is not there reads as `None`.
pub(super) trait Fields {
    fn le16(&self, at: usize) -> Option<u16>;
    fn le32(&self, at: usize) -> Option<u32>;
    fn be16(&self, at: usize) -> Option<u16>;
    fn be32(&self, at: usize) -> Option<u32>;
    fn be64(&self, at: usize) -> Option<u64>;
}

impl Fields for [u8] {
    fn le16(&self, at: usize) -> Option<u16> {
        array(self, at).map(u16::from_le_bytes)
    }

    fn le32(&self, at: usize) -> Option<u32> {
        array(self, at).map(u32::from_le_bytes)
    }

    fn be16(&self, at: usize) -> Option<u16> {
        array(self, at).map(u16::from_be_bytes)
    }

    fn be32(&self, at: usize) -> Option<u32> {
        array(self, at).map(u32::from_be_bytes)
    }

    fn be64(&self, at: usize) -> Option<u64> {
        array(self, at).map(u64::from_be_bytes)
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
