//! Written while the tracker was away: seen, said, and the next image right.
//! needs: root, loop, fuse, ext4, xfs
//! limit: 300 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Instance, LoopDevice, Mounted, Tool, kill, make_file, put, text_of, wait_until,
    write_block,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn bytes_for(system: FileSystem) -> u64 {
    match system {
        FileSystem::Ext4 => 64 * MIB,
        FileSystem::Xfs | FileSystem::Btrfs => 320 * MIB,
    }
}

/// A volume with a file system and its first image.
fn volume(name: &str, system: FileSystem) -> Result<(Instance, PathBuf)> {
    let instance = Instance::started(name)?;
    let backing = instance.join("backing");
    make_file(&backing, bytes_for(system))?;
    system.make(&backing)?;
    instance.repo_init("main")?;
    instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    Ok((instance, backing))
}

/// The next backup has one of `reasons` (none: incremental), and its image is the volume.
fn expect(instance: &Instance, backing: &Path, what: &str, reasons: &[&str]) -> Result<()> {
    let summary = instance.backup("data", &[])?;
    let kind = text_of(&summary, "/kind")?;
    let reason = summary
        .pointer("/reason")
        .and_then(serde_json::Value::as_str);
    let well = match reason {
        None => reasons.is_empty() && kind == "incremental",
        Some(word) => reasons.contains(&word) && kind != "incremental",
    };
    ensure!(
        well,
        "{what}: wanted {reasons:?}, got {kind} {reason:?}\n{}",
        instance.log_tail()
    );
    instance
        .image_equals("data@latest", backing, &[])
        .with_context(|| what.to_owned())
}

fn away(instance: &Instance, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    instance.detach("data")?;
    meanwhile()?;
    instance.attach("data")?;
    Ok(())
}

fn touched_elsewhere(instance: &Instance, backing: &Path) -> Result<()> {
    let mounted = Mounted::new(backing, &instance.join("elsewhere"), &["-o", "loop"])?;
    put(&mounted.join("foreign"), "written behind its back")?;
    mounted.unmount()
}

/// req A6: mounted by somebody else, repaired by fsck; a stop in which nothing happened stays incremental.
/// trap TC3: another system mounted it.
#[test]
fn a_mount_elsewhere_and_a_repair_are_seen() -> Result<()> {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        let (instance, backing) = volume("a06mount", system)?;
        let name = system.name();
        away(&instance, || Ok(()))?;
        expect(&instance, &backing, &format!("{name}: nothing"), &[])?;
        away(&instance, || touched_elsewhere(&instance, &backing))?;
        expect(
            &instance,
            &backing,
            &format!("{name}: mounted elsewhere"),
            &["foreign-write"],
        )?;
        if system == FileSystem::Ext4 {
            away(&instance, || {
                Tool::new("debugfs")
                    .args(["-w", "-R", "clri <2>"])
                    .arg(&backing)
                    .run()?
                    .ok()?;
                let done = Tool::new("e2fsck").args(["-f", "-y"]).arg(&backing).run()?;
                ensure!(
                    done.code == Some(1),
                    "e2fsck was to repair: {:?}",
                    done.code
                );
                Ok(())
            })?;
            expect(&instance, &backing, "ext4: repaired", &["foreign-write"])?;
        }
    }
    Ok(())
}

/// A file system with a journal to replay: what a power cut leaves.
fn with_journal(instance: &Instance, backing: &Path, system: FileSystem) -> Result<()> {
    let source = instance.join("source");
    make_file(&source, bytes_for(system))?;
    system.make(&source)?;
    let mounted = Mounted::new(&source, &instance.join("source-mnt"), &["-o", "loop"])?;
    for number in 0..50 {
        put(&mounted.join(format!("f{number}")), &"x".repeat(5000))?;
    }
    mounted.sync()?;
    Tool::new("cp")
        .args(["--sparse=always"])
        .arg(&source)
        .arg(backing)
        .run()?
        .ok()?;
    mounted.unmount()?;
    fs::remove_file(source)?;
    Ok(())
}

/// req A6: a read-only mount replays the journal and writes: never incremental, not even with `exclusive`.
/// trap TC1: a journal replay before the tracker.
#[test]
fn a_read_only_mount_that_replays_is_seen() -> Result<()> {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        let instance = Instance::started("a06replay")?;
        let backing = instance.join("backing");
        with_journal(&instance, &backing, system)?;
        instance.repo_init("main")?;
        instance.volume_add("data", &backing, &[])?;
        instance.backup_is("data", "full", Some("first-backup"))?;
        away(&instance, || Ok(()))?;
        expect(
            &instance,
            &backing,
            "journal not empty at the stop",
            &["foreign-write-unknown"],
        )?;
        exclusive(&instance)?;
        away(&instance, || Ok(()))?;
        expect(&instance, &backing, "the same, exclusive", &[])?;
        away(&instance, || {
            // The mount is read-only, the device is not: so it is that the journal is replayed.
            let device = LoopDevice::new(&backing, 512)?;
            Mounted::new(device.path(), &instance.join("elsewhere"), &["-o", "ro"])?.unmount()
        })?;
        expect(
            &instance,
            &backing,
            "replayed by a read-only mount",
            &["foreign-write"],
        )?;
    }
    Ok(())
}

fn exclusive(instance: &Instance) -> Result<()> {
    let path = instance.join("volumes.d/data.toml");
    let text = fs::read_to_string(&path)?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|l| !l.starts_with("exclusive"))
        .collect();
    put(&path, &format!("exclusive = true\n{}\n", kept.join("\n")))?;
    instance.reload()
}

/// req A6: a raw volume shows nothing: not believed over a stop, unless nothing else ever writes it.
/// trap TC2: what was written after the file was made is not clean.
#[test]
fn weak_evidence_is_not_believed() -> Result<()> {
    let instance = Instance::started("a06weak")?;
    let backing = instance.join("backing");
    make_file(&backing, 8 * MIB)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    write_block(&node, 65536, &[1; 4096])?;
    away(&instance, || Ok(()))?;
    expect(&instance, &backing, "raw", &["foreign-write-unknown"])?;
    write_block(&node, 3 * 65536, &[2; 4096])?;
    exclusive(&instance)?;
    away(&instance, || Ok(()))?;
    expect(&instance, &backing, "raw, exclusive", &[])
}

/// req A6: written past the volume after its last backup, then detached: the evidence of the stop has that write in it.
#[test]
fn a_write_past_the_volume_before_a_detach_is_seen() -> Result<()> {
    let instance = Instance::started("a06past")?;
    let file = instance.join("file");
    make_file(&file, 64 * MIB)?;
    let device = LoopDevice::new(&file, 512)?;
    let backing = device.path();
    FileSystem::Ext4.make(backing)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    write_block(&node, 5 * MIB, &[1; 4096])?;
    away(&instance, || Ok(()))?;
    expect(&instance, backing, "ours", &[])?;
    write_block(backing, 6 * MIB, &[2; 4096])?;
    away(&instance, || Ok(()))?;
    expect(&instance, backing, "past the volume", &["foreign-write"])?;
    away(&instance, || Ok(()))?;
    expect(&instance, backing, "afterwards", &[])?;
    instance.detach("data")
}

/// req A6, X3: keeper and server both dead, the raw device written: what P4 says.
/// trap TC11: an untracked period invalidates.
/// trap TC12: interrupted tracking never yields an incremental.
#[test]
fn both_killed_and_the_device_written() -> Result<()> {
    let (instance, backing) = volume("a06killed", FileSystem::Ext4)?;
    let (keeper, server) = (instance.keeper_pid("data")?, instance.server_pid("data")?);
    // The keeper first stopped, so that it cannot start another server in between.
    kill(keeper, "STOP")?;
    kill(server, "KILL")?;
    kill(keeper, "KILL")?;
    wait_until("both are gone", Duration::from_secs(20), || {
        let there = |pid: u32| {
            Path::new(&format!("/proc/{pid}/fd"))
                .read_dir()
                .is_ok_and(|mut d| d.next().is_some())
        };
        Ok(!there(keeper) && !there(server))
    })?;
    write_block(&backing, 5 * MIB, &[7; 4096])?;
    wait_until("attached anew", Duration::from_secs(60), || {
        let reply = instance.ctl(&["attach", "data", "--json"])?;
        let status = instance.status("data")?;
        let state = text_of(&status, "/state")?.to_owned();
        Ok(reply.finished.code == Some(0) && state == "attached" && instance.node("data").exists())
    })?;
    expect(
        &instance,
        &backing,
        "both killed",
        &["tracking-interrupted"],
    )?;
    write_block(&instance.node("data"), 6 * MIB, &[8; 4096])?;
    expect(&instance, &backing, "afterwards", &[])
}
