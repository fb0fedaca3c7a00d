//! Time for tests: measured, and waited for with a limit.

use anyhow::{Result, bail};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Measures from its making.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    #[expect(clippy::disallowed_methods, reason = "a test measures real time")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.elapsed().as_secs_f64()
    }
}

/// Asks `reached` again and again until it is true; fails with `what` after `limit`.
///
/// For what no descriptor reports: another process's node, socket or state.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut reached: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let (_open, never) = mpsc::channel::<()>();
    let watch = Stopwatch::start();
    loop {
        if reached()? {
            return Ok(());
        }
        if watch.elapsed() > limit {
            bail!("after {} s: {what}", limit.as_secs());
        }
        // The sender lives: this only lets the other process run.
        if never.recv_timeout(Duration::from_millis(5)).is_ok() {
            bail!("nobody sends");
        }
    }
}

/// Lets `time` pass: for a moment that is drawn, never for an event that is hoped for.
pub fn pass(time: Duration) {
    let (_open, never) = mpsc::channel::<()>();
    let timed_out = never.recv_timeout(time).is_err();
    debug_assert!(timed_out, "nobody sends");
}
