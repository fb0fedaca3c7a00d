//! Keeper, server and a buffered writer in one small memory cgroup: the data path never waits for memory that only it can free.
//! needs: root, loop, fuse, ext4, memcg
//! limit: 400 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_tests::{FileSystem, Instance, Mounted, Stopwatch, kill, make_file, wait_until};
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const LIMIT_BYTES: u64 = 96 * MIB;
const WRITTEN_MIB: u64 = 800;
/// What the slots, the bitmaps and a server's own memory take, at most.
const DATA_PATH_BYTES: u64 = 56 * MIB;
const WRITER: &str = "BLKTIDE_P07_WRITER";

/// A memory cgroup; removed when dropped, its processes moved out.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Result<Self> {
        let name = format!("blktide-p07-{}", std::process::id());
        let (one, two) = (
            Path::new("/sys/fs/cgroup/memory"),
            Path::new("/sys/fs/cgroup"),
        );
        let (parent, file) = if one.join("memory.limit_in_bytes").exists() {
            (one, "memory.limit_in_bytes")
        } else {
            let controllers = fs::read_to_string(two.join("cgroup.subtree_control"))?;
            ensure!(controllers.contains("memory"), "no memory cgroup here");
            (two, "memory.max")
        };
        let folder = parent.join(name);
        fs::create_dir(&folder)?;
        let group = Self(folder);
        group.put(file, &bytes.to_string())?;
        Ok(group)
    }

    fn put(&self, file: &str, text: &str) -> Result<()> {
        let path = self.0.join(file);
        let mut file = fs::OpenOptions::new().write(true).open(&path)?;
        file.write_all(text.as_bytes())
            .with_context(|| format!("{text} to {}", path.display()))
    }

    fn take(&self, pid: u32) -> Result<()> {
        self.put("cgroup.procs", &pid.to_string())
    }

    fn peak_bytes(&self) -> Option<u64> {
        ["memory.max_usage_in_bytes", "memory.peak"]
            .iter()
            .find_map(|f| fs::read_to_string(self.0.join(f)).ok()?.trim().parse().ok())
    }

    /// How often the limit was met.
    fn pressed(&self) -> Option<u64> {
        fs::read_to_string(self.0.join("memory.failcnt"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let parent = self.0.parent().map(|p| p.join("cgroup.procs"));
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            let moved = parent.as_ref().map(|p| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(p)
                    .and_then(|mut f| f.write_all(pid.as_bytes()))
            });
            drop(moved);
        }
        if let Err(e) = fs::remove_dir(&self.0) {
            eprintln!("{} stays: {e}", self.0.display());
        }
    }
}

/// The bytes of the MiB numbered `number`.
fn pattern(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(1 << 20);
    while bytes.len() < 1 << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// Not a test by itself: the writer, a process of its own in the cgroup.
#[test]
fn writer() -> Result<()> {
    let Ok(what) = std::env::var(WRITER) else {
        return Ok(());
    };
    let (group, target) = what.split_once(':').context("cgroup:file")?;
    fs::OpenOptions::new()
        .write(true)
        .open(Path::new(group).join("cgroup.procs"))?
        .write_all(std::process::id().to_string().as_bytes())?;
    let mut file = fs::File::create(target)?;
    for number in 0..WRITTEN_MIB {
        file.write_all(&pattern(number))?;
    }
    file.sync_all()?;
    Ok(())
}

fn write_in(group: &Cgroup, target: &Path) -> Result<()> {
    let watch = Stopwatch::start();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "writer", "--nocapture"])
        .env(
            WRITER,
            format!("{}:{}", group.0.display(), target.display()),
        )
        .spawn()?;
    let mut ended = None;
    let waited = wait_until("the writer ends", Duration::from_secs(180), || {
        ended = child.try_wait()?;
        Ok(ended.is_some())
    });
    if waited.is_err() {
        let stack = fs::read_to_string(format!("/proc/{}/stack", child.id())).unwrap_or_default();
        drop(child.kill());
        bail!(
            "deadlock: the writer has not ended after {:.0} s\n{stack}",
            watch.seconds()
        );
    }
    ensure!(ended.is_some_and(|s| s.success()), "the writer: {ended:?}");
    eprintln!(
        "p07: {WRITTEN_MIB} MiB in {:.1} s, peak of the cgroup {:?} bytes, limit met {:?} times",
        watch.seconds(),
        group.peak_bytes(),
        group.pressed()
    );
    Ok(())
}

/// req X3: P7, no page of the data path is had by writing one out through the data path.
#[test]
fn a_small_cgroup_does_not_deadlock() -> Result<()> {
    let instance = Instance::started("p07")?;
    let group = Cgroup::new(LIMIT_BYTES)?;
    let program_bytes = fs::metadata(blktide_tests::binary("blktided")?)?.len();
    // Everything is charged from its first page if that fits; the copy of an unoptimised program does not.
    let from_the_start = program_bytes + DATA_PATH_BYTES < LIMIT_BYTES;
    if from_the_start {
        group.take(instance.daemon_pid()?)?;
    }
    let backing = instance.join("backing");
    make_file(&backing, 1200 * MIB)?;
    let node = instance.volume_add("data", &backing, &[])?;
    if !from_the_start {
        // A server that is born in the cgroup has all of its own memory there.
        group.take(instance.keeper_pid("data")?)?;
        let old = instance.server_pid("data")?;
        kill(old, "KILL")?;
        wait_until("a successor serves", Duration::from_secs(10), || {
            Ok(instance.server_pid("data").is_ok_and(|pid| pid != old))
        })?;
    }
    let inside = fs::read_to_string(group.0.join("cgroup.procs"))?;
    for pid in [instance.keeper_pid("data")?, instance.server_pid("data")?] {
        ensure!(
            inside.lines().any(|l| l == pid.to_string()),
            "{pid} is not in the cgroup"
        );
    }
    FileSystem::Ext4.make(&node)?;
    let mounted = Mounted::new(&node, &instance.join("mnt"), &[])?;
    write_in(&group, &mounted.join("one"))?;
    mounted.sync()?;
    drop_caches()?;
    let mut file = fs::File::open(mounted.join("one"))?;
    ensure!(
        file.seek(SeekFrom::End(0))? == WRITTEN_MIB * MIB,
        "its length"
    );
    file.rewind()?;
    let mut bytes = vec![0; 1 << 20];
    for number in 0..WRITTEN_MIB {
        file.read_exact(&mut bytes)?;
        ensure!(
            bytes == pattern(number),
            "MiB {number} is not what was written"
        );
    }
    drop(file);
    mounted.unmount()?;
    FileSystem::Ext4.check(&node)?;
    instance.detach("data")
}

fn drop_caches() -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open("/proc/sys/vm/drop_caches")?;
    Ok(file.write_all(b"1")?)
}
