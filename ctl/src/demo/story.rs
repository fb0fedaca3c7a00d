//! What the demo does, step by step, and what it says of it.

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::pause;
use blktide_sys::fs::{create_if_absent, sync_file_system};
use blktide_types::clock::{Clock, Instant};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::command::{Blktidectl, number, text, tool};
use super::proof::Truth;
use super::recorder::Recorder;
use super::tree::Tree;
use super::{LAST_LINE, say, size};

/// Bytes of the volume: 2.25 GiB.
const VOLUME_BYTES: u64 = 9 << 28;
/// 1 % of its blocks of 64 KiB.
const CHANGED_BLOCKS: u64 = VOLUME_BYTES / 65536 / 100;

struct Story {
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

/// Plays it in `folder`, which somebody else removes. The last line is left in a file there.
pub(super) fn run(folder: &Path, programs: &Path) -> Result<()> {
    let story = Story {
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
        self.start_daemon()?;
        let node = self.track()?;
        let mounted = self.mount(&node)?;
        let watch = SystemClock.now();
        let mut tree = Tree::copy(&mounted.join("tree"))?;
        sync(&mounted)?;
        self.tell(&format!(
            "copied {} files of this machine, {}, and synced: {}",
            tree.count(),
            size(tree.bytes),
            seconds(watch)
        ));
        let recorder = Recorder::start(&mounted.join("recorder"))?;
        self.tell("a writer goes on from here: direct writes of 4 KiB, each numbered, one after the other");
        let first = self.back_up(&recorder, &mounted, &tree, &["data", "full"])?;
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
        let second = self.back_up(&recorder, &mounted, &tree, &["data", "incremental"])?;
        let record = recorder.record();
        let longest = recorder.finish()?;
        self.tell(&writer_ended(&second, longest));
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
        let line = format!(
            "demo: OK: 2 images of {} equal the volume at their instants; the second read {} ({}); {}\n",
            size(VOLUME_BYTES),
            size(read),
            share(read),
            seconds(self.begun)
        );
        create_if_absent(&self.path(LAST_LINE), line.as_bytes(), 0o600)?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Says a line, with the time since the start before it.
    fn tell(&self, line: &str) {
        let tenths = SystemClock.now().since(self.begun).as_millis() / 100;
        say(&format!("{:4}.{} s  {line}", tenths / 10, tenths % 10));
    }

    fn start_daemon(&self) -> Result<()> {
        for name in ["run", "state", "volumes.d", "repositories.d", "dev", "save"] {
            fs::create_dir(self.path(name))?;
        }
        let root = self.folder.display();
        let text = format!(
            "runtime_dir = \"{root}/run\"\nstate_dir = \"{root}/state\"\nvolumes_dir = \"{root}/volumes.d\"\n\
             repositories_dir = \"{root}/repositories.d\"\ndevice_dir = \"{root}/dev\"\n\
             [defaults.save_area]\npath = \"{root}/save\"\n"
        );
        create_if_absent(&self.path("blktide.toml"), text.as_bytes(), 0o600)?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("blktided.log"))?;
        let mut daemon = Command::new(self.programs.join("blktided"))
            .arg("--config")
            .arg(self.path("blktide.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("blktided")?;
        let socket = self.path("run/blktide.sock");
        for _ in 0..500 {
            if UnixStream::connect(&socket).is_ok() {
                self.tell(&format!(
                    "blktided runs, process {}, configuration and sockets in the folder",
                    daemon.id()
                ));
                return Ok(());
            }
            if let Some(status) = daemon.try_wait()? {
                bail!("blktided ended: {status}");
            }
            pause(Duration::from_millis(20))?;
        }
        bail!("blktided does not answer");
    }

    fn track(&self) -> Result<PathBuf> {
        File::create_new(self.path("volume"))?.set_len(VOLUME_BYTES)?;
        let repository = self.path("repository").display().to_string();
        self.ctl.run(&["repo", "init", "main", &repository])?;
        self.tell(&format!(
            "volume: a sparse file of {}; repository: a folder",
            size(VOLUME_BYTES)
        ));
        let volume = self.path("volume").display().to_string();
        self.ctl.run(&[
            "volume", "add", "data", "--device", &volume, "--mode", "fuse", "--yes",
        ])?;
        let status = self.ctl_status()?;
        let node = self.path("dev/data");
        ensure!(
            text(&status, "state")? == "attached" && node.exists(),
            "not attached: {status}"
        );
        self.tell(&format!(
            "tracker attached under {}: keeper {}, server {}, blocks of {}",
            fs::canonicalize(&node)?.display(),
            number(&status, "keeper_pid")?,
            number(&status, "pid")?,
            size(number(&status, "block_size_bytes")?)
        ));
        Ok(node)
    }

    fn ctl_status(&self) -> Result<Value> {
        // Exit 3 is well here: a volume without an image wants a backup.
        let json = self.ctl.run_any(&["status", "data"], &[0, 3])?;
        json.pointer("/volumes/0")
            .cloned()
            .context("status shows no volume")
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
        self.tell("ext4 made on the node, and mounted");
        Ok(mounted)
    }

    /// The truth kept, then a backup under the writer; `what` is the volume and the kind that it must be.
    fn back_up(
        &self,
        recorder: &Recorder,
        mounted: &Path,
        tree: &Tree,
        what: &[&str; 2],
    ) -> Result<Step> {
        let [volume, kind] = what;
        sync(mounted)?;
        let mut truth = Truth::keep(
            &self.path("volume"),
            &self.path(&format!("truth-{kind}")),
            tree,
        )?;
        self.tell(&format!(
            "kept a copy of the volume's file, {}, as the truth",
            size(truth.kept_bytes()?)
        ));
        let before = recorder.count();
        let summary = self.ctl.run(&["backup", volume])?;
        let writes = (before, recorder.count());
        truth.look_again()?;
        ensure!(text(&summary, "kind")? == *kind, "not {kind}: {summary}");
        let read = number(&summary, "read_bytes")?;
        let tenths = summary
            .get("seconds")
            .and_then(Value::as_f64)
            .unwrap_or(0.0);
        self.tell(&format!(
            "{}: {kind}{}: read {} of {} ({}), stored {}, {tenths:.1} s; meanwhile {} writes",
            text(&summary, "image")?,
            summary
                .get("reason")
                .and_then(Value::as_str)
                .map_or(String::new(), |r| format!(" ({r})")),
            size(read),
            size(VOLUME_BYTES),
            share(read),
            size(number(&summary, "stored_bytes")?),
            writes.1 - writes.0
        ));
        Ok(Step {
            truth,
            summary,
            writes,
        })
    }

    fn prove(&self, number: u64, step: &Step, record: &super::recorder::Record) -> Result<()> {
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
        let (from, to) = step.writes;
        ensure!(
            (from.saturating_sub(1)..=to).contains(&proven.prefix),
            "{image} is of write {}, the backup ran from {from} to {to}",
            proven.prefix
        );
        self.tell(&format!(
            "  every byte is the truth's; {} blocks are the writer's: the state after its write {}, exactly{}",
            proven.recorded,
            proven.prefix,
            if proven.own == 0 { String::new() } else { format!(" ({} of the kernel's own)", proven.own) }
        ));
        self.tell(&format!(
            "  e2fsck: clean; {} files have the digests they were written with: {}",
            proven.files,
            seconds(watch)
        ));
        fs::remove_file(restored)?;
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

fn writer_ended(step: &Step, longest: Duration) -> String {
    format!(
        "the writer ends after {} writes; the longest waited {}.{:03} ms",
        step.writes.1,
        longest.as_micros() / 1000,
        longest.as_micros() % 1000
    )
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
