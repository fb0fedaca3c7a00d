//! A dead process's writes are not dead: whoever takes over gets the fence after the last of them has landed.
//! needs: root, loop, fuse, ext4
//! limit: 120 s
//!
//! ```text
//!  orphan (killed) ── io_uring write, O_DIRECT ──▶ file on ext4 ──▶ loop device ──▶ FUSE file ──▶ store
//!                                                  or the loop device itself         │
//!                                                          our server keeps the write waiting
//! ```
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_device::{Backing, Outcome, Target, Transfer, Transfers};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::{EventFd, Signals, pause, wait_readable};
use blktide_sys::fence::Fenced;
use blktide_sys::fuse::{
    self, Answer, FuseDevice, NODE_ROOT, Operation, Received, Request, VolumeShape,
};
use blktide_sys::loopdev::{LoopDevice, LoopOptions};
use blktide_sys::mapping::Mapping;
use blktide_sys::memfd::Memfd;
use blktide_sys::process::PidFd;
use blktide_sys::ring::{MemoryRange, Zeroing};
use blktide_sys::{Errno, fs};
use blktide_tests::{FileSystem, Mounted};
use blktide_types::clock::Clock;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const VOLUME_BYTES: u64 = 96 << 20;
const MAX_WRITE: u32 = 256 << 10;
const PAGE: usize = 4096;
const ORPHAN: &str = "BLKTIDE_P06_ORPHAN";
/// What the orphan writes, and where: in the file, or on the device past the file system.
const OLD: [u8; PAGE] = [0x0d; PAGE];
const NEW: [u8; PAGE] = [0xe3; PAGE];

/// A file served through FUSE whose writes can be made to wait, under a loop device.
struct SlowDevice {
    folder: PathBuf,
    mount: PathBuf,
    device: LoopDevice,
    gate: Arc<Gate>,
    server: Option<JoinHandle<Result<()>>>,
}

/// Writes that hold [`OLD`] wait here while it is shut.
#[derive(Default)]
struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicU64,
    gone: AtomicBool,
}

impl Gate {
    fn shut(&self) {
        if let Ok(mut shut) = self.shut.lock() {
            *shut = true;
        }
    }

    fn open(&self) {
        if let Ok(mut shut) = self.shut.lock() {
            *shut = false;
        }
        self.opened.notify_all();
    }

    fn pass(&self) {
        let Ok(mut shut) = self.shut.lock() else {
            return;
        };
        while *shut {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let Ok(again) = self.opened.wait(shut) else {
                return;
            };
            shut = again;
        }
    }
}

impl SlowDevice {
    fn new(name: &str) -> Result<Self> {
        let folder = PathBuf::from(format!(
            "/var/tmp/blktide-test-{name}-{}",
            std::process::id()
        ));
        let mount = folder.join("mount");
        std::fs::create_dir_all(&mount)?;
        let store = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.join("store"))?;
        store.set_len(VOLUME_BYTES)?;
        let fuse_device = FuseDevice::open()?;
        fuse::mount(&fuse_device, &mount, "blktide-test", MAX_WRITE)?;
        let gate = Arc::new(Gate::default());
        let seen = Arc::clone(&gate);
        // Two threads: one may wait at the gate.
        let server = std::thread::spawn(move || serve_by_two(&fuse_device, &store, &seen));
        let volume_file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(mount.join(fuse::VOLUME_FILE))?;
        let options = LoopOptions {
            sector_bytes: 512,
            name: "blktide-test",
            queue_requests: 64,
            max_request_bytes: MAX_WRITE,
        };
        let device = LoopDevice::create(&volume_file, &options)?;
        Ok(Self {
            folder,
            mount,
            device,
            gate,
            server: Some(server),
        })
    }

    fn end(&mut self) -> Result<()> {
        self.gate.open();
        let Some(server) = self.server.take() else {
            return Ok(());
        };
        self.device.clear()?;
        let deadline = SystemClock.now().after(Duration::from_secs(20));
        ensure!(
            self.device.wait_unbound(&SystemClock, deadline)?,
            "the loop device stays bound"
        );
        fuse::unmount(&self.mount, false)?;
        match server.join() {
            Ok(ended) => ended?,
            Err(_) => bail!("the server panicked"),
        }
        ensure!(
            self.gate.gone.load(Ordering::SeqCst),
            "the server saw the end of the connection"
        );
        std::fs::remove_dir_all(&self.folder)?;
        Ok(())
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            eprintln!("left behind in {}: {e:#}", self.folder.display());
        }
    }
}

fn serve_by_two(device: &FuseDevice, store: &std::fs::File, gate: &Gate) -> Result<()> {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| serve(device, store, gate));
        serve(device, store, gate)?;
        match other.join() {
            Ok(ended) => ended,
            Err(_) => bail!("a server thread panicked"),
        }
    })
}

/// One thread: the request stands in the first part of its memory, what is read in the second.
fn serve(device: &FuseDevice, store: &std::fs::File, gate: &Gate) -> Result<()> {
    let place = PAGE - fuse::WRITE_HEADERS_BYTES;
    let payload = usize::try_from(MAX_WRITE)?;
    let memory = Memfd::create("blktide-test", 2 * u64::from(MAX_WRITE) + 8192)?;
    let mapping = Mapping::new(&memory)?;
    mapping.populate(0, mapping.len())?;
    let answers_at = PAGE + payload;
    let shape = VolumeShape {
        volume_bytes: VOLUME_BYTES,
        max_write_bytes: MAX_WRITE,
        max_background: 128,
    };
    loop {
        let capacity = payload + fuse::WRITE_HEADERS_BYTES;
        match device.receive(&mapping, place, capacity)? {
            Received::Gone => {
                gate.gone.store(true, Ordering::SeqCst);
                return Ok(());
            }
            Received::Nothing => continue,
            Received::Request(_) => {}
        }
        let request = Request::decode(&mapping, place, capacity)?;
        let unique = request.unique;
        let answer = match request.operation {
            Operation::Read { offset, len } => {
                let mut bytes = vec![0; usize::try_from(len)?];
                store.read_exact_at(&mut bytes, offset)?;
                mapping.copy_in(answers_at, &bytes);
                device.answer_data(
                    &Answer::data(unique, len),
                    &mapping,
                    answers_at,
                    bytes.len(),
                )?;
                continue;
            }
            Operation::Write { offset, len } => {
                let mut bytes = vec![0; usize::try_from(len)?];
                mapping.copy_out(PAGE, &mut bytes);
                if bytes.starts_with(&OLD) {
                    gate.pass();
                }
                store.write_all_at(&bytes, offset)?;
                Answer::written(unique, len)
            }
            Operation::Fallocate { offset, len, .. } => {
                match fs::zero_range(store, Zeroing::Punch, offset, len) {
                    Ok(()) => Answer::done(unique),
                    Err(e) => Answer::error(unique, Errno::of(&e)),
                }
            }
            Operation::Init(_)
            | Operation::Lookup { .. }
            | Operation::Forget
            | Operation::Interrupt
            | Operation::GetAttr
            | Operation::SetAttr { .. }
            | Operation::Open
            | Operation::OpenDir
            | Operation::Sync
            | Operation::StatFs
            | Operation::Nothing
            | Operation::Destroy
            | Operation::Other(_) => match other_answer(&request, &shape) {
                Some(answer) => answer,
                None => continue,
            },
        };
        device.answer(&answer)?;
    }
}

fn other_answer(request: &Request, shape: &VolumeShape) -> Option<Answer> {
    let unique = request.unique;
    Some(match request.operation {
        Operation::Init(offered) => {
            assert!(
                offered.suffices(),
                "this kernel's FUSE is too old: {offered:?}"
            );
            Answer::init(unique, &offered, shape)
        }
        Operation::Lookup { volume: true } if request.node == NODE_ROOT => {
            Answer::entry(unique, shape)
        }
        Operation::Lookup { .. } => Answer::error(unique, Errno::NOENT),
        Operation::GetAttr | Operation::SetAttr { size: None } => {
            Answer::attr(unique, request.node, shape)
        }
        Operation::SetAttr { size: Some(_) } => Answer::error(unique, Errno::PERM),
        Operation::Open | Operation::OpenDir => Answer::opened(unique),
        Operation::StatFs => Answer::statfs(unique, shape),
        Operation::Nothing | Operation::Sync | Operation::Destroy => Answer::done(unique),
        Operation::Forget | Operation::Interrupt => return None,
        Operation::Other(_) => Answer::error(unique, Errno::NOSYS),
        Operation::Read { .. } | Operation::Write { .. } | Operation::Fallocate { .. } => {
            return None;
        }
    })
}

/// Starts the orphan: it takes the fence on `target`, has one write of [`OLD`] at `offset` in flight, and waits.
fn start_orphan(target: &Path, offset: u64) -> Result<PidFd> {
    let this = std::env::current_exe()?;
    let child = Command::new(this)
        .args(["--exact", "orphan", "--nocapture"])
        .env(ORPHAN, format!("{offset}:{}", target.display()))
        .spawn()?;
    Ok(PidFd::open(i32::try_from(child.id())?)?)
}

/// Not a test by itself: the process that is killed.
#[test]
fn orphan() -> Result<()> {
    let Ok(what) = std::env::var(ORPHAN) else {
        return Ok(());
    };
    let (offset, target) = what.split_once(':').context("offset:path")?;
    let backing = Backing::open(Path::new(target), &SystemClock, Some(SystemClock.now()))?;
    let mut transfers = Transfers::new(&backing, 4)?;
    let mapping = Arc::new(Mapping::new(&Memfd::create("orphan", 4096)?)?);
    ensure!(mapping.copy_in(0, &OLD));
    let memory = transfers.register_memory(mapping)?;
    let from = MemoryRange {
        memory,
        offset: 0,
        len: 4096,
    };
    transfers.start(
        1,
        Target::Backing,
        Transfer::Write {
            offset: offset.parse()?,
            from,
        },
    )?;
    transfers.wait(None)?;
    match transfers.next_event().map(|e| e.outcome) {
        Some(Outcome::Done(result)) => bail!("the write was not kept waiting: {result:?}"),
        other => bail!("killed too late: {other:?}"),
    }
}

/// Kills the orphan while its write waits, and checks that the successor gets the fence after it and not before.
fn takeover(slow: &SlowDevice, target: &Path, offset: u64) -> Result<()> {
    let waiting = slow.gate.waiting.load(Ordering::SeqCst);
    slow.gate.shut();
    let dying = start_orphan(target, offset)?;
    while slow.gate.waiting.load(Ordering::SeqCst) == waiting {
        ensure!(!dying.has_ended()?, "the orphan ended by itself");
        pause(Duration::from_millis(1))?;
    }
    ensure!(Fenced::try_take(target)?.is_none(), "two at once");
    dying.signal(Signals::Kill)?;
    dying.wait()?;
    // The process is gone, its write is not: here an unfenced successor would write NEW and be overwritten.
    for _ in 0..50 {
        ensure!(
            Fenced::try_take(target)?.is_none(),
            "the fence was given while the dead one's write was in flight"
        );
        pause(Duration::from_millis(2))?;
    }
    let soon = SystemClock.now().after(Duration::from_millis(20));
    ensure!(
        Fenced::take(target, &SystemClock, Some(soon)).is_err(),
        "the fence was given too early"
    );
    slow.gate.open();
    let deadline = SystemClock.now().after(Duration::from_secs(30));
    let fenced = Fenced::take(target, &SystemClock, Some(deadline))?;
    let landed = fs::read_aligned(&fenced, offset, PAGE)?;
    ensure!(
        landed[..] == OLD,
        "the orphaned write had not landed when the fence was given"
    );
    fs::write_full(
        &fenced,
        offset,
        &blktide_sys::buffer::AlignedBuffer::padded(&NEW),
    )?;
    let kept = fs::read_aligned(&fenced, offset, PAGE)?;
    ensure!(kept[..] == NEW, "the successor's write was overwritten");
    Ok(())
}

/// req X3: P6, a regular file's `flock` outlives its holder by the last write in flight.
#[test]
fn a_regular_file_is_fenced() -> Result<()> {
    let mut slow = SlowDevice::new("p06-file")?;
    FileSystem::Ext4.make(&slow.device.node())?;
    let mounted = Mounted::new(&slow.device.node(), &slow.folder.join("fs"), &[])?;
    let file = mounted.join("backing");
    std::fs::File::create(&file)?.write_all_at(&vec![1; 8 << 20], 0)?;
    mounted.sync()?;
    for round in 0..3 {
        takeover(&slow, &file, 65536 * round)?;
    }
    mounted.unmount()?;
    FileSystem::Ext4.check(&slow.device.node())?;
    slow.end()
}

/// req X3: P6, the same for a block device's `O_EXCL`.
#[test]
fn a_block_device_is_fenced() -> Result<()> {
    let mut slow = SlowDevice::new("p06-device")?;
    for round in 0..3 {
        takeover(&slow, &slow.device.node(), 1 << (20 + round))?;
    }
    slow.end()
}

/// The other two lean on it.
#[test]
fn the_gate_keeps_writes_waiting() -> Result<()> {
    let gate = Gate::default();
    gate.shut();
    let passed = EventFd::new()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            gate.pass();
            passed.ring();
        });
        let early = wait_readable(&passed, Some(Duration::from_millis(20)));
        gate.open();
        let late = wait_readable(&passed, Some(Duration::from_secs(10)));
        ensure!(!early? && late?, "the gate");
        Ok(())
    })
}
