//! fio, whose `verify` is the writers' own oracle.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;

use crate::run::{Finished, Running, Tool};

/// A run of fio with one job.
#[derive(Debug)]
pub struct Fio {
    tool: Tool,
}

/// What fio reports.
#[derive(Debug)]
pub struct FioRun {
    /// Its JSON.
    pub json: Value,
    /// The longest that one write took, seconds.
    pub longest_write_seconds: f64,
    /// The longest that one read took, seconds.
    pub longest_read_seconds: f64,
    /// Bytes written.
    pub written_bytes: u64,
}

impl Fio {
    /// A job `name` on `target`, a file or a device; `options` as fio's long options without dashes: `"rw=randwrite"`.
    pub fn new(name: &str, target: &Path, options: &[&str]) -> Self {
        let tool = Tool::new("fio")
            .arg(format!("--name={name}"))
            .arg(format!("--filename={}", target.display()))
            .args([
                "--output-format=json",
                "--allow_mounted_write=1",
                "--verify_state_save=0",
            ])
            .args(options.iter().map(|o| format!("--{o}")));
        Self { tool }
    }

    /// The longest it may take, seconds.
    #[must_use]
    pub fn limit(mut self, seconds: u64) -> Self {
        self.tool = self.tool.limit(seconds);
        self
    }

    /// Runs it; an I/O error or a failed verify is an error.
    pub fn run(self) -> Result<FioRun> {
        Self::judge(self.tool.run()?)
    }

    /// Starts it beside the test; [`Fio::judge`] its end.
    pub fn start(self) -> Result<Running> {
        self.tool.start()
    }

    /// Has a job that runs end its writes, verify, and report; it must not have ended before.
    pub fn stop(running: Running) -> Result<FioRun> {
        ensure!(running.runs(), "fio ended before it was told to");
        running.signal("INT")?;
        let mut done = running.finish()?;
        // So it says that it was told to.
        if done.code == Some(128) {
            done.code = Some(0);
        }
        Self::judge(done)
    }

    /// What a finished run reports; an I/O error or a failed verify is an error.
    pub fn judge(done: Finished) -> Result<FioRun> {
        let done = done.ok()?;
        let start = done.stdout.find('{').context("fio printed no JSON")?;
        let json: Value = serde_json::from_str(done.stdout.get(start..).unwrap_or_default())?;
        let job = json.pointer("/jobs/0").context("fio ran no job")?;
        ensure!(
            job.get("error") == Some(&Value::from(0)),
            "fio: {}\n{}",
            job.get("error").unwrap_or(&Value::Null),
            done.stderr
        );
        let longest = |way: &str| {
            job.pointer(&format!("/{way}/clat_ns/max"))
                .and_then(Value::as_f64)
                .unwrap_or(0.0)
                / 1e9
        };
        Ok(FioRun {
            longest_write_seconds: longest("write"),
            longest_read_seconds: longest("read"),
            written_bytes: job
                .pointer("/write/io_bytes")
                .and_then(Value::as_u64)
                .unwrap_or(0),
            json,
        })
    }
}
