//! A volume, a machine, repositories, and what each image must restore to.

use super::store::{Faults, FaultyStore};
use super::volume::SimVolume;
use crate::backup::{self, BackupReport, BackupRequest};
use crate::environment::{Environment, OpenSessions};
use crate::error::JobError;
use crate::restore::{self, Background, ReadBack, RestoreReport, RestoreRequest};
use crate::running::Running;
use crate::source::SnapshotSource;
use crate::verify::{self, VerifyRequest};
use blktide_image::{Depth, ImageReader, Proof};
use blktide_repo::memory::MemoryStore;
use blktide_repo::{FolderStore, ProcessMark, Repository, Store};
use blktide_sys::clock::SystemClock;
use blktide_testkit::clock::TestRandom;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::id::{BootId, HostId, ImageId, VolumeId};
use blktide_types::io::BlockWrite;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

pub(super) const VOLUME: VolumeId = VolumeId([7; 16]);
pub(super) const HOST: HostId = HostId([8; 16]);

/// A repository, and what each of its images must restore to.
pub(super) struct Place {
    pub(super) memory: MemoryStore,
    pub(super) faults: Arc<Faults>,
    pub(super) repository: Repository,
    pub(super) truths: Vec<(u64, Vec<u8>)>,
    pub(super) remembered: Option<ImageId>,
    /// A folder, removed at the end.
    folder: Option<PathBuf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            drop(std::fs::remove_dir_all(folder));
        }
    }
}

fn place(store: Arc<dyn Store>, memory: MemoryStore, seed: Seed) -> Place {
    let faults = Arc::new(Faults::default());
    let store = Arc::new(FaultyStore {
        inner: store,
        faults: Arc::clone(&faults),
    });
    let repository = Repository::init(store, &TestRandom::new(seed), WallTime(1)).unwrap();
    Place {
        memory,
        faults,
        repository,
        truths: Vec::new(),
        remembered: None,
        folder: None,
    }
}

impl Place {
    pub(super) fn in_memory(seed: Seed) -> Self {
        let memory = MemoryStore::new();
        place(Arc::new(memory.clone()), memory, seed)
    }

    pub(super) fn in_folder(name: &str, seed: Seed) -> Self {
        let folder = scratch(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut place = place(
            Arc::new(FolderStore::new(&folder)),
            MemoryStore::new(),
            seed,
        );
        place.folder = Some(folder);
        place
    }

    /// The same repository, as another process would open it.
    pub(super) fn reopen(&mut self) {
        self.repository = Repository::open(Arc::clone(self.repository.store())).unwrap();
    }
}

/// A path that no other test has.
pub(super) fn scratch(name: &str) -> PathBuf {
    let path = PathBuf::from("/var/tmp").join(format!("blktide-job-{name}-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&path));
    drop(std::fs::remove_file(&path));
    path
}

/// The environment of one process; no two draw the same numbers.
pub(super) fn environment(seed: Seed) -> Environment {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let seed = seed.nth(1 << 32 | MADE.fetch_add(1, Ordering::Relaxed));
    Environment {
        clock: Arc::new(SystemClock),
        random: Arc::new(TestRandom::new(seed)),
        on_progress: None,
        host: HOST,
        host_name: "web1".to_owned(),
        process: ProcessMark {
            boot: BootId([1; 16]),
            pid: 4711,
            start_time: 1,
        },
        is_alive: Arc::new(|_| true),
        sessions: Arc::new(OpenSessions::default()),
    }
}

pub(super) fn request(place: &Place, volume: &Arc<SimVolume>) -> BackupRequest {
    request_of(place, Arc::<SimVolume>::clone(volume))
}

pub(super) fn request_of(place: &Place, source: Arc<dyn SnapshotSource>) -> BackupRequest {
    let store = Arc::clone(place.repository.store());
    BackupRequest {
        repository: Box::new(move || Repository::open(store)),
        volume: VOLUME,
        volume_name: "data".to_owned(),
        device: "wwn-1".to_owned(),
        source,
        full: false,
        remembered: place.remembered,
        max_read_rate: 0,
        workers: 0,
        min_free: None,
    }
}

/// A backup; what it must restore to is remembered.
pub(super) fn back_up(
    place: &mut Place,
    volume: &Arc<SimVolume>,
    environment: &Environment,
) -> Result<BackupReport, JobError> {
    let report = backup::start(request(place, volume), environment)?.wait()?;
    remember(place, volume, &report);
    Ok(report)
}

pub(super) fn remember(place: &mut Place, volume: &SimVolume, report: &BackupReport) {
    place
        .truths
        .push((report.head.sequence, volume.last_truth()));
    place.remembered = Some(report.head.image);
}

/// A target in memory, filled with garbage; it remembers the writes.
pub(super) struct MemoryTarget {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) writes: Mutex<Vec<(u64, u64)>>,
}

impl MemoryTarget {
    pub(super) fn of(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            writes: Mutex::default(),
        })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl BlockWrite for MemoryTarget {
    fn write_at(&self, offset_bytes: u64, buf: &[u8]) -> io::Result<()> {
        assert!(
            !buf.is_empty() && buf.len().is_multiple_of(512) && offset_bytes.is_multiple_of(512)
        );
        assert_eq!(buf.as_ptr() as usize % 4096, 0, "an unaligned buffer");
        let start = usize::try_from(offset_bytes).unwrap();
        self.bytes.lock().unwrap()[start..start + buf.len()].copy_from_slice(buf);
        self.writes
            .lock()
            .unwrap()
            .push((offset_bytes, buf.len() as u64));
        Ok(())
    }

    fn zero_at(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        assert!(len_bytes > 0 && len_bytes.is_multiple_of(512) && offset_bytes.is_multiple_of(512));
        let start = usize::try_from(offset_bytes).unwrap();
        let length = usize::try_from(len_bytes).unwrap();
        self.bytes.lock().unwrap()[start..start + length].fill(0);
        self.writes.lock().unwrap().push((offset_bytes, len_bytes));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadBack for MemoryTarget {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[start..start + buf.len()]);
        Ok(())
    }
}

/// What is to be restored to `target`, over whatever it holds.
pub(super) fn restore_request(
    place: &Place,
    sequence: u64,
    target: Arc<dyn BlockWrite>,
) -> RestoreRequest {
    let repository = place.repository.clone();
    RestoreRequest {
        image: Box::new(move || ImageReader::open(&repository, VOLUME, sequence)),
        target,
        background: Background::Unknown,
        read_back: None,
        workers: 0,
    }
}

pub(super) fn restore_over(
    place: &Place,
    sequence: u64,
    bytes: Vec<u8>,
) -> (Result<RestoreReport, JobError>, Arc<MemoryTarget>) {
    let target = MemoryTarget::of(bytes);
    let request = restore_request(place, sequence, Arc::<MemoryTarget>::clone(&target));
    let running = restore::start(request, &environment(Seed(1))).unwrap();
    (running.wait(), target)
}

/// The images that are to be there are, and no others.
pub(super) fn visible(place: &Place, note: &str) {
    let mut there: Vec<u64> = place
        .repository
        .images_of(VOLUME)
        .unwrap()
        .images
        .iter()
        .map(|entry| entry.head.sequence)
        .collect();
    there.sort_unstable();
    let expected: Vec<u64> = place.truths.iter().map(|(sequence, _)| *sequence).collect();
    assert_eq!(there, expected, "{note}: images that are visible");
}

/// Every image restores to its truth, over garbage, and each byte of the repository is proven.
pub(super) fn check(place: &Place, note: &str) {
    for (sequence, truth) in &place.truths {
        let (report, target) = restore_over(place, *sequence, vec![0xaa; truth.len()]);
        let report = report.unwrap_or_else(|e| panic!("{note}: image {sequence}: {e:?}"));
        assert_eq!(
            report.damaged,
            [],
            "{note}: image {sequence}: {:?}",
            report.damage
        );
        assert!(
            target.bytes() == *truth,
            "{note}: image {sequence} is not its truth, first at {:?}",
            target.bytes().iter().zip(truth).position(|(a, b)| a != b)
        );
    }
    visible(place, note);
    let proof = verify(place, Depth::Data).wait().unwrap();
    assert_eq!(proof.damage, [], "{note}");
    assert_eq!(proof.images, place.truths.len() as u64, "{note}");
}

pub(super) fn verify(place: &Place, depth: Depth) -> Running<Proof> {
    let repository = place.repository.clone();
    verify::start(
        VerifyRequest {
            repository: Box::new(move || Ok(repository)),
            image: Box::new(|_| Ok(None)),
            depth,
            workers: 2,
        },
        &environment(Seed(2)),
    )
    .unwrap()
}
