//! A job in threads of its own: progress, cancel, and an answer even if one of its threads hangs in the kernel.
//!
//! ```text
//!   Working ──cancel──▶ Cancelled          the job looks at the flag once a piece
//!      │                                    and gives everything up
//!      └─begin_commit──▶ Committing ───▶ end: cancel comes too late, the result counts
//! ```
//! **Invariant**: of `cancel` and `begin_commit` one wins. After a cancel that won nothing becomes visible.

use crate::error::JobError;
use blktide_types::clock::{Clock, Instant};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// How long [`Running::wait`] waits, after a cancel, for a job that does not answer.
pub const CANCEL_GRACE: Duration = Duration::from_secs(2);
/// Least time between two calls of a progress callback.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

const WORKING: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTING: u8 = 2;

/// How far a job is. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Read from the volume (backup), written to the target (restore), checked (verify).
    pub done_bytes: u64,
    /// Of so many; 0 while not yet known.
    pub total_bytes: u64,
    /// Stored in the repository.
    pub stored_bytes: u64,
}

/// What is called with the progress: from any thread of the job, at most every [`PROGRESS_INTERVAL`].
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// What a job and its holder share.
pub struct Control {
    phase: AtomicU8,
    cancel_asked: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    next_report_ns: AtomicU64,
    clock: Arc<dyn Clock>,
    on_progress: Option<OnProgress>,
    wake: Condvar,
    lock: Mutex<()>,
}

impl core::fmt::Debug for Control {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Control")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl Control {
    /// A job that has not begun.
    pub fn new(clock: Arc<dyn Clock>, on_progress: Option<OnProgress>) -> Arc<Self> {
        Arc::new(Self {
            phase: AtomicU8::new(WORKING),
            cancel_asked: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            next_report_ns: AtomicU64::new(0),
            clock,
            on_progress,
            wake: Condvar::new(),
            lock: Mutex::new(()),
        })
    }

    /// Asks the job to give up; true if it will: it has not begun to commit. May be called from any thread, often.
    pub fn cancel(&self) -> bool {
        self.cancel_asked.store(true, Ordering::SeqCst);
        let won = match self.phase.compare_exchange(
            WORKING,
            CANCELLED,
            Ordering::SeqCst,
            Ordering::SeqCst,
        ) {
            Ok(_) => true,
            Err(phase) => phase == CANCELLED,
        };
        let held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
        drop(held);
        won
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == CANCELLED
    }

    /// `Err(Cancelled)` once it was cancelled: what a job asks between two pieces.
    pub fn check(&self) -> Result<(), JobError> {
        if self.is_cancelled() {
            Err(JobError::Cancelled {
                commit_in_doubt: false,
            })
        } else {
            Ok(())
        }
    }

    /// From here on a cancel comes too late.
    pub(crate) fn begin_commit(&self) -> Result<(), JobError> {
        self.phase
            .compare_exchange(WORKING, COMMITTING, Ordering::SeqCst, Ordering::SeqCst)
            .map(drop)
            .map_err(|_phase| JobError::Cancelled {
                commit_in_doubt: false,
            })
    }

    /// The commit failed for a reason that another attempt can mend; a cancel that came meanwhile is heard now.
    pub(crate) fn work_again(&self) -> Result<(), JobError> {
        self.phase
            .compare_exchange(COMMITTING, WORKING, Ordering::SeqCst, Ordering::SeqCst)
            .map_or_else(drop, drop);
        if self.cancel_asked.load(Ordering::SeqCst) {
            self.cancel();
        }
        self.done_bytes.store(0, Ordering::Relaxed);
        self.stored_bytes.store(0, Ordering::Relaxed);
        self.check()
    }

    fn is_committing(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == COMMITTING
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            stored_bytes: self.stored_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    pub(crate) fn set_total(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// There is more to do than was known.
    pub(crate) fn add_total(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts, and tells whoever wants to know, if it is time.
    pub(crate) fn advance(&self, done_bytes: u64, stored_bytes: u64) {
        self.done_bytes.fetch_add(done_bytes, Ordering::Relaxed);
        self.stored_bytes.fetch_add(stored_bytes, Ordering::Relaxed);
        let Some(on_progress) = &self.on_progress else {
            return;
        };
        let now = self.clock.now();
        let due = self.next_report_ns.load(Ordering::Relaxed);
        if now.0 >= due
            && self
                .next_report_ns
                .compare_exchange(
                    due,
                    now.after(PROGRESS_INTERVAL).0,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
        {
            on_progress(self.progress());
        }
    }

    /// Waits until `until` or a cancel, whatever comes first.
    pub(crate) fn pause_until(&self, until: Instant) -> Result<(), JobError> {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            self.check()?;
            let left = until.since(self.clock.now());
            if left.is_zero() {
                return Ok(());
            }
            held = self
                .wake
                .wait_timeout(held, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A job that runs.
///
/// Dropping it neither ends nor cancels the job.
#[derive(Debug)]
pub struct Running<T> {
    control: Arc<Control>,
    answer: Arc<Answer<T>>,
}

#[derive(Debug)]
struct Answer<T> {
    result: Mutex<Option<Result<T, JobError>>>,
    given: Condvar,
}

/// Gives the answer even if the job's thread panics.
struct Giver<T> {
    control: Arc<Control>,
    answer: Arc<Answer<T>>,
    result: Option<Result<T, JobError>>,
}

impl<T> Giver<T> {
    fn give(mut self, result: Result<T, JobError>) {
        self.result = Some(result);
    }
}

impl<T> Drop for Giver<T> {
    fn drop(&mut self) {
        // The last word on the progress comes before the answer.
        if let Some(on_progress) = &self.control.on_progress {
            on_progress(self.control.progress());
        }
        let result = self.result.take().unwrap_or(Err(JobError::Died));
        *self
            .answer
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.answer.given.notify_all();
    }
}

impl<T: Send + 'static> Running<T> {
    /// Starts `job` in a thread of its own.
    pub(crate) fn start(
        name: &str,
        control: Arc<Control>,
        job: impl FnOnce(&Arc<Control>) -> Result<T, JobError> + Send + 'static,
    ) -> Result<Self, JobError> {
        let answer = Arc::new(Answer {
            result: Mutex::new(None),
            given: Condvar::new(),
        });
        let giver = Giver {
            control: Arc::clone(&control),
            answer: Arc::clone(&answer),
            result: None,
        };
        let control_of_job = Arc::clone(&control);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || giver.give(job(&control_of_job)))
            .map_err(|source| JobError::Threads { source })?;
        Ok(Self { control, answer })
    }

    /// Asks it to give up; true if it will. Waits for nothing.
    pub fn cancel(&self) -> bool {
        self.control.cancel()
    }

    /// The job's control: to cancel it from elsewhere, to ask how far it is.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.control.progress()
    }

    /// Whether [`Self::wait`] would answer at once.
    pub fn is_finished(&self) -> bool {
        self.answer
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Waits for the end. After a cancel at most [`CANCEL_GRACE`]: a thread that hangs in the kernel is left behind,
    /// and gives everything up if it ever returns.
    pub fn wait(self) -> Result<T, JobError> {
        self.wait_with_grace(CANCEL_GRACE)
    }

    /// As [`Self::wait`], with a grace of one's own; may be called again if the grace was too short.
    pub fn wait_with_grace(&self, grace: Duration) -> Result<T, JobError> {
        /// How often a waiter looks whether there was a cancel.
        const LOOK: Duration = Duration::from_millis(50);
        let mut left = grace;
        let mut result = self
            .answer
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            if left.is_zero() {
                return Err(JobError::Cancelled {
                    commit_in_doubt: self.control.is_committing(),
                });
            }
            let (held, timeout) = self
                .answer
                .given
                .wait_timeout(result, LOOK)
                .unwrap_or_else(PoisonError::into_inner);
            result = held;
            if timeout.timed_out() && self.control.cancel_asked.load(Ordering::SeqCst) {
                left = left.saturating_sub(LOOK);
            }
        }
    }
}
