//! Lives, names, hints and merging, each by hand.

use super::*;
use crate::gate::HoldState;
use crate::request::{Actions, Event, Operation, Request};
use crate::snapshot::{Begun, Overflow, ReaderMemories, SnapshotView};
use crate::state::SlotIndex;
use crate::{EngineError, Memory, PlainMemory};
use blktide_format::shared::Shape;
use blktide_types::clock::Instant;
use blktide_types::geometry::Geometry;
use blktide_types::id::{RepositoryId, SnapshotId};
use blktide_types::range::BlockRange;
use blktide_types::unit::{BlockIndex, BlockSize};
use core::time::Duration;

const BLOCKS: u64 = 200;

struct Volume {
    memories: [Arc<dyn Memory>; 2],
    engine: Engine,
    control: Control,
}

fn name(n: u64) -> GenerationName {
    GenerationName((u128::from(n) << 32 | 5).to_le_bytes())
}

fn shape(generations: usize) -> Shape {
    let size = BlockSize::IMAGE_MIN;
    Shape {
        generations,
        banks: 6,
        hints: 3,
        log_bytes: 8,
        ..Shape::usual(Geometry::new(BLOCKS * 4096, size, size, 512, 512).unwrap())
    }
}

fn memories(shape: &Shape) -> [Arc<dyn Memory>; 2] {
    [
        PlainMemory::new(shape.control_words()),
        PlainMemory::new(shape.banks_words()),
    ]
}

impl Volume {
    fn new(generations: usize, stored: &[StoredGeneration]) -> Self {
        let shape = shape(generations);
        let memories = memories(&shape);
        let engine = Engine::create(&memories[0], &memories[1], shape).unwrap();
        let mut control = engine.control();
        control.begin_life(stored, (name(0), WallTime(0))).unwrap();
        Self {
            memories,
            engine,
            control,
        }
    }

    fn write(&self, block: u64) {
        let mut queue = self.engine.queue(0).unwrap();
        let (mut request, mut actions) = (Request::new(), Actions::new());
        let operation = Operation::Write {
            offset: block * 4096 + 512,
            len: 512,
            durable: false,
        };
        for event in [Event::Start(operation), Event::Performed(Ok(512))] {
            request.step(&mut queue, event, Instant(0), &mut actions);
            let _performed = actions.drain().count();
        }
        assert!(request.is_idle());
    }

    /// Opens generation `n`; whether `base` was known.
    fn swap(&mut self, n: u64, base: Option<GenerationName>) -> bool {
        self.begin(n, base).0.base_resolved
    }

    /// Opens generation `n`; the snapshot, and how its reader maps it.
    fn begin(&mut self, n: u64, base: Option<GenerationName>) -> (Begun, ReaderMemories) {
        let shape = *self.engine.shape();
        let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
        let asked = SnapshotRequest {
            id: SnapshotId([1; 16]),
            opens: name(n),
            opens_at: WallTime(n.cast_signed()),
            base,
            absent: Absent::Words(&[]),
            limits: Limits {
                overflow: Overflow::GiveUp,
                wait_limit: Duration::from_secs(1),
                lease: Duration::from_secs(2),
            },
            memories: SnapshotMemories {
                states: plain(shape.states_words()),
                index: plain(SlotIndex::words(1)),
                wanted: plain(shape.wanted_words()),
                save_slots: 1,
                save_area: Arc::new(()),
            },
        };
        let [control, banks] = self.memories.clone();
        let reader = ReaderMemories {
            control,
            banks,
            states: Arc::clone(&asked.memories.states),
            index: Arc::clone(&asked.memories.index),
            wanted: Arc::clone(&asked.memories.wanted),
        };
        let prepared = self.control.prepare(&asked).unwrap();
        let mut hold = self
            .control
            .hold(Instant(0), Duration::from_secs(1))
            .unwrap();
        assert_eq!(self.control.poll(&mut hold, Instant(0)), HoldState::Held);
        let begun = self.control.commit(&hold, &prepared, Instant(0)).unwrap();
        assert_eq!(begun.opened, name(n));
        (begun, reader)
    }

    fn end(&mut self) {
        self.control.end_snapshot().unwrap();
    }

    fn changed(&self, n: u64) -> Vec<u64> {
        let set = self.control.changed_since(name(n)).unwrap();
        set.blocks().map(|b| b.0).collect()
    }
}

fn repository(n: u8) -> RepositoryId {
    RepositoryId([n; 16])
}

/// req B1, A9, trap TG3: each consumer is told what came after its own image.
#[test]
fn changes_are_counted_from_a_name_on() {
    let mut volume = Volume::new(20, &[]);
    for n in 1..4 {
        volume.write(n * 10);
        assert!(volume.swap(n, Some(name(n - 1))));
        volume.end();
    }
    volume.write(99);
    assert_eq!(volume.changed(0), [10, 20, 30, 99]);
    assert_eq!(volume.changed(2), [30, 99]);
    assert_eq!(volume.changed(3), [99]);
    assert!(matches!(
        volume.control.changed_since(name(7)),
        Err(EngineError::UnknownGeneration { .. })
    ));
    assert!(!volume.swap(4, Some(name(7))), "an unknown base is no base");
}

/// trap TG3: with more generations than banks or names, hinted boundaries stay exact; the others give supersets, and
/// never less.
#[test]
fn hinted_boundaries_stay_apart() {
    let mut volume = Volume::new(12, &[]);
    for n in 1..60 {
        volume.write(n);
        volume.swap(n, None);
        volume.end();
        if n == 5 || n == 20 {
            volume
                .control
                .set_hint(repository(u8::try_from(n).unwrap()), name(n));
        }
    }
    volume.write(100);
    let after = |n: u64| (n + 1..60).chain([100]).collect::<Vec<_>>();
    assert_eq!(volume.changed(5), after(5));
    assert_eq!(volume.changed(20), after(20));
    assert_eq!(volume.changed(59), [100]);
    for generation in volume.control.generations() {
        let n = u64::try_from(u128::from_le_bytes(generation.name.0) >> 32).unwrap();
        let changed = volume.changed(n);
        assert!(after(n).iter().all(|b| changed.contains(b)), "since {n}");
    }
    assert!(volume.control.generations().len() <= 12);
}

#[test]
fn the_oldest_hint_goes_and_is_named() {
    let mut volume = Volume::new(12, &[]);
    for n in 1..4 {
        assert_eq!(volume.control.set_hint(repository(n), name(n.into())), None);
    }
    assert_eq!(
        volume.control.set_hint(repository(1), name(9)),
        None,
        "renewed"
    );
    let dropped = volume.control.set_hint(repository(4), name(4));
    assert_eq!(dropped, Some(repository(2)));
    volume.control.drop_hint(repository(3));
    let left: Vec<_> = volume
        .control
        .hints()
        .iter()
        .map(|h| (h.repository, h.name))
        .collect();
    assert_eq!(left, [(repository(1), name(9)), (repository(4), name(4))]);
}

/// req A5: what a clean stop stores and the next life begins with says of each name what it said before.
#[test]
fn export_and_the_next_life_agree() {
    let mut volume = Volume::new(30, &[]);
    for n in 1..15 {
        volume.write(n);
        volume.swap(n, None);
        volume.end();
        if n % 4 == 0 {
            let one = u8::try_from(n).unwrap();
            volume.control.set_hint(repository(one), name(n));
        }
    }
    volume.write(150);
    let stored = volume.control.export();
    assert_eq!(stored.len(), 15);
    let next = Volume::new(30, &stored);
    for n in 0..15 {
        assert_eq!(next.changed(n), volume.changed(n), "since {n}");
    }
    next.write(160);
    assert_eq!(next.changed(14), [150, 160]);
    // More generations than fit, each with bits of its own: the oldest names go, the others lose nothing.
    let bits = |n: u64| {
        let mut words = vec![0_u64; 4];
        let word = usize::try_from(n / 64).unwrap();
        words[word] |= 1 << (n % 64);
        words
    };
    let many: Vec<_> = (1..100)
        .map(|n| StoredGeneration {
            name: name(n),
            counter: n,
            opened: WallTime(0),
            words: bits(n),
        })
        .collect();
    let mut volume = Volume::new(30, &many);
    volume.control.changed_since(name(70)).unwrap_err();
    for n in 71..100 {
        let changed = volume.changed(n);
        assert!((n..100).all(|b| changed.contains(&b)), "since {n}");
    }
    assert_eq!(volume.changed(99), [99]);
    volume.swap(200, Some(name(99)));
}

/// A bitmap of another size is refused, not cut.
#[test]
fn too_many_words_are_refused() {
    let volume = Volume::new(8, &[]);
    let stored = StoredGeneration {
        name: name(1),
        counter: 1,
        opened: WallTime(0),
        words: vec![0; 5],
    };
    let outcome = volume
        .engine
        .control()
        .begin_life(&[stored], (name(2), WallTime(0)));
    assert!(matches!(
        outcome,
        Err(EngineError::OtherSize {
            needed: 4,
            found: 5
        })
    ));
}

/// req X3: a successor keeps names, marks and hints; its predecessor's snapshot is revoked, its gate open.
#[test]
fn a_successor_goes_on() {
    let mut volume = Volume::new(8, &[]);
    volume.write(3);
    volume.control.set_hint(repository(1), name(0));
    volume.swap(1, Some(name(0)));
    let snapshot = Arc::clone(volume.control.snapshot().unwrap());
    let _held = volume
        .control
        .hold(Instant(0), Duration::from_secs(9))
        .unwrap();
    let engine = Engine::open(&volume.memories[0], &volume.memories[1]).unwrap();
    let mut control = engine.control();
    control.take_over((name(50), WallTime(9))).unwrap();
    assert_eq!(snapshot.revoked(), Some(RevokeCause::ServerDied));
    assert!(!engine.gate_is_set());
    assert_eq!(control.trusted().reason, None);
    assert_eq!(control.hints().len(), 1);
    let next = Volume {
        memories: volume.memories.clone(),
        engine,
        control,
    };
    next.write(4);
    assert_eq!(next.changed(0), [3, 4]);
    assert_eq!(next.changed(1), [4]);
}

/// req B1: what a revoked snapshot wanted is not read from a bank that may be another generation's by now.
#[test]
fn a_revoked_snapshot_cannot_be_opened() {
    let mut volume = Volume::new(8, &[]);
    volume.write(3);
    let (begun, reader) = volume.begin(1, Some(name(0)));
    let shape = *volume.engine.shape();
    let view = SnapshotView::open(&shape, &reader, &begun, 1).unwrap();
    assert_eq!(view.wanted().blocks().count(), 1);
    volume.control.revoke(RevokeCause::Cancelled);
    let cause = RevokeCause::Cancelled;
    let refused = SnapshotView::open(&shape, &reader, &begun, 1).unwrap_err();
    assert!(matches!(refused, EngineError::Revoked { cause: c } if c == cause));
}

/// P7: a successor that waits for the fence has no tick, whatever its predecessor had: it is not taken for hung.
#[test]
fn a_successor_begins_without_a_tick() {
    let volume = Volume::new(8, &[]);
    let numbers = 0..volume.engine.shape().queues;
    for number in numbers.clone() {
        volume.engine.queue(number).unwrap().tick(7);
    }
    let engine = Engine::open(&volume.memories[0], &volume.memories[1]).unwrap();
    let mut control = engine.control();
    control.take_over((name(50), WallTime(9))).unwrap();
    for number in numbers {
        assert_eq!(engine.queue_word(number, queue::TICK), 0);
        assert_eq!(engine.queue_word(number, queue::OUTSTANDING), 0);
    }
}

/// A table that does not check is distrusted, and marking goes on.
#[test]
fn a_damaged_table_is_distrusted() {
    for word in [control::EPOCH, shape(8).table(0) + 1, shape(8).table(0) + 9] {
        let volume = Volume::new(8, &[]);
        volume.write(3);
        volume.memories[0].words()[word].fetch_xor(0x15, Ordering::SeqCst);
        let engine = Engine::open(&volume.memories[0], &volume.memories[1]).unwrap();
        let mut control = engine.control();
        control.take_over((name(50), WallTime(9))).unwrap();
        assert_eq!(
            control.trusted().reason,
            Some(Reason::TrackingInterrupted),
            "{word}"
        );
        let next = Volume {
            memories: volume.memories.clone(),
            engine,
            control,
        };
        next.write(4);
        assert!(next.changed(50).contains(&4));
        next.control.changed_since(name(0)).unwrap_err();
    }
}

/// req A6: distrust forgets names, says why, and ends with a full image whose generation is known.
#[test]
fn distrust_lasts_until_a_full_image() {
    let mut volume = Volume::new(8, &[]);
    volume.swap(1, Some(name(0)));
    let why = (Reason::TrackerSuspect, WallTime(77));
    volume
        .control
        .distrust(why, "a canary was missed", name(60));
    assert_eq!(
        volume.control.snapshot().unwrap().revoked(),
        Some(RevokeCause::Distrusted)
    );
    volume.end();
    let trust = volume.control.trusted();
    assert_eq!((trust.reason, trust.since), (Some(why.0), why.1));
    assert_eq!(volume.control.distrust_detail(), "a canary was missed");
    volume.control.changed_since(name(1)).unwrap_err();
    assert!(!volume.control.trust(name(1)), "made before the distrust");
    assert!(!volume.swap(2, Some(name(1))));
    volume.end();
    assert!(volume.control.trust(name(2)));
    assert_eq!(volume.control.trusted().reason, None);
    volume.control.remember_distrust(why, &"x".repeat(500));
    assert_eq!(volume.control.distrust_detail().len(), 120);
    assert!(volume.control.changed_since(name(2)).is_ok(), "still known");
}

/// A swap that was prepared before the table changed does not take place.
#[test]
fn a_stale_plan_is_not_committed() {
    let mut volume = Volume::new(8, &[]);
    let shape = *volume.engine.shape();
    let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
    let asked = SnapshotRequest {
        id: SnapshotId([1; 16]),
        opens: name(1),
        opens_at: WallTime(1),
        base: None,
        absent: Absent::Everything,
        limits: Limits {
            overflow: Overflow::GiveUp,
            wait_limit: Duration::from_secs(1),
            lease: Duration::from_secs(2),
        },
        memories: SnapshotMemories {
            states: plain(shape.states_words()),
            index: plain(SlotIndex::words(1)),
            wanted: plain(shape.wanted_words()),
            save_slots: 1,
            save_area: Arc::new(()),
        },
    };
    let prepared = volume.control.prepare(&asked).unwrap();
    let why = (Reason::ForeignWrite, WallTime(0));
    volume.control.distrust(why, "meanwhile", name(60));
    let mut hold = volume
        .control
        .hold(Instant(0), Duration::from_secs(1))
        .unwrap();
    assert_eq!(volume.control.poll(&mut hold, Instant(0)), HoldState::Held);
    let outcome = volume.control.commit(&hold, &prepared, Instant(0));
    assert!(matches!(outcome, Err(EngineError::PlanStale)));
    assert!(!volume.engine.gate_is_set(), "nobody is left waiting");
    // One that expired is not committed either, and can be held again.
    let prepared = volume.control.prepare(&asked).unwrap();
    let mut hold = volume
        .control
        .hold(Instant(0), Duration::from_secs(1))
        .unwrap();
    assert_eq!(
        volume.control.poll(&mut hold, Instant(2_000_000_000)),
        HoldState::Over
    );
    let outcome = volume.control.commit(&hold, &prepared, Instant(0));
    assert!(matches!(outcome, Err(EngineError::HoldOver { .. })));
    let mut hold = volume
        .control
        .hold(Instant(0), Duration::from_secs(1))
        .unwrap();
    assert_eq!(volume.control.poll(&mut hold, Instant(0)), HoldState::Held);
    volume.control.commit(&hold, &prepared, Instant(0)).unwrap();
    // req D2: a reader without progress is given up.
    volume.control.tick(Instant(1_900_000_000));
    assert_eq!(volume.control.snapshot().unwrap().revoked(), None);
    volume.control.tick(Instant(2_100_000_000));
    assert_eq!(
        volume.control.snapshot().unwrap().revoked(),
        Some(RevokeCause::ReaderStalled)
    );
}

/// P10: an unreadable block is marked, so that the next incremental reads it.
#[test]
fn a_block_can_be_marked_by_hand() {
    let volume = Volume::new(8, &[]);
    let last = BlockRange::new(BlockIndex(BLOCKS - 1), BlockIndex(BLOCKS)).unwrap();
    volume.control.mark(last);
    assert_eq!(volume.changed(0), [BLOCKS - 1]);
}

/// A memory of another layout is refused, and nothing in it is touched.
#[test]
fn an_unknown_layout_is_refused() {
    let volume = Volume::new(8, &[]);
    let words = volume.memories[0].words();
    words[control::VERSION].store(2, Ordering::SeqCst);
    let before: Vec<u64> = words.iter().map(|w| w.load(Ordering::SeqCst)).collect();
    let outcome = Engine::open(&volume.memories[0], &volume.memories[1]);
    assert!(matches!(outcome, Err(EngineError::Layout { .. })));
    let after: Vec<u64> = words.iter().map(|w| w.load(Ordering::SeqCst)).collect();
    assert_eq!(before, after);
    let short: Arc<dyn Memory> = PlainMemory::new(10);
    assert!(matches!(
        Engine::open(&short, &volume.memories[1]),
        Err(EngineError::MemoryTooSmall { .. })
    ));
}

/// trap TG6: no counter of ours wraps at 8, 24 or 32 bits.
#[test]
fn counters_may_be_large() {
    for start in [255, (1 << 24) - 1, (1 << 32) - 1, (1 << 47) - 9] {
        let mut volume = Volume::new(8, &[]);
        for word in [
            control::SNAPSHOT_SEQUENCE,
            control::GENERATION_COUNTER,
            control::HOLD_SEQUENCE,
        ] {
            volume.engine.set_word(word, start);
        }
        for n in 1..4 {
            volume.write(n);
            assert!(volume.swap(n, Some(name(n - 1))));
            let snapshot = Arc::clone(volume.control.snapshot().unwrap());
            assert_eq!((snapshot.sequence(), snapshot.revoked()), (start + n, None));
            volume.end();
            assert_eq!(snapshot.revoked(), Some(RevokeCause::Cancelled));
        }
        assert_eq!(volume.changed(0), [1, 2, 3]);
        let counters: Vec<u64> = volume
            .control
            .generations()
            .iter()
            .map(|g| g.counter)
            .collect();
        assert_eq!(counters[1..], [start + 1, start + 2, start + 3]);
    }
}

/// A base is kept though no hint names it: hints are lost at a stop, and sent again only some time later.
#[test]
fn the_base_that_is_asked_for_is_kept() {
    let mut volume = Volume::new(6, &[]);
    for n in 1..6 {
        volume.write(n);
        volume.swap(n, Some(name(1)));
        volume.end();
    }
    // Six names, all closed but the last; the oldest that nobody asks for goes, not the base.
    for n in 6..30 {
        volume.write(n);
        assert!(volume.swap(n, Some(name(1))), "{n}");
        volume.end();
    }
    assert_eq!(volume.changed(1), (2..30).collect::<Vec<_>>());
}

/// A table that is found damaged while it serves costs a full backup.
#[test]
fn a_table_that_breaks_is_distrusted_at_the_next_snapshot() {
    let mut volume = Volume::new(8, &[]);
    volume.write(3);
    let sum = shape(8).table(0) + 1;
    volume.memories[0].words()[sum].fetch_xor(1, Ordering::SeqCst);
    assert!(!volume.swap(1, Some(name(0))));
    assert_eq!(
        volume.control.trusted().reason,
        Some(Reason::TrackingInterrupted)
    );
    volume.end();
    volume.write(4);
    assert_eq!(volume.changed(1), [4]);
    assert!(volume.control.trust(name(1)));
}
