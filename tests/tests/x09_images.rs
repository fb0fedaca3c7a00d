//! An image of a watched file system under load is the frozen device, byte for byte; and how long the freezes are.
//!
//! The oracle: a plain copy of the file under the loop device, made by dd while the file system stands still.
//! needs: root, loop, ext4, xfs, bpf, fio, python3, git, space
//! limit: 420 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Instance, LoopDevice, Mounted, Running, Tool, Tracked, copy_sparse, count, figure,
    make_file, same_bytes, shell,
};
use blktide_types::io::SnapshotRead;
use blktide_watch::{FreezeLimits, OverBudget};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const BYTES: u64 = 512 << 20;

/// A mounted file system with something in it, watched. Dropped in this order.
struct Place {
    tracked: Tracked,
    mounted: Mounted,
    _device: LoopDevice,
    backing: PathBuf,
    instance: Instance,
}

impl Place {
    fn new(system: FileSystem, block: u32) -> Result<Self> {
        let instance = Instance::new("x09i")?;
        let backing = instance.join("backing");
        make_file(&backing, BYTES)?;
        let device = LoopDevice::new(&backing, 512)?;
        system.make(device.path())?;
        let mounted = Mounted::new(device.path(), &instance.join("mnt"), &[])?;
        let fill = mounted.join("fill");
        shell(&format!(
            "dd if=/dev/urandom of={} bs=1M count=100 status=none; sync -f {}",
            fill.display(),
            fill.display()
        ))?;
        let tracked = Tracked::attached(&instance, "data", device.path(), (block, 4096))?;
        Ok(Self {
            tracked,
            mounted,
            _device: device,
            backing,
            instance,
        })
    }
}

/// What writes meanwhile: `bash -c` of these lines, in a folder of the file system, until it is ended.
const LOADS: [(&str, &str); 4] = [
    (
        "fio, direct",
        "exec fio --thread --name=w --directory=. --rw=randwrite --bs=4k --size=64m --direct=1 --ioengine=libaio --iodepth=8 --rate=10m --time_based --runtime=300 --minimal",
    ),
    (
        "fio, buffered",
        "exec fio --thread --name=w --directory=. --rw=randwrite --bs=4k --size=64m --rate=10m --time_based --runtime=300 --minimal",
    ),
    (
        "SQLite",
        r#"exec python3 -c "
import sqlite3, random
c = sqlite3.connect('db'); c.execute('create table t(a integer primary key, b)')
while True:
    c.execute('insert or replace into t values(?, randomblob(700))', (random.randrange(20000),)); c.commit()""#,
    ),
    (
        "git clone",
        "git init -q a; for i in $(seq 300); do echo $i$RANDOM > a/$i; done; git -C a add .; \
         git -C a -c user.name=a -c user.email=a@b commit -qm 1; \
         while true; do rm -rf b; git clone -q a b; done",
    ),
];

fn start(load: &str, folder: &Path) -> Result<Running> {
    fs::create_dir_all(folder)?;
    Tool::new("bash")
        .args(["-c", load])
        .folder(folder)
        .env("HOME", "/nonexistent")
        .limit(400)
        .start()
}

fn end(load: &Running) -> Result<()> {
    ensure!(load.runs(), "the load ended before the image");
    Ok(())
}

/// The file system of an image: without fault as it is (ext4), after one mount (XFS leaves a record when it is frozen).
fn check(system: FileSystem, image: &Path, scratch: &Path) -> Result<()> {
    match system {
        FileSystem::Ext4 => system.check(image),
        FileSystem::Xfs | FileSystem::Btrfs => system.replay_and_check(image, scratch),
    }
}

fn under_load(system: FileSystem) -> Result<()> {
    let place = Place::new(system, 65536)?;
    let (image, truth) = (place.instance.join("image"), place.instance.join("truth"));
    let limits = FreezeLimits {
        // The copy of the truth is made in it.
        limit: Duration::from_secs(60),
        over: OverBudget::Longer,
        ..FreezeLimits::default()
    };
    let mut base = None;
    for (number, (name, lines)) in LOADS.iter().enumerate() {
        let load = start(lines, &place.mounted.join(format!("load{number}")))?;
        let taken = place.tracked.image(base, limits, &image, &mut || {
            drop(fs::remove_file(&truth));
            copy_sparse(&place.backing, &truth, true)
        });
        let taken = taken.with_context(|| (*name).to_owned())?;
        end(&load)?;
        drop(load);
        same_bytes(&image, &truth, BYTES)
            .with_context(|| format!("{name}: not the frozen device"))?;
        base = Some(taken.opened());
        ensure!(taken.trust(), "{name}: the instant's generation is known");
        let (read, changed) = (taken.last_blocks().count().0, taken.changed());
        figure(&format!(
            "{} under {name}: equal to the frozen device; {read} blocks in the freeze, {:?} changed",
            system.name(),
            changed.map(|c| c.count().0)
        ));
        // On the truth, which is equal: the next image is written over this one.
        check(system, &truth, &place.instance.join("scratch"))
            .with_context(|| format!("{name}: the image's file system"))?;
    }
    drop(place.tracked);
    place.mounted.unmount()
}

/// req X9, A8: images of a busy ext4 are the frozen device, and need no journal replay. Each but the first is incremental: it
/// is written over the one before it.
#[test]
fn ext4_under_load() -> Result<()> {
    under_load(FileSystem::Ext4)
}

/// req X9, A8: the same of XFS, clean after one mount.
#[test]
fn xfs_under_load() -> Result<()> {
    under_load(FileSystem::Xfs)
}

/// The distribution of freeze times under random writes of several rates. No time is judged here; that images come is.
#[test]
fn freezes_under_random_writes() -> Result<()> {
    for system in [FileSystem::Ext4, FileSystem::Xfs] {
        let place = Place::new(system, 65536)?;
        let image = place.instance.join("image");
        let limits = FreezeLimits {
            over: OverBudget::Longer,
            rounds: 12,
            ..FreezeLimits::default()
        };
        for rate in [1, 10, 50, 100] {
            let lines = format!(
                "exec fio --thread --name=w --directory=. --rw=randwrite --bs=4k --size=100m --direct=1 --ioengine=libaio --iodepth=8 \
                 --rate={rate}m --time_based --runtime=300 --minimal"
            );
            let load = start(&lines, &place.mounted.join("load"))?;
            let mut times = Vec::new();
            let mut base = None;
            for _ in 0..count(5, 40) {
                let taken = place.tracked.image(base, limits, &image, &mut || Ok(()))?;
                ensure!(taken.trust(), "the instant's generation is known");
                base = Some(taken.opened());
                times.push(taken.longest_freeze());
            }
            end(&load)?;
            drop(load);
            times.sort();
            let at = |i: usize| times.get(i).map_or(0.0, |t| t.as_secs_f64() * 1000.0);
            figure(&format!(
                "{}, {rate} MB/s of 4 KiB random writes, {} images: writers stood still {:.0} ms in the middle, {:.0} ms at most",
                system.name(),
                times.len(),
                at(times.len() / 2),
                at(times.len() - 1)
            ));
        }
        drop(place.tracked);
        place.mounted.unmount()?;
    }
    Ok(())
}
