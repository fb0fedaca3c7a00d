//! What every verb has in common: the options before and after it, and the configuration they lead to.

use blktide_api::client::Client;
use blktide_api::config::{Config, ConfigError, Overrides, ReadFiles};
use blktide_api::failure::{Failure, FailureCode};
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::host;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blktide_job::environment::{Environment, OpenSessions};
use blktide_job::running::OnProgress;
use blktide_repo::ProcessMark;
use blktide_types::id::{BootId, HostId};

/// Options that every verb takes.
#[derive(clap::Args, Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub(crate) struct Common {
    /// The configuration, instead of /etc/blktide/blktide.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Nothing but errors
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// More than usual
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
}

impl Common {
    /// The configuration; the error names file and line.
    pub(crate) fn load(&self) -> Result<Config, Failure> {
        Config::load(&self.overrides(), &Disk).map_err(|error| config_failure(&error))
    }

    /// As [`Self::load`]; where the file that was named is not there, what this machine has in the usual place, if anything.
    pub(crate) fn load_whatever_is_there(&self) -> Result<Config, Failure> {
        let mut overrides = self.overrides();
        let missing = |file: &PathBuf| matches!(std::fs::symlink_metadata(file), Err(e) if e.kind() == io::ErrorKind::NotFound);
        overrides.file = overrides.file.filter(|file| !missing(file));
        Config::load(&overrides, &Disk).map_err(|error| config_failure(&error))
    }

    fn overrides(&self) -> Overrides {
        Overrides::new(self.config.clone(), |name| {
            std::env::var_os(name).map(PathBuf::from)
        })
    }
}

fn config_failure(error: &ConfigError) -> Failure {
    Failure::new(FailureCode::ConfigInvalid, chain(error))
        .hint("mend the file and try again; the daemon goes on with what it has")
}

/// An error with all that caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Configuration files, from the disk.
#[derive(Debug)]
struct Disk;

impl ReadFiles for Disk {
    fn read(&self, path: &Path) -> io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        match std::fs::read_dir(folder) {
            Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// What the jobs that run in this process are given.
pub(crate) fn environment(on_progress: Option<OnProgress>) -> Environment {
    Environment {
        clock: Arc::new(SystemClock),
        random: Arc::new(SystemRandom::new()),
        on_progress,
        // These jobs claim nothing: who they are is never looked at. A rescue system has no machine-id.
        host: host::machine_id().unwrap_or(HostId::NONE),
        host_name: host::host_name(),
        process: ProcessMark {
            boot: host::boot_id().unwrap_or(BootId::NONE),
            pid: std::process::id(),
            start_time: 0,
        },
        is_alive: Arc::new(|_process| true),
        sessions: Arc::new(OpenSessions::default()),
    }
}

/// A connection to the daemon. `limit`: the longest wait for one reply; `None`: as long as it takes.
pub(crate) fn client(config: &Config, limit: Option<Duration>) -> Result<Client, Failure> {
    Client::connect(&config.socket(), limit)
}

/// Makes a running daemon read its configuration again; one that does not run will read it when it starts.
pub(crate) fn reload(config: &Config) -> Result<(), Failure> {
    let outcome = client(config, Some(blktide_api::client::LIMIT))
        .and_then(|mut daemon| daemon.call("Reload", serde_json::json!({})));
    match outcome {
        Err(failure) if failure.code != FailureCode::DaemonUnreachable => Err(failure),
        _ => Ok(()),
    }
}
