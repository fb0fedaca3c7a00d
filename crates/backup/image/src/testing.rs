//! For the tests of this crate: a repository in memory, and backups of plain bytes into it.

use crate::{Committed, Content, ImageFacts, ImageReader, ImageWriter, WantedWords};
use blktide_format::manifest::{Consistency, Counters, ImageKind};
use blktide_repo::{ClaimRequest, MemoryStore, ProcessMark, Repository};
use blktide_testkit::clock::TestRandom;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, Digest, GenerationName, HostId, ImageId, VolumeId};
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockIndex, BlockSize};
use std::sync::Arc;

pub(crate) const VOLUME: VolumeId = VolumeId([7; 16]);

/// How often a random test runs: `short`, or ten times that with `BLKTIDE_TEST_LONG` set.
pub(crate) fn times(short: u64) -> u64 {
    match std::env::var_os("BLKTIDE_TEST_LONG") {
        Some(_) => short * 10,
        None => short,
    }
}

/// A geometry of so many bytes.
pub(crate) fn geometry(volume_bytes: u64, block_bytes: u32) -> Geometry {
    let block = BlockSize::new(block_bytes).unwrap();
    Geometry::new(
        volume_bytes,
        block,
        BlockSize::new(4096).unwrap(),
        512,
        4096,
    )
    .unwrap()
}

/// A repository and the store it lies in.
pub(crate) struct World {
    pub(crate) store: MemoryStore,
    pub(crate) repository: Repository,
    pub(crate) random: TestRandom,
}

/// A block of a model volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model<'a> {
    Bytes(&'a [u8]),
    Unreadable,
    Absent,
    Excluded,
}

impl World {
    pub(crate) fn new(seed: Seed) -> Self {
        let store = MemoryStore::new();
        let random = TestRandom::new(seed);
        let repository = Repository::init(Arc::new(store.clone()), &random, WallTime(1)).unwrap();
        Self {
            store,
            repository,
            random,
        }
    }

    pub(crate) fn request(&self, base: Option<&ImageReader>) -> ClaimRequest {
        let _ = self;
        request(base.map(|b| (b.head().image, b.head().sequence)))
    }

    /// Begins an image of `wanted` on top of `base`.
    pub(crate) fn begin(
        &self,
        geometry: Geometry,
        base: Option<Arc<ImageReader>>,
        wanted: &BlockSet,
    ) -> ImageWriter {
        let request = self.request(base.as_deref());
        let session = self.repository.claim(&request, &self.random).unwrap();
        ImageWriter::new(session, geometry, base, &words(wanted)).unwrap()
    }

    /// A whole backup; `block` says what each wanted block is, `pieces` how many are put at once.
    pub(crate) fn backup<'a>(
        &self,
        geometry: Geometry,
        base: Option<Arc<ImageReader>>,
        (wanted, pieces): (&BlockSet, usize),
        block: impl Fn(BlockIndex) -> Model<'a>,
    ) -> Committed {
        let kind = match base {
            Some(_) => ImageKind::Incremental,
            None => ImageKind::Full,
        };
        let writer = self.begin(geometry, base, wanted);
        put_all(&writer, wanted, pieces, block);
        writer.commit(&facts(kind, Some(wanted.clone()))).unwrap()
    }

    pub(crate) fn reader(&self, sequence: u64) -> ImageReader {
        ImageReader::open(&self.repository, VOLUME, sequence).unwrap()
    }
}

/// Puts all wanted blocks, so many at once.
pub(crate) fn put_all<'a>(
    writer: &ImageWriter,
    wanted: &BlockSet,
    pieces: usize,
    block: impl Fn(BlockIndex) -> Model<'a>,
) {
    let blocks: Vec<_> = wanted.blocks().collect();
    for part in blocks.chunks(pieces) {
        let contents: Vec<_> = part.iter().map(|b| (*b, content(block(*b)))).collect();
        writer.put(&contents).unwrap();
    }
}

pub(crate) fn content(model: Model<'_>) -> Content<'_> {
    match model {
        Model::Bytes(bytes) => Content::Bytes(bytes),
        Model::Unreadable => Content::Unreadable,
        Model::Absent => Content::Absent,
        Model::Excluded => Content::Excluded,
    }
}

pub(crate) fn words(set: &BlockSet) -> WantedWords {
    let words = set.words().to_vec();
    Arc::new(move |n| words[usize::try_from(n).unwrap()])
}

pub(crate) fn facts(kind: ImageKind, changed: Option<BlockSet>) -> ImageFacts {
    ImageFacts {
        device: "/dev/test".to_owned(),
        generation: GenerationName([6; 16]),
        kind,
        reason: None,
        consistency: Consistency::Instant,
        instant: WallTime(10),
        committed: WallTime(20),
        counters: Counters::default(),
        changed,
        evidence: b"evidence".to_vec(),
        previous: Digest::NONE,
    }
}

/// Block `block` of plain bytes.
pub(crate) fn bytes_of(geometry: Geometry, volume: &[u8], block: BlockIndex) -> &[u8] {
    let start = usize::try_from(geometry.block_start(block)).unwrap();
    let len = usize::try_from(geometry.block_bytes(block)).unwrap();
    &volume[start..start + len]
}

/// What a backup of the test's volume claims.
pub(crate) fn request(base: Option<(ImageId, u64)>) -> ClaimRequest {
    ClaimRequest {
        volume: VOLUME,
        volume_name: "data".to_owned(),
        host: HostId([3; 16]),
        host_name: "web1".to_owned(),
        process: ProcessMark {
            boot: BootId([4; 16]),
            pid: 4711,
            start_time: 99,
        },
        base,
        generation: GenerationName([5; 16]),
        now: WallTime(2),
    }
}
