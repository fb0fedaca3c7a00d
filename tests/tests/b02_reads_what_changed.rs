//! An incremental reads and stores what changed and nothing else, counted by the kernel at the backing device.
//! needs: root, loop, fuse, space
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{
    DeviceCounters, Instance, LoopDevice, Seed, Tool, fill_file, number_at, write_block,
};
use std::collections::BTreeSet;
use std::path::Path;

const GIB: u64 = 1 << 30;
const BLOCK: u64 = 65536;

fn stored(folder: &Path) -> Result<u64> {
    let done = Tool::new("du")
        .args(["--summarize", "--bytes"])
        .arg(folder)
        .run()?
        .ok()?;
    Ok(done
        .stdout
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .parse()?)
}

/// req B2, A1: 1 GiB, 1 % of the blocks changed, each once or often: read and stored once.
#[test]
fn one_percent_of_a_gibibyte() -> Result<()> {
    let instance = Instance::started("b02")?;
    let file = instance.join("backing");
    fill_file(&file, GIB)?;
    let device = LoopDevice::new(&file, 512)?;
    let repository = instance.repo_init("main")?;
    let node = instance.volume_add("data", device.path(), &[])?;
    let full = instance.backup_is("data", "full", Some("first-backup"))?;
    let mut seed = Seed::of("b02", 0xb02)?;
    let mut changed = BTreeSet::new();
    while changed.len() < 164 {
        let block = seed.below(GIB / BLOCK);
        let mut page = vec![0; 4096];
        for _again in 0..=seed.below(3) {
            seed.fill(&mut page);
            write_block(&node, block * BLOCK + seed.below(16) * 4096, &page)?;
        }
        changed.insert(block);
    }
    let changed = changed.len() as u64 * BLOCK;
    let (before, stored_before) = (DeviceCounters::of(device.path())?, stored(&repository)?);
    let summary = instance.backup_is("data", "incremental", None)?;
    let read = DeviceCounters::of(device.path())?.since(before).read_bytes;
    let more = stored(&repository)? - stored_before;
    let map = more.saturating_sub(changed);
    println!(
        "figure: 1 GiB, {changed} B in changed blocks: the device was read {read} B, {more} B were stored \
         (fixed and the map: {map} B, {} permille of it)",
        map * 1000 / changed
    );
    ensure!(
        number_at(&summary, "/changed_bytes")? == changed,
        "{summary}"
    );
    ensure!(number_at(&summary, "/read_bytes")? == changed, "{summary}");
    ensure!(number_at(&full, "/read_bytes")? == GIB, "{full}");
    ensure!(
        read >= changed && read <= changed + 65536,
        "{read} read for {changed}"
    );
    ensure!(
        more <= changed + changed / 20 + 65536,
        "{more} stored for {changed}"
    );
    instance.image_equals("data@latest", device.path(), &[])?;
    let before = DeviceCounters::of(device.path())?;
    let nothing = instance.backup_is("data", "incremental", None)?;
    let read = DeviceCounters::of(device.path())?.since(before).read_bytes;
    println!(
        "figure: nothing changed: {read} B read, {:.3} s",
        nothing["seconds"].as_f64().unwrap_or(0.0)
    );
    ensure!(
        number_at(&nothing, "/read_bytes")? == 0 && read <= 65536,
        "{nothing}, {read}"
    );
    instance.detach("data")
}
