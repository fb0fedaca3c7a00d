//! Two volumes, two repositories, different schedules: each next incremental is right, from one tracker.
//! needs: root, loop, fuse
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{Instance, Seed, count, fill_file, text_of, write_block};
use std::collections::BTreeSet;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// req X5: any order of backups into two repositories, with a detach and attach in between.
/// trap TG3: repositories have independent baselines.
#[test]
fn two_volumes_and_two_repositories() -> Result<()> {
    let instance = Instance::started("x05")?;
    let mut backings: Vec<PathBuf> = Vec::new();
    instance.repo_init("main")?;
    instance.repo_init("second")?;
    for name in ["one", "two"] {
        let backing = instance.join(format!("backing-{name}"));
        fill_file(&backing, 12 * MIB)?;
        instance.volume_add(name, &backing, &[])?;
        backings.push(backing);
    }
    let mut seed = Seed::of("x05", 0x505)?;
    let mut known = BTreeSet::new();
    let mut incrementals = 0;
    for step in 0..count(24, 400) {
        for (name, _) in ["one", "two"].iter().zip(&backings) {
            for _write in 0..seed.below(6) {
                let mut page = vec![0; 4096];
                seed.fill(&mut page);
                write_block(
                    &instance.node(name),
                    seed.below(12 * MIB / 4096) * 4096,
                    &page,
                )?;
            }
        }
        let which = usize::try_from(seed.below(2))?;
        let volume = ["one", "two"][which];
        // The second repository is visited seldom: it lags behind by several generations.
        let repository = if seed.below(4) == 0 { "second" } else { "main" };
        let summary = instance.backup(volume, &["-r", repository])?;
        let first = known.insert((volume, repository));
        let kind = text_of(&summary, "/kind")?;
        ensure!((kind == "full") == first, "step {step}: {summary}");
        incrementals += u64::from(!first);
        let backing = backings.get(which).context("two volumes")?;
        instance
            .image_equals(&format!("{volume}@latest"), backing, &["-r", repository])
            .with_context(|| format!("step {step}: {volume} in {repository}"))?;
    }
    println!(
        "figure: {incrementals} incrementals of 2 volumes in 2 repositories, each equal to its volume"
    );
    Ok(())
}
