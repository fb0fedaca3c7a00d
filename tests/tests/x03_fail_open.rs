//! Servers that keep dying: everything passes through, no write fails, and no bitmap is believed after it.
//! needs: root, loop, fuse, ext4
//! limit: 120 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Instance, Recorder, Tool, fill_file, kill, make_file, wait_until, write_block,
};
use blktide_volume::VolumeClient;
use blktide_volume::message::{VolumeState, VolumeStatus};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn status(instance: &Instance) -> Result<VolumeStatus> {
    let limit = Duration::from_secs(5);
    Ok(VolumeClient::connect(&instance.join("run"), "data", limit)?.status()?)
}

/// req X3: P6, fail-open. Distrust is stored before the first write that passes unseen.
/// trap TC12: a stretch without tracking never yields an incremental.
#[test]
fn servers_that_keep_dying() -> Result<()> {
    let instance = Instance::started("x03")?;
    let backing = instance.join("backing");
    fill_file(&backing, 32 * MIB)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    write_block(&node, 0, &[1; 4096])?;
    instance.backup_is("data", "incremental", None)?;
    for round in 0..20 {
        let now = status(&instance)?;
        if now.state == VolumeState::PassingThrough {
            break;
        }
        ensure!(round < 15, "it never passed through");
        kill(now.pid, "KILL")?;
        wait_until("a successor serves", Duration::from_secs(20), || {
            Ok(status(&instance).is_ok_and(|s| s.pid != now.pid))
        })?;
    }
    let now = status(&instance)?;
    let distrust = now.distrust.context("fail-open distrusts")?;
    ensure!(distrust.reason == "tracking-interrupted", "{distrust:?}");
    let writer = Recorder::start(&node, 0..32 * MIB / 4096, 3, Duration::ZERO)?;
    wait_until("writes go on", Duration::from_secs(20), || {
        Ok(writer.written() > 500)
    })?;
    // A successor of a server that passes through passes through, too: writes it did not see are in no bitmap.
    kill(now.pid, "KILL")?;
    let seen = writer.written();
    wait_until("writes go on", Duration::from_secs(20), || {
        Ok(writer.written() > seen + 500)
    })?;
    ensure!(status(&instance)?.state == VolumeState::PassingThrough);
    let record = writer.finish()?;
    println!(
        "figure: passed through; {} writes, longest {:?}",
        record.count(),
        record.longest_wait
    );
    instance.detach("data")?;
    let node = instance.attach("data")?;
    instance.backup_is("data", "full", Some("tracking-interrupted"))?;
    instance.image_equals("data@latest", &backing, &[])?;
    write_block(&node, 4096, &[2; 4096])?;
    instance.backup_is("data", "incremental", None)?;
    instance.detach("data")
}

/// req X3: the path of the backing device leads elsewhere, or nowhere, when a server dies: its successor goes on with the same device.
/// trap TC7: another device at the old name is not written to.
#[test]
fn the_path_of_the_device_is_not_asked_again() -> Result<()> {
    let instance = Instance::started("x03")?;
    let backing = instance.join("backing");
    fill_file(&backing, 16 * MIB)?;
    let before = instance.join("before");
    std::fs::copy(&backing, &before)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    let writer = Recorder::start(&node, 0..16 * MIB / 4096, 5, Duration::ZERO)?;
    let moved = instance.join("moved");
    rename(&backing, &moved)?;
    fill_file(&backing, 16 * MIB)?;
    let other = instance.join("other");
    std::fs::copy(&backing, &other)?;
    for _ in 0..3 {
        let now = status(&instance)?;
        kill(now.pid, "KILL")?;
        let seen = writer.written();
        wait_until("writes go on", Duration::from_secs(20), || {
            Ok(writer.written() > seen + 200)
        })?;
    }
    let record = writer.finish()?;
    blktide_tests::same_bytes(&backing, &other, 16 * MIB)?;
    instance.detach("data")?;
    let held = record.prefix_of(&moved, Some(&before), 16 * MIB / 4096)?;
    ensure!(
        held == record.count(),
        "it holds write {held} of {}",
        record.count()
    );
    rename(&moved, &backing)?;
    instance.attach("data")?;
    instance.detach("data")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test moves its own file; nothing to be durable"
)]
fn rename(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    Ok(std::fs::rename(from, to)?)
}

/// req X3: a copy of the mount in another mount namespace keeps neither the volume nor its server, and the bitmap is stored.
#[test]
fn a_foreign_mount_does_not_hold_a_detach() -> Result<()> {
    let instance = Instance::started("x03mount")?;
    let backing = instance.join("backing");
    make_file(&backing, 64 * MIB)?;
    FileSystem::Ext4.make(&backing)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    write_block(&node, 5 * MIB, &[1; 4096])?;
    let foreign = Tool::new("unshare")
        .args(["--mount", "--propagation", "private", "sleep", "100"])
        .start()?;
    wait_until("its mounts are its own", Duration::from_secs(5), || {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt"));
        Ok(of(foreign.pid())? != of(std::process::id())?)
    })?;
    instance.detach("data")?;
    ensure!(foreign.runs(), "it was to hold the mount all the time");
    drop(foreign);
    instance.attach("data")?;
    instance.backup_is("data", "incremental", None)?;
    instance.image_equals("data@latest", &backing, &[])?;
    instance.detach("data")
}
