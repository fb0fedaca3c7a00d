//! A backup, a restore and a verification next to the limit: the same work with nothing around it.
//!
//! The *limit* is a loop of workers: copy 1 MiB from the volume → zero test → keyed BLAKE3 → zstd 1 → pwrite, an atomic position
//! being all they share. Both run in one process, in turn, from memory, into one folder, so that their ratio means something on a
//! busy machine: of each the best of three counts. `BLKTIDE_BENCH_MIB` (512) sizes the volume, `BLKTIDE_BENCH_FOLDER` (/dev/shm)
//! says where the repository lies.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a bench: it prints, and its own faults end it"
)]

use blktide_format::manifest::Consistency;
use blktide_image::{Depth, ImageReader};
use blktide_job::backup::{self, BackupReport, BackupRequest};
use blktide_job::environment::{Environment, OpenSessions};
use blktide_job::file_target::FileTarget;
use blktide_job::restore::{self, RestoreRequest};
use blktide_job::source::{BeginError, Begun, SnapshotAsk, SnapshotSource, TrackerSays};
use blktide_job::verify::{self, VerifyRequest};
use blktide_repo::{FolderStore, ProcessMark, Repository};
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::fs::write_full;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::clock::{Clock, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, GenerationName, HostId, SnapshotId, VolumeId};
use blktide_types::io::{BlockOutcome, BlockRead, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex, BlockSize};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const VOLUME: VolumeId = VolumeId([7; 16]);
const PIECE: usize = 1 << 20;

/// A snapshot in memory.
struct Memory {
    geometry: Geometry,
    bytes: Arc<Vec<u8>>,
    wanted: BlockSet,
    changed: Option<BlockSet>,
}

impl BlockRead for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let (start, length) = self.geometry.bytes_of(range);
        let start = usize::try_from(start).unwrap();
        let length = usize::try_from(length).unwrap();
        buf[..length].copy_from_slice(&self.bytes[start..start + length]);
        Ok(vec![
            BlockOutcome::Data;
            usize::try_from(range.count().0).unwrap()
        ])
    }
}

impl SnapshotRead for Memory {
    fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    fn finish(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// A volume in memory, of which `changed` is said to have changed whatever is asked.
struct Source {
    geometry: Geometry,
    bytes: Arc<Vec<u8>>,
    changed: BlockSet,
    begun: AtomicU64,
}

impl SnapshotSource for Source {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn begin(&self, ask: &SnapshotAsk) -> Result<Begun, BeginError> {
        let mut name = [1; 16];
        name[..8].copy_from_slice(&self.begun.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        let changed = ask.base.is_some().then(|| self.changed.clone());
        Ok(Begun {
            snapshot: Arc::new(Memory {
                geometry: self.geometry,
                bytes: Arc::clone(&self.bytes),
                wanted: changed
                    .clone()
                    .unwrap_or_else(|| BlockSet::full(self.geometry.block_count())),
                changed,
            }),
            id: SnapshotId([1; 16]),
            opened: GenerationName(name),
            tracker: if ask.base.is_some() {
                TrackerSays::Resolved
            } else {
                TrackerSays::Unresolved
            },
            evidence: Vec::new(),
            instant: WallTime(1),
            consistency: Consistency::Instant,
        })
    }
}

/// 45 % zero, a third text, the rest noise, in runs.
fn content(bytes: usize) -> Vec<u8> {
    let mut numbers = Seed(1).numbers();
    let words: Vec<Vec<u8>> = (0..2000)
        .map(|n| noise(2 + usize::try_from(n % 9).unwrap(), Seed(n)))
        .collect();
    let mut volume = vec![0; bytes];
    for run in volume.chunks_mut(PIECE / 4) {
        match numbers.below(100) {
            0..45 => {}
            45..80 => {
                let mut at = 0;
                while at < run.len() {
                    let word = numbers.pick(&words);
                    let take = word.len().min(run.len() - at);
                    run[at..at + take].copy_from_slice(&word[..take]);
                    at += take;
                }
            }
            _ => numbers.fill(run),
        }
    }
    volume
}

/// The work with nothing around it; bytes stored.
fn limit(bytes: &[u8], wanted: &BlockSet, block: BlockSize, file: &File) -> u64 {
    let (next, stored) = (AtomicU64::new(0), AtomicU64::new(0));
    let block_bytes = block.bytes_usize();
    let piece_blocks = u64::try_from(PIECE / block_bytes).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..blktide_job::default_workers() {
            scope.spawn(|| {
                let mut buffer = AlignedBuffer::new(PIECE);
                let mut zstd = zstd::bulk::Compressor::new(1).unwrap();
                let mut out = vec![0; 2 * PIECE];
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed) * piece_blocks;
                    if piece >= wanted.len().0 {
                        break;
                    }
                    let mut used = 0;
                    for n in piece..(piece + piece_blocks).min(wanted.len().0) {
                        if !wanted.contains(BlockIndex(n)) {
                            continue;
                        }
                        let start = usize::try_from(n).unwrap() * block_bytes;
                        let end = (start + block_bytes).min(bytes.len());
                        let part = &mut buffer[..end - start];
                        part.copy_from_slice(&bytes[start..end]);
                        if part.as_chunks::<64>().0.iter().all(|c| *c == [0; 64]) {
                            continue;
                        }
                        let digest = blake3::keyed_hash(&[7; 32], part);
                        out[used..used + 32].copy_from_slice(digest.as_bytes());
                        used += 32;
                        used += zstd.compress_to_buffer(part, &mut out[used..]).unwrap();
                    }
                    let at = stored.fetch_add(u64::try_from(used).unwrap(), Ordering::Relaxed);
                    write_full(file, at, &out[..used]).unwrap();
                }
            });
        }
    });
    file.sync_data().unwrap();
    stored.into_inner()
}

struct Bench {
    folder: PathBuf,
    source: Arc<Source>,
    environment: Environment,
    repository: Repository,
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

impl Bench {
    fn new(mib: usize, block: u32) -> Self {
        let root = std::env::var("BLKTIDE_BENCH_FOLDER").unwrap_or_else(|_| "/dev/shm".into());
        let folder = Path::new(&root).join(format!("blktide-bench-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("repository")).unwrap();
        let bytes = Arc::new(content(mib << 20));
        let block = BlockSize::new(block).unwrap();
        let length = u64::try_from(bytes.len()).unwrap();
        let geometry = Geometry::new(length, block, BlockSize::IMAGE_MIN, 512, 512).unwrap();
        let mut changed = BlockSet::new(geometry.block_count());
        let mut numbers = Seed(2).numbers();
        for _ in 0..geometry.block_count().0 / 100 {
            changed.insert(BlockIndex(numbers.below(geometry.block_count().0)));
        }
        let store = Arc::new(FolderStore::new(&folder.join("repository")));
        Self {
            repository: Repository::init(store, &SystemRandom::new(), WallTime(1)).unwrap(),
            folder,
            source: Arc::new(Source {
                geometry,
                bytes,
                changed,
                begun: AtomicU64::new(0),
            }),
            environment: Environment {
                clock: Arc::new(SystemClock),
                random: Arc::new(SystemRandom::new()),
                on_progress: None,
                host: HostId([1; 16]),
                host_name: "bench".to_owned(),
                process: ProcessMark {
                    boot: BootId([1; 16]),
                    pid: 1,
                    start_time: 1,
                },
                is_alive: Arc::new(|_| true),
                sessions: Arc::new(OpenSessions::default()),
            },
        }
    }

    fn back_up(&self, full: bool) -> BackupReport {
        let repository = self.repository.clone();
        let request = BackupRequest {
            repository: Box::new(move || Ok(repository)),
            volume: VOLUME,
            volume_name: "bench".to_owned(),
            device: String::new(),
            source: Arc::<Source>::clone(&self.source),
            full,
            remembered: None,
            max_read_rate: 0,
            workers: 0,
            min_free: None,
        };
        let running = backup::start(request, &self.environment).unwrap();
        running.wait().unwrap()
    }

    fn restore(&self, sequence: u64) {
        let path = self.folder.join("restored");
        drop(std::fs::remove_file(&path));
        let target =
            Arc::new(FileTarget::create(&path, self.source.geometry.volume_bytes()).unwrap());
        let repository = self.repository.clone();
        let request = RestoreRequest {
            image: Box::new(move || ImageReader::open(&repository, VOLUME, sequence)),
            background: target.background(),
            target,
            read_back: None,
            workers: 0,
        };
        let running = restore::start(request, &self.environment).unwrap();
        assert_eq!(running.wait().unwrap().damaged, []);
    }

    fn verify(&self) {
        let repository = self.repository.clone();
        let request = VerifyRequest {
            repository: Box::new(move || Ok(repository)),
            image: Box::new(|_| Ok(Some((VOLUME, 1)))),
            depth: Depth::Data,
            workers: 0,
        };
        let running = verify::start(request, &self.environment).unwrap();
        assert_eq!(running.wait().unwrap().damage, []);
    }
}

/// The best of three, in seconds, and the last result.
fn best<T>(mut work: impl FnMut() -> T) -> (f64, T) {
    let mut once = || {
        let before = SystemClock.now();
        let result = work();
        (SystemClock.now().since(before).as_secs_f64(), result)
    };
    let (a, b, (c, result)) = (once().0, once().0, once());
    (a.min(b).min(c), result)
}

fn main() {
    let mib = std::env::var("BLKTIDE_BENCH_MIB")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(512);
    for block in [65536, 4096] {
        let bench = Bench::new(mib, block);
        let size = BlockSize::new(block).unwrap();
        let file = File::create(bench.folder.join("limit")).unwrap();
        let all = BlockSet::full(BlockCount(bench.source.changed.len().0));
        println!("{mib} MiB, blocks of {size}; the limit of the same run = 1");
        for (job, wanted, full) in [("full", &all, true), ("1 %", &bench.source.changed, false)] {
            let (limit_s, limit_stored) = best(|| limit(&bench.source.bytes, wanted, size, &file));
            let (job_s, report) = best(|| bench.back_up(full));
            let stored = report.head.counters.stored_bytes;
            println!(
                "  backup {job:>4}: wall {:5.2} ({:7.1} ms of {:7.1}), stored {:5.3} ({stored} of {limit_stored} bytes)",
                job_s / limit_s,
                job_s * 1e3,
                limit_s * 1e3,
                stored as f64 / limit_stored as f64,
            );
        }
        let (restore_s, ()) = best(|| bench.restore(1));
        let (verify_s, ()) = best(|| bench.verify());
        let rate = |seconds: f64| mib as f64 / seconds;
        println!(
            "  restore {:6.0} MiB/s of volume · verify every byte {:6.0} MiB/s of volume",
            rate(restore_s),
            rate(verify_s)
        );
    }
}
