//! An instant by a snapshot of the volume manager's (LVM), where there is one: nothing is copied ahead.
//!
//! ```text
//! short freeze: swap, drain, evidence, next generation opens ─▶ lvcreate --snapshot ─▶ swap, drain ─▶ read the snapshot ─▶ lvremove
//! ```
//! The generation opens *before* the snapshot's instant, and what is marked between the two counts twice: for this image,
//! whose snapshot may hold it, and for the next. So nothing need be exact to the moment, and nobody is in neither.
//!
//! **Invariant**: a snapshot of ours bears the tag of its volume; one that a dead backup has left is removed by the next.

use blktide_format::manifest::Consistency;
use blktide_sys::clock::SystemClock;
use blktide_sys::fs;
use blktide_types::clock::{Clock, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::io::{BlockOutcome, BlockRead, RevokeCause, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_volume::{VolumeError, VolumeOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use crate::ahead::Ahead;
use crate::copy::Reader;
use crate::pins::failed;

/// What an old snapshot may hold of overwritten data: at least this, or a tenth of the volume.
const ROOM_BYTES_MIN: u64 = 1 << 30;
/// A thin pool that is fuller than this takes no snapshot by itself, hundredths.
const POOL_FULL: f64 = 85.0;

/// A logical volume that a snapshot can be made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Native {
    group: String,
    volume: String,
    room: Room,
    tag: String,
}

/// Where a snapshot keeps what is overwritten.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Room {
    /// In the pool; how full that is, hundredths.
    Thin(f64),
    /// In so many bytes of the group's free extents.
    Free(u64),
}

impl Native {
    /// What LVM says of the volume's device. `None`: it is no logical volume, there is no LVM, or no room.
    pub fn of(options: &VolumeOptions) -> Option<Self> {
        let real = std::fs::canonicalize(&options.device).ok()?;
        let name = real.file_name()?;
        let uuid = Path::new("/sys/class/block").join(name).join("dm/uuid");
        if !std::fs::read_to_string(uuid).ok()?.starts_with("LVM-") {
            return None;
        }
        let fields = "vg_name,lv_name,lv_attr,vg_free,lv_size,data_percent,pool_lv";
        let told = lvm(&[
            "lvs",
            "--noheadings",
            "--units=b",
            "--nosuffix",
            "--separator=|",
            &format!("--options={fields}"),
            &options.device.display().to_string(),
        ]);
        Self::parse(&told.ok()?, &options.name)
    }

    fn parse(told: &str, name: &str) -> Option<Self> {
        let mut fields = told.trim().split('|').map(str::trim);
        let (group, volume, attributes) = (fields.next()?, fields.next()?, fields.next()?);
        let free: u64 = fields.next()?.parse().ok()?;
        let size: u64 = fields.next()?.parse().ok()?;
        let room = if attributes.starts_with('V') {
            // The volume's own use comes first.
            let pool = fields.nth(1)?;
            Room::Thin(pool_use(group, pool)?)
        } else if attributes.starts_with('-') {
            let wanted = (size / 10).max(ROOM_BYTES_MIN).min(size);
            (free >= wanted).then_some(Room::Free(wanted))?
        } else {
            return None;
        };
        Some(Self {
            group: group.to_owned(),
            volume: volume.to_owned(),
            room,
            tag: format!("blktide_{name}"),
        })
    }

    /// Whether it may be taken without being asked for: a thin snapshot costs the writers next to nothing. (An old one copies
    /// each first overwrite, and ends when its room is full.)
    pub fn is_safe(&self) -> bool {
        matches!(self.room, Room::Thin(percent) if percent < POOL_FULL)
    }

    /// Removes what a dead backup has left. What cannot be removed costs room, and is said by LVM.
    fn clear(&self) {
        drop(lvm(&[
            "lvremove",
            "--force",
            "--quiet",
            &format!("@{}", self.tag),
        ]));
    }

    /// Makes the snapshot. LVM freezes the file system for it.
    fn create(&self, number: u64) -> Result<Made, VolumeError> {
        let name = format!("{}_blktide_{number:08x}", self.volume);
        let origin = format!("{}/{}", self.group, self.volume);
        let mut words = vec![
            "lvcreate".to_owned(),
            "--snapshot".to_owned(),
            "--quiet".to_owned(),
            "--setactivationskip=n".to_owned(),
            format!("--addtag={}", self.tag),
            format!("--name={name}"),
        ];
        if let Room::Free(bytes) = self.room {
            words.push(format!("--size={bytes}b"));
        }
        words.push(origin);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let path = Path::new("/dev").join(&self.group).join(&name);
        lvm(&words).map_err(|e| failed("make the LVM snapshot", &path, e))?;
        Ok(Made {
            path,
            of: format!("{}/{name}", self.group),
        })
    }
}

/// How full a thin pool is.
fn pool_use(group: &str, pool: &str) -> Option<f64> {
    let of = format!("{group}/{pool}");
    let told = lvm(&["lvs", "--noheadings", "--options=data_percent", &of]).ok()?;
    told.trim().parse().ok()
}

/// A snapshot of the volume manager's; removed when dropped.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    of: String,
}

impl Drop for Made {
    fn drop(&mut self) {
        // The next backup tries again, by the tag.
        drop(lvm(&["lvremove", "--force", "--quiet", &self.of]));
    }
}

/// Runs a command of LVM's; its words if it fails.
fn lvm(words: &[&str]) -> io::Result<String> {
    let done = Command::new("lvm")
        .args(words)
        .env("LC_ALL", "C")
        // It complains of descriptors that it inherits.
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .stdin(Stdio::null())
        .output()?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(io::Error::other(said.trim().to_owned()))
}

/// The image of an instant that the volume manager keeps.
#[derive(Debug)]
pub struct NativeImage {
    wanted: BlockSet,
    changed: Option<BlockSet>,
    opened: GenerationName,
    instant: WallTime,
    longest_freeze: Duration,
    reader: Reader,
    /// Until the image is stored.
    ahead: Mutex<Ahead>,
    made: Made,
}

impl NativeImage {
    /// Makes the snapshot. `ahead` has begun and copied nothing.
    ///
    /// Errors: then there is no snapshot; at most one generation more.
    pub fn take(native: &Native, ahead: Ahead) -> Result<Self, SourceError> {
        native.clear();
        let opened = ahead.open_generation()?;
        let number = u64::from_le_bytes(first_half(opened));
        let made = native
            .create(number & 0xffff_ffff)
            .map_err(|e| SourceError::Io(io::Error::other(e)))?;
        let instant = SystemClock.wall();
        let (wanted, changed) = ahead.after_the_instant();
        let device =
            fs::open_direct_read(&made.path).map_err(|e| SourceError::Io(io::Error::other(e)))?;
        Ok(Self {
            wanted,
            changed,
            opened,
            instant,
            longest_freeze: ahead.longest_freeze(),
            reader: Reader {
                device,
                geometry: ahead.geometry(),
            },
            ahead: Mutex::new(ahead),
            made,
        })
    }

    /// The generation that opened just before the instant.
    pub const fn opened(&self) -> GenerationName {
        self.opened
    }

    /// When it was.
    pub const fn instant(&self) -> WallTime {
        self.instant
    }

    /// LVM freezes what is mounted.
    pub const fn consistency(&self) -> Consistency {
        Consistency::Frozen
    }

    /// The longest that the volume stood still for us; LVM's own freeze is not known.
    pub const fn longest_freeze(&self) -> Duration {
        self.longest_freeze
    }

    /// See `InstantImage::trust`.
    pub fn trust(&self) -> bool {
        let ahead = self
            .ahead
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        ahead.trust(self.opened)
    }
}

fn first_half(name: GenerationName) -> [u8; 8] {
    let mut half = [0; 8];
    for (to, from) in half.iter_mut().zip(name.0) {
        *to = from;
    }
    half
}

impl BlockRead for NativeImage {
    fn geometry(&self) -> Geometry {
        self.reader.geometry
    }

    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let outcomes = self.reader.read(range, buf)?;
        // An old snapshot whose room is full gives errors for all it has: that is no bad block of the volume's.
        if outcomes.contains(&BlockOutcome::Unreadable) && !is_whole(&self.made.of) {
            return Err(SourceError::Revoked(RevokeCause::SaveAreaFull));
        }
        Ok(outcomes)
    }
}

/// Whether LVM still calls the snapshot valid.
fn is_whole(of: &str) -> bool {
    let attributes = lvm(&["lvs", "--noheadings", "--options=lv_attr", of]);
    // The fifth letter is I for one that is invalid, S for one that is also suspended.
    attributes.is_ok_and(|text| !matches!(text.trim().as_bytes().get(4), Some(b'I' | b'S')))
}

impl SnapshotRead for NativeImage {
    fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    fn finish(&self) -> Result<(), SourceError> {
        if is_whole(&self.made.of) {
            Ok(())
        } else {
            Err(SourceError::Revoked(RevokeCause::SaveAreaFull))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_tells_of_a_volume() {
        let parse = |told: &str| Native::parse(told, "data");
        let linear = parse("  vg0|data|-wi-ao----|21474836480|107374182400||\n").unwrap();
        assert_eq!(linear.room, Room::Free(10_737_418_240));
        assert!(
            !linear.is_safe(),
            "it slows writers, so it is only taken when asked for"
        );
        assert_eq!(
            parse("  vg0|data|-wi-ao----|1048576|107374182400||"),
            None,
            "no room"
        );
        assert_eq!(
            parse("  vg0|data|mwi-ao----|21474836480|107374182400||"),
            None,
            "a mirror"
        );
        assert_eq!(parse(""), None);
    }
}
