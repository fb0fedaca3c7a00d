//! Damage in a repository is found by `verify --read-data`, with neither configuration nor daemon; never a panic.
//! needs: root, loop, fuse
//! limit: 180 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{Finished, Instance, Seed, Tool, binary, count, make_file, write_block};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A repository with a full and an incremental image of a small volume; its objects.
fn small(instance: &Instance) -> Result<(PathBuf, Vec<PathBuf>)> {
    let backing = instance.join("backing");
    make_file(&backing, 1 << 20)?;
    let repository = instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &["--block-size", "4 KiB"])?;
    for (round, kind) in [(1_u8, "full"), (2, "incremental")] {
        write_block(&node, u64::from(round) * 8192, &vec![round; 4096])?;
        let reason = (round == 1).then_some("first-backup");
        instance.backup_is("data", kind, reason)?;
    }
    let mut objects = Vec::new();
    files(&repository, &mut objects)?;
    objects.sort();
    ensure!(objects.len() >= 5, "{objects:?}");
    Ok((repository, objects))
}

fn files(folder: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, out)?;
        } else {
            out.push(path);
        }
    }
    Ok(())
}

/// `verify --read-data` as on a rescue system: no configuration, no daemon, no state.
fn verify(repository: &Path) -> Result<Finished> {
    let done = Tool::new(binary("blktidectl")?)
        .args(["verify", "--read-data", "--json", "-r"])
        .arg(repository)
        .env("BLKTIDE_CONFIG", "/nonexistent/blktide.toml")
        .env("BLKTIDE_RUNTIME_DIR", "/nonexistent/run")
        .run()?;
    ensure!(
        !done.stderr.contains("panicked") && done.signal.is_none() && done.code != Some(101),
        "{done:?}"
    );
    Ok(done)
}

fn found(repository: &Path, what: &str) -> Result<()> {
    let done = verify(repository)?;
    let told =
        matches!(done.code, Some(5)) || (done.code != Some(0) && done.stdout.contains("\"error\""));
    ensure!(told, "{what} was not found: {done:?}");
    Ok(())
}

/// req X6: a flipped bit anywhere is found; put right, all is well again.
#[test]
fn flipped_bits_are_found() -> Result<()> {
    let instance = Instance::started("x06flip")?;
    let (repository, objects) = small(&instance)?;
    verify(&repository)?.ok()?;
    let mut seed = Seed::of("x06", 0x606)?;
    for draw in 0..count(20, 400) {
        let path = objects
            .get(usize::try_from(draw)? % objects.len())
            .context("objects")?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let at = seed.below(file.metadata()?.len());
        let bit = seed.below(8);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ (1 << bit)], at)?;
        found(
            &repository,
            &format!("{}: byte {at}, bit {bit}", path.display()),
        )?;
        file.write_all_at(&byte, at)?;
    }
    verify(&repository)?.ok()?;
    Ok(())
}

/// req X6: objects cut short, exchanged with another, or gone.
#[test]
fn cut_and_exchanged_objects_are_found() -> Result<()> {
    let instance = Instance::started("x06cut")?;
    let (repository, objects) = small(&instance)?;
    let mut seed = Seed::of("x06cut", 0x607)?;
    for path in &objects {
        let whole = fs::read(path)?;
        let file = OpenOptions::new().write(true).open(path)?;
        for length in [0, seed.below(whole.len() as u64), whole.len() as u64 - 1] {
            file.set_len(length)?;
            found(&repository, &format!("{} cut to {length}", path.display()))?;
            file.write_all_at(&whole, 0)?;
        }
    }
    // Of one kind: first image's object in the second's place, both of full size and checksum.
    let manifests: Vec<&PathBuf> = objects.iter().filter(|p| p.ends_with("manifest")).collect();
    if let [first, second] = manifests.as_slice() {
        let kept = fs::read(second)?;
        fs::copy(first, second)?;
        found(&repository, "a manifest in another's place")?;
        let file = OpenOptions::new().write(true).truncate(true).open(second)?;
        file.write_all_at(&kept, 0)?;
    }
    let packs: Vec<&PathBuf> = objects
        .iter()
        .filter(|p| p.components().any(|c| c.as_os_str() == "packs"))
        .collect();
    ensure!(packs.len() >= 2 && manifests.len() == 2, "{objects:?}");
    let kept = fs::read(packs[0])?;
    fs::copy(packs[1], packs[0])?;
    found(&repository, "a pack in another's place")?;
    let file = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(packs[0])?;
    file.write_all_at(&kept, 0)?;
    moved(packs[0], &instance.join("pack"))?;
    found(&repository, "a pack gone")?;
    moved(&instance.join("pack"), packs[0])?;
    verify(&repository)?.ok()?;
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test damages; nothing to be durable"
)]
fn moved(from: &Path, to: &Path) -> Result<()> {
    Ok(fs::rename(from, to)?)
}
