//! Mode watch: generations that change under writers; what was written is in one of them, always.
//! needs: root, loop, bpf, ext4, fio
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{
    Figures, FileSystem, Fio, Instance, LoopDevice, Mounted, Recorder, Seed, Stopwatch, Tracked,
    Truth, count, figure, make_file, no_doubt, pass, shell,
};
use std::collections::BTreeSet;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const FINE: (u32, u32) = (4096, 4096);

/// req X9: 1,000 generation changes at drawn moments under racing writers: no block in neither of two generations.
#[test]
fn a_thousand_generations_under_writers() -> Result<()> {
    let instance = Instance::new("x09thousand")?;
    let file = instance.join("disk");
    make_file(&file, 192 * MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    FileSystem::Ext4.make(disk.path())?;
    let mounted = Mounted::new(disk.path(), &instance.join("mnt"), &[])?;
    shell(&format!(
        "fallocate -l 16M {}",
        mounted.join("recorded").display()
    ))?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    let first = tracked.status()?.generation.0;
    tracked.believe()?;
    let truth = Truth::of(&file, (0, 192 * MIB), instance.root());
    let mut union = tracked.drain()?;
    let before = truth.copy("before")?;
    let job = [
        "rw=randwrite",
        "bs=4k",
        "size=64m",
        "direct=1",
        "ioengine=io_uring",
        "iodepth=16",
        "time_based",
        "runtime=100",
    ];
    let load = Fio::new("load", &mounted.join("load"), &job).start()?;
    let recorder = Recorder::start(&mounted.join("recorded"), 0..4096, 9, Duration::ZERO)?;
    let (mut seed, watch) = (Seed::of("x09 generations", 0x909)?, Stopwatch::start());
    let mut watched = tracked.open()?;
    let mut not_empty = 0;
    for _ in 0..1000 {
        pass(Duration::from_micros(seed.below(12_000)));
        let set = watched.drain();
        not_empty += u64::from(!set.is_empty());
        union.extend(set.blocks().map(|b| b.0));
    }
    let seconds = watch.seconds();
    load.signal("INT")?;
    load.finish()?;
    let writes = recorder.finish()?.count();
    mounted.sync()?;
    let after = truth.copy("after")?;
    union.extend(watched.drain().blocks().map(|b| b.0));
    let (known, distrust) = watched.changed_since(&[first]);
    drop(watched);
    let changed = truth.changed(&before, &after, FINE.0)?;
    let figures = Figures::of(&changed, &union);
    figures.well("1,000 generations")?;
    ensure!(
        known == [Some(union.len() as u64 * 4096)] && distrust.is_none(),
        "the tracker knows {known:?} bytes ({distrust:?}), drained were {} blocks",
        union.len()
    );
    ensure!(
        not_empty > 500,
        "the writers wrote in {not_empty} of 1000 generations"
    );
    no_doubt(&tracked)?;
    figure(&format!(
        "1000 generations in {seconds:.1} s, {not_empty} of them written in, {writes} recorded writes beside fio: \
         changed {}, marked {}, missed {}",
        figures.changed,
        figures.marked,
        figures.missed.len()
    ));
    Ok(())
}

/// req X9: generations as fast as they can be ended, with 32 writes in flight: nothing missed, no mark given up.
#[test]
fn generations_as_fast_as_they_go() -> Result<()> {
    let swaps = count(1_000_000, 10_000_000);
    let instance = Instance::new("x09hammer")?;
    let file = instance.join("disk");
    make_file(&file, 32 * MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    tracked.believe()?;
    let truth = Truth::of(&file, (0, 32 * MIB), instance.root());
    let mut union: BTreeSet<u64> = tracked.drain()?;
    let before = truth.copy("before")?;
    let job = [
        "rw=randwrite",
        "bs=4k",
        "direct=1",
        "ioengine=io_uring",
        "iodepth=32",
        "time_based",
        "runtime=100000",
        "norandommap=1",
        "size=32m",
    ];
    let load = Fio::new("load", disk.path(), &job).limit(100_000).start()?;
    let events = tracked.status()?.requests;
    let (mut watched, watch) = (tracked.open()?, Stopwatch::start());
    let mut blocks = 0;
    for _ in 0..swaps {
        let set = watched.drain();
        if !set.is_empty() {
            blocks += set.count().0;
            union.extend(set.blocks().map(|b| b.0));
        }
    }
    let seconds = watch.seconds();
    load.signal("INT")?;
    load.finish()?;
    let after = truth.copy("after")?;
    union.extend(watched.drain().blocks().map(|b| b.0));
    let events = watched.status().requests - events;
    drop(watched);
    let figures = Figures::of(&truth.changed(&before, &after, FINE.0)?, &union);
    figures.well("as fast as they go")?;
    ensure!(blocks > 1000, "only {blocks} blocks were written meanwhile");
    no_doubt(&tracked)?;
    figure(&format!(
        "{swaps} generations in {seconds:.1} s with 32 writes in flight, {events} marks, {blocks} blocks drained: \
         changed {}, marked {}, missed {}",
        figures.changed,
        figures.marked,
        figures.missed.len()
    ));
    Ok(())
}
