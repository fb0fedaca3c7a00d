//! One snapshot: what is wanted, what a writer to it must do, what its reader sees (P1, P8, P10).
//!
//! **Invariant**: wanted only shrinks. At the instant it is (wanted before the swap ∪ marked in the bank that the
//! swap closed); neither changes afterwards. Both sides ask the two bitmaps in turn, so nothing in a hold is
//! proportional to the volume.

use crate::atomic::{Memory, Ordering, Words, fence};
use crate::error::EngineError;
use crate::state::{Found, Readers, Revocation, SlotIndex, States, Writers};
use crate::tracker::{any_bit, block_marked, marked_blocks};
use blktide_format::shared::{self, Shape};
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::RevokeCause;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use core::any::Any;
use core::fmt;
use core::time::Duration;
use std::sync::Arc;

/// What happens when an original must be preserved and the save area is full (P8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The snapshot is revoked; no writer waits.
    GiveUp,
    /// The writer waits, for `wait_limit` at most; then the snapshot is revoked.
    Wait,
}

/// What only the volume knows of a save area (its descriptor); the engine passes it on.
pub type SaveArea = Arc<dyn Any + Send + Sync>;

/// A snapshot as the server's queues see it.
pub struct Snapshot {
    pub(crate) id: SnapshotId,
    pub(crate) sequence: u64,
    pub(crate) writers: Writers,
    pub(crate) before: Words,
    pub(crate) closed: Words,
    pub(crate) geometry: Geometry,
    pub(crate) overflow: Overflow,
    pub(crate) wait_limit: Duration,
    pub(crate) save_area: SaveArea,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot({}, number {})", self.id, self.sequence)
    }
}

impl Snapshot {
    /// Its id.
    pub const fn id(&self) -> SnapshotId {
        self.id
    }

    /// Its number: counted up within a life of the control memory.
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// What the volume handed over with it.
    pub const fn save_area(&self) -> &SaveArea {
        &self.save_area
    }

    /// Whether `block` was wanted at the instant.
    pub fn wants(&self, block: BlockIndex) -> bool {
        any_bit(self.before.all(), block.0, block.0.saturating_add(1))
            || block_marked(&self.geometry, self.closed.all(), block)
    }

    /// Revokes it; see [`Revocation::revoke`].
    pub fn revoke(&self, cause: RevokeCause) -> bool {
        self.writers.revocation.revoke(cause)
    }

    /// Why it is revoked, if it is.
    pub fn revoked(&self) -> Option<RevokeCause> {
        self.writers.revocation.cause()
    }

    /// The first block of `range` that may still have to be preserved.
    pub(crate) fn first_unfinished(&self, range: BlockRange) -> Option<BlockIndex> {
        use crate::state::State;
        range.blocks().find(|b| {
            self.wants(*b)
                && matches!(
                    self.writers.states.look(*b, Ordering::Relaxed),
                    State::Wanted | State::Preserving
                )
        })
    }
}

/// What a snapshot's asker is told of it, and sends to whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Its id.
    pub id: SnapshotId,
    /// Its number.
    pub sequence: u64,
    /// The generation that opened at the instant: what the image records.
    pub opened: GenerationName,
    /// Number of that generation, for people.
    pub counter: u64,
    /// The bank that the instant closed.
    pub closed_bank: usize,
    /// Whether the base was known, so that `changed` says something.
    pub base_resolved: bool,
    /// How long nobody got inside.
    pub held: Duration,
}

/// The memories of a snapshot, as mapped by its reader.
#[derive(Clone, Debug)]
pub struct ReaderMemories {
    /// Control memory, read-only.
    pub control: Arc<dyn Memory>,
    /// Banks, read-only.
    pub banks: Arc<dyn Memory>,
    /// States, to be written to.
    pub states: Arc<dyn Memory>,
    /// Slot index, read-only.
    pub index: Arc<dyn Memory>,
    /// The two bitmaps from before the swap, read-only.
    pub wanted: Arc<dyn Memory>,
}

/// A snapshot as its reader sees it.
///
/// A reader that was once told [`Found::Revoked`] has given up for good: it must not commit, whatever it sees later.
#[derive(Debug)]
pub struct SnapshotView {
    readers: Readers,
    wanted: BlockSet,
    changed: Option<BlockSet>,
}

impl SnapshotView {
    /// The view of a snapshot that has begun. Waits: in proportion to the volume (two bitmaps are copied).
    ///
    /// Errors: it was revoked meanwhile, so the bank that the instant closed may be another generation's by now.
    pub fn open(
        shape: &Shape,
        memories: &ReaderMemories,
        begun: &Begun,
        save_slots: u32,
    ) -> Result<Self, EngineError> {
        let geometry = &shape.geometry;
        let (blocks, bits) = (geometry.block_count(), shape.wanted_bit_words());
        let closed = Words::new(
            &memories.banks,
            shape.bank(begun.closed_bank),
            shape.bank_bit_words(),
        )?;
        let closed = marked_blocks(geometry, closed.all());
        let set = |bitmap| -> Result<BlockSet, EngineError> {
            let words = Words::new(&memories.wanted, shape.wanted(bitmap), bits)?;
            let words = words.all().iter().map(|w| w.load(Ordering::Relaxed));
            let mut set = BlockSet::from_words(blocks, words);
            set.union_with(&closed);
            Ok(set)
        };
        let view = Self {
            readers: Readers {
                states: States::new(&memories.states, blocks)?,
                slots: SlotIndex::new(&memories.index, save_slots)?,
                revocation: Revocation::new(&memories.control, begun.sequence)?,
            },
            wanted: set(0)?,
            changed: if begun.base_resolved {
                Some(set(1)?)
            } else {
                None
            },
        };
        // A bank is used again only after its snapshot was revoked or has ended: who has read what came later sees why.
        fence(Ordering::SeqCst);
        match view.readers.revocation.cause() {
            Some(cause) => Err(EngineError::Revoked { cause }),
            None => Ok(view),
        }
    }

    /// The blocks to take.
    pub const fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    /// What changed since the base; `None` without one.
    pub const fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    /// The states, for [`Readers::take`] and [`Readers::take_copy`]; used by several threads at once.
    pub const fn readers(&self) -> &Readers {
        &self.readers
    }

    /// Drops what is in `set` from what is wanted, in one pass (P10). There is no way to add.
    pub fn shrink(&mut self, set: &BlockSet) {
        let mut dropped = set.clone();
        // Only what is wanted: the rest counts as done already, and stays as it is.
        let mut others = BlockSet::full(self.wanted.len());
        others.subtract(&self.wanted);
        dropped.subtract(&others);
        for block in dropped.blocks() {
            self.readers.drop_block(block);
        }
        self.wanted.subtract(&dropped);
        self.readers.states.renew();
    }

    /// Whether each wanted block is done: then, if nothing was revoked on the way, the image may be committed.
    pub fn complete(&self) -> Result<bool, RevokeCause> {
        self.readers.complete(self.wanted.blocks())
    }

    /// Takes a block whose bytes were just read from the device; see [`Readers::take`]. One that is not wanted is `Gone`:
    /// nobody preserves it, so what was read may be of any instant.
    pub fn take(&self, block: BlockIndex) -> Found {
        if self.wanted.contains(block) {
            self.readers.take(block)
        } else {
            Found::Gone
        }
    }
}

/// Writes the heads of a fresh snapshot's memories.
pub(crate) fn write_heads(
    states: &Arc<dyn Memory>,
    slots: (&Arc<dyn Memory>, u32),
    sequence: u64,
    blocks: u64,
) -> Result<(), EngineError> {
    use shared::{index as i, states as s};
    let head = Words::new(states, 0, s::WORDS)?;
    for (word, value) in [
        (s::MAGIC, shared::MAGIC),
        (s::VERSION, shared::VERSION),
        (s::SEQUENCE, sequence),
        (s::BLOCKS, blocks),
    ] {
        head.store(word, value, Ordering::Relaxed);
    }
    let head = Words::new(slots.0, 0, i::WORDS)?;
    for (word, value) in [
        (i::MAGIC, shared::MAGIC),
        (i::VERSION, shared::VERSION),
        (i::SEQUENCE, sequence),
        (i::SLOTS, u64::from(slots.1)),
    ] {
        head.store(word, value, Ordering::Relaxed);
    }
    Ok(())
}

/// Fills a bitmap of the wanted memory.
pub(crate) fn fill(words: &Words, from: impl Iterator<Item = u64>) {
    for (i, value) in from.enumerate().take(words.all().len()) {
        words.store(i, value, Ordering::Relaxed);
    }
}
