//! Facts of block devices: size, sectors, alignment, counters, who uses them.
//!
//! Read from sysfs and statx(2): nothing here opens a device for writing.

mod freeze;
mod openers;

pub use freeze::{FreezeError, Frozen, freeze, thaw};
pub use openers::{Opener, openers_of, writers_of};

use crate::Result;
use crate::error::{SysError, check};
use crate::mounts::{self, DeviceNumber, Mount, Reachable};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Alignment that direct I/O needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of offset and length.
    pub offset_bytes: u32,
    /// Of the buffer's address.
    pub memory_bytes: u32,
}

/// What direct I/O on an open file or device needs; `None` if it has none, or the kernel (before 6.1) does not say.
pub fn direct_alignment(fd: &impl AsFd) -> Result<Option<DirectAlignment>> {
    // SAFETY: struct statx is plain numbers; all zero is a value of it.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let (fd, mask) = (fd.as_fd().as_raw_fd(), libc::STATX_DIOALIGN);
    // SAFETY: the path is an empty string with its zero; `found` is writable for the length of the call.
    let asked =
        check(unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut found) });
    asked.map_err(|e| SysError::call("statx", "", e))?;
    if found.stx_mask & libc::STATX_DIOALIGN == 0 || found.stx_dio_offset_align == 0 {
        return Ok(None);
    }
    Ok(Some(DirectAlignment {
        offset_bytes: found.stx_dio_offset_align,
        memory_bytes: found.stx_dio_mem_align,
    }))
}

/// A block device, by number and by its folder in sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    number: DeviceNumber,
    folder: PathBuf,
}

impl BlockDevice {
    /// The device whose node stands at `path` (symlinks followed).
    pub fn at(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
        if !found.file_type().is_block_device() {
            return Err(SysError::unfit(path, "not a block device"));
        }
        Self::of_number(DeviceNumber::from_raw(found.rdev()))
    }

    /// The device of this number.
    pub fn of_number(number: DeviceNumber) -> Result<Self> {
        let link = PathBuf::from(format!("/sys/dev/block/{number}"));
        let folder =
            std::fs::canonicalize(&link).map_err(|e| SysError::call("realpath", link, e))?;
        Ok(Self { number, folder })
    }

    /// The disk of this kernel name: `loop3`.
    fn of_name(name: &str) -> Result<Self> {
        let path = Path::new("/sys/block").join(name).join("dev");
        let number = DeviceNumber::parse(&read_trimmed(&path)?);
        Self::of_number(number.ok_or_else(|| SysError::unfit(path, "not a device's number"))?)
    }

    /// The device under the file system of `path`, if that is one block device.
    pub fn under(path: &Path) -> Result<Option<Self>> {
        let number = crate::fs::device_of(path)?;
        if number.major == 0 {
            return Ok(None);
        }
        Self::of_number(number).map(Some)
    }

    /// Its number.
    pub const fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Its kernel name: `sda1`, `loop3`.
    pub fn name(&self) -> String {
        self.folder
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Its node as the kernel names it: `/dev/sda1`.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(self.name().replace('!', "/"))
    }

    /// Its folder in sysfs.
    pub fn sys_folder(&self) -> &Path {
        &self.folder
    }

    /// Size in bytes.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.number_in("size")?.saturating_mul(512))
    }

    /// Smallest unit that can be addressed, bytes.
    pub fn logical_sector_bytes(&self) -> Result<u32> {
        self.queue_u32("logical_block_size")
    }

    /// Unit that it writes without reading, bytes.
    pub fn physical_sector_bytes(&self) -> Result<u32> {
        self.queue_u32("physical_block_size")
    }

    /// Whether the kernel lets nobody write to it.
    pub fn is_read_only(&self) -> Result<bool> {
        Ok(self.number_in("ro")? != 0)
    }

    /// Whether it has zones that are written in order only.
    pub fn is_zoned(&self) -> bool {
        let path = self.disk_folder().join("queue/zoned");
        read_trimmed(&path).is_ok_and(|kind| kind != "none")
    }

    /// What was read and written since it appeared.
    pub fn counters(&self) -> Result<Counters> {
        let path = self.folder.join("stat");
        let text = std::fs::read_to_string(&path).map_err(|e| SysError::call("read", &path, e))?;
        let fields: Vec<u64> = text
            .split_ascii_whitespace()
            .filter_map(|f| f.parse().ok())
            .collect();
        let field = |i: usize| fields.get(i).copied();
        Ok(Counters {
            reads: field(0).unwrap_or(0),
            sectors_read: field(2).unwrap_or(0),
            writes: field(4).unwrap_or(0),
            sectors_written: field(6).unwrap_or(0),
            in_flight: field(8).unwrap_or(0),
            discards: field(11).unwrap_or(0),
            sectors_discarded: field(13).unwrap_or(0),
        })
    }

    /// The disk's sequence number, which another disk in its place, under its name and number, does not have (5.15; before: 0).
    pub fn sequence(&self) -> u64 {
        let text = read_trimmed(&self.disk_folder().join("diskseq"));
        text.ok().and_then(|t| t.parse().ok()).unwrap_or(0)
    }

    /// Whether [`Self::counters`] are kept (`queue/iostats`).
    pub fn counts(&self) -> bool {
        self.queue_u32("iostats").is_ok_and(|v| v != 0)
    }

    /// Block devices built on it (dm, md, bcache …), by kernel name; also those built on its partitions.
    pub fn holders(&self) -> Result<Vec<String>> {
        let mut found = names_in(&self.folder.join("holders"))?;
        for partition in self.partitions()? {
            found.extend(names_in(&self.folder.join(partition).join("holders"))?);
        }
        Ok(found)
    }

    /// Its partitions, by kernel name.
    pub fn partitions(&self) -> Result<Vec<String>> {
        let all = names_in(&self.folder)?;
        Ok(all
            .into_iter()
            .filter(|n| self.folder.join(n).join("partition").exists())
            .collect())
    }

    /// Whether it is a partition of a disk.
    pub fn is_partition(&self) -> bool {
        disk_of(&self.folder).is_some()
    }

    /// The disk that it is a partition of, or itself: the device whose number the kernel's block tracepoints tell.
    pub fn whole_disk(&self) -> Result<Self> {
        let Some(folder) = disk_of(&self.folder).map(Path::to_owned) else {
            return Ok(self.clone());
        };
        let path = folder.join("dev");
        let number = DeviceNumber::parse(&read_trimmed(&path)?)
            .ok_or_else(|| SysError::unfit(path, "not the number of a device"))?;
        Ok(Self { number, folder })
    }

    /// Where it begins on its whole disk, in 512-byte sectors.
    pub fn start_sector(&self) -> Result<u64> {
        if self.is_partition() {
            self.number_in("start")
        } else {
            Ok(0)
        }
    }

    /// Whether its driver takes bios and knows no requests (dm, md, zram, brd, pmem, `NVMe` multipath): then the kernel
    /// tells when a write is queued, but not when it is done.
    pub fn is_bio_based(&self) -> bool {
        !self.disk_folder().join("mq").exists()
    }

    /// Whether commands of its driver's own that ask it for data (`REQ_OP_DRV_IN`) write nothing, and nobody else can send it any:
    /// virtio disks, asked for their serial number whenever somebody reads it in sysfs. (SCSI disks take any command so.)
    pub fn tells_only_of_itself(&self) -> bool {
        let driver = std::fs::read_link(self.disk_folder().join("device/driver"));
        driver.is_ok_and(|path| path.ends_with("virtio_blk"))
    }

    /// Whether its memory can be mapped by file systems past the block layer: such writes are seen by nobody.
    pub fn is_dax(&self) -> bool {
        self.queue_u32("dax").is_ok_and(|v| v != 0)
    }

    /// The file that a loop device shows, as its sysfs names it; `None` if it is not a loop device that is bound.
    ///
    /// The kernel appends ` (deleted)` to a file that has no name any more.
    pub fn loop_backing_file(&self) -> Option<PathBuf> {
        let text = std::fs::read(self.disk_folder().join("loop/backing_file")).ok()?;
        let name = text.strip_suffix(b"\n").unwrap_or(&text);
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
    }

    /// Mounts of its file system, and of those of its partitions.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        let is_of = self.mounted_from_it()?;
        let mut all = mounts::all()?;
        all.retain(is_of);
        Ok(all)
    }

    /// As [`Self::mounts`], also those that only processes in other mount namespaces see.
    pub fn mounts_anywhere(&self) -> Result<Vec<Reachable>> {
        let is_of = self.mounted_from_it()?;
        let mut all = mounts::anywhere()?;
        all.retain(|found| is_of(&found.mount));
        Ok(all)
    }

    /// Whether a mount is of a file system on it or on a partition of it. Of those with a number of their own (btrfs) the source says
    /// so, which may be any name of the node (`/dev/mapper/…`).
    fn mounted_from_it(&self) -> Result<impl Fn(&Mount) -> bool> {
        let (numbers, names) = self.with_partitions()?;
        Ok(move |mount: &Mount| {
            let by_source = || {
                mount.device.major == 0
                    && mount.source.starts_with("/dev")
                    && Self::at(&mount.source).is_ok_and(|d| numbers.contains(&d.number))
            };
            numbers.contains(&mount.device) || names.contains(&mount.source) || by_source()
        })
    }

    /// The numbers and nodes of it and of its partitions.
    fn with_partitions(&self) -> Result<(Vec<DeviceNumber>, Vec<PathBuf>)> {
        let mut numbers = vec![self.number];
        let mut names = vec![self.node()];
        for partition in self.partitions()? {
            names.push(Path::new("/dev").join(&partition));
            let text = read_trimmed(&self.folder.join(partition).join("dev"))?;
            numbers.extend(DeviceNumber::parse(&text));
        }
        Ok((numbers, names))
    }

    /// Whether it, or one of its partitions, is used as swap.
    pub fn is_swap(&self) -> Result<bool> {
        let path = "/proc/swaps";
        let text = std::fs::read_to_string(path).map_err(|e| SysError::call("read", path, e))?;
        let mut names: Vec<String> = self.partitions()?;
        names.push(self.name());
        let used = |line: &str| {
            names
                .iter()
                .any(|n| line.split_ascii_whitespace().next() == Some(&format!("/dev/{n}")))
        };
        Ok(text.lines().any(used))
    }

    /// What the maker calls it, and its serial number, as far as they are known.
    pub fn model_and_serial(&self) -> (Option<String>, Option<String>) {
        let disk = self.disk_folder();
        let text = |name: &str| {
            read_trimmed(&disk.join("device").join(name))
                .ok()
                .filter(|t| !t.is_empty())
        };
        let serial = text("serial")
            .or_else(|| {
                read_trimmed(&disk.join("serial"))
                    .ok()
                    .filter(|t| !t.is_empty())
            })
            .or_else(|| text("wwid"));
        (text("model"), serial)
    }

    /// Writes that were queued and are not done, of a disk those of its partitions as well, as far as the kernel counts (see
    /// [`Self::counts`]; what waits for a scheduler it may not count). `by_disk`: of a partition also those of its whole disk.
    pub fn writes_under_way(&self, by_disk: bool) -> Result<u64> {
        let mut sum = writes_in_flight(&self.folder)?;
        // A device without requests counts each of its partitions apart.
        for partition in self.partitions()? {
            sum = sum.saturating_add(writes_in_flight(&self.folder.join(partition))?);
        }
        if by_disk && self.is_partition() {
            sum = sum.saturating_add(writes_in_flight(&self.disk_folder())?);
        }
        Ok(sum)
    }

    /// Whether it is `below`, a partition of it, or built (dm, md, bcache …) on it or on a partition of it. Where sysfs does not
    /// say: false.
    pub fn stands_on(&self, below: DeviceNumber) -> bool {
        self.number == below || folder_stands_on(&self.folder, below, LAYERS_MAX)
    }

    fn disk_folder(&self) -> PathBuf {
        disk_of(&self.folder).map_or_else(|| self.folder.clone(), Path::to_owned)
    }

    fn queue_u32(&self, name: &'static str) -> Result<u32> {
        let path = self.disk_folder().join("queue").join(name);
        let text = read_trimmed(&path)?;
        text.parse()
            .map_err(|e| SysError::call("read", path, io::Error::other(e)))
    }

    fn number_in(&self, name: &'static str) -> Result<u64> {
        let path = self.folder.join(name);
        let text = read_trimmed(&path)?;
        text.parse()
            .map_err(|e| SysError::call("read", path, io::Error::other(e)))
    }
}

/// Whether the file system of `path` lies on `below`, whatever is between them: a partition, LVM, LUKS, md.
pub fn lies_on(path: &Path, below: DeviceNumber) -> Result<bool> {
    if crate::fs::device_of(path)? == below {
        return Ok(true);
    }
    // What sysfs does not know is not built on anything.
    let under = match BlockDevice::under(path) {
        Ok(Some(device)) => Some(device),
        Ok(None) | Err(_) => mounted_from(path),
    };
    Ok(under.is_some_and(|device| device.stands_on(below)))
}

/// The device that the file system of `path` was mounted from, where files have a number of no device (btrfs).
fn mounted_from(path: &Path) -> Option<BlockDevice> {
    let real = std::fs::canonicalize(path).ok()?;
    let all = mounts::all().ok()?;
    let above = all.iter().filter(|mount| real.starts_with(&mount.at));
    // The deepest; of those at one place the last covers the others.
    let mount = above.max_by_key(|mount| mount.at.components().count())?;
    BlockDevice::at(&mount.source).ok()
}

/// More layers of block devices than this are not looked through.
const LAYERS_MAX: u32 = 8;

fn folder_stands_on(folder: &Path, below: DeviceNumber, layers: u32) -> bool {
    let number = read_trimmed(&folder.join("dev")).ok();
    if number.and_then(|text| DeviceNumber::parse(&text)) == Some(below) {
        return true;
    }
    let Some(layers) = layers.checked_sub(1) else {
        return false;
    };
    let slaves = folder.join("slaves");
    let built_on = names_in(&slaves).unwrap_or_default().into_iter();
    built_on
        .filter_map(|name| std::fs::canonicalize(slaves.join(name)).ok())
        .chain(disk_of(folder).map(Path::to_owned))
        .any(|lower| folder_stands_on(&lower, below, layers))
}

/// The folder of the disk that a partition is of.
fn disk_of(folder: &Path) -> Option<&Path> {
    folder
        .parent()
        .filter(|_| folder.join("partition").exists())
}

/// What went through a block device since it appeared. A sector is 512 bytes, whatever the device's own are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests.
    pub reads: u64,
    /// 512-byte sectors.
    pub sectors_read: u64,
    /// Requests; discards are not among them, zeroing is.
    pub writes: u64,
    /// 512-byte sectors; discarded ones are not among them, zeroed ones are.
    pub sectors_written: u64,
    /// Requests that are under way.
    pub in_flight: u64,
    /// Requests.
    pub discards: u64,
    /// 512-byte sectors.
    pub sectors_discarded: u64,
}

/// Writes that a device is at, by its folder in sysfs.
fn writes_in_flight(folder: &Path) -> Result<u64> {
    let path = folder.join("inflight");
    let text = read_trimmed(&path)?;
    let writes = text.split_ascii_whitespace().nth(1);
    writes
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| SysError::call("read", path, io::ErrorKind::InvalidData.into()))
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(SysError::call("readdir", folder, e)),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

fn read_trimmed(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| SysError::call("read", path, e))?;
    Ok(text.trim().to_owned())
}

/// The path that a name of a device leads to (`/dev/disk/by-id/…` → `/dev/sda`).
pub fn real_path(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|e| SysError::call("realpath", path, e))
}

/// Whether nobody else has a claim (`O_EXCL`) on the block device at `path` right now: no mount, no holder, no other
/// program that asked for it alone. Says nothing of plain openers.
pub fn is_unclaimed(path: &Path) -> Result<bool> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    match open(path, flags, nix::sys::stat::Mode::empty()) {
        Ok(_) => Ok(true),
        Err(nix::Error::EBUSY) => Ok(false),
        Err(e) => Err(SysError::call("open", path, e.into())),
    }
}

/// Makes a range of an open block device read as zero, by the device where it can (BLKZEROOUT). Never a discard.
pub fn zero_out(fd: &impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    ioctl_range(fd, BLKZEROOUT, offset, len)
}

/// Tells an open block device that a range holds nothing any more (BLKDISCARD): what it reads as then is not defined.
pub fn discard(fd: &impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    ioctl_range(fd, BLKDISCARD, offset, len)
}

const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const BLKFLSBUF: libc::c_ulong = 0x1261;

fn ioctl_range(fd: &impl AsFd, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    #[expect(
        clippy::useless_conversion,
        reason = "the type differs between C libraries"
    )]
    let request = request.try_into().map_err(io::Error::other)?;
    // SAFETY: both requests read two 64-bit words, which live for the length of the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, range.as_ptr()) }).map(|_| ())
}

/// Writes out and forgets what the page cache has of an open block device.
pub fn forget_cache(fd: &impl AsFd) -> io::Result<()> {
    ioctl_number(fd, BLKFLSBUF)
}

/// A request whose argument is a number that is not used.
fn ioctl_number(fd: &impl AsFd, request: libc::c_ulong) -> io::Result<()> {
    #[expect(
        clippy::useless_conversion,
        reason = "the type differs between C libraries"
    )]
    let request = request.try_into().map_err(io::Error::other)?;
    // SAFETY: the requests that this is called with take a number that is not used.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, 0) }).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opener_is_found_and_goes() {
        let path =
            PathBuf::from("/var/tmp").join(format!("blktide-sys-opener-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        let me = crate::process::own_pid();
        assert!(openers_of(&path).unwrap().iter().any(|o| o.pid == me));
        assert!(writers_of(&path).unwrap().iter().any(|o| o.pid == me));
        drop(file);
        let reader = std::fs::File::open(&path).unwrap();
        assert!(openers_of(&path).unwrap().iter().any(|o| o.pid == me));
        assert!(writers_of(&path).unwrap().is_empty(), "only for reading");
        drop(reader);
        assert!(openers_of(&path).unwrap().is_empty());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        assert!(matches!(
            BlockDevice::at(Path::new("/dev/null")),
            Err(SysError::Unfit { .. })
        ));
        BlockDevice::at(Path::new("/nowhere")).unwrap_err();
    }

    #[test]
    fn devices_that_are_there_have_facts() {
        for name in names_in(Path::new("/sys/block")).unwrap() {
            let text = read_trimmed(&Path::new("/sys/block").join(&name).join("dev")).unwrap();
            let device = BlockDevice::of_number(DeviceNumber::parse(&text).unwrap()).unwrap();
            assert_eq!(device.name(), name);
            assert!(device.logical_sector_bytes().unwrap() >= 512);
            assert!(
                device.physical_sector_bytes().unwrap() >= device.logical_sector_bytes().unwrap()
            );
            device.counters().unwrap();
            device.mounts().unwrap();
            assert!(!device.is_partition());
            assert_eq!(device.whole_disk().unwrap(), device);
            assert_eq!(device.start_sector().unwrap(), 0);
            device.is_swap().unwrap();
        }
    }

    /// trap TE6: LVM on LUKS on a partition of the disk; what lies beside it is not below it.
    #[test]
    fn layers_are_looked_through() {
        let root = std::env::temp_dir().join(format!("blktide-sys-layers-{}", std::process::id()));
        let device = |path: &str, number: &str, below: &[&str]| {
            let folder = root.join(path);
            std::fs::create_dir_all(folder.join("slaves")).unwrap();
            std::fs::File::create(folder.join("dev"))
                .and_then(|mut file| io::Write::write_all(&mut file, number.as_bytes()))
                .unwrap();
            for (n, lower) in below.iter().enumerate() {
                let link = folder.join("slaves").join(n.to_string());
                std::os::unix::fs::symlink(root.join(lower), link).unwrap();
            }
            folder
        };
        let disk = device("sda", "8:0\n", &[]);
        let partition = device("sda/sda1", "8:1\n", &[]);
        let sibling = device("sda/sda2", "8:2\n", &[]);
        for part in [&partition, &sibling] {
            std::fs::File::create(part.join("partition")).unwrap();
        }
        device("dm-0", "253:0\n", &["sda/sda1"]);
        let top = device("dm-1", "253:1\n", &["dm-0"]);
        let number = |text: &str| DeviceNumber::parse(text).unwrap();
        let on = |folder: &Path, text: &str| folder_stands_on(folder, number(text), LAYERS_MAX);
        for below in ["253:1", "253:0", "8:1", "8:0"] {
            assert!(on(&top, below), "{below}");
        }
        assert!(!on(&top, "8:2"));
        assert!(on(&partition, "8:0") && !on(&disk, "8:1") && !on(&sibling, "8:1"));
        assert!(!folder_stands_on(&top, number("8:0"), 2), "no end");
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_partition_and_its_disk() {
        let root = std::env::temp_dir().join(format!("blktide-sys-part-{}", std::process::id()));
        let file = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::File::create(path)
                .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
                .unwrap();
        };
        let stat = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n";
        for (path, text) in [
            ("loop7/dev", "7:7\n"),
            ("loop7/queue/dax", "1\n"),
            ("loop7/loop/backing_file", "/tmp/a file (deleted)\n"),
            ("loop7/mq/0/cpu_list", "0\n"),
            ("loop7/loop7p1/partition", "1\n"),
            ("loop7/loop7p1/start", "2048\n"),
            ("loop7/loop7p1/stat", stat),
            ("dm-0/dev", "253:0\n"),
            ("dm-0/queue/dax", "0\n"),
        ] {
            file(path, text);
        }
        let device = |path: &str, minor| BlockDevice {
            number: DeviceNumber { major: 7, minor },
            folder: root.join(path),
        };
        let part = device("loop7/loop7p1", 300);
        assert!(part.is_partition() && !part.is_bio_based() && part.is_dax());
        assert_eq!(part.start_sector().unwrap(), 2048);
        assert_eq!(part.whole_disk().unwrap(), device("loop7", 7));
        assert_eq!(
            part.loop_backing_file(),
            Some("/tmp/a file (deleted)".into())
        );
        let counters = part.counters().unwrap();
        assert_eq!((counters.writes, counters.sectors_written), (5, 7));
        assert_eq!((counters.discards, counters.sectors_discarded), (12, 14));
        let mapped = device("dm-0", 0);
        assert!(mapped.is_bio_based() && !mapped.is_dax() && !mapped.is_partition());
        assert_eq!(mapped.loop_backing_file(), None);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn direct_alignment_of_a_file() {
        let path =
            PathBuf::from("/var/tmp").join(format!("blktide-sys-align-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        if let Some(found) = direct_alignment(&file).unwrap() {
            assert!(found.offset_bytes.is_power_of_two() && found.memory_bytes.is_power_of_two());
        }
        std::fs::remove_file(&path).unwrap();
    }
}
