//! Cancelled, revoked, hung, died: nothing is visible, nothing forgotten, and whoever waits gets an answer.

use super::history::write_some;
use super::store::Fault;
use super::volume::SimVolume;
use super::world::{Place, VOLUME, back_up, check, environment, remember, request, visible};
use crate::backup;
use crate::environment::Environment;
use crate::error::JobError;
use crate::running::{Control, Progress};
use blktide_repo::ClaimState;
use blktide_sys::clock::SystemClock;
use blktide_testkit::clock::TestClock;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::clock::Clock;
use blktide_types::io::{RevokeCause, SourceError};
use core::time::Duration;
use std::sync::{Arc, Mutex, OnceLock};

const BLOCK: u32 = 4096;
const BYTES: usize = 4096 * 900 + 1024;

struct Small {
    place: Place,
    volume: Arc<SimVolume>,
    environment: Environment,
    seed: Seed,
}

fn small(seed: Seed) -> Small {
    let volume = SimVolume::new(BYTES as u64, BLOCK);
    volume.write(0, &noise(BYTES / 512 * 512, seed));
    Small {
        place: Place::in_memory(seed),
        volume,
        environment: environment(seed),
        seed,
    }
}

pub(super) fn no_open_claims(place: &Place, note: &str) {
    for claim in place.repository.claims(VOLUME).unwrap() {
        assert_ne!(claim.state, ClaimState::Open, "{note}: {claim:?}");
    }
}

/// req D4: cancelled at 100 random moments, before, in and after every phase; the next incremental covers everything. trap TG1,
/// TG2: nothing has to be cleaned up by hand.
#[test]
fn after_a_cancel_at_any_moment_the_next_incremental_covers_everything() {
    let mut outcomes = (0, 0);
    for n in 0..100 {
        let seed = Seed::of_test("cancel").nth(n);
        let note = format!("cancel {n}, {seed}");
        let mut numbers = seed.numbers();
        let Small {
            mut place,
            volume,
            environment,
            ..
        } = small(seed);
        let mut sequence = 0;
        if numbers.chance(3, 4) {
            back_up(&mut place, &volume, &environment).unwrap();
            write_some(&volume, &mut numbers, &mut sequence);
        }
        let control: Arc<OnceLock<Arc<Control>>> = Arc::default();
        let moment = numbers.below(40);
        let of_hook = Arc::clone(&control);
        if numbers.chance(1, 2) {
            volume.at_read(Some(Arc::new(move |read| {
                if read == moment % 8 {
                    of_hook.wait().cancel();
                }
                Ok(())
            })));
        } else {
            place.faults.tell(Arc::new(move |operation| {
                if operation == moment {
                    of_hook.wait().cancel();
                }
            }));
        }
        let running = backup::start(request(&place, &volume), &environment).unwrap();
        control.set(Arc::clone(running.control())).unwrap();
        let result = running.wait();
        volume.at_read(None);
        place.faults.end();
        match result {
            Ok(report) => {
                outcomes.0 += 1;
                remember(&mut place, &volume, &report);
            }
            Err(JobError::Cancelled { commit_in_doubt }) => {
                outcomes.1 += 1;
                assert!(!commit_in_doubt, "{note}");
            }
            Err(error) => panic!("{note}: {error:?}"),
        }
        visible(&place, &note);
        no_open_claims(&place, &note);
        write_some(&volume, &mut numbers, &mut sequence);
        let first = place.truths.is_empty();
        let next = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(next.head.reason.is_none(), !first, "{note}");
        check(&place, &note);
    }
    assert!(outcomes.1 > 30, "too few were cancelled: {outcomes:?}");
}

/// req D2: a repository that never answers: cancel answers, and when the thread comes back it leaves nothing visible.
#[test]
fn a_repository_that_hangs_does_not_hang_who_cancels() {
    let mut operations = 1;
    let mut n = 0;
    while n < operations {
        let seed = Seed::of_test("hang").nth(n);
        let note = format!("hang at operation {n}, {seed}");
        let Small {
            mut place,
            volume,
            environment,
            ..
        } = small(seed);
        back_up(&mut place, &volume, &environment).unwrap();
        volume.write(0, &noise(4096 * 50, seed.nth(1)));
        if n == 0 {
            place.faults.count();
            back_up(&mut place, &volume, &environment).unwrap();
            operations = place.faults.end().0;
            volume.write(0, &noise(4096 * 50, seed.nth(3)));
        }
        place.faults.at(n, Fault::Hang);
        let running = backup::start(request(&place, &volume), &environment).unwrap();
        place.faults.wait_for_hit();
        running.cancel();
        let before = SystemClock.now();
        let result = running.wait_with_grace(Duration::from_millis(100));
        assert!(
            SystemClock.now().since(before) < Duration::from_secs(20),
            "{note}"
        );
        assert!(
            matches!(result, Err(JobError::Cancelled { .. })),
            "{note}: {result:?}"
        );
        place.faults.end();
        if let Ok(report) = running.wait_with_grace(Duration::from_secs(60)) {
            // It hung in the commit, and the cancel came too late: the image is whole.
            assert!(
                matches!(
                    result,
                    Err(JobError::Cancelled {
                        commit_in_doubt: true
                    })
                ),
                "{note}"
            );
            remember(&mut place, &volume, &report);
        }
        visible(&place, &note);
        volume.write(4096 * 20, &noise(4096 * 50, seed.nth(2)));
        let next = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(next.head.reason, None, "{note}");
        check(&place, &note);
        no_open_claims(&place, &note);
        n += 1;
    }
    assert!(operations > 8, "{operations}");
}

/// req D4: a snapshot that is revoked at any read, or a volume that fails, leaves no image; the next one covers it all.
#[test]
fn a_revoked_snapshot_leaves_no_image() {
    for n in 0..6 {
        let Small {
            mut place,
            volume,
            environment,
            seed,
        } = small(Seed::of_test("revoke").nth(n));
        back_up(&mut place, &volume, &environment).unwrap();
        volume.write(4096, &noise(4096 * 800, seed.nth(1)));
        volume.at_read(Some(Arc::new(move |read| {
            if read < n / 2 {
                Ok(())
            } else if n % 2 == 0 {
                Err(SourceError::Revoked(RevokeCause::SaveAreaFull))
            } else {
                Err(SourceError::Io(std::io::ErrorKind::Other.into()))
            }
        })));
        let error = back_up(&mut place, &volume, &environment).unwrap_err();
        let expected = if n % 2 == 0 {
            "snapshot-revoked"
        } else {
            "volume-failed"
        };
        assert_eq!(error.code(), expected, "{seed}");
        volume.at_read(None);
        check(&place, "revoked");
        no_open_claims(&place, "revoked");
        let next = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(next.head.reason, None);
        check(&place, "after the revoke");
    }
}

/// A worker that dies of a fault of its own ends the job, not the process, and nothing becomes visible.
#[test]
fn a_worker_that_panics_fails_the_backup() {
    let Small {
        mut place,
        volume,
        environment,
        ..
    } = small(Seed::of_test("panic"));
    volume.at_read(Some(Arc::new(|read| {
        assert_ne!(read, 1, "a planted panic");
        Ok(())
    })));
    let error = back_up(&mut place, &volume, &environment).unwrap_err();
    assert!(matches!(error, JobError::Died), "{error:?}");
    volume.at_read(None);
    check(&place, "panicked");
    back_up(&mut place, &volume, &environment).unwrap();
    check(&place, "after the panic");
}

/// Progress is told at most every 100 ms, never goes back, and ends at the total.
#[test]
fn progress_is_told_seldom_and_ends_at_the_total() {
    let Small {
        mut place,
        volume,
        mut environment,
        ..
    } = small(Seed::of_test("progress"));
    let clock = Arc::new(TestClock::new());
    let told: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let of_job = Arc::clone(&told);
    environment.on_progress = Some(Arc::new(move |p| of_job.lock().unwrap().push(p)));
    environment.clock = Arc::<TestClock>::clone(&clock);
    let report = back_up(&mut place, &volume, &environment).unwrap();
    {
        let told = told.lock().unwrap();
        assert!(told.len() <= 2, "the clock stood still: {told:?}");
        let last = told.last().unwrap();
        assert_eq!(last.done_bytes, BYTES as u64);
        assert_eq!(last.total_bytes, BYTES as u64);
        assert!(last.stored_bytes > 0);
    }
    assert_eq!(report.head.counters.read_bytes, BYTES as u64);
    told.lock().unwrap().clear();
    volume.touch(0, BYTES);
    let ticking = Arc::clone(&clock);
    volume.at_read(Some(Arc::new(move |_| {
        ticking.advance(Duration::from_millis(101));
        Ok(())
    })));
    let mut alone = request(&place, &volume);
    alone.workers = 1;
    backup::start(alone, &environment).unwrap().wait().unwrap();
    assert!(told.lock().unwrap().len() >= 3, "time went on");
}

/// `max_read_rate` holds, and pieces are so small that the reader always makes progress (P8).
#[test]
fn the_read_rate_is_kept() {
    let Small {
        place,
        volume,
        environment,
        ..
    } = small(Seed::of_test("rate"));
    let largest: Arc<Mutex<u64>> = Arc::default();
    let mut slow = request(&place, &volume);
    slow.max_read_rate = 8 << 20;
    let before = SystemClock.now();
    let reads = Arc::clone(&largest);
    volume.at_read(Some(Arc::new(move |read| {
        *reads.lock().unwrap() = read;
        Ok(())
    })));
    backup::start(slow, &environment).unwrap().wait().unwrap();
    let took = SystemClock.now().since(before);
    // 3.5 MiB at 8 MiB/s; the last piece need not be waited for.
    assert!(took > Duration::from_millis(300), "{took:?}");
    assert_eq!(
        crate::rate::Rate::new(100_000).piece_bytes(1 << 20, 4096),
        12 * 4096
    );
    assert_eq!(crate::rate::Rate::new(100).piece_bytes(1 << 20, 4096), 4096);
    assert_eq!(
        crate::rate::Rate::new(0).piece_bytes(1 << 20, 4096),
        1 << 20
    );
}
