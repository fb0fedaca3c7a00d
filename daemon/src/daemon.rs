//! The daemon: what its parts share, its start, its signals, its end.

use crate::config;
use crate::jobs::Jobs;
use crate::notify::notify;
use crate::{process_mark, socket, supervise};
use anyhow::{Context as _, Result, bail};
use blktide_api::config::{Config, Overrides};
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::name::Name;
use blktide_job::environment::{Environment, OpenSessions};
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::{fs, host};
use blktide_types::clock::Random as _;
use blktide_types::id::HostId;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long running jobs have, at the end, to give up.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What all parts share. Locks are taken one at a time, never nested, but for a volume's order.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) overrides: Overrides,
    pub(crate) environment: Environment,
    pub(crate) jobs: Arc<Jobs>,
    config: Mutex<Arc<Config>>,
    /// One attach or detach of a volume at a time; taken before any other lock here.
    orders: Mutex<BTreeMap<Name, Arc<Mutex<()>>>>,
    failures: Mutex<BTreeMap<Name, String>>,
    watched: Mutex<BTreeSet<Name>>,
}

impl Shared {
    /// The configuration of this moment.
    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&lock(&self.config))
    }

    /// The lock under which a volume is attached and detached.
    pub(crate) fn order_of(&self, name: &Name) -> Arc<Mutex<()>> {
        Arc::clone(lock(&self.orders).entry(name.clone()).or_default())
    }

    pub(crate) fn remember_failure(&self, name: &Name, why: &str) {
        lock(&self.failures).insert(name.clone(), why.to_owned());
    }

    pub(crate) fn forget_failure(&self, name: &Name) {
        lock(&self.failures).remove(name);
    }

    /// Volumes that should be there and are not.
    pub(crate) fn failures(&self) -> BTreeMap<Name, String> {
        lock(&self.failures).clone()
    }

    /// True for the one who may watch this volume.
    pub(crate) fn begin_watch(&self, name: &Name) -> bool {
        lock(&self.watched).insert(name.clone())
    }

    pub(crate) fn end_watch(&self, name: &Name) {
        lock(&self.watched).remove(name);
    }

    /// Reads the configuration anew, all or nothing, and says what needs a new start.
    pub(crate) fn reload(&self) -> Result<Vec<String>, Failure> {
        notify("RELOADING=1");
        let loaded = config::load(&self.overrides);
        notify("READY=1");
        let new = loaded.map_err(|error| {
            Failure::new(FailureCode::ConfigInvalid, format!("{error:#}"))
                .hint("The configuration that was in force stays in force.")
        })?;
        let old = self.config();
        let fixed: [(&str, &Path, &Path); 3] = [
            ("runtime_dir", &old.runtime_dir, &new.runtime_dir),
            ("state_dir", &old.state_dir, &new.state_dir),
            ("device_dir", &old.device_dir, &new.device_dir),
        ];
        let mut lines = vec![format!(
            "{} volumes, {} repositories",
            new.volumes.len(),
            new.repositories.len()
        )];
        for (key, old, new) in fixed {
            if old != new {
                lines.push(format!("{key}: takes effect at the next start of blktided"));
            }
        }
        let kept = Config {
            runtime_dir: old.runtime_dir.clone(),
            state_dir: old.state_dir.clone(),
            device_dir: old.device_dir.clone(),
            ..new
        };
        lock(&self.failures).retain(|name, _| kept.volumes.contains_key(name));
        *lock(&self.config) = Arc::new(kept);
        tracing::info!("configuration read anew: {}", lines.join("; "));
        Ok(lines)
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    text
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(option: Option<PathBuf>) -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("BLKTIDE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .without_time()
        .with_target(false)
        .init();
    let overrides = config::overrides(option)?;
    let config = config::load(&overrides)?;
    let _lock = only_one(&config)?;
    let shared = Arc::new(Shared {
        environment: environment(&config)?,
        overrides,
        jobs: Arc::default(),
        config: Mutex::new(Arc::new(config)),
        orders: Mutex::default(),
        failures: Mutex::default(),
        watched: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime")?;
    let result = runtime.block_on(serve(&shared));
    // A thread may hang in the kernel, in a repository that does not answer.
    runtime.shutdown_background();
    result
}

/// Locks the runtime folder for this daemon.
fn only_one(config: &Config) -> Result<File> {
    fs::create_folders(&config.runtime_dir, 0o755)?;
    let path = config.runtime_dir.join("blktided.lock");
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        bail!(
            "another blktided runs with {}",
            config.runtime_dir.display()
        );
    }
    Ok(file)
}

fn environment(config: &Config) -> Result<Environment> {
    let random = SystemRandom::new();
    Ok(Environment {
        clock: Arc::new(SystemClock),
        host: host_id(config, &random)?,
        host_name: host::host_name(),
        process: process_mark::own(),
        is_alive: Arc::new(process_mark::is_alive),
        sessions: Arc::new(OpenSessions::default()),
        random: Arc::new(random),
        on_progress: None,
    })
}

/// The machine's id; where it has none, one of our own that stays.
fn host_id(config: &Config, random: &SystemRandom) -> Result<HostId> {
    if let Ok(id) = host::machine_id() {
        return Ok(id);
    }
    fs::create_folders(&config.state_dir, 0o755)?;
    let path = config.state_dir.join("host-id");
    fs::create_if_absent(&path, HostId(random.id()).to_string().as_bytes(), 0o644)?;
    let text = std::fs::read_to_string(&path).context("host-id")?;
    text.trim().parse().context("host-id")
}

async fn serve(shared: &Arc<Shared>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let listener = listen(&shared.config().socket())?;
    let starting = Arc::clone(shared);
    // Volumes are not waited for: the socket answers while they attach.
    let starter = std::thread::Builder::new().name("start".to_owned());
    starter.spawn(move || {
        supervise::attach_all(&starting);
        notify("STATUS=volumes attached");
    })?;
    notify("READY=1");
    tracing::info!(socket = %shared.config().socket().display(), "ready");
    let server = socket::accept(shared, &listener);
    tokio::pin!(server);
    let mut alive = tokio::time::interval(watchdog_period().unwrap_or(Duration::from_secs(3600)));
    loop {
        tokio::select! {
            () = &mut server => bail!("the control socket failed"),
            _ = alive.tick() => notify("WATCHDOG=1"),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => {
                if let Err(failure) = shared.reload() {
                    tracing::error!("configuration refused, the old one stays: {failure}");
                }
            }
        }
    }
    notify("STOPPING=1");
    let jobs = Arc::clone(&shared.jobs);
    jobs.close();
    let cancelled = tokio::task::spawn_blocking(move || jobs.cancel(None, None, END_LIMIT)).await?;
    tracing::info!(cancelled, "stopped; tracking goes on");
    drop(std::fs::remove_file(shared.config().socket()));
    Ok(())
}

/// Half of what systemd waits for a sign of life, if it does.
fn watchdog_period() -> Option<Duration> {
    let micros: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(micros / 2)).filter(|period| !period.is_zero())
}

fn listen(path: &Path) -> Result<UnixListener> {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("cannot remove {}", path.display()));
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    // Everybody may connect; what they may do is decided by who they are.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
