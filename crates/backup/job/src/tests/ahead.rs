//! Volumes that are copied before the instant: what is written meanwhile, what fails, what lies.

use super::ahead_volume::{AheadVolume, Call, Lie, Plan, Seen};
use super::cancel::no_open_claims;
use super::world::{Place, check, environment, request_of, restore_over, visible};
use crate::backup::{self, BackupReport};
use crate::environment::Environment;
use crate::error::JobError;
use crate::running::{Control, Progress};
use blktide_testkit::clock::TestClock;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::reason::Reason;
use core::time::Duration;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};

const BLOCK: u32 = 4096;
const BYTES: usize = 4096 * 300 + 1024;

struct Small {
    place: Place,
    volume: Arc<AheadVolume>,
    environment: Environment,
    seed: Seed,
}

fn small(seed: Seed) -> Small {
    let volume = AheadVolume::new(BYTES as u64, BLOCK, seed);
    volume.write(0, &noise(BYTES / 512 * 512, seed));
    Small {
        place: Place::in_memory(seed),
        volume,
        environment: environment(seed),
        seed,
    }
}

impl Small {
    fn back_up(&mut self) -> Result<BackupReport, JobError> {
        back_up(&mut self.place, &self.volume, &self.environment)
    }
}

fn back_up(
    place: &mut Place,
    volume: &Arc<AheadVolume>,
    environment: &Environment,
) -> Result<BackupReport, JobError> {
    let request = request_of(place, Arc::<AheadVolume>::clone(volume));
    let report = backup::start(request, environment)?.wait()?;
    remember(place, volume, &report);
    Ok(report)
}

/// Takes the truth down, and compares what was counted.
fn remember(place: &mut Place, volume: &AheadVolume, report: &BackupReport) -> Seen {
    let seen = volume.seen();
    place
        .truths
        .push((report.head.sequence, seen.truth.clone()));
    place.remembered = Some(report.head.image);
    assert_eq!(seen.read, seen.told, "each block as often as it was told");
    let unreadable: Vec<u64> = report
        .unreadable
        .iter()
        .flat_map(|run| run.blocks().map(|block| block.0))
        .collect();
    assert_eq!(unreadable, seen.unreadable);
    assert_eq!(report.head.kinds.unreadable, unreadable.len() as u64);
    let bytes = |times: &[u64]| {
        let geometry = report.head.geometry;
        (0..)
            .zip(times)
            .map(|(b, n)| n * u64::from(geometry.block_bytes(blktide_types::unit::BlockIndex(b))))
            .sum::<u64>()
    };
    let counters = report.head.counters;
    assert_eq!(counters.read_bytes, bytes(&seen.told));
    let early: u64 = seen.rounds.iter().map(|cost| cost.read_bytes).sum();
    assert!(early <= counters.read_bytes);
    match (&seen.changed, report.head.reason) {
        (Some(changed), None) => {
            let mut times = vec![0; seen.told.len()];
            for block in changed.blocks() {
                times[usize::try_from(block.0).unwrap()] = 1;
            }
            assert_eq!(counters.changed_bytes, bytes(&times));
        }
        // More was read than the volume has, but it has not changed more often than once.
        _ => assert_eq!(counters.changed_bytes, bytes(&vec![1; seen.told.len()])),
    }
    seen
}

/// req A1, A4, B2: written between the rounds, within them and after the instant, with torn reads, blocks that cannot be read
/// and trackers that are lost: each image, full or on top of another, restores byte for byte to what the volume was at its
/// instant, and every stored byte is proven.
#[test]
fn every_image_is_the_volume_at_its_instant() {
    let seed = Seed::of_test("ahead");
    let mut incremental = 0;
    for n in 0..15 {
        let seed = seed.nth(n);
        let note = format!("world {n}, {seed}");
        let mut numbers = seed.numbers();
        let block = *numbers.pick(&[4096, 16384, 65536]);
        let blocks = 1 + numbers.below((4 << 20) / u64::from(block)).min(300);
        let bytes = u64::from(block) * blocks - 512 * numbers.below(u64::from(block) / 512);
        let volume = AheadVolume::new(bytes, block, seed);
        let environment = environment(seed);
        let mut place = Place::in_memory(seed);
        let mut expected = Some(Reason::FirstBackup);
        for _ in 0..5 {
            let distrust = numbers.chance(1, 6).then_some(Reason::ForeignWrite);
            volume.plan(Plan {
                rounds: numbers.below(5),
                writes: numbers.chance(4, 5),
                distrust_at_instant: distrust,
                not_first: (0..numbers.below(3)).map(|b| b * 7 % blocks).collect(),
                ..Plan::default()
            });
            place.reopen();
            let report = back_up(&mut place, &volume, &environment)
                .unwrap_or_else(|e| panic!("{note}: {e:?}"));
            assert_eq!(report.head.reason, expected.or(distrust), "{note}");
            incremental += u64::from(report.head.reason.is_none());
            assert!(!volume.is_running(), "{note}");
            expected = None;
            volume.write_some(10);
            volume.set_unreadable(numbers.below(blocks), numbers.chance(1, 2));
            if numbers.chance(1, 8) {
                volume.distrust(Reason::BitmapMissing);
                expected = Some(Reason::BitmapMissing);
            }
        }
        check(&place, &note);
    }
    assert!(incremental > 25, "{incremental}");
}

/// A volume that nobody writes to: one round, each block read once, nothing left for the instant.
#[test]
fn what_nobody_writes_is_read_once() {
    let mut small = small(Seed::of_test("ahead once"));
    small.back_up().unwrap();
    let seen = small.volume.seen();
    assert!(seen.read.iter().all(|times| *times == 1));
    assert_eq!(seen.rounds.len(), 1);
    assert_eq!(seen.rounds[0].read_bytes, BYTES as u64);
    // Only what changed, and only once, on top of it.
    small
        .volume
        .write(4096 * 100, &noise(4096 * 70, small.seed));
    let report = small.back_up().unwrap();
    assert_eq!(report.head.reason, None);
    assert_eq!(report.head.counters.read_bytes, 4096 * 70);
    let seen = small.volume.seen();
    let read: Vec<usize> = (0..301).filter(|b| seen.read[*b] == 1).collect();
    assert_eq!(read, (100..170).collect::<Vec<_>>());
    // And nothing, where nothing did.
    let report = small.back_up().unwrap();
    assert_eq!(report.head.counters.read_bytes, 0);
    assert_eq!(report.head.counters.stored_bytes, 0);
    check(&small.place, "once");
}

/// What counts is the last read of a block: it may become readable, or unreadable, between two rounds.
#[test]
fn a_block_is_what_its_last_copy_is() {
    let mut small = small(Seed::of_test("ahead unreadable"));
    let volume = Arc::downgrade(&small.volume);
    small.volume.set_unreadable(7, true);
    small.volume.set_unreadable(8, true);
    small.volume.plan(Plan {
        rounds: 2,
        at_call: Some(Arc::new(move |call| {
            if call == Call::Next(0) {
                let volume = volume.upgrade().unwrap();
                volume.set_unreadable(7, false);
                volume.set_unreadable(9, true);
                // Block 8 becomes readable, and nobody knows.
                volume.set_unreadable(8, false);
                volume.write(4096 * 7, &[1; 512]);
                volume.write(4096 * 9, &[1; 512]);
            }
            Ok(())
        })),
        ..Plan::default()
    });
    let report = small.back_up().unwrap();
    let unreadable: Vec<u64> = report.unreadable.iter().map(|run| run.start().0).collect();
    assert_eq!(unreadable, [8], "8 and 9 are one run");
    assert_eq!(report.head.kinds.unreadable, 2);
    small.volume.set_unreadable(9, false);
    small.volume.plan(Plan::default());
    let next = small.back_up().unwrap();
    assert_eq!(next.head.counters.read_bytes, 4096 * 2);
    check(&small.place, "unreadable");
}

/// A base that is gone when the image is put together: all is copied once more, for a full image.
#[test]
fn a_base_that_goes_meanwhile_costs_a_second_copy() {
    let mut small = small(Seed::of_test("ahead base gone"));
    small.back_up().unwrap();
    small.volume.write(4096 * 3, &noise(4096 * 5, small.seed));
    let memory = small.place.memory.clone();
    let pack = memory.names().into_iter().find(|n| n.contains("/packs/"));
    small.volume.plan(Plan {
        rounds: 1,
        at_call: Some(Arc::new(move |call| {
            if call == Call::Next(1) {
                memory.put(pack.as_ref().unwrap(), None);
            }
            Ok(())
        })),
        ..Plan::default()
    });
    let report = small.back_up().unwrap();
    assert_eq!(report.head.reason, Some(Reason::BaseImageGone));
    assert_eq!(report.head.counters.read_bytes, BYTES as u64);
    no_open_claims(&small.place, "base gone");
    let (sequence, truth) = small.place.truths.last().unwrap();
    let (restored, target) = restore_over(&small.place, *sequence, vec![1; truth.len()]);
    assert_eq!(restored.unwrap().damaged, []);
    assert!(target.bytes() == *truth);
}

/// A plan of three rounds with writers, which tells `at_call` of every call.
fn busy(at_call: impl Fn(Call) -> io::Result<()> + Send + Sync + 'static) -> Plan {
    Plan {
        rounds: 3,
        writes: true,
        at_call: Some(Arc::new(at_call)),
        ..Plan::default()
    }
}

/// The calls that a backup of three rounds makes, of each phase the first two.
fn calls() -> Vec<Call> {
    let mut small = small(Seed::of_test("ahead calls"));
    let calls: Arc<Mutex<BTreeSet<Call>>> = Arc::default();
    let of_plan = Arc::clone(&calls);
    small.volume.plan(busy(move |call| {
        of_plan.lock().unwrap().insert(call);
        Ok(())
    }));
    small.back_up().unwrap();
    let calls = calls.lock().unwrap();
    let early = |call: &&Call| !matches!(call, Call::ReadNow(_, 2..) | Call::ReadLast(1..));
    let calls: Vec<Call> = calls.iter().filter(early).copied().collect();
    for round in 0..4 {
        assert!(calls.contains(&Call::ReadNow(round, 0)), "{calls:?}");
        assert!(calls.contains(&Call::Next(round)), "{calls:?}");
    }
    assert!(calls.contains(&Call::ReadLast(0)), "{calls:?}");
    calls
}

/// Nothing is visible, nothing runs, and the next backup covers everything.
fn covers_everything(mut small: Small, with_base: bool, note: &str) {
    assert!(!small.volume.is_running(), "{note}");
    visible(&small.place, note);
    no_open_claims(&small.place, note);
    small.volume.write_some(6);
    small.volume.plan(Plan {
        rounds: 1,
        writes: true,
        ..Plan::default()
    });
    let report = small.back_up().unwrap();
    assert_eq!(report.head.reason.is_none(), with_base, "{note}");
    check(&small.place, note);
}

/// req D4: cancelled in any call, in each round and after the instant.
#[test]
fn after_a_cancel_in_any_call_nothing_is_visible_and_nothing_forgotten() {
    for (n, at) in (0..).zip(calls()) {
        for with_base in [false, true] {
            let note = format!("cancelled in {at:?}, {with_base}");
            let mut small = small(Seed::of_test("ahead cancel").nth(n));
            if with_base {
                small.back_up().unwrap();
                small.volume.write_some(200);
            }
            let control: Arc<OnceLock<Arc<Control>>> = Arc::default();
            let of_plan = Arc::clone(&control);
            small.volume.plan(busy(move |call| {
                if call == at {
                    of_plan.wait().cancel();
                }
                Ok(())
            }));
            let request = request_of(&small.place, Arc::<AheadVolume>::clone(&small.volume));
            let running = backup::start(request, &small.environment).unwrap();
            control.set(Arc::clone(running.control())).unwrap();
            match running.wait() {
                Err(JobError::Cancelled { commit_in_doubt }) => assert!(!commit_in_doubt, "{note}"),
                // Fewer blocks have changed than there are in all: not every read comes to pass.
                Ok(report) if with_base && matches!(at, Call::ReadNow(..) | Call::ReadLast(_)) => {
                    remember(&mut small.place, &small.volume, &report);
                }
                other => panic!("{note}: {other:?}"),
            }
            covers_everything(small, with_base, &note);
        }
    }
}

/// An error of any call is told as what it is, leaves nothing behind, and costs no change.
#[test]
fn after_an_error_of_any_call_nothing_is_visible_and_nothing_forgotten() {
    for (n, at) in (0..).zip(calls()) {
        let note = format!("failed in {at:?}");
        let mut small = small(Seed::of_test("ahead error").nth(n));
        small.volume.plan(busy(move |call| {
            if call == at {
                return Err(io::Error::other("a planted fault"));
            }
            Ok(())
        }));
        let error = small.back_up().unwrap_err();
        let code = if at == Call::Spool {
            "failed"
        } else {
            "volume-failed"
        };
        assert_eq!(error.code(), code, "{note}: {error:?}");
        assert_eq!(error.exit(), 1, "{note}");
        covers_everything(small, false, &note);
    }
}

/// A spool without room is no repository without room, and has its exit code.
#[test]
fn a_spool_without_room_is_told_as_such() {
    let mut small = small(Seed::of_test("ahead full spool"));
    small.volume.plan(Plan {
        spool: Some("/dev/full"),
        ..Plan::default()
    });
    let error = small.back_up().unwrap_err();
    assert!(matches!(error, JobError::Spool { .. }), "{error:?}");
    assert_eq!((error.code(), error.exit()), ("failed", 15));
    covers_everything(small, false, "full spool");
}

/// A repository that fails at any operation: an error or an image, and the next backup is right.
#[test]
fn a_repository_that_fails_costs_no_change() {
    let (mut operations, mut n, mut failed) = (1, 0, 0);
    while n < operations {
        let mut small = small(Seed::of_test("ahead repository").nth(n));
        let plan = Plan {
            rounds: 2,
            writes: true,
            ..Plan::default()
        };
        small.volume.plan(plan);
        if n == 0 {
            small.place.faults.count();
            small.back_up().unwrap();
            operations = small.place.faults.end().0;
        }
        small.place.faults.from(n, super::store::Fault::Full);
        let result = small.back_up();
        small.place.faults.end();
        failed += u64::from(result.is_err());
        let with_base = !small.place.truths.is_empty();
        assert!(!small.volume.is_running());
        small.volume.plan(Plan::default());
        let report = small.back_up().unwrap();
        assert_eq!(report.head.reason.is_none(), with_base);
        check(&small.place, "failed repository");
        n += 1;
    }
    assert!(failed > 5, "{failed} of {operations}");
}

/// The volume's answers are not believed blindly: an image is made of none that cannot be true.
#[test]
fn a_volume_that_lies_is_caught() {
    for lie in Lie::ALL {
        for with_base in [false, true] {
            let note = format!("{lie:?}, {with_base}");
            let mut small = small(Seed::of_test("ahead lies"));
            if with_base {
                small.back_up().unwrap();
                small.volume.write(0, &noise(4096 * 30, small.seed.nth(1)));
            }
            let plan = Plan {
                rounds: 1,
                not_first: vec![5, 6],
                ..Plan::default()
            };
            small.volume.plan(Plan {
                lie: Some(lie),
                ..plan.clone()
            });
            let error = small.back_up().unwrap_err();
            assert!(
                matches!(error, JobError::Mismatch { .. }),
                "{note}: {error:?}"
            );
            covers_everything(small, with_base, &note);
        }
    }
}

/// Progress: what is to be done grows with each round, what is done does not go back, and both end as one.
#[test]
fn progress_grows_honestly_and_ends_at_the_total() {
    let mut small = small(Seed::of_test("ahead progress"));
    let clock = Arc::new(TestClock::new());
    let told: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let of_job = Arc::clone(&told);
    small.environment.on_progress = Some(Arc::new(move |p| of_job.lock().unwrap().push(p)));
    small.environment.clock = Arc::<TestClock>::clone(&clock);
    small.volume.plan(busy(move |_| {
        clock.advance(Duration::from_millis(101));
        Ok(())
    }));
    let mut alone = request_of(&small.place, Arc::<AheadVolume>::clone(&small.volume));
    alone.workers = 1;
    let running = backup::start(alone, &small.environment).unwrap();
    let report = running.wait().unwrap();
    let seen = remember(&mut small.place, &small.volume, &report);
    let told = told.lock().unwrap();
    for pair in told.windows(2) {
        assert!(pair[0].done_bytes <= pair[1].done_bytes, "{told:?}");
        assert!(pair[0].total_bytes <= pair[1].total_bytes, "{told:?}");
    }
    assert!(
        told.iter().all(|p| p.done_bytes <= p.total_bytes),
        "{told:?}"
    );
    let totals: BTreeSet<u64> = told.iter().map(|p| p.total_bytes).collect();
    assert!(totals.len() >= 4, "it grows: {totals:?}");
    let last = told.last().unwrap();
    assert_eq!(last.done_bytes, last.total_bytes);
    assert_eq!(last.done_bytes, report.head.counters.read_bytes);
    assert_eq!(seen.rounds.len(), 4);
    assert!(seen.rounds.iter().all(|cost| !cost.took.is_zero()));
    check(&small.place, "progress");
}
