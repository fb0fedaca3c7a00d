//! Files, loop devices, file systems and mounts, undone when dropped.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::clock::wait_until;
use crate::run::Tool;

/// How long the node of a new partition is waited for.
const NODE_LIMIT: Duration = Duration::from_secs(10);

/// A new sparse file of `bytes`.
pub fn make_file(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| path.display().to_string())?;
    file.set_len(bytes)?;
    Ok(())
}

/// A new file of `bytes` that no codec makes smaller.
pub fn fill_file(path: &Path, bytes: u64) -> Result<()> {
    make_file(path, 0)?;
    Tool::new("dd")
        .args([
            "if=/dev/urandom",
            "bs=1M",
            "iflag=count_bytes",
            "conv=notrunc",
            "status=none",
        ])
        .arg(format!("of={}", path.display()))
        .arg(format!("count={bytes}"))
        .limit(300)
        .run()?
        .ok()?;
    Ok(())
}

/// The file under a loop device (`/dev/loop3` or a symlink to it), as the kernel names it.
pub fn backing_file(device: &Path) -> Result<PathBuf> {
    let real = fs::canonicalize(device)?;
    let name = real.file_name().context("a device has a name")?;
    let path = Path::new("/sys/class/block")
        .join(name)
        .join("loop/backing_file");
    Ok(PathBuf::from(fs::read_to_string(path)?.trim_end()))
}

/// A loop device of our own over a file: a block device whose counters only this test moves.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Over `file`, with direct I/O and sectors of `sector_bytes`.
    pub fn new(file: &Path, sector_bytes: u32) -> Result<Self> {
        let done = Tool::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size"])
            .arg(sector_bytes.to_string())
            .arg(file)
            .run()?
            .ok()?;
        Ok(Self {
            path: PathBuf::from(done.stdout.trim()),
        })
    }

    /// Over `file`, with sectors of 512 bytes and whatever partitions are put on it; they go with it.
    pub fn partitioned(file: &Path) -> Result<Self> {
        let done = Tool::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--partscan"])
            .arg(file)
            .run()?
            .ok()?;
        Ok(Self {
            path: PathBuf::from(done.stdout.trim()),
        })
    }

    /// Adds partition `number` of `sectors` of 512 bytes from `start`; its node, once it is there.
    pub fn add_partition(&self, number: u32, start: u64, sectors: u64) -> Result<PathBuf> {
        Tool::new("addpart")
            .arg(&self.path)
            .args([u64::from(number), start, sectors].map(|n| n.to_string()))
            .run()?
            .ok()?;
        let node = PathBuf::from(format!("{}p{number}", self.path.display()));
        wait_until("the partition's node is there", NODE_LIMIT, || {
            Ok(node.exists())
        })?;
        Ok(node)
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Tool::new("losetup").arg("--detach").arg(&self.path).run());
    }
}

/// `/dev/zram0`, taken while nobody uses it: memory as a block device without requests. Reset when dropped.
#[derive(Debug)]
pub struct ZramDevice(());

/// Its folder in sysfs.
const ZRAM: &str = "/sys/block/zram0";

impl ZramDevice {
    /// With `bytes`, and counted, which the kernel does not do for it by itself.
    pub fn new(bytes: u64) -> Result<Self> {
        let size = Path::new(ZRAM).join("disksize");
        let used = fs::read_to_string(&size)?;
        ensure!(used.trim() == "0", "/dev/zram0 is somebody's: {used}");
        let this = Self(());
        say(&size, &bytes.to_string())?;
        say(&Path::new(ZRAM).join("queue/iostats"), "1")?;
        Ok(this)
    }

    /// `/dev/zram0`.
    pub fn path(&self) -> &Path {
        Path::new("/dev/zram0")
    }
}

impl Drop for ZramDevice {
    fn drop(&mut self) {
        drop(say(&Path::new(ZRAM).join("queue/iostats"), "0"));
        drop(say(&Path::new(ZRAM).join("reset"), "1"));
    }
}

/// A program of somebody's that has a device's node open and does nothing; ended when dropped.
#[derive(Debug)]
pub struct NodeHolder(Child);

impl NodeHolder {
    /// Opens with `mode` of the shell: `<` or `<>`.
    pub fn of(node: &Path, mode: &str) -> Result<Self> {
        let script = format!("exec 9{mode}{}; echo open; exec sleep 1000", node.display());
        let mut child = Command::new("bash")
            .args(["-euc", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = [0; 5];
        let out = child.stdout.as_mut().context("a pipe")?;
        let opened = out.read_exact(&mut said);
        let this = Self(child);
        opened?;
        Ok(this)
    }
}

impl Drop for NodeHolder {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn say(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())
        .with_context(|| format!("{text} to {}", path.display()))
}

/// The file systems that are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl FileSystem {
    /// `ext4`, `xfs`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Makes one on `target`, a device or a file.
    pub fn make(self, target: &Path) -> Result<()> {
        let tool = match self {
            // Nothing left to a thread of the kernel: what is on the device after mkfs stays as it is.
            Self::Ext4 => Tool::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0"]),
            Self::Xfs => Tool::new("mkfs.xfs").args(["-q", "-f"]),
            Self::Btrfs => Tool::new("mkfs.btrfs").args(["-q", "-f"]),
        };
        tool.arg(target).limit(120).run()?.ok()?;
        Ok(())
    }

    /// Fails unless the file system on `target` is without fault after its journal was replayed, as after a power
    /// cut. Writes to `target`: give it a copy.
    pub fn replay_and_check(self, target: &Path, scratch: &Path) -> Result<()> {
        match self {
            Self::Ext4 => {
                let done = Tool::new("e2fsck")
                    .args(["-f", "-p"])
                    .arg(target)
                    .limit(300)
                    .run()?;
                ensure!(
                    matches!(done.code, Some(0 | 1)),
                    "e2fsck -fp {}: {:?}\n{}{}",
                    target.display(),
                    done.code,
                    done.stdout,
                    done.stderr
                );
                Tool::new("e2fsck")
                    .args(["-f", "-n"])
                    .arg(target)
                    .limit(300)
                    .run()?
                    .ok()?;
            }
            Self::Xfs => {
                drop(Mounted::new(target, scratch, &["-o", "nouuid"])?);
                Tool::new("xfs_repair")
                    .args(["-n", "-f"])
                    .arg(target)
                    .limit(300)
                    .run()?
                    .ok()?;
            }
            Self::Btrfs => {
                drop(Mounted::new(target, scratch, &[])?);
                self.check(target)?;
            }
        }
        Ok(())
    }

    /// Fails unless a cleanly unmounted file system on `target` is without fault. Writes nothing.
    pub fn check(self, target: &Path) -> Result<()> {
        match self {
            Self::Ext4 => Tool::new("e2fsck").args(["-f", "-n"]),
            Self::Xfs => Tool::new("xfs_repair").arg("-n"),
            Self::Btrfs => Tool::new("btrfs").args(["check", "--readonly"]),
        }
        .arg(target)
        .limit(300)
        .run()?
        .ok()?;
        Ok(())
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
    over: bool,
}

impl Mounted {
    /// Mounts `device` (or a file, then by a loop device of mount's) at `dir`, which is made if there is nothing.
    pub fn new(device: &Path, dir: &Path, options: &[&str]) -> Result<Self> {
        if !dir.exists() {
            fs::create_dir_all(dir)?;
        }
        Tool::new("mount")
            .args(options)
            .arg(device)
            .arg(dir)
            .run()?
            .ok()?;
        Ok(Self {
            dir: dir.to_owned(),
            over: false,
        })
    }

    /// The mount point.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `dir/name`.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes back what is cached.
    pub fn sync(&self) -> Result<()> {
        Tool::new("sync")
            .arg("--file-system")
            .arg(&self.dir)
            .limit(120)
            .run()?
            .ok()?;
        Ok(())
    }

    /// Unmounts, and fails if that fails.
    pub fn unmount(mut self) -> Result<()> {
        self.over = true;
        Tool::new("umount").arg(&self.dir).limit(120).run()?.ok()?;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.over {
            drop(Tool::new("umount").arg(&self.dir).limit(60).run());
        }
    }
}
