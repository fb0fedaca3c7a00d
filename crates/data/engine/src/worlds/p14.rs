//! P14: programs mark, writes are under way over swaps; a drainer swaps, drains, copies, and may be killed; the last round is frozen.
//!
//! The base image has every block as it was at the beginning. Each round copies what its drain found; at the end every block of the
//! image must be what the device has. So a mark that is merely late is found: the last round drains one bitmap only.
//!
//! In the world `moment` somebody writes whom no freeze reaches: the number of marks says whether there was a quiet moment all the same.
//!
//! Completions may go unseen. Then the last round finds that fewer were counted than there were, and copies once more all that was
//! ever drained.

use super::explore;
use crate::PlainMemory;
use crate::atomic::{AtomicU64, Memory, Ordering::*, Words, fence};
use crate::broken::Break::{self, *};
use crate::broken::broken;
use crate::tracker::Marks;
use crate::watch::WatchMarks;
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;
use core::ops::ControlFlow;
use loom::sync::RwLock;
use loom::thread;
use std::sync::Arc;

const GRAIN: BlockSize = BlockSize::IMAGE_MIN;

/// Where a drainer is killed, in its first round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    AfterSwap,
    BeforeAbsorb,
    BeforeClear,
    AfterDrain,
}

#[derive(Clone, Copy)]
struct World {
    /// Each writes a block of its own, once; all bits lie in one word.
    writers: usize,
    /// They write to one block.
    same: bool,
    /// There are completions to be seen. If not, generations change inside a freeze.
    completions: bool,
    /// The kernel does not run the program at completions.
    unseen: bool,
    /// Rounds before the last, while writes are under way.
    rounds: usize,
    /// The bitmap that is live is drained first, without a swap.
    live: bool,
    dies: Option<Death>,
    /// Turns of a mark.
    turns: u32,
}

struct Shared {
    w: World,
    watch: WatchMarks,
    marks: Marks,
    device: [AtomicU64; 2],
    /// Completions: as the kernel counts them, and as we do.
    completed: AtomicU64,
    counted: AtomicU64,
    freeze: RwLock<()>,
}

impl Shared {
    /// A write, and the programs that see it.
    fn write(&self, writer: usize) {
        let block = if self.w.same { 0 } else { writer };
        let bit = u64::try_from(block).unwrap();
        let inside = (!self.w.completions).then(|| self.freeze.read().unwrap());
        self.watch.mark(bit, bit + 1);
        self.device[block].store(u64::try_from(writer).unwrap() + 1, Relaxed);
        if self.w.completions && !self.w.unseen {
            if !broken(NoCompletionMark) {
                // The device tells that it is done, and that is seen before anything is looked at.
                fence(SeqCst);
                self.watch.mark(bit, bit + 1);
            }
            self.counted.fetch_add(1, Relaxed);
        }
        if self.w.completions {
            self.completed.fetch_add(1, Relaxed);
        }
        drop(inside);
    }

    fn swap(&self) {
        let frozen = !self.w.completions && !broken(SwapUnfrozen);
        let frozen = frozen.then(|| self.freeze.write().unwrap());
        self.watch.swap();
        drop(frozen);
    }

    /// Drains a bitmap into the bank, and copies what it says; false if it was killed.
    fn drain(&self, live: bool, dies: Option<Death>, image: &mut [u64; 2]) -> bool {
        let mut found = 0;
        let absorb = |index, bits| {
            if dies == Some(Death::BeforeAbsorb) {
                return ControlFlow::Break(());
            }
            self.marks.absorb(GRAIN, index, bits);
            found |= bits;
            if dies == Some(Death::BeforeClear) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let end = if live {
            self.watch.drain_live(absorb)
        } else {
            self.watch.drain_closed(absorb)
        };
        self.copy(found, image);
        end.is_continue() && dies.is_none()
    }

    fn copy(&self, set: u64, image: &mut [u64; 2]) {
        for block in (0..2).filter(|b| set >> b & 1 == 1) {
            image[block] = self.device[block].load(Relaxed);
        }
    }

    /// The rounds before the last; false if it was killed.
    fn rounds(&self, rounds: usize, dies: Option<Death>, image: &mut [u64; 2]) -> bool {
        if self.w.live && !self.drain(true, None, image) {
            return false;
        }
        for _ in 0..rounds {
            self.swap();
            if dies == Some(Death::AfterSwap) || !self.drain(false, dies, image) {
                return false;
            }
        }
        true
    }

    fn bank(&self) -> u64 {
        self.marks.bank(0).unwrap().load(0, Relaxed)
    }
}

fn run(w: World) {
    // Generation, lost, two bitmaps; epoch, a bank.
    let memory: Arc<dyn Memory> = PlainMemory::new(6);
    let geometry = Geometry::new(2 * 4096, GRAIN, GRAIN, 512, 512).unwrap();
    let word = |i| Words::new(&memory, i, 1).unwrap();
    let x = Arc::new(Shared {
        w,
        watch: WatchMarks::small(&memory, w.turns).unwrap(),
        marks: Marks::new(word(4), Box::new([word(5)]), geometry),
        device: [AtomicU64::new(0), AtomicU64::new(0)],
        completed: AtomicU64::new(0),
        counted: AtomicU64::new(0),
        freeze: RwLock::new(()),
    });
    let writers: Vec<_> = (0..w.writers)
        .map(|writer| {
            let x = Arc::clone(&x);
            thread::spawn(move || x.write(writer))
        })
        .collect();
    let mut image = [0; 2];
    if !x.rounds(w.rounds, w.dies, &mut image) {
        // The successor knows the base and the bank, and has a round less.
        image = [0; 2];
        if !broken(LeftUndrained) {
            x.drain(false, None, &mut image);
        }
        x.copy(x.bank(), &mut image);
        x.rounds(w.rounds - 1, None, &mut image);
    }
    // The freeze: what was submitted has landed, its submitters were told.
    for writer in writers {
        writer.join().unwrap();
    }
    x.watch.swap();
    x.drain(false, None, &mut image);
    if x.counted.load(Relaxed) != x.completed.load(Relaxed) && !broken(UnseenUnchecked) {
        x.copy(x.bank(), &mut image);
    }
    if x.watch.lost() > 0 {
        return;
    }
    for (block, copy) in image.iter().enumerate() {
        let content = x.device[block].load(Relaxed);
        assert_eq!(*copy, content, "the image has an old block");
        assert!(
            content == 0 || x.bank() >> block & 1 == 1,
            "write in no increment"
        );
    }
}

/// Somebody whom no freeze reaches writes one block and then another. An image whose moment was seen to be quiet has not the second
/// write without the first, and what it has not is marked in the generation that began there.
fn moment() {
    let memory: Arc<dyn Memory> = PlainMemory::new(6);
    let watch = Arc::new(WatchMarks::small(&memory, 16).unwrap());
    let device = Arc::new([AtomicU64::new(0), AtomicU64::new(1)]);
    let events = Arc::new(AtomicU64::new(0));
    let look = |set: u64, image: &mut [u64; 2]| {
        for block in (0..2).filter(|b| set >> b & 1 == 1) {
            image[block] = device[block].load(Relaxed);
        }
    };
    let mut image = [0; 2];
    look(0b11, &mut image);
    // Written again since that copy: so the second block is read in the moment.
    watch.mark(1, 2);
    let writer = {
        let (watch, device, events) =
            (Arc::clone(&watch), Arc::clone(&device), Arc::clone(&events));
        thread::spawn(move || {
            let mark = |block| {
                watch.mark(block, block + 1);
                events.fetch_add(1, SeqCst);
            };
            for block in [0, 1] {
                mark(block);
                // It is handed to the device, which tells when it is done.
                fence(SeqCst);
                device[usize::try_from(block).unwrap()].store(2, Relaxed);
                fence(SeqCst);
                mark(block);
            }
        })
    };
    let drain = || {
        let mut found = 0;
        let end = watch.drain_closed(|_, bits| {
            found |= bits;
            ControlFlow::<()>::Continue(())
        });
        assert!(end.is_continue());
        found
    };
    let before = events.load(SeqCst);
    watch.swap();
    look(drain(), &mut image);
    // The device has told what was read before anything else is looked at.
    fence(SeqCst);
    let quiet = events.load(SeqCst) == before || broken(MomentUnwatched);
    writer.join().unwrap();
    assert!(
        !quiet || image != [0, 2],
        "an image of no one moment is called quiet"
    );
    watch.swap();
    let later = drain();
    for (block, copy) in image.iter().enumerate() {
        let marked = later >> block & 1 == 1;
        assert!(
            marked || *copy == device[block].load(Relaxed),
            "write in no increment"
        );
    }
}

/// Somebody who sees a word cleared looks for its marks in the bank.
fn order() {
    let memory: Arc<dyn Memory> = PlainMemory::new(6);
    let geometry = Geometry::new(2 * 4096, GRAIN, GRAIN, 512, 512).unwrap();
    let word = |i| Words::new(&memory, i, 1).unwrap();
    let watch = WatchMarks::small(&memory, 16).unwrap();
    let marks = Marks::new(word(4), Box::new([word(5)]), geometry);
    watch.mark(0, 1);
    let observer = {
        let (source, bank) = (word(2), word(5));
        thread::spawn(move || {
            if source.load(0, Acquire) == 0 {
                assert_eq!(bank.load(0, Relaxed), 1, "a mark is in neither place");
            }
        })
    };
    let end = watch.drain_live(|index, bits| {
        marks.absorb(GRAIN, index, bits);
        ControlFlow::<()>::Continue(())
    });
    assert!(end.is_continue());
    observer.join().unwrap();
}

const ONE: World = World {
    writers: 1,
    same: false,
    completions: true,
    unseen: false,
    rounds: 2,
    live: false,
    dies: None,
    turns: 16,
};
const THREE: World = World { rounds: 3, ..ONE };
const TWO: World = World { writers: 2, ..ONE };
const SAME: World = World { same: true, ..TWO };
const LIVE: World = World {
    writers: 2,
    live: true,
    rounds: 1,
    ..ONE
};
const UNSEEN: World = World {
    unseen: true,
    ..ONE
};
const UNSEEN_SAME: World = World {
    writers: 2,
    same: true,
    ..UNSEEN
};
const BIOS: World = World {
    completions: false,
    ..ONE
};
const BIOS_TWO: World = World { writers: 2, ..BIOS };
const BIOS_SAME: World = World {
    same: true,
    ..BIOS_TWO
};
const SHORT: World = World { turns: 1, ..ONE };

const fn killed(dies: Death) -> World {
    World {
        dies: Some(dies),
        rounds: 1,
        ..ONE
    }
}

const MORE: World = World {
    rounds: 2,
    ..killed(Death::BeforeClear)
};
const KILLED_TWO: World = World {
    writers: 2,
    ..killed(Death::BeforeAbsorb)
};

fn with(world: World, rule: Option<Break>, bound: Option<usize>) -> Result<usize, String> {
    explore(rule, bound, move || run(world))
}

/// req X9, B1: every order with one write, up to three preemptions with two.
#[test]
fn p14_holds() {
    for (name, world, bound) in [
        ("one", ONE, None),
        ("three rounds", THREE, Some(4)),
        ("two writes", TWO, Some(3)),
        ("two writes to one block", SAME, Some(3)),
        ("live", LIVE, Some(3)),
        ("completions unseen", UNSEEN, None),
        (
            "completions unseen, two writes to one block",
            UNSEEN_SAME,
            Some(3),
        ),
        ("bios", BIOS, None),
        ("bios, two writes", BIOS_TWO, Some(3)),
        ("bios, two writes to one block", BIOS_SAME, Some(3)),
        ("one turn", SHORT, None),
        ("killed after the swap", killed(Death::AfterSwap), None),
        ("killed before absorbing", killed(Death::BeforeAbsorb), None),
        ("killed before clearing", killed(Death::BeforeClear), None),
        ("killed after the drain", killed(Death::AfterDrain), None),
        ("killed, a round more", MORE, Some(4)),
        ("killed, two writes", KILLED_TWO, Some(3)),
    ] {
        print!("{name}, preemptions {bound:?}: ");
        with(world, None, bound).unwrap();
    }
    print!("order: ");
    explore(None, None, order).unwrap();
    print!("moment: ");
    explore(None, Some(3), moment).unwrap();
}

#[test]
fn p14_every_rule_left_out_is_found() {
    const OLD: &str = "the image has an old block";
    for (world, rule, found) in [
        (ONE, NoSecondLook, OLD),
        (ONE, LookBeforeBits, OLD),
        (ONE, NoMarkFence, OLD),
        (ONE, NoSwapFence, OLD),
        (ONE, NoCompletionMark, OLD),
        (SAME, NoCompletionMark, OLD),
        (UNSEEN, UnseenUnchecked, OLD),
        (UNSEEN_SAME, UnseenUnchecked, OLD),
        (SHORT, LostUnsaid, OLD),
        (LIVE, ClearByStore, OLD),
        (BIOS, SwapUnfrozen, OLD),
        (BIOS_SAME, SwapUnfrozen, OLD),
        (killed(Death::BeforeAbsorb), ClearBeforeAbsorb, OLD),
        (killed(Death::AfterSwap), LeftUndrained, OLD),
        (killed(Death::BeforeAbsorb), LeftUndrained, OLD),
    ] {
        let violation = with(world, Some(rule), Some(4)).expect_err("not found");
        assert!(violation.contains(found), "{rule:?}: {violation}");
    }
    let violation = explore(Some(MomentUnwatched), Some(3), moment).expect_err("not found");
    assert!(violation.contains("of no one moment"), "{violation}");
    let violation = explore(Some(NoAbsorbFence), None, order).expect_err("not found");
    assert!(violation.contains("in neither place"), "{violation}");
}
