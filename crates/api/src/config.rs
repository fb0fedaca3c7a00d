//! Configuration: from texts to checked values, all or nothing.
//!
//! ```text
//!   files ──▶ Raw* (serde, unknown keys refused) ──▶ merged, later file wins ──▶ Config · VolumeConfig · RepositoryConfig
//! ```
//! Invariant: a [`Config`] that exists has been checked as a whole; no later step can find it wrong.
//! An error names file and line. Reading the files is the binaries' business: they implement [`ReadFiles`].

mod raw;
mod write;

use crate::name::{Name, RepositoryRef};
use crate::unit::MinFree;
use blktide_types::unit::BlockSize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use write::{repository_file, volume_file};

/// Where the configuration lies unless told otherwise.
pub const DEFAULT_FILE: &str = "/etc/blktide/blktide.toml";

/// The example that is shipped: every key, commented out, with its default.
pub const EXAMPLE: &str = include_str!("config/blktide.toml");

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file or folder could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{path}:{line}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value that does not mean anything, or contradicts another.
    #[error("{path}:{line}: {key}: {message}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A file of `volumes.d` or `repositories.d` whose name is not a name.
    #[error("{path}: the file's name is not the name of a volume or repository")]
    FileName {
        /// The file.
        path: PathBuf,
        /// Why.
        source: crate::name::NameError,
    },
}

/// How a volume is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `volume add` decides.
    Auto,
    /// eBPF beside the data path.
    Watch,
    /// ublk under device-mapper.
    Ublk,
    /// FUSE under a loop device.
    Fuse,
}

impl Mode {
    const WORDS: &[(Self, &str)] = &[
        (Self::Auto, "auto"),
        (Self::Watch, "watch"),
        (Self::Ublk, "ublk"),
        (Self::Fuse, "fuse"),
    ];

    /// The word of the interface.
    pub fn word(self) -> &'static str {
        word_of(Self::WORDS, self)
    }

    /// The mode of a word.
    pub fn from_word(word: &str) -> Option<Self> {
        of_word(Self::WORDS, word)
    }
}

/// Mode `watch`: what keeps the instant of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instant {
    /// A snapshot of a thin logical volume where there is one, else a freeze.
    Auto,
    /// A freeze, after copying ahead.
    Freeze,
    /// A snapshot of LVM's.
    Lvm,
}

impl Instant {
    const WORDS: &[(Self, &str)] = &[
        (Self::Auto, "auto"),
        (Self::Freeze, "freeze"),
        (Self::Lvm, "lvm"),
    ];

    /// The word of the interface.
    pub fn word(self) -> &'static str {
        word_of(Self::WORDS, self)
    }
}

/// When a volume is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// When the machine, or `blktided`, starts.
    Boot,
    /// By `blktidectl attach`.
    Manual,
}

impl Attach {
    const WORDS: &[(Self, &str)] = &[(Self::Boot, "boot"), (Self::Manual, "manual")];

    /// The word of the interface.
    pub fn word(self) -> &'static str {
        word_of(Self::WORDS, self)
    }
}

/// What happens when the save area is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The backup ends, no writer waits.
    GiveUp,
    /// Writers to blocks not yet copied wait, at most `wait_limit`.
    Wait,
}

impl Overflow {
    const WORDS: &[(Self, &str)] = &[(Self::GiveUp, "give-up"), (Self::Wait, "wait")];

    /// The word of the interface.
    pub fn word(self) -> &'static str {
        word_of(Self::WORDS, self)
    }
}

/// What becomes of a backup in mode `watch` if what is left to copy does not fit into `freeze_budget`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverBudget {
    /// The backup ends, no writer waits.
    GiveUp,
    /// Writers wait for longer, at most `freeze_limit`.
    Longer,
}

impl OverBudget {
    const WORDS: &[(Self, &str)] = &[(Self::GiveUp, "give-up"), (Self::Longer, "longer")];

    /// The word of the interface.
    pub fn word(self) -> &'static str {
        word_of(Self::WORDS, self)
    }
}

fn word_of<T: PartialEq + Copy>(words: &[(T, &'static str)], value: T) -> &'static str {
    words
        .iter()
        .find(|(v, _)| *v == value)
        .map_or("", |(_, word)| word)
}

fn of_word<T: Copy>(words: &[(T, &'static str)], word: &str) -> Option<T> {
    words.iter().find(|(_, w)| *w == word).map(|(v, _)| *v)
}

/// Where originals go while a backup runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavePlace {
    /// An unlinked file in this folder.
    Path(PathBuf),
    /// Memory, bytes.
    Memory(u64),
    /// A block device of its own.
    Device(PathBuf),
}

/// The save area of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveArea {
    /// Where.
    pub place: SavePlace,
    /// At most so many bytes (for memory: what `memory` says).
    pub limit_bytes: u64,
    /// Left free on the file system of a path, bytes.
    pub min_free_bytes: u64,
    /// What happens when it is full.
    pub overflow: Overflow,
    /// The longest that any one write may wait.
    pub wait_limit: Duration,
}

/// What holds for every volume unless its own file says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// How it is tracked.
    pub mode: Mode,
    /// Unit of image and snapshot.
    pub block_size: BlockSize,
    /// Unit of one bit of the tracker; `None`: see [`Defaults::grain_of`].
    pub grain: Option<BlockSize>,
    /// The repository of its backups.
    pub repository: Name,
    /// Bytes per second; `None`: no limit.
    pub max_read_rate: Option<u64>,
    /// Older than this: `status` says so.
    pub max_age: Duration,
    /// The longest that a hold keeps writers waiting before it lets go and tries again.
    pub hold_deadline: Duration,
    /// Mode `watch`: so long the freeze of a file system is meant to be, at most.
    pub freeze_budget: Duration,
    /// Mode `watch`: then the freeze ends, whatever happens.
    pub freeze_limit: Duration,
    /// Mode `watch`: what is done if the budget cannot be kept.
    pub over_budget: OverBudget,
    /// Mode `watch`: what keeps the instant of an image.
    pub instant: Instant,
    /// Originals.
    pub save_area: SaveArea,
}

impl Defaults {
    /// The unit of one bit for a volume of which nothing else is said: what is configured, as far as it fits into a block; else
    /// 4 KiB in mode `watch`, whose bitmap is the kernel's, and the block size in all others.
    pub fn grain_of(&self, mode: Mode, block_size: BlockSize) -> BlockSize {
        let usual = match mode {
            Mode::Watch => BlockSize::IMAGE_MIN,
            Mode::Auto | Mode::Ublk | Mode::Fuse => block_size,
        };
        let fits = |grain: &BlockSize| grain.shift() <= block_size.shift();
        self.grain.filter(fits).unwrap_or(usual)
    }
}

/// One volume: `volumes.d/NAME.toml` over the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Its name: the file's.
    pub name: Name,
    /// The backing device, or a regular file.
    pub device: PathBuf,
    /// How it is tracked; never [`Mode::Auto`].
    pub mode: Mode,
    /// When it is attached.
    pub attach: Attach,
    /// Nothing else ever writes this device, also while blktide is away.
    pub exclusive: bool,
    /// Unit of image and snapshot.
    pub block_size: BlockSize,
    /// Unit of one bit of the tracker; at most the block size.
    pub grain: BlockSize,
    /// The repository of its backups.
    pub repository: Name,
    /// Bytes per second; `None`: no limit.
    pub max_read_rate: Option<u64>,
    /// Older than this: `status` says so.
    pub max_age: Duration,
    /// See [`Defaults::hold_deadline`].
    pub hold_deadline: Duration,
    /// See [`Defaults::freeze_budget`].
    pub freeze_budget: Duration,
    /// See [`Defaults::freeze_limit`].
    pub freeze_limit: Duration,
    /// See [`Defaults::over_budget`].
    pub over_budget: OverBudget,
    /// See [`Defaults::instant`].
    pub instant: Instant,
    /// Originals.
    pub save_area: SaveArea,
}

/// What `forget` keeps without options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many.
    pub last: u32,
    /// One an hour, so many.
    pub hourly: u32,
    /// One a day, so many.
    pub daily: u32,
    /// One a week, so many.
    pub weekly: u32,
    /// One a month, so many.
    pub monthly: u32,
    /// One a year, so many.
    pub yearly: u32,
}

/// One repository: `repositories.d/NAME.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryConfig {
    /// Its name: the file's.
    pub name: Name,
    /// Where it lies.
    pub path: PathBuf,
    /// What `forget` keeps; `None`: nothing is ever forgotten.
    pub keep: Option<Keep>,
    /// Left free on its file system.
    pub min_free: MinFree,
    /// Volumes above dm-crypt are allowed although it is not encrypted.
    pub plaintext: bool,
}

/// Everything that is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file it came from, which may not exist.
    pub file: PathBuf,
    /// Sockets.
    pub runtime_dir: PathBuf,
    /// Bitmap files, markers, records of backups.
    pub state_dir: PathBuf,
    /// Device nodes.
    pub device_dir: PathBuf,
    /// `NAME.toml` of the volumes.
    pub volumes_dir: PathBuf,
    /// `NAME.toml` of the repositories.
    pub repositories_dir: PathBuf,
    /// Besides root, members of this group may use the verbs that change something.
    pub socket_group: Option<String>,
    /// For all volumes.
    pub defaults: Defaults,
    /// The volumes, by name.
    pub volumes: BTreeMap<Name, VolumeConfig>,
    /// The repositories, by name.
    pub repositories: BTreeMap<Name, RepositoryConfig>,
}

impl Default for SaveArea {
    fn default() -> Self {
        Self {
            place: SavePlace::Path(PathBuf::from("/var/lib/blktide/save")),
            limit_bytes: 4 << 30,
            min_free_bytes: 1 << 30,
            overflow: Overflow::GiveUp,
            wait_limit: Duration::from_secs(5),
        }
    }
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            block_size: BlockSize::DEFAULT,
            grain: None,
            repository: Name::main(),
            max_read_rate: None,
            max_age: Duration::from_secs(26 * 3600),
            hold_deadline: Duration::from_millis(500),
            freeze_budget: Duration::from_millis(100),
            freeze_limit: Duration::from_secs(5),
            over_budget: OverBudget::GiveUp,
            instant: Instant::Auto,
            save_area: SaveArea::default(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            file: PathBuf::from(DEFAULT_FILE),
            runtime_dir: PathBuf::from("/run/blktide"),
            state_dir: PathBuf::from("/var/lib/blktide"),
            device_dir: PathBuf::from("/dev/blktide"),
            volumes_dir: PathBuf::from("/etc/blktide/volumes.d"),
            repositories_dir: PathBuf::from("/etc/blktide/repositories.d"),
            socket_group: None,
            defaults: Defaults::default(),
            volumes: BTreeMap::new(),
            repositories: BTreeMap::new(),
        }
    }
}

/// What command line and environment say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--config`, else `BLKTIDE_CONFIG`. A file that was named must exist.
    pub file: Option<PathBuf>,
    /// `BLKTIDE_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `BLKTIDE_STATE_DIR`.
    pub state_dir: Option<PathBuf>,
}

impl Overrides {
    /// From the command line's `--config` and a look-up in the environment.
    pub fn new(option: Option<PathBuf>, environment: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let set = |name| environment(name).filter(|p| !p.as_os_str().is_empty());
        Self {
            file: option.or_else(|| set("BLKTIDE_CONFIG")),
            runtime_dir: set("BLKTIDE_RUNTIME_DIR"),
            state_dir: set("BLKTIDE_STATE_DIR"),
        }
    }
}

/// How the binaries hand files in.
pub trait ReadFiles {
    /// The text of a file; `NotFound` counts as 'not there'.
    fn read(&self, path: &Path) -> io::Result<String>;
    /// The entries of a folder in any order; `NotFound` counts as empty.
    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>>;
}

impl Config {
    /// Reads and checks everything, or says what is wrong and where.
    pub fn load(overrides: &Overrides, files: &dyn ReadFiles) -> Result<Self, ConfigError> {
        raw::load(overrides, files)
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime_dir.join("blktide.sock")
    }

    /// The file of a volume, there or not.
    pub fn volume_file(&self, name: &Name) -> PathBuf {
        self.volumes_dir.join(format!("{name}.toml"))
    }

    /// The file of a repository, there or not.
    pub fn repository_file(&self, name: &Name) -> PathBuf {
        self.repositories_dir.join(format!("{name}.toml"))
    }

    /// The node to mount.
    pub fn node(&self, name: &Name) -> PathBuf {
        self.device_dir.join(name.as_str())
    }

    /// What users of the volume mount: its node; in mode `watch` the device itself, as before.
    pub fn node_of(&self, volume: &VolumeConfig) -> PathBuf {
        match volume.mode {
            Mode::Watch => volume.device.clone(),
            Mode::Auto | Mode::Ublk | Mode::Fuse => self.node(&volume.name),
        }
    }

    /// The folder of one volume's state.
    pub fn volume_state_dir(&self, name: &Name) -> PathBuf {
        self.state_dir.join(name.as_str())
    }

    /// Where `reference` lies; `None` if it is a name that is not registered.
    pub fn repository_path(&self, reference: &RepositoryRef) -> Option<PathBuf> {
        match reference {
            RepositoryRef::Path(path) => Some(path.clone()),
            RepositoryRef::Name(name) => self.repositories.get(name).map(|r| r.path.clone()),
        }
    }
}

#[cfg(test)]
mod tests;
