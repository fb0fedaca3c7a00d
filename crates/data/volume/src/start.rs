//! What a server is told when it is started: the options, and the numbers that the shared memory follows from.

use crate::error::VolumeError;
use crate::options::VolumeOptions;
use blktide_device::Limits;
use blktide_format::shared::Shape;
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;
use serde::{Deserialize, Serialize};

/// Told by the keeper in memory: a server opens no configuration (P7).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) options: VolumeOptions,
    pub(crate) volume_bytes: u64,
    pub(crate) logical_sector_bytes: u32,
    pub(crate) physical_sector_bytes: u32,
}

impl Start {
    /// For a backing device with these limits.
    pub(crate) fn new(options: &VolumeOptions, limits: &Limits) -> Self {
        Self {
            options: options.clone(),
            volume_bytes: limits.volume_bytes,
            logical_sector_bytes: limits.logical_sector_bytes,
            physical_sector_bytes: limits.physical_sector_bytes,
        }
    }

    /// The shape of the volume's memories.
    pub(crate) fn shape(&self) -> Result<Shape, VolumeError> {
        let layout = |why: &str| VolumeError::Layout {
            why: why.to_owned(),
        };
        let size = |bytes, what: &str| {
            BlockSize::new(bytes).ok_or_else(|| {
                layout(&format!(
                    "a {what} of {bytes} bytes: a power of two from 4096 to 1048576 is needed"
                ))
            })
        };
        let geometry = Geometry::new(
            self.volume_bytes,
            size(self.options.block_size_bytes, "block")?,
            size(self.options.grain_bytes, "grain")?,
            self.logical_sector_bytes,
            self.physical_sector_bytes,
        )
        .ok_or_else(|| layout("block, grain, sector and size of the volume do not fit together"))?;
        let mut shape = Shape::usual(geometry);
        let queues = usize::try_from(self.options.queues).unwrap_or(0);
        shape.queues = queues.clamp(1, 16);
        shape.slots -= shape.slots % shape.queues;
        Ok(shape)
    }
}

/// In which role a server starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The first of this attach.
    First,
    /// A server has died.
    Takeover,
    /// Servers keep dying: tracking is off.
    PassThrough,
}

impl Role {
    const ALL: [Self; 3] = [Self::First, Self::Takeover, Self::PassThrough];

    /// Its word on the command line.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Takeover => "takeover",
            Self::PassThrough => "pass-through",
        }
    }

    /// The role of a word.
    pub(crate) fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.word() == word)
    }
}

/// Words of the control memory whose meaning is the volume's.
pub(crate) mod word {
    /// `STATE`: being set up.
    pub(crate) const ATTACHING: u64 = 0;
    /// `STATE`: in the path, tracking.
    pub(crate) const ATTACHED: u64 = 1;
    /// `STATE`: in the path, not tracking.
    pub(crate) const PASSING_THROUGH: u64 = 2;
    /// `STATE`: being taken out.
    pub(crate) const DETACHING: u64 = 3;
    /// `CLOSING`: the frontend is gone and no opener is left.
    pub(crate) const CLEARED: u64 = 2;
    /// `ENDED`: cleanly.
    pub(crate) const CLEAN: u64 = 1;
    /// `ENDED`: it refused, or the frontend went away; the log says why.
    pub(crate) const REFUSED: u64 = 2;
    /// `WARNINGS`: memory could not be locked.
    pub(crate) const NOT_LOCKED: u64 = 1;
    /// `WARNINGS`: `PR_SET_IO_FLUSHER` was refused.
    pub(crate) const NO_FLUSHER: u64 = 2;
    /// `WARNINGS`: the kernel may kill these processes when memory runs out.
    pub(crate) const MAY_BE_KILLED: u64 = 4;
    /// `WARNINGS`: an administrator limits the time of FUSE requests.
    pub(crate) const REQUEST_TIMEOUT: u64 = 8;
    /// `WARNINGS`: the program is not in memory.
    pub(crate) const ON_DISK: u64 = 16;

    /// The warnings as the codes of `status`.
    pub(crate) fn warnings(bits: u64) -> Vec<String> {
        [
            (NOT_LOCKED, "memory-not-locked"),
            (NO_FLUSHER, "no-io-flusher"),
            (MAY_BE_KILLED, "may-be-killed"),
            (REQUEST_TIMEOUT, "fuse-request-timeout"),
            (ON_DISK, "program-on-disk"),
        ]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, code)| code.to_owned())
        .collect()
    }
}
