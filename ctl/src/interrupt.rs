//! Ctrl-C and SIGTERM while a job runs in this process: the job is cancelled, and cleans up, before we end.

use blktide_api::failure::{Failure, FailureCode};
use blktide_job::error::JobError;
use blktide_job::running::Running;
use blktide_sys::event::{SignalFd, Signals, wait_readable};
use std::time::Duration;

/// How often it is looked whether the job has ended: nothing tells.
const LOOK: Duration = Duration::from_millis(10);

/// The signals, as events. Made before any thread is started.
#[derive(Debug)]
pub(crate) struct Interrupts(SignalFd);

impl Interrupts {
    /// From here on signals wait for [`Interrupts::wait`].
    pub(crate) fn new() -> Result<Self, Failure> {
        SignalFd::new(&[Signals::Interrupt, Signals::Terminate])
            .map(Self)
            .map_err(|error| Failure::new(FailureCode::Failed, error.to_string()))
    }

    /// Waits for the job's end; a signal cancels it.
    pub(crate) fn wait<T: Send + 'static>(&self, running: Running<T>) -> Result<T, JobError> {
        while !running.is_finished() {
            let arrived = wait_readable(&self.0, Some(LOOK)).unwrap_or(false);
            if arrived && self.0.take().is_ok_and(|signal| signal.is_some()) {
                running.cancel();
                break;
            }
        }
        running.wait()
    }
}
