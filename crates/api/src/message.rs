//! The documents that scripts read and the socket carries. Keys are only ever added.

use serde::{Deserialize, Serialize};

/// A document's `message_type`, always first.
macro_rules! kinds {
    ($($name:ident = $word:literal;)+) => {$(
        #[doc = concat!("`\"", $word, "\"`.")]
        pub const $name: &str = $word;
    )+};
}

kinds! {
    STATUS = "status";
    SUMMARY = "summary";
    PLAN = "plan";
    PROGRESS = "progress";
    IMAGES = "images";
    IMAGE = "image";
    VERIFY = "verify";
    RESTORE = "restore";
    VOLUMES = "volumes";
    VOLUME = "volume";
    REPOSITORIES = "repositories";
    DONE = "done";
    FLUSH = "flush";
}

/// `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusDocument {
    /// [`STATUS`].
    pub message_type: String,
    /// `running` or `unreachable`.
    pub daemon: String,
    /// This machine.
    pub host: String,
    /// The volumes, by name.
    pub volumes: Vec<VolumeDocument>,
    /// What concerns no single volume, as codes.
    pub warnings: Vec<String>,
    /// What to do, in words; what stands here makes `status` exit 3.
    pub advice: Vec<String>,
}

/// A volume in `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeDocument {
    /// Its name.
    pub name: String,
    /// attached · detached · attaching · passing-through · failed.
    pub state: String,
    /// The server.
    pub pid: Option<u32>,
    /// Its keeper.
    pub keeper_pid: Option<u32>,
    /// The backing device.
    pub device: String,
    /// Where the node is mounted.
    pub mountpoint: Option<String>,
    /// The node to mount.
    pub node: String,
    /// watch · ublk · fuse.
    pub mode: String,
    /// Size; null where nothing has told it yet.
    pub size_bytes: Option<u64>,
    /// Unit of image and snapshot.
    pub block_size_bytes: u32,
    /// trusted · distrusted · off.
    pub tracking: String,
    /// A reason of the closed list.
    pub distrust_reason: Option<String>,
    /// Since when.
    pub distrust_time: Option<String>,
    /// What was seen.
    pub distrust_detail: Option<String>,
    /// Changed since the last image in its default repository.
    pub changed_bytes: Option<u64>,
    /// Number of the open generation.
    pub generation: Option<u64>,
    /// Its last image in its default repository.
    pub last_image: Option<String>,
    /// What each repository has of it.
    pub repositories: Vec<VolumeRepositoryDocument>,
    /// What runs.
    pub job: Option<JobDocument>,
    /// What an administrator should know, as codes.
    pub warnings: Vec<String>,
    /// Servers that have died and were replaced; null where nothing runs.
    #[serde(default)]
    pub takeovers: Option<u64>,
    /// The longest that a takeover made the volume stand still.
    #[serde(default)]
    pub longest_pause_seconds: Option<f64>,
    /// What to do, in words; what stands here makes `status` exit 3.
    #[serde(default)]
    pub advice: Vec<String>,
}

/// A repository of a volume in `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeRepositoryDocument {
    /// Its name.
    pub repository: String,
    /// The volume's last image there.
    pub last_image: Option<String>,
    /// Its instant.
    pub last_time: Option<String>,
    /// Older than `max_age`.
    pub overdue: bool,
    /// Changed since; null if that is not known.
    pub changed_bytes: Option<u64>,
    /// Of these, discarded.
    pub discarded_bytes: Option<u64>,
    /// What the next backup will be.
    pub next_kind: String,
    /// Why it is not incremental.
    #[serde(default)]
    pub next_reason: Option<String>,
    /// What it will read; null if the size is not known.
    pub next_read_bytes: Option<u64>,
}

/// A running or waiting job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDocument {
    /// `backup`.
    pub kind: String,
    /// queued · running · cancelling.
    pub state: String,
    /// Into which repository.
    pub repository: String,
    /// Since when.
    pub since: String,
    /// Read so far.
    pub done_bytes: u64,
    /// To be read.
    pub total_bytes: u64,
    /// Stored so far.
    pub stored_bytes: u64,
    /// Backups that wait behind it.
    #[serde(default)]
    pub queued: u64,
}

/// The end of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryDocument {
    /// [`SUMMARY`].
    pub message_type: String,
    /// This machine.
    pub host: String,
    /// Where it is.
    pub repository: String,
    /// Of what.
    pub volume: String,
    /// `data@4`.
    pub image: String,
    /// Its id.
    pub image_id: String,
    /// incremental · digest · full.
    pub kind: String,
    /// Null for `incremental` and for nothing else.
    pub reason: Option<String>,
    /// unmounted · frozen · instant · none.
    pub consistency: String,
    /// Its instant.
    pub time: String,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Read from the volume.
    pub read_bytes: u64,
    /// Changed, as the tracker says; for what is not incremental: all.
    pub changed_bytes: u64,
    /// Added to the repository.
    pub stored_bytes: u64,
    /// The longest that the file system was frozen.
    pub longest_freeze_seconds: f64,
    /// The longest that one write waited.
    pub longest_wait_seconds: f64,
    /// From start to end.
    pub seconds: f64,
    /// Codes; what stands here makes it exit 3.
    pub warnings: Vec<String>,
    /// Most bytes that were in the save area at one time.
    #[serde(default)]
    pub save_area_peak_bytes: u64,
    /// Originals copied aside.
    #[serde(default)]
    pub preserved_bytes: u64,
    /// Why it is not incremental, in words with its evidence.
    #[serde(default)]
    pub reason_text: Option<String>,
    /// The configured save area would have lain on the volume itself, and memory was taken instead.
    #[serde(default)]
    pub save_area_in_memory: bool,
}

/// `backup --dry-run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanDocument {
    /// [`PLAN`].
    pub message_type: String,
    /// This machine.
    pub host: String,
    /// Where to.
    pub repository: String,
    /// Of what.
    pub volume: String,
    /// What it would be.
    pub kind: String,
    /// Why it would not be incremental.
    pub reason: Option<String>,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// What it would read.
    pub read_bytes: u64,
    /// What it would store at most.
    pub stored_bytes_max: u64,
    /// Free in the repository.
    pub free_bytes: u64,
}

/// How far a job is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressDocument {
    /// [`PROGRESS`].
    pub message_type: String,
    /// Of which volume.
    pub volume: String,
    /// queued · running.
    pub state: String,
    /// Read so far.
    pub done_bytes: u64,
    /// To be read.
    pub total_bytes: u64,
    /// Stored so far.
    pub stored_bytes: u64,
}

/// `images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesDocument {
    /// [`IMAGES`].
    pub message_type: String,
    /// The images.
    pub images: Vec<ImageDocument>,
    /// What could not be listed, in words.
    #[serde(default)]
    pub damaged: Vec<String>,
}

/// An image in `images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDocument {
    /// `data@4`.
    pub image: String,
    /// Its id.
    pub image_id: String,
    /// Whose.
    pub host: String,
    /// Where.
    pub repository: String,
    /// Of what.
    pub volume: String,
    /// incremental · digest · full.
    pub kind: String,
    /// Why not incremental.
    pub reason: Option<String>,
    /// Its instant.
    pub time: String,
    /// Added to the repository.
    pub stored_bytes: u64,
    /// Size of the volume.
    pub volume_bytes: u64,
}

/// `verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyDocument {
    /// [`VERIFY`].
    pub message_type: String,
    /// Images looked at.
    pub images: u64,
    /// Bytes read and checked.
    pub checked_bytes: u64,
    /// All of it.
    pub damage: Vec<DamageDocument>,
}

/// A damaged range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageDocument {
    /// In which image; null if that cannot be told.
    pub image: Option<String>,
    /// First byte of the volume that is hit; null for what holds no blocks.
    pub start_bytes: Option<u64>,
    /// How many bytes.
    pub length_bytes: Option<u64>,
    /// What is wrong.
    pub what: String,
}

/// `restore`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreDocument {
    /// [`RESTORE`].
    pub message_type: String,
    /// Which image.
    pub image: String,
    /// Its id.
    pub image_id: String,
    /// Where it went.
    pub target: String,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Written.
    pub written_bytes: u64,
    /// Left alone because it was equal (`--differing-only`).
    pub equal_bytes: u64,
    /// From start to end.
    pub seconds: f64,
    /// Ranges that the image does not have, as damage.
    pub damage: Vec<DamageDocument>,
    /// Codes.
    pub warnings: Vec<String>,
    /// What is left to do, in words.
    pub advice: Vec<String>,
}

/// `volume list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumesDocument {
    /// [`VOLUMES`].
    pub message_type: String,
    /// The volumes.
    pub volumes: Vec<VolumeEntryDocument>,
}

/// A configured volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntryDocument {
    /// Its name.
    pub name: String,
    /// The backing device.
    pub device: String,
    /// The node to mount.
    pub node: String,
    /// How it is tracked.
    pub mode: String,
    /// boot · manual.
    pub attach: String,
    /// The repository of its backups.
    pub repository: String,
    /// Unit of image and snapshot.
    pub block_size_bytes: u32,
    /// Nothing else ever writes it.
    pub exclusive: bool,
}

/// `volume add`, `attach`, `detach`, `volume remove`, `repo …`, `cancel`: what was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneDocument {
    /// [`DONE`].
    pub message_type: String,
    /// The verb.
    pub verb: String,
    /// What it was done to.
    pub names: Vec<String>,
    /// In words, one line each.
    pub lines: Vec<String>,
    /// Codes.
    pub warnings: Vec<String>,
}

/// `repo status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoriesDocument {
    /// [`REPOSITORIES`].
    pub message_type: String,
    /// The repositories.
    pub repositories: Vec<RepositoryDocument>,
}

/// A repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryDocument {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub path: String,
    /// Its id; null if it cannot be read.
    pub repository_id: Option<String>,
    /// Images in it.
    pub images: Option<u64>,
    /// Free on its file system.
    pub free_bytes: Option<u64>,
    /// Claims of sessions that have not ended.
    pub open_claims: Vec<String>,
    /// Last verify; null: never.
    pub last_verify: Option<String>,
    /// Why it cannot be read.
    pub error: Option<String>,
}
