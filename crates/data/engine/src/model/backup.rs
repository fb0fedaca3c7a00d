//! A backup as the model drives it: two workers read the snapshot by P1, from both ends.

use super::server::{Area, Memories};
use crate::atomic::Memory;
use crate::control::{Prepared, SnapshotMemories};
use crate::gate::Hold;
use crate::snapshot::{Begun, ReaderMemories, SnapshotView};
use crate::state::{Found, SlotIndex};
use blktide_format::shared::Shape;
use blktide_testkit::disk::{Node, SimDisk};
use blktide_types::id::GenerationName;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;

/// A committed image: what it holds of each block.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) name: GenerationName,
    pub(super) blocks: Vec<Option<Vec<u8>>>,
    /// Something since made the tracker forget: it need not know the name any more.
    pub(super) forgotten: bool,
    /// Number of the swap that was its instant.
    pub(super) swap: u64,
}

/// What a worker is about.
#[derive(Clone, Debug)]
enum Worker {
    Next,
    Read(BlockIndex, Vec<u8>),
    Copied(BlockIndex, Vec<u8>),
}

pub(super) struct Backup {
    pub(super) repository: usize,
    pub(super) base: Option<Image>,
    pub(super) prepared: Option<Prepared>,
    pub(super) hold: Option<Hold>,
    pub(super) living: Option<Living>,
    /// The tracker forgot its names since.
    pub(super) forgotten: bool,
    memories: SnapshotMemories,
}

/// A snapshot that has begun.
pub(super) struct Living {
    pub(super) begun: Begun,
    pub(super) view: SnapshotView,
    pub(super) gave_up: bool,
    pub(super) shrunk: BlockSet,
    taken: Vec<Option<Vec<u8>>>,
    order: [Vec<BlockIndex>; 2],
    workers: [Worker; 2],
}

impl Backup {
    pub(super) fn new(
        repository: usize,
        base: Option<Image>,
        prepared: Prepared,
        memories: SnapshotMemories,
    ) -> Self {
        Self {
            repository,
            base,
            prepared: Some(prepared),
            hold: None,
            living: None,
            forgotten: false,
            memories,
        }
    }

    /// The snapshot has begun.
    pub(super) fn begin(&mut self, shape: &Shape, begun: Begun, tracker: &Memories) {
        let memories = ReaderMemories {
            control: Arc::clone(&tracker.0),
            banks: Arc::clone(&tracker.1),
            states: Arc::clone(&self.memories.states),
            index: Arc::clone(&self.memories.index),
            wanted: Arc::clone(&self.memories.wanted),
        };
        let view = SnapshotView::open(shape, &memories, &begun, self.memories.save_slots).unwrap();
        let up: Vec<_> = view.wanted().blocks().collect();
        let down = up.iter().rev().copied().collect();
        let blocks = shape.geometry.block_count();
        self.prepared = None;
        self.hold = None;
        self.living = Some(Living {
            begun,
            view,
            gave_up: false,
            shrunk: BlockSet::new(blocks),
            taken: vec![None; usize::try_from(blocks.0).unwrap()],
            order: [down, up],
            workers: [Worker::Next, Worker::Next],
        });
    }

    pub(super) fn area(&self) -> &Area {
        self.memories.save_area.downcast_ref().unwrap()
    }
}

impl Living {
    /// Worker `n` goes one step further; an error is a violation.
    pub(super) fn work(
        &mut self,
        n: usize,
        shape: &Shape,
        area: &Area,
        disk: (&SimDisk, Node),
    ) -> Result<(), String> {
        if self.gave_up {
            return Ok(());
        }
        let geometry = &shape.geometry;
        match std::mem::replace(&mut self.workers[n], Worker::Next) {
            Worker::Next => {
                if let Some(block) = self.order[n].pop()
                    && self.view.wanted().contains(block)
                {
                    let len = usize::try_from(geometry.block_bytes(block)).unwrap();
                    let mut bytes = vec![0; len];
                    disk.0
                        .read_at(disk.1, geometry.block_start(block), &mut bytes)
                        .unwrap();
                    self.workers[n] = Worker::Read(block, bytes);
                }
                Ok(())
            }
            Worker::Read(block, bytes) => match self.view.take(block) {
                Found::Taken => self.keep(block, bytes),
                Found::Gone => Ok(()),
                Found::Revoked(_) => {
                    self.gave_up = true;
                    Ok(())
                }
                Found::Preserved => {
                    let slot = self.view.readers().slots.slot_of(block);
                    // Another worker may have taken it meanwhile, and the slot may be another block's.
                    let Some(slot) = slot else { return Ok(()) };
                    let size = geometry.block_size().bytes_usize();
                    let start = usize::try_from(slot.0).unwrap() * size;
                    let copy = area.lock().unwrap()[start..start + bytes.len()].to_vec();
                    self.workers[n] = Worker::Copied(block, copy);
                    Ok(())
                }
            },
            Worker::Copied(block, copy) => match self.view.readers().take_copy(block) {
                Found::Taken => self.keep(block, copy),
                Found::Gone | Found::Preserved => Ok(()),
                Found::Revoked(_) => {
                    self.gave_up = true;
                    Ok(())
                }
            },
        }
    }

    /// Drops a block from what is wanted, if nobody has taken it.
    pub(super) fn shrink(&mut self, block: BlockIndex) {
        let mut set = BlockSet::new(self.view.wanted().len());
        let index = usize::try_from(block.0).unwrap();
        if self.view.wanted().contains(block) && self.taken[index].is_none() {
            set.insert(block);
            self.shrunk.insert(block);
            self.view.shrink(&set);
        }
    }

    /// Whether there is nothing left to try.
    pub(super) fn is_through(&self) -> bool {
        self.gave_up
            || self.order.iter().all(Vec::is_empty)
                && self.workers.iter().all(|w| matches!(w, Worker::Next))
    }

    /// The image, over what its base has; `None` for a block that is absent.
    pub(super) fn image(&self, base: Option<&Image>) -> Image {
        let blocks = (0_u64..)
            .zip(&self.taken)
            .map(|(i, taken)| {
                let index = usize::try_from(i).unwrap();
                match taken {
                    Some(bytes) => Some(bytes.clone()),
                    None if self.shrunk.contains(BlockIndex(i)) => None,
                    None => base.and_then(|b| b.blocks[index].clone()),
                }
            })
            .collect();
        Image {
            name: self.begun.opened,
            blocks,
            forgotten: false,
            swap: 0,
        }
    }

    fn keep(&mut self, block: BlockIndex, bytes: Vec<u8>) -> Result<(), String> {
        let place = &mut self.taken[usize::try_from(block.0).unwrap()];
        if place.is_some() || self.shrunk.contains(block) {
            return Err(format!("{block} was taken twice"));
        }
        *place = Some(bytes);
        Ok(())
    }
}

/// Fresh memories for a snapshot.
pub(super) fn memories(shape: &Shape, save_slots: u32) -> SnapshotMemories {
    let bytes = shape.geometry.block_size().bytes_usize() * usize::try_from(save_slots).unwrap();
    let plain = |words| -> Arc<dyn Memory> { crate::PlainMemory::new(words) };
    SnapshotMemories {
        states: plain(shape.states_words()),
        index: plain(SlotIndex::words(save_slots)),
        wanted: plain(shape.wanted_words()),
        save_slots,
        save_area: Arc::new(Area::new(vec![0xee; bytes])),
    }
}
