//! A volume as the backup job sees it: snapshots over the volume socket.

use blktide_api::config::{Overflow, SaveArea, SavePlace, VolumeConfig};
use blktide_format::manifest::Consistency;
use blktide_job::source::{
    BeginError, Begun, SnapshotAsk, SnapshotCost, SnapshotSource, TrackerSays,
};
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::fs;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::RevokeCause;
use blktide_types::reason::Reason;
use blktide_volume::error::Refusal;
use blktide_volume::message::{self, Absent, SnapshotFigures, SnapshotRequest, Text, VolumeStatus};
use blktide_volume::{SnapshotReader, VolumeClient, VolumeError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(10);
/// The longest that a backup waits for what was written before it to reach the volume (D3).
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked meanwhile whether the backup was cancelled.
const LOOK: Duration = Duration::from_millis(50);
/// Memory that stands in for a save area on the tracked volume itself.
const MEMORY_INSTEAD_BYTES: u64 = 256 << 20;

/// What a daemon needs of the source of a backup, beside what the job does.
pub(crate) trait Source: SnapshotSource + std::fmt::Debug {
    /// Ends the snapshot at once: writers no longer preserve, whatever the job's threads hang in.
    fn revoke(&self);

    /// Lets go of the snapshot, so that dropping the job's own hold ends it.
    fn release(&self);

    /// What the snapshot has cost, as last heard.
    fn figures(&self) -> SnapshotFigures;

    /// Whether memory stood in for the configured save area.
    fn used_memory_instead(&self) -> bool;

    /// The generation that the snapshot opened.
    fn opened(&self) -> Option<GenerationName>;

    /// The full image of the snapshot was committed: the tracker is trusted from there on. False: that was forgotten meanwhile.
    fn trust(&self) -> Result<bool, VolumeError>;
}

/// One backup's view of its volume.
#[derive(Debug)]
pub(crate) struct VolumeSource {
    runtime_dir: PathBuf,
    config: VolumeConfig,
    geometry: Geometry,
    node: Option<PathBuf>,
    revoked: AtomicBool,
    reader: Mutex<Option<Arc<SnapshotReader>>>,
    figures: Mutex<SnapshotFigures>,
    memory_instead: Mutex<bool>,
}

impl VolumeSource {
    /// The volume, whose server has just told `geometry` and the loop device `node`.
    pub(crate) fn new(
        runtime_dir: PathBuf,
        config: VolumeConfig,
        geometry: Geometry,
        node: Option<PathBuf>,
    ) -> Self {
        Self {
            node,
            revoked: AtomicBool::new(false),
            runtime_dir,
            config,
            geometry,
            reader: Mutex::default(),
            figures: Mutex::default(),
            memory_instead: Mutex::default(),
        }
    }

    fn client(&self) -> Result<VolumeClient, VolumeError> {
        VolumeClient::connect(&self.runtime_dir, self.config.name.as_str(), LIMIT)
    }

    fn request(&self, ask: &SnapshotAsk) -> SnapshotRequest {
        let area = &self.config.save_area;
        let (base, absent) = match (&ask.base, &ask.absent) {
            (Some(base), Some(_)) => (Some(Text(*base)), Absent::Listed),
            (Some(base), None) => (Some(Text(*base)), Absent::None),
            (None, _) => (None, Absent::All),
        };
        SnapshotRequest {
            base,
            absent,
            save_area: place(area),
            overflow: match area.overflow {
                Overflow::GiveUp => message::Overflow::GiveUp,
                Overflow::Wait => message::Overflow::Wait,
            },
            wait_limit_ms: millis(area.wait_limit),
            hold_deadline_ms: millis(self.config.hold_deadline),
        }
    }

    /// What was written before the backup was asked for is in it (D3): file systems on the node, and the node itself, are
    /// synced first, by a thread that may hang. After [`SYNC_LIMIT`] the backup goes on without.
    fn sync(&self) -> Result<(), BeginError> {
        let Some(node) = self.node.clone() else {
            return Ok(());
        };
        let (tell, told) = channel();
        let syncing = std::thread::Builder::new().name("sync".to_owned());
        let started = syncing.spawn(move || drop(tell.send(sync_all(&node))));
        started.map_err(BeginError::Io)?;
        let mut left = SYNC_LIMIT;
        let volume = &self.config.name;
        while !left.is_zero() {
            match told.recv_timeout(LOOK) {
                Ok(Ok(())) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(Err(error)) => {
                    tracing::warn!(%volume, %error, "what was written before could not be synced");
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) if self.revoked.load(Ordering::SeqCst) => {
                    return Err(BeginError::Revoked(RevokeCause::Cancelled));
                }
                Err(RecvTimeoutError::Timeout) => left = left.saturating_sub(LOOK),
            }
        }
        tracing::warn!(%volume, "what was written before is still being synced; the backup goes on");
        Ok(())
    }

    fn snapshot(&self, ask: &SnapshotAsk) -> Result<SnapshotReader, VolumeError> {
        let mut request = self.request(ask);
        let absent = ask.absent.as_ref().filter(|_| ask.base.is_some());
        match self.client()?.snapshot(&request, absent) {
            Err(VolumeError::Refused {
                kind: Refusal::SaveAreaOnVolume,
                ..
            }) => {
                let limit_bytes = self.config.save_area.limit_bytes.min(MEMORY_INSTEAD_BYTES);
                request.save_area = message::SaveArea::Memory { limit_bytes };
                *lock(&self.memory_instead) = true;
                tracing::warn!(volume = %self.config.name, limit_bytes, "the save area would lie on the volume itself; memory instead");
                self.client()?.snapshot(&request, absent)
            }
            other => other,
        }
    }
}

impl Source for VolumeSource {
    fn revoke(&self) {
        self.revoked.store(true, Ordering::SeqCst);
        let reader = lock(&self.reader).take();
        if let Some(reader) = reader {
            reader.cancel();
        }
    }

    fn release(&self) {
        lock(&self.reader).take();
    }

    fn figures(&self) -> SnapshotFigures {
        *lock(&self.figures)
    }

    fn used_memory_instead(&self) -> bool {
        *lock(&self.memory_instead)
    }

    fn opened(&self) -> Option<GenerationName> {
        lock(&self.reader).as_ref().map(|r| r.begun().generation.0)
    }

    fn trust(&self) -> Result<bool, VolumeError> {
        let Some(opened) = self.opened() else {
            return Ok(false);
        };
        self.client()?.trust(opened).map(|()| true)
    }
}

impl SnapshotSource for VolumeSource {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn begin(&self, ask: &SnapshotAsk) -> Result<Begun, BeginError> {
        if let SavePlace::Path(folder) = &self.config.save_area.place {
            // On a failure the volume's own answer says what is wrong.
            drop(fs::create_folders(folder, 0o700));
        }
        self.sync()?;
        let reader = Arc::new(self.snapshot(ask).map_err(begin_error)?);
        let begun = reader.begun();
        let tracker = match &begun.distrust {
            Some(distrust) => TrackerSays::Distrusted(
                Reason::from_code(&distrust.reason).unwrap_or(Reason::TrackingInterrupted),
            ),
            None if begun.base_resolved => TrackerSays::Resolved,
            None => TrackerSays::Unresolved,
        };
        let answer = Begun {
            id: begun.snapshot.0,
            opened: begun.generation.0,
            tracker,
            evidence: Vec::new(),
            instant: WallTime(begun.instant_ns),
            consistency: Consistency::Instant,
            snapshot: Arc::<SnapshotReader>::clone(&reader),
        };
        *lock(&self.reader) = Some(reader);
        Ok(answer)
    }

    fn cost(&self, _id: SnapshotId) -> SnapshotCost {
        let figures = self
            .client()
            .and_then(|mut client| client.status())
            .ok()
            .and_then(|status| status.snapshot)
            .unwrap_or_default();
        *lock(&self.figures) = figures;
        SnapshotCost {
            longest_wait: Duration::from_nanos(figures.longest_wait_ns),
            longest_freeze: Duration::ZERO,
            preserved_bytes: figures.preserved_bytes,
        }
    }
}

fn place(area: &SaveArea) -> message::SaveArea {
    match &area.place {
        SavePlace::Path(folder) => message::SaveArea::Path {
            folder: folder.clone(),
            limit_bytes: area.limit_bytes,
            min_free_bytes: area.min_free_bytes,
        },
        SavePlace::Memory(limit_bytes) => message::SaveArea::Memory {
            limit_bytes: *limit_bytes,
        },
        // Not built yet; `backup` refuses it before it comes here.
        SavePlace::Device(_) => message::SaveArea::Memory {
            limit_bytes: MEMORY_INSTEAD_BYTES,
        },
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the enum is open; what is not named is a plain failure"
)]
fn begin_error(error: VolumeError) -> BeginError {
    match error {
        VolumeError::Refused {
            kind: Refusal::Busy,
            ..
        } => BeginError::Busy,
        VolumeError::Refused {
            kind: Refusal::SnapshotExists,
            ..
        } => BeginError::Taken,
        VolumeError::Revoked(cause) => BeginError::Revoked(cause),
        other => BeginError::Io(io::Error::other(other)),
    }
}

/// Everything that file systems on `node` and its own page cache hold, to the volume.
fn sync_all(node: &Path) -> io::Result<()> {
    let device = BlockDevice::at(node).map_err(io::Error::other)?;
    for mount in device.mounts().map_err(io::Error::other)? {
        let folder = fs::open_read(&mount.at).map_err(io::Error::other)?;
        fs::sync_file_system(&folder)?;
    }
    let opened = fs::open_read(node).map_err(io::Error::other)?;
    fs::sync_data(&opened)
}

/// The volume's shape as its server tells it.
pub(crate) fn geometry(status: &VolumeStatus) -> Option<Geometry> {
    use blktide_types::unit::BlockSize;
    Geometry::new(
        status.volume_bytes,
        BlockSize::new(status.block_size_bytes)?,
        BlockSize::new(status.grain_bytes)?,
        status.logical_sector_bytes,
        status.physical_sector_bytes,
    )
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
