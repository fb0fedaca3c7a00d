//! Mode watch: moments that are not as quiet as an image needs them, and what becomes of the image and of the file system.
//!
//! The oracles: a plain copy of the bytes below the device, made while all stands still; `fsfreeze`, which says what is frozen.
//! needs: root, loop, bpf, ext4, fio, blkio
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_format::manifest::Consistency;
use blktide_sys::buffer::AlignedBuffer;
use blktide_tests::{
    Cgroup, FileSystem, Fio, Frozen, Instance, LoopDevice, Mounted, NodeHolder, PlainImage, Tool,
    Tracked, copy_sparse, figure, hide_completions, hide_foreign, in_flight, kill, make_file,
    open_direct, same_bytes, shell, wait_until, write_block,
};
use blktide_types::io::{SnapshotRead, SourceError};
use blktide_types::unit::BlockIndex;
use blktide_volume::VolumeOptions;
use blktide_watch::{Ahead, FreezeLimits, Next, OverBudget};
use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const FINE: (u32, u32) = (4096, 4096);
const SOON: Duration = Duration::from_secs(20);
/// What the process that is killed works on.
const WORK: &str = "BLKTIDE_X09_GIVES_UP";

/// A loop device of its own; dropped in this order.
struct Disk {
    node: LoopDevice,
    file: PathBuf,
    instance: Instance,
}

impl Disk {
    fn new(name: &str, bytes: u64) -> Result<Self> {
        let instance = Instance::new(name)?;
        let file = instance.join("disk");
        make_file(&file, bytes)?;
        Ok(Self {
            node: LoopDevice::partitioned(&file)?,
            file,
            instance,
        })
    }

    fn with_ext4(name: &str) -> Result<(Mounted, Self)> {
        let this = Self::new(name, 64 * MIB)?;
        FileSystem::Ext4.make(this.node.path())?;
        let mounted = Mounted::new(this.node.path(), &this.instance.join("mnt"), &[])?;
        Ok((mounted, this))
    }

    /// A plain copy of it as it is now, in place of an earlier one.
    fn copy_to(&self, to: &Path) -> Result<()> {
        drop(fs::remove_file(to));
        copy_sparse(&self.file, to, true)
    }

    fn tracked(&self) -> Result<Tracked> {
        Tracked::attached(&self.instance, "data", self.node.path(), FINE)
    }
}

/// An image of `tracked` into `to`; how quiet it was.
fn consistency(tracked: &Tracked, to: &Path) -> Result<Consistency> {
    let image = tracked.image(None, FreezeLimits::default(), to, &mut || Ok(()))?;
    Ok(image.consistency())
}

/// req X5: an image says how quiet its instant was: whether nobody could write, or somebody could and did not.
#[test]
fn somebody_who_has_the_node_open() -> Result<()> {
    let disk = Disk::new("x09node", 16 * MIB)?;
    let (tracked, image) = (disk.tracked()?, disk.instance.join("image"));
    let reader = NodeHolder::of(disk.node.path(), "<")?;
    ensure!(consistency(&tracked, &image)? == Consistency::Unmounted);
    drop(reader);
    // Under whatever name.
    let other = disk.instance.join("other-node");
    shell(&format!(
        "cp --archive $(realpath {}) {}",
        disk.node.path().display(),
        other.display()
    ))?;
    for node in [disk.node.path(), &other] {
        let writer = NodeHolder::of(node, "<>")?;
        ensure!(consistency(&tracked, &image)? == Consistency::Instant);
        drop(writer);
    }
    let over = LoopDevice::partitioned(disk.node.path())?;
    ensure!(consistency(&tracked, &image)? == Consistency::Instant);
    drop(over);
    ensure!(consistency(&tracked, &image)? == Consistency::Unmounted);
    same_bytes(&image, &disk.file, 16 * MIB)
}

/// req X5: he comes after it was decided that nobody is there: no image, and the next one covers what he wrote.
#[test]
fn somebody_who_comes_later() -> Result<()> {
    let disk = Disk::new("x09later", 16 * MIB)?;
    let (tracked, image) = (disk.tracked()?, disk.instance.join("image"));
    let full = tracked.image(None, FreezeLimits::default(), &image, &mut || Ok(()))?;
    ensure!(full.trust(), "its generation is known");
    let base = full.opened();
    drop(full);
    let ahead = tracked.begin(Some(base))?;
    ensure!(ahead.resolved(), "{:?}", ahead.distrust());
    let Next::Copy(_) = ahead.next()? else {
        bail!("an instant without a last round before it");
    };
    let writer = NodeHolder::of(disk.node.path(), "<>")?;
    write_block(disk.node.path(), 7 * 4096, &[7; 4096])?;
    match ahead.next() {
        Err(SourceError::Io(error)) => {
            ensure!(error.to_string().contains("taken into use"), "{error}");
        }
        other => bail!("{other:?}"),
    }
    drop((ahead, writer));
    let next = tracked.image(Some(base), FreezeLimits::default(), &image, &mut || Ok(()))?;
    let changed = next.changed().context("it is incremental")?;
    ensure!(changed.contains(BlockIndex(7)), "what he wrote was lost");
    same_bytes(&image, &disk.file, 16 * MIB)
}

/// req X5: a disk with a mounted partition and one that is written past every file system: freezing the one keeps nobody from the
/// other. The image is of no one moment, and says so; what is frozen is right.
#[test]
fn a_partition_that_no_freeze_reaches() -> Result<()> {
    let below = Disk::new("x09beside", 96 * MIB)?;
    // The throttle is below the disk: its requests wait there, and are under way.
    let disk = LoopDevice::partitioned(below.node.path())?;
    let first = disk.add_partition(1, 2048, 64 * MIB / 512)?;
    let second = disk.add_partition(2, 2048 + 64 * MIB / 512, 16 * MIB / 512)?;
    FileSystem::Ext4.make(&first)?;
    let mounted = Mounted::new(&first, &below.instance.join("mnt"), &[])?;
    let group = Cgroup::throttled(&below.instance, below.node.path(), 400)?;
    let tracked = Tracked::attached(&below.instance, "data", disk.path(), FINE)?;
    let load = group.write(&second, "--iodepth=32")?;
    wait_until("writes wait", SOON, || Ok(in_flight(disk.path())? > 16))?;
    let limits = FreezeLimits {
        over: OverBudget::Longer,
        rounds: 2,
        ..FreezeLimits::default()
    };
    let (image, truth) = (below.instance.join("image"), below.instance.join("truth"));
    // Not believed before: a full image, which wants evidence from a quiet moment, and has none.
    let taken = tracked.image(None, limits, &image, &mut || below.copy_to(&truth))?;
    ensure!(load.runs(), "the load ended before the image");
    ensure!(
        taken.consistency() == Consistency::None,
        "{:?} with writes under way",
        taken.consistency()
    );
    load.signal("INT")?;
    load.finish()?;
    let of_first = |path: &Path, name: &str| -> Result<PathBuf> {
        let to = below.instance.join(name);
        shell(&format!(
            "dd if={} of={} bs=1M skip=1 count=64 conv=sparse status=none; truncate -s 64M {}",
            path.display(),
            to.display(),
            to.display()
        ))?;
        Ok(to)
    };
    let (copied, true_one) = (of_first(&image, "a")?, of_first(&truth, "b")?);
    same_bytes(&copied, &true_one, 64 * MIB).context("the frozen partition")?;
    FileSystem::Ext4.check(&copied)?;
    drop((taken, tracked));
    mounted.unmount()
}

/// Where the two numbers of a pair lie.
const PAIR: [u64; 2] = [0, 1000 * 4096];

/// Writes a number into one block, then into another, then the next: of one moment is what has not more in the second than in the first.
fn write_pairs(device: &Path, written: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let node = open_direct(device, true)?;
    let mut content = AlignedBuffer::new(4096);
    while !over.load(Ordering::Relaxed) {
        let number = written.fetch_add(1, Ordering::Relaxed);
        content[..8].copy_from_slice(&number.to_le_bytes());
        for at in PAIR {
            node.write_all_at(&content, at)?;
        }
    }
    Ok(())
}

/// The pair in an image of a disk on which the device begins at `start`.
fn pair_in(image: &Path, start: u64) -> Result<[u64; 2]> {
    let file = fs::File::open(image)?;
    let mut pair = [0; 2];
    for (number, at) in pair.iter_mut().zip(PAIR) {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, start + at)?;
        *number = u64::from_le_bytes(bytes);
    }
    Ok(pair)
}

/// req X5: the same by somebody who is nowhere to be seen (this process, which nobody counts among the others): what is written
/// between the last marks and the last block read makes the image one of no one moment.
#[test]
fn what_is_written_in_the_moment_itself() -> Result<()> {
    let below = Disk::new("x09light", 96 * MIB)?;
    let first = below.node.add_partition(1, 2048, 64 * MIB / 512)?;
    let second = below
        .node
        .add_partition(2, 2048 + 64 * MIB / 512, 16 * MIB / 512)?;
    FileSystem::Ext4.make(&first)?;
    let mounted = Mounted::new(&first, &below.instance.join("mnt"), &[])?;
    let tracked = below.tracked()?;
    let image = below.instance.join("image");
    let taken = tracked.image(None, FreezeLimits::default(), &image, &mut || Ok(()))?;
    ensure!(taken.consistency() == Consistency::Frozen);
    drop(taken);
    let (over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let limits = FreezeLimits {
        over: OverBudget::Longer,
        rounds: 3,
        ..FreezeLimits::default()
    };
    let torn = std::thread::scope(|scope| -> Result<u64> {
        let writer = scope.spawn(|| write_pairs(&second, &written, &over));
        let taken = wait_until("it writes", SOON, || {
            Ok(written.load(Ordering::Relaxed) > 10)
        })
        .and_then(|()| {
            let mut torn = 0;
            for _ in 0..10 {
                let taken = match tracked.image(None, limits, &image, &mut || Ok(())) {
                    Ok(taken) => taken,
                    // Completions went unseen (this kernel does that), of a volume that was never quiet enough to know how much was queued:
                    // then there is no image at all.
                    Err(_) if distrust_of(&tracked)?.contains("[sectors-unseen") => {
                        torn += 1;
                        continue;
                    }
                    Err(error) => return Err(error.context(distrust_of(&tracked)?)),
                };
                let [one, other] = pair_in(&image, 65 * MIB)?;
                if taken.consistency() == Consistency::None {
                    torn += 1;
                } else {
                    ensure!(
                        one == other || one == other + 1,
                        "{one} and {other} in an image that calls itself {:?}",
                        taken.consistency()
                    );
                }
            }
            Ok(torn)
        });
        over.store(true, Ordering::Relaxed);
        match writer.join() {
            Ok(wrote) => wrote.and(taken),
            Err(_) => bail!("the writer died"),
        }
    })?;
    ensure!(torn > 0, "not one moment in ten was seen to be none");
    figure(&format!(
        "{torn} of 10 images beside a writer that nobody sees are of no one moment, and say so"
    ));
    let taken = tracked.image(None, FreezeLimits::default(), &image, &mut || Ok(()))?;
    ensure!(taken.consistency() == Consistency::Frozen);
    drop((taken, tracked));
    mounted.unmount()
}

/// req X5, X9: a program that only holds the node of a busy file system costs the images their word, not their increments.
#[test]
fn an_idle_opener_of_a_busy_file_system() -> Result<()> {
    let (mounted, disk) = Disk::with_ext4("x09idle")?;
    let (tracked, image) = (disk.tracked()?, disk.instance.join("image"));
    let truth = disk.instance.join("truth");
    let options = [
        "rw=randwrite",
        "bs=4k",
        "size=16m",
        "direct=1",
        "ioengine=libaio",
        "iodepth=4",
        "rate_iops=20000",
        "time_based",
        "runtime=300",
    ];
    let load = Fio::new("w", &mounted.join("load"), &options).start()?;
    let holder = NodeHolder::of(disk.node.path(), "<>")?;
    let limits = FreezeLimits {
        over: OverBudget::Longer,
        ..FreezeLimits::default()
    };
    let mut base = None;
    for _ in 0..4 {
        let taken = tracked.image(base, limits, &image, &mut || disk.copy_to(&truth))?;
        ensure!(
            taken.consistency() == Consistency::Instant,
            "{:?}",
            taken.consistency()
        );
        ensure!(taken.trust(), "its generation is known");
        base = Some(taken.opened());
        same_bytes(&image, &truth, 64 * MIB)?;
    }
    Fio::stop(load)?;
    drop((holder, tracked));
    mounted.unmount()
}

/// req X5: a file system that was mounted when the others had their guards already, and one that cannot be frozen.
#[test]
fn a_file_system_that_no_guard_holds() -> Result<()> {
    let below = Disk::new("x09more", 96 * MIB)?;
    let first = below.node.add_partition(1, 2048, 32 * MIB / 512)?;
    let second = below
        .node
        .add_partition(2, 2048 + 32 * MIB / 512, 32 * MIB / 512)?;
    for part in [&first, &second] {
        FileSystem::Ext4.make(part)?;
    }
    let mounted = Mounted::new(&first, &below.instance.join("first"), &[])?;
    let (tracked, image) = (below.tracked()?, below.instance.join("image"));
    let ahead = tracked.begin(None)?;
    let guard = last_round(&ahead)?;
    let later = Mounted::new(&second, &below.instance.join("second"), &[])?;
    match ahead.next() {
        Err(SourceError::Io(error)) => {
            ensure!(error.to_string().contains("mounted once more"), "{error}");
        }
        other => bail!("{other:?}, with the guard {guard}"),
    }
    drop(ahead);
    ensure!(consistency(&tracked, &image)? == Consistency::Frozen);
    make_file(&later.join("file"), MIB)?;
    let lone = below.instance.join("lone");
    make_file(&lone, 0)?;
    let bound = Mounted::new(&later.join("file"), &lone, &["--bind"])?;
    later.unmount()?;
    // Only by a file that is bound somewhere: it could go on while the first is frozen.
    ensure!(consistency(&tracked, &image)? == Consistency::Instant);
    bound.unmount()?;
    // Not mounted, and held by somebody who could write.
    let holder = NodeHolder::of(&second, "<>")?;
    ensure!(consistency(&tracked, &image)? == Consistency::Instant);
    drop(holder);
    ensure!(consistency(&tracked, &image)? == Consistency::Frozen);
    drop(tracked);
    mounted.unmount()
}

/// Why nothing is believed.
fn distrust_of(tracked: &Tracked) -> Result<String> {
    let distrust = tracked.status()?.distrust;
    Ok(distrust.map_or("nothing is distrusted".to_owned(), |d| {
        format!("{}: {}", d.reason, d.detail)
    }))
}

/// trap TA15, protocol P14: of what comes to a partition by way of its disk the kernel has no count. A completion of it that was not
/// seen ends the belief.
#[test]
fn a_completion_by_way_of_the_disk() -> Result<()> {
    let below = Disk::new("x09foreign", 64 * MIB)?;
    // The throttle is below the disk: its requests wait there, and are under way.
    let disk = LoopDevice::partitioned(below.node.path())?;
    let part = disk.add_partition(1, 2048, 32 * MIB / 512)?;
    let beside = disk.add_partition(2, 2048 + 32 * MIB / 512, 16 * MIB / 512)?;
    FileSystem::Ext4.make(&part)?;
    let mounted = Mounted::new(&part, &below.instance.join("mnt"), &[])?;
    let tracked = Tracked::attached(&below.instance, "data", &part, FINE)?;
    let (image, truth) = (below.instance.join("image"), below.instance.join("truth"));
    // Beside a partition that is never quiet.
    let group = Cgroup::throttled(&below.instance, below.node.path(), 400)?;
    let load = group.write(&beside, "--iodepth=32")?;
    wait_until("writes wait", SOON, || Ok(in_flight(disk.path())? > 16))?;
    // A block that the file system has no use for.
    let end = MIB + 32 * MIB;
    let mut tries = 0;
    let second = loop {
        let full = tracked.image(None, FreezeLimits::default(), &image, &mut || Ok(()))?;
        ensure!(full.trust(), "its generation is known");
        let base = full.opened();
        drop(full);
        write_block(disk.path(), end - 4096, &[3; 4096])?;
        let taken = tracked.image(Some(base), FreezeLimits::default(), &image, &mut || {
            below.copy_to(&truth)
        });
        match taken {
            Ok(taken) => break taken,
            // This kernel may have hidden it by itself.
            Err(_) if tries < 3 && distrust_of(&tracked)?.contains("[runs-skipped") => tries += 1,
            Err(error) => return Err(error.context(distrust_of(&tracked)?)),
        }
    };
    ensure!(second.consistency() == Consistency::Frozen);
    shell(&format!(
        "cmp --ignore-initial=0:{MIB} --bytes={} {} {}",
        32 * MIB,
        image.display(),
        truth.display()
    ))?;
    load.signal("INT")?;
    load.finish()?;
    let base = second.opened();
    drop(second);
    write_block(disk.path(), end - 8192, &[5; 4096])?;
    hide_foreign(&tracked, 8)?;
    let error = tracked
        .image(Some(base), FreezeLimits::default(), &image, &mut || Ok(()))
        .err()
        .context("an image in spite of a completion that nobody saw")?;
    let distrust = distrust_of(&tracked)?;
    ensure!(distrust.contains("[runs-skipped"), "{error:#}: {distrust}");
    tracked.believe()?;
    drop(tracked);
    mounted.unmount()
}

/// req X9, protocol P14: completions that the programs were not run for. A write that was queued before a swap may have landed after
/// the copy that was made in between: every copy since the last image's instant is made again, and the image is the frozen device.
#[test]
fn completions_that_nobody_saw() -> Result<()> {
    let (mounted, disk) = Disk::with_ext4("x09unseen")?;
    let file = mounted.join("file");
    make_file(&file, 16 * MIB)?;
    let write = |from: u64| {
        shell(&format!(
            "dd if=/dev/urandom of={} bs=4k seek={from} count=3 oflag=direct conv=notrunc status=none",
            file.display()
        ))?;
        mounted.sync()
    };
    write(0)?;
    let (tracked, path) = (disk.tracked()?, disk.instance.join("image"));
    let truth = disk.instance.join("truth");
    let full = tracked.image(None, FreezeLimits::default(), &path, &mut || Ok(()))?;
    ensure!(full.trust(), "its generation is known");
    let base = full.opened();
    drop(full);
    // Drained by somebody before this backup began: a backup that was given up.
    write(100)?;
    let early = tracked.drain()?;
    let ahead = tracked.begin(Some(base))?;
    ensure!(ahead.resolved(), "{:?}", ahead.distrust());
    let image = PlainImage::of(&ahead, &path)?;
    image.take_now(&ahead, ahead.first())?;
    write(200)?;
    let Next::Copy(second) = ahead.next()? else {
        bail!("an instant without a round before it");
    };
    let late: BTreeSet<u64> = second.blocks().map(|b| b.0).collect();
    image.take_now(&ahead, &second)?;
    ensure!(!early.is_empty() && !late.is_empty() && early != late);
    // Both kinds of copies are older than what is on the device now, and nobody was told.
    for block in early.iter().chain(&late) {
        image.spoil(*block)?;
    }
    hide_completions(&tracked, 8)?;
    let (mut rounds, mut again) = (0, BTreeSet::new());
    let instant = loop {
        match ahead.next_with(&mut || drop(disk.copy_to(&truth)))? {
            Next::Copy(blocks) => {
                again.extend(blocks.blocks().map(|b| b.0));
                image.take_now(&ahead, &blocks)?;
            }
            Next::Instant(instant) => break instant,
        }
        rounds += 1;
        ensure!(rounds < 20, "it does not end");
    };
    image.take_last(&instant)?;
    ensure!(instant.consistency() == Consistency::Frozen);
    same_bytes(&path, &truth, 64 * MIB).context("stale copies were kept")?;
    FileSystem::Ext4.check(&path)?;
    figure(&format!(
        "{} copies could be stale; {rounds} more rounds made {} again",
        early.union(&late).count(),
        again.len()
    ));
    // Every write was marked: the bitmap is believed, and what is hidden once is no reason at the next backup.
    ensure!(instant.trust(), "its generation is known");
    let base = instant.opened();
    drop((instant, ahead));
    write(300)?;
    let next = tracked.image(Some(base), FreezeLimits::default(), &path, &mut || {
        disk.copy_to(&truth)
    })?;
    ensure!(next.changed().is_some(), "it is incremental");
    same_bytes(&path, &truth, 64 * MIB)?;
    drop((next, tracked));
    mounted.unmount()
}

/// Not a test by itself: a control side whose guard does not answer when it is to freeze, and which is killed then.
#[test]
fn who_gives_up() -> Result<()> {
    let Ok(text) = std::env::var(WORK) else {
        return Ok(());
    };
    let tracked = Tracked::of(serde_json::from_str::<VolumeOptions>(&text)?);
    let limits = FreezeLimits {
        patience: Duration::from_millis(50),
        ..FreezeLimits::default()
    };
    let ahead = tracked.begin_with(None, limits)?;
    let guard = last_round(&ahead)?;
    kill(guard, "STOP")?;
    let Err(error) = ahead.next() else {
        bail!("a stopped guard froze it");
    };
    println!("guard {guard}. {:#}.", anyhow::Error::from(error));
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    bail!("it was not killed")
}

/// Copies nothing, until a guard is there: the next round is to be the last.
fn last_round(ahead: &Ahead) -> Result<u32> {
    for _ in 0..10 {
        let Next::Copy(_) = ahead.next()? else {
            bail!("an instant without a guard");
        };
        let path = "/proc/thread-self/children";
        let children = fs::read_to_string(path)?;
        if let Some(pid) = children.split_whitespace().next() {
            return Ok(pid.parse()?);
        }
    }
    bail!("no guard was started")
}

/// trap TE4: a freeze that was given up, and has ended by itself: whoever freezes it next is left alone.
#[test]
fn a_freeze_that_was_given_up_and_is_over() -> Result<()> {
    let (mounted, disk) = Disk::with_ext4("x09over")?;
    let tracked = disk.tracked()?;
    tracked.believe()?;
    let ahead = tracked.begin_with(
        None,
        FreezeLimits {
            patience: Duration::from_millis(50),
            ..FreezeLimits::default()
        },
    )?;
    let guard = last_round(&ahead)?;
    kill(guard, "STOP")?;
    let given_up = ahead.next();
    kill(guard, "CONT")?;
    ensure!(given_up.is_err(), "a stopped guard froze it");
    drop(ahead);
    wait_until("the guard has ended", SOON, || {
        Ok(!Path::new(&format!("/proc/{guard}")).exists())
    })?;
    let frozen = Frozen::new(mounted.dir())?;
    drop(tracked.open()?);
    let thaw = Tool::new("fsfreeze").arg("--unfreeze").arg(mounted.dir());
    thaw.run()?
        .ok()
        .context("somebody else's freeze was thawed")?;
    drop(frozen);
    drop(tracked);
    mounted.unmount()
}

/// trap TE4: a freeze that was given up comes to be after all, and nobody who knows of it lives: who comes next thaws it.
#[test]
fn a_freeze_that_comes_to_be_when_all_are_dead() -> Result<()> {
    let (mounted, disk) = Disk::with_ext4("x09gaveup")?;
    let tracked = disk.tracked()?;
    tracked.believe()?;
    let mut asker = Command::new(std::env::current_exe()?)
        .args(["--exact", "who_gives_up", "--nocapture"])
        .env(WORK, serde_json::to_string(tracked.options())?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    let out = asker.stdout.as_mut().context("a pipe")?;
    let mut byte = [0];
    while !(said.contains("guard ") && said.ends_with(".\n")) && out.read(&mut byte)? == 1 {
        said.push(char::from(byte[0]));
    }
    let guard = said
        .split_once("guard ")
        .and_then(|(_, rest)| rest.split_once('.')?.0.parse::<u32>().ok());
    // As its call would have done it; then everybody is killed who would thaw.
    let frozen = shell(&format!("fsfreeze --freeze {}", mounted.dir().display()));
    asker.kill()?;
    asker.wait()?;
    let guard = guard.with_context(|| said.clone())?;
    kill(guard, "KILL")?;
    frozen?;
    ensure!(said.contains("took longer than 50 ms"), "{said}");
    drop(tracked.open()?);
    let thawed = Tool::new("fsfreeze")
        .arg("--unfreeze")
        .arg(mounted.dir())
        .run()?;
    ensure!(thawed.code != Some(0), "it was left frozen");
    mounted.unmount()?;
    drop(open_direct(disk.node.path(), false)?);
    FileSystem::Ext4.check(disk.node.path())
}
