//! Mode watch: every process of ours may die at any moment; the kernel goes on marking, and no mark is lost.
//! needs: root, loop, bpf, ext4, fio
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    Figures, FileSystem, Fio, Instance, LoopDevice, Mounted, Seed, Tracked, Truth, count, figure,
    make_file, pass, wait_until, write_block,
};
use blktide_volume::VolumeOptions;
use blktide_watch::{InUse, Watched, attach, detach};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const FINE: (u32, u32) = (4096, 4096);
const PATIENCE: Duration = Duration::from_secs(20);
/// What the process that is killed does, on which volume.
const WORK: &str = "BLKTIDE_X09_WORK";

/// Not a test by itself: the process that is killed. It works until then.
#[test]
fn victim() -> Result<()> {
    let Ok(text) = std::env::var(WORK) else {
        return Ok(());
    };
    let (work, text) = text.split_once(' ').context("work, options")?;
    let options: VolumeOptions = serde_json::from_str(text)?;
    // Whoever is killed has begun.
    println!("begun");
    loop {
        if work == "drains" {
            for _ in 0..20 {
                Watched::open(&options, PATIENCE)?.drain();
            }
            let mut watched = Watched::open(&options, PATIENCE)?;
            for _ in 0..2000 {
                watched.drain();
            }
        } else {
            detach(&options, InUse::Refuse, PATIENCE)?;
            attach(&options, PATIENCE, &|_| ())?;
        }
    }
}

/// Starts the victim and kills it after `time`.
fn kill_one(
    instance: &Instance,
    work: &str,
    options: &VolumeOptions,
    time: Duration,
) -> Result<()> {
    let log = instance.join("victim.log");
    let out = std::fs::File::create(&log)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "victim", "--nocapture"])
        .env(WORK, format!("{work} {}", serde_json::to_string(options)?))
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let begun = wait_until("the victim has begun", PATIENCE, || {
        Ok(said().contains("begun"))
    });
    pass(time);
    let ended = child.try_wait()?;
    child.kill()?;
    child.wait()?;
    begun?;
    ensure!(ended.is_none(), "it ended by itself: {}", said());
    Ok(())
}

/// req X9: SIGKILL of the control side at random, under a writer: what changed since the first generation is known.
/// req X3: nothing of it reaches the writer.
#[test]
fn killed_between_swap_and_drain() -> Result<()> {
    let instance = Instance::new("x09killed")?;
    let file = instance.join("disk");
    make_file(&file, 128 * MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    FileSystem::Ext4.make(disk.path())?;
    let mounted = Mounted::new(disk.path(), &instance.join("mnt"), &[])?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    tracked.believe()?;
    let first = tracked.status()?.generation.0;
    let truth = Truth::of(&file, (0, 128 * MIB), instance.root());
    let before = truth.copy("before")?;
    let job = [
        "rw=randwrite",
        "bs=4k",
        "size=64m",
        "direct=1",
        "ioengine=io_uring",
        "iodepth=16",
        "time_based",
        "runtime=1000",
        "rate_iops=4000",
    ];
    let load = Fio::new("load", &mounted.join("load"), &job)
        .limit(1000)
        .start()?;
    let mut seed = Seed::of("x09 killed", 0x916)?;
    let kills = count(50, 200);
    for _ in 0..kills {
        let time = Duration::from_micros(seed.below(60_000));
        kill_one(&instance, "drains", tracked.options(), time)?;
    }
    load.signal("INT")?;
    let ended = load.finish()?;
    ensure!(
        !ended.stderr.contains("error"),
        "the writer met an error: {}",
        ended.stderr
    );
    mounted.unmount()?;
    let after = truth.copy("after")?;
    let ahead = tracked.begin(Some(first))?;
    let distrust = ahead.distrust();
    ensure!(ahead.resolved() && distrust.is_none(), "{distrust:?}");
    let known: BTreeSet<u64> = ahead.first().blocks().map(|b| b.0).collect();
    drop(ahead);
    let figures = Figures::of(&truth.changed(&before, &after, FINE.0)?, &known);
    figures.well("killed")?;
    FileSystem::Ext4.check(disk.path())?;
    figure(&format!(
        "{kills} times the control side was killed under a writer: changed {}, known to have changed {}, missed {}",
        figures.changed,
        figures.marked,
        figures.missed.len()
    ));
    Ok(())
}

/// Writes a few blocks, and notes them.
fn write_some(device: &Path, seed: &mut Seed, written: &mut BTreeSet<u64>) -> Result<()> {
    for _ in 0..3 {
        let block = seed.below(16 * MIB / 4096);
        let mut content = [0; 4096];
        seed.fill(&mut content);
        write_block(device, block * 4096, &content)?;
        written.insert(block);
    }
    Ok(())
}

/// req X9: killed while it attaches or detaches: what was written is known, or nothing is believed.
/// req A5: a bitmap that was stored and taken over is not believed twice.
/// trap TC10: a detach and an attach that were cut off.
#[test]
fn killed_in_attach_and_detach() -> Result<()> {
    let instance = Instance::new("x09cut")?;
    let file = instance.join("disk");
    make_file(&file, 16 * MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    let mut tracked = Tracked::new(&instance, "data", disk.path(), FINE);
    // Nobody else writes it, while it is detached as well: a stored bitmap is believed.
    tracked.options_mut().exclusive = true;
    tracked.attach()?;
    tracked.believe()?;
    let mut first = tracked.status()?.generation.0;
    let mut seed = Seed::of("x09 cut", 0xc07)?;
    let (mut written, mut reasons) = (BTreeSet::new(), BTreeSet::new());
    let (mut believed, kills) = (0, count(50, 200));
    for _ in 0..kills {
        write_some(disk.path(), &mut seed, &mut written)?;
        let time = Duration::from_micros(seed.below(400_000));
        kill_one(&instance, "stops", tracked.options(), time)?;
        tracked.attach()?;
        let ahead = tracked.begin(Some(first))?;
        if let Some(distrust) = ahead.distrust() {
            reasons.insert(format!("{}: {}", distrust.reason, distrust.detail));
            drop(ahead);
            tracked.believe()?;
            first = tracked.status()?.generation.0;
            written.clear();
        } else {
            ensure!(ahead.resolved(), "the first generation is forgotten");
            let known: BTreeSet<u64> = ahead.first().blocks().map(|b| b.0).collect();
            let missed: Vec<&u64> = written.difference(&known).collect();
            ensure!(missed.is_empty(), "lost: {missed:?}");
            believed += 1;
        }
    }
    ensure!(
        believed > kills / 4,
        "only {believed} of {kills} were believed: {reasons:?}"
    );
    figure(&format!(
        "{kills} times killed in attach or detach: {believed} times believed and whole, else distrusted: {reasons:?}"
    ));
    Ok(())
}
