//! An image of a watched volume as a plain file: taken by the library alone, with no repository in between.

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::buffer::AlignedBuffer;
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::io::BlockRead;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use blktide_watch::{Ahead, FreezeLimits, InstantImage, Next};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::watch::Tracked;

/// Threads that copy, and bytes that one takes at a time.
const COPIERS: usize = 4;
const PIECE_BYTES: u64 = 1 << 20;

/// The file. Its blocks are those of the images before it until they are copied.
#[derive(Debug)]
pub struct PlainImage {
    file: File,
    geometry: Geometry,
}

impl PlainImage {
    /// At `path`, new or that of an earlier image, for what `ahead` copies.
    pub fn of(ahead: &Ahead, path: &Path) -> Result<Self> {
        let geometry = ahead.geometry();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len(geometry.volume_bytes())?;
        Ok(Self { file, geometry })
    }

    /// Copies `blocks` as they are now.
    pub fn take_now(&self, ahead: &Ahead, blocks: &BlockSet) -> Result<()> {
        self.take(blocks, &|range, buf| {
            Ok(ahead.read_now(range, buf).map(drop)?)
        })
    }

    /// Copies what was read at the instant: the image is whole.
    pub fn take_last(&self, image: &InstantImage) -> Result<()> {
        let read =
            |range: BlockRange, buf: &mut [u8]| Ok(image.read_blocks(range, buf).map(drop)?);
        self.take(image.last_blocks(), &read)?;
        self.file.sync_all()?;
        Ok(())
    }

    /// Makes the copy of a block a wrong one: as if it had been made before what was written landed.
    pub fn spoil(&self, block: u64) -> Result<()> {
        let range = BlockRange::new(BlockIndex(block), BlockIndex(block + 1)).context("a range")?;
        let (offset, bytes) = self.geometry.bytes_of(range);
        self.file
            .write_all_at(&vec![0xA5; usize::try_from(bytes)?], offset)?;
        Ok(())
    }

    fn take(
        &self,
        blocks: &BlockSet,
        read: &(dyn Fn(BlockRange, &mut [u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        let size = self.geometry.block_size();
        let most = PIECE_BYTES / size.bytes_u64();
        let pieces: Vec<BlockRange> = blocks
            .runs()
            .flat_map(|run| {
                let starts =
                    (run.start().0..run.end().0).step_by(usize::try_from(most).unwrap_or(1));
                starts.filter_map(move |start| {
                    let end = (start + most).min(run.end().0);
                    BlockRange::new(BlockIndex(start), BlockIndex(end))
                })
            })
            .collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let blocks = usize::try_from(piece.count().0)?;
                let mut buffer = AlignedBuffer::new(blocks * size.bytes_usize());
                read(*piece, &mut buffer)?;
                let (offset, bytes) = self.geometry.bytes_of(*piece);
                let bytes = buffer.get(..usize::try_from(bytes)?);
                self.file
                    .write_all_at(bytes.context("a short buffer")?, offset)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..COPIERS).map(|_| scope.spawn(work)).collect();
            for thread in all {
                match thread.join() {
                    Ok(done) => done?,
                    Err(_) => bail!("a copying thread died"),
                }
            }
            Ok(())
        })
    }
}

impl Tracked {
    /// An image into the file `to`, which holds the one of `base` already. `at_the_instant` is done while all stands still.
    pub fn image(
        &self,
        base: Option<GenerationName>,
        limits: FreezeLimits,
        to: &Path,
        at_the_instant: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Arc<InstantImage>> {
        let ahead = self.begin_with(base, limits)?;
        ensure!(
            ahead.resolved() == base.is_some(),
            "the base is known: {:?}",
            ahead.distrust()
        );
        let image = PlainImage::of(&ahead, to)?;
        image.take_now(&ahead, ahead.first())?;
        let mut done = Ok(());
        loop {
            match ahead.next_with(&mut || done = at_the_instant())? {
                Next::Copy(blocks) => image.take_now(&ahead, &blocks)?,
                Next::Instant(instant) => {
                    done?;
                    image.take_last(&instant)?;
                    return Ok(instant);
                }
            }
        }
    }
}
