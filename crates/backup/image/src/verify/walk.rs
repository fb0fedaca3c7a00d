//! Going through an image's tree: pages here, frames by several workers.

use super::{Damage, Depth, Search, lock, packs};
use crate::error::ImageError;
use crate::reader::blocks::{FrameOf, frames_of};
use crate::reader::fetch::{self, Found, Wanted};
use crate::reader::{ImageReader, Page};
use blktide_format::entry::{EntryKind, FAN_OUT, Place};
use blktide_format::page::{Child, Leaf};
use blktide_repo::name;
use blktide_types::id::ObjectId;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Raw bytes that are handed to a worker at once.
const BATCH_BYTES: u64 = 2 << 20;

/// Which session an object was made by: what its packs' ids begin with.
pub(super) type SessionPart = [u8; 12];

pub(super) fn session_of(object: ObjectId) -> SessionPart {
    let mut part = [0; 12];
    for (to, from) in part.iter_mut().zip(object.0) {
        *to = from;
    }
    part
}

/// Looks at the pages of an image, and at the data if asked for, but not at what `seen` sessions wrote: their own images
/// have shown it. `is_counted`: all pages are read, and the pack table must have the right counts.
pub(super) fn image(
    search: &Search<'_>,
    reader: &ImageReader,
    seen: &BTreeSet<SessionPart>,
    is_counted: bool,
) {
    let (send, receive) = sync_channel(search.threads.saturating_mul(2));
    let receive = Mutex::new(receive);
    std::thread::scope(|scope| {
        // A search by one thread needs no other.
        let workers = if search.threads > 1 {
            search.threads
        } else {
            0
        };
        for _ in 0..workers {
            scope.spawn(|| worker(search, reader, &receive));
        }
        let mut walk = Walk {
            search,
            reader,
            seen,
            is_counted,
            uses: BTreeMap::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            send,
        };
        walk.run();
    });
}

struct Walk<'a, 'b> {
    search: &'a Search<'b>,
    reader: &'a ImageReader,
    seen: &'a BTreeSet<SessionPart>,
    is_counted: bool,
    uses: BTreeMap<ObjectId, (u32, u32)>,
    batch: Vec<FrameOf>,
    batch_bytes: u64,
    send: SyncSender<Vec<FrameOf>>,
}

impl Walk<'_, '_> {
    fn run(&mut self) {
        let mut is_whole = true;
        let mut todo = vec![(self.reader.root_level(), 0_u64, *self.reader.root())];
        while let Some((level, index, child)) = todo.pop() {
            let Child::Page { place, .. } = child else {
                continue;
            };
            if self.search.is_ended() {
                return;
            }
            let is_seen = self.seen.contains(&session_of(place.pack));
            if is_seen && !self.is_counted {
                continue;
            }
            self.uses.entry(place.pack).or_default().1 += 1;
            match self.page(level, index, &child, is_seen) {
                Ok(Page::Inner(inner)) => {
                    let first = index.saturating_mul(FAN_OUT);
                    // The first child is looked at first: packs are mostly in that order.
                    for (n, child) in inner.children.iter().enumerate().rev() {
                        let n = u64::try_from(n).unwrap_or(0);
                        let below = first.saturating_add(n);
                        todo.push((level.saturating_sub(1), below, *child));
                    }
                }
                Ok(Page::Leaf(leaf)) => self.leaf(&leaf),
                Err(e) => {
                    is_whole = false;
                    self.search.spoil(place.pack, place.offset_bytes, &e);
                }
            }
        }
        self.send_batch();
        if is_whole && self.is_counted {
            self.compare_counts();
        }
    }

    fn page(
        &self,
        level: u8,
        index: u64,
        child: &Child,
        is_seen: bool,
    ) -> Result<Page, ImageError> {
        let Child::Page { place, .. } = child else {
            return Err(ImageError::Misuse("the page of a constant"));
        };
        let range = self.reader.span(level, index);
        let wanted = Wanted::page(level, range, place);
        let mut result = Err(ImageError::Misuse("no page"));
        fetch::many(self.reader, &[wanted], range, &mut |_, found| {
            result = found.and_then(|found| {
                if !is_seen {
                    looked_at(self.search, self.reader, place, &found);
                }
                self.reader.page_of(level, index, child, found.payload)
            });
        });
        result
    }

    fn leaf(&mut self, leaf: &Leaf) {
        for frame in &leaf.frames {
            self.uses.entry(frame.pack).or_default().0 += 1;
        }
        if self.search.depth == Depth::Structure {
            return;
        }
        let end = leaf.first_block.saturating_add(FAN_OUT);
        let all = BlockRange::new(BlockIndex(leaf.first_block), BlockIndex(end));
        let frames = frames_of(leaf, all.unwrap_or(BlockRange::first()));
        for frame in frames {
            let place = &frame.wanted.place;
            if !self.seen.contains(&session_of(place.pack)) {
                let raw = u64::from(place.raw_bytes);
                self.batch_bytes = self.batch_bytes.saturating_add(raw);
                self.batch.push(frame);
            }
        }
        if self.batch_bytes >= BATCH_BYTES {
            self.send_batch();
        }
    }

    fn send_batch(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if self.search.threads == 1 {
            frames(self.search, self.reader, &mut batch);
            return;
        }
        // Workers end only when this end is dropped: a batch that nobody takes cannot be.
        if !batch.is_empty() && self.send.send(batch).is_err() {
            self.search
                .is_ended
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn compare_counts(&self) {
        let head = self.reader.head();
        let rows = self.reader.packs().unwrap_or_default();
        let table: BTreeMap<ObjectId, (u32, u32)> =
            rows.iter().map(|r| (r.pack, (r.frames, r.pages))).collect();
        if table != self.uses {
            let wrong = blktide_format::FormatError::Identity { field: "use count" };
            let object = self
                .search
                .repository
                .manifest_name(head.volume, head.sequence);
            self.search
                .note_object(Some(head.volume), Some(head.sequence), object, &wrong);
        }
    }
}

fn worker(search: &Search<'_>, reader: &ImageReader, batches: &Mutex<Receiver<Vec<FrameOf>>>) {
    loop {
        // The lock is held while waiting: whoever waits for it would wait for a batch as well.
        let batch = lock(batches).recv();
        let Ok(mut batch) = batch else {
            return;
        };
        if !search.is_ended() {
            frames(search, reader, &mut batch);
        }
    }
}

fn frames(search: &Search<'_>, reader: &ImageReader, batch: &mut [FrameOf]) {
    batch.sort_unstable_by_key(|f| (f.wanted.place.pack, f.wanted.place.offset_bytes));
    let wanted: Vec<Wanted> = batch.iter().map(|f| f.wanted).collect();
    fetch::many(reader, &wanted, BlockRange::first(), &mut |i, found| {
        let Some(frame) = batch.get(i) else {
            return;
        };
        let place = &frame.wanted.place;
        match found {
            Ok(found) => {
                if let Err(e) = check_frame(reader, frame, &found) {
                    search.spoil(place.pack, place.offset_bytes, &e);
                }
                looked_at(search, reader, place, &found);
            }
            Err(e) => search.spoil(place.pack, place.offset_bytes, &e),
        }
    });
}

/// Every block of a frame by its digest, and that the frame's header names these blocks.
fn check_frame(reader: &ImageReader, frame: &FrameOf, found: &Found<'_>) -> Result<(), ImageError> {
    let damaged = |what| ImageError::Damaged {
        range: BlockRange::first(),
        object: name::pack(reader.head().volume, frame.wanted.place.pack),
        what,
        source: None,
    };
    let EntryKind::Frame { blocks } = found.facts.kind else {
        return Err(damaged("a page where a frame was meant"));
    };
    for slot in &frame.slots {
        let bit = 1_u64 << (slot.block.0 % FAN_OUT);
        let position = (blocks & bit.wrapping_sub(1)).count_ones();
        if blocks & bit == 0 || position != u32::from(slot.position) {
            return Err(damaged("a frame that names other blocks"));
        }
    }
    let mut result = Ok(());
    reader.take_blocks(frame, found, &mut |_, bytes| {
        if let (Err(error), true) = (bytes, result.is_ok()) {
            result = Err(error.unwrap_or(damaged("a block")));
        }
    });
    result
}

fn looked_at(search: &Search<'_>, reader: &ImageReader, place: &Place, found: &Found<'_>) {
    let start = u64::from(place.offset_bytes);
    let bytes = place.end_bytes().saturating_sub(start);
    search.count(bytes);
    if search.depth == Depth::Data {
        let done = search
            .packs
            .looked_at(place.pack, place.offset_bytes, found.header, bytes);
        if let Some((row, headers)) = done {
            packs::complete(search, reader.head().volume, &row, &headers);
        }
    }
}

/// Finds the blocks of an image that are lost by what was found to be bad. Reads pages only.
pub(super) fn attribute(search: &Search<'_>, reader: &ImageReader) {
    let bad = lock(&search.bad).clone();
    let head = reader.head();
    let mut todo = vec![(reader.root_level(), 0_u64, *reader.root())];
    let note = |range: BlockRange, (object, what): &(String, String)| {
        lock(&search.damage).push(Damage {
            volume: Some(head.volume),
            sequence: Some(head.sequence),
            range: Some(range),
            object: object.clone(),
            what: what.clone(),
        });
    };
    while let Some((level, index, child)) = todo.pop() {
        let Child::Page { place, .. } = child else {
            continue;
        };
        if let Some(why) = bad.get(&(place.pack, place.offset_bytes)) {
            note(reader.span(level, index), why);
            continue;
        }
        match reader.page(level, index, &child) {
            Ok(Page::Inner(inner)) => {
                let first = index.saturating_mul(FAN_OUT);
                for (below, child) in (first..).zip(&inner.children) {
                    todo.push((level.saturating_sub(1), below, *child));
                }
            }
            Ok(Page::Leaf(leaf)) => {
                for frame in frames_of(&leaf, reader.span(0, index)) {
                    let at = (frame.wanted.place.pack, frame.wanted.place.offset_bytes);
                    let Some(why) = bad.get(&at) else {
                        continue;
                    };
                    for slot in &frame.slots {
                        let next = BlockIndex(slot.block.0.saturating_add(1));
                        if let Some(range) = BlockRange::new(slot.block, next) {
                            note(range, why);
                        }
                    }
                }
            }
            Err(e) => search.note(
                Some(head.volume),
                Some(head.sequence),
                Some(reader.span(level, index)),
                &e,
            ),
        }
    }
}
