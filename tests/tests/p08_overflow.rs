//! A backup may delay a writer by a bounded time, or die: a small save area, a reader that hangs.
//! needs: root, loop, fuse, fio
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::buffer::AlignedBuffer;
use blktide_tests::{
    Fio, Instance, Recorder, Stopwatch, blocks_that_differ, copy_sparse, fill_file, pass,
};
use blktide_types::io::{BlockRead as _, RevokeCause, SnapshotRead as _, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use blktide_volume::message::{Absent, Overflow, SaveArea, SnapshotRequest, Text};
use blktide_volume::{SnapshotReader, VolumeClient};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 192 * MIB;
const SAVE: u64 = 16 * MIB;
const WAIT_LIMIT: Duration = Duration::from_secs(2);
/// What a busy machine may add to a bound.
const SLACK: Duration = Duration::from_millis(1500);

struct Set {
    instance: Instance,
    backing: PathBuf,
    node: PathBuf,
}

fn set() -> Result<Set> {
    let instance = Instance::started("p08")?;
    let backing = instance.join("backing");
    fill_file(&backing, VOLUME)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    Ok(Set {
        instance,
        backing,
        node,
    })
}

fn client(instance: &Instance) -> Result<VolumeClient> {
    let limit = Duration::from_secs(20);
    Ok(VolumeClient::connect(&instance.join("run"), "data", limit)?)
}

fn request(save_area: SaveArea, overflow: Overflow) -> SnapshotRequest {
    SnapshotRequest {
        overflow,
        wait_limit_ms: u64::try_from(WAIT_LIMIT.as_millis()).unwrap_or(2000),
        ..SnapshotRequest::everything(save_area)
    }
}

fn in_file(instance: &Instance) -> SaveArea {
    SaveArea::Path {
        folder: instance.join("save"),
        limit_bytes: SAVE,
        min_free_bytes: 0,
    }
}

fn read_one(snapshot: &SnapshotReader, block: u64) -> Result<(), SourceError> {
    let size = snapshot.geometry().block_size().bytes_usize();
    let mut buffer = AlignedBuffer::new(size);
    let range = BlockRange::covering(
        snapshot.geometry().block_size(),
        snapshot.geometry().block_start(BlockIndex(block)),
        1,
    );
    snapshot
        .read_blocks(range.unwrap_or(BlockRange::first()), &mut buffer)
        .map(|_| ())
}

/// The cause for which a snapshot that nobody reads ends under a heavy writer; how long its longest write took, and the longest status.
fn under_load(set: &Set, asked: &SnapshotRequest) -> Result<(RevokeCause, Duration, Duration)> {
    let writer = Recorder::start(&set.node, 0..1024, 8, Duration::ZERO)?;
    let fio = Fio::new(
        "heavy",
        &set.node,
        &[
            "rw=randwrite",
            "bs=64k",
            "ioengine=libaio",
            "iodepth=16",
            "direct=1",
            "offset=4m",
            "time_based",
            "runtime=6",
        ],
    )
    .limit(60)
    .start()?;
    let snapshot = client(&set.instance)?.snapshot(asked, None)?;
    let mut status = Duration::ZERO;
    let watch = Stopwatch::start();
    let cause = loop {
        let one = Stopwatch::start();
        client(&set.instance)?.status()?;
        status = status.max(one.elapsed());
        // One block in a while: progress, but far too little.
        match read_one(&snapshot, watch.elapsed().as_secs() * 2) {
            Err(SourceError::Revoked(cause)) => break cause,
            Ok(()) | Err(SourceError::Io(_)) => {}
        }
        ensure!(watch.elapsed() < Duration::from_secs(30), "it never ended");
        pass(Duration::from_millis(20));
    };
    ensure!(
        snapshot.finish().is_err(),
        "a revoked snapshot must not be committed"
    );
    drop(snapshot);
    let run = Fio::judge(fio.finish()?)?;
    let record = writer.finish()?;
    let longest = record
        .longest_wait
        .max(Duration::from_secs_f64(run.longest_write_seconds));
    Ok((cause, longest, status))
}

/// req D2: P8, policy give-up, in a file and in memory: the backup ends, no write waits.
/// trap TE5: the save area runs full.
#[test]
fn give_up() -> Result<()> {
    let set = set()?;
    let areas = [
        in_file(&set.instance),
        SaveArea::Memory { limit_bytes: SAVE },
    ];
    for area in areas {
        let asked = request(area, Overflow::GiveUp);
        let (cause, longest, status) = under_load(&set, &asked)?;
        println!("figure: give-up: {cause}; longest write {longest:?}, longest status {status:?}");
        ensure!(cause == RevokeCause::SaveAreaFull, "{cause}");
        ensure!(longest < SLACK, "a write took {longest:?}");
        ensure!(status < Duration::from_secs(1), "status took {status:?}");
    }
    set.instance.detach("data")
}

/// req D2: P8, policy wait: writers wait, none longer than `wait_limit`; then the backup ends.
#[test]
fn wait() -> Result<()> {
    let set = set()?;
    let asked = request(in_file(&set.instance), Overflow::Wait);
    let (cause, longest, status) = under_load(&set, &asked)?;
    println!("figure: wait: {cause}; longest write {longest:?}, longest status {status:?}");
    let known = [
        RevokeCause::WaitLimit,
        RevokeCause::QueueFull,
        RevokeCause::ReaderStalled,
    ];
    ensure!(known.contains(&cause), "{cause}");
    ensure!(longest < WAIT_LIMIT + SLACK, "a write took {longest:?}");
    ensure!(status < Duration::from_secs(1), "status took {status:?}");
    set.instance.detach("data")
}

/// req D2, D4: a reader that hangs for ever: its lease ends, writers go on, and the next snapshot has every change.
#[test]
fn a_reader_that_hangs() -> Result<()> {
    let set = set()?;
    let before = set.instance.join("before");
    let first =
        client(&set.instance)?.snapshot(&request(in_file(&set.instance), Overflow::Wait), None)?;
    let base = first.begun().generation.0;
    // As if an image of everything had been committed: what follows may lean on this instant.
    client(&set.instance)?.trust(base)?;
    copy_sparse(&set.backing, &before, true)?;
    let writer = Recorder::start(&set.node, 0..VOLUME / 4096, 9, Duration::ZERO)?;
    let watch = Stopwatch::start();
    let mut longest = Duration::ZERO;
    // It holds its snapshot and never reads.
    while watch.elapsed() < WAIT_LIMIT * 3 {
        let one = Stopwatch::start();
        client(&set.instance)?.status()?;
        longest = longest.max(one.elapsed());
        pass(Duration::from_millis(50));
    }
    let Err(SourceError::Revoked(cause)) = read_one(&first, 3) else {
        bail!("a snapshot whose reader hangs must be revoked");
    };
    drop(first);
    let record = writer.finish()?;
    ensure!(record.count() > 100, "the writer came to a standstill");
    let waited = record.longest_wait;
    ensure!(waited < WAIT_LIMIT + SLACK, "a write took {waited:?}");
    ensure!(longest < Duration::from_secs(1), "status took {longest:?}");
    println!(
        "figure: hanging reader: {cause}; longest write {waited:?}, longest status {longest:?}"
    );
    nothing_missed(&set, &before, base)
}

/// The next increment from `base` on holds every block that differs from `before`.
fn nothing_missed(set: &Set, before: &Path, base: blktide_types::id::GenerationName) -> Result<()> {
    let asked = SnapshotRequest {
        base: Some(Text(base)),
        absent: Absent::None,
        ..request(in_file(&set.instance), Overflow::GiveUp)
    };
    let snapshot = client(&set.instance)?.snapshot(&asked, None)?;
    let after = set.instance.join("after");
    copy_sparse(&set.backing, &after, true)?;
    let claimed = snapshot.changed().context("the base is known")?;
    let block = snapshot.geometry().block_size().bytes_usize();
    let differing = blocks_that_differ(before, &after, block)?;
    let missed: Vec<u64> = differing
        .iter()
        .copied()
        .filter(|b| !claimed.contains(BlockIndex(*b)))
        .collect();
    ensure!(missed.is_empty(), "missed: {missed:?}");
    println!(
        "figure: {} blocks differ, {} claimed, none missed",
        differing.len(),
        claimed.count().0
    );
    snapshot.end()?;
    set.instance.detach("data")
}

/// trap TE6: a save area on the tracked volume itself is refused.
#[test]
fn a_save_area_on_the_volume_is_refused() -> Result<()> {
    let set = set()?;
    blktide_tests::FileSystem::Ext4.make(&set.node)?;
    let mounted = blktide_tests::Mounted::new(&set.node, &set.instance.join("mnt"), &[])?;
    let area = SaveArea::Path {
        folder: mounted.dir().to_owned(),
        limit_bytes: SAVE,
        min_free_bytes: 0,
    };
    let refused = client(&set.instance)?.snapshot(&request(area, Overflow::GiveUp), None);
    let Err(error) = refused else {
        bail!("it was taken");
    };
    ensure!(
        error.to_string().contains("on the volume itself"),
        "{error}"
    );
    mounted.unmount()?;
    set.instance.detach("data")
}
