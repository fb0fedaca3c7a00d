//! Mode watch: whichever way a write takes to a device, its blocks are marked.
//! needs: root, loop, bpf, ext4, xfs, btrfs, fio, python3, sqlite3, memcg
//! limit: 420 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    Cgroup, DeviceCounters, Figures, FileSystem, Fio, Instance, LoopDevice, Mounted, Tool, Tracked,
    Truth, figure, make_file, no_doubt, shell, wait_until, write_block,
};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Blocks and grains that are tried: the default, both fine, both coarse.
const DEFAULT: (u32, u32) = (65536, 4096);
const FINE: (u32, u32) = (4096, 4096);
const COARSE: (u32, u32) = (65536, 65536);

/// Ways to write to a mounted file system; `$FS` is its folder. Each leaves data that the next does not need.
const MOUNTED: &[(&str, &str)] = &[
    (
        "copy, rename, delete",
        "cp -a /etc $FS/a; mv $FS/a $FS/b; rm -rf $FS/b/[a-m]*",
    ),
    (
        "mmap",
        "$FIO --size=32m --io_size=8m --bs=4k --ioengine=mmap",
    ),
    (
        "O_DIRECT, libaio",
        "$FIO --size=32m --io_size=8m --bs=4k --direct=1 --ioengine=libaio --iodepth=16",
    ),
    (
        "io_uring: fixed buffers and files, SQPOLL",
        "$FIO --size=32m --io_size=16m --bs=16k --direct=1 --ioengine=io_uring --fixedbufs --registerfiles \
         --sqthread_poll=1 --iodepth=16",
    ),
    (
        "fallocate: zero, punch",
        "dd if=/dev/urandom of=$FS/z bs=1M count=24 status=none; sync -f $FS; fallocate -z -o 1M -l 4M $FS/z; \
         fallocate -p -o 8M -l 4M $FS/z",
    ),
    (
        "fstrim",
        "dd if=/dev/urandom of=$FS/t bs=1M count=24 status=none; sync -f $FS; rm $FS/t; sync -f $FS; fstrim $FS",
    ),
    (
        "sqlite",
        "{ echo 'pragma journal_mode=wal; create table t(a, b);'; \
           for i in $(seq 100); do echo \"insert into t values($i, randomblob(500));\"; done; } | sqlite3 $FS/db >/dev/null",
    ),
];
/// btrfs has no polling.
const POLLED: (&str, &str) = (
    "io_uring: polled",
    "$FIO --size=32m --io_size=8m --bs=16k --direct=1 --ioengine=io_uring --hipri --iodepth=4",
);
const COLLAPSE: (&str, &str) = (
    "fallocate: collapse, insert",
    "dd if=/dev/urandom of=$FS/c bs=1M count=8 status=none; sync -f $FS; fallocate -c -o 1M -l 1M $FS/c; \
     fallocate -i -o 2M -l 1M $FS/c",
);
const REFLINK: (&str, &str) = (
    "reflink",
    "dd if=/dev/urandom of=$FS/r bs=1M count=8 status=none; sync -f $FS; cp --reflink=always $FS/r $FS/s; \
     dd if=/dev/urandom of=$FS/s bs=4096 seek=5 count=100 conv=notrunc status=none",
);
/// Memory that is written to and does not fit goes to the swap file, from the kernel straight to the device.
const SWAP: (&str, &str) = (
    "swap file in use",
    "swapon $FS/sw; trap 'swapoff $FS/sw' EXIT; ( eval \"$CG\"; exec python3 -c \"
import os
memory = bytearray(64 << 20)
for at in range(0, len(memory), 4096): memory[at:at + 4096] = os.urandom(4096)
used = [int(line.split()[3]) for line in open('/proc/swaps') if '$FS/sw' in line]
assert used and used[0] > 8192, used
\" )",
);

/// Ways to write to the device itself; `$D` is its node.
const RAW: &[(&str, &str)] = &[
    (
        "raw, buffered",
        "dd if=/dev/urandom of=$D bs=1M count=64 seek=32 conv=notrunc status=none",
    ),
    (
        "raw, O_DIRECT, odd sizes",
        "dd if=/dev/urandom of=$D bs=3584 count=300 seek=5001 oflag=direct conv=notrunc status=none",
    ),
    (
        "raw, mmap",
        "python3 -c \"
import mmap, os
memory = mmap.mmap(os.open('$D', os.O_RDWR), 64 << 20)
for at in range(12345, 60 << 20, 777777): memory[at:at + 10] = b'helloworld'
memory.flush()\"",
    ),
    // trap TA3: small, unaligned and of odd length.
    (
        "BLKDISCARD",
        "blkdiscard -o $((40 << 20)) -l 4096 $D; blkdiscard -o $(((41 << 20) + 512)) -l $((33 * 512)) $D; \
         blkdiscard -o $((48 << 20)) -l $((16 << 20)) $D",
    ),
    // trap TA1: with and without NOUNMAP.
    (
        "write zeroes",
        "blkdiscard -z -o $(((65 << 20) + 4096)) -l $((8 << 20)) $D; fallocate -z -n -o 76M -l 1M $D; \
         fallocate -p -n -o $(((78 << 20) + 4096)) -l $(((1 << 20) + 512)) $D",
    ),
    ("mkfs, whole discard", "mkfs.ext4 -q -F $D"),
];

/// A file system on a loop device or a partition of one.
struct Place {
    instance: Instance,
    /// Held: the device goes with it.
    _disk: LoopDevice,
    device: PathBuf,
    truth: Truth,
}

impl Place {
    /// `partition`: its first sector and its length in sectors; nothing is aligned there.
    fn new(name: &str, mib: u64, partition: Option<(u64, u64)>) -> Result<Self> {
        let instance = Instance::new(name)?;
        let file = instance.join("disk");
        make_file(&file, mib * MIB)?;
        let (disk, device, part) = match partition {
            None => {
                let disk = LoopDevice::new(&file, 512)?;
                let device = disk.path().to_owned();
                (disk, device, (0, mib * MIB))
            }
            Some((start, sectors)) => {
                let disk = LoopDevice::partitioned(&file)?;
                disk.add_partition(1, 2048, start - 2048)?;
                let device = disk.add_partition(2, start, sectors)?;
                (disk, device, (start * 512, sectors * 512))
            }
        };
        Ok(Self {
            truth: Truth::of(&file, part, instance.root()),
            instance,
            _disk: disk,
            device,
        })
    }
}

/// One way of writing, and what was marked of it. Afterwards nothing is in a page cache.
fn way(
    place: &Place,
    tracked: &Tracked,
    (name, script): (&str, &str),
    variables: &str,
) -> Result<Figures> {
    let fio = "fio --name=job --directory=$FS --rw=randwrite --minimal --output=/dev/null";
    let device = place.device.display();
    let script = format!(
        "{variables}; D={device}; FIO=\"{fio}\"; {script}; [ -z \"$FS\" ] || sync -f $FS; sync $D"
    );
    let figures = place.truth.judge(tracked, || shell(&script))?;
    figures.well(name)?;
    Ok(figures)
}

/// Attaches while a load runs, and judges what the load writes from then on.
fn attach_under_load(
    place: &Place,
    mounted: &Mounted,
    units: (u32, u32),
) -> Result<(Tracked, Figures)> {
    let before = DeviceCounters::of(&place.device)?;
    let job = [
        "rw=randwrite",
        "bs=4k",
        "size=24m",
        "time_based",
        "runtime=4",
        "rate=30m",
        "end_fsync=1",
    ];
    let load = Fio::new("load", &mounted.join("load"), &job).start()?;
    wait_until("the load writes", Duration::from_secs(20), || {
        // A buffered load reaches the device when it is told to.
        mounted.sync()?;
        let now = DeviceCounters::of(&place.device)?;
        Ok(now.since(before).written_bytes > MIB)
    })?;
    let tracked = Tracked::attached(&place.instance, "data", &place.device, units)?;
    ensure!(load.runs(), "the load ended before the attach");
    let figures = place.truth.judge(&tracked, || {
        Fio::judge(load.finish()?)?;
        mounted.sync()
    })?;
    figures.well("attached under load")?;
    Ok((tracked, figures))
}

fn swap_file(system: FileSystem, mounted: &Mounted) -> Result<()> {
    let script = match system {
        FileSystem::Btrfs => "btrfs filesystem mkswapfile --size 64m $FS/sw >/dev/null",
        FileSystem::Ext4 | FileSystem::Xfs => {
            "dd if=/dev/zero of=$FS/sw bs=1M count=64 status=none; chmod 600 $FS/sw; mkswap -q $FS/sw"
        }
    };
    shell(&format!(
        "FS={}; {script}; sync -f $FS",
        mounted.dir().display()
    ))
}

/// All ways, on one file system.
fn all_ways(system: FileSystem, place: &Place, units: (u32, u32)) -> Result<()> {
    system.make(&place.device)?;
    let mounted = Mounted::new(&place.device, &place.instance.join("mnt"), &[])?;
    let (tracked, mut total) = attach_under_load(place, &mounted, units)?;
    tracked.believe()?;
    swap_file(system, &mounted)?;
    let group = Cgroup::small(&place.instance, 32 * MIB)?;
    let variables = format!("FS={}; CG='{}'", mounted.dir().display(), group.line());
    let own = match system {
        FileSystem::Ext4 => [POLLED, COLLAPSE, SWAP].as_slice(),
        FileSystem::Xfs => &[POLLED, COLLAPSE, REFLINK, SWAP],
        FileSystem::Btrfs => &[REFLINK, SWAP],
    };
    for script in MOUNTED.iter().chain(own) {
        total.add(&way(place, &tracked, *script, &variables)?);
    }
    mounted.unmount()?;
    system.check(&place.device)?;
    for script in RAW {
        total.add(&way(place, &tracked, *script, "FS=")?);
    }
    no_doubt(&tracked)?;
    let (block, grain) = (units.0 >> 10, units.1 >> 10);
    figure(&format!(
        "{} on {}, blocks of {block} KiB, grains of {grain}: changed {}, marked {}, missed {}",
        system.name(),
        place.device.display(),
        total.changed,
        total.marked,
        total.missed.len()
    ));
    Ok(())
}

/// req X9: attached to a mounted ext4 in use; every way to write.
/// trap TA12: the page cache, mmap, `O_DIRECT`, `io_uring`, swap.
/// trap TA1: zeroes with and without unmapping.
/// trap TA2: discards and fstrim.
#[test]
fn ext4_on_a_whole_disk() -> Result<()> {
    all_ways(
        FileSystem::Ext4,
        &Place::new("x09ext4", 256, None)?,
        DEFAULT,
    )
}

/// req X9: the same, each block of 4 KiB by itself.
#[test]
fn ext4_in_blocks_of_4_kib() -> Result<()> {
    all_ways(FileSystem::Ext4, &Place::new("x09fine", 256, None)?, FINE)
}

/// req X9: XFS, with reflinks.
#[test]
fn xfs_on_a_whole_disk() -> Result<()> {
    all_ways(FileSystem::Xfs, &Place::new("x09xfs", 384, None)?, COARSE)
}

/// req X9: btrfs, which writes everything elsewhere.
#[test]
fn btrfs_on_a_whole_disk() -> Result<()> {
    all_ways(
        FileSystem::Btrfs,
        &Place::new("x09btrfs", 384, None)?,
        DEFAULT,
    )
}

/// req X9: a partition that begins in the midst of a block of its disk.
/// trap TA15: sectors are those of the whole disk.
#[test]
fn ext4_on_a_partition() -> Result<()> {
    let place = Place::new("x09part", 320, Some((40_961, 500_001)))?;
    all_ways(FileSystem::Ext4, &place, DEFAULT)
}

/// req X9: the same with XFS, each block of 4 KiB by itself.
#[test]
fn xfs_on_a_partition() -> Result<()> {
    let place = Place::new("x09xfspart", 384, Some((40_968, 720_000)))?;
    all_ways(FileSystem::Xfs, &place, FINE)
}

fn set(blocks: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    blocks.into_iter().collect()
}

/// trap TA7: the last sector of a device whose size is no multiple of anything; one byte that is not zero.
/// trap TA8: first and last sector of a block, across an edge, half a KiB within; the neighbours stay unmarked.
#[test]
fn edges_are_exact() -> Result<()> {
    for (name, units) in [("x09edge", FINE), ("x09edgecoarse", COARSE)] {
        let instance = Instance::new(name)?;
        let file = instance.join("disk");
        let bytes = 40 * MIB + 5 * 4096 + 512;
        make_file(&file, bytes)?;
        let disk = LoopDevice::new(&file, 512)?;
        let tracked = Tracked::attached(&instance, "data", disk.path(), units)?;
        tracked.drain()?;
        let block = u64::from(units.0);
        let mut last_byte = [0; 512];
        last_byte[511] = 1;
        let last = bytes.div_ceil(block) - 1;
        let writes: [(u64, &[u8], BTreeSet<u64>); 8] = [
            (0, &[1; 512], set([0])),
            (bytes - 512, &last_byte, set([last])),
            (7 * block, &[2; 512], set([7])),
            (8 * block - 512, &[3; 512], set([7])),
            (9 * block - 512, &[4; 1024], set([8, 9])),
            (11 * block + 1024, &[5; 512], set([11])),
            (12 * block + block - 512, &last_byte, set([12])),
            (13 * block, &vec![6; units.0 as usize], set([13])),
        ];
        for (offset, content, wanted) in writes {
            write_block(disk.path(), offset, content)?;
            let marked = tracked.drain()?;
            ensure!(
                marked == wanted,
                "{name}, {offset}: {marked:?}, wanted {wanted:?}"
            );
        }
        no_marks(&tracked, || {
            shell(&format!(
                "dd if={} of=/dev/null bs=1M iflag=direct status=none",
                disk.path().display()
            ))
        })?;
    }
    Ok(())
}

/// Reading marks nothing.
fn no_marks(tracked: &Tracked, step: impl FnOnce() -> Result<()>) -> Result<()> {
    step()?;
    let marked = tracked.drain()?;
    ensure!(marked.is_empty(), "marked: {marked:?}");
    Ok(())
}

/// What a device says of the discards that it takes: granularity, alignment, the largest one, the largest write of zeroes.
fn discards_of(device: &Path) -> Result<String> {
    let name = device.file_name().context("a name")?;
    let folder = Path::new("/sys/class/block").join(name);
    let files = [
        "queue/discard_granularity",
        "discard_alignment",
        "queue/discard_max_bytes",
        "queue/write_zeroes_max_bytes",
    ];
    let read = |file: &&str| fs::read_to_string(folder.join(file)).context(file.to_string());
    files.iter().map(read).collect()
}

/// trap TA5: a discard reaches the device as before, and its counters.
/// trap TA1: what was zeroed reads as zeroes.
/// trap TA3: one of odd length marks what it may touch, and nothing else.
/// trap TA4: what the device says of its discards is what it said before it was watched.
#[test]
fn discards_reach_the_device() -> Result<()> {
    let instance = Instance::new("x09discard")?;
    let file = instance.join("disk");
    make_file(&file, 64 * MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    let device = disk.path().display().to_string();
    let says = discards_of(disk.path())?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    ensure!(discards_of(disk.path())? == says, "it says {says}");
    shell(&format!(
        "dd if=/dev/urandom of={device} bs=1M oflag=direct status=none || true"
    ))?;
    ensure!(
        tracked.drain()? == set(0..64 * MIB / 4096),
        "all of it was written"
    );
    let kept = file.metadata()?.blocks();
    let steps = [
        (
            format!("blkdiscard -o {} -l {} {device}", 8 * MIB, 16 * MIB),
            2048..6144,
        ),
        (
            format!("blkdiscard -o {} -l 4096 {device}", 30 * MIB),
            7680..7681,
        ),
        (
            format!("blkdiscard -z -o {} -l {} {device}", 32 * MIB, 4 * MIB),
            8192..9216,
        ),
        (
            format!("fallocate -p -n -o 40M -l 1M {device}"),
            10240..10496,
        ),
    ];
    for (script, blocks) in steps {
        shell(&script)?;
        let marked = tracked.drain()?;
        ensure!(
            marked == set(blocks.clone()),
            "{script}: {} blocks",
            marked.len()
        );
        Tool::new("cmp")
            .args(["--bytes", &((blocks.end - blocks.start) * 4096).to_string()])
            .args(["--ignore-initial", &format!("{}:0", blocks.start * 4096)])
            .arg(&file)
            .arg("/dev/zero")
            .run()?
            .ok()
            .with_context(|| format!("{script}: not zeroes"))?;
    }
    let odd = format!("blkdiscard -o {} -l {} {device}", 50 * MIB + 512, 33 * 512);
    shell(&odd)?;
    let marked = tracked.drain()?;
    ensure!(marked.is_subset(&set(12800..12805)), "{odd}: {marked:?}");
    let given_back = (kept - file.metadata()?.blocks()) * 512;
    ensure!(
        given_back >= 17 * MIB,
        "the device gave back {given_back} bytes"
    );
    Ok(())
}

/// trap TA15: written by the whole disk while a partition is watched, and by a partition while the disk is.
#[test]
fn a_disk_and_its_partitions() -> Result<()> {
    for (name, units) in [("x09alias", FINE), ("x09aliascoarse", COARSE)] {
        let instance = Instance::new(name)?;
        let file = instance.join("disk");
        make_file(&file, 64 * MIB)?;
        let disk = LoopDevice::partitioned(&file)?;
        let (start, sectors) = (10_241, 65_536);
        disk.add_partition(1, 2048, start - 2048)?;
        let part = disk.add_partition(2, start, sectors)?;
        disk.add_partition(3, start + sectors, 4096)?;
        let (block, from, bytes) = (u64::from(units.0), start * 512, sectors * 512);
        let tracked = Tracked::attached(&instance, "part", &part, units)?;
        tracked.believe()?;
        tracked.drain()?;
        let whole = disk.path();
        let (first, last) = (0, bytes / block - 1);
        let writes = [
            ("just before", from - 512, 512, set([])),
            ("the first sector", from, 512, set([first])),
            ("across its begin", from - 512, 1024, set([first])),
            ("inside", from + 17 * block, 4096, set([17])),
            ("the last sector", from + bytes - 512, 512, set([last])),
            ("across its end", from + bytes - 512, 1024, set([last])),
            ("just after", from + bytes, 512, set([])),
        ];
        for (what, offset, length, wanted) in writes {
            write_block(whole, offset, &vec![7; length])?;
            let marked = tracked.drain()?;
            ensure!(
                marked == wanted,
                "{name}, {what}: {marked:?}, wanted {wanted:?}"
            );
        }
        no_doubt(&tracked).context("written by way of the disk")?;
        drop(tracked);
        let tracked = Tracked::attached(&instance, "whole", whole, units)?;
        tracked.believe()?;
        tracked.drain()?;
        write_block(&part, 0, &[8; 512])?;
        write_block(&part, bytes - 512, &[9; 512])?;
        let marked = tracked.drain()?;
        let wanted = set([from / block, (from + bytes - 512) / block]);
        ensure!(marked == wanted, "{name}: {marked:?}, wanted {wanted:?}");
        no_doubt(&tracked).context("written by way of a partition")?;
    }
    Ok(())
}

/// Nothing of the kernel's side is left after a detach.
#[test]
fn nothing_is_left_in_the_kernel() -> Result<()> {
    let instance = Instance::new("x09left")?;
    let name = instance
        .root()
        .file_name()
        .context("a name")?
        .to_string_lossy()
        .into_owned();
    let pins = || {
        let all = blktide_tests::remains(&name);
        all.iter().filter(|l| l.contains("/sys/fs/bpf/")).count()
    };
    let file = instance.join("disk");
    make_file(&file, MIB)?;
    let disk = LoopDevice::new(&file, 512)?;
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    ensure!(pins() == 1, "pinned: {}", pins());
    drop(tracked);
    ensure!(pins() == 0, "left: {:?}", blktide_tests::remains(&name));
    let tracked = Tracked::attached(&instance, "data", disk.path(), FINE)?;
    // Left to the instance: it finds the pins.
    tracked.leave();
    drop(disk);
    drop(instance);
    ensure!(
        blktide_tests::remains(&name).is_empty(),
        "{:?}",
        blktide_tests::remains(&name)
    );
    let folder: &Path = Path::new("/sys/fs/bpf");
    ensure!(folder.is_dir(), "the BPF file system itself stays");
    Ok(())
}
