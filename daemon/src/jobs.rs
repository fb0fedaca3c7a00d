//! Jobs: one a volume at a time, those behind it wait in order.
//!
//! ```text
//!   enter ──▶ queued ──(first of its volume)──▶ running ──▶ left (dropped)
//!                └───────── cancel ───────────────┘
//! ```
//! **Invariant**: of a volume's jobs only the first runs. A job that has been cancelled never begins.

use crate::source::Source;
use blktide_api::name::Name;
use blktide_api::time;
use blktide_job::running::{Control, Progress};
use blktide_types::clock::WallTime;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// All jobs of the daemon.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    last: u64,
    by_volume: BTreeMap<Name, VecDeque<Arc<Job>>>,
    closed: bool,
}

/// One job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: u64,
    pub(crate) volume: Name,
    pub(crate) repository: String,
    since: WallTime,
    cancelled: AtomicBool,
    /// What it runs with, once it runs.
    work: Mutex<Option<Work>>,
}

#[derive(Clone, Debug)]
struct Work {
    control: Arc<Control>,
    source: Arc<dyn Source>,
}

/// A place in the queue; dropping it leaves.
#[derive(Debug)]
pub(crate) struct Place {
    jobs: Arc<Jobs>,
    pub(crate) job: Arc<Job>,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new job, behind those of its volume. `None` once the daemon stops.
    pub(crate) fn enter(
        self: &Arc<Self>,
        volume: &Name,
        repository: String,
        now: WallTime,
    ) -> Option<Place> {
        let mut inner = self.lock();
        if inner.closed {
            return None;
        }
        inner.last = inner.last.saturating_add(1);
        let job = Arc::new(Job {
            id: inner.last,
            volume: volume.clone(),
            repository,
            since: now,
            cancelled: AtomicBool::new(false),
            work: Mutex::default(),
        });
        inner
            .by_volume
            .entry(volume.clone())
            .or_default()
            .push_back(Arc::clone(&job));
        drop(inner);
        Some(Place {
            jobs: Arc::clone(self),
            job,
        })
    }

    /// Cancels the jobs of `volume` (all of them if `None`), or the one numbered `id`, and waits until they have left, at most `limit`.
    pub(crate) fn cancel(&self, volume: Option<&Name>, id: Option<u64>, limit: Duration) -> usize {
        let inner = self.lock();
        let jobs: Vec<Arc<Job>> = inner
            .by_volume
            .iter()
            .filter(|(name, _)| volume.is_none_or(|v| v == *name))
            .flat_map(|(_, jobs)| jobs.iter())
            .filter(|job| id.is_none_or(|id| id == job.id))
            .cloned()
            .collect();
        drop(inner);
        for job in &jobs {
            job.cancel();
        }
        let inner = self.lock();
        self.changed.notify_all();
        let still = |inner: &mut Inner| {
            let mut all = inner.by_volume.values().flatten();
            all.any(|job| jobs.iter().any(|j| j.id == job.id))
        };
        drop(
            self.changed
                .wait_timeout_while(inner, limit, still)
                .unwrap_or_else(PoisonError::into_inner),
        );
        jobs.len()
    }

    /// No job begins any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    /// What runs and waits, as the socket tells it.
    pub(crate) fn list(&self) -> Vec<Value> {
        let inner = self.lock();
        let queues: Vec<Vec<Arc<Job>>> = inner
            .by_volume
            .values()
            .map(|q| q.iter().cloned().collect())
            .collect();
        drop(inner);
        queues
            .iter()
            .flat_map(|queue| queue.iter().enumerate())
            .map(|(place, job)| job.document(place == 0))
            .collect()
    }
}

impl Job {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // Not under the lock: the volume may take its time to answer, and `list` must not.
        let work = self
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(work) = work
            && work.control.cancel()
        {
            work.source.revoke();
        }
    }

    /// Whether it has been cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// From now on a cancel reaches the work. A cancel that came before is passed on.
    pub(crate) fn works_with(&self, control: Arc<Control>, source: Arc<dyn Source>) {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        *work = Some(Work { control, source });
        drop(work);
        if self.is_cancelled() {
            self.cancel();
        }
    }

    fn progress(&self) -> Progress {
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.as_ref()
            .map(|w| w.control.progress())
            .unwrap_or_default()
    }

    fn document(&self, first: bool) -> Value {
        let progress = self.progress();
        let state = match (self.is_cancelled(), first) {
            (true, _) => "cancelling",
            (false, true) => "running",
            (false, false) => "queued",
        };
        json!({
            "id": self.id,
            "volume": self.volume,
            "kind": "backup",
            "state": state,
            "repository": self.repository,
            "since": time::rfc3339(self.since),
            "done_bytes": progress.done_bytes,
            "total_bytes": progress.total_bytes,
            "stored_bytes": progress.stored_bytes,
        })
    }
}

impl Place {
    /// Waits until it is the first of its volume's. False: cancelled meanwhile.
    pub(crate) fn wait_for_turn(&self) -> bool {
        let mut inner = self.jobs.lock();
        loop {
            if self.job.is_cancelled() {
                return false;
            }
            let first = inner
                .by_volume
                .get(&self.job.volume)
                .and_then(VecDeque::front);
            if first.is_some_and(|f| f.id == self.job.id) {
                return true;
            }
            inner = self
                .jobs
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.jobs.lock();
        if let Some(queue) = inner.by_volume.get_mut(&self.job.volume) {
            queue.retain(|job| job.id != self.job.id);
            if queue.is_empty() {
                inner.by_volume.remove(&self.job.volume);
            }
        }
        drop(inner);
        self.jobs.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    /// One a volume, in order; another volume's does not wait.
    #[test]
    fn one_a_volume_and_in_order() {
        let jobs = Arc::new(Jobs::default());
        let enter = |volume: &str| {
            jobs.enter(&name(volume), "main".to_owned(), WallTime(0))
                .unwrap()
        };
        let (first, second, third) = (enter("a"), enter("a"), enter("a"));
        let other = enter("b");
        assert!(first.wait_for_turn() && other.wait_for_turn());
        let (order, ran) = mpsc::channel();
        thread::scope(|scope| {
            for (place, number) in [(third, 3), (second, 2)] {
                let order = order.clone();
                scope.spawn(move || {
                    assert!(place.wait_for_turn());
                    order.send(number).unwrap();
                });
            }
            assert_eq!(jobs.list().len(), 4);
            assert!(
                ran.try_recv().is_err(),
                "none runs before the first has left"
            );
            drop(first);
        });
        assert_eq!(ran.try_iter().collect::<Vec<_>>(), [2, 3]);
        drop(other);
        assert!(jobs.list().is_empty());
    }

    /// A job that waits and is cancelled never begins; a number names one job only.
    #[test]
    fn a_cancel_reaches_who_waits() {
        let jobs = Arc::new(Jobs::default());
        let enter = || {
            jobs.enter(&name("a"), "main".to_owned(), WallTime(0))
                .unwrap()
        };
        let (first, second) = (enter(), enter());
        let (number, limit) = (second.job.id, Duration::from_secs(60));
        thread::scope(|scope| {
            let waits = scope.spawn(move || second.wait_for_turn());
            assert_eq!(jobs.cancel(Some(&name("a")), Some(number), limit), 1);
            assert!(!waits.join().unwrap());
        });
        assert!(first.wait_for_turn());
        assert_eq!(jobs.cancel(Some(&name("b")), None, limit), 0);
        jobs.close();
        assert!(jobs.enter(&name("a"), String::new(), WallTime(0)).is_none());
    }
}
