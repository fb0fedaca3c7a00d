//! The keeper: holds what must outlive a server, and starts servers.
//!
//! ```text
//! run ─┬─ nobody serves ─▶ Setup (memories, mount, socket) ─▶ first server ─▶ loop device, noted, symlink ─▶ attached
//!      └─ a server lives ─▶ adopt its descriptors
//! watch: server dead ─┬─ ENDED clean ──▶ tidy up, return
//!                     ├─ not attached ─▶ give the attach up
//!                     ├─ connection over, and nobody detached ─▶ tidy up, error
//!                     └─ else ─────────▶ successor at once (a new build without progress: the build before;
//!                                        after 5 deaths without progress: pass-through)
//!        server hung ───▶ killed
//! ```
//! **Invariant**: from the attach until ENDED is clean somebody holds the connection, the slots and the live bitmap, and
//! a dead server has a successor. The keeper never has the backing device open while a server lives.

mod setup;
mod watch;

use crate::client::VolumeClient;
use crate::error::VolumeError;
use crate::inherited::{FIRST_NUMBER, Inherited, read_options};
use crate::log::Log;
use crate::options::VolumeOptions;
use crate::save_area::chain;
use crate::server::FENCE_LIMIT;
use crate::start::{Role, Start, word};
use blktide_format::shared::{Shape, control, queue};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::{SignalFd, Signals, Watched, pause, poll};
use blktide_sys::loopdev::LoopDevice;
use blktide_sys::mapping::Mapping;
use blktide_sys::memfd::Memfd;
use blktide_sys::process::{self, Exit, PidFd};
use blktide_sys::spawn::{Launch, Program, ProgramLock, launch};
use blktide_types::clock::{Clock, Instant};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use watch::{Deaths, Fate, Hung, Older};

/// How often queues are looked at for standing still.
const LOOK: Duration = Duration::from_secs(1);
/// Before ordinary programs, which wait for their I/O meanwhile.
const NICENESS: i32 = -10;
/// Longest wait for a reply while adopting.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);

/// Runs the keeper of a volume until it is detached: attaches it, or adopts a living server whose keeper is dead.
///
/// Stays in the foreground; logs to standard error. Errors: `AlreadyAttached`, `Layout`, `ServerEnded`, `Io`; then nothing is left
/// mounted or looped.
pub fn run(options: &VolumeOptions) -> Result<(), VolumeError> {
    let lock = setup::lock(options)?;
    harden(&options.name);
    let caught = [Signals::Terminate, Signals::Interrupt, Signals::Reload];
    let signals = SignalFd::new(&caught);
    let signals = signals.map_err(|e| setup::io("block signals for", &options.socket(), e))?;
    let mut keeper = match VolumeClient::connect(&options.runtime_dir, &options.name, ADOPT_LIMIT) {
        Ok(client) => Keeper::adopt(options, client)?,
        Err(e) if setup::nobody_listens(&e) => Keeper::attach(options)?,
        Err(e) => return Err(e),
    };
    let ended = keeper.watch(&signals);
    drop(lock);
    ended
}

/// What can fail here fails in containers, too: a warning is all.
fn harden(name: &str) {
    let steps: [(&str, io::Result<()>); 6] = [
        ("no core dumps", process::forbid_core_dumps()),
        ("lift the lock limit", process::lift_memory_lock_limit()),
        (
            "lift the descriptor limit",
            process::lift_descriptor_limit(),
        ),
        // Servers inherit it. On a machine that is all busy a takeover otherwise waits for its turn, and all I/O with it.
        ("niceness", process::set_niceness(NICENESS)),
        ("OOM score", process::set_oom_score_adjustment(-1000)),
        ("I/O flusher", process::set_io_flusher()),
    ];
    for (what, done) in steps {
        if let Err(e) = done {
            say(name, &format!("{what}: {e}"));
        }
    }
    if let Err(e) = process::set_thread_name("blktide-keeper") {
        say(name, &format!("thread name: {e}"));
    }
}

/// A line on standard error, if that takes it at once: the keeper waits for no reader of its log.
fn say(name: &str, what: &str) {
    let stderr = io::stderr();
    let mut ready = [Watched::writable(&stderr)];
    if poll(&mut ready, Some(Duration::ZERO)).is_ok_and(|n| n > 0) {
        // A log that is gone is no reason to stop.
        drop(writeln!(stderr.lock(), "blktide: volume {name}: {what}"));
    }
}

struct Keeper {
    start: Start,
    shape: Shape,
    inherited: Inherited,
    older: Older,
    control: Arc<Mapping>,
    log: Log,
    /// Held in memory only.
    _slots: Mapping,
    _lock: Option<ProgramLock>,
    server: PidFd,
    server_since: Instant,
    deaths: Deaths,
    attaching: Option<setup::Attaching>,
    /// Found as it is: it may be in use, so that nothing of it is taken away.
    adopted: bool,
}

impl Keeper {
    fn attach(options: &VolumeOptions) -> Result<Self, VolumeError> {
        let start = setup::start(options)?;
        let shape = start.shape()?;
        setup::refuse_if_served(options, FENCE_LIMIT)?;
        let inherited = setup::fresh(&start, &shape)?;
        let made = Self::over(start, inherited);
        let mut keeper = made.inspect_err(|_| setup::take_down(options))?;
        let begun = keeper
            .start(Role::First, SystemClock.now())
            .and_then(|()| setup::Attaching::start(options, &shape));
        keeper.attaching = Some(begun.inspect_err(|_| keeper.give_up())?);
        Ok(keeper)
    }

    fn adopt(options: &VolumeOptions, mut client: VolumeClient) -> Result<Self, VolumeError> {
        let fail = |e| setup::io("adopt", &options.socket(), e);
        let own = PidFd::of_self().map_err(|e| fail(io::Error::other(e)))?;
        let descriptors = client.adopt(&own)?;
        let mut inherited = Inherited::from_descriptors(descriptors).map_err(fail)?;
        // What it was attached with: nothing of it changes until it is detached.
        let start: Start = read_options(&inherited.options).map_err(fail)?;
        let program = Program::this().map_err(|e| fail(io::Error::other(e)))?;
        let older = std::mem::replace(&mut inherited.program, program);
        let mut keeper = Self::over(start, inherited)?;
        keeper.older = Older::new(older);
        keeper.adopted = true;
        let number = keeper.word(control::LOOP_NUMBER).checked_sub(1);
        if let Some(number) = number.and_then(|n| u32::try_from(n).ok()) {
            keeper.expose_adopted(LoopDevice::of_number(number));
        } else if keeper.word(control::CLOSING) != word::CLEARED {
            let attaching = setup::Attaching::start(&keeper.start.options, &keeper.shape)?;
            keeper.attaching = Some(attaching);
        }
        keeper.say(&format!("adopted server {}", keeper.server.pid()));
        Ok(keeper)
    }

    fn over(start: Start, inherited: Inherited) -> Result<Self, VolumeError> {
        let shape = start.shape()?;
        let socket = start.options.socket();
        let fail = |e| setup::io("map the memory of", &socket, e);
        let map = |fd: &OwnedFd| -> io::Result<Mapping> {
            let memory = Memfd::from_fd(fd.try_clone()?).map_err(io::Error::other)?;
            Mapping::new(&memory).map_err(io::Error::other)
        };
        let control = Arc::new(map(&inherited.control).map_err(fail)?);
        let slots = map(&inherited.slots).map_err(fail)?;
        let server = inherited.other.try_clone().map_err(fail)?;
        let lock = inherited.program.lock();
        let mut warnings = 0;
        for part in [&*control, &slots] {
            if part
                .populate(0, part.len())
                .and_then(|()| part.lock(0, part.len()))
                .is_err()
            {
                warnings |= word::NOT_LOCKED;
            }
        }
        if lock.is_err() || blktide_sys::mapping::lock_all().is_err() {
            warnings |= word::NOT_LOCKED;
        }
        if !inherited.program.is_in_memory() {
            warnings |= word::ON_DISK;
        }
        let keeper = Self {
            log: Log::new(&control, &shape),
            start,
            shape,
            inherited,
            older: Older::default(),
            control,
            _slots: slots,
            _lock: lock.ok(),
            server,
            server_since: SystemClock.now(),
            deaths: Deaths::default(),
            attaching: None,
            adopted: false,
        };
        for warning in word::warnings(warnings) {
            keeper.say(&warning);
        }
        keeper.set_word(control::WARNINGS, keeper.word(control::WARNINGS) | warnings);
        keeper.set_word(
            control::KEEPER_PID,
            u64::try_from(process::own_pid()).unwrap_or(0),
        );
        Ok(keeper)
    }

    fn say(&self, what: &str) {
        say(&self.start.options.name, what);
    }

    /// What servers have logged goes where our own lines go.
    fn pass_log_on(&mut self) {
        for line in self.log.drain().lines() {
            self.say(line);
        }
    }

    fn io(&self, what: &'static str, source: io::Error) -> VolumeError {
        setup::io(what, &self.start.options.socket(), source)
    }

    fn cell(&self, index: usize) -> Option<&AtomicU64> {
        self.control.words().get(index)
    }

    fn word(&self, index: usize) -> u64 {
        self.cell(index).map_or(0, |w| w.load(Ordering::SeqCst))
    }

    fn set_word(&self, index: usize, value: u64) {
        if let Some(word) = self.cell(index) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Starts a server; the one before must be dead. The volume stands still `since` then.
    fn start(&mut self, role: Role, since: Instant) -> Result<(), VolumeError> {
        let fail = |e: blktide_sys::SysError| self.io("start a server of", io::Error::other(e));
        let own = PidFd::of_self().map_err(fail)?;
        let list = self.inherited.descriptors(&own).into_iter();
        let descriptors: Vec<_> = list.zip(FIRST_NUMBER..).collect();
        let name = &self.start.options.name;
        let arguments = ["@blktided", "volume", name, "--server", role.word()].map(OsStr::new);
        let variables = setup::environment();
        let environment: Vec<&OsStr> = variables.iter().map(AsRef::as_ref).collect();
        self.set_word(control::ENDED, 0);
        self.set_word(control::FINISHED_AT_START, self.finished());
        self.set_word(
            control::STARTS,
            self.word(control::STARTS).saturating_add(1),
        );
        self.set_word(control::STARTED_AT, since.0);
        let started = launch(&Launch {
            program: &self.inherited.program,
            arguments: &arguments,
            environment: &environment,
            descriptors: &descriptors,
            new_session: true,
        });
        self.server = started.map_err(fail)?.process;
        self.server_since = SystemClock.now();
        self.older.note_start();
        self.set_word(
            control::SERVER_PID,
            u64::try_from(self.server.pid()).unwrap_or(0),
        );
        Ok(())
    }

    /// Requests finished since the memory was made.
    fn finished(&self) -> u64 {
        watch::sum(&self.control, &self.shape, queue::FINISHED)
    }

    fn watch(&mut self, signals: &SignalFd) -> Result<(), VolumeError> {
        let mut hung = Hung::default();
        loop {
            let mut watched = vec![Watched::readable(&self.server), Watched::readable(signals)];
            if let Some(attaching) = &self.attaching {
                watched.push(Watched::readable(attaching.bell()));
            }
            poll(&mut watched, Some(LOOK)).map_err(|e| self.io("watch the server of", e))?;
            while let Ok(Some(signal)) = signals.take() {
                self.say(&format!(
                    "{signal:?} is ignored while the volume is attached: detach it"
                ));
            }
            // Before the server's end: that means another thing once the volume is attached.
            self.look_at_attach()?;
            if let Ok(Some(exit)) = self.server.try_wait() {
                hung = Hung::default();
                if self.server_ended(exit)? {
                    return Ok(());
                }
            } else if hung.look(&self.control, &self.shape, SystemClock.now()) {
                self.say(&format!("server {} hangs: killed", self.server.pid()));
                // Its end is seen in the next turn; if it has ended by itself, too.
                drop(self.server.signal(Signals::Kill));
            }
            self.pass_log_on();
        }
    }

    /// Takes the result of the set-up, when there is one.
    fn look_at_attach(&mut self) -> Result<(), VolumeError> {
        let Some(result) = self
            .attaching
            .as_mut()
            .and_then(setup::Attaching::take_result)
        else {
            return Ok(());
        };
        self.attaching = None;
        let done = match result {
            Ok(done) => done,
            Err(e) if self.adopted => {
                self.say(&format!("without a block device: {}", chain(&e)));
                // Attached as far as it can be, so that it can be detached.
                self.set_attached();
                return Ok(());
            }
            Err(e) => {
                self.give_up();
                return Err(e);
            }
        };
        self.set_word(control::FRONTEND, done.connection);
        let number = u64::from(done.device.number());
        self.set_word(control::LOOP_NUMBER, number.saturating_add(1));
        if self.adopted {
            self.expose_adopted(done.device);
            return Ok(());
        }
        let exposed = self.expose(done.device);
        exposed.inspect_err(|_| self.give_up())
    }

    /// Gives the device its name. Only what the shared memory knows of: from now on it is used.
    fn expose(&self, device: LoopDevice) -> Result<(), VolumeError> {
        setup::link(&self.start.options, device)?;
        self.set_attached();
        let (node, device) = (self.start.options.node(), device.node());
        self.say(&format!(
            "attached: {} → {}",
            node.display(),
            device.display()
        ));
        Ok(())
    }

    fn expose_adopted(&self, device: LoopDevice) {
        if let Err(e) = self.expose(device) {
            self.say(&format!("without its name: {}", chain(&e)));
            self.set_attached();
        }
    }

    fn set_attached(&self) {
        if let Some(state) = self.cell(control::STATE) {
            // Unless the server is passing through, or is being detached already.
            let (from, to) = (word::ATTACHING, word::ATTACHED);
            let _was = state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Gives the attach up: nobody uses the volume yet.
    fn give_up(&mut self) {
        if self.server.pid() != process::own_pid() {
            drop(self.server.signal(Signals::Kill));
            drop(self.server.wait());
        }
        self.pass_log_on();
        setup::take_down(&self.start.options);
    }

    fn gone(&self, why: String) -> VolumeError {
        VolumeError::ServerEnded {
            name: self.start.options.name.clone(),
            why,
        }
    }

    /// True if the volume is detached.
    fn server_ended(&mut self, exit: Exit) -> Result<bool, VolumeError> {
        self.pass_log_on();
        let (ended, closing) = (self.word(control::ENDED), self.word(control::CLOSING));
        let over = setup::is_over(&self.inherited.fuse);
        match self.deaths.fate(ended, closing, over) {
            Fate::Detached => {
                setup::remove_names(&self.start.options);
                self.say("detached");
                return Ok(true);
            }
            // Better no volume than one that keeps dying from its first moment: nobody uses it yet.
            _ if self.attaching.is_some() && !self.adopted => {
                setup::take_down(&self.start.options);
                return Err(self.gone(watch::how(exit)));
            }
            Fate::Gone => {
                setup::take_down(&self.start.options);
                return Err(self.gone("its FUSE connection was ended from outside".to_owned()));
            }
            Fate::Successor => {}
        }
        self.succeed(exit).map(|()| false)
    }

    /// Starts the next server.
    fn succeed(&mut self, exit: Exit) -> Result<(), VolumeError> {
        let seen = SystemClock.now();
        let dead = self.server.pid();
        let progress = self.finished() != self.word(control::FINISHED_AT_START);
        let lived = seen.since(self.server_since);
        if let Some(older) = self.older.note_death(lived, progress) {
            self.say("this build's server ended without having served: the build before goes on");
            self.inherited.program = older;
        }
        let step = self.deaths.count(lived, progress);
        self.set_word(control::DEATHS_IN_ROW, u64::from(self.deaths.in_row()));
        if let Some(time) = step.pause {
            pause(time).map_err(|e| self.io("wait for", e))?;
        }
        while let Err(e) = self.start(step.role, seen) {
            // Out of processes or memory: the volume stands still until this succeeds.
            self.say(&format!("cannot start a server, trying again: {e}"));
            pause(LOOK).map_err(|e| self.io("wait for", e))?;
        }
        let took = SystemClock.now().since(seen);
        let (next, role) = (self.server.pid(), step.role.word());
        self.say(&format!(
            "server {dead} died ({}): {next} started as {role} in {took:?}",
            watch::how(exit)
        ));
        Ok(())
    }
}
