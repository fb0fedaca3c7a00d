//! Marks and drains against plain numbers, by threads, and cut short.

use super::*;
use crate::PlainMemory;
use crate::broken::cut_after;
use blktide_testkit::seed::Seed;
use blktide_types::id::VolumeId;
use blktide_types::unit::BlockSize;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

const GRAINS: u64 = 1000;

fn shape() -> WatchShape {
    WatchShape {
        volume: VolumeId([1; 16]),
        grain: BlockSize::IMAGE_MIN,
        device: 1,
        start_sector: 0,
        sectors: GRAINS * 8,
        bio_based: false,
    }
}

fn marks() -> WatchMarks {
    let memory: Arc<dyn Memory> = PlainMemory::new(shape().words());
    WatchMarks::new(&memory, &shape()).unwrap()
}

fn into(set: &mut BTreeSet<u64>) -> impl FnMut(usize, u64) -> ControlFlow<()> {
    |index, bits| {
        let start = u64::try_from(index).unwrap() * 64;
        let grains = (0..64).filter(|bit| bits >> bit & 1 == 1);
        set.extend(grains.map(|bit| start + bit));
        ControlFlow::Continue(())
    }
}

/// trap TA8: each generation's drain has what was marked in it, and nothing else.
#[test]
fn a_drain_has_the_marks_of_its_generation() {
    let mut seed = Seed::of_test("watch").numbers();
    let marks = marks();
    for turn in 0..500 {
        let mut expected = BTreeSet::new();
        for _ in 0..seed.below(4) {
            let start = seed.below(GRAINS);
            let end = start + 1 + seed.below(GRAINS - start);
            marks.mark(start, end);
            expected.extend(start..end);
        }
        let mut found = BTreeSet::new();
        if turn % 3 == 0 {
            assert!(marks.drain_live(into(&mut found)).is_continue());
        } else {
            assert_eq!(marks.swap(), marks.generation());
            assert!(marks.drain_closed(into(&mut found)).is_continue());
        }
        assert_eq!(found, expected, "{turn}");
    }
    assert_eq!(marks.lost(), 0);
}

/// req X9: a drain that ends before any of its stores has lost nothing: the next has what it had not absorbed, and what it had
/// not cleared a second time.
#[test]
fn a_drain_cut_short_loses_nothing() {
    for stores in 0.. {
        let marks = marks();
        marks.mark(3, 5);
        marks.mark(60, 200);
        marks.swap();
        let expected: BTreeSet<_> = (3..5).chain(60..200).collect();
        let mut found = BTreeSet::new();
        let ended = cut_after(stores, || {
            let _end = marks.drain_closed(into(&mut found));
        });
        marks.mark(900, 901);
        assert!(marks.drain_closed(into(&mut found)).is_continue());
        assert_eq!(found, expected, "{stores}");
        marks.swap();
        assert!(marks.drain_closed(into(&mut found)).is_continue());
        assert!(found.contains(&900));
        if ended {
            return;
        }
    }
}

/// Breaking off leaves the word.
#[test]
fn a_drain_that_breaks_off_leaves_the_word() {
    let marks = marks();
    marks.mark(70, 72);
    let end = marks.drain_live(|index, bits| ControlFlow::Break((index, bits)));
    assert_eq!(end, ControlFlow::Break((1, 0b11 << 6)));
    let mut found = BTreeSet::new();
    assert!(marks.drain_live(into(&mut found)).is_continue());
    assert_eq!(found, [70, 71].into());
}

/// trap TG6: the generation may be large, and wraps where no machine gets to.
#[test]
fn generations_may_be_large() {
    for start in [(1 << 24) - 2, (1 << 32) - 2, u64::MAX - 2] {
        let marks = marks();
        marks.generation.store(0, start, Ordering::Relaxed);
        for grain in 0..5 {
            marks.mark(grain, grain + 1);
            marks.swap();
            let mut found = BTreeSet::new();
            assert!(marks.drain_closed(into(&mut found)).is_continue());
            assert_eq!(found, [grain].into());
        }
    }
}

/// req X9, B1: threads mark while generations change as fast as they can; each mark that was made is found, once its drain is over.
#[test]
fn no_mark_is_lost_under_swaps() {
    let marks = marks();
    let stop = AtomicBool::new(false);
    let swaps = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|n| {
                let marks = &marks;
                scope.spawn(move || {
                    for turn in 0..30_000 {
                        let grain = (turn * 2 + n) % GRAINS;
                        marks.mark(grain, grain + 1);
                    }
                })
            })
            .collect();
        let drainer = scope.spawn(|| {
            let mut found = BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                marks.swap();
                let _end = marks.drain_closed(into(&mut found));
            }
            marks.swap();
            let _end = marks.drain_closed(into(&mut found));
            assert_eq!(found, (0..GRAINS).collect(), "lost");
            marks.generation()
        });
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        drainer.join().unwrap()
    });
    assert!(swaps > 0);
}
