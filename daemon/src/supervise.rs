//! Volumes without systemd: started detached, dead keepers replaced.
//!
//! ```text
//!   attach ──▶ `blktided volume NAME` in a group of its own ──▶ (attached) ──▶ a thread waits for the keeper's death
//!                                                                                 └─ server lives → a new keeper adopts it
//! ```
//! **Invariant**: the daemon's end touches no volume: they are no part of its process group, and hold none of its descriptors.

use crate::backup::{volume_failure, volume_of};
use crate::daemon::Shared;
use crate::volume::options;
use crate::{records, tracked};
use blktide_api::config::{Attach, Config, Mode, VolumeConfig};
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::name::Name;
use blktide_api::status::warning_text;
use blktide_sys::event::pause;
use blktide_sys::process::PidFd;
use blktide_volume::message::{VolumeState, VolumeStatus};
use blktide_volume::{VolumeClient, VolumeError};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(5);
const ATTACH_LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

/// Facts of a volume that has a server.
fn served(config: &Config, name: &Name) -> Result<VolumeStatus, VolumeError> {
    VolumeClient::connect(&config.runtime_dir, name.as_str(), LIMIT)?.status()
}

/// Attaches a volume, or sees that it is. Waits until its node can be mounted.
pub(crate) fn attach(shared: &Arc<Shared>, name: &Name) -> Result<Vec<String>, Failure> {
    let config = shared.config();
    let volume = volume_of(&config, name)?;
    let order = shared.order_of(name);
    let _one_at_a_time = order
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if volume.mode == Mode::Watch {
        return attach_watched(shared, &config, volume);
    }
    let node = config.node(name);
    if let Ok(status) = served(&config, name)
        && status.state == VolumeState::Attached
        && status.keeper_pid != 0
    {
        watch(shared, name);
        return Ok(vec![format!(
            "{name} is attached already: {}",
            node.display()
        )]);
    }
    let attached =
        start(shared, &config, name).and_then(|child| await_attached(shared, &config, name, child));
    match attached {
        Ok(status) => {
            shared.forget_failure(name);
            records::send_hints(&config, name);
            watch(shared, name);
            let mut lines = vec![format!("{name} is attached: {}", node.display())];
            lines.extend(
                status
                    .warnings
                    .iter()
                    .map(|w| format!("warning: {}", warning_text(w))),
            );
            Ok(lines)
        }
        Err(failure) => {
            shared.remember_failure(name, &failure.message);
            Err(failure)
        }
    }
}

/// Begins to watch a volume: the kernel does it from there on, and no process stays for it.
fn attach_watched(
    shared: &Shared,
    config: &Config,
    volume: &VolumeConfig,
) -> Result<Vec<String>, Failure> {
    let name = &volume.name;
    let say = |text: &str| tracing::info!(volume = %name, "{text}");
    let device = volume.device.display();
    match blktide_watch::attach(&options(config, volume), LIMIT, &say) {
        Ok(how) => {
            shared.forget_failure(name);
            records::send_hints(config, name);
            let already = match how {
                blktide_watch::Attached::Now => "",
                blktide_watch::Attached::Before => " already",
            };
            Ok(vec![format!(
                "{name} is attached{already}: {device} is watched, and used as before"
            )])
        }
        Err(error) => {
            let failure = attach_failure(name, &error);
            shared.remember_failure(name, &failure.message);
            Err(failure)
        }
    }
}

fn attach_failure(name: &Name, error: &VolumeError) -> Failure {
    if matches!(error, VolumeError::Refused { .. }) {
        return volume_failure(name, error);
    }
    let message = format!(
        "{name} could not be attached: {}",
        crate::daemon::chain(error)
    );
    Failure::new(FailureCode::AttachFailed, message).hint("blktidectl doctor says what is missing")
}

fn start(shared: &Shared, config: &Config, name: &Name) -> Result<Child, Failure> {
    let failed = |what: &str, error: &dyn std::error::Error| {
        let message = format!(
            "{name} could not be started: {what}: {}",
            crate::daemon::chain(error)
        );
        Failure::new(FailureCode::AttachFailed, message)
    };
    let folder = config.runtime_dir.join("volumes");
    blktide_sys::fs::create_folders(&folder, 0o755).map_err(|e| failed("its folder", &e))?;
    let log = std::fs::File::create(folder.join(format!("{name}.log")))
        .map_err(|e| failed("its log", &e))?;
    let log_too = log.try_clone().map_err(|e| failed("its log", &e))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("blktided").arg("volume").arg(name.as_str());
    if let Some(file) = &shared.overrides.file {
        command.arg("--config").arg(file);
    }
    command
        .current_dir("/")
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .process_group(0)
        .spawn()
        .map_err(|e| failed("the program", &e))
}

/// Waits until the volume is attached, or its keeper has ended.
fn await_attached(
    shared: &Shared,
    config: &Config,
    name: &Name,
    mut child: Child,
) -> Result<VolumeStatus, Failure> {
    let clock = &shared.environment.clock;
    let deadline = clock.now().after(ATTACH_LIMIT);
    let keeper = child.id();
    loop {
        if let Ok(Some(_ended)) = child.try_wait() {
            return Err(last_words(config, name));
        }
        if let Ok(status) = served(config, name)
            && status.keeper_pid == keeper
            && matches!(
                status.state,
                VolumeState::Attached | VolumeState::PassingThrough
            )
        {
            reap(child, name);
            return Ok(status);
        }
        if clock.now() >= deadline {
            reap(child, name);
            let message = format!(
                "{name} was not attached within {} s",
                ATTACH_LIMIT.as_secs()
            );
            return Err(Failure::new(FailureCode::AttachFailed, message)
                .hint(format!("See {}.", log_path(config, name))));
        }
        if pause(LOOK).is_err() {
            return Err(Failure::new(FailureCode::Failed, "the clock failed"));
        }
    }
}

fn log_path(config: &Config, name: &Name) -> String {
    let file = config
        .runtime_dir
        .join("volumes")
        .join(format!("{name}.log"));
    file.display().to_string()
}

/// Why a keeper ended: the last lines of its log.
fn last_words(config: &Config, name: &Name) -> Failure {
    let path = log_path(config, name);
    let log = std::fs::read(&path).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
    let why = lines.last().copied().unwrap_or("it ended without a word");
    Failure::new(
        FailureCode::AttachFailed,
        format!("{name} could not be attached: {why}"),
    )
    .hint(format!("More in {path}."))
}

/// Takes the child's end, whenever that is.
fn reap(mut child: Child, name: &Name) {
    let name = name.clone();
    let spawned = std::thread::Builder::new()
        .name("reap".to_owned())
        .spawn(move || {
            if let Ok(status) = child.wait() {
                tracing::info!(volume = %name, %status, "a keeper has ended");
            }
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a keeper's end");
    }
}

/// A thread that waits for the keeper's death and starts a new one while the server lives. One a volume.
pub(crate) fn watch(shared: &Arc<Shared>, name: &Name) {
    if !shared.begin_watch(name) {
        return;
    }
    let (shared, name) = (Arc::clone(shared), name.clone());
    let for_failure = (Arc::clone(&shared), name.clone());
    let spawned = std::thread::Builder::new()
        .name("watch".to_owned())
        .spawn(move || {
            keep_watching(&shared, &name);
            shared.end_watch(&name);
        });
    if let Err(error) = spawned {
        for_failure.0.end_watch(&for_failure.1);
        tracing::warn!(%error, "no thread to watch a keeper");
    }
}

fn keep_watching(shared: &Arc<Shared>, name: &Name) {
    let mut tries = 0_u32;
    loop {
        let config = shared.config();
        let keeper = match served(&config, name) {
            Ok(status) => status.keeper_pid,
            // Detached, or both are dead.
            Err(VolumeError::NotAttached { .. }) => {
                note_loss(shared, &config, name);
                return;
            }
            Err(error) => {
                tracing::warn!(volume = %name, %error, "the volume does not answer");
                tries = tries.saturating_add(1);
                if tries > 100 || pause(Duration::from_secs(1)).is_err() {
                    return;
                }
                continue;
            }
        };
        let living = i32::try_from(keeper)
            .ok()
            .filter(|pid| *pid > 0)
            .and_then(|pid| PidFd::open(pid).ok());
        if let Some(living) = living {
            tries = 0;
            if blktide_sys::event::wait_readable(&living, None).is_err() {
                return;
            }
            continue;
        }
        tries = tries.saturating_add(1);
        let wait = Duration::from_millis(50).saturating_mul(tries.min(100));
        if tries > 1 && pause(wait).is_err() {
            return;
        }
        tracing::warn!(volume = %name, "its keeper is dead; a new one adopts its server");
        let order = shared.order_of(name);
        let _one_at_a_time = order
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Err(failure) = start(shared, &config, name)
            .and_then(|child| await_attached(shared, &config, name, child))
        {
            tracing::error!(volume = %name, "no new keeper: {failure}");
        }
    }
}

/// Nobody serves the volume any more although nobody detached it: the node is still there.
fn note_loss(shared: &Shared, config: &Config, name: &Name) {
    if std::fs::symlink_metadata(config.node(name)).is_ok() {
        let why = "keeper and server are both dead; its node gives I/O errors";
        tracing::error!(volume = %name, "{why}");
        shared.remember_failure(name, why);
    }
}

/// Detaches a volume. Waits until its keeper has tidied up. `live`: a watched volume that is in use is let go of, too.
pub(crate) fn detach(
    shared: &Arc<Shared>,
    name: &Name,
    live: bool,
) -> Result<Vec<String>, Failure> {
    let config = shared.config();
    let volume = volume_of(&config, name)?;
    let order = shared.order_of(name);
    let _one_at_a_time = order
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if volume.mode == Mode::Watch {
        return detach_watched(shared, &config, volume, live);
    }
    let mut client = VolumeClient::connect(&config.runtime_dir, name.as_str(), LIMIT)
        .map_err(|e| volume_failure(name, &e))?;
    let keeper = client
        .status()
        .map_err(|e| volume_failure(name, &e))?
        .keeper_pid;
    let keeper = i32::try_from(keeper)
        .ok()
        .filter(|p| *p > 0)
        .and_then(|p| PidFd::open(p).ok());
    client.detach().map_err(|e| volume_failure(name, &e))?;
    if let Some(keeper) = keeper
        && !blktide_sys::event::wait_readable(&keeper, Some(LIMIT)).unwrap_or(false)
    {
        tracing::warn!(volume = %name, "its keeper takes long to end");
    }
    shared.forget_failure(name);
    Ok(vec![format!("{name} is detached; its bitmap is stored")])
}

fn detach_watched(
    shared: &Shared,
    config: &Config,
    volume: &VolumeConfig,
    live: bool,
) -> Result<Vec<String>, Failure> {
    use blktide_watch::{Detached, InUse};
    let name = &volume.name;
    let in_use = if live { InUse::LetGo } else { InUse::Refuse };
    let detached = blktide_watch::detach(&options(config, volume), in_use, LIMIT)
        .map_err(|e| volume_failure(name, &e))?;
    shared.forget_failure(name);
    Ok(vec![match detached {
        Detached::Stored => format!("{name} is detached; its bitmap is stored"),
        Detached::Live => format!(
            "{name} is detached while it was in use: its bitmap is lost, and the next backup reads everything"
        ),
    }])
}

/// At the start: volumes that run are watched, those with `attach = "boot"` attached.
pub(crate) fn attach_all(shared: &Arc<Shared>) {
    let config = shared.config();
    let off = std::fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == "blktide=off"));
    for (name, volume) in &config.volumes {
        match tracked::status_of(&config, volume) {
            Ok(_) => {
                records::send_hints(&config, name);
                if volume.mode != Mode::Watch {
                    watch(shared, name);
                }
            }
            Err(_) if volume.attach == Attach::Boot && off => {
                tracing::warn!(volume = %name, "not attached: blktide=off on the kernel's command line");
            }
            Err(_) if volume.attach == Attach::Boot => attach_at_start(shared, volume),
            Err(_) => {}
        }
    }
}

fn attach_at_start(shared: &Arc<Shared>, volume: &VolumeConfig) {
    let name = &volume.name;
    // What is watched has no process that memory pressure could stop.
    let attached = if volume.mode != Mode::Watch && flusher_is_refused() {
        let why = "attach = \"boot\" is refused: this machine does not let it be an I/O flusher (PR_SET_IO_FLUSHER), so memory pressure could stop it; say attach = \"manual\"";
        shared.remember_failure(name, why);
        Err(Failure::new(FailureCode::AttachFailed, why))
    } else {
        attach(shared, name)
    };
    match attached {
        Ok(lines) => tracing::info!(volume = %name, "{}", lines.join("; ")),
        Err(failure) => tracing::error!(volume = %name, "{failure}"),
    }
}

/// Asked in a thread of its own: what is set there ends with it.
fn flusher_is_refused() -> bool {
    std::thread::spawn(|| blktide_sys::process::set_io_flusher().is_err())
        .join()
        .unwrap_or(true)
}
