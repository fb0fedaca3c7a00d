//! The tree while it grows: leaves fill up, a full one becomes a page, a node whose children are all there becomes one, too.
//!
//! ```text
//!   begun ──all wanted blocks recorded──▶ merged with the base's ──▶ constant, the base's own page, or a new page ──▶ parent
//! ```
//! **Invariant**: a page is written once, after all below it; use counts change exactly as references do.

use super::WantedWords;
use super::wanted::Touched;
use crate::digest::{self, Digests};
use crate::error::ImageError;
use crate::reader::{ImageReader, LeafNode, Page, span};
use blktide_format::entry::{Codec, EntryKind, FAN_OUT, Place};
use blktide_format::manifest::KindCounts;
use blktide_format::page::{BlockKind, Child, Inner, Leaf, LeafBlock, child_span, root_level};
use blktide_repo::{NewEntry, RepoError, Session};
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, ObjectId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A block as it was put.
#[derive(Clone, Copy, Debug)]
pub(super) enum New {
    /// Without content.
    Constant(BlockKind),
    /// In one of the frames that come with it.
    Data { digest: Digest, frame: u8, slot: u8 },
}

/// Blocks of one leaf as they were put.
#[derive(Debug, Default)]
pub(super) struct LeafPart {
    /// Which block of the leaf, and what it is.
    pub(super) blocks: Vec<(u8, New)>,
    /// The frames of those with content.
    pub(super) frames: Vec<Place>,
}

impl From<New> for LeafBlock {
    fn from(new: New) -> Self {
        match new {
            New::Constant(kind) => Self::Constant(kind),
            New::Data {
                digest,
                frame,
                slot,
            } => Self::Data {
                digest,
                frame,
                slot,
            },
        }
    }
}

impl From<LeafBlock> for New {
    fn from(block: LeafBlock) -> Self {
        match block {
            LeafBlock::Constant(kind) => Self::Constant(kind),
            LeafBlock::Data {
                digest,
                frame,
                slot,
            } => Self::Data {
                digest,
                frame,
                slot,
            },
        }
    }
}

/// How an image's use of a pack differs from its base's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct UseChange {
    pub(super) frames: i64,
    pub(super) pages: i64,
}

/// What the tree has become.
pub(super) struct Finished {
    pub(super) root: Child,
    pub(super) uses: BTreeMap<ObjectId, UseChange>,
    pub(super) kinds: KindCounts,
}

pub(super) struct Tree {
    geometry: Geometry,
    base: Option<Arc<ImageReader>>,
    wanted: WantedWords,
    touched: Touched,
    state: Mutex<State>,
}

struct State {
    leaves: BTreeMap<u64, PendingLeaf>,
    nodes: BTreeMap<(u8, u64), PendingNode>,
    root: Option<Child>,
    uses: BTreeMap<ObjectId, UseChange>,
    kinds: KindCounts,
    recorded: u64,
    is_failed: bool,
}

/// A leaf of which blocks are missing.
#[derive(Default)]
struct PendingLeaf {
    taken: u64,
    recorded: u64,
    blocks: Vec<(u8, New)>,
    /// The frames of `blocks`, of all calls one after another.
    frames: Vec<Place>,
}

/// A node of which children are missing.
#[derive(Default)]
struct PendingNode {
    recorded: u64,
    children: Vec<(u8, Child)>,
}

/// References that come and go by one node, gathered outside the lock.
#[derive(Default)]
struct Changes {
    uses: BTreeMap<ObjectId, UseChange>,
    kinds_lost: KindCounts,
    kinds_won: KindCounts,
}

impl Changes {
    fn frames(&mut self, places: &[Place], by: i64) {
        for place in places {
            let entry = self.uses.entry(place.pack).or_default();
            entry.frames = entry.frames.saturating_add(by);
        }
    }

    fn page(&mut self, child: &Child, by: i64) {
        if let Child::Page { place, .. } = child {
            let entry = self.uses.entry(place.pack).or_default();
            entry.pages = entry.pages.saturating_add(by);
        }
    }
}

impl Tree {
    pub(super) fn new(
        geometry: Geometry,
        base: Option<Arc<ImageReader>>,
        wanted: WantedWords,
    ) -> Self {
        let blocks = geometry.block_count().0;
        let touched = Touched::new(blocks.div_ceil(FAN_OUT), root_level(blocks), &wanted);
        let untouched = match &base {
            Some(base) => *base.root(),
            None => Child::Constant(BlockKind::Absent),
        };
        let kinds = base.as_ref().map_or_else(
            || KindCounts {
                absent: blocks,
                ..KindCounts::default()
            },
            |base| base.head().kinds,
        );
        let state = State {
            leaves: BTreeMap::new(),
            nodes: BTreeMap::new(),
            root: (touched.blocks == 0).then_some(untouched),
            uses: BTreeMap::new(),
            kinds,
            recorded: 0,
            is_failed: false,
        };
        Self {
            geometry,
            base,
            wanted,
            touched,
            state: Mutex::new(state),
        }
    }

    /// Number of leaves.
    pub(super) fn leaves(&self) -> u64 {
        self.geometry.block_count().0.div_ceil(FAN_OUT)
    }

    /// Nothing can be made of it any more.
    pub(super) fn fail(&self) {
        self.lock().is_failed = true;
    }

    /// Of `mask`, the blocks of `leaf` that are wanted and were not taken before; they are taken now.
    pub(super) fn take(&self, leaf: u64, mask: u64) -> u64 {
        let wanted = if leaf < self.leaves() {
            (self.wanted)(leaf)
        } else {
            0
        };
        if wanted & mask == 0 {
            return 0;
        }
        let mut state = self.lock();
        let root = state.root;
        // A leaf that is complete is not pending any more: all of it was taken.
        if root.is_some() || self.is_complete(&state, leaf) {
            return 0;
        }
        let pending = state.leaves.entry(leaf).or_default();
        let taken = wanted & mask & !pending.taken;
        pending.taken |= taken;
        taken
    }

    /// Records blocks that were taken; writes what is complete by them.
    pub(super) fn record(
        &self,
        session: &Session,
        digests: &Digests,
        leaf: u64,
        part: &LeafPart,
    ) -> Result<(), ImageError> {
        let mut state = self.lock();
        if state.is_failed {
            return Err(RepoError::Poisoned.into());
        }
        let Some(pending) = state.leaves.get_mut(&leaf) else {
            return Err(ImageError::Misuse("a leaf that was not taken"));
        };
        let before = u8::try_from(pending.frames.len()).unwrap_or(u8::MAX);
        pending.frames.extend_from_slice(&part.frames);
        for (n, new) in &part.blocks {
            pending.recorded |= 1_u64.checked_shl((*n).into()).unwrap_or(0);
            pending.blocks.push((*n, shifted(new, before)));
        }
        let is_full = pending.recorded == (self.wanted)(leaf);
        let count = u64::try_from(part.blocks.len()).unwrap_or(u64::MAX);
        state.recorded = state.recorded.saturating_add(count);
        if !is_full {
            return Ok(());
        }
        // It stays in `leaves` until its parent knows of it: a second block of it would be refused meanwhile.
        let pending = state.leaves.get_mut(&leaf).map(std::mem::take);
        if let Some(entry) = state.leaves.get_mut(&leaf) {
            entry.taken = u64::MAX;
        }
        drop(state);
        let writer = PageWriter {
            tree: self,
            session,
            digests,
        };
        let (child, changes) = writer.leaf(leaf, &pending.unwrap_or_default())?;
        writer.rise(leaf, child, &changes)
    }

    /// The tree, once all wanted blocks are recorded. Errors: `Incomplete`.
    pub(super) fn finish(&self) -> Result<Finished, ImageError> {
        let state = self.lock();
        if state.is_failed {
            return Err(RepoError::Poisoned.into());
        }
        match state.root {
            Some(root) if state.recorded == self.touched.blocks => Ok(Finished {
                root,
                uses: state.uses.clone(),
                kinds: state.kinds,
            }),
            _ => Err(ImageError::Incomplete {
                missing: self.touched.blocks.saturating_sub(state.recorded),
            }),
        }
    }

    /// Whether leaf `leaf` has been handed to its parent.
    fn is_complete(&self, state: &State, leaf: u64) -> bool {
        let mut index = leaf;
        for level in 1..=root_level(self.geometry.block_count().0) {
            let bit = 1 << (index % FAN_OUT);
            index /= FAN_OUT;
            if let Some(node) = state.nodes.get(&(level, index)) {
                return node.recorded & bit != 0;
            }
            // No node: either nothing of it has come, or all of it has, and then the node above says so.
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes pages.
struct PageWriter<'a> {
    tree: &'a Tree,
    session: &'a Session,
    digests: &'a Digests,
}

impl PageWriter<'_> {
    /// The leaf of what the base has and what is new.
    fn leaf(&self, index: u64, pending: &PendingLeaf) -> Result<(Child, Changes), ImageError> {
        let range = span(&self.tree.geometry, 0, index);
        let (base_child, base) = match &self.tree.base {
            Some(base) => (base.child(0, index)?, base.leaf(index)?),
            None => (
                Child::Constant(BlockKind::Absent),
                LeafNode::Constant(BlockKind::Absent),
            ),
        };
        let mut changes = Changes::default();
        let count = usize::try_from(range.count().0).unwrap_or(0);
        let old = match &base {
            LeafNode::Constant(kind) => vec![LeafBlock::Constant(*kind); count],
            LeafNode::Page(leaf) => {
                changes.frames(&leaf.frames, -1);
                leaf.blocks.clone()
            }
        };
        let old_frames = match &base {
            LeafNode::Constant(_) => &[],
            LeafNode::Page(leaf) => leaf.frames.as_slice(),
        };
        let mut sources: Vec<(LeafBlock, &[Place])> =
            old.iter().map(|b| (*b, old_frames)).collect();
        for (n, new) in &pending.blocks {
            let Some(to) = sources.get_mut(usize::from(*n)) else {
                return Err(ImageError::Misuse("a block past the end"));
            };
            *to = ((*new).into(), &pending.frames);
        }
        let leaf = join(range.start().0, self.shift(), &sources)?;
        for (old, new) in old.iter().zip(&leaf.blocks) {
            add(changes.kinds_lost.of_mut(kind_of(old)));
            add(changes.kinds_won.of_mut(kind_of(new)));
        }
        changes.frames(&leaf.frames, 1);
        changes.page(&base_child, -1);
        let first = leaf.blocks.first().map(kind_of);
        let constant =
            first.filter(|k| *k != BlockKind::Data && leaf.blocks.iter().all(|b| kind_of(b) == *k));
        let child = match (constant, &base) {
            (Some(kind), _) => Child::Constant(kind),
            (None, LeafNode::Page(old)) if **old == leaf => base_child,
            (None, _) => self.page(0, range.start().0, &leaf.content_bytes(), &leaf.encode())?,
        };
        changes.page(&child, 1);
        Ok((child, changes))
    }

    /// Hands a child to its parent, and, if that is complete by it, the parent to its parent, up to the root.
    fn rise(&self, leaf: u64, child: Child, changes: &Changes) -> Result<(), ImageError> {
        let root = root_level(self.tree.geometry.block_count().0);
        let (mut child, mut index) = (child, leaf);
        self.settle(changes);
        for level in 1..=root {
            let slot = u8::try_from(index % FAN_OUT).unwrap_or(u8::MAX);
            let below = index;
            index /= FAN_OUT;
            let mut state = self.tree.lock();
            let node = state.nodes.entry((level, index)).or_default();
            node.recorded |= 1_u64.checked_shl(slot.into()).unwrap_or(0);
            node.children.push((slot, child));
            let is_full = node.recorded == self.tree.touched.children(level, index);
            let children = if is_full {
                std::mem::take(&mut node.children)
            } else {
                Vec::new()
            };
            if level == 1 {
                state.leaves.remove(&below);
            } else {
                state.nodes.remove(&(level.saturating_sub(1), below));
            }
            drop(state);
            if !is_full {
                return Ok(());
            }
            let (made, changes) = self.node(level, index, &children)?;
            self.settle(&changes);
            child = made;
        }
        let mut state = self.tree.lock();
        state.root = Some(child);
        state.nodes.clear();
        state.leaves.clear();
        Ok(())
    }

    /// The inner node of what the base has and what is new.
    fn node(
        &self,
        level: u8,
        index: u64,
        new: &[(u8, Child)],
    ) -> Result<(Child, Changes), ImageError> {
        let range = span(&self.tree.geometry, level, index);
        let count = range.count().0.div_ceil(child_span(level));
        let count = usize::try_from(count).unwrap_or(0);
        let base_child = match &self.tree.base {
            Some(base) => base.child(level, index)?,
            None => Child::Constant(BlockKind::Absent),
        };
        let old = match (&base_child, &self.tree.base) {
            (Child::Page { .. }, Some(base)) => match base.page(level, index, &base_child)? {
                Page::Inner(inner) => Some(inner),
                Page::Leaf(_) => return Err(ImageError::Misuse("a leaf above level 0")),
            },
            _ => None,
        };
        let mut children = match (&old, &base_child) {
            (Some(inner), _) => inner.children.clone(),
            (None, child) => vec![*child; count],
        };
        for (slot, child) in new {
            if let Some(to) = children.get_mut(usize::from(*slot)) {
                *to = *child;
            }
        }
        let mut changes = Changes::default();
        changes.page(&base_child, -1);
        let inner = Inner {
            level,
            first_block: range.start().0,
            block_shift: self.shift(),
            children,
        };
        let child = match (constant_of(&inner.children), &old) {
            (Some(kind), _) => Child::Constant(kind),
            (None, Some(old)) if **old == inner => base_child,
            (None, _) => self.page(
                level,
                range.start().0,
                &inner.content_bytes(),
                &inner.encode(),
            )?,
        };
        changes.page(&child, 1);
        Ok((child, changes))
    }

    /// Appends a page.
    fn page(
        &self,
        level: u8,
        first_block: u64,
        content: &[u8],
        payload: &[u8],
    ) -> Result<Child, ImageError> {
        let raw_bytes = u32::try_from(payload.len())
            .map_err(|_too_long| ImageError::Misuse("a page that is too large"))?;
        let place = self.session.append(&NewEntry {
            kind: EntryKind::Page { level },
            first_block,
            block_shift: self.shift(),
            // Digests do not compress.
            codec: Codec::Raw,
            raw_bytes,
            payload,
        })?;
        Ok(Child::Page {
            content: self.digests.of_content(content),
            physical: digest::of_stored(payload),
            place,
        })
    }

    fn settle(&self, changes: &Changes) {
        let mut state = self.tree.lock();
        for (pack, change) in &changes.uses {
            let entry = state.uses.entry(*pack).or_default();
            entry.frames = entry.frames.saturating_add(change.frames);
            entry.pages = entry.pages.saturating_add(change.pages);
        }
        let (mut lost, mut won) = (changes.kinds_lost, changes.kinds_won);
        for kind in [
            BlockKind::Absent,
            BlockKind::Zero,
            BlockKind::Data,
            BlockKind::Excluded,
            BlockKind::Unreadable,
        ] {
            let count = state.kinds.of_mut(kind);
            *count = count
                .saturating_add(*won.of_mut(kind))
                .saturating_sub(*lost.of_mut(kind));
        }
    }

    const fn shift(&self) -> u8 {
        self.tree.geometry.block_size().shift()
    }
}

/// A leaf of blocks that lie in frames of several lists; frames are numbered in the order of their first block.
pub(super) fn join(
    first_block: u64,
    block_shift: u8,
    sources: &[(LeafBlock, &[Place])],
) -> Result<Leaf, ImageError> {
    let mut frames: Vec<Place> = Vec::new();
    let mut blocks = Vec::with_capacity(sources.len());
    for (block, of) in sources {
        blocks.push(match block {
            LeafBlock::Constant(kind) => LeafBlock::Constant(*kind),
            LeafBlock::Data {
                digest,
                frame,
                slot,
            } => {
                let place = of
                    .get(usize::from(*frame))
                    .ok_or(ImageError::Misuse("a frame that is not there"))?;
                let known = frames.iter().position(|f| f == place);
                let index = known.unwrap_or_else(|| {
                    frames.push(*place);
                    frames.len().saturating_sub(1)
                });
                LeafBlock::Data {
                    digest: *digest,
                    frame: u8::try_from(index).unwrap_or(u8::MAX),
                    slot: *slot,
                }
            }
        });
    }
    Ok(Leaf {
        first_block,
        block_shift,
        blocks,
        frames,
    })
}

/// The kind that all children are of.
fn constant_of(children: &[Child]) -> Option<BlockKind> {
    let Some(Child::Constant(kind)) = children.first() else {
        return None;
    };
    let same = |c: &Child| matches!(c, Child::Constant(k) if k == kind);
    children.iter().all(same).then_some(*kind)
}

const fn kind_of(block: &LeafBlock) -> BlockKind {
    match block {
        LeafBlock::Constant(kind) => *kind,
        LeafBlock::Data { .. } => BlockKind::Data,
    }
}

const fn add(count: &mut u64) {
    *count = count.saturating_add(1);
}

const fn shifted(new: &New, by: u8) -> New {
    match *new {
        New::Constant(kind) => New::Constant(kind),
        New::Data {
            digest,
            frame,
            slot,
        } => New::Data {
            digest,
            frame: frame.saturating_add(by),
            slot,
        },
    }
}
