//! Other programs, run with a time limit in a process group of their own.
//!
//! Output goes to unlinked files, not pipes: a daemon that a program leaves behind may keep its output open, and a
//! reader of a pipe would wait for it.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::clock::Stopwatch;

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub seconds: f64,
    what: String,
}

impl Finished {
    /// Fails, with all output, unless the exit code is 0.
    pub fn ok(self) -> Result<Self> {
        self.exits(0)
    }

    /// Fails, with all output, unless the exit code is `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == Some(code),
            "{} ended with {:?} (signal {:?}) instead of {code}\n--- stdout\n{}\n--- stderr\n{}",
            self.what,
            self.code,
            self.signal,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }
}

/// A program to run: `Tool::new("fsck").arg("-n")…`.
#[derive(Debug)]
pub struct Tool {
    command: Command,
    limit: Duration,
}

impl Tool {
    /// `program`, found by `PATH` and in the sbin folders; limit 60 s.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command.env("LC_ALL", "C");
        Self {
            command,
            limit: Duration::from_secs(60),
        }
    }

    /// One argument more.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Arguments more.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Takes an environment variable away.
    #[must_use]
    pub fn without_env(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// The folder it runs in.
    #[must_use]
    pub fn folder(mut self, folder: &std::path::Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// The longest it may run, in seconds; then its process group is killed and the run is an error.
    #[must_use]
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<Finished> {
        self.start()?.finish()
    }

    /// Starts it and comes back at once.
    pub fn start(mut self) -> Result<Running> {
        let what = format!("{:?}", self.command);
        let (stdout, stderr) = (scratch()?, scratch()?);
        self.command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone()?)
            .stderr(stderr.try_clone()?)
            .process_group(0);
        let child = self.command.spawn().with_context(|| what.clone())?;
        let pid = child.id();
        Ok(Running {
            pid,
            ended: wait_in_thread(child)?,
            stdout,
            stderr,
            limit: self.limit,
            watch: Stopwatch::start(),
            what,
            over: false,
        })
    }
}

/// A program that runs beside the test. Dropped before its end, its process group is killed.
#[derive(Debug)]
pub struct Running {
    pid: u32,
    ended: Receiver<std::io::Result<ExitStatus>>,
    stdout: File,
    stderr: File,
    limit: Duration,
    watch: Stopwatch,
    what: String,
    over: bool,
}

impl Running {
    /// Its process id, which is its group's as well.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends `signal` ("INT", "KILL") to it alone.
    pub fn signal(&self, signal: &str) -> Result<()> {
        kill(self.pid, signal)
    }

    /// What it has written to its standard output so far.
    pub fn output(&mut self) -> Result<String> {
        text(&mut self.stdout)
    }

    /// Whether it still runs.
    pub fn runs(&self) -> bool {
        std::path::Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    /// Waits for its end, up to the limit counted from its start.
    pub fn finish(mut self) -> Result<Finished> {
        let left = self.limit.saturating_sub(self.watch.elapsed());
        let status = match self.ended.recv_timeout(left) {
            Ok(status) => status?,
            Err(RecvTimeoutError::Timeout) => {
                self.kill_group();
                bail!(
                    "{} still ran after {} s\n--- stdout\n{}\n--- stderr\n{}",
                    self.what,
                    self.limit.as_secs(),
                    text(&mut self.stdout)?,
                    text(&mut self.stderr)?
                );
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{}: its waiter is gone", self.what),
        };
        self.over = true;
        Ok(Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: text(&mut self.stdout)?,
            stderr: text(&mut self.stderr)?,
            seconds: self.watch.seconds(),
            what: self.what.clone(),
        })
    }

    fn kill_group(&mut self) {
        if !self.over {
            self.over = true;
            let group = format!("-{}", self.pid);
            let killed = Command::new("kill").args(["-KILL", "--", &group]).status();
            drop(killed);
            drop(self.ended.recv_timeout(Duration::from_secs(20)));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
    }
}

/// Sends `signal` ("KILL", "STOP") to one process.
pub fn kill(pid: u32, signal: &str) -> Result<()> {
    let status = Command::new("kill")
        .arg(format!("-{signal}"))
        .arg(pid.to_string())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "no process {pid} to send {signal} to");
    Ok(())
}

/// Process ids whose command line or environment bears `text`, or that have a file open whose path does, ascending;
/// the caller's own is left out.
pub fn pids_naming(text: &str) -> Vec<u32> {
    let own = std::process::id();
    let mut found: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own && concerns(*pid, text))
        .collect();
    found.sort_unstable();
    found
}

fn concerns(pid: u32, text: &str) -> bool {
    let opened = || {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        descriptors
            .filter_map(|d| fs::read_link(d.path()).ok())
            .any(|path| path.to_string_lossy().contains(text))
    };
    bears(pid, "cmdline", text) || bears(pid, "environ", text) || opened()
}

fn bears(pid: u32, file: &str, text: &str) -> bool {
    fs::read(format!("/proc/{pid}/{file}"))
        .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
}

fn wait_in_thread(mut child: Child) -> Result<Receiver<std::io::Result<ExitStatus>>> {
    let (send, ended) = mpsc::channel();
    thread::Builder::new()
        .name("waiter".to_owned())
        .spawn(move || {
            // Nobody may be listening any more: then nobody wants the status.
            drop(send.send(child.wait()));
        })?;
    Ok(ended)
}

fn scratch() -> Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "blktide-output-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    fs::remove_file(&path)?;
    Ok(file)
}

fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
