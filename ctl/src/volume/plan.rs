//! What `volume add` is about to do, in plain words; and where its files may not lie.

use blktide_api::config::{Attach, Config, Instant, Mode, OverBudget, SavePlace, VolumeConfig};
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::unit::size;
use blktide_sys::blockdev::{self, BlockDevice};
use blktide_sys::mounts::DeviceNumber;
use blktide_watch::Native;
use std::path::{Path, PathBuf};

use crate::device::Found;
use crate::modes::Facts;
use crate::tracker;

/// A bitmap of the kernel's has at most so many bytes; two are kept.
const KERNEL_BITMAP_BYTES_MAX: u64 = 64 << 20;

/// What is to be done, and what is known.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) config: &'a Config,
    pub(super) volume: &'a VolumeConfig,
    pub(super) found: &'a Found,
    pub(super) facts: &'a Facts,
    /// Why this mode.
    pub(super) why: String,
    /// What else an administrator should know.
    pub(super) notes: Vec<String>,
}

impl Plan<'_> {
    /// A line each.
    pub(super) fn lines(&self) -> Vec<String> {
        let (volume, found) = (self.volume, self.found);
        let mut lines = vec![
            format!(
                "volume {}: {} ({}, {})",
                volume.name,
                volume.device.display(),
                found.what,
                size(found.bytes)
            ),
            format!("  mode    {}: {}", volume.mode.word(), self.why),
        ];
        match volume.mode {
            Mode::Watch => self.watched(&mut lines),
            Mode::Auto | Mode::Ublk | Mode::Fuse => self.served(&mut lines),
        }
        let notes = found.note.iter().chain(&self.notes);
        lines.extend(notes.map(|note| format!("  note    {note}")));
        lines
    }

    fn watched(&self, lines: &mut Vec<String>) {
        let volume = self.volume;
        let grain = volume.grain.bytes_u64();
        let bitmap = (self.found.bytes / grain / 8).min(KERNEL_BITMAP_BYTES_MAX);
        lines.push(format!(
            "  node    as before, {}; nothing changes in fstab or initramfs",
            self.found.real.display()
        ));
        lines.push(format!(
            "  bitmap  in the kernel's memory, {}; stored in {} when it is detached unmounted; a block is {}, a bit {}",
            size((2 * bitmap).max(4096)),
            self.config.volume_state_dir(&volume.name).display(),
            volume.block_size,
            volume.grain
        ));
        lines.push(format!(
            "  backups go to repository {}: {}",
            volume.repository,
            self.instant()
        ));
        lines.push(format!(
            "  reboot  after a clean stop the next backup is incremental, if the volume is attached before it is first written; {}",
            if self.is_root() {
                "of the root file system that cannot be so yet: it reads everything"
            } else {
                "after a crash, or if it was not, it reads everything"
            }
        ));
    }

    /// How an image gets its instant.
    fn instant(&self) -> String {
        let volume = self.volume;
        if self.is_native() {
            return "read from a snapshot of LVM's, which is made and removed for it".to_owned();
        }
        let budget = volume.freeze_budget.as_millis();
        let freezes = self.facts.file_system.is_some_and(|f| f.freezes);
        if !freezes {
            return "copied while in use; there is no file system that can be frozen, so a whole image needs the volume closed for a moment".to_owned();
        }
        let over = match volume.over_budget {
            OverBudget::GiveUp => "if that is not enough the backup ends".to_owned(),
            OverBudget::Longer => {
                let limit = volume.freeze_limit.as_millis();
                format!("for up to {limit} ms if that is not enough")
            }
        };
        format!(
            "copied ahead while in use, then frozen for the last blocks, {budget} ms at most; {over}"
        )
    }

    /// Whether the volume manager keeps the instant.
    fn is_native(&self) -> bool {
        let options = tracker::options(self.config, self.volume);
        match self.volume.instant {
            Instant::Freeze => false,
            Instant::Auto => Native::of(&options).is_some_and(|native| native.is_safe()),
            Instant::Lvm => Native::of(&options).is_some(),
        }
    }

    fn is_root(&self) -> bool {
        let root = self
            .found
            .number
            .map(|number| blockdev::lies_on(Path::new("/"), number));
        matches!(root, Some(Ok(true)))
    }

    fn served(&self, lines: &mut Vec<String>) {
        let (config, volume) = (self.config, self.volume);
        lines.push(format!(
            "  node    {}: mount this, in fstab, too; never the device below it",
            config.node(&volume.name).display()
        ));
        lines.push(format!(
            "  bitmap  {}, written at a clean stop; a block is {}",
            config.volume_state_dir(&volume.name).display(),
            volume.block_size
        ));
        lines.push(format!("  backups go to repository {}", volume.repository));
        lines.push("  reboot  after a clean stop the next backup is incremental; after a crash it reads everything".to_owned());
        if let SavePlace::Path(path) = &volume.save_area.place {
            lines.push(format!(
                "  save    originals during a backup: {}, at most {}",
                path.display(),
                size(volume.save_area.limit_bytes)
            ));
        }
        if volume.attach == Attach::Manual {
            lines.push(
                "  attach  manual: this machine refuses PR_SET_IO_FLUSHER, so memory pressure could stop a volume attached at boot".to_owned(),
            );
        }
    }
}

/// The bitmap file must be writable after the volume is unmounted, and readable before it is mounted; and what is written
/// during a backup must not wait for the thaw of what is backed up. Returns what is no obstacle and yet worth a word.
pub(super) fn refuse_places(
    config: &Config,
    volume: &VolumeConfig,
    found: &Found,
) -> Result<Vec<String>, Failure> {
    let state = existing(config.volume_state_dir(&volume.name));
    match (volume.mode, found.number) {
        (Mode::Watch, Some(number)) => refuse_on_itself(config, volume, (number, &state)),
        _ => refuse_on_tracked(config, &state).map(|()| Vec::new()),
    }
}

/// The nearest that exists.
fn existing(mut folder: PathBuf) -> PathBuf {
    while !folder.exists() && folder.pop() {}
    folder
}

fn refuse_on_tracked(config: &Config, state: &Path) -> Result<(), Failure> {
    let tracked: Vec<BlockDevice> = config
        .volumes
        .keys()
        .filter_map(|name| BlockDevice::at(&config.node(name)).ok())
        .collect();
    let under = BlockDevice::under(state).ok().flatten();
    if let Some(under) = under
        && tracked.iter().any(|t| t.number() == under.number())
    {
        let message = format!(
            "state_dir {} lies on a tracked volume: its bitmap could not be stored after it is unmounted",
            config.state_dir.display()
        );
        return Err(Failure::new(FailureCode::DeviceRefused, message)
            .hint("Put `state_dir` on a file system that is not tracked."));
    }
    Ok(())
}

fn refuse_on_itself(
    config: &Config,
    volume: &VolumeConfig,
    (number, state): (DeviceNumber, &Path),
) -> Result<Vec<String>, Failure> {
    // In doubt it does not: what hangs or is away is found out by the backup.
    let lies = |path: &Path| blockdev::lies_on(path, number).unwrap_or(false);
    let mut notes = Vec::new();
    if let Some(repository) = config.repositories.get(&volume.repository)
        && lies(&existing(repository.path.clone()))
    {
        let message = format!(
            "repository {} ({}) lies on the volume that it is to protect",
            repository.name,
            repository.path.display()
        );
        return Err(
            Failure::new(FailureCode::RepositoryOnTrackedVolume, message)
                .hint("Take a repository on another disk: -r NAME."),
        );
    }
    if lies(state) {
        let dir = config.state_dir.display();
        // What is never unmounted cannot lose by it.
        if !lies(Path::new("/")) {
            let message = format!(
                "state_dir {dir} lies on this volume: its bitmap could not be stored after it is unmounted"
            );
            return Err(Failure::new(FailureCode::DeviceRefused, message)
                .hint("Put `state_dir` on another file system."));
        }
        notes.push(format!(
            "state_dir {dir} lies on this volume: no bitmap of it outlives the boot"
        ));
    }
    if let SavePlace::Path(path) = &volume.save_area.place
        && lies(&existing(path.clone()))
    {
        notes.push(format!(
            "{} lies on this volume: what a backup must note down while it copies ahead is kept in memory instead",
            path.display()
        ));
    }
    Ok(notes)
}
