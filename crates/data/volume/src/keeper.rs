//! The keeper: holds what must outlive a server, and starts servers.
//!
//! ```text
//! run ─┬─ nobody serves ─▶ Setup (memories, mount, socket) ─▶ first server ─▶ loop device, symlink ─▶ attached
//!      └─ a server lives ─▶ adopt its descriptors
//! watch: server dead ─┬─ ENDED clean ──▶ tidy up, return
//!                     ├─ not attached ─▶ give the attach up
//!                     └─ else ─────────▶ successor at once (after 5 deaths without progress: pass-through)
//!        server hung ───▶ killed
//! ```
//! **Invariant**: from the attach until ENDED is clean somebody holds the connection, the slots and the live bitmap, and
//! a dead server has a successor. The keeper never has the backing device open while a server lives.

mod setup;
mod watch;

use crate::client::VolumeClient;
use crate::error::VolumeError;
use crate::inherited::{FIRST_NUMBER, Inherited, Role, options_in_memory};
use crate::options::VolumeOptions;
use blktide_format::shared::{Shape, control};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::{Signals, Watched, poll};
use blktide_sys::mapping::Mapping;
use blktide_sys::process::{self, Exit, PidFd};
use blktide_sys::spawn::{Launch, Program, launch};
use blktide_types::clock::{Clock, Instant};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use watch::{Deaths, Hung};

/// Control word `ENDED`: the volume was detached, its bitmap stored.
const ENDED_CLEAN: u64 = 1;
/// Control word `ENDED`: the server does not know the memories' layout.
const ENDED_REFUSED: u64 = 2;
/// How often queues are looked at for standing still.
const LOOK: Duration = Duration::from_secs(1);
/// Longest wait for a reply while adopting.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);

/// Runs the keeper of a volume until it is detached: attaches it, or adopts a living server whose keeper is dead.
///
/// Stays in the foreground; logs to standard error. Errors: `AlreadyAttached`, `Layout`, `ServerEnded`, `Io`; then nothing is left
/// mounted or looped.
pub fn run(options: &VolumeOptions) -> Result<(), VolumeError> {
    let lock = setup::lock(options)?;
    harden(&options.name);
    let signals = blktide_sys::event::SignalFd::new(&[
        Signals::Terminate,
        Signals::Interrupt,
        Signals::Reload,
    ]);
    let signals = signals.map_err(|e| setup::io("block signals for", &options.socket(), e))?;
    let mut keeper = match VolumeClient::connect(&options.runtime_dir, &options.name, ADOPT_LIMIT) {
        Ok(client) => Keeper::adopt(options, client)?,
        Err(_) => Keeper::attach(options)?,
    };
    let ended = keeper.watch(&signals);
    drop(lock);
    ended
}

/// What can fail here fails in containers, too: a warning is all.
fn harden(name: &str) {
    let steps: [(&str, io::Result<()>); 5] = [
        ("no core dumps", process::forbid_core_dumps()),
        ("lift the lock limit", process::lift_memory_lock_limit()),
        (
            "lift the descriptor limit",
            process::lift_descriptor_limit(),
        ),
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
    options: VolumeOptions,
    inherited: Inherited,
    /// What the servers before were started from, if that is another build.
    older: Option<Program>,
    control: Arc<Mapping>,
    /// Held in memory only.
    _slots: Mapping,
    _locks: Vec<blktide_sys::spawn::ProgramLock>,
    server: PidFd,
    server_since: Instant,
    deaths: Deaths,
    attaching: Option<setup::Attaching>,
}

impl Keeper {
    fn attach(options: &VolumeOptions) -> Result<Self, VolumeError> {
        let shape = setup::shape(options)?;
        let inherited = setup::fresh(options, &shape)?;
        let made = Self::over(options, inherited, None);
        let mut keeper = made.inspect_err(|_| setup::take_down(options))?;
        keeper
            .start(Role::First)
            .inspect_err(|_| setup::take_down(options))?;
        keeper.attaching = Some(setup::Attaching::start(options, &shape)?);
        Ok(keeper)
    }

    fn adopt(options: &VolumeOptions, mut client: VolumeClient) -> Result<Self, VolumeError> {
        let fail = |e| setup::io("adopt", &options.socket(), io::Error::other(e));
        let own = PidFd::of_self().map_err(fail)?;
        let descriptors = client.adopt(&own)?;
        let mut inherited = Inherited::from_descriptors(descriptors)?;
        let given = inherited.read_options()?;
        let program = Program::this().map_err(fail)?;
        let older = std::mem::replace(&mut inherited.program, program);
        let mut keeper = Self::over(&given, inherited, Some(older))?;
        if keeper.word(control::LOOP_NUMBER) == 0 {
            let shape = keeper
                .shape()
                .ok_or_else(|| setup::layout("the control memory"))?;
            keeper.attaching = Some(setup::Attaching::start(&given, &shape)?);
        }
        say(
            &given.name,
            &format!("adopted server {}", keeper.server.pid()),
        );
        Ok(keeper)
    }

    fn over(
        options: &VolumeOptions,
        mut inherited: Inherited,
        older: Option<Program>,
    ) -> Result<Self, VolumeError> {
        let fail = |e| setup::io("map the memory of", &options.socket(), io::Error::other(e));
        // Servers are handed the options as they are now.
        inherited.options = options_in_memory(options)?;
        let control = Arc::new(Mapping::new(&inherited.control).map_err(fail)?);
        let slots = Mapping::new(&inherited.slots).map_err(fail)?;
        let mut locks = Vec::new();
        let held = [
            control.populate(0, control.len()),
            control.lock(0, control.len()),
            slots.populate(0, slots.len()),
            slots.lock(0, slots.len()),
        ];
        for failed in held.into_iter().filter_map(Result::err) {
            say(&options.name, &format!("memory is not locked: {failed}"));
        }
        match inherited.program.lock() {
            Ok(lock) => locks.push(lock),
            Err(e) => say(&options.name, &format!("the program is not locked: {e}")),
        }
        if !inherited.program.is_in_memory() {
            say(
                &options.name,
                "vm.memfd_noexec: a new server needs the disk that the program lies on",
            );
        }
        let server = inherited
            .other
            .try_clone()
            .map_err(|e| setup::io("watch the server of", &options.socket(), e))?;
        let keeper = Self {
            options: options.clone(),
            inherited,
            older,
            control,
            _slots: slots,
            _locks: locks,
            server,
            server_since: SystemClock.now(),
            deaths: Deaths::default(),
            attaching: None,
        };
        if let Err(e) = blktide_sys::mapping::lock_all() {
            say(&keeper.options.name, &format!("memory is not locked: {e}"));
        }
        keeper.set_word(
            control::KEEPER_PID,
            u64::try_from(process::own_pid()).unwrap_or(0),
        );
        Ok(keeper)
    }

    fn shape(&self) -> Option<Shape> {
        Shape::of_head(|i| self.word(i)).ok()
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

    /// Starts a server; the one before must be dead.
    fn start(&mut self, role: Role) -> Result<(), VolumeError> {
        let fail = |e| {
            setup::io(
                "start a server of",
                &self.options.socket(),
                io::Error::other(e),
            )
        };
        let own = PidFd::of_self().map_err(fail)?;
        let descriptors: Vec<_> = self
            .inherited
            .descriptors(&own)
            .into_iter()
            .zip(FIRST_NUMBER..)
            .collect();
        let words = [
            "@blktided",
            "volume",
            &self.options.name,
            "--server",
            role.word(),
        ];
        let arguments = words.map(OsStr::new);
        let variables = setup::environment();
        let environment: Vec<&OsStr> = variables.iter().map(AsRef::as_ref).collect();
        self.set_word(control::ENDED, 0);
        let started = launch(&Launch {
            program: &self.inherited.program,
            arguments: &arguments,
            environment: &environment,
            descriptors: &descriptors,
            new_session: true,
        });
        self.server = started.map_err(fail)?.process;
        self.server_since = SystemClock.now();
        self.set_word(control::STARTED_AT, self.server_since.0);
        self.set_word(
            control::SERVER_PID,
            u64::try_from(self.server.pid()).unwrap_or(0),
        );
        self.set_word(
            control::STARTS,
            self.word(control::STARTS).saturating_add(1),
        );
        self.set_word(control::FINISHED_AT_START, self.finished());
        Ok(())
    }

    /// Requests finished since the memory was made.
    fn finished(&self) -> u64 {
        self.shape().map_or(0, |shape| {
            watch::sum(
                &self.control,
                &shape,
                blktide_format::shared::queue::FINISHED,
            )
        })
    }

    fn watch(&mut self, signals: &blktide_sys::event::SignalFd) -> Result<(), VolumeError> {
        let mut hung = Hung::default();
        loop {
            let mut watched = vec![Watched::readable(&self.server), Watched::readable(signals)];
            if let Some(attaching) = &self.attaching {
                watched.push(Watched::readable(attaching.bell()));
            }
            poll(&mut watched, Some(LOOK))
                .map_err(|e| setup::io("watch the server of", &self.options.socket(), e))?;
            while let Ok(Some(signal)) = signals.take() {
                say(
                    &self.options.name,
                    &format!("{signal:?} is ignored while the volume is attached: detach it"),
                );
            }
            self.look_at_attach()?;
            if let Ok(Some(exit)) = self.server.try_wait() {
                hung = Hung::default();
                if self.server_ended(exit)? {
                    return Ok(());
                }
            } else if let Some(shape) = self.shape()
                && hung.look(&self.control, &shape, SystemClock.now())
            {
                say(
                    &self.options.name,
                    &format!("server {} hangs: killed", self.server.pid()),
                );
                // Its end is seen in the next turn; if it has ended by itself, too.
                drop(self.server.signal(Signals::Kill));
            }
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
        match result {
            Ok(done) => {
                self.set_word(control::FRONTEND, done.connection);
                self.set_word(
                    control::LOOP_NUMBER,
                    u64::from(done.device.number()).saturating_add(1),
                );
                if let Some(state) = self.cell(control::STATE) {
                    // Unless the server is passing through, or is being detached already.
                    let _was = state.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst);
                }
                say(
                    &self.options.name,
                    &format!(
                        "attached: {} → {}",
                        self.options.node().display(),
                        done.device.node().display()
                    ),
                );
                Ok(())
            }
            Err(e) => {
                drop(self.server.signal(Signals::Kill));
                drop(self.server.wait());
                setup::take_down(&self.options);
                Err(e)
            }
        }
    }

    /// True if the volume is detached.
    fn server_ended(&mut self, exit: Exit) -> Result<bool, VolumeError> {
        let ended = self.word(control::ENDED);
        if ended == ENDED_CLEAN {
            setup::remove_names(&self.options);
            say(&self.options.name, "detached");
            return Ok(true);
        }
        if self.word(control::LOOP_NUMBER) == 0 && self.attaching.is_some() {
            // Nobody uses the volume yet: better no volume than one that keeps dying.
            setup::take_down(&self.options);
            return Err(VolumeError::ServerEnded {
                name: self.options.name.clone(),
                why: watch::last_words(&self.control, exit),
            });
        }
        if ended == ENDED_REFUSED
            && let Some(older) = self.older.take()
        {
            say(
                &self.options.name,
                "this build does not know the memory: going on with the one before",
            );
            self.inherited.program = older;
        }
        let pid = self.server.pid();
        let lived = SystemClock.now().since(self.server_since);
        let progress = self.finished() != self.word(control::FINISHED_AT_START);
        let step = self.deaths.count(lived, progress);
        self.set_word(control::DEATHS_IN_ROW, u64::from(self.deaths.in_row()));
        if let Some(pause) = step.pause {
            blktide_sys::event::pause(pause)
                .map_err(|e| setup::io("wait for", &self.options.socket(), e))?;
        }
        let died = SystemClock.now();
        while let Err(e) = self.start(step.role) {
            // Out of processes or memory: the volume stands still until this succeeds.
            say(
                &self.options.name,
                &format!("cannot start a server, trying again: {e}"),
            );
            blktide_sys::event::pause(LOOK)
                .map_err(|e| setup::io("wait for", &self.options.socket(), e))?;
        }
        let took = SystemClock.now().since(died);
        say(
            &self.options.name,
            &format!(
                "server {pid} died ({exit:?}): {} started as {} in {took:?}",
                self.server.pid(),
                step.role.word()
            ),
        );
        Ok(false)
    }
}
