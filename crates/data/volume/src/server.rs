//! The server's start: what `blktided volume NAME --server ROLE` runs. All it needs is inherited.
//!
//! ```text
//! first:     fence ─▶ hand-over of the bitmap ─▶ threads ─▶ serve
//! takeover:  revoke, counters and gate to 0 ─▶ fence ─▶ threads (each finishes its slots) ─▶ serve
//! ```
//! **Invariant**: no slot is touched and no write submitted before the fence is ours (P6); from its start to its service
//! a successor opens nothing but the backing device (P7).

use crate::bitmap::{self, HandoverDevice, Life, Writers};
use crate::error::VolumeError;
use crate::inherited::{Inherited, read_options};
use crate::log::Log;
use crate::memory::SharedMemory;
use crate::save_area::chain;
use crate::serving::Server;
use crate::start::{Role, Start, word};
use crate::worker::{Bell, Parts, Worker};
use blktide_device::Backing;
use blktide_engine::{Control, Engine};
use blktide_format::shared::{Shape, control};
use blktide_frontend::fuse::FuseFrontend;
use blktide_frontend::slots::Slots;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::event::{EventFd, Signals};
use blktide_sys::fuse::VolumeShape;
use blktide_sys::{mapping, process};
use blktide_types::clock::{Clock, Random};
use blktide_types::id::GenerationName;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a first server waits for the fence: a predecessor's last writes may still be under way.
pub(crate) const FENCE_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a queue thread's stack.
const STACK_BYTES: usize = 256 << 10;

/// Runs a server on the descriptors its keeper has put at their numbers. Returns when the volume has been detached cleanly.
///
/// `arguments`: those after `volume`: name, `--server`, role. Errors: the keeper starts another, or gives the attach up.
pub fn run(arguments: &[String]) -> Result<(), VolumeError> {
    let role = arguments.last().and_then(|word| Role::of_word(word));
    let role = role.ok_or_else(|| VolumeError::Layout {
        why: "a server is started by its keeper only".to_owned(),
    })?;
    let inherited = Inherited::take().map_err(|e| io_error("inherit", e))?;
    let start: Start =
        read_options(&inherited.options).map_err(|e| io_error("read the options", e))?;
    let warnings = harden(&start.options.name);
    let memories = Memories::map(&inherited).map_err(|e| io_error("map", e))?;
    match serve(role, &start, inherited, &memories, warnings) {
        Ok(()) => Ok(()),
        Err(error) => {
            let text = chain(&error);
            let shape = start.shape()?;
            Log::new(memories.control.mapping(), &shape).say(&format!("server: {text}"));
            Err(error)
        }
    }
}

/// The memories that outlive servers, mapped.
#[derive(Debug)]
pub(crate) struct Memories {
    pub(crate) control: Arc<SharedMemory>,
    pub(crate) banks: Arc<SharedMemory>,
    pub(crate) slots: Arc<SharedMemory>,
}

impl Memories {
    pub(crate) fn map(inherited: &Inherited) -> io::Result<Self> {
        let map = |fd: &std::os::fd::OwnedFd| -> io::Result<Arc<SharedMemory>> {
            Ok(Arc::new(SharedMemory::from_fd(fd.try_clone()?)?))
        };
        let memories = Self {
            control: map(&inherited.control)?,
            banks: map(&inherited.banks)?,
            slots: map(&inherited.slots)?,
        };
        memories.control.touch_and_lock()?;
        memories.slots.touch_and_lock()?;
        Ok(memories)
    }
}

fn serve(
    role: Role,
    start: &Start,
    inherited: Inherited,
    memories: &Memories,
    warnings: u64,
) -> Result<(), VolumeError> {
    let shape = start.shape()?;
    let random = SystemRandom::new();
    let fresh = || (GenerationName(random.id()), SystemClock.wall());
    let (shared, banks) = (memories.control.shared(), memories.banks.shared());
    let log = Log::new(memories.control.mapping(), &shape);
    let (engine, mut tracker, backing, life);
    if role == Role::First {
        backing = fence(start, &inherited, Some(FENCE_LIMIT))?;
        engine = Engine::create(&shared, &banks, shape).map_err(engine_error)?;
        tracker = engine.control();
        let device = HandoverDevice::of(&backing)?;
        let sectors = bitmap::sectors_changed(&backing);
        let say = |text: &str| log.say(&format!("server: {text}"));
        let closed = (&device, Writers::None);
        life = bitmap::open(&start.options, closed, &engine, &mut tracker, &say)?;
        if let Some(sectors) = sectors {
            engine.set_word(control::SECTORS_WRITTEN, sectors);
        }
    } else {
        engine = Engine::open(&shared, &banks).map_err(engine_error)?;
        tracker = engine.control();
        tracker.take_over(fresh()).map_err(engine_error)?;
        if role == Role::PassThrough {
            let (name, wall) = fresh();
            tracker.pass_through(wall, name);
            engine.set_word(control::STATE, word::PASSING_THROUGH);
        }
        backing = fence(start, &inherited, None)?;
        life = Life::of_words(&engine);
    }
    engine.set_word(control::WARNINGS, engine.word(control::WARNINGS) | warnings);
    let queues = Queues::start(start, &inherited, memories, (&engine, &shape), &backing)?;
    if role != Role::First {
        note_pause(&engine, &log);
    }
    engine.set_word(control::SERVING, 1);
    Server::new(start.clone(), inherited, (engine, tracker), backing, queues)?
        .with_life(life, log)
        .serve()
}

/// The threads of the queues, and their bells.
pub(crate) struct Queues {
    pub(crate) bells: Vec<Arc<Bell>>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// Rung by a thread at its end, after it has sent how it ended.
    pub(crate) ended: Arc<EventFd>,
    pub(crate) results: Receiver<io::Result<()>>,
    pub(crate) control: Arc<SharedMemory>,
}

impl Queues {
    fn start(
        start: &Start,
        inherited: &Inherited,
        memories: &Memories,
        (engine, shape): (&Engine, &Shape),
        backing: &Backing,
    ) -> Result<Self, VolumeError> {
        let failed = |e: io::Error| io_error("start a queue", e);
        let ended = Arc::new(EventFd::new().map_err(failed)?);
        let (send, results) = channel();
        let mut queues = Self {
            bells: Vec::new(),
            threads: Vec::new(),
            ended,
            results,
            control: Arc::clone(&memories.control),
        };
        let volume = VolumeShape {
            volume_bytes: start.volume_bytes,
            max_write_bytes: u32::try_from(shape.slot_payload_bytes).unwrap_or(4096),
            max_background: u16::try_from(shape.slots).unwrap_or(128),
        };
        let mut workers = Vec::new();
        for number in 0..shape.queues {
            let bell = Arc::new(Bell {
                rings: EventFd::new().map_err(failed)?,
                recovered: AtomicBool::new(false),
            });
            let slots = Slots::of_queue(memories.slots.mapping(), shape, number)
                .ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
            let device = inherited.fuse.try_clone().map_err(failed)?;
            let parts = Parts {
                engine,
                control: Arc::clone(&memories.control),
                number,
                backing,
                frontend: FuseFrontend::new(device, slots.clone(), volume),
                slots,
                bell: Arc::clone(&bell),
            };
            workers.push(Worker::new(parts).map_err(failed)?);
            queues.bells.push(bell);
        }
        for (number, mut worker) in workers.into_iter().enumerate() {
            let mut end = End {
                result: Some(Err(io::Error::other("a queue's thread panicked"))),
                send: send.clone(),
                bell: Arc::clone(&queues.ended),
            };
            let thread = std::thread::Builder::new()
                .name(format!("queue-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || end.note(worker.serve()))
                .map_err(failed)?;
            queues.threads.push(thread);
        }
        Ok(queues)
    }

    /// Wakes all queues: the gate has opened, or a snapshot has ended.
    pub(crate) fn ring(&self) {
        for bell in &self.bells {
            bell.rings.ring();
        }
    }
}

/// Tells the control thread how a queue's thread ended, also if it panics.
struct End {
    result: Option<io::Result<()>>,
    send: Sender<io::Result<()>>,
    bell: Arc<EventFd>,
}

impl End {
    fn note(&mut self, result: io::Result<()>) {
        self.result = Some(result);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // If the control thread is gone, so is the process.
        drop(self.result.take().map(|result| self.send.send(result)));
        self.bell.ring();
    }
}

/// The backing device, ours alone. A first server (`limit`) takes what stands at the path; a successor what its predecessor had,
/// also if the path leads elsewhere by now.
fn fence(
    start: &Start,
    inherited: &Inherited,
    limit: Option<Duration>,
) -> Result<Backing, VolumeError> {
    let deadline = limit.map(|l| SystemClock.now().after(l));
    let place = PathBuf::from(format!("/proc/self/fd/{}", inherited.place.as_raw_fd()));
    let path = if limit.is_some() {
        &start.options.device
    } else {
        &place
    };
    let backing = Backing::open(path, &SystemClock, deadline)
        .map_err(|e| VolumeError::Device { source: e })?;
    let limits = backing.limits();
    let same = limits.volume_bytes == start.volume_bytes
        && limits.logical_sector_bytes == start.logical_sector_bytes
        && is_same(path, &place);
    // A successor goes on in any case: what it can serve it must serve.
    if same || limit.is_none() {
        Ok(backing)
    } else {
        Err(VolumeError::Layout {
            why: "the backing device was changed while it was being attached".to_owned(),
        })
    }
}

fn is_same(a: &Path, b: &Path) -> bool {
    let what = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino(), m.rdev()));
    matches!((what(a), what(b)), (Ok(a), Ok(b)) if a == b)
}

/// Makes this process one that memory pressure does not stop. What is refused becomes a warning.
pub(crate) fn harden(name: &str) -> u64 {
    let refused = |result: io::Result<()>, bit: u64| if result.is_ok() { 0 } else { bit };
    let ignored = [
        process::block_signals(&[Signals::Terminate, Signals::Interrupt, Signals::Reload]),
        process::forbid_core_dumps(),
        process::lift_memory_lock_limit(),
        process::set_thread_name(&format!("blktide-{name}")),
    ];
    debug_assert_eq!(ignored.len(), 4, "none of these stops a server");
    let timeout = blktide_sys::fuse::max_request_timeout_seconds() != 0;
    refused(mapping::lock_all_when_touched(), word::NOT_LOCKED)
        | refused(process::set_io_flusher(), word::NO_FLUSHER)
        | refused(
            process::set_oom_score_adjustment(-1000),
            word::MAY_BE_KILLED,
        )
        | if timeout { word::REQUEST_TIMEOUT } else { 0 }
}

/// How long the volume stood still: from the predecessor's death, as the keeper saw it, to now.
fn note_pause(engine: &Engine, log: &Log) {
    let since = engine.word(control::STARTED_AT);
    let pause = SystemClock.now().0.saturating_sub(since);
    if pause > engine.word(control::LONGEST_PAUSE) {
        engine.set_word(control::LONGEST_PAUSE, pause);
    }
    let left = engine.word(control::LEFT_REQUESTS);
    log.say(&format!(
        "server: took over, {} µs after the death was seen; {left} requests found in slots so far",
        pause / 1000
    ));
}

pub(crate) fn engine_error(source: blktide_engine::EngineError) -> VolumeError {
    VolumeError::Engine { source }
}

pub(crate) fn io_error(what: &'static str, source: io::Error) -> VolumeError {
    VolumeError::Io {
        what,
        path: PathBuf::new(),
        source,
    }
}

/// The tracker of the control thread.
pub(crate) type Tracker = Control;
