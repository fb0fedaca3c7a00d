//! req A4: opening the newest image and restoring one block after 1, 100 and 1000 incrementals, in a real folder.
//!
//! That requests, objects and bytes stay the same is asserted by a test; here are the times.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench: it prints, and ends at its first fault"
)]

use blktide_format::manifest::{Consistency, Counters, ImageKind};
use blktide_image::{Content, ImageFacts, ImageReader, ImageWriter, WantedWords};
use blktide_repo::{ClaimRequest, FolderStore, ProcessMark, Repository};
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_types::clock::{Clock, Random, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, Digest, GenerationName, HostId, VolumeId};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockIndex, BlockSize};
use core::time::Duration;
use std::sync::Arc;

const VOLUME: VolumeId = VolumeId([7; 16]);
const BLOCKS: u64 = 4096;

fn backup(
    repository: &Repository,
    shape: Geometry,
    base: Option<Arc<ImageReader>>,
    wanted: &BlockSet,
) {
    let request = ClaimRequest {
        volume: VOLUME,
        volume_name: "bench".to_owned(),
        host: HostId([1; 16]),
        host_name: "bench".to_owned(),
        process: ProcessMark {
            boot: BootId([1; 16]),
            pid: 1,
            start_time: 1,
        },
        base: base.as_ref().map(|b| (b.head().image, b.head().sequence)),
        generation: GenerationName::NONE,
        now: WallTime(0),
    };
    let random = SystemRandom::new();
    let kind = base
        .as_ref()
        .map_or(ImageKind::Full, |_| ImageKind::Incremental);
    let session = repository.claim(&request, &random).unwrap();
    let words = wanted.words().to_vec();
    let words: WantedWords = Arc::new(move |n| words[usize::try_from(n).unwrap()]);
    let writer = ImageWriter::new(session, shape, base, &words).unwrap();
    let mut bytes = vec![0; shape.block_size().bytes_usize()];
    for block in wanted.blocks() {
        random.fill(&mut bytes);
        writer.put(&[(block, Content::Bytes(&bytes))]).unwrap();
    }
    let facts = ImageFacts {
        device: String::new(),
        generation: GenerationName::NONE,
        kind,
        reason: None,
        consistency: Consistency::Instant,
        instant: WallTime(0),
        committed: WallTime(0),
        counters: Counters::default(),
        changed: None,
        evidence: Vec::new(),
        previous: Digest::NONE,
    };
    writer.commit(&facts).unwrap();
}

/// Medians of 21 times, until one block is in memory: from the image's number, and from nothing but the folder (which lists
/// the volume's numbers).
fn open_and_read(folder: &std::path::Path, shape: Geometry) -> [Duration; 2] {
    let clock = SystemClock;
    let mut times = [Vec::new(), Vec::new()];
    for n in 0..21 {
        let start = clock.now();
        let repository = Repository::open(Arc::new(FolderStore::new(folder))).unwrap();
        let newest = repository.latest(VOLUME).unwrap().unwrap();
        let found = clock.now();
        let reader = ImageReader::open(&repository, VOLUME, newest.head.sequence).unwrap();
        let block = n * 97 % BLOCKS;
        let range = BlockRange::new(BlockIndex(block), BlockIndex(block + 1)).unwrap();
        let mut buf = vec![0; shape.block_size().bytes_usize()];
        reader.read_blocks(range, &mut buf).unwrap();
        let end = clock.now();
        times[0].push(end.since(found));
        times[1].push(end.since(start));
    }
    times.map(|mut all| {
        all.sort_unstable();
        all[all.len() / 2]
    })
}

fn main() {
    let folder = std::env::temp_dir().join(format!("blktide-bench-open-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let block = BlockSize::new(4096).unwrap();
    let shape = Geometry::new(BLOCKS * 4096, block, block, 512, 4096).unwrap();
    let store = Arc::new(FolderStore::new(&folder));
    let repository = Repository::init(store, &SystemRandom::new(), WallTime(0)).unwrap();
    backup(
        &repository,
        shape,
        None,
        &BlockSet::full(shape.block_count()),
    );
    let mut first = None;
    for n in 1..=1000_u64 {
        let newest = repository.latest(VOLUME).unwrap().unwrap();
        let base = ImageReader::open_base(&repository, &newest).unwrap();
        let mut wanted = BlockSet::new(shape.block_count());
        wanted.insert(BlockIndex(n * 37 % BLOCKS));
        backup(&repository, shape, Some(Arc::new(base)), &wanted);
        if [1, 100, 1000].contains(&n) {
            let times = open_and_read(&folder, shape);
            let base = *first.get_or_insert(times);
            let ratio = |i: usize| times[i].as_secs_f64() / base[i].as_secs_f64();
            println!(
                "{n:5} incrementals: open by number and one block {:?} ({:.2} of the first), with listing {:?} ({:.2})",
                times[0],
                ratio(0),
                times[1],
                ratio(1)
            );
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
