//! A restore onto a device: what it held is gone, what is in use is refused, and only what differs is written if asked.
//! needs: root, loop, fuse, ext4
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{
    DeviceCounters, FileSystem, Instance, LoopDevice, Mounted, fill_file, make_file, same_bytes,
    write_block,
};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 64 * MIB;

/// A mostly empty ext4 volume, with one image that equals its backing file.
fn volume(name: &str) -> Result<(Instance, PathBuf)> {
    let instance = Instance::started(name)?;
    let backing = instance.join("backing");
    make_file(&backing, BYTES)?;
    FileSystem::Ext4.make(&backing)?;
    instance.repo_init("main")?;
    instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    Ok((instance, backing))
}

/// req F4: onto a device full of something else, zeroes included; then only the difference, counted by the kernel.
/// trap TF2: zeroes are written, not skipped.
/// trap TF3: a target whose unwritten blocks are not zero.
#[test]
fn onto_a_device_that_held_something() -> Result<()> {
    let (instance, backing) = volume("f04")?;
    let file = instance.join("target");
    fill_file(&file, BYTES)?;
    let device = LoopDevice::new(&file, 512)?;
    let target = device.path().display().to_string();
    instance
        .ctl(&["restore", "data@latest", &target, "--yes"])?
        .exits(13)?;
    instance.ctl_ok(&["restore", "data@latest", &target, "--overwrite", "--yes"])?;
    same_bytes(&backing, device.path(), BYTES)?;
    write_block(device.path(), 20 * MIB, &[0x5a; 4096])?;
    let before = DeviceCounters::of(device.path())?;
    instance.ctl_ok(&[
        "restore",
        "data@latest",
        &target,
        "--overwrite",
        "--differing-only",
        "--yes",
    ])?;
    let written = DeviceCounters::of(device.path())?
        .since(before)
        .written_bytes;
    same_bytes(&backing, device.path(), BYTES)?;
    println!("figure: one block of {BYTES} B differed: {written} B were written");
    ensure!(
        written > 0 && written <= 2 * MIB,
        "{written} B written for one block"
    );
    Ok(())
}

/// req F6: mounted, in use, too small: refused whatever was said; without a word to a machine: refused, too.
#[test]
fn what_is_in_use_or_too_small_is_refused() -> Result<()> {
    let (instance, _backing) = volume("f04refuse")?;
    let file = instance.join("target");
    make_file(&file, BYTES)?;
    FileSystem::Ext4.make(&file)?;
    let device = LoopDevice::new(&file, 512)?;
    let target = device.path().display().to_string();
    let mounted = Mounted::new(device.path(), &instance.join("mnt"), &[])?;
    let reply = instance
        .ctl(&[
            "restore",
            "data@latest",
            &target,
            "--overwrite",
            "--yes",
            "--json",
        ])?
        .exits(13)?;
    ensure!(
        reply.error_code()? == "target_mounted",
        "{:?}",
        reply.finished
    );
    mounted.unmount()?;
    instance
        .ctl(&["restore", "data@latest", &target, "--overwrite"])?
        .exits(13)?;
    let small = instance.join("small");
    make_file(&small, BYTES / 2)?;
    let small_device = LoopDevice::new(&small, 512)?;
    let target = small_device.path().display().to_string();
    instance
        .ctl(&["restore", "data@latest", &target, "--overwrite", "--yes"])?
        .exits(13)?;
    let node = instance.node("data").display().to_string();
    let open = Mounted::new(&instance.node("data"), &instance.join("mnt"), &[])?;
    instance
        .ctl(&["restore", "data@latest", &node, "--overwrite", "--yes"])?
        .exits(13)?;
    instance.ctl(&["detach", "data", "--yes"])?.exits(13)?;
    open.unmount()
}

/// req A6: a restore under a volume that is away makes its bitmap file go first.
/// trap TC8: what lies under a baseline was replaced.
#[test]
fn under_a_detached_volume() -> Result<()> {
    let (instance, backing) = volume("f04under")?;
    write_block(&instance.node("data"), 30 * MIB, &[1; 4096])?;
    instance.backup_is("data", "incremental", None)?;
    instance.detach("data")?;
    let target = backing.display().to_string();
    instance.ctl_ok(&["restore", "data@1", &target, "--overwrite", "--yes"])?;
    ensure!(
        !instance.state_of("data").join("bitmap").exists(),
        "the bitmap file is still there"
    );
    instance.attach("data")?;
    let summary = instance.backup("data", &[])?;
    ensure!(
        summary["kind"] == "full" && !summary["reason"].is_null(),
        "{summary}"
    );
    instance.image_equals("data@latest", &backing, &[])
}

/// req A6: a loop device on the backing file is that file; a typing error in another volume's file does not hide it; and the
/// output says what it costs.
/// trap TC8: what lies under a baseline was replaced, by another name.
#[test]
fn under_a_detached_volume_by_another_name() -> Result<()> {
    let (instance, backing) = volume("f04other")?;
    instance.detach("data")?;
    let device = LoopDevice::new(&backing, 512)?;
    let target = device.path().display().to_string();
    let words = ["restore", "data@1", &target, "--overwrite", "--yes"];
    let repository = instance.repository("main").display().to_string();
    let by_path = [&words[..], &["-r", &repository]].concat();
    let bitmap = instance.state_of("data").join("bitmap");
    ensure!(bitmap.exists(), "a clean detach stores the bitmap");
    let wrong = instance.join("volumes.d/other.toml");
    make_file(&wrong, 3)?;
    instance.ctl(&by_path)?.exits(13)?;
    ensure!(bitmap.exists(), "a refused restore changes nothing");
    std::fs::remove_file(&wrong)?;
    instance.ctl_ok(&words)?;
    ensure!(!bitmap.exists(), "the bitmap file is still there");
    Ok(())
}
