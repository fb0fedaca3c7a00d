//! A restore: an image becomes the content of a new file or of a device.
//!
//! ```text
//!   head zeroed ─▶ flush ─▶ workers: read ─▶ verify ─▶ decompress ─▶ write, each its own segment ─▶ flush ─▶ head ─▶ flush
//! ```
//! The head is the first 128 KiB, where every file system that we know has the superblock it is recognised by: a restore that
//! was cut off leaves nothing that could be mounted by mistake.
//!
//! Damage does not end a restore: what can be had is written, what cannot reads as zeroes, and is listed.
//!
//! **Invariant**: after a restore without error every byte of the target up to the volume's size is the image's, or zero where
//! the report names the block.

use crate::environment::Environment;
use crate::error::JobError;
use crate::pieces::{Failure, PIECE_BYTES, Pieces, in_parallel};
use crate::running::{Control, Running};
use blktide_format::manifest::ImageHead;
use blktide_image::{BlockKind, ImageError, ImageReader};
use blktide_sys::buffer::AlignedBuffer;
use blktide_types::geometry::Geometry;
use blktide_types::io::BlockWrite;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are written last.
pub const HEAD_BYTES: u64 = 128 << 10;
/// What a worker looks through for blocks with content before it takes the next.
const SEGMENT_BYTES: u64 = 8 * PIECE_BYTES;
/// So many blocks in a row that the repository's storage fails at are no bad sector: it is gone.
const STORE_FAILURES_MAX: u64 = 64;

/// Opens the image, in the job's own thread: the repository may hang.
pub type OpenImage = Box<dyn FnOnce() -> Result<ImageReader, ImageError> + Send>;

/// Reads the target back, for a restore that writes only what differs.
pub trait ReadBack: Send + Sync {
    /// Fills `buf` from `offset_bytes`; both are multiples of the logical sector, `buf` is aligned.
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What the target holds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// Zeroes: a new file, of the volume's size already. What is zero is not written, so the file is sparse.
    Zero,
    /// Anything: a device, a file that existed. What is zero is zeroed.
    Unknown,
}

/// What is to be restored, and where to.
pub struct RestoreRequest {
    /// The image.
    pub image: OpenImage,
    /// Where to; it was checked ([`crate::target::check`]) and is at least as large as the volume.
    pub target: Arc<dyn BlockWrite>,
    /// What it holds.
    pub background: Background,
    /// `--differing-only`: compare with what is there, write what differs.
    pub read_back: Option<Arc<dyn ReadBack>>,
    /// Threads; 0: two more than cores, at least four.
    pub workers: usize,
}

impl core::fmt::Debug for RestoreRequest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("RestoreRequest")
            .field("background", &self.background)
            .field("differing_only", &self.read_back.is_some())
            .finish_non_exhaustive()
    }
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreReport {
    /// The image's facts.
    pub head: ImageHead,
    /// Bytes written with content.
    pub written_bytes: u64,
    /// Bytes zeroed, holes of a new file not counted.
    pub zeroed_bytes: u64,
    /// Bytes that were equal already, where it was compared.
    pub equal_bytes: u64,
    /// Blocks lost to damage of the image, and the first words on it. Not empty: exit code 5.
    pub damaged: Vec<BlockRange>,
    /// What is wrong, for the first of `damaged`.
    pub damage: Option<String>,
    /// Blocks that the device could not read when the image was made.
    pub unreadable: Vec<BlockRange>,
    /// Blocks that the image leaves out: unused or excluded.
    pub absent: Vec<BlockRange>,
}

/// Starts a restore. Waits for nothing.
pub fn start(
    request: RestoreRequest,
    environment: &Environment,
) -> Result<Running<RestoreReport>, JobError> {
    let control = Control::new(
        Arc::clone(&environment.clock),
        environment.on_progress.clone(),
    );
    Running::start("restore", control, move |control| run(request, control))
}

fn run(request: RestoreRequest, control: &Arc<Control>) -> Result<RestoreReport, JobError> {
    let reader = (request.image)()?;
    control.check()?;
    let geometry = reader.geometry();
    control.set_total(geometry.volume_bytes());
    let blocks = geometry.block_count();
    let restore = Restore {
        control,
        reader: &reader,
        geometry,
        target: &*request.target,
        background: request.background,
        read_back: request.read_back.as_deref(),
        head_bytes: HEAD_BYTES.min(geometry.volume_bytes()),
        head_zeroed: Mutex::new(request.background == Background::Zero),
        segments: Pieces::new(blocks.0, SEGMENT_BYTES / geometry.block_size().bytes_u64()),
        store_failures: AtomicU64::new(0),
        tally: Tally::new(blocks),
    };
    if restore.read_back.is_none() {
        restore.zero_head()?;
    }
    in_parallel(request.workers, control, &|failure| restore.work(failure))?;
    restore.flush()?;
    restore.write_head()?;
    restore.flush()?;
    let tally = restore.tally;
    Ok(RestoreReport {
        written_bytes: tally.written_bytes.into_inner(),
        zeroed_bytes: tally.zeroed_bytes.into_inner(),
        equal_bytes: tally.equal_bytes.into_inner(),
        damaged: ranges(tally.damaged),
        damage: tally
            .damage
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner),
        unreadable: ranges(tally.unreadable),
        absent: ranges(tally.absent),
        head: reader.head().clone(),
    })
}

fn ranges(set: Mutex<BlockSet>) -> Vec<BlockRange> {
    set.into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .runs()
        .collect()
}

/// What was done and found.
struct Tally {
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    equal_bytes: AtomicU64,
    damaged: Mutex<BlockSet>,
    damage: Mutex<Option<String>>,
    unreadable: Mutex<BlockSet>,
    absent: Mutex<BlockSet>,
}

impl Tally {
    fn new(blocks: BlockCount) -> Self {
        Self {
            written_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            equal_bytes: AtomicU64::new(0),
            damaged: Mutex::new(BlockSet::new(blocks)),
            damage: Mutex::new(None),
            unreadable: Mutex::new(BlockSet::new(blocks)),
            absent: Mutex::new(BlockSet::new(blocks)),
        }
    }

    fn note(&self, range: BlockRange, kind: BlockKind) {
        let set = match kind {
            BlockKind::Unreadable => &self.unreadable,
            BlockKind::Absent | BlockKind::Excluded => &self.absent,
            BlockKind::Zero | BlockKind::Data => return,
        };
        set.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert_range(range);
    }

    fn note_damage(&self, range: BlockRange, what: &str) {
        self.damaged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert_range(range);
        self.damage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| what.to_owned());
    }
}

/// Which part of the target is written now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Head,
    Rest,
}

struct Restore<'a> {
    control: &'a Control,
    reader: &'a ImageReader,
    geometry: Geometry,
    target: &'a dyn BlockWrite,
    background: Background,
    read_back: Option<&'a dyn ReadBack>,
    head_bytes: u64,
    head_zeroed: Mutex<bool>,
    segments: Pieces,
    store_failures: AtomicU64,
    tally: Tally,
}

impl Restore<'_> {
    fn work(&self, failure: &Failure) -> Result<(), JobError> {
        let mut buffers = Buffers::new(&self.geometry, self.read_back.is_some());
        while let Some(segment) = self.segments.next_any() {
            for (range, kind) in self.pieces_of(segment) {
                if failure.is_set() {
                    return Ok(());
                }
                self.control.check()?;
                match kind {
                    Some(kind) => self.empty(range, kind, &mut buffers)?,
                    None => self.filled(range, Part::Rest, &mut buffers)?,
                }
                self.control.advance(self.geometry.bytes_of(range).1, 0);
            }
        }
        Ok(())
    }

    /// The segment cut into runs without content (`Some(kind)`), long ones whole, and pieces to be read (`None`).
    fn pieces_of(&self, segment: BlockRange) -> Vec<(BlockRange, Option<BlockKind>)> {
        let mut pieces: Vec<(BlockRange, Option<BlockKind>)> = Vec::new();
        let piece_blocks = (PIECE_BYTES / self.geometry.block_size().bytes_u64()).max(1);
        for run in self.reader.runs(segment) {
            let (range, kind) = match run {
                Ok((range, kind)) if kind != BlockKind::Data => (range, Some(kind)),
                Ok((range, _)) => (range, None),
                // Damaged pages are met again, block by block, where they are read.
                Err(_) => continue,
            };
            if range.count().0 >= piece_blocks && kind.is_some() {
                pieces.push((range, kind));
            }
        }
        let mut all = Vec::new();
        let mut from = segment.start();
        for (range, kind) in pieces {
            if let Some(gap) = BlockRange::new(from, range.start()) {
                all.extend(gap.pieces(BlockCount(piece_blocks)).map(|p| (p, None)));
            }
            all.push((range, kind));
            from = range.end();
        }
        if let Some(gap) = BlockRange::new(from, segment.end()) {
            all.extend(gap.pieces(BlockCount(piece_blocks)).map(|p| (p, None)));
        }
        all
    }

    /// A run without content.
    fn empty(
        &self,
        range: BlockRange,
        kind: BlockKind,
        buffers: &mut Buffers,
    ) -> Result<(), JobError> {
        self.tally.note(range, kind);
        if self.read_back.is_some() {
            for piece in range.pieces(BlockCount(buffers.piece_blocks)) {
                self.put_piece(piece, Part::Rest, buffers, &|_| false)?;
            }
            return Ok(());
        }
        let (start, length) = self.geometry.bytes_of(range);
        self.zero(start.max(self.head_bytes), start.saturating_add(length))
    }

    /// A piece to be read from the image.
    fn filled(&self, range: BlockRange, part: Part, buffers: &mut Buffers) -> Result<(), JobError> {
        let block_bytes = self.geometry.block_size().bytes_usize();
        let length = usize::try_from(range.count().0)
            .unwrap_or(usize::MAX)
            .saturating_mul(block_bytes);
        let image = buffers.image.get_mut(..length).ok_or(JobError::Died)?;
        let kinds = self.read(range, image)?;
        for (block, kind) in range.blocks().zip(&kinds) {
            if let Some(one) = BlockRange::new(block, BlockIndex(block.0.saturating_add(1))) {
                self.tally.note(one, *kind);
            }
        }
        self.put_piece(range, part, buffers, &|n| {
            kinds.get(n) == Some(&BlockKind::Data)
        })
    }

    /// Reads blocks into the buffer; what is damaged is zero there and noted.
    fn read(&self, range: BlockRange, buffer: &mut [u8]) -> Result<Vec<BlockKind>, JobError> {
        let block_bytes = self.geometry.block_size().bytes_usize();
        if let Ok(kinds) = self.reader.read_blocks(range, buffer) {
            self.store_failures.store(0, Ordering::Relaxed);
            return Ok(kinds);
        }
        let mut kinds = Vec::new();
        for (one, part) in range
            .pieces(BlockCount(1))
            .zip(buffer.chunks_exact_mut(block_bytes))
        {
            match self.reader.read_blocks(one, part) {
                Ok(kind) => {
                    self.store_failures.store(0, Ordering::Relaxed);
                    kinds.extend(kind);
                }
                Err(error) => {
                    self.lost(one, error)?;
                    part.fill(0);
                    kinds.push(BlockKind::Zero);
                }
            }
        }
        Ok(kinds)
    }

    /// A block cannot be had. Errors: because nothing can.
    fn lost(&self, range: BlockRange, error: ImageError) -> Result<(), JobError> {
        if let ImageError::Repository(store) = &error
            && store.is_unreachable()
            && self.store_failures.fetch_add(1, Ordering::Relaxed) >= STORE_FAILURES_MAX
        {
            return Err(error.into());
        }
        self.tally.note_damage(range, &chain(&error));
        Ok(())
    }

    /// Writes the blocks of `range` that lie in `part` of the target from the buffer; `is_data` is told the block's place
    /// in the range.
    fn put_piece(
        &self,
        range: BlockRange,
        part: Part,
        buffers: &mut Buffers,
        is_data: &dyn Fn(usize) -> bool,
    ) -> Result<(), JobError> {
        let (start, length) = self.geometry.bytes_of(range);
        let end = start.saturating_add(length);
        let (low, high) = match part {
            Part::Head => (start, end.min(self.head_bytes)),
            Part::Rest => (start.max(self.head_bytes), end),
        };
        if low >= high {
            return Ok(());
        }
        let there = self.read_there(low, high, &mut buffers.target)?;
        let image = View {
            start,
            bytes: &buffers.image,
        };
        let mut spans = Spans::default();
        for (n, block) in range.blocks().enumerate() {
            let block_start = self.geometry.block_start(block);
            let block_end = block_start.saturating_add(u64::from(self.geometry.block_bytes(block)));
            let (from, to) = (block_start.max(low), block_end.min(high));
            if from >= to {
                continue;
            }
            let data = is_data(n);
            let wished = data.then(|| image.slice(from, to));
            if there
                .as_ref()
                .is_some_and(|there| is_same(there.slice(from, to), wished))
            {
                self.tally
                    .equal_bytes
                    .fetch_add(to - from, Ordering::Relaxed);
                continue;
            }
            spans.add(from, to, data);
        }
        for (from, to, data) in spans.0 {
            if part == Part::Rest {
                self.zero_head()?;
            }
            if data {
                self.write(from, image.slice(from, to))?;
            } else {
                self.zero(from, to)?;
            }
        }
        Ok(())
    }

    /// What the target has, if it is to be compared.
    fn read_there<'b>(
        &self,
        low: u64,
        high: u64,
        buffer: &'b mut [u8],
    ) -> Result<Option<View<'b>>, JobError> {
        let Some(read_back) = self.read_back else {
            return Ok(None);
        };
        let length = usize::try_from(high - low).unwrap_or(usize::MAX);
        let bytes = buffer.get_mut(..length).ok_or(JobError::Died)?;
        read_back
            .read_at(low, bytes)
            .map_err(|source| JobError::Target { op: "read", source })?;
        Ok(Some(View { start: low, bytes }))
    }

    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), JobError> {
        self.target
            .write_at(offset_bytes, bytes)
            .map_err(|source| JobError::Target {
                op: "written",
                source,
            })?;
        self.tally.written_bytes.fetch_add(
            u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        Ok(())
    }

    /// Makes bytes read as zeroes. Holes of a new file are that already, but for what was compared and differs.
    fn zero(&self, from: u64, to: u64) -> Result<(), JobError> {
        if from >= to || (self.background == Background::Zero && self.read_back.is_none()) {
            return Ok(());
        }
        self.target
            .zero_at(from, to - from)
            .map_err(|source| JobError::Target {
                op: "zeroed",
                source,
            })?;
        self.tally
            .zeroed_bytes
            .fetch_add(to - from, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the target unrecognisable, durably, before anything else of it is changed. Once.
    fn zero_head(&self) -> Result<(), JobError> {
        let mut zeroed = self
            .head_zeroed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !*zeroed {
            self.target
                .zero_at(0, self.head_bytes)
                .and_then(|()| self.target.flush())
                .map_err(|source| JobError::Target {
                    op: "zeroed",
                    source,
                })?;
            *zeroed = true;
        }
        Ok(())
    }

    fn write_head(&self) -> Result<(), JobError> {
        self.control.check()?;
        let Some(range) = BlockRange::covering(self.geometry.block_size(), 0, self.head_bytes)
        else {
            return Ok(());
        };
        let mut buffers = Buffers::new(&self.geometry, self.read_back.is_some());
        for piece in range.pieces(BlockCount(buffers.piece_blocks)) {
            self.filled(piece, Part::Head, &mut buffers)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), JobError> {
        self.target.flush().map_err(|source| JobError::Target {
            op: "flushed",
            source,
        })
    }
}

/// Neighbouring bytes of one sort, to be written at once.
#[derive(Default)]
struct Spans(Vec<(u64, u64, bool)>);

impl Spans {
    fn add(&mut self, from: u64, to: u64, data: bool) {
        match self.0.last_mut() {
            Some((_, end, same)) if *end == from && *same == data => *end = to,
            Some(_) | None => self.0.push((from, to, data)),
        }
    }
}

/// Bytes of the volume from `start` on.
struct View<'b> {
    start: u64,
    bytes: &'b [u8],
}

impl<'b> View<'b> {
    /// The bytes `from .. to` of the volume.
    fn slice(&self, from: u64, to: u64) -> &'b [u8] {
        let at =
            |offset: u64| usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.get(at(from)..at(to)).unwrap_or(&[])
    }
}

/// Whether the target has what is wished; `None`: zeroes.
fn is_same(there: &[u8], wished: Option<&[u8]>) -> bool {
    match wished {
        Some(wished) => there == wished,
        None => there.iter().all(|byte| *byte == 0),
    }
}

/// A worker's memory: what the image has and what the target has.
struct Buffers {
    image: AlignedBuffer,
    target: AlignedBuffer,
    piece_blocks: u64,
}

impl Buffers {
    fn new(geometry: &Geometry, compares: bool) -> Self {
        let piece_bytes = usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX);
        Self {
            image: AlignedBuffer::new(piece_bytes),
            target: AlignedBuffer::new(if compares { piece_bytes } else { 0 }),
            piece_blocks: (PIECE_BYTES / geometry.block_size().bytes_u64()).max(1),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
