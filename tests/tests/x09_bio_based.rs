//! Mode watch: a device without requests (zram): its writes are seen once, when they are submitted.
//! needs: root, bpf, ext4, fio, zram
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    Figures, FileSystem, Fio, Frozen, Instance, Mounted, NodeHolder, Seed, Tracked, Truth,
    ZramDevice, count, figure, no_doubt, pass, shell, write_block,
};
use blktide_volume::VolumeError;
use blktide_volume::error::Refusal;
use blktide_watch::Target;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const FINE: (u32, u32) = (4096, 4096);

/// req X9: generations end only while nobody writes: the file system frozen, or the device idle. Nothing is missed.
#[test]
fn a_device_without_requests() -> Result<()> {
    let instance = Instance::new("x09bio")?;
    let disk = ZramDevice::new(128 * MIB)?;
    FileSystem::Ext4.make(disk.path())?;
    let mounted = Mounted::new(disk.path(), &instance.join("mnt"), &[])?;
    ensure!(Target::of(disk.path())?.bio_based, "it has requests");
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    tracked.believe()?;
    let truth = Truth::of(disk.path(), (0, 128 * MIB), instance.root());
    let frozen = Frozen::new(mounted.dir())?;
    let mut union = tracked.drain()?;
    let before = truth.copy("before")?;
    drop(frozen);
    let job = [
        "rw=randwrite",
        "bs=4k",
        "size=48m",
        "direct=1",
        "ioengine=io_uring",
        "iodepth=16",
        "time_based",
        "runtime=100",
    ];
    let load = Fio::new("load", &mounted.join("load"), &job).start()?;
    let mut seed = Seed::of("x09 bio", 0xb10)?;
    let rounds = count(60, 600);
    for _ in 0..rounds {
        pass(Duration::from_micros(seed.below(40_000)));
        let frozen = Frozen::new(mounted.dir())?;
        union.extend(tracked.drain()?);
        drop(frozen);
    }
    load.signal("INT")?;
    load.finish()?;
    mounted.unmount()?;
    FileSystem::Ext4.check(disk.path())?;
    let after = truth.copy("after")?;
    union.extend(tracked.drain()?);
    let mut total = Figures::of(&truth.changed(&before, &after, FINE.0)?, &union);
    total.well("frozen for each end")?;
    for (what, script) in [
        (
            "buffered",
            "dd if=/dev/urandom of=$D bs=1M seek=8 count=24 conv=notrunc status=none",
        ),
        (
            "direct",
            "dd if=/dev/urandom of=$D bs=12k seek=700 count=300 oflag=direct conv=notrunc status=none",
        ),
        ("discard", "blkdiscard -o 16M -l 4M $D"),
        ("zeroes", "blkdiscard -z -o 24M -l 4M $D"),
        ("mkfs", "mkfs.ext4 -q -F $D"),
    ] {
        let script = format!("D={}; {script}; sync $D", disk.path().display());
        let figures = truth.judge(&tracked, || shell(&script))?;
        figures.well(what)?;
        total.add(&figures);
    }
    no_doubt(&tracked)?;
    figure(&format!(
        "zram, {rounds} generations each ended in a freeze, and raw writes: changed {}, marked {}, missed {}",
        total.changed,
        total.marked,
        total.missed.len()
    ));
    Ok(())
}

/// req X9, X5: in the hands of a program that has the node open there is no moment at which nothing is under way: no generation
/// ends, and it is said. Once it is gone all that was written is known.
#[test]
fn without_requests_and_held_open() -> Result<()> {
    let instance = Instance::new("x09held")?;
    let disk = ZramDevice::new(32 * MIB)?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    tracked.believe()?;
    tracked.drain()?;
    let holder = NodeHolder::of(disk.path(), "<>")?;
    write_block(disk.path(), 9 * 4096, &[9; 4096])?;
    let error = tracked.begin(None).err().context("begun all the same")?;
    let unwatchable = matches!(
        error.downcast_ref(),
        Some(VolumeError::Refused {
            kind: Refusal::Unwatchable,
            ..
        })
    );
    ensure!(unwatchable, "{error:#}");
    drop(holder);
    ensure!(tracked.drain()?.contains(&9), "what it wrote was lost");
    no_doubt(&tracked)
}
