//! Marks from elsewhere and generations without a gate; and deaths before every single store.

use super::*;
use crate::atomic::Ordering;
use crate::broken::cut_after;
use crate::control::StoredGeneration;
use crate::{Engine, Memory, PlainMemory};
use blktide_format::shared::Shape;
use blktide_format::shared::control as head;
use blktide_testkit::seed::Seed;
use blktide_types::geometry::Geometry;
use blktide_types::id::RepositoryId;
use blktide_types::reason::Reason;
use std::collections::BTreeSet;
use std::sync::Arc;

const BLOCKS: u64 = 200;
const GRAIN: BlockSize = BlockSize::IMAGE_MIN;

struct Volume {
    memories: [Arc<dyn Memory>; 2],
    control: Control,
}

fn name(n: u64) -> GenerationName {
    GenerationName((u128::from(n) << 32 | 5).to_le_bytes())
}

fn numbers(set: &BlockSet) -> BTreeSet<u64> {
    set.blocks().map(|b| b.0).collect()
}

fn engine(geometry: Geometry, banks: usize) -> ([Arc<dyn Memory>; 2], Engine) {
    let shape = Shape {
        generations: banks + 2,
        banks,
        hints: 1,
        log_bytes: 8,
        ..Shape::usual(geometry)
    };
    let memories: [Arc<dyn Memory>; 2] = [
        PlainMemory::new(shape.control_words()),
        PlainMemory::new(shape.banks_words()),
    ];
    let engine = Engine::create(&memories[0], &memories[1], shape).unwrap();
    (memories, engine)
}

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * 4096, GRAIN, GRAIN, 512, 512).unwrap()
}

impl Volume {
    fn new(banks: usize) -> Self {
        let (memories, engine) = engine(geometry(), banks);
        let mut control = engine.control();
        control.begin_life(&[], (name(0), WallTime(0))).unwrap();
        Self { memories, control }
    }

    /// What the next process makes of the memories.
    fn reopened(&self) -> Self {
        let memories = self.memories.clone();
        let engine = Engine::open(&memories[0], &memories[1]).unwrap();
        let mut control = engine.control();
        control.adopt((name(9_000), WallTime(9)));
        Self { memories, control }
    }

    fn write(&self, block: u64) {
        let word = usize::try_from(block / 64).unwrap();
        self.control.absorb(GRAIN, word, 1 << (block % 64));
    }

    fn change(&mut self, n: u64, base: Option<GenerationName>) -> Opened {
        let at = WallTime(n.cast_signed());
        let prepared = self.control.prepare_generation(name(n), at, base).unwrap();
        let opened = self.control.open_prepared(&prepared).unwrap();
        self.control.settle();
        opened
    }

    fn changed(&self, n: u64) -> BTreeSet<u64> {
        numbers(&self.control.changed_since(name(n)).unwrap())
    }

    /// Four generations with a write each, one of them hinted, so that the next needs a merge and a dropped name.
    fn full() -> Self {
        let mut volume = Self::new(4);
        volume.control.set_hint(RepositoryId([1; 16]), name(1));
        for n in 1..8 {
            volume.write(n);
            volume.change(n, Some(name(1)));
        }
        volume.write(8);
        volume
    }
}

/// req B1, trap TA7: whatever the two sizes are, each byte of a foreign bit lies in a marked grain, nothing else is marked, and
/// what is past the volume is nobody's.
#[test]
fn absorbed_bits_are_those_of_plain_division() {
    let mut seed = Seed::of_test("absorb").numbers();
    for _ in 0..2000 {
        let size = |n: u64| BlockSize::from_shift(u8::try_from(n).unwrap()).unwrap();
        let block = size(12 + seed.below(9));
        let watch = size(9 + seed.below(12));
        let bytes = (seed.below(300) * block.bytes_u64() + 512 * seed.below(40)).max(512);
        let geometry = Geometry::new(bytes, block, block, 512, 512).unwrap();
        let (_memories, engine) = engine(geometry, 2);
        let mut control = engine.control();
        control.begin_life(&[], (name(0), WallTime(0))).unwrap();
        let mut expected = BTreeSet::new();
        for _ in 0..4 {
            let words = bytes.div_ceil(64 * watch.bytes_u64()) + 1;
            let word = seed.below(words);
            let bits = seed.below(u64::MAX) & seed.below(u64::MAX) | seed.below(2) << 63;
            control.absorb(watch, usize::try_from(word).unwrap(), bits);
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                let from = (word * 64 + bit) * watch.bytes_u64();
                let to = (from + watch.bytes_u64()).min(bytes);
                let sectors = (from..to).step_by(512);
                expected.extend(sectors.map(|byte| byte / block.bytes_u64()));
            }
        }
        control.absorb(watch, usize::MAX, u64::MAX);
        let changed = numbers(&control.changed_since(name(0)).unwrap());
        assert_eq!(changed, expected, "{block} {watch} {bytes}");
    }
}

/// req B1, A9: each base is told what came after its own image, and each image what it has new.
#[test]
fn generations_change_without_a_gate() {
    let mut volume = Volume::new(8);
    for n in 1..4 {
        volume.write(n * 10);
        let opened = volume.change(n, Some(name(n - 1)));
        assert!(opened.base_resolved);
        assert_eq!(opened.name, name(n));
        let new = volume.control.changed_between(name(n - 1), name(n));
        assert_eq!(numbers(&new.unwrap()), [n * 10].into());
    }
    volume.write(99);
    assert_eq!(volume.changed(1), [20, 30, 99].into());
    let between = volume.control.changed_between(name(1), name(3)).unwrap();
    assert_eq!(numbers(&between), [20, 30].into());
    for (from, until) in [(3, 1), (7, 3), (1, 7)] {
        volume
            .control
            .changed_between(name(from), name(until))
            .unwrap_err();
    }
    assert!(volume.control.resolves(name(1)));
    assert!(!volume.control.resolves(name(7)));
    assert!(!volume.change(4, Some(name(7))).base_resolved);
    assert!(!volume.control.generations().is_empty());
    volume.control.pass_through(WallTime(1), name(50));
    assert!(!volume.control.resolves(name(50)));
}

/// The base that is asked for keeps its boundary, however many generations come after it.
#[test]
fn the_base_is_not_merged() {
    let mut volume = Volume::new(8);
    volume.write(100);
    volume.change(1, None);
    for n in 2..40 {
        volume.write(n);
        assert!(volume.change(n, Some(name(1))).base_resolved, "{n}");
    }
    assert_eq!(volume.changed(1), (2..40).collect());
}

/// What was prepared before the table changed, or before another was prepared, is not opened, and nothing has happened.
#[test]
fn a_stale_plan_is_not_opened() {
    let mut volume = Volume::new(8);
    let prepare = |volume: &mut Volume, n| {
        let control = &mut volume.control;
        control
            .prepare_generation(name(n), WallTime(1), None)
            .unwrap()
    };
    let stale = |volume: &mut Volume, plan: &PreparedGeneration| {
        let outcome = volume.control.open_prepared(plan);
        assert!(matches!(outcome, Err(EngineError::PlanStale)));
    };
    let first = prepare(&mut volume, 1);
    let second = prepare(&mut volume, 2);
    stale(&mut volume, &first);
    volume.control.open_prepared(&second).unwrap();
    stale(&mut volume, &second);
    let third = prepare(&mut volume, 3);
    let why = (Reason::TrackingInterrupted, WallTime(0));
    volume.control.distrust(why, "meanwhile", name(60));
    stale(&mut volume, &third);
    let names: Vec<_> = volume
        .control
        .generations()
        .iter()
        .map(|g| g.name)
        .collect();
    assert_eq!(names, [name(60)]);
}

/// req X9: a control side killed before any of its stores leaves a table that checks, and no name that means less than
/// before. The next process goes on from there.
#[test]
fn a_death_at_any_store_leaves_a_right_table() {
    for stores in 0.. {
        let mut volume = Volume::full();
        let known: Vec<_> = (0..8)
            .filter(|n| volume.control.resolves(name(*n)))
            .collect();
        assert!(known.contains(&1) && known.contains(&7));
        let (mut opened, control) = (false, &mut volume.control);
        let ended = cut_after(stores, || {
            let prepared = control.prepare_generation(name(8), WallTime(8), Some(name(7)));
            control.open_prepared(&prepared.unwrap()).unwrap();
            opened = true;
            control.settle();
        });
        let mut next = volume.reopened();
        assert_eq!(next.control.trusted().reason, None, "{stores}");
        let after = |n: u64| (n + 1..=8).collect::<BTreeSet<_>>();
        assert_eq!(next.changed(1), after(1), "hinted, {stores}");
        assert_eq!(next.changed(7), after(7), "the base, {stores}");
        for n in known
            .into_iter()
            .filter(|n| next.control.resolves(name(*n)))
        {
            assert!(next.changed(n).is_superset(&after(n)), "{n}, {stores}");
        }
        assert!(next.control.resolves(name(8)) || !opened, "{stores}");
        if next.control.resolves(name(8)) {
            assert_eq!(next.changed(8), BTreeSet::new());
        }
        next.write(150);
        next.change(20, Some(name(7)));
        next.write(160);
        let between = next.control.changed_between(name(7), name(20)).unwrap();
        assert_eq!(numbers(&between), [8, 150].into(), "{stores}");
        assert_eq!(next.changed(20), [160].into(), "{stores}");
        if ended {
            assert!(stores > 100, "only {stores} stores were cut");
            return;
        }
    }
}

/// req A6: a death within a distrust leaves either the old names and trust, or none of the old names; never a name that an image
/// could end the distrust with.
#[test]
fn a_death_within_a_distrust_forgets_or_does_nothing() {
    for stores in 0.. {
        let mut volume = Volume::full();
        let (why, control) = (
            (Reason::TrackingInterrupted, WallTime(7)),
            &mut volume.control,
        );
        let ended = cut_after(stores, || {
            control.distrust(why, "a run was skipped", name(60));
        });
        let mut next = volume.reopened();
        if next.control.resolves(name(7)) {
            assert_eq!(next.control.trusted().reason, None, "{stores}");
            assert_eq!(next.changed(7), [8].into());
        } else {
            assert!(!next.control.trust(name(7)) && !next.control.resolves(name(1)));
            next.write(9);
            assert!(next.changed(60).contains(&9));
        }
        if ended {
            assert_eq!(next.control.trusted().reason, Some(why.0));
            assert_eq!(next.control.distrust_detail(), "a run was skipped");
            return;
        }
    }
}

/// req A5: a death while a life begins leaves all that was stored, or distrust.
#[test]
fn a_death_while_a_life_begins_is_seen() {
    let stored: Vec<_> = (1..4)
        .map(|n| StoredGeneration {
            name: name(n),
            counter: n,
            opened: WallTime(0),
            words: vec![1 << n, 0, 0, 0],
        })
        .collect();
    for stores in 0.. {
        let (memories, engine) = engine(geometry(), 6);
        let mut control = engine.control();
        let ended = cut_after(stores, || {
            let fresh = (name(9), WallTime(9));
            control.begin_life(&stored, fresh).unwrap();
        });
        let next = Volume { memories, control }.reopened();
        if next.control.trusted().reason.is_none() {
            assert_eq!(next.changed(1), [1, 2, 3].into(), "{stores}");
            assert_eq!(next.changed(3), [3].into(), "{stores}");
        } else {
            assert!((1..4).all(|n| !next.control.resolves(name(n))));
        }
        if ended {
            assert_eq!(next.control.trusted().reason, None);
            return;
        }
    }
}

/// req X9: a drainer killed between the bank and the source's word has the marks twice, not never.
#[test]
fn a_death_within_absorb_leaves_marks_in_one_place_or_both() {
    for stores in 0..5 {
        let volume = Volume::new(8);
        let mut source = 0b1011_u64 | 1 << 63;
        let ended = cut_after(stores, || {
            let bits = source;
            volume.control.absorb(GRAIN, 1, bits);
            source &= !bits;
        });
        let next = volume.reopened();
        next.control.absorb(GRAIN, 1, source);
        assert_eq!(next.changed(0), [64, 65, 67, 127].into(), "{ended}");
    }
}

/// A damaged table is distrusted, its marks are kept, and the next process goes on.
#[test]
fn a_damaged_table_is_not_adopted() {
    for word in [head::EPOCH, head::GATE] {
        let volume = Volume::full();
        volume.memories[0].words()[word].fetch_xor(0x115, Ordering::SeqCst);
        let mut next = volume.reopened();
        let damaged = word == head::EPOCH;
        let reason = damaged.then_some(Reason::TrackingInterrupted);
        assert_eq!(next.control.trusted().reason, reason);
        assert_eq!(next.control.resolves(name(7)), !damaged);
        next.write(30);
        let opened = next.change(40, None);
        next.write(31);
        assert_eq!(next.changed(40), [31].into());
        assert!(next.control.trust(opened.name));
    }
}
