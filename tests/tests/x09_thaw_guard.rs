//! A frozen file system is thawed, whoever dies, stops or forgets; and nobody takes a broken freeze for a whole one.
//! needs: root, loop, ext4
//! limit: 120 s
//!
//! ```text
//!  asker (this test, or a process of its own) ── Guard ── blktided thaw-guard
//!                                                             │ FIFREEZE, FITHAW
//!  the oracle: dd, which waits or goes on ──────────────▶ ext4 on a loop device ──▶ its write counter
//! ```
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::blockdev::{BlockDevice, FreezeError};
use blktide_sys::event::pause;
use blktide_sys::spawn::Program;
use blktide_tests::{
    DeviceCounters, FileSystem, Instance, LoopDevice, Mounted, Running, Seed, Stopwatch, Tool,
    binary, count, kill, make_file, pass, wait_until,
};
use blktide_watch::guard::{Guard, GuardError, Thawed};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const ASKER: &str = "BLKTIDE_X09_ASKER";
const SOON: Duration = Duration::from_secs(10);
/// Longer than any test waits: what is thawed within it was not thawed by the limit.
const LONG: Duration = Duration::from_secs(60);

/// An ext4 on a loop device, mounted. Dropped in this order.
struct Place {
    mounted: Mounted,
    device: LoopDevice,
    instance: Instance,
}

impl Place {
    fn new(name: &str) -> Result<Self> {
        let instance = Instance::new(name)?;
        let backing = instance.join("backing");
        make_file(&backing, 256 << 20)?;
        let device = LoopDevice::new(&backing, 512)?;
        FileSystem::Ext4.make(device.path())?;
        let mounted = Mounted::new(device.path(), &instance.join("mount"), &[])?;
        Ok(Self {
            mounted,
            device,
            instance,
        })
    }

    fn guard(&self) -> Result<Guard> {
        Ok(Guard::start(
            &program()?,
            File::open(self.mounted.dir())?.into(),
        )?)
    }

    /// Unmounts; the file system is without fault.
    fn end(self) -> Result<()> {
        self.mounted.unmount()?;
        FileSystem::Ext4.check(self.device.path())
    }
}

fn program() -> Result<Program> {
    Ok(Program::copy_of(&binary("blktided")?)?)
}

/// Somebody who writes one file into a folder.
struct Writer {
    dd: Running,
    file: PathBuf,
}

impl Writer {
    fn start(folder: &Path, name: &str) -> Result<Self> {
        let file = folder.join(name);
        let dd = Tool::new("dd")
            .args(["if=/dev/zero", "bs=4096", "count=1", "conv=fsync"])
            .arg(format!("of={}", file.display()))
            .start()?;
        Ok(Self { dd, file })
    }

    /// Starts one, and fails unless it waits.
    fn that_waits(folder: &Path, name: &str) -> Result<Self> {
        let writer = Self::start(folder, name)?;
        wait_until("the writer waits", SOON, || {
            Ok(state(writer.dd.pid())? == "D")
        })?;
        ensure!(
            !writer.file.exists(),
            "it has written to a frozen file system"
        );
        Ok(writer)
    }

    /// Fails unless it comes to its end `within`.
    fn goes_on(self, within: Duration) -> Result<()> {
        wait_until("the writer goes on", within, || {
            Ok(self.file.exists() && !self.dd.runs())
        })?;
        self.dd.finish()?.ok()?;
        Ok(())
    }
}

/// `D`: it waits, and no signal reaches it.
fn state(pid: u32) -> Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("stat")?;
    Ok(rest.split_whitespace().next().context("state")?.to_owned())
}

/// `fsfreeze`, somebody else's tool. What it has frozen is thawed when this is dropped.
struct Another<'a>(&'a Path);

impl<'a> Another<'a> {
    fn freezes(at: &'a Path) -> Result<Self> {
        fsfreeze("--freeze", at)?;
        Ok(Self(at))
    }

    /// Fails unless it is still frozen.
    fn thaws(self) -> Result<()> {
        fsfreeze("--unfreeze", self.0)
    }
}

impl Drop for Another<'_> {
    fn drop(&mut self) {
        drop(Tool::new("fsfreeze").arg("--unfreeze").arg(self.0).run());
    }
}

fn fsfreeze(what: &str, at: &Path) -> Result<()> {
    Tool::new("fsfreeze").arg(what).arg(at).run()?.ok()?;
    Ok(())
}

/// Not a test by itself: an asker that is killed or stopped. It freezes, waits for a file to appear, and thaws.
#[test]
fn asker() -> Result<()> {
    let Ok(what) = std::env::var(ASKER) else {
        return Ok(());
    };
    let mut words = what.splitn(3, ':');
    let mut word = || words.next().context("limit:folder:file");
    let limit = Duration::from_millis(word()?.parse()?);
    let mut guard = Guard::start(&program()?, File::open(word()?)?.into())?;
    let pid = guard.pid();
    let frozen = guard.freeze(limit, SOON)?;
    println!("frozen by {pid}.");
    let go = PathBuf::from(word()?);
    while !go.exists() {
        pause(Duration::from_millis(2))?;
    }
    println!("ended {:?}.", frozen.thaw());
    Ok(())
}

/// An asker in a process of its own that has frozen the file system, and its guard.
fn start_asker(place: &Place, limit: Duration) -> Result<(Running, u32)> {
    let go = place.instance.join("go");
    let at = place.mounted.dir().display();
    let mut asker = Tool::new(std::env::current_exe()?)
        .args(["--exact", "asker", "--nocapture"])
        .env(
            ASKER,
            format!("{}:{at}:{}", limit.as_millis(), go.display()),
        )
        .start()?;
    let mut guard = None;
    wait_until("the asker has frozen", SOON, || {
        guard = number_after(&asker.output()?, "frozen by ");
        Ok(guard.is_some())
    })?;
    Ok((asker, guard.context("its guard")?))
}

fn number_after(text: &str, words: &str) -> Option<u32> {
    let (_, rest) = text.split_once(words)?;
    rest.split_once('.')?.0.parse().ok()
}

fn is_gone(pid: u32) -> Result<()> {
    wait_until("the guard ends", SOON, || {
        Ok(!Path::new(&format!("/proc/{pid}")).exists() || state(pid)? == "Z")
    })
}

/// req X9: writers wait from the freeze to the thaw, and no longer; nothing reaches the device meanwhile.
/// trap TE4: frozen and thawed by an open descriptor, in a process that is locked in memory and never killed for want of it.
#[test]
fn writers_wait_and_go_on() -> Result<()> {
    let place = Place::new("x09wait")?;
    let mut guard = place.guard()?;
    let pid = guard.pid();
    let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    // Root of a container may not have the right to it; then it is told.
    let may_be_killed = file("oom_score_adj")?.trim() != "-1000";
    let refused = guard.refused();
    ensure!(
        may_be_killed == refused.contains(&"an OOM score of -1000"),
        "{refused:?}"
    );
    let locked = |key: &str| -> Result<u64> {
        let status = file("status")?;
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        let text = line.with_context(|| key.to_owned())?.trim();
        Ok(text.trim_end_matches(" kB").trim().parse()?)
    };
    ensure!(locked("VmLck:")? > 0 && locked("VmSwap:")? == 0);
    for name in ["one", "two", "three"] {
        let frozen = guard.freeze(LONG, SOON)?;
        let before = DeviceCounters::of(place.device.path())?;
        let writer = Writer::that_waits(place.mounted.dir(), name)?;
        ensure!(!frozen.is_over());
        let after = DeviceCounters::of(place.device.path())?;
        ensure!(
            before.written_bytes == after.written_bytes,
            "{before:?} {after:?}"
        );
        frozen.thaw()?;
        writer.goes_on(SOON)?;
    }
    // A signal for all does not end it.
    for signal in ["TERM", "INT", "HUP"] {
        kill(u32::try_from(pid)?, signal)?;
    }
    let frozen = guard.freeze(LONG, SOON)?;
    let writer = Writer::that_waits(place.mounted.dir(), "four")?;
    drop(frozen);
    writer.goes_on(SOON)?;
    drop(guard);
    is_gone(u32::try_from(pid)?)?;
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "a zombie");
    place.end()
}

/// req X9: the asker is killed in the middle of a freeze: thawed at once.
#[test]
fn the_asker_is_killed() -> Result<()> {
    let place = Place::new("x09killed")?;
    let (asker, guard) = start_asker(&place, LONG)?;
    let writer = Writer::that_waits(place.mounted.dir(), "file")?;
    let watch = Stopwatch::start();
    asker.signal("KILL")?;
    writer.goes_on(SOON)?;
    println!(
        "figure: thawed {:.3} s after the asker was killed, as a writer sees it",
        watch.seconds()
    );
    is_gone(guard)?;
    place.end()
}

/// req X9: the asker is stopped in the middle of a freeze: thawed by the limit, and when it goes on it is told.
#[test]
fn the_asker_is_stopped() -> Result<()> {
    let place = Place::new("x09stopped")?;
    let watch = Stopwatch::start();
    let (asker, _) = start_asker(&place, Duration::from_millis(700))?;
    asker.signal("STOP")?;
    let writer = Writer::start(place.mounted.dir(), "file")?;
    writer.goes_on(SOON)?;
    ensure!(
        watch.elapsed() >= Duration::from_millis(700),
        "thawed before its limit"
    );
    blktide_tests::put(&place.instance.join("go"), "")?;
    asker.signal("CONT")?;
    let done = asker.finish()?.ok()?;
    ensure!(done.stdout.contains("ended Err(Expired"), "{}", done.stdout);
    place.end()
}

/// req X9: an asker that forgets: the limit thaws, it can know, and it is told. The same guard freezes again.
#[test]
fn a_limit_that_is_over() -> Result<()> {
    let place = Place::new("x09limit")?;
    let mut guard = place.guard()?;
    let frozen = guard.freeze(Duration::from_millis(50), SOON)?;
    wait_until("the freeze is over", SOON, || Ok(frozen.is_over()))?;
    Writer::start(place.mounted.dir(), "file")?.goes_on(SOON)?;
    match frozen.thaw() {
        Err(GuardError::Expired { frozen }) => {
            println!("figure: frozen {frozen:?} with a limit of 50 ms");
            ensure!(frozen >= Duration::from_millis(50));
        }
        other => bail!("{other:?}"),
    }
    guard.freeze(LONG, SOON)?.thaw()?;
    drop(guard);
    place.end()
}

/// req X9: the guard is killed, or stopped, in the middle of a freeze: the asker thaws by its own descriptor.
#[test]
fn the_guard_is_lost() -> Result<()> {
    let place = Place::new("x09lost")?;
    for signal in ["KILL", "STOP"] {
        let mut guard = place.guard()?;
        let pid = u32::try_from(guard.pid())?;
        let frozen = guard.freeze(LONG, SOON)?;
        let writer = Writer::that_waits(place.mounted.dir(), signal)?;
        kill(pid, signal)?;
        match frozen.thaw() {
            Err(GuardError::Lost { thawed: true }) => {}
            other => bail!("{signal}: {other:?}"),
        }
        writer.goes_on(SOON)?;
        ensure!(matches!(
            guard.freeze(LONG, SOON),
            Err(GuardError::Lost { thawed: false })
        ));
        drop(guard);
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "a zombie");
    }
    let mut guard = place.guard()?;
    let pid = u32::try_from(guard.pid())?;
    let frozen = guard.freeze(LONG, SOON)?;
    let writer = Writer::that_waits(place.mounted.dir(), "dropped")?;
    kill(pid, "KILL")?;
    drop(frozen);
    writer.goes_on(SOON)?;
    drop(guard);
    place.end()
}

/// req X9: an asker that will not wait for a long freezing call gives up, and may go: it is thawed when the call returns,
/// by the guard, or, if that is killed meanwhile, by the asker's process.
/// trap TE4: failure to freeze is an error, not a hang.
#[test]
fn a_freeze_that_is_given_up() -> Result<()> {
    let place = Place::new("x09slow")?;
    let at = place.mounted.dir().to_owned();
    for round in ["alone", "killed"] {
        let mut guard = place.guard()?;
        let pid = u32::try_from(guard.pid())?;
        // For the freezing call to write.
        File::create(at.join("large"))?.write_all(&vec![7; 64 << 20])?;
        match guard.freeze(LONG, Duration::ZERO) {
            Err(GuardError::Slow { .. }) => {}
            other => bail!("{other:?}"),
        }
        ensure!(matches!(
            guard.freeze(LONG, SOON),
            Err(GuardError::Lost { thawed: false })
        ));
        if round == "killed" {
            kill(pid, "KILL")?;
        }
        drop(guard);
        wait_until("the guard ends", SOON, || {
            Ok(!Path::new(&format!("/proc/{pid}")).exists())
        })?;
        Writer::start(&at, round)?.goes_on(SOON)?;
        wait_until("nobody has it open", SOON, || {
            let open = fs::read_dir("/proc/self/fd")?.flatten();
            Ok(!open
                .into_iter()
                .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == at)))
        })?;
    }
    place.end()
}

/// req X9: what somebody else thaws is no instant; what somebody else has frozen is an error, and stays frozen.
#[test]
fn somebody_else_freezes_and_thaws() -> Result<()> {
    let place = Place::new("x09another")?;
    let at = place.mounted.dir().to_owned();
    let mut guard = place.guard()?;
    let frozen = guard.freeze(LONG, SOON)?;
    fsfreeze("--unfreeze", &at)?;
    match frozen.thaw() {
        Err(GuardError::ThawedByAnother) => {}
        other => bail!("{other:?}"),
    }
    let another = Another::freezes(&at)?;
    match guard.freeze(LONG, SOON) {
        Err(GuardError::Freeze(FreezeError::AlreadyFrozen)) => {}
        other => bail!("{other:?}"),
    }
    drop(guard);
    let writer = Writer::that_waits(&at, "file")?;
    another.thaws()?;
    writer.goes_on(SOON)?;
    let tmpfs = Mounted::new(
        Path::new("none"),
        &place.instance.join("memory"),
        &["-t", "tmpfs"],
    )?;
    let mut guard = Guard::start(&program()?, File::open(tmpfs.dir())?.into())?;
    match guard.freeze(LONG, SOON) {
        Err(GuardError::Freeze(FreezeError::NotSupported)) => {}
        other => bail!("{other:?}"),
    }
    drop(guard);
    tmpfs.unmount()?;
    place.end()
}

/// trap TE3: a file system that is mounted in a container only is found, opened, and frozen.
#[test]
fn a_mount_of_another_namespace() -> Result<()> {
    let place = Place::new("x09inside")?;
    let at = place.mounted.dir().to_owned();
    let inside = Tool::new("unshare")
        .args(["--mount", "--propagation", "private", "sleep", "100"])
        .start()?;
    let pid = inside.pid();
    wait_until("its mounts are its own", SOON, || {
        let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt"));
        Ok(of(pid)? != of(std::process::id())?)
    })?;
    let Place {
        mounted,
        device,
        instance,
    } = place;
    mounted.unmount()?;
    let found = BlockDevice::at(device.path())?;
    ensure!(found.mounts()?.is_empty());
    let everywhere = found.mounts_anywhere()?;
    let [mount] = everywhere.as_slice() else {
        bail!("{everywhere:?}");
    };
    ensure!(
        mount.mount.at == at && mount.through == Some(i32::try_from(pid)?),
        "{mount:?}"
    );
    let mut guard = Guard::start(&program()?, mount.open()?)?;
    let frozen = guard.freeze(LONG, SOON)?;
    let writer = Writer::that_waits(&mount.path, "file")?;
    frozen.thaw()?;
    writer.goes_on(SOON)?;
    drop(guard);
    drop(inside);
    wait_until("nobody has it mounted", SOON, || {
        Ok(found.mounts_anywhere()?.is_empty())
    })?;
    FileSystem::Ext4.check(device.path())?;
    drop(device);
    drop(instance);
    Ok(())
}

/// req X9: many freezes of a busy file system: none writes a byte, and it is without fault afterwards.
#[test]
fn many_freezes_of_a_busy_file_system() -> Result<()> {
    let place = Place::new("x09many")?;
    let mut guard = place.guard()?;
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let at = place.mounted.dir();
    let ended = std::thread::scope(|scope| -> Result<Vec<Thawed>> {
        let writers = [1, 2].map(|n| {
            scope.spawn({
                let (stop, written) = (&stop, &written);
                move || keep_writing(&at.join(n.to_string()), n, stop, written)
            })
        });
        let ended = freeze_often(&place, &mut guard, &written);
        stop.store(true, Ordering::SeqCst);
        for writer in writers {
            match writer.join() {
                Ok(ended) => ended?,
                Err(_) => bail!("a writer panicked"),
            }
        }
        ended
    })?;
    drop(guard);
    println!(
        "figure: {} freezes of a busy ext4, call {}, frozen {}; {} files written",
        ended.len(),
        middle_and_longest(ended.iter().map(|t| t.call)),
        middle_and_longest(ended.iter().map(|t| t.frozen)),
        written.load(Ordering::SeqCst)
    );
    place.end()
}

fn freeze_often(place: &Place, guard: &mut Guard, written: &AtomicU64) -> Result<Vec<Thawed>> {
    let mut seed = Seed::of("x09", 0x0909)?;
    let folder = File::open(place.mounted.dir())?;
    let mut ended = Vec::new();
    for _ in 0..count(50, 2000) {
        let before = written.load(Ordering::SeqCst);
        wait_until("writers write", SOON, || {
            Ok(written.load(Ordering::SeqCst) > before)
        })?;
        blktide_sys::fs::sync_file_system(&folder)?;
        let frozen = guard.freeze(LONG, SOON)?;
        let before = DeviceCounters::of(place.device.path())?;
        pass(Duration::from_micros(seed.below(8000)));
        let after = DeviceCounters::of(place.device.path())?;
        ended.push(frozen.thaw()?);
        ensure!(
            before.written_bytes == after.written_bytes,
            "{before:?} {after:?}"
        );
    }
    Ok(ended)
}

fn keep_writing(folder: &Path, seed: u64, stop: &AtomicBool, written: &AtomicU64) -> Result<()> {
    fs::create_dir(folder)?;
    let mut seed = Seed::of("x09writer", seed)?;
    while !stop.load(Ordering::SeqCst) {
        let path = folder.join(seed.below(40).to_string());
        let bytes = vec![u8::try_from(seed.below(256))?; usize::try_from(seed.below(200_000))?];
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        match seed.below(4) {
            0 => file.sync_all()?,
            1 => fs::remove_file(&path)?,
            _ => {}
        }
        written.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

fn middle_and_longest(times: impl Iterator<Item = Duration>) -> String {
    let mut all: Vec<Duration> = times.collect();
    all.sort();
    let middle = all.get(all.len() / 2).copied().unwrap_or_default();
    let longest = all.last().copied().unwrap_or_default();
    format!("{middle:.1?} in the middle, {longest:.1?} at most")
}
