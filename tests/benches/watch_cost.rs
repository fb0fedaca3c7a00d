//! What mode watch costs: fio's writes with and without the marker, a backup beside fio, and one event by the kernel's own count.
//!
//! ```text
//!  a loop device on tmpfs · on the disk:  fio alone │ fio marked │ fio alone │ fio alone │ …   7 of each, depth 1 and 32
//!  ext4, mounted, watched:                fio alone │ fio beside a full backup │ …              3 of each
//! ```
//! They run in slices of a second, in turn, so that their ratio means something on a busy machine; what fio alone differs from fio
//! alone by says how much. The best slice of each was disturbed least. `BLKTIDE_BENCH_SECONDS` (3) is the length of
//! one run, `BLKTIDE_BENCH_PART` (marker, backup) chooses. Needs root, fio, loop devices and a kernel that mode watch runs on;
//! what is lacking is said, and is no failure. The second part needs the programs: `cargo xtask bench` builds them.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench: it prints what it measured"
)]

use anyhow::{Context, Result, ensure};
use blktide_sys::bpf;
use blktide_tests::{
    FileSystem, Fio, FioRun, Instance, LoopDevice, Mounted, fill_file, make_file, put, text_of,
};
use blktide_volume::VolumeOptions;
use blktide_watch::{InUse, Pins, attach, detach};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs of each kind; the middle one counts.
const ROUNDS: u64 = 7;
/// Pairs of fio alone and fio beside a backup.
const BACKUPS: u64 = 3;
/// Bytes of a device that is written.
const DEVICE_BYTES: u64 = 512 << 20;
/// Bytes of the volume that is backed up.
const VOLUME_BYTES: u64 = 1 << 30;
/// A device that gives so many writes a second must keep [`RATIO`] of them.
const IOPS_BOUND: f64 = 150_000.0;
const RATIO: f64 = 0.97;
/// How long a volume's lock is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
/// Has the kernel measure its programs.
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// The marker's programs, and when they run.
const PROGRAMS: [(&str, &str); 3] = [
    ("bio_queue", "queued"),
    ("rq_issue", "issued"),
    ("rq_done", "completed"),
];

fn main() -> Result<()> {
    if let Some(why) = lacking() {
        println!("not run: {why}");
        return Ok(());
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{} processors; {} processes want one, beside this bench: more than a few make all figures noise",
        std::thread::available_parallelism()?,
        load.split(' ').next().unwrap_or_default()
    );
    let part = std::env::var("BLKTIDE_BENCH_PART").unwrap_or_default();
    if part != "backup" {
        the_marker()?;
    }
    if part == "marker" {
        return Ok(());
    }
    match blktide_tests::binary("blktided") {
        Ok(_) => beside_a_backup(),
        Err(error) => {
            println!("not run: fio beside a backup: {error:#}");
            Ok(())
        }
    }
}

fn the_marker() -> Result<()> {
    let instance = Instance::new("watch-cost")?;
    for (what, folder) in [("tmpfs", "/dev/shm"), ("the disk", "/var/tmp")] {
        match Device::new(Path::new(folder)) {
            Ok(device) => {
                println!("a loop device on {what}, 4 KiB random writes, median of {ROUNDS}:");
                for depth in [1, 32] {
                    marked_and_not(&instance, &device, depth)?;
                }
                if what == "tmpfs" {
                    one_event(&instance, &device)?;
                }
            }
            Err(error) => println!("not run: a loop device on {what}: {error:#}"),
        }
    }
    Ok(())
}

fn lacking() -> Option<String> {
    if let Err(missing) = blktide_watch::probe() {
        return Some(missing.to_string());
    }
    let tools = ["fio", "losetup", "mkfs.ext4", "dd"];
    let lacks = |tool: &&&str| {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut folders = path.split(':').chain(["/usr/sbin", "/sbin"]);
        !folders.any(|folder| Path::new(folder).join(**tool).is_file())
    };
    let missing = tools.iter().find(lacks)?;
    Some(format!("no program {missing}"))
}

fn seconds() -> u64 {
    let set = std::env::var("BLKTIDE_BENCH_SECONDS").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// A loop device on a file that is all there. Dropped, both go.
struct Device {
    // In this order: first the device, then its file.
    device: LoopDevice,
    _file: Removed,
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

impl Device {
    fn new(folder: &Path) -> Result<Self> {
        let path = folder.join(format!("blktide-bench-{}", std::process::id()));
        let file = Removed(path.clone());
        fill_file(&path, DEVICE_BYTES)?;
        Ok(Self {
            device: LoopDevice::new(&path, 512)?,
            _file: file,
        })
    }
}

/// The marker on a device. Dropped, it is let go of.
struct Marked(VolumeOptions);

impl Marked {
    fn options(instance: &Instance, device: &Path) -> VolumeOptions {
        let mut options = VolumeOptions::new("data", device);
        options.runtime_dir = instance.join("run");
        options.state_dir = instance.join("state");
        options.device_dir = instance.join("dev");
        options.grain_bytes = 4096;
        options
    }

    fn new(instance: &Instance, device: &Path) -> Result<Self> {
        let options = Self::options(instance, device);
        attach(&options, PATIENCE, &|_| ())?;
        Ok(Self(options))
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        drop(detach(&self.0, InUse::LetGo, PATIENCE));
    }
}

/// One run of fio, 4 KiB random writes past the page cache.
fn write(target: &Path, depth: u32, seconds: u64, more: &[&str]) -> Fio {
    let (depth, runtime) = (format!("iodepth={depth}"), format!("runtime={seconds}"));
    let mut words = vec![
        "rw=randwrite",
        "bs=4k",
        "direct=1",
        "ioengine=libaio",
        "time_based",
        "norandommap",
        &depth,
        &runtime,
    ];
    words.extend(more);
    Fio::new("write", target, &words).limit(seconds + 120)
}

fn iops(run: &FioRun) -> Result<f64> {
    let found = run.json.pointer("/jobs/0/write/iops");
    found
        .and_then(serde_json::Value::as_f64)
        .context("fio told no IOPS")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// fio without, with and again without the marker, in turn. What the two without differ by is noise, and so is less than that.
fn marked_and_not(instance: &Instance, device: &Device, depth: u32) -> Result<()> {
    let target = device.device.path();
    let (mut before, mut with, mut after) = (Runs::default(), Runs::default(), Runs::default());
    for _ in 0..ROUNDS {
        for _ in 0..seconds() {
            let once = || iops(&write(target, depth, 1, &[]).run()?);
            before.add(once()?);
            let marker = Marked::new(instance, target)?;
            with.add(once()?);
            drop(marker);
            after.add(once()?);
        }
        for runs in [&mut before, &mut with, &mut after] {
            runs.end_round();
        }
    }
    let without = before.rounds.iter().zip(&after.rounds);
    let without: Vec<f64> = without.map(|(a, b)| f64::midpoint(*a, *b)).collect();
    let (a, b) = (median(&with.rounds), median(&without));
    let (ratio, same) = (a / b, median(&after.rounds) / median(&before.rounds));
    println!(
        "  depth {depth:2}: {b:7.0} IOPS without, {a:7.0} with: ratio {ratio:.3}; without against without: {same:.3}",
    );
    let best = before.best.max(after.best);
    println!(
        "            best slice {best:.0} without, {:.0} with; {}",
        with.best,
        verdict(b, ratio, same)
    );
    Ok(())
}

/// IOPS of one kind.
#[derive(Default)]
struct Runs {
    /// Of each round the mean of its slices.
    rounds: Vec<f64>,
    slices: Vec<f64>,
    best: f64,
}

impl Runs {
    fn add(&mut self, iops: f64) {
        self.slices.push(iops);
        self.best = self.best.max(iops);
    }

    fn end_round(&mut self) {
        let slices = std::mem::take(&mut self.slices);
        self.rounds
            .push(slices.iter().sum::<f64>() / slices.len().max(1) as f64);
    }
}

fn verdict(iops: f64, ratio: f64, same: f64) -> String {
    if iops >= IOPS_BOUND {
        return format!("above {IOPS_BOUND:.0} IOPS: no ratio is promised");
    }
    let word = if (same - 1.0).abs() > 1.0 - RATIO {
        "not to be told, the machine is too busy"
    } else if ratio >= RATIO {
        "kept"
    } else {
        "NOT KEPT"
    };
    format!("below {IOPS_BOUND:.0} IOPS at least {RATIO} is promised: {word}")
}

/// What the kernel says that one run of each program takes: of a device that is watched, and of another one.
fn one_event(instance: &Instance, device: &Device) -> Result<()> {
    let Some(_statistics) = Statistics::on() else {
        println!("not run: one event: {STATISTICS} cannot be set");
        return Ok(());
    };
    let target = device.device.path();
    let own = measured(instance, target, target)?;
    let other_file = instance.join("other");
    make_file(&other_file, 16 << 20)?;
    let other = LoopDevice::new(&other_file, 512)?;
    let foreign = measured(instance, other.path(), target)?;
    println!("  one event, as the kernel measures it (with its clock's own cost):");
    for ((name, when), (own, foreign)) in PROGRAMS.iter().zip(own.iter().zip(foreign)) {
        println!(
            "    {when:9} ({name}): {own:4.0} ns; of a device that is not watched {foreign:3.0} ns"
        );
    }
    let sum: f64 = own.iter().sum();
    println!(
        "    a write has one of each: {sum:.0} ns, {:.0} % of a processor at {:.0} writes a second",
        (1.0 - RATIO) * 100.0,
        (1.0 - RATIO) * 1e9 / sum
    );
    Ok(())
}

/// Nanoseconds of one run of each program, attached to `watched`, while `written` is written.
fn measured(instance: &Instance, watched: &Path, written: &Path) -> Result<Vec<f64>> {
    let marker = Marked::new(instance, watched)?;
    let pins = Pins::of(&marker.0.runtime_dir, &marker.0.name)?;
    let figures = || -> Result<Vec<(u64, u64)>> {
        let of = |(name, _): &(&str, &str)| {
            let opened = bpf::open_pinned(&pins.folder().join(name))?;
            let facts = bpf::facts_of(opened.as_fd())?;
            let number = |key: &str| facts.number(key).with_context(|| format!("no {key}"));
            Ok((number("run_time_ns")?, number("run_cnt")?))
        };
        PROGRAMS.iter().map(of).collect()
    };
    let before = figures()?;
    write(written, 32, seconds(), &[]).run()?;
    let after = figures()?;
    let each = before.iter().zip(&after);
    Ok(each
        .map(|((t0, n0), (t1, n1))| (t1 - t0) as f64 / (n1 - n0).max(1) as f64)
        .collect())
}

/// The kernel measures its programs as long as this lives.
struct Statistics(String);

impl Statistics {
    fn on() -> Option<Self> {
        let before = std::fs::read_to_string(STATISTICS).ok()?;
        set_statistics("1").ok()?;
        Some(Self(before.trim().to_owned()))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        drop(set_statistics(&self.0));
    }
}

fn set_statistics(text: &str) -> Result<()> {
    put(Path::new(STATISTICS), text)
}

/// fio on a file of a mounted file system, alone and while full backups are made one after the other.
fn beside_a_backup() -> Result<()> {
    let mut instance = Instance::new("watch-cost-backup")?;
    instance.configure("over_budget = \"longer\"", "")?;
    instance.start()?;
    instance.repo_init("main")?;
    let file = instance.join("volume");
    make_file(&file, VOLUME_BYTES)?;
    let device = LoopDevice::new(&file, 512)?;
    FileSystem::Ext4.make(device.path())?;
    let mounted = Mounted::new(device.path(), &instance.join("mnt"), &["-o", "noatime"])?;
    let target = mounted.join("file");
    fill_file(&target, DEVICE_BYTES)?;
    mounted.sync()?;
    let path = device.path().display().to_string();
    let words = [
        "volume", "add", "data", "--device", &path, "--mode", "watch", "--yes",
    ];
    instance.ctl_ok(&words)?;
    // From here on it is let go of at the end, whatever happens.
    let _marked = Marked(Marked::options(&instance, device.path()));
    println!(
        "ext4 on a loop device on the disk, watched; 4 KiB random writes at depth 32, median of {BACKUPS}; full backups of {} MiB:",
        DEVICE_BYTES >> 20
    );
    for (what, more) in [
        ("as fast as it goes", &[][..]),
        ("10 MiB/s", &["rate=10m"][..]),
    ] {
        alone_and_beside(&instance, &target, what, more)?;
    }
    mounted.unmount()
}

fn alone_and_beside(instance: &Instance, target: &Path, what: &str, more: &[&str]) -> Result<()> {
    let (mut alone, mut beside) = (Series::default(), Series::default());
    let (mut backups, mut ended, mut frozen) = (0_u32, 0_u32, 0.0_f64);
    let mut why = String::new();
    // A backup takes longer than a plain run.
    let length = seconds() * 3;
    for _ in 0..BACKUPS {
        alone.add(&write(target, 32, length, more).run()?)?;
        let running = write(target, 32, length, more).start()?;
        while running.runs() {
            let reply = instance.ctl(&["backup", "data", "--full", "--json"])?;
            if !matches!(reply.finished.code, Some(0 | 3)) {
                ended += 1;
                why = format!(": {}", text_of(&reply.json()?, "/message")?);
                continue;
            }
            let summary = reply.json()?;
            let freeze = summary.get("longest_freeze_seconds");
            frozen = frozen.max(freeze.and_then(serde_json::Value::as_f64).unwrap_or(0.0));
            backups += 1;
        }
        beside.add(&Fio::judge(running.finish()?)?)?;
    }
    ensure!(backups + ended > 0, "no backup was tried");
    let (a, b) = (median(&alone.iops), median(&beside.iops));
    println!(
        "  {what}: {a:6.0} IOPS alone, {b:6.0} beside a backup: ratio {:.3}; longest write {:.0} ms alone, {:.0} ms beside",
        b / a,
        alone.longest * 1e3,
        beside.longest * 1e3
    );
    println!(
        "    {backups} backups, longest freeze {:.0} ms; {ended} given up{why}",
        frozen * 1e3
    );
    Ok(())
}

/// Runs of one kind.
#[derive(Default)]
struct Series {
    iops: Vec<f64>,
    longest: f64,
}

impl Series {
    fn add(&mut self, run: &FioRun) -> Result<()> {
        self.iops.push(iops(run)?);
        self.longest = self.longest.max(run.longest_write_seconds);
        Ok(())
    }
}
