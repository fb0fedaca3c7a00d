//! Each image is the volume at one instant, while a writer goes on writing; what that costs the writer.
//! needs: root, loop, fuse
//! limit: 600 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::buffer::AlignedBuffer;
use blktide_tests::{Instance, Recorder, count, fill_file, number_at, text_of};
use blktide_types::id::GenerationName;
use blktide_types::io::{BlockOutcome, BlockRead as _, SnapshotRead as _};
use blktide_types::unit::BlockCount;
use blktide_volume::message::{Absent, Overflow, SaveArea, SnapshotFigures, SnapshotRequest, Text};
use blktide_volume::{SnapshotReader, VolumeClient};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 48 * MIB;
const UNITS: u64 = VOLUME / 4096;

fn client(instance: &Instance) -> Result<VolumeClient> {
    let limit = Duration::from_secs(20);
    Ok(VolumeClient::connect(&instance.join("run"), "data", limit)?)
}

fn request(base: Option<GenerationName>) -> SnapshotRequest {
    SnapshotRequest {
        base: base.map(Text),
        absent: if base.is_some() {
            Absent::None
        } else {
            Absent::All
        },
        save_area: SaveArea::Memory {
            limit_bytes: VOLUME,
        },
        overflow: Overflow::GiveUp,
        wait_limit_ms: 5000,
        hold_deadline_ms: 500,
    }
}

/// Reads what the snapshot wants into `image`; says how many bytes that were.
fn patch(snapshot: &SnapshotReader, image: &File) -> Result<u64> {
    let geometry = snapshot.geometry();
    let block = geometry.block_size().bytes_usize();
    let mut buffer = AlignedBuffer::new(16 * block);
    let mut read = 0;
    for piece in snapshot
        .wanted()
        .runs()
        .flat_map(|r| r.pieces(BlockCount(16)))
    {
        let len = usize::try_from(piece.count().0)? * block;
        let part = buffer.get_mut(..len).context("a piece fits")?;
        let outcomes = snapshot.read_blocks(piece, part)?;
        ensure!(outcomes.iter().all(|o| *o == BlockOutcome::Data));
        let (offset, bytes) = geometry.bytes_of(piece);
        let part = part.get(..usize::try_from(bytes)?).context("whole")?;
        image.write_all_at(part, offset)?;
        read += bytes;
    }
    snapshot.finish()?;
    Ok(read)
}

fn take(instance: &Instance, base: Option<GenerationName>, image: &File) -> Result<Taken> {
    let snapshot = client(instance)?.snapshot(&request(base), None)?;
    let opened = snapshot.begun().generation.0;
    if base.is_some() && !snapshot.begun().base_resolved {
        bail!("the generation of the image before is not known any more");
    }
    let held_ns = snapshot.begun().held_ns;
    let bytes = patch(&snapshot, image)?;
    Ok(Taken {
        opened,
        bytes,
        held_ns,
        figures: snapshot.end()?,
    })
}

struct Taken {
    opened: GenerationName,
    bytes: u64,
    held_ns: u64,
    figures: SnapshotFigures,
}

/// req B1, A8, A9, B3: 200 increments, each laid over the one before; each sum is an exact prefix of what the writer recorded, so
/// no block was missed and none is newer than its instant.
/// trap TE1: an in-flight write is wholly before or wholly after. trap TE9: units smaller than a block keep the rest.
#[test]
fn every_increment_is_a_prefix_of_the_record() -> Result<()> {
    let instance = Instance::started("b01")?;
    let backing = instance.join("backing");
    fill_file(&backing, VOLUME)?;
    let before = instance.join("before");
    std::fs::copy(&backing, &before)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    let path = instance.join("image");
    let image = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)?;
    image.set_len(VOLUME)?;
    let writer = Recorder::start(&node, 0..UNITS, 0xb01, Duration::from_micros(200))?;
    let mut last = take(&instance, None, &image)?;
    client(&instance)?.trust(last.opened)?;
    let (mut at, mut cow, mut peak, mut longest, mut held) = (Vec::new(), 0, 0, 0, 0);
    for round in 0..count(200, 2000) {
        let from = writer.written();
        last = take(&instance, Some(last.opened), &image)?;
        let figures = last.figures;
        ensure!(
            figures.preserved_bytes <= last.bytes,
            "round {round}: {} bytes preserved for an increment of {}",
            figures.preserved_bytes,
            last.bytes
        );
        (cow, peak) = (
            cow + figures.preserved_bytes,
            peak.max(figures.save_area_peak_bytes),
        );
        (longest, held) = (longest.max(figures.longest_wait_ns), held.max(last.held_ns));
        let copy = instance.join(format!("image-{round}"));
        if round % 10 == 0 {
            std::fs::copy(&path, &copy)?;
            at.push((copy, from, writer.written()));
        }
    }
    let from = writer.written();
    take(&instance, Some(last.opened), &image)?;
    at.push((path, from, writer.written()));
    let record = writer.finish()?;
    for (copy, from, to) in &at {
        check(&record, copy, &before, (*from, *to))?;
    }
    println!(
        "figure: 200 increments under {} writes; {cow} bytes preserved, save area at most {peak} bytes; longest hold {held} ns, \
         longest wait at a gate or for a snapshot {longest} ns, longest write {:.4} s",
        record.count(),
        record.longest_wait.as_secs_f64()
    );
    instance.detach("data")
}

fn check(
    record: &blktide_tests::Record,
    image: &Path,
    before: &Path,
    (from, to): (u64, u64),
) -> Result<()> {
    let prefix = record.prefix_of(image, Some(&before.to_owned()), UNITS)?;
    // One write may have been in flight on either side.
    ensure!(
        from <= prefix + 1 && prefix <= to + 1,
        "{}: holds write {prefix}, but was taken between writes {from} and {to}",
        image.display()
    );
    Ok(())
}

/// req B1, A8: the same through backups and restores, by the programs.
#[test]
fn every_image_is_a_prefix_of_the_record() -> Result<()> {
    let instance = Instance::started("b01")?;
    let backing = instance.join("backing");
    fill_file(&backing, VOLUME)?;
    let before = instance.join("before");
    std::fs::copy(&backing, &before)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    let writer = Recorder::start(&node, 0..UNITS, 0xb02, Duration::from_millis(1))?;
    let mut at = Vec::new();
    let (mut read, mut waited) = (0, 0.0_f64);
    for round in 0..count(200, 1000) {
        let from = writer.written();
        let kind = if round == 0 { "full" } else { "incremental" };
        let reason = (round == 0).then_some("first-backup");
        let summary = instance.backup_is("data", kind, reason)?;
        at.push((
            text_of(&summary, "/image")?.to_owned(),
            from,
            writer.written(),
        ));
        if round > 0 {
            read += number_at(&summary, "/read_bytes")?;
        }
        let wait = summary.pointer("/longest_wait_seconds");
        waited = waited.max(wait.and_then(serde_json::Value::as_f64).unwrap_or(0.0));
    }
    let record = writer.finish()?;
    let restored = instance.join("restored");
    for (image, from, to) in &at {
        instance.restore(image, &restored, &[])?;
        check(&record, &restored, &before, (*from, *to)).with_context(|| image.clone())?;
        std::fs::remove_file(&restored)?;
    }
    println!(
        "figure: {} images under {} writes, {read} bytes read by the incrementals; longest wait {waited:.4} s, longest write {:.4} s",
        at.len(),
        record.count(),
        record.longest_wait.as_secs_f64()
    );
    instance.detach("data")
}
