//! The demo's own `blktided`: configured, started, and for mode watch ended in between.

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::event::{Signals, pause};
use blktide_sys::fs::create_if_absent;
use blktide_sys::process::PidFd;
use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::super::traces;
use super::Story;

/// How often it is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(20);
/// And how many times.
const LOOKS: u32 = 1000;

impl Story {
    /// Starts it, the first time with everything that it needs; it answers.
    pub(super) fn start_daemon(&self) -> Result<Child> {
        let again = self.path("blktide.toml").exists();
        if !again {
            self.configure()?;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("blktided.log"))?;
        let mut daemon = Command::new(self.programs.join("blktided"))
            .arg("--config")
            .arg(self.path("blktide.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("blktided")?;
        let socket = self.path("run/blktide.sock");
        for _ in 0..LOOKS {
            if UnixStream::connect(&socket).is_ok() {
                self.tell(&if again {
                    format!("blktided runs again, process {}", daemon.id())
                } else {
                    format!(
                        "blktided runs, process {}, configuration and sockets in the folder",
                        daemon.id()
                    )
                });
                return Ok(daemon);
            }
            if let Some(status) = daemon.try_wait()? {
                bail!("blktided ended: {status}");
            }
            pause(LOOK)?;
        }
        bail!("blktided does not answer");
    }

    fn configure(&self) -> Result<()> {
        for name in ["run", "state", "volumes.d", "repositories.d", "dev", "save"] {
            fs::create_dir(self.path(name))?;
        }
        let root = self.folder.display();
        // A machine that is busy may not keep the usual 100 ms of a freeze; how long it was is told.
        let text = format!(
            "runtime_dir = \"{root}/run\"\nstate_dir = \"{root}/state\"\nvolumes_dir = \"{root}/volumes.d\"\n\
             repositories_dir = \"{root}/repositories.d\"\ndevice_dir = \"{root}/dev\"\n\
             [defaults]\nover_budget = \"longer\"\n\
             [defaults.save_area]\npath = \"{root}/save\"\n"
        );
        create_if_absent(&self.path("blktide.toml"), text.as_bytes(), 0o600)?;
        Ok(())
    }

    /// Ends it as a stop of the service does; then no process of the demo is left but this one.
    pub(super) fn end_daemon(&self, mut daemon: Child) -> Result<()> {
        PidFd::open(i32::try_from(daemon.id())?)?.signal(Signals::Terminate)?;
        let mut ended = None;
        for _ in 0..LOOKS {
            ended = daemon.try_wait()?;
            if ended.is_some() {
                break;
            }
            pause(LOOK)?;
        }
        let status = ended.context("blktided does not end")?;
        ensure!(status.success(), "blktided ended: {status}");
        let left = traces::processes_of(&self.folder);
        ensure!(left.is_empty(), "processes are left: {left:?}");
        self.tell("blktided was stopped: no process of ours runs but this demo, and the kernel goes on marking");
        Ok(())
    }
}
