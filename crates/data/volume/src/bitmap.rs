//! The hand-over of the bitmap between lives (P4): what the state machine of the engine asks for, done to files.
//!
//! ```text
//! state_dir/NAME/  volume-id   who the volume is, for ever
//!                  marker      open, or closed by a life
//!                  bitmap      what that life has tracked
//! ```
//! **Invariant**: no write is let through before [`open`] has returned, none after [`close`] was called. Where writers could not
//! be kept out ([`Writers::Perhaps`]) no stored bitmap is believed.

use crate::error::VolumeError;
use crate::options::VolumeOptions;
use crate::save_area::chain;
use crate::server::engine_error;
use blktide_device::Backing;
use blktide_engine::evidence::{self, Evidence, ReadAt};
use blktide_engine::handover::{self, Begun, Bitmap, Identity, Name, Stored, Surroundings};
use blktide_engine::{Control, Engine};
use blktide_format::shared::control;
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::{SysError, fs, host};
use blktide_types::clock::{Clock, Random, WallTime};
use blktide_types::id::{GenerationName, LifeId, VolumeId};
use blktide_types::reason::Reason;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A life of the bitmap: from attach to clean stop.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// The volume.
    pub volume: VolumeId,
    /// The life.
    pub life: LifeId,
}

/// Whether somebody can write to the volume while its bitmap is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// The fence is ours: nobody, since before the evidence was looked at.
    None,
    /// It is in use.
    Perhaps,
}

/// The device of a hand-over.
#[derive(Debug)]
pub struct HandoverDevice {
    /// Evidence is read from it; open for direct reads.
    pub reader: OwnedFd,
    /// It is flushed by this.
    pub flushed: Arc<OwnedFd>,
    /// Bytes of the volume.
    pub volume_bytes: u64,
}

impl HandoverDevice {
    /// That of a fenced backing device.
    pub fn of(backing: &Backing) -> Result<Self, VolumeError> {
        Ok(Self {
            reader: backing
                .reader()
                .map_err(|source| VolumeError::Device { source })?,
            flushed: Arc::clone(backing.file()),
            volume_bytes: backing.limits().volume_bytes,
        })
    }
}

impl Life {
    /// The one that stands in the control memory.
    pub fn of_words(engine: &Engine) -> Self {
        let id = |a, b| {
            let mut out = [0; 16];
            let (low, high) = out.split_at_mut(8);
            low.copy_from_slice(&engine.word(a).to_ne_bytes());
            high.copy_from_slice(&engine.word(b).to_ne_bytes());
            out
        };
        Self {
            volume: VolumeId(id(control::VOLUME_ID_0, control::VOLUME_ID_1)),
            life: LifeId(id(control::LIFE_ID_0, control::LIFE_ID_1)),
        }
    }

    fn store(self, engine: &Engine) {
        let put = |index: usize, half: &[u8]| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(half) {
                *to = *from;
            }
            engine.set_word(index, u64::from_ne_bytes(word));
        };
        let (low, high) = self.volume.0.split_at(8);
        put(control::VOLUME_ID_0, low);
        put(control::VOLUME_ID_1, high);
        let (low, high) = self.life.0.split_at(8);
        put(control::LIFE_ID_0, low);
        put(control::LIFE_ID_1, high);
    }
}

/// Begins a life: takes the bitmap file over if it may be believed. Afterwards the first write is allowed, or, with
/// [`Writers::Perhaps`], everything that is marked from now on counts. `say` is told what became of it.
///
/// Waits: for the evidence's reads and a few flushes of the state folder's disk.
/// Errors: nothing is served; a bitmap that might be believed later could not be destroyed, or there is no folder for one.
pub fn open(
    options: &VolumeOptions,
    (device, writers): (&HandoverDevice, Writers),
    engine: &Engine,
    tracker: &mut Control,
    say: &dyn Fn(&str),
) -> Result<Life, VolumeError> {
    let folder = options.state_folder();
    let random = SystemRandom::new();
    let life = Life {
        volume: volume_id(options)?,
        life: LifeId(random.id()),
    };
    life.store(engine);
    let identity = identity(options, engine, life)?;
    let mut around = Around::new(&folder, device);
    let begun = handover::attach(identity, &mut around)
        .map_err(|source| VolumeError::Handover { source })?;
    let wall = SystemClock.wall();
    let fresh = || (GenerationName(random.id()), wall);
    match begun {
        Begun::Continued {
            generations,
            distrust,
        } if writers == Writers::None => {
            tracker
                .begin_life(&generations, fresh())
                .map_err(engine_error)?;
            if let Some((reason, since)) = distrust {
                let detail = "a full backup is still owed from before the last stop";
                tracker.remember_distrust((reason, since), detail);
            }
            let count = generations.len();
            say(&format!(
                "the bitmap of the last stop is believed, {count} generations"
            ));
        }
        Begun::Continued { .. } => {
            let reason = Reason::TrackingInterrupted;
            let detail = "it was in use when tracking began: what was written before is not known";
            begin_anew(tracker, (reason, detail), (wall, &fresh), say)?;
        }
        Begun::Anew { reason, detail } => {
            begin_anew(tracker, (reason, detail), (wall, &fresh), say)?;
        }
    }
    Ok(life)
}

fn begin_anew(
    tracker: &mut Control,
    (reason, detail): (Reason, &str),
    (wall, fresh): (WallTime, &dyn Fn() -> (GenerationName, WallTime)),
    say: &dyn Fn(&str),
) -> Result<(), VolumeError> {
    tracker.begin_life(&[], fresh()).map_err(engine_error)?;
    tracker.distrust((reason, wall), detail, fresh().0);
    say(&format!("tracking begins anew, {reason}: {detail}"));
    Ok(())
}

/// Ends a life: stores the bitmap file and closes the marker. The volume is provably closed to writers. May run twice.
///
/// Waits: for flushes of the device and of the state folder's disk. Errors: the next life distrusts.
pub fn close(
    options: &VolumeOptions,
    device: &HandoverDevice,
    engine: &Engine,
    tracker: &Control,
) -> Result<(), VolumeError> {
    let folder = options.state_folder();
    let identity = identity(options, engine, Life::of_words(engine))?;
    let mut around = Around::new(&folder, device);
    let trust = tracker.trusted();
    let bitmap = if engine.word(control::PASS_THROUGH) == 0 {
        Bitmap::Known {
            generations: tracker.export(),
            distrust: trust.reason.map(|reason| (reason, trust.since)),
        }
    } else {
        Bitmap::Unknown(Reason::TrackingInterrupted)
    };
    match handover::stop(identity, bitmap, &mut around) {
        Stored::Whole | Stored::MarkerUnsure => Ok(()),
        Stored::Not => Err(VolumeError::Io {
            what: "store the bitmap",
            path: folder,
            source: around.last.unwrap_or_else(|| io::ErrorKind::Other.into()),
        }),
    }
}

/// Ends a life whose volume goes on being written: no bitmap is stored, and the marker says why for good.
///
/// Waits: for a flush of the state folder's disk. Errors: the marker says 'open' all the same, and the next life distrusts.
pub fn give_up(
    options: &VolumeOptions,
    device: &HandoverDevice,
    engine: &Engine,
    reason: Reason,
) -> Result<(), VolumeError> {
    let identity = identity(options, engine, Life::of_words(engine))?;
    let mut around = Around::new(&options.state_folder(), device);
    handover::stop(identity, Bitmap::Unknown(reason), &mut around);
    Ok(())
}

/// The device's count before the evidence is taken: what somebody else writes from here on is seen at the next hold.
pub(crate) fn sectors_changed(backing: &Backing) -> Option<u64> {
    backing.sectors_changed()?;
    // What an earlier user left in the page cache is not written past us: the evidence's reads would push it out. If this
    // fails, a full backup too many is all that comes of it.
    drop(fs::sync_data(&**backing.file()));
    backing.sectors_changed()
}

fn identity(options: &VolumeOptions, engine: &Engine, life: Life) -> Result<Identity, VolumeError> {
    Ok(Identity {
        volume: life.volume,
        life: life.life,
        boot: host::boot_id().map_err(|e| failed("read", Path::new("boot_id"), e))?,
        geometry: engine.shape().geometry,
        exclusive: options.exclusive,
    })
}

/// The volume's id: drawn at its first attach. Makes the state folder if need be.
pub fn volume_id(options: &VolumeOptions) -> Result<VolumeId, VolumeError> {
    let folder = options.state_folder();
    fs::create_folders(&folder, 0o700).map_err(|e| failed("make the folder", &folder, e))?;
    let path = folder.join("volume-id");
    let fresh = format!("{}\n", VolumeId(SystemRandom::new().id()));
    // Whichever is there afterwards counts.
    fs::create_if_absent(&path, fresh.as_bytes(), 0o600).map_err(|e| failed("make", &path, e))?;
    let text = std::fs::read_to_string(&path).map_err(|source| VolumeError::Io {
        what: "read",
        path: path.clone(),
        source,
    })?;
    text.trim().parse().map_err(|e| VolumeError::Io {
        what: "understand",
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, e),
    })
}

fn failed(what: &'static str, path: &Path, source: SysError) -> VolumeError {
    VolumeError::Io {
        what,
        path: path.to_owned(),
        source: io::Error::other(source),
    }
}

/// The state folder and the device.
struct Around<'a> {
    folder: PathBuf,
    device: &'a HandoverDevice,
    last: Option<io::Error>,
}

impl<'a> Around<'a> {
    fn new(folder: &Path, device: &'a HandoverDevice) -> Self {
        Self {
            folder: folder.to_owned(),
            device,
            last: None,
        }
    }

    fn path(&self, name: Name) -> PathBuf {
        self.folder.join(name.file_name())
    }

    fn open(&self, name: Name, create: bool) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(create)
            .create(create)
            .truncate(false)
            .mode(0o600)
            .custom_flags(fs::NO_FOLLOW)
            .open(self.path(name))
    }

    fn noting<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|e| self.last = Some(io::Error::new(e.kind(), chain(e))))
    }
}

impl Surroundings for Around<'_> {
    fn read(&mut self, name: Name, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(name, false) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut content = Vec::new();
        file.take(limit_bytes.saturating_add(1))
            .read_to_end(&mut content)?;
        Ok(Some(content))
    }

    fn put(&mut self, name: Name, bytes: &[u8]) -> io::Result<()> {
        let put = || {
            let mut file = self.open(name, true)?;
            file.write_all(bytes)?;
            file.set_len(u64::try_from(bytes.len()).map_err(io::Error::other)?)
        };
        let done = put();
        self.noting(done)
    }

    fn sync(&mut self, name: Name) -> io::Result<()> {
        let done = self.open(name, true).and_then(|f| f.sync_all());
        self.noting(done)
    }

    fn unlink(&mut self, name: Name) -> io::Result<()> {
        let done = match std::fs::remove_file(self.path(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        self.noting(done)
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        let done = fs::sync_folder(&self.folder).map_err(io::Error::other);
        self.noting(done)
    }

    fn flush_device(&mut self) -> io::Result<()> {
        let done = fs::sync_data(&*self.device.flushed);
        self.noting(done)
    }

    fn evidence(&mut self) -> Evidence {
        evidence::collect(&Reader {
            device: &self.device.reader,
            bytes: self.device.volume_bytes,
        })
    }
}

struct Reader<'a> {
    device: &'a OwnedFd,
    bytes: u64,
}

impl ReadAt for Reader<'_> {
    fn len_bytes(&self) -> u64 {
        self.bytes
    }

    fn read_exact_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut aligned = AlignedBuffer::new(buf.len());
        let part = aligned.get_mut(..buf.len()).unwrap_or_default();
        if fs::read_full(self.device, offset_bytes, part)? != buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.copy_from_slice(part);
        Ok(())
    }
}
