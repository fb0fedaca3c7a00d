//! Shared memory that crosses builds: which word of which memory means what.
//!
//! ```text
//! control   head (128 words) │ queues (16 words each) │ table 0 │ table 1 │ hints │ log ring
//! banks     bank 0 │ bank 1 │ …            one bit a grain, each bank a whole number of pages
//! states    head (64 words) │ two bits a block        what blktided may write to
//! index     head (64 words) │ block_of[slot] │ owner[slot]
//! wanted    wanted before the swap, one bit a block │ changed before the swap, likewise
//! slots     per slot: one page (state; the FUSE header ends with it) │ payload
//! marks     head (512 words) │ bitmap A │ bitmap B      where the kernel marks: an array of its own, pinned
//! ```
//!
//! Every word is a `u64` in host order, read and written by atomics; it never leaves the machine.
//! **Invariant**: a build that does not know [`VERSION`] touches nothing. A word gets a meaning once.

use crate::{Field, Layout};
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;

/// First word of the control memory: `BLKTIDE` and 0x01, as little-endian bytes.
pub const MAGIC: u64 = u64::from_le_bytes(*b"BLKTIDE\x01");
/// Version of everything in this module.
pub const VERSION: u64 = 1;

/// Bytes of a word.
pub const WORD_BYTES: usize = 8;
/// Words of a page of 4096 bytes; banks begin on one.
pub const PAGE_WORDS: usize = 512;

/// Whether each field lies after the one before it, and all within `size` bytes.
const fn ascending(fields: &[Field], size: usize) -> bool {
    let (mut rest, mut next) = (fields, 0);
    while let [field, others @ ..] = rest {
        if field.offset < next || field.offset >= size {
            return false;
        }
        next = field.offset.saturating_add(WORD_BYTES);
        rest = others;
    }
    true
}

/// Declares words of a memory by name and index: constants, and a table for `docs/format.md`.
macro_rules! words {
    ($(#[doc = $mdoc:literal])+ pub mod $module:ident, $title:literal : $size:literal {
        $($(#[doc = $doc:literal])+ $index:literal => $name:ident,)+
    }) => {
        $(#[doc = $mdoc])+
        pub mod $module {
            use super::{Field, Layout};
            /// Number of words.
            pub const WORDS: usize = $size;
            $($(#[doc = $doc])+ pub const $name: usize = $index;)+
            /// Layout, for `docs/format.md`; offsets in bytes.
            pub const LAYOUT: Layout = Layout {
                name: $title, size: $size * 8,
                fields: &[$(Field { name: stringify!($name), offset: $index * 8, size: 8, doc: concat!($($doc),+) }),+],
            };
            const _: () = assert!(super::ascending(LAYOUT.fields, LAYOUT.size), "words ascend and fit");
        }
    };
}

words! {
    /// Head of the control memory.
    pub mod control, "ControlHead": 128 {
        /// `BLKTIDE` and 0x01; stored last, so that a half-made memory is not taken for one.
        0 => MAGIC,
        /// Version of all shared memory.
        1 => VERSION,
        /// Features that a build must know to touch the memory; none yet.
        2 => INCOMPAT,
        /// Words of the control memory.
        3 => CONTROL_WORDS,
        /// Volume id, first half.
        4 => VOLUME_ID_0,
        /// Volume id, second half.
        5 => VOLUME_ID_1,
        /// Life of the bitmap, first half (P4).
        6 => LIFE_ID_0,
        /// Life of the bitmap, second half.
        7 => LIFE_ID_1,
        /// Boot id, first half.
        8 => BOOT_ID_0,
        /// Boot id, second half.
        9 => BOOT_ID_1,
        /// Bytes of the volume.
        10 => VOLUME_BYTES,
        /// Base-2 logarithms, a byte each from the lowest: block, grain, logical sector, physical sector.
        11 => SIZES,
        /// Number of queues.
        12 => QUEUES,
        /// Number of request slots.
        13 => SLOTS,
        /// Bytes of a slot's payload.
        14 => SLOT_PAYLOAD_BYTES,
        /// Number of banks.
        15 => BANKS,
        /// Generations that a table can hold.
        16 => GENERATIONS,
        /// Hints that there is room for.
        17 => HINTS,
        /// Bytes of the log ring.
        18 => LOG_BYTES,
        /// What the frontend is: connection id of the FUSE mount; 0 before there is one (P4).
        19 => FRONTEND,
        /// Process id of the keeper; 0 if it is known to be dead.
        32 => KEEPER_PID,
        /// Process id of the server.
        33 => SERVER_PID,
        /// 0 attaching, 1 attached, 2 passing through, 3 detaching.
        34 => STATE,
        /// 0 no, 1 asked, 2 the frontend is gone and no opener is left (P4).
        35 => CLOSING,
        /// How the server ended: 0 it did not, 1 clean, 2 refused to start.
        36 => ENDED,
        /// Servers started for this memory.
        37 => STARTS,
        /// Servers that died in a row without progress.
        38 => DEATHS_IN_ROW,
        /// Requests that had been finished when the last server started.
        39 => FINISHED_AT_START,
        /// Number of the loop device + 1; 0 before there is one.
        40 => LOOP_NUMBER,
        /// Warnings for `status`, one bit each; the volume's meaning.
        41 => WARNINGS,
        /// Why the attach failed; the volume's meaning.
        42 => FAILURE,
        /// Instant of the last server's start, nanoseconds of the boot clock.
        43 => STARTED_AT,
        /// Longest time from a server's death to its successor's service, nanoseconds.
        44 => LONGEST_PAUSE,
        /// Requests of dead servers that their successors found in the slots.
        45 => LEFT_REQUESTS,
        /// Volume's life begun (stored by its first server): the hand-over of the bitmap is over.
        46 => SERVING,
        /// Sequence of the newest revoked snapshot << 8 | its cause: it and all older ones are revoked (P1).
        48 => REVOKED,
        /// Sequence of the newest snapshot that was begun.
        49 => SNAPSHOT_SEQUENCE,
        /// Number of the newest hold.
        50 => HOLD_SEQUENCE,
        /// 1: nothing is marked; everything passes through.
        51 => PASS_THROUGH,
        /// 0 trusted, else a count << 8 | number of the reason.
        56 => DISTRUST,
        /// Wall clock of the distrust, nanoseconds since 1970.
        57 => DISTRUST_WALL,
        /// 16 words of UTF-8, ended by a zero byte: the distrust in detail.
        64 => DISTRUST_DETAIL,
        /// 0 open, else hold << 1 | 1 if its commit has begun (P3). A cache line of its own.
        80 => GATE,
        /// Live bank | table << 8 | snapshot present << 9 | sequence of the newest snapshot << 16 (P3). A cache line of its own.
        88 => EPOCH,
        /// Counter of generations, for people.
        96 => GENERATION_COUNTER,
        /// Sectors that we wrote to the backing device.
        97 => SECTORS_WRITTEN,
        /// Slots of the save area in use at most, of the newest snapshot.
        98 => SAVE_SLOTS_PEAK,
        /// Longest hold, nanoseconds.
        99 => LONGEST_HOLD,
        /// Bytes ever logged: where the ring's writer stands.
        104 => LOG_HEAD,
    }
}

words! {
    /// Words of a queue, in the control memory.
    pub mod queue, "ControlQueue": 16 {
        /// Requests inside (P3).
        0 => INSIDE,
        /// Counts the turns of the queue's thread; a hung one stands still (P7).
        1 => TICK,
        /// Operations outstanding at the device.
        2 => OUTSTANDING,
        /// Requests that wait outside, at the gate or for a snapshot.
        3 => PARKED,
        /// Requests finished.
        4 => FINISHED,
        /// Longest time from a write's arrival to its submission, of those that had to wait, nanoseconds.
        5 => LONGEST_WAIT,
        /// Blocks preserved for snapshots.
        6 => PRESERVED,
        /// Bytes written.
        7 => WRITTEN_BYTES,
        /// Bytes read.
        8 => READ_BYTES,
        /// Bytes zeroed or discarded.
        9 => ZEROED_BYTES,
        /// Flushes.
        10 => FLUSHES,
        /// Requests that failed.
        11 => FAILED,
    }
}

words! {
    /// Head of a generation table.
    pub mod table, "ControlTable": 8 {
        /// Number of generations; the last is the open one.
        0 => COUNT,
        /// Sum over the count and all words of the entries , see `table_sum`.
        1 => SUM,
    }
}

words! {
    /// A generation in a table, oldest first.
    pub mod generation, "ControlGeneration": 8 {
        /// Name, first half.
        0 => NAME_0,
        /// Name, second half.
        1 => NAME_1,
        /// Bank of the run that it is in; names in one run share it.
        2 => BANK,
        /// Counter, for people.
        3 => COUNTER,
        /// Wall clock when it opened, nanoseconds since 1970.
        4 => OPENED,
    }
}

words! {
    /// A hint: a generation boundary that a repository's newest image names (P2).
    pub mod hint, "ControlHint": 8 {
        /// Repository id, first half; both halves 0: no hint here.
        0 => REPOSITORY_0,
        /// Repository id, second half.
        1 => REPOSITORY_1,
        /// Generation, first half.
        2 => NAME_0,
        /// Generation, second half.
        3 => NAME_1,
        /// Order in which hints were set: the lowest is dropped first.
        4 => ORDER,
    }
}

words! {
    /// Head of a snapshot's states.
    pub mod states, "SnapshotStates": 64 {
        /// `BLKTIDE` and 0x01.
        0 => MAGIC,
        /// Version of all shared memory.
        1 => VERSION,
        /// Sequence of the snapshot.
        2 => SEQUENCE,
        /// Number of blocks; two bits each follow the head, lowest first: 0 wanted, 1 preserving, 2 preserved, 3 done.
        3 => BLOCKS,
        /// Counted up by the reader when it makes progress (P8). A cache line of its own.
        8 => LEASE,
    }
}

words! {
    /// Head of a snapshot's slot index.
    pub mod index, "SnapshotIndex": 64 {
        /// `BLKTIDE` and 0x01.
        0 => MAGIC,
        /// Version of all shared memory.
        1 => VERSION,
        /// Sequence of the snapshot.
        2 => SEQUENCE,
        /// Number of save slots; after the head `block_of` of each (block + 1), then `owner` of each (0 free, 1 filling, block + 2).
        3 => SLOTS,
        /// Slots handed out at least once. A cache line of its own.
        8 => TOUCHED,
    }
}

words! {
    /// State words of a request slot: the first words of its page.
    pub mod slot, "SlotState": 8 {
        /// 0 empty or not answered yet, 1 done: `RESULT` is to be answered and nothing performed again.
        0 => STATE,
        /// What to answer: bytes, or a negated errno as two's complement.
        1 => RESULT,
        /// Length of the request as it was read, bytes; 0 while the read may be half.
        2 => LENGTH,
    }
}

words! {
    /// Head of the memory that the kernel's programs mark in. Two bitmaps follow it, one bit a grain, lowest first.
    pub mod watch, "WatchHead": 512 {
        /// Counts swaps; its lowest bit says which bitmap is live. Moved by one atomic addition, never back.
        0 => GENERATION,
        /// Marks that were given up after too many turns: since it moved nothing may be believed.
        1 => LOST,
        /// `BLKTIDE` and 0x01; stored last, so that a half-made memory is not taken for one.
        8 => MAGIC,
        /// Version of all shared memory.
        9 => VERSION,
        /// Features that a build must know to touch the memory; none yet.
        10 => INCOMPAT,
        /// Words of one bitmap, from one to the next: whole pages.
        11 => BITMAP_WORDS,
        /// Base-2 logarithm of a grain in bytes.
        12 => GRAIN_SHIFT,
        /// First sector of the volume on its disk.
        13 => START_SECTOR,
        /// Sectors of the volume.
        14 => SECTORS,
        /// The whole disk, as its requests name it: major << 32 | minor.
        15 => DEVICE,
        /// 1: the disk's driver takes bios; no completion is seen, and generations change inside a freeze only.
        16 => BIO_BASED,
        /// Volume id, first half.
        17 => VOLUME_ID_0,
        /// Volume id, second half.
        18 => VOLUME_ID_1,
        /// Boot clock in nanoseconds when a freeze was about to be asked for; 0: nothing of ours is frozen.
        32 => FROZEN_SINCE,
        /// Process id of the thaw guard that was asked last.
        34 => FROZEN_GUARD,
        /// Sectors that came by way of the whole disk and were seen queued, less those that were seen done, when belief began.
        35 => FOREIGN_LAG,
        /// One of two places for the newest sample of the evidence (P14), see `WatchSample`.
        64 => SAMPLE_0,
        /// The other.
        96 => SAMPLE_1,
    }
}

words! {
    /// A sample of the evidence that every write was marked (P14), and what is believed since.
    pub mod sample, "WatchSample": 32 {
        /// Number of the sample; the higher one of two that check is the newest.
        0 => SEQUENCE,
        /// Boot id, first half.
        1 => BOOT_ID_0,
        /// Boot id, second half.
        2 => BOOT_ID_1,
        /// Ids of the programs: the first, and the second << 32; 0 where there is none.
        3 => PROGRAMS_01,
        /// The third program's, and the number of devices stacked on the volume << 32.
        4 => PROGRAM_2,
        /// Ids of their links, likewise.
        5 => LINKS_01,
        /// The third link's, and << 32: 1 if the disk keeps its statistics.
        6 => LINK_2,
        /// Runs of the programs that the kernel skipped and that no count would show.
        7 => MISSES,
        /// Marks given up after too many turns.
        8 => LOST,
        /// Commands seen that may write and name no range.
        9 => PASSTHROUGH,
        /// Events seen.
        10 => EVENTS,
        /// Number of the newest swap.
        11 => GENERATION,
        /// Sectors written that we saw complete.
        12 => OWN_WRITTEN,
        /// Sectors discarded that we saw complete.
        13 => OWN_DISCARDED,
        /// Sectors written that the kernel counted.
        14 => KERNEL_WRITTEN,
        /// Sectors discarded that the kernel counted.
        15 => KERNEL_DISCARDED,
        /// What the kernel had counted more than we when we began: sectors written.
        16 => BASE_WRITTEN,
        /// The same: sectors discarded.
        17 => BASE_DISCARDED,
        /// Sectors of the volume.
        18 => SECTORS,
        /// First sector of the volume on its disk.
        19 => START_SECTOR,
        /// The whole disk: its sequence number << 32 | major << 20 | minor.
        20 => DEVICE,
        /// Sectors written that we saw queued.
        21 => QUEUED_WRITTEN,
        /// Sectors discarded that we saw queued.
        22 => QUEUED_DISCARDED,
        /// 1: a generation was closed since all writes were last known to be counted.
        24 => OPEN_QUESTION,
        /// Number of the check that failed; 0: none did.
        25 => DOUBT,
        /// What the kernel had counted more than we saw queued when we began: sectors written.
        26 => QUEUED_BASE_WRITTEN,
        /// The same: sectors discarded.
        27 => QUEUED_BASE_DISCARDED,
        /// Sum over all words before it, see `table_sum`.
        31 => SUM,
    }
}

/// Where the FUSE header of a request begins in its slot, bytes: the payload of a write then begins on the next page.
pub const SLOT_HEADER_OFFSET: usize = 4096 - 80;
/// Where the payload begins in a slot, bytes.
pub const SLOT_PAYLOAD_OFFSET: usize = 4096;

/// The numbers that the layout of a volume's memories follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The volume's shape.
    pub geometry: Geometry,
    /// Queues.
    pub queues: usize,
    /// Request slots, of all queues together.
    pub slots: usize,
    /// Bytes of a slot's payload, a multiple of the page.
    pub slot_payload_bytes: usize,
    /// Banks.
    pub banks: usize,
    /// Names of generations, at most.
    pub generations: usize,
    /// Hints, at most.
    pub hints: usize,
    /// Bytes of the log ring, a multiple of 8.
    pub log_bytes: usize,
}

impl Shape {
    /// The shape of a volume with the usual numbers: 2 queues, 128 slots of 256 KiB, 12 banks, 64 names, 8 hints.
    pub const fn usual(geometry: Geometry) -> Self {
        Self {
            geometry,
            queues: 2,
            slots: 128,
            slot_payload_bytes: 256 << 10,
            banks: 12,
            generations: 64,
            hints: 8,
            log_bytes: 64 << 10,
        }
    }

    /// First word of `queue`.
    pub const fn queue(&self, queue: usize) -> usize {
        control::WORDS.saturating_add(queue.saturating_mul(queue::WORDS))
    }

    /// Words of a generation table.
    pub const fn table_words(&self) -> usize {
        table::WORDS.saturating_add(self.generations.saturating_mul(generation::WORDS))
    }

    /// First word of table 0 or 1.
    pub const fn table(&self, copy: usize) -> usize {
        self.queue(self.queues)
            .saturating_add(copy.saturating_mul(self.table_words()))
    }

    /// First word of `hint`.
    pub const fn hint(&self, hint: usize) -> usize {
        self.table(2)
            .saturating_add(hint.saturating_mul(hint::WORDS))
    }

    /// First word of the log ring.
    pub const fn log(&self) -> usize {
        self.hint(self.hints)
    }

    /// Words of the control memory, a whole number of pages.
    pub const fn control_words(&self) -> usize {
        let end = self
            .log()
            .saturating_add(self.log_bytes.div_ceil(WORD_BYTES));
        end.div_ceil(PAGE_WORDS).saturating_mul(PAGE_WORDS)
    }

    /// Words of a bank that hold bits.
    pub fn bank_bit_words(&self) -> usize {
        words_of(self.geometry.grain_count())
    }

    /// Words from one bank to the next: whole pages.
    pub fn bank_words(&self) -> usize {
        self.bank_bit_words()
            .div_ceil(PAGE_WORDS)
            .saturating_mul(PAGE_WORDS)
    }

    /// First word of `bank` in the banks' memory.
    pub fn bank(&self, bank: usize) -> usize {
        self.bank_words().saturating_mul(bank)
    }

    /// Words of the banks' memory.
    pub fn banks_words(&self) -> usize {
        self.bank(self.banks)
    }

    /// Bytes from one request slot to the next.
    pub const fn slot_bytes(&self) -> usize {
        SLOT_PAYLOAD_OFFSET.saturating_add(self.slot_payload_bytes)
    }

    /// Bytes of the slots' memory.
    pub const fn slots_bytes(&self) -> usize {
        self.slot_bytes().saturating_mul(self.slots)
    }

    /// Words of a snapshot's states.
    pub fn states_words(&self) -> usize {
        states::WORDS.saturating_add(count(self.geometry.block_count().0.div_ceil(32)))
    }

    /// Words of one bitmap in a snapshot's wanted memory.
    pub fn wanted_bit_words(&self) -> usize {
        words_of(self.geometry.block_count().0)
    }

    /// First word of bitmap 0 (wanted before the swap) or 1 (changed before the swap) in the wanted memory.
    pub fn wanted(&self, bitmap: usize) -> usize {
        self.wanted_bit_words().saturating_mul(bitmap)
    }

    /// Words of a snapshot's wanted memory.
    pub fn wanted_words(&self) -> usize {
        self.wanted(2)
    }

    /// The constant words of the control head, as (index, value), magic last.
    pub fn head(&self) -> [(usize, u64); 12] {
        let g = &self.geometry;
        let shift = |bytes: u32| u64::from(bytes.trailing_zeros());
        let sizes = u64::from(g.block_size().shift())
            | u64::from(g.grain().shift()) << 8
            | shift(g.logical_sector_bytes()) << 16
            | shift(g.physical_sector_bytes()) << 24;
        [
            (control::VERSION, VERSION),
            (control::CONTROL_WORDS, wide(self.control_words())),
            (control::VOLUME_BYTES, g.volume_bytes()),
            (control::SIZES, sizes),
            (control::QUEUES, wide(self.queues)),
            (control::SLOTS, wide(self.slots)),
            (control::SLOT_PAYLOAD_BYTES, wide(self.slot_payload_bytes)),
            (control::BANKS, wide(self.banks)),
            (control::GENERATIONS, wide(self.generations)),
            (control::HINTS, wide(self.hints)),
            (control::LOG_BYTES, wide(self.log_bytes)),
            (control::MAGIC, MAGIC),
        ]
    }

    /// The shape that a control head declares, or what is wrong with it.
    ///
    /// `word` gives the words of the head. Nothing is believed unchecked: every number has a bound.
    pub fn of_head(word: impl Fn(usize) -> u64) -> Result<Self, SharedError> {
        if word(control::MAGIC) != MAGIC {
            return Err(SharedError::Magic {
                found: word(control::MAGIC),
            });
        }
        let (version, incompat) = (word(control::VERSION), word(control::INCOMPAT));
        if version != VERSION || incompat != 0 {
            return Err(SharedError::Version { version, incompat });
        }
        let sizes = word(control::SIZES).to_le_bytes();
        let size = |i: usize| sizes.get(i).copied().unwrap_or(0);
        let sector = |i| 1_u32.checked_shl(u32::from(size(i))).unwrap_or(0);
        let geometry = BlockSize::from_shift(size(0))
            .zip(BlockSize::from_shift(size(1)))
            .filter(|_| word(control::SIZES) >> 32 == 0)
            .and_then(|(block, grain)| {
                let bytes = word(control::VOLUME_BYTES);
                Geometry::new(bytes, block, grain, sector(2), sector(3))
            })
            .ok_or(SharedError::Head {
                index: control::SIZES,
            })?;
        let bounded = |index: usize, max: usize| {
            let value = count(word(index));
            if value == 0 || value > max {
                Err(SharedError::Head { index })
            } else {
                Ok(value)
            }
        };
        let shape = Self {
            geometry,
            queues: bounded(control::QUEUES, 64)?,
            slots: bounded(control::SLOTS, 4096)?,
            slot_payload_bytes: bounded(control::SLOT_PAYLOAD_BYTES, 4 << 20)?,
            banks: bounded(control::BANKS, 64)?,
            generations: bounded(control::GENERATIONS, 1024)?,
            hints: bounded(control::HINTS, 64)?,
            log_bytes: bounded(control::LOG_BYTES, 16 << 20)?,
        };
        if word(control::CONTROL_WORDS) == wide(shape.control_words()) {
            Ok(shape)
        } else {
            Err(SharedError::Head {
                index: control::CONTROL_WORDS,
            })
        }
    }
}

/// Sum over a table's count and the words of its entries: shows memory that is not a table.
pub fn table_sum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
        (sum ^ word)
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(29)
    })
}

/// What is wrong with a shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SharedError {
    /// It is not ours, or was never finished.
    #[error("the memory does not begin with our magic but with {found:#x}")]
    Magic {
        /// The first word.
        found: u64,
    },
    /// Another build's layout: nothing was touched.
    #[error(
        "the memory has layout {version} with features {incompat:#x}; this build knows layout {VERSION}"
    )]
    Version {
        /// Its version.
        version: u64,
        /// Its incompatible features.
        incompat: u64,
    },
    /// A number of the head cannot be.
    #[error("word {index} of the memory's head cannot be right")]
    Head {
        /// Index of the word.
        index: usize,
    },
}

mod watched;

pub use watched::WatchShape;

fn words_of(bits: u64) -> usize {
    count(bits.div_ceil(64))
}

fn count(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
