//! Where an image stands is written in the image: clones, rolled-back repositories and lost images end right.
//! needs: root, loop, fuse
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{Instance, Tool, fill_file, put, text_of, write_block};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

fn volume(name: &str) -> Result<(Instance, PathBuf)> {
    let instance = Instance::started(name)?;
    let backing = instance.join("backing");
    fill_file(&backing, 16 * MIB)?;
    instance.repo_init("main")?;
    instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    Ok((instance, backing))
}

fn change(instance: &Instance, number: u8) -> Result<()> {
    write_block(
        &instance.node("data"),
        u64::from(number) * 65536,
        &[number; 4096],
    )
}

/// The next backup is right, and incremental or for one of `reasons`.
fn right(
    instance: &Instance,
    backing: &Path,
    what: &str,
    reasons: &[&str],
) -> Result<Option<String>> {
    let summary = instance.backup("data", &[])?;
    let reason = summary
        .pointer("/reason")
        .and_then(Value::as_str)
        .map(str::to_owned);
    let incremental = text_of(&summary, "/kind")? == "incremental";
    ensure!(
        incremental == reason.is_none() && reason.as_deref().is_none_or(|r| reasons.contains(&r)),
        "{what}: {summary}"
    );
    instance
        .image_equals("data@latest", backing, &[])
        .with_context(|| what.to_owned())?;
    Ok(reason)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    Tool::new("cp").arg("-a").arg(from).arg(to).run()?.ok()?;
    Ok(())
}

/// req X5: a repository rolled back to an older image: the changes since that one, or everything.
#[test]
fn a_repository_rolled_back() -> Result<()> {
    let (instance, backing) = volume("p02rolled")?;
    let (folder, kept) = (instance.repository("main"), instance.join("kept"));
    copy(&folder, &kept)?;
    for number in 1..4 {
        change(&instance, number)?;
        instance.backup_is("data", "incremental", None)?;
    }
    fs::remove_dir_all(&folder)?;
    copy(&kept, &folder)?;
    change(&instance, 5)?;
    right(&instance, &backing, "rolled back", &["bitmap-stale"])?;
    change(&instance, 6)?;
    right(&instance, &backing, "after it", &[])?;
    Ok(())
}

fn newest_folder(repository: &Path) -> Result<PathBuf> {
    let volumes = fs::read_dir(repository.join("volumes"))?
        .next()
        .context("a volume")??;
    let mut numbers: Vec<(u64, PathBuf)> = fs::read_dir(volumes.path())?
        .filter_map(|e| {
            let path = e.ok()?.path();
            Some((path.file_name()?.to_str()?.parse().ok()?, path))
        })
        .filter(|(_, path)| path.join("end").exists())
        .collect();
    numbers.sort();
    Ok(numbers.pop().context("an image")?.1)
}

/// req X5: the newest image is gone, or cannot be read: never an incremental on top of nothing.
/// trap TG7: a damaged object is not built upon.
#[test]
fn the_newest_image_gone() -> Result<()> {
    let (instance, backing) = volume("p02gone")?;
    change(&instance, 1)?;
    instance.backup_is("data", "incremental", None)?;
    let newest = newest_folder(&instance.repository("main"))?;
    fs::remove_file(newest.join("manifest"))?;
    change(&instance, 2)?;
    let reason = right(&instance, &backing, "manifest gone", &["base-image-gone"])?;
    ensure!(
        reason.is_some(),
        "nothing was said of the manifest that is gone"
    );
    change(&instance, 3)?;
    right(&instance, &backing, "after it", &[])?;
    let newest = newest_folder(&instance.repository("main"))?;
    fs::remove_dir_all(&newest)?;
    change(&instance, 4)?;
    right(
        &instance,
        &backing,
        "folder gone",
        &["base-image-gone", "bitmap-stale"],
    )?;
    Ok(())
}

/// req X5: a clone with the same ids backs up into the same repository: both stay right, whoever comes next.
/// trap TC7: two clones with one identity.
#[test]
fn a_clone_of_the_volume() -> Result<()> {
    let (first, backing) = volume("p02clone")?;
    change(&first, 1)?;
    first.backup_is("data", "incremental", None)?;
    first.detach("data")?;
    let second = Instance::new("p02twin")?;
    let twin = second.join("backing");
    copy(&backing, &twin)?;
    fs::remove_dir(second.join("state"))?;
    copy(&first.join("state"), &second.join("state"))?;
    put(
        &second.join("repositories.d/main.toml"),
        &format!("path = \"{}\"\n", first.repository("main").display()),
    )?;
    let text = fs::read_to_string(first.join("volumes.d/data.toml"))?;
    let text = text.replace(&backing.display().to_string(), &twin.display().to_string());
    put(&second.join("volumes.d/data.toml"), &text)?;
    let mut second = second;
    second.start()?;
    first.attach("data")?;
    second.attach("data")?;
    let why = &[
        "clone-detected",
        "bitmap-stale",
        "device-changed",
        "foreign-write-unknown",
        "bitmap-missing",
    ];
    for round in 0..3 {
        change(&first, 10 + round)?;
        right(&first, &backing, &format!("original, round {round}"), why)?;
        change(&second, 100 + round)?;
        right(&second, &twin, &format!("clone, round {round}"), why)?;
    }
    Ok(())
}
