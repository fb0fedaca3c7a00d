//! Reading an image: any block by way of the root, verified at each step.
//!
//! **Invariant**: no byte is returned whose digest, kept in the tree above it, does not hold.

use crate::digest::{self, Digests};
use crate::error::ImageError;
use blktide_format::entry::FAN_OUT;
use blktide_format::manifest::{
    ImageHead, PackRow, Prefix, SECTION_CHANGED, SECTION_EVIDENCE, SECTION_PACKS, Section,
    decode_packs,
};
use blktide_format::page::{BlockKind, Child, Inner, Leaf, child_span, root_level};
use blktide_format::{FormatError, runs};
use blktide_repo::{ImageEntry, RepoError, Repository, name};
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, ObjectId, VolumeId};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) mod blocks;
pub(crate) mod fetch;
mod walk;

pub use walk::Runs;

/// Pages that a reader keeps.
const PAGES_MAX: usize = 128;

/// An open image. Used by several threads at once.
pub struct ImageReader {
    repository: Repository,
    prefix: Prefix,
    digest: Digest,
    digests: Digests,
    pages: Mutex<VecDeque<((ObjectId, u32), Page)>>,
}

impl core::fmt::Debug for ImageReader {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ImageReader")
            .field("head", &self.prefix.head)
            .finish_non_exhaustive()
    }
}

/// A page that has been read and checked.
#[derive(Clone, Debug)]
pub(crate) enum Page {
    /// Level 0.
    Leaf(Arc<Leaf>),
    /// Above it.
    Inner(Arc<Inner>),
}

/// What lies at one leaf's position.
#[derive(Clone, Debug)]
pub(crate) enum LeafNode {
    /// All blocks are of one kind, and there is no page.
    Constant(BlockKind),
    /// A page.
    Page(Arc<Leaf>),
}

impl ImageReader {
    /// Opens an image. Cost: two small reads, whatever the history. Errors: `RepoError::NoImage`, `RepoError::Damaged`.
    pub fn open(
        repository: &Repository,
        volume: VolumeId,
        sequence: u64,
    ) -> Result<Self, ImageError> {
        let Some((prefix, digest)) = repository.prefix(volume, sequence)? else {
            return Err(RepoError::NoImage.into());
        };
        let facts = repository.facts();
        Ok(Self {
            repository: repository.clone(),
            digests: Digests::new(facts.domain, &facts.domain_key),
            prefix,
            digest,
            pages: Mutex::new(VecDeque::new()),
        })
    }

    /// Opens an image to build on, which a claim has pinned before: it must not be marked to be pruned, and its manifest,
    /// root page and packs must be there, by name and size (P2). Errors: `RepoError::BaseGone`. Cost: one look-up a pack.
    pub fn open_base(repository: &Repository, entry: &ImageEntry) -> Result<Self, ImageError> {
        let (image, volume, sequence) = (entry.head.image, entry.head.volume, entry.head.sequence);
        let gone = |what: String| ImageError::from(RepoError::BaseGone { image, what });
        let reader = match Self::open(repository, volume, sequence) {
            Ok(reader) if reader.digest == entry.digest => reader,
            Ok(_) => return Err(gone("the manifest that was listed".to_owned())),
            Err(e) => return Err(base_error(e, image)),
        };
        repository
            .vouch_for_end(volume, sequence)
            .map_err(|e| base_error(e.into(), image))?;
        if repository.is_forgotten(volume, sequence)? {
            return Err(gone("the image, marked to be forgotten,".to_owned()));
        }
        for row in reader.packs().map_err(|e| base_error(e, image))? {
            let pack = name::pack(volume, row.pack);
            if repository.size(&pack)? != Some(row.bytes) {
                return Err(gone(pack));
            }
        }
        if let Child::Page { .. } = reader.prefix.root {
            reader
                .page(reader.root_level(), 0, &reader.prefix.root)
                .map_err(|e| base_error(e, image))?;
        }
        Ok(reader)
    }

    /// Its facts.
    pub const fn head(&self) -> &ImageHead {
        &self.prefix.head
    }

    /// Digest of its manifest's prefix.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Shape of the volume.
    pub const fn geometry(&self) -> Geometry {
        self.prefix.head.geometry
    }

    /// The packs that it uses, with the number of frames and pages used.
    pub fn packs(&self) -> Result<Vec<PackRow>, ImageError> {
        let bytes = self.section(SECTION_PACKS)?.unwrap_or_default();
        decode_packs(&bytes).map_err(|e| self.manifest_damaged("pack table", Some(e)))
    }

    /// The blocks that the image has no content of (absent, excluded, unreadable): always wanted on top of it (P10).
    pub fn absent(&self) -> Result<BlockSet, ImageError> {
        let mut set = BlockSet::new(self.geometry().block_count());
        let kinds = &self.prefix.head.kinds;
        let missing = kinds.absent | kinds.excluded | kinds.unreadable;
        if missing == 0 {
            return Ok(set);
        }
        for run in self.runs(self.geometry().all_blocks()) {
            let (range, kind) = run?;
            if kind.is_without_content() {
                set.insert_range(range);
            }
        }
        Ok(set)
    }

    /// What the tracker claimed to have changed since the base; `None` if the image is no difference.
    pub fn changed(&self) -> Result<Option<BlockSet>, ImageError> {
        let Some(bytes) = self.section(SECTION_CHANGED)? else {
            return Ok(None);
        };
        let set = runs::decode(&bytes, self.geometry().block_count());
        set.map(Some)
            .map_err(|e| self.manifest_damaged("changed set", Some(e)))
    }

    /// The evidence that was stored with it.
    pub fn evidence(&self) -> Result<Option<Vec<u8>>, ImageError> {
        self.section(SECTION_EVIDENCE)
    }

    /// Checks all of the manifest behind its prefix, and returns what is wrong with it.
    pub(crate) fn check_manifest(&self) -> Vec<ImageError> {
        let head = self.head();
        let name = self.repository.manifest_name(head.volume, head.sequence);
        let mut errors = Vec::new();
        match self.repository.size(&name) {
            Ok(Some(bytes)) if bytes == self.prefix.manifest_bytes() => {}
            Ok(found) => {
                let wrong = FormatError::Length {
                    need: self.prefix.manifest_bytes(),
                    have: found.unwrap_or(0),
                };
                errors.push(self.manifest_damaged("its length", Some(wrong)));
            }
            Err(e) => errors.push(e.into()),
        }
        let sections = self.prefix.sections.iter();
        errors.extend(sections.filter_map(|s| self.read_section(s).err()));
        errors.extend(self.packs().err());
        errors.extend(self.changed().err());
        if self.digests.of_state(&self.prefix.root, &head.geometry) != head.state {
            errors.push(self.manifest_damaged("a state id that is not its tree's", None));
        }
        errors
    }

    pub(crate) const fn repository(&self) -> &Repository {
        &self.repository
    }

    pub(crate) const fn digests(&self) -> &Digests {
        &self.digests
    }

    pub(crate) const fn root(&self) -> &Child {
        &self.prefix.root
    }

    pub(crate) fn root_level(&self) -> u8 {
        root_level(self.geometry().block_count().0)
    }

    /// A section's bytes, checked against the directory.
    pub(crate) fn section(&self, id: u16) -> Result<Option<Vec<u8>>, ImageError> {
        match self.prefix.section(id) {
            Some(section) => self.read_section(section).map(Some),
            None => Ok(None),
        }
    }

    pub(crate) fn read_section(&self, section: &Section) -> Result<Vec<u8>, ImageError> {
        let (volume, sequence) = (self.head().volume, self.head().sequence);
        let manifest = self.repository.manifest_name(volume, sequence);
        // The object's real size bounds what is allocated.
        let there = self.repository.size(&manifest)?.unwrap_or(0);
        let end = section.offset_bytes.saturating_add(section.bytes);
        if end > there {
            let cut = FormatError::Length {
                need: end,
                have: there,
            };
            return Err(self.manifest_damaged("section", Some(cut)));
        }
        let len =
            usize::try_from(section.bytes).map_err(|_too_long| ImageError::Misuse("a section"))?;
        let mut bytes = vec![0; len];
        let start = section.offset_bytes;
        let read = self
            .repository
            .manifest_part(volume, sequence, start, &mut bytes)?;
        if read != len || digest::of_stored(&bytes) != section.digest {
            return Err(self.manifest_damaged("section", None));
        }
        Ok(bytes)
    }

    pub(crate) fn manifest_damaged(
        &self,
        what: &'static str,
        source: Option<FormatError>,
    ) -> ImageError {
        let head = self.head();
        ImageError::Damaged {
            range: self.geometry().all_blocks(),
            object: self.repository.manifest_name(head.volume, head.sequence),
            what,
            source,
        }
    }

    /// The child that stands for node `index` of `level`, or the constant above it.
    pub(crate) fn child(&self, level: u8, index: u64) -> Result<Child, ImageError> {
        let mut child = self.prefix.root;
        for above in (level.saturating_add(1)..=self.root_level()).rev() {
            if let Child::Constant(_) = child {
                return Ok(child);
            }
            let at = index / child_span(above.saturating_sub(level));
            let Page::Inner(inner) = self.page(above, at, &child)? else {
                return Err(ImageError::Misuse("a leaf above level 0"));
            };
            let below = child_span(above.saturating_sub(level).saturating_sub(1));
            let slot = usize::try_from(index / below % FAN_OUT).unwrap_or(usize::MAX);
            child = match inner.children.get(slot) {
                Some(child) => *child,
                None => return Err(ImageError::Misuse("a block past the end")),
            };
        }
        Ok(child)
    }

    /// Leaf `index`.
    pub(crate) fn leaf(&self, index: u64) -> Result<LeafNode, ImageError> {
        let child = self.child(0, index)?;
        match child {
            Child::Constant(kind) => Ok(LeafNode::Constant(kind)),
            Child::Page { .. } => match self.page(0, index, &child)? {
                Page::Leaf(leaf) => Ok(LeafNode::Page(leaf)),
                Page::Inner(_) => Err(ImageError::Misuse("an inner page at level 0")),
            },
        }
    }

    /// Blocks, cut at the volume's end, of node `index` of `level`.
    pub(crate) fn span(&self, level: u8, index: u64) -> BlockRange {
        span(&self.geometry(), level, index)
    }

    /// The page that `child` names, from the cache or the repository.
    pub(crate) fn page(&self, level: u8, index: u64, child: &Child) -> Result<Page, ImageError> {
        let Child::Page { place, .. } = child else {
            return Err(ImageError::Misuse("the page of a constant"));
        };
        if let Some(page) = self.cached((place.pack, place.offset_bytes)) {
            return Ok(page);
        }
        let wanted = fetch::Wanted::page(level, self.span(level, index), place);
        let stored = fetch::one(self, &wanted, self.span(level, index))?;
        self.page_of(level, index, child, &stored)
    }

    /// The page that `child` names, in bytes that were stored; it is kept in the cache.
    pub(crate) fn page_of(
        &self,
        level: u8,
        index: u64,
        child: &Child,
        stored: &[u8],
    ) -> Result<Page, ImageError> {
        let Child::Page {
            content,
            physical,
            place,
        } = child
        else {
            return Err(ImageError::Misuse("the page of a constant"));
        };
        let range = self.span(level, index);
        let shift = self.geometry().block_size().shift();
        let first = range.start().0;
        let damaged = |what, source| ImageError::Damaged {
            range,
            object: name::pack(self.head().volume, place.pack),
            what,
            source,
        };
        if digest::of_stored(stored) != *physical {
            return Err(damaged("a page that is not the one meant", None));
        }
        let raw = crate::codec::decompress(place.codec, stored, place.raw_bytes)
            .map_err(|_source| damaged("a page that does not decompress", None))?;
        let entries = range.count().0.div_ceil(child_span(level));
        let entries = usize::try_from(entries).unwrap_or(usize::MAX);
        let (page, bytes) = if level == 0 {
            let leaf = Leaf::decode(&raw, shift, first, entries)
                .map_err(|e| damaged("a page", Some(e)))?;
            let bytes = leaf.content_bytes();
            (Page::Leaf(Arc::new(leaf)), bytes)
        } else {
            let inner = Inner::decode(&raw, level, shift, first, entries)
                .map_err(|e| damaged("a page", Some(e)))?;
            let bytes = inner.content_bytes();
            (Page::Inner(Arc::new(inner)), bytes)
        };
        if self.digests.of_content(&bytes) != *content {
            return Err(damaged("a page of another content", None));
        }
        self.cache((place.pack, place.offset_bytes), &page);
        Ok(page)
    }

    fn cached(&self, key: (ObjectId, u32)) -> Option<Page> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let at = pages.iter().position(|(k, _)| *k == key)?;
        let entry = pages.remove(at)?;
        let page = entry.1.clone();
        pages.push_back(entry);
        Some(page)
    }

    fn cache(&self, key: (ObjectId, u32), page: &Page) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.len() >= PAGES_MAX {
            pages.pop_front();
        }
        pages.push_back((key, page.clone()));
    }
}

/// Blocks, cut at the volume's end, of node `index` of `level`. Past the end: the last block.
pub(crate) fn span(geometry: &Geometry, level: u8, index: u64) -> BlockRange {
    let blocks = geometry.block_count().0;
    let size = child_span(level.saturating_add(1));
    let start = index.saturating_mul(size).min(blocks.saturating_sub(1));
    let end = start.saturating_add(size).min(blocks);
    BlockRange::new(BlockIndex(start), BlockIndex(end)).unwrap_or(BlockRange::first())
}

/// Damage in a base means that it cannot be built on; a store that fails is a failure.
fn base_error(error: ImageError, image: blktide_types::id::ImageId) -> ImageError {
    let what = match &error {
        ImageError::Damaged { object: name, .. }
        | ImageError::Repository(
            RepoError::Damaged { name, .. }
            | RepoError::Store {
                name,
                source: blktide_repo::StoreError::NotFound,
                ..
            },
        ) => name.clone(),
        ImageError::Repository(RepoError::NoImage) => "the image".to_owned(),
        ImageError::Repository(_)
        | ImageError::Compress(_)
        | ImageError::Incomplete { .. }
        | ImageError::Spool { .. }
        | ImageError::Misuse(_) => return error,
    };
    RepoError::BaseGone { image, what }.into()
}

#[cfg(test)]
mod tests;
