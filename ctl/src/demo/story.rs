//! What the demo does, step by step, and what it says of it.
//!
//! ```text
//!  fuse:   blktided ─▶ tracker ─▶ ext4 on its node, files, writer ─▶ full ─▶ changes                    ─▶ incremental ─▶ proof
//!  watch:  ext4 on a loop device, files, writer ─▶ blktided ─▶ tracker ─▶ full ─▶ no blktided, changes ─▶ incremental ─▶ proof
//! ```

mod daemon;
mod tracker;

use anyhow::{Context, Result, ensure};
use blktide_sys::clock::SystemClock;
use blktide_sys::fs::{create_if_absent, sync_file_system};
use blktide_sys::mounts;
use blktide_types::clock::{Clock, Instant};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::command::{Blktidectl, decimal, number, text, tool};
use super::proof::{Proven, Truth};
use super::recorder::{Record, Recorder};
use super::tree::Tree;
use super::{LAST_LINE, Mode, say, size};

/// Bytes of the volume: 2.25 GiB.
const VOLUME_BYTES: u64 = 9 << 28;
/// 1 % of its blocks of 64 KiB.
const CHANGED_BLOCKS: u64 = VOLUME_BYTES / 65536 / 100;

struct Story {
    mode: Mode,
    folder: PathBuf,
    programs: PathBuf,
    ctl: Blktidectl,
    begun: Instant,
}

/// One backup, as it was told and as it was proven.
struct Step {
    truth: Truth,
    summary: Value,
    /// Writes of the recorder when the backup was asked for, and when it was done.
    writes: (u64, u64),
}

/// Both backups, the writer's record, and where the volume is mounted.
type Played = (Step, Step, Record, PathBuf);

/// Plays it in `folder`, which somebody else removes. The last line is left in a file there.
pub(super) fn run(mode: Mode, folder: &Path, programs: &Path) -> Result<()> {
    let story = Story {
        mode,
        folder: folder.to_owned(),
        programs: programs.to_owned(),
        ctl: Blktidectl::new(programs, &folder.join("blktide.toml")),
        begun: SystemClock.now(),
    };
    let outcome = story.play();
    if outcome.is_err() {
        let log = fs::read_to_string(story.path("blktided.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(20)) {
            say(&format!("  | {line}"));
        }
    }
    outcome
}

impl Story {
    fn play(&self) -> Result<()> {
        let (first, second, record, mounted) = match self.mode {
            Mode::Fuse => self.play_fuse()?,
            Mode::Watch => self.play_watch()?,
        };
        for (number, step) in [(1, &first), (2, &second)] {
            self.prove(number, step, &record)?;
        }
        let checked = self.ctl.run(&["verify", "--read-data"])?;
        self.tell(&format!(
            "verify: {} of images read, no damage",
            size(number(&checked, "checked_bytes")?)
        ));
        self.put_away(&mounted)?;
        let read = number(&second.summary, "read_bytes")?;
        let stood = first.stood_still()?.max(second.stood_still()?);
        let watched = match self.mode {
            Mode::Fuse => String::new(),
            Mode::Watch => format!(
                "; nothing was unmounted, writers stood still for {} ms at most",
                decimal(stood)
            ),
        };
        let line = format!(
            "demo: OK: 2 images of {} equal the volume at their instants; the second read {} ({}){watched}; {}\n",
            size(VOLUME_BYTES),
            size(read),
            share(read),
            seconds(self.begun)
        );
        create_if_absent(&self.path(LAST_LINE), line.as_bytes(), 0o600)?;
        Ok(())
    }

    /// The tracker first: the file system is made on its node.
    fn play_fuse(&self) -> Result<Played> {
        self.start_daemon()?;
        let node = self.track()?;
        let mounted = self.mount(&node)?;
        let (mut tree, recorder) = self.fill(&mounted)?;
        let first = self.back_up(&recorder, &mounted, &tree, "full")?;
        self.change(&mounted, &mut tree)?;
        let second = self.back_up(&recorder, &mounted, &tree, "incremental")?;
        self.end_writer(recorder, first, second, mounted)
    }

    /// The file system first, and in use; nothing of its way changes.
    fn play_watch(&self) -> Result<Played> {
        let device = self.loop_device()?;
        let mounted = self.mount(&device)?;
        let mount = mount_number(&mounted)?;
        let (mut tree, recorder) = self.fill(&mounted)?;
        let daemon = self.start_daemon()?;
        self.watch(&device)?;
        let first = self.back_up(&recorder, &mounted, &tree, "full")?;
        self.end_daemon(daemon)?;
        self.change(&mounted, &mut tree)?;
        sync(&mounted)?;
        self.start_daemon()?;
        self.still_tracked()?;
        let second = self.back_up(&recorder, &mounted, &tree, "incremental")?;
        ensure!(
            mount_number(&mounted)? == mount,
            "it was unmounted and mounted again"
        );
        self.tell(&format!(
            "{} was mounted once, by the kernel's number {mount}, before there was a tracker, and still is",
            device.display()
        ));
        self.end_writer(recorder, first, second, mounted)
    }

    fn fill(&self, mounted: &Path) -> Result<(Tree, Recorder)> {
        let watch = SystemClock.now();
        let tree = Tree::copy(&mounted.join("tree"))?;
        sync(mounted)?;
        self.tell(&format!(
            "copied {} files of this machine, {}, and synced: {}",
            tree.count(),
            size(tree.bytes),
            seconds(watch)
        ));
        let recorder = Recorder::start(&mounted.join("recorder"))?;
        self.tell("a writer goes on from here: direct writes of 4 KiB, each numbered, one after the other");
        Ok((tree, recorder))
    }

    fn change(&self, mounted: &Path, tree: &mut Tree) -> Result<()> {
        let watch = SystemClock.now();
        let changed = tree.change(&mounted.join("tree"), CHANGED_BLOCKS)?;
        self.tell(&format!(
            "changed {} files, made {}, removed {}: about {} blocks of {}, {}",
            changed.overwritten,
            changed.made,
            changed.removed,
            changed.places,
            VOLUME_BYTES / 65536,
            seconds(watch)
        ));
        Ok(())
    }

    fn end_writer(
        &self,
        recorder: Recorder,
        first: Step,
        second: Step,
        mounted: PathBuf,
    ) -> Result<Played> {
        let record = recorder.record();
        let longest = recorder.finish()?;
        self.tell(&format!(
            "the writer ends after {} writes; the longest waited {} ms",
            second.writes.1,
            decimal(longest)
        ));
        Ok((first, second, record, mounted))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Says a line, with the time since the start before it.
    fn tell(&self, line: &str) {
        let tenths = SystemClock.now().since(self.begun).as_millis() / 100;
        say(&format!("{:4}.{} s  {line}", tenths / 10, tenths % 10));
    }

    fn mount(&self, node: &Path) -> Result<PathBuf> {
        let mounted = self.path("mnt");
        fs::create_dir(&mounted)?;
        let quiet =
            ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"].map(std::ffi::OsStr::new);
        tool(
            "mkfs.ext4",
            &[&quiet[..], &[node.as_os_str()]].concat(),
            &[0],
        )?;
        let words = [
            "-o".as_ref(),
            "noatime,lazytime".as_ref(),
            node.as_os_str(),
            mounted.as_os_str(),
        ];
        tool("mount", &words, &[0])?;
        self.tell(&match self.mode {
            Mode::Fuse => "ext4 made on the node, and mounted".to_owned(),
            Mode::Watch => format!("ext4 made on {}, and mounted", node.display()),
        });
        Ok(mounted)
    }

    /// The truth kept, then a backup under the writer, which must be of `kind`.
    fn back_up(
        &self,
        recorder: &Recorder,
        mounted: &Path,
        tree: &Tree,
        kind: &str,
    ) -> Result<Step> {
        sync(mounted)?;
        let mut truth = Truth::keep(
            self.mode,
            &self.path("volume"),
            &self.path(&format!("truth-{kind}")),
            tree,
        )?;
        self.tell(&format!(
            "kept a copy of the volume's file, {}, as the truth",
            size(truth.kept_bytes()?)
        ));
        let before = recorder.count();
        let summary = self.ctl.run(&["backup", "data"])?;
        let writes = (before, recorder.count());
        truth.look_again()?;
        ensure!(text(&summary, "kind")? == kind, "not {kind}: {summary}");
        let step = Step {
            truth,
            summary,
            writes,
        };
        self.tell_of(&step)?;
        Ok(step)
    }

    fn tell_of(&self, step: &Step) -> Result<()> {
        let summary = &step.summary;
        let read = number(summary, "read_bytes")?;
        let tenths = summary
            .get("seconds")
            .and_then(Value::as_f64)
            .unwrap_or(0.0);
        self.tell(&format!(
            "{}: {}{}: read {} of {} ({}), stored {}, {tenths:.1} s; meanwhile {} writes",
            text(summary, "image")?,
            text(summary, "kind")?,
            summary
                .get("reason")
                .and_then(Value::as_str)
                .map_or(String::new(), |r| format!(" ({r})")),
            size(read),
            size(VOLUME_BYTES),
            share(read),
            size(number(summary, "stored_bytes")?),
            step.writes.1 - step.writes.0
        ));
        if self.mode == Mode::Watch {
            let consistency = text(summary, "consistency")?;
            ensure!(consistency == "frozen", "not frozen: {summary}");
            self.tell(&format!(
                "  its instant: the file system was frozen; writers stood still for {} ms at most",
                decimal(step.stood_still()?)
            ));
        }
        Ok(())
    }

    fn prove(&self, number: u64, step: &Step, record: &Record) -> Result<()> {
        let image = text(&step.summary, "image")?;
        let restored = self.path(&format!("restored-{number}"));
        let watch = SystemClock.now();
        self.ctl
            .run(&["restore", image, &restored.display().to_string(), "--yes"])?;
        self.tell(&format!(
            "{image} restored to a new file: {}",
            seconds(watch)
        ));
        let watch = SystemClock.now();
        let proven = step.truth.prove(&restored, &self.path("proof"), record)?;
        self.tell_proven(image, step.writes, &proven)?;
        self.tell(&format!(
            "  e2fsck: clean{}; {} files have the digests they were written with: {}",
            if self.mode == Mode::Watch {
                ", with no journal to replay"
            } else {
                ""
            },
            proven.files,
            seconds(watch)
        ));
        fs::remove_file(restored)?;
        Ok(())
    }

    fn tell_proven(&self, image: &str, (from, to): (u64, u64), proven: &Proven) -> Result<()> {
        ensure!(
            (from.saturating_sub(1)..=to).contains(&proven.prefix),
            "{image} is of write {}, the backup ran from {from} to {to}",
            proven.prefix
        );
        self.tell(&format!(
            "  every byte is the truth's; {} blocks are the writer's: the state after its write {}, exactly{}",
            proven.recorded,
            proven.prefix,
            match (proven.own, proven.frozen) {
                (0, 0) => String::new(),
                (own, 0) => format!(" ({own} of the kernel's own)"),
                (own, _) => format!(" ({own} of the kernel's own, and the superblock: frozen)"),
            }
        ));
        Ok(())
    }

    fn put_away(&self, mounted: &Path) -> Result<()> {
        tool("umount", &[mounted], &[0])?;
        self.ctl.run(&["detach", "data", "--yes"])?;
        tool(
            "e2fsck",
            &[
                "-f".as_ref(),
                "-n".as_ref(),
                self.path("volume").as_os_str(),
            ],
            &[0],
        )?;
        self.tell("unmounted, detached, the bitmap stored; the volume's own file is clean as well");
        Ok(())
    }
}

impl Step {
    /// The longest that the file system was frozen.
    fn stood_still(&self) -> Result<Duration> {
        let seconds = self
            .summary
            .get("longest_freeze_seconds")
            .and_then(Value::as_f64);
        Ok(Duration::try_from_secs_f64(
            seconds.context("longest_freeze_seconds")?,
        )?)
    }
}

/// The kernel's number of what is mounted there.
fn mount_number(at: &Path) -> Result<u64> {
    let all = mounts::all()?;
    let mount = all.iter().rev().find(|m| m.at == at);
    mount
        .map(|m| m.id)
        .with_context(|| format!("nothing is mounted at {}", at.display()))
}

fn sync(mounted: &Path) -> Result<()> {
    sync_file_system(&File::open(mounted)?).context("syncfs")
}

fn seconds(since: Instant) -> String {
    let tenths = SystemClock.now().since(since).as_millis() / 100;
    format!("{}.{} s", tenths / 10, tenths % 10)
}

/// `1.2 %` of the volume.
fn share(bytes: u64) -> String {
    let permille = bytes.saturating_mul(1000) / VOLUME_BYTES;
    format!("{}.{} %", permille / 10, permille % 10)
}
