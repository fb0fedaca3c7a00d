//! ext4 and XFS, blocks of 4 KiB and 64 KiB, a device of odd size: full and incremental under a mounted file system.
//!
//! The oracle of an instant: the file system is frozen, backed up, and its backing file copied before the thaw.
//! needs: root, loop, fuse, ext4, xfs, space
//! limit: 300 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Instance, Mounted, Seed, Tool, copy_sparse, make_file, number_at, put, same_trees,
    text_of,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Not a multiple of any block size, nor of a page.
const ODD_BYTES: u64 = (320 << 20) + 5 * 4096 + 7 * 512;

/// Thaws when dropped: a frozen file system hangs whoever touches it.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(dir: &'a Path) -> Result<Self> {
        Tool::new("fsfreeze").arg("--freeze").arg(dir).run()?.ok()?;
        Ok(Self(dir))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        drop(Tool::new("fsfreeze").arg("--unfreeze").arg(self.0).run());
    }
}

struct Case {
    instance: Instance,
    system: FileSystem,
    backing: PathBuf,
}

impl Case {
    /// An image of the frozen volume, proven: bytes, and the file system by its own checker.
    fn image_of(&self, mounted: &Mounted, kind: &str, reason: Option<&str>) -> Result<Value> {
        let truth = self.instance.join("truth");
        let frozen = Frozen::new(mounted.dir())?;
        let summary = self.instance.backup_is("data", kind, reason)?;
        copy_sparse(&self.backing, &truth, false)?;
        drop(frozen);
        self.instance.image_equals("data@latest", &truth, &[])?;
        fs::remove_file(&truth)?;
        let restored = self.instance.join("restored");
        self.instance.restore("data@latest", &restored, &[])?;
        self.system
            .replay_and_check(&restored, &self.instance.join("check"))?;
        fs::remove_file(restored)?;
        Ok(summary)
    }
}

fn fill(dir: &Path, seed: &mut Seed, files: u64) -> Result<()> {
    for number in 0..files {
        let folder = dir.join(format!("d{}", number % 7));
        fs::create_dir_all(&folder)?;
        let mut bytes = vec![0; usize::try_from(seed.below(150_000))?];
        seed.fill(&mut bytes);
        let text: String = bytes.iter().map(|b| char::from(b'a' + b % 26)).collect();
        put(&folder.join(format!("f{number}")), &text)?;
    }
    Ok(())
}

fn run(system: FileSystem, block_size: &str) -> Result<()> {
    let instance = Instance::started("x01")?;
    let backing = instance.join("backing");
    make_file(&backing, ODD_BYTES)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &["--block-size", block_size])?;
    let bytes = instance.size_bytes("data")?;
    ensure!(
        bytes <= ODD_BYTES && ODD_BYTES - bytes < 4096,
        "{bytes} of {ODD_BYTES}"
    );
    system.make(&node)?;
    let mounted = Mounted::new(&node, &instance.join("mnt"), &["-o", "discard"])?;
    let mut seed = Seed::stream(ODD_BYTES);
    fill(mounted.dir(), &mut seed, 120)?;
    let case = Case {
        instance,
        system,
        backing,
    };
    case.image_of(&mounted, "full", Some("first-backup"))?;
    // Changed, made, removed (with discards), trimmed.
    fill(&mounted.join("d1"), &mut seed, 10)?;
    fs::remove_dir_all(mounted.join("d2"))?;
    Tool::new("fstrim").arg(mounted.dir()).run()?.ok()?;
    let summary = case.image_of(&mounted, "incremental", None)?;
    let read = number_at(&summary, "/read_bytes")?;
    ensure!(text_of(&summary, "/consistency")? == "instant", "{summary}");
    println!(
        "figure: {} with {block_size}: {read} of {bytes} B read for the incremental",
        system.name()
    );
    mounted.unmount()?;
    let done = case.instance.backup_is("data", "incremental", None)?;
    case.instance
        .image_equals("data@latest", &case.backing, &[])?;
    ensure!(number_at(&done, "/read_bytes")? < bytes / 2, "{done}");
    let restored = case.instance.join("restored");
    case.instance.restore("data@latest", &restored, &[])?;
    system.check(&restored)?;
    let old = Mounted::new(&node, &case.instance.join("mnt"), &["-o", "ro"])?;
    let options: &[&str] = &[
        "-o",
        if system == FileSystem::Xfs {
            "loop,ro,nouuid"
        } else {
            "loop,ro"
        },
    ];
    let new = Mounted::new(&restored, &case.instance.join("mnt-restored"), options)?;
    same_trees(old.dir(), new.dir())?;
    new.unmount()?;
    old.unmount()?;
    case.instance.detach("data")
}

/// req X1, A1: ext4, and xfs, with blocks of 64 KiB, on a device of odd size.
/// trap TA7: the short last block counts.
/// trap TA2: trimmed ranges are dirty, and read as what they are.
#[test]
fn blocks_of_64_kib() -> Result<()> {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        run(system, "64 KiB").with_context(|| system.name())?;
    }
    Ok(())
}

/// req X1: the same with blocks of 4 KiB.
/// trap TA8: writes at the edges of a grain leave the neighbours alone.
#[test]
fn blocks_of_4_kib() -> Result<()> {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        run(system, "4 KiB").with_context(|| system.name())?;
    }
    Ok(())
}
