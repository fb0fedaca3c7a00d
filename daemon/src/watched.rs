//! A watched volume as the backup job sees it: copied ahead, then frozen for the last blocks; or, where its volume manager keeps an
//! instant, read from that.

use crate::source::Source;
use blktide_api::config::{Instant, OverBudget, SavePlace, VolumeConfig};
use blktide_job::source::{
    BeginError, Begun, CopyAhead, Round, RoundCost, SnapshotAsk, SnapshotCost, SnapshotSource,
    TrackerSays,
};
use blktide_sys::blockdev::{self, BlockDevice};
use blktide_sys::clock::SystemRandom;
use blktide_sys::fs::{self, Unnamed};
use blktide_sys::memfd;
use blktide_sys::spawn::Program;
use blktide_types::clock::Random as _;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::{BlockOutcome, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_volume::error::Refusal;
use blktide_volume::message::SnapshotFigures;
use blktide_volume::{VolumeError, VolumeOptions};
use blktide_watch::{Ahead, AheadRequest, FreezeLimits, InstantImage, Native, NativeImage, Next};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long the volume's control side is waited for.
const LIMIT: Duration = Duration::from_secs(10);
/// Rounds of copying before a volume is called too busy.
const ROUNDS: u32 = 30;

/// One backup's view of a watched volume.
#[derive(Debug)]
pub(crate) struct WatchSource {
    options: VolumeOptions,
    config: VolumeConfig,
    geometry: Geometry,
    /// Has begun, for a snapshot of the volume manager's.
    begun: Mutex<Option<(Native, Ahead)>>,
    image: Arc<Mutex<Option<Image>>>,
    longest_freeze: Arc<Mutex<Duration>>,
}

/// An image's instant, however it is kept.
#[derive(Clone, Debug)]
enum Image {
    Copied(Arc<InstantImage>),
    Native(Arc<NativeImage>),
}

impl Image {
    fn opened(&self) -> GenerationName {
        match self {
            Self::Copied(image) => image.opened(),
            Self::Native(image) => image.opened(),
        }
    }

    fn trust(&self) -> bool {
        match self {
            Self::Copied(image) => image.trust(),
            Self::Native(image) => image.trust(),
        }
    }
}

impl WatchSource {
    pub(crate) fn new(options: VolumeOptions, config: VolumeConfig, geometry: Geometry) -> Self {
        Self {
            options,
            config,
            geometry,
            begun: Mutex::default(),
            image: Arc::default(),
            longest_freeze: Arc::default(),
        }
    }

    /// The volume manager's snapshot, if one is to be taken.
    fn native(&self) -> Result<Option<Native>, BeginError> {
        match self.config.instant {
            Instant::Freeze => Ok(None),
            Instant::Auto => Ok(Native::of(&self.options).filter(Native::is_safe)),
            Instant::Lvm => {
                let native = Native::of(&self.options);
                let why = "instant = \"lvm\": it is no logical volume, or its group has no room for a snapshot (a tenth of it, 1 GiB at least)";
                let lacks = || BeginError::Io(io::Error::other(why));
                native.ok_or_else(lacks).map(Some)
            }
        }
    }

    fn limits(&self) -> FreezeLimits {
        FreezeLimits {
            budget: self.config.freeze_budget,
            limit: self.config.freeze_limit,
            over: match self.config.over_budget {
                OverBudget::GiveUp => blktide_watch::OverBudget::GiveUp,
                OverBudget::Longer => blktide_watch::OverBudget::Longer,
            },
            rounds: ROUNDS,
            ..FreezeLimits::default()
        }
    }

    /// Whether `path` lies on the volume: what is written there would wait for the thaw. In doubt it does.
    fn lies_on_volume(&self, path: &Path) -> bool {
        let device = BlockDevice::at(&self.options.device);
        device.map_or(true, |device| {
            blockdev::lies_on(path, device.number()).unwrap_or(true)
        })
    }
}

impl Source for WatchSource {
    fn revoke(&self) {
        // A freeze ends by itself, and what was drained is in the tracker.
        self.release();
    }

    fn release(&self) {
        lock(&self.image).take();
    }

    fn figures(&self) -> SnapshotFigures {
        SnapshotFigures::default()
    }

    fn used_memory_instead(&self) -> bool {
        false
    }

    fn opened(&self) -> Option<GenerationName> {
        lock(&self.image).as_ref().map(Image::opened)
    }

    fn trust(&self) -> Result<bool, VolumeError> {
        Ok(lock(&self.image).as_ref().is_some_and(Image::trust))
    }
}

impl SnapshotSource for WatchSource {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn begin(&self, _ask: &SnapshotAsk) -> Result<Begun, BeginError> {
        let Some((native, ahead)) = lock(&self.begun).take() else {
            let why = "a watched volume has no copy-on-write of its own";
            let error = io::Error::new(io::ErrorKind::Unsupported, why);
            return Err(BeginError::Io(error));
        };
        let tracker = says(&ahead);
        let image = Arc::new(NativeImage::take(&native, ahead)?);
        *lock(&self.longest_freeze) = image.longest_freeze();
        *lock(&self.image) = Some(Image::Native(Arc::clone(&image)));
        Ok(Begun {
            id: SnapshotId(SystemRandom::new().id()),
            opened: image.opened(),
            tracker,
            evidence: Vec::new(),
            instant: image.instant(),
            consistency: image.consistency(),
            snapshot: image,
        })
    }

    fn copy_ahead(&self, ask: &SnapshotAsk) -> Result<Option<Box<dyn CopyAhead>>, BeginError> {
        let native = self.native()?;
        // A second try of the same backup: what the first one held is the volume's control side.
        self.release();
        let guard = Program::this().map_err(|e| BeginError::Io(io::Error::other(e)))?;
        let request = AheadRequest {
            guard: Arc::new(guard),
            base: ask.base,
            absent: ask.absent.clone(),
            limits: self.limits(),
        };
        let ahead = Ahead::begin(&self.options, &request, LIMIT).map_err(begin_error)?;
        if let Some(why) = ahead.distrust() {
            let (volume, reason, detail) = (&self.options.name, &why.reason, &why.detail);
            tracing::info!(%volume, %reason, %detail, "marks are not believed, so everything is read");
        }
        if let Some(native) = native {
            *lock(&self.begun) = Some((native, ahead));
            return Ok(None);
        }
        Ok(Some(Box::new(Copying {
            ahead,
            image: Arc::clone(&self.image),
            longest_freeze: Arc::clone(&self.longest_freeze),
        })))
    }

    fn spool(&self) -> io::Result<File> {
        if let SavePlace::Path(folder) = &self.config.save_area.place
            && fs::create_folders(folder, 0o700).is_ok()
            && !self.lies_on_volume(folder)
            && let Ok(unnamed) = Unnamed::create(folder, 0o600, false)
        {
            return unnamed.file().try_clone();
        }
        memfd::growing("blktide-spool").map_err(io::Error::other)
    }

    fn cost(&self, _id: SnapshotId) -> SnapshotCost {
        SnapshotCost {
            longest_wait: Duration::ZERO,
            longest_freeze: *lock(&self.longest_freeze),
            preserved_bytes: 0,
        }
    }
}

/// A volume that is being copied ahead.
struct Copying {
    ahead: Ahead,
    image: Arc<Mutex<Option<Image>>>,
    longest_freeze: Arc<Mutex<Duration>>,
}

impl CopyAhead for Copying {
    fn geometry(&self) -> Geometry {
        self.ahead.geometry()
    }

    fn tracker(&self) -> TrackerSays {
        says(&self.ahead)
    }

    fn first(&self) -> BlockSet {
        self.ahead.first().clone()
    }

    fn read_now(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        self.ahead.read_now(range, buf)
    }

    fn next(&self, _cost: RoundCost) -> Result<Round, BeginError> {
        let next = self.ahead.next();
        *lock(&self.longest_freeze) = self.ahead.longest_freeze();
        let image = match next? {
            Next::Copy(blocks) => return Ok(Round::Again(blocks)),
            Next::Instant(image) => image,
        };
        let begun = Begun {
            id: SnapshotId(SystemRandom::new().id()),
            opened: image.opened(),
            tracker: self.tracker(),
            evidence: Vec::new(),
            instant: image.instant(),
            consistency: image.consistency(),
            snapshot: Arc::<InstantImage>::clone(&image),
        };
        let last = image.last_blocks().clone();
        *lock(&self.image) = Some(Image::Copied(image));
        Ok(Round::Instant { begun, last })
    }
}

fn says(ahead: &Ahead) -> TrackerSays {
    match ahead.distrust() {
        Some(distrust) => TrackerSays::Distrusted(
            Reason::from_code(&distrust.reason).unwrap_or(Reason::TrackingInterrupted),
        ),
        None if ahead.resolved() => TrackerSays::Resolved,
        None => TrackerSays::Unresolved,
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
        other => BeginError::Io(io::Error::other(other)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
