//! Reading an image.

use crate::error::ImageError;
use crate::kind::BlockKind;
use blktide_format::manifest::ImageHead;
use blktide_repo::{ImageEntry, Repository};
use blktide_types::geometry::Geometry;
use blktide_types::id::VolumeId;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;

/// An open image. Used by several threads at once.
#[derive(Debug)]
pub struct ImageReader {
    head: ImageHead,
}

impl ImageReader {
    /// Opens an image. Cost: two small reads, whatever the history.
    pub fn open(
        repository: &Repository,
        volume: VolumeId,
        sequence: u64,
    ) -> Result<Self, ImageError> {
        let (_, _, _) = (repository, volume, sequence);
        Err(ImageError::Misuse("not built"))
    }

    /// Opens an image to build on: pinned by a claim before, its manifest, root page and all packs are looked up by
    /// name and size (P2). Errors: `RepoError::BaseGone`. Cost: one look-up a pack.
    pub fn open_base(repository: &Repository, entry: &ImageEntry) -> Result<Self, ImageError> {
        let (_, _) = (repository, entry);
        Err(ImageError::Misuse("not built"))
    }

    /// Its facts.
    pub const fn head(&self) -> &ImageHead {
        &self.head
    }

    /// Shape of the volume.
    pub const fn geometry(&self) -> Geometry {
        self.head.geometry
    }

    /// What `block` is.
    pub fn kind_of(&self, block: BlockIndex) -> Result<BlockKind, ImageError> {
        Err(ImageError::NoContent(block))
    }

    /// What the blocks of `range` are, one by one. Constant subtrees cost nothing.
    pub fn kinds(&self, range: BlockRange) -> Result<Vec<BlockKind>, ImageError> {
        Err(ImageError::NoContent(range.start()))
    }

    /// Runs of one kind in `range`, ascending, as long as possible; a damaged page gives one `Err` item with its range
    /// and the rest goes on. Memory: a few pages.
    pub fn runs(
        &self,
        range: BlockRange,
    ) -> Box<dyn Iterator<Item = Result<(BlockRange, BlockKind), ImageError>> + Send + '_> {
        Box::new(std::iter::once(Err(ImageError::NoContent(range.start()))))
    }

    /// Reads the blocks of `range` into `buf` (count × block size bytes), each verified by its digest, and says what each
    /// is. Blocks without content, and bytes past the volume's end, are zero in `buf`. Neighbouring frames are read with one
    /// large request.
    ///
    /// Errors: `Damaged` names the first blocks that cannot be had; ask for smaller ranges to get the others.
    pub fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockKind>, ImageError> {
        let (_, _) = (range, buf);
        Err(ImageError::Misuse("not built"))
    }

    /// The blocks that the image has no content of (absent, excluded, unreadable): always wanted on top of it (P10).
    pub fn absent(&self) -> Result<BlockSet, ImageError> {
        Err(ImageError::Misuse("not built"))
    }

    /// What the tracker claimed to have changed since the base; `None` if the image is no difference.
    pub fn changed(&self) -> Result<Option<BlockSet>, ImageError> {
        Err(ImageError::Misuse("not built"))
    }

    /// The evidence that was stored with it.
    pub fn evidence(&self) -> Result<Option<Vec<u8>>, ImageError> {
        Err(ImageError::Misuse("not built"))
    }
}
