//! What a volume's processes must know before they start, and where its files lie.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What `blktided volume NAME` is started with. Nothing of it changes while the volume is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeOptions {
    /// Name of the volume, `[A-Za-z0-9][A-Za-z0-9_-]{0,47}`.
    pub name: String,
    /// The backing device: a block device or a regular file.
    pub device: PathBuf,
    /// Where bitmap files lie; the volume's are in a folder of its name.
    pub state_dir: PathBuf,
    /// Sockets and mount points.
    pub runtime_dir: PathBuf,
    /// Where the symlink to the node is made.
    pub device_dir: PathBuf,
    /// Unit of image and snapshot, bytes.
    pub block_size_bytes: u32,
    /// Unit of one bit of the tracker, bytes; divides the block size.
    pub grain_bytes: u32,
    /// Nothing else ever writes the backing device, also while it is detached.
    pub exclusive: bool,
    /// Queue threads of the server.
    pub queues: u32,
}

impl VolumeOptions {
    /// The options of volume `name` on `device` with every default: 64 KiB blocks and grains, two queues, the places of the interface.
    pub fn new(name: impl Into<String>, device: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            device: device.into(),
            state_dir: PathBuf::from("/var/lib/blktide"),
            runtime_dir: PathBuf::from("/run/blktide"),
            device_dir: PathBuf::from("/dev/blktide"),
            block_size_bytes: 65536,
            grain_bytes: 65536,
            exclusive: false,
            queues: 2,
        }
    }

    /// The volume socket.
    pub fn socket(&self) -> PathBuf {
        volume_socket(&self.runtime_dir, &self.name)
    }

    /// The file whose lock the keeper holds.
    pub fn lock(&self) -> PathBuf {
        self.volumes_dir().join(format!("{}.lock", self.name))
    }

    /// Where the FUSE file system is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.volumes_dir().join(format!("{}.mnt", self.name))
    }

    /// The node that users mount: a symlink to a loop device.
    pub fn node(&self) -> PathBuf {
        self.device_dir.join(&self.name)
    }

    /// The folder of the bitmap file and the marker.
    pub fn state_folder(&self) -> PathBuf {
        self.state_dir.join(&self.name)
    }

    /// The folder of sockets, locks and mount points.
    pub fn volumes_dir(&self) -> PathBuf {
        self.runtime_dir.join("volumes")
    }
}

/// The volume socket of volume `name`.
pub fn volume_socket(runtime_dir: &Path, name: &str) -> PathBuf {
    runtime_dir.join("volumes").join(format!("{name}.sock"))
}
