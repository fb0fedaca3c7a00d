//! The hand-over of the bitmap between lives (P4): what the state machine of the engine asks for, done to files.
//!
//! ```text
//! state_dir/NAME/  volume-id   who the volume is, for ever
//!                  marker      open, or closed by a life
//!                  bitmap      what that life has tracked
//! ```
//! **Invariant**: no write is let through before [`open`] has returned, none after [`close`] was called.

use crate::error::VolumeError;
use crate::log::Log;
use crate::save_area::chain;
use crate::server::{Tracker, engine_error};
use crate::start::Start;
use blktide_device::Backing;
use blktide_engine::Engine;
use blktide_engine::evidence::{self, Evidence, ReadAt};
use blktide_engine::handover::{self, Begun, Bitmap, Identity, Name, Stored, Surroundings};
use blktide_format::shared::control;
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::{SysError, fs, host};
use blktide_types::clock::{Clock, Random};
use blktide_types::id::{GenerationName, LifeId, VolumeId};
use blktide_types::reason::Reason;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A life of the bitmap: from attach to clean stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    /// The volume.
    pub(crate) volume: VolumeId,
    /// The life.
    pub(crate) life: LifeId,
}

impl Life {
    /// The one that stands in the control memory.
    pub(crate) fn of_words(engine: &Engine) -> Self {
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

/// Begins a life: takes the bitmap file over if it may be believed. Afterwards the first write is allowed.
///
/// Waits: for the evidence's reads and a few flushes of the state folder's disk.
/// Errors: nothing is served; a bitmap that might be believed later could not be destroyed, or there is no folder for one.
pub(crate) fn open(
    start: &Start,
    backing: &Backing,
    engine: &Engine,
    tracker: &mut Tracker,
    log: &Log,
) -> Result<Life, VolumeError> {
    let folder = start.options.state_folder();
    fs::create_folders(&folder, 0o700).map_err(|e| failed("make the folder", &folder, e))?;
    let random = SystemRandom::new();
    let life = Life {
        volume: volume_id(&folder, &random)?,
        life: LifeId(random.id()),
    };
    life.store(engine);
    let identity = identity(start, engine, life)?;
    let mut around = Around::new(&folder, backing)?;
    let sectors = sectors_changed(backing);
    let begun = handover::attach(identity, &mut around)
        .map_err(|source| VolumeError::Handover { source })?;
    let wall = SystemClock.wall();
    let fresh = || (GenerationName(random.id()), wall);
    match begun {
        Begun::Continued {
            generations,
            distrust,
        } => {
            tracker
                .begin_life(&generations, fresh())
                .map_err(engine_error)?;
            if let Some((reason, since)) = distrust {
                let detail = "a full backup is still owed from before the last stop";
                tracker.remember_distrust((reason, since), detail);
            }
            let count = generations.len();
            log.say(&format!(
                "server: the bitmap of the last stop is believed, {count} generations"
            ));
        }
        Begun::Anew { reason, detail } => {
            tracker.begin_life(&[], fresh()).map_err(engine_error)?;
            tracker.distrust((reason, wall), detail, fresh().0);
            log.say(&format!("server: tracking begins anew, {reason}: {detail}"));
        }
    }
    if let Some(sectors) = sectors {
        engine.set_word(control::SECTORS_WRITTEN, sectors);
    }
    Ok(life)
}

/// Ends a life: stores the bitmap file and closes the marker. The volume is provably closed to writers. May run twice.
///
/// Waits: for flushes of the device and of the state folder's disk. Errors: the next life distrusts.
pub(crate) fn close(
    start: &Start,
    backing: &Backing,
    engine: &Engine,
    tracker: &Tracker,
    life: Life,
) -> Result<(), VolumeError> {
    let folder = start.options.state_folder();
    let identity = identity(start, engine, life)?;
    let mut around = Around::new(&folder, backing)?;
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

/// The device's count before the evidence is taken: what somebody else writes from here on is seen at the next hold.
fn sectors_changed(backing: &Backing) -> Option<u64> {
    backing.sectors_changed()?;
    // What an earlier user left in the page cache is not written past us: the evidence's reads would push it out. If this
    // fails, a full backup too many is all that comes of it.
    drop(fs::sync_data(&**backing.file()));
    backing.sectors_changed()
}

fn identity(start: &Start, engine: &Engine, life: Life) -> Result<Identity, VolumeError> {
    Ok(Identity {
        volume: life.volume,
        life: life.life,
        boot: host::boot_id().map_err(|e| failed("read", Path::new("boot_id"), e))?,
        geometry: engine.shape().geometry,
        exclusive: start.options.exclusive,
    })
}

/// The volume's id: drawn at its first attach.
fn volume_id(folder: &Path, random: &SystemRandom) -> Result<VolumeId, VolumeError> {
    let path = folder.join("volume-id");
    let fresh = format!("{}\n", VolumeId(random.id()));
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
    backing: &'a Backing,
    reader: OwnedFd,
    last: Option<io::Error>,
}

impl<'a> Around<'a> {
    fn new(folder: &Path, backing: &'a Backing) -> Result<Self, VolumeError> {
        Ok(Self {
            folder: folder.to_owned(),
            reader: backing
                .reader()
                .map_err(|source| VolumeError::Device { source })?,
            backing,
            last: None,
        })
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
        let done = fs::sync_data(&**self.backing.file());
        self.noting(done)
    }

    fn evidence(&mut self) -> Evidence {
        evidence::collect(&Reader {
            device: &self.reader,
            bytes: self.backing.limits().volume_bytes,
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
