//! The bitmap file of a clean stop, through attach and backup: believed when whole and of this life, else refused by name.
//!
//! The marker and the file lie in the state folder while the volume is away; each case does one thing to them.
//! After each refusal the image equals the volume, and the next backup is incremental again: nothing has to be mended.
//! needs: root, loop, fuse, ext4
//! limit: 300 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{FileSystem, Instance, Mounted, Seed, count, make_file, put, text_of};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

struct Volume {
    instance: Instance,
    backing: PathBuf,
    written: u64,
}

impl Volume {
    /// A volume with ext4 (strong evidence) and its first image.
    fn new(name: &str) -> Result<Self> {
        let instance = Instance::started(name)?;
        let backing = instance.join("backing");
        make_file(&backing, 64 * MIB)?;
        FileSystem::Ext4.make(&backing)?;
        instance.repo_init("main")?;
        instance.volume_add("data", &backing, &[])?;
        instance.backup_is("data", "full", Some("first-backup"))?;
        Ok(Self {
            instance,
            backing,
            written: 0,
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.instance.state_of("data").join(name)
    }

    /// Writes something through the mounted node; afterwards nobody has it open.
    fn change(&mut self) -> Result<()> {
        self.written += 1;
        let mounted = Mounted::new(&self.instance.node("data"), &self.instance.join("mnt"), &[])?;
        put(
            &mounted.join(format!("file-{}", self.written % 8)),
            &self.written.to_string().repeat(5000),
        )?;
        mounted.unmount()
    }

    /// Away, `meanwhile`, back; the next backup must be as said, the image right, and the one after it incremental.
    fn round(
        &mut self,
        what: &str,
        reasons: &[&str],
        meanwhile: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        self.change()?;
        self.instance.detach("data")?;
        meanwhile(self).with_context(|| what.to_owned())?;
        self.instance.attach("data")?;
        let summary = self.instance.backup("data", &[])?;
        let (kind, reason) = (text_of(&summary, "/kind")?, summary.pointer("/reason"));
        let reason = reason.and_then(serde_json::Value::as_str);
        let well = match reason {
            None => kind == "incremental" && reasons.is_empty(),
            Some(word) => kind != "incremental" && reasons.contains(&word),
        };
        ensure!(
            well,
            "{what}: wanted {reasons:?}, got {kind} {reason:?}\n{}",
            self.instance.log_tail()
        );
        self.instance
            .image_equals("data@latest", &self.backing, &[])
            .with_context(|| what.to_owned())?;
        self.change()?;
        self.instance
            .backup_is("data", "incremental", None)
            .with_context(|| format!("after {what}"))?;
        self.instance
            .image_equals("data@latest", &self.backing, &[])
            .with_context(|| format!("after {what}"))
    }
}

fn flip(path: &Path, seed: &mut Seed) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let at = seed.below(file.metadata()?.len());
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ (1 << seed.below(8))], at)?;
    Ok(())
}

fn cut(path: &Path, length: u64) -> Result<()> {
    OpenOptions::new().write(true).open(path)?.set_len(length)?;
    Ok(())
}

/// req A5, X5: a clean stop and start costs nothing.
/// trap TB3: the flag is set only by a clean stop.
#[test]
fn clean_detach_and_attach_stays_incremental() -> Result<()> {
    let mut volume = Volume::new("a05clean")?;
    for round in 0..3 {
        volume.round(&format!("clean round {round}"), &[], |_| Ok(()))?;
    }
    Ok(())
}

/// req A5: missing, empty, cut, flipped: refused by name.
/// trap TB4: damage of any kind is seen.
/// trap TB6: after an invalid file the next is made without a hand's help.
#[test]
fn a_damaged_bitmap_file_is_refused() -> Result<()> {
    let mut volume = Volume::new("a05damage")?;
    let mut seed = Seed::of("a05", 0xa05)?;
    volume.round("bitmap missing", &["bitmap-missing"], |v| {
        Ok(fs::remove_file(v.file("bitmap"))?)
    })?;
    volume.round("bitmap empty", &["bitmap-damaged"], |v| {
        cut(&v.file("bitmap"), 0)
    })?;
    volume.round("marker missing", &["bitmap-missing"], |v| {
        Ok(fs::remove_file(v.file("marker"))?)
    })?;
    volume.round("marker empty", &["bitmap-damaged"], |v| {
        cut(&v.file("marker"), 0)
    })?;
    volume.round("marker flipped", &["bitmap-damaged"], |v| {
        flip(&v.file("marker"), &mut seed)
    })?;
    for draw in 0..count(4, 30) {
        volume.round(&format!("cut {draw}"), &["bitmap-damaged"], |v| {
            let path = v.file("bitmap");
            cut(&path, seed.below(fs::metadata(&path)?.len()))
        })?;
    }
    for draw in 0..count(6, 100) {
        volume.round(&format!("flip {draw}"), &["bitmap-damaged"], |v| {
            flip(&v.file("bitmap"), &mut seed)
        })?;
    }
    Ok(())
}

/// req A5: a file of another life, or of another volume, is none of ours.
/// trap TB8: an older file put back is not believed.
#[test]
fn a_bitmap_file_of_another_life_is_refused() -> Result<()> {
    let mut volume = Volume::new("a05other")?;
    let kept = volume.instance.join("kept");
    fs::create_dir(&kept)?;
    volume.round("keep", &[], |v| {
        fs::copy(v.file("bitmap"), kept.join("bitmap"))?;
        fs::copy(v.file("marker"), kept.join("marker"))?;
        Ok(())
    })?;
    volume.round("older file put back", &["bitmap-stale"], |v| {
        fs::copy(kept.join("bitmap"), v.file("bitmap"))?;
        Ok(())
    })?;
    // Both witnesses rolled back: only what is on the volume can tell.
    volume.round("older file and marker put back", &["foreign-write"], |v| {
        fs::copy(kept.join("bitmap"), v.file("bitmap"))?;
        fs::copy(kept.join("marker"), v.file("marker"))?;
        Ok(())
    })?;
    let other = volume.instance.join("other-backing");
    make_file(&other, 64 * MIB)?;
    FileSystem::Ext4.make(&other)?;
    volume.instance.volume_add("other", &other, &[])?;
    volume.instance.detach("other")?;
    volume.round("another volume's file", &["bitmap-other-volume"], |v| {
        fs::copy(
            v.instance.state_of("other").join("bitmap"),
            v.file("bitmap"),
        )?;
        Ok(())
    })
}

/// req A5: the size changed while the volume was away.
/// trap TD1: grown by less than a block, and by much.
#[test]
fn another_size_is_not_incremental() -> Result<()> {
    let mut volume = Volume::new("a05size")?;
    for bytes in [64 * MIB + 4096, 80 * MIB] {
        volume.round(
            &format!("grown to {bytes}"),
            &["resized", "bitmap-other-size"],
            |v| cut(&v.backing, bytes),
        )?;
    }
    Ok(())
}

/// req A5: the block size was changed in the volume's file while it was away.
#[test]
fn another_block_size_is_not_incremental() -> Result<()> {
    let mut volume = Volume::new("a05block")?;
    volume.round(
        "block size 16 KiB",
        &["block-size-changed", "bitmap-other-size"],
        |v| {
            let path = v.instance.join("volumes.d/data.toml");
            let text = fs::read_to_string(&path)?;
            let kept: Vec<&str> = text
                .lines()
                .filter(|l| !l.starts_with("block_size"))
                .collect();
            put(
                &path,
                &format!("{}\nblock_size = \"16 KiB\"\n", kept.join("\n")),
            )?;
            v.instance.reload()
        },
    )
}
