//! Each operation of the repository failing once, in each way: an error, nothing visible, and the next backup is right.

use super::store::Fault;
use super::volume::SimVolume;
use super::world::{Place, VOLUME, back_up, check, environment, remember, request, visible};
use crate::backup;
use crate::source::TrackerSays;
use crate::{plan, source};
use blktide_repo::ClaimState;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::io::SnapshotRead;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use std::sync::Arc;

const BYTES: usize = 4096 * 150 + 512;

/// A place with one image, and a volume that has changed since; or neither.
fn world(seed: Seed, with_base: bool) -> (Place, Arc<SimVolume>) {
    let volume = SimVolume::new(BYTES as u64, 4096);
    volume.write(0, &noise(BYTES, seed));
    let mut place = Place::in_memory(seed);
    if with_base {
        back_up(&mut place, &volume, &environment(seed)).unwrap();
        volume.write(4096 * 3, &noise(4096 * 30, seed.nth(1)));
    }
    (place, volume)
}

fn operations(seed: Seed, with_base: bool) -> u64 {
    let (mut place, volume) = world(seed, with_base);
    place.faults.count();
    back_up(&mut place, &volume, &environment(seed)).unwrap();
    place.faults.end().0
}

/// Whether a fault is met once, or by all operations from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lasts {
    Once,
    On,
}

fn fail_at(n: u64, fault: Fault, lasts: Lasts, with_base: bool) -> bool {
    let seed = Seed::of_test("faults").nth(n);
    let note = format!("{fault:?} at {n}, {lasts:?}, base {with_base}, {seed}");
    let (mut place, volume) = world(seed, with_base);
    let environment = environment(seed.nth(7));
    if lasts == Lasts::On {
        place.faults.from(n, fault);
    } else {
        place.faults.at(n, fault);
    }
    let result = backup::start(request(&place, &volume), &environment)
        .unwrap()
        .wait();
    let (_, hit) = place.faults.end();
    let failed = result.is_err();
    match result {
        // What failed was not needed, or the reply alone was lost.
        Ok(report) => remember(&mut place, &volume, &report),
        Err(error) => {
            assert!(hit, "{note}: {error:?}");
            let expected = match fault {
                Fault::Full => ["repository-full"].as_slice(),
                Fault::Io | Fault::LostReply | Fault::Hang => {
                    &["repository-unreachable", "damaged", "repository-failed"]
                }
            };
            appeared(&mut place, &volume, &note);
            assert!(
                expected.contains(&error.code()),
                "{note}: {} {error:?}",
                error.code()
            );
        }
    }
    visible(&place, &note);
    volume.write(4096 * 20, &noise(4096 * 30, seed.nth(2)));
    let first = place.truths.is_empty();
    let next = back_up(&mut place, &volume, &environment)
        .unwrap_or_else(|e| panic!("{note}: the next one: {e:?}"));
    if first {
        assert_eq!(next.head.reason, Some(Reason::FirstBackup), "{note}");
    } else {
        assert_eq!(next.head.reason, None, "{note}");
    }
    check(&place, &note);
    for claim in place.repository.claims(VOLUME).unwrap() {
        assert_ne!(claim.state, ClaimState::Open, "{note}");
    }
    failed
}

/// A commit whose reply was lost, and that could not be read back either, is an image all the same: whole, if there.
fn appeared(place: &mut Place, volume: &SimVolume, note: &str) {
    let images = place.repository.images_of(VOLUME).unwrap().images;
    if images.len() > place.truths.len() {
        let sequence = images.last().unwrap().head.sequence;
        assert!(note.starts_with("LostReply"), "{note}: image {sequence}");
        place.truths.push((sequence, volume.last_truth()));
    }
}

/// req D4: EIO, ENOSPC or a lost reply at every operation of a full and of an incremental backup, once or from there on.
#[test]
fn every_operation_may_fail() {
    for with_base in [false, true] {
        let operations = operations(Seed::of_test("faults"), with_base);
        assert!(operations > 8, "{operations} operations");
        let mut failed = 0;
        for n in 0..operations {
            for fault in [Fault::Io, Fault::Full, Fault::LostReply] {
                for lasts in [Lasts::Once, Lasts::On] {
                    failed += u64::from(fail_at(n, fault, lasts, with_base));
                }
            }
        }
        assert!(failed > operations, "{failed} of {operations} × 6 failed");
    }
}

/// A repository with less room than is to be left is refused before anything is read.
#[test]
fn too_little_room_is_refused_before_reading() {
    let seed = Seed::of_test("room");
    let (place, volume) = world(seed, false);
    let mut low = request(&place, &volume);
    low.min_free = Some((Box::new(|| Ok(999)), 1000));
    let error = backup::start(low, &environment(seed))
        .unwrap()
        .wait()
        .unwrap_err();
    assert_eq!((error.code(), error.exit()), ("repository-full", 15));
    assert_eq!(volume.snapshots(), 0);
    assert_eq!(place.repository.claims(VOLUME).unwrap(), []);
    let mut enough = request(&place, &volume);
    enough.min_free = Some((Box::new(|| Ok(1000)), 1000));
    backup::start(enough, &environment(seed))
        .unwrap()
        .wait()
        .unwrap();
}

/// A volume's server that answers what cannot be is not believed: what the base lacks and what changed must be wanted, and a
/// volume that resolved nothing must give everything (P10).
#[test]
fn an_answer_that_lacks_a_block_makes_no_image() {
    struct Liar {
        honest: Arc<SimVolume>,
        /// Claims this of a base it was not asked to resolve.
        says: Option<TrackerSays>,
    }
    struct Short(Arc<dyn SnapshotRead>, BlockSet);
    impl blktide_types::io::BlockRead for Short {
        fn geometry(&self) -> blktide_types::geometry::Geometry {
            self.0.geometry()
        }
        fn read_blocks(
            &self,
            range: blktide_types::range::BlockRange,
            buf: &mut [u8],
        ) -> Result<Vec<blktide_types::io::BlockOutcome>, blktide_types::io::SourceError> {
            self.0.read_blocks(range, buf)
        }
    }
    impl SnapshotRead for Short {
        fn wanted(&self) -> &BlockSet {
            &self.1
        }
        fn changed(&self) -> Option<&BlockSet> {
            self.0.changed()
        }
        fn finish(&self) -> Result<(), blktide_types::io::SourceError> {
            Ok(())
        }
    }
    impl source::SnapshotSource for Liar {
        fn geometry(&self) -> blktide_types::geometry::Geometry {
            self.honest.geometry()
        }
        fn begin(&self, ask: &source::SnapshotAsk) -> Result<source::Begun, source::BeginError> {
            let mut begun = self.honest.begin(ask)?;
            let mut wanted = begun.snapshot.wanted().clone();
            let last = wanted.blocks().last();
            wanted.remove(last.expect("something is wanted"));
            begun.snapshot = Arc::new(Short(Arc::clone(&begun.snapshot), wanted));
            if let Some(says) = self.says {
                begun.tracker = says;
            }
            Ok(begun)
        }
    }
    let seed = Seed::of_test("liar");
    for with_base in [false, true] {
        for says in [None, Some(TrackerSays::Unresolved)] {
            let (place, volume) = world(seed, with_base);
            let mut lied = request(&place, &volume);
            lied.source = Arc::new(Liar {
                honest: Arc::clone(&volume),
                says,
            });
            let error = backup::start(lied, &environment(seed))
                .unwrap()
                .wait()
                .unwrap_err();
            assert_eq!(error.code(), "volume-failed", "{with_base} {says:?}");
            check(&place, "lied to");
        }
    }
}

/// `--dry-run` says what the backup then does.
#[test]
fn a_preview_is_what_then_happens() {
    let seed = Seed::of_test("preview");
    for with_base in [false, true] {
        let (mut place, volume) = world(seed, with_base);
        let environment = environment(seed);
        let preview = backup::preview(
            &place.repository,
            VOLUME,
            |repository| plan::PlanFacts {
                full_asked: false,
                host: environment.host,
                geometry: source::SnapshotSource::geometry(&*volume),
                device: "wwn-1".to_owned(),
                repository,
                remembered: place.remembered,
            },
            &|_, absent| {
                assert!(absent.is_empty());
                (TrackerSays::Resolved, 30 * 4096)
            },
        )
        .unwrap();
        let report = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(preview.kind, report.head.kind);
        assert_eq!(preview.reason, report.head.reason);
        assert_eq!(preview.read_bytes, report.head.counters.read_bytes);
        assert!(preview.stored_bytes_max >= report.head.counters.stored_bytes);
    }
}
