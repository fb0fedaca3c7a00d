//! A repository that never answers: writers go on, `status` and `cancel` answer, nothing is forgotten.
//!
//! The repository lies on a file system on another instance's volume, whose keeper and server are stopped: every
//! read and write of it waits for ever, as on a dead NAS.
//! needs: root, loop, fuse, ext4
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{
    FileSystem, Instance, Mounted, Recorder, Stopwatch, fill_file, kill, make_file, wait_until,
};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Stopped processes, which go on when dropped.
struct Stopped(Vec<u32>);

impl Stopped {
    fn new(pids: Vec<u32>) -> Result<Self> {
        for pid in &pids {
            kill(*pid, "STOP")?;
        }
        Ok(Self(pids))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            drop(kill(*pid, "CONT"));
        }
    }
}

/// The other instance, and the file system on its volume.
fn shelf() -> Result<(Instance, Mounted)> {
    let store = Instance::started("d02store")?;
    let backing = store.join("backing");
    make_file(&backing, 512 * MIB)?;
    FileSystem::Ext4.make(&backing)?;
    let node = store.volume_add("shelf", &backing, &[])?;
    let mounted = Mounted::new(&node, &store.join("mnt"), &[])?;
    Ok((store, mounted))
}

/// An instance whose writers may wait up to 2 s, with its repository in `folder`.
fn with_repository(folder: &Path) -> Result<Instance> {
    let instance = Instance::new("d02")?;
    instance.configure(
        "",
        "overflow = \"wait\"\nwait_limit = \"2 s\"\nlimit = \"16 MiB\"\n",
    )?;
    let mut instance = instance;
    instance.start()?;
    instance.ctl_ok(&["repo", "init", "main", &folder.display().to_string()])?;
    Ok(instance)
}

/// req D2, D4: no write waits longer than `wait_limit`, `status` answers within 1 s, `cancel` answers.
#[test]
fn a_repository_that_never_answers() -> Result<()> {
    let (store, mounted) = shelf()?;

    let instance = with_repository(&mounted.join("repository"))?;
    let backing = instance.join("backing");
    fill_file(&backing, 64 * MIB)?;
    let node = instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;

    let writer = Recorder::start(&node, 0..64 * MIB / 4096, 0xd02, Duration::ZERO)?;
    // Slowly, so that the repository dies in the middle: after the instant, with most blocks still to be read.
    let words = [
        "backup",
        "data",
        "--full",
        "--max-read-rate",
        "8 MiB/s",
        "--json",
    ];
    let backup = instance.ctl_start(&words)?;
    wait_until(
        "the backup has read something",
        Duration::from_secs(60),
        || {
            let status = instance.status("data")?;
            Ok(status.pointer("/job/done_bytes").and_then(Value::as_u64) > Some(0))
        },
    )?;
    let stopped = Stopped::new(vec![store.keeper_pid("shelf")?, store.server_pid("shelf")?])?;
    let mut slowest = 0.0_f64;
    let watch = Stopwatch::start();
    let mut written = writer.written();
    wait_until(
        "eight seconds of a hung backup have passed",
        Duration::from_secs(60),
        || {
            let one = Stopwatch::start();
            drop(instance.status("data")?);
            slowest = slowest.max(one.seconds());
            Ok(watch.seconds() > 8.0)
        },
    )?;
    ensure!(writer.written() > written, "no write went on");
    written = writer.written();
    let one = Stopwatch::start();
    drop(instance.ctl(&["cancel", "data"])?);
    let answered = one.seconds();
    ensure!(answered < 5.0, "cancel answered after {answered} s");
    wait_until(
        "writes go on after the cancel",
        Duration::from_secs(10),
        || Ok(writer.written() > written + 100),
    )?;
    drop(stopped);
    drop(backup.finish()?);
    let record = writer.finish()?;
    let longest = record.longest_wait.as_secs_f64();
    println!(
        "figure: repository hung for 8 s: slowest status {slowest:.3} s, cancel {answered:.3} s, longest write {longest:.3} s"
    );
    ensure!(slowest < 1.0, "status took {slowest} s");
    ensure!(
        longest < 3.0,
        "a write waited {longest} s with a wait_limit of 2 s"
    );
    let summary = instance.backup("data", &[])?;
    ensure!(summary["kind"] == "incremental", "{summary}");
    instance.image_equals("data@latest", &backing, &[])?;
    instance.detach("data")?;
    mounted.unmount()
}
