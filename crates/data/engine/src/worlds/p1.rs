//! P1: one snapshot; writers overwrite, workers of a backup read, the server may revoke, the job may shrink.

use super::explore;
use crate::PlainMemory;
use crate::atomic::{AtomicU64, Memory, Ordering::Relaxed};
use crate::broken::Break::{self, *};
use crate::broken::broken;
use crate::state::{Found, Look, Readers, Revocation, SaveSlot, SlotIndex, State, States, Writers};
use blktide_types::io::RevokeCause;
use blktide_types::unit::{BlockCount, BlockIndex};
use loom::cell::UnsafeCell;
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Note; // the test's own bookkeeping: not explored

const OLD: u64 = 10;
const TORN: u64 = 1;
const NEW: u64 = 2;

#[derive(Clone, Copy)]
struct World {
    /// Blocks of the volume that are used; 0 and 32 lie in different words, 0 and 1 in the same.
    blocks: &'static [u64],
    slots: u32,
    workers: usize,
    /// For each writer the blocks (by index in `blocks`) that it overwrites.
    writers: &'static [&'static [usize]],
    give_up: bool,
    shrink: bool,
}

struct Shared {
    w: World,
    writers: Writers,
    readers: Readers,
    device: [AtomicU64; 2],
    slot: [AtomicU64; 2],
    plain: [UnsafeCell<u64>; 2],
    taken: [Note; 2],
    image: [Note; 2],
    given_up: Note,
}

// The plain slots are only touched where the protocol says that nobody else does; loom checks it.
impl Shared {
    fn block(&self, i: usize) -> BlockIndex {
        BlockIndex(self.w.blocks[i])
    }

    /// With one worker nobody else can free what it copies: then a slot may be ordinary memory, and loom checks it as such.
    fn plain(&self) -> bool {
        self.w.workers == 1
    }

    fn fill(&self, slot: SaveSlot, data: u64) {
        let s = usize::try_from(slot.0).unwrap();
        self.slot[s].store(data, Relaxed);
        if self.plain() {
            self.plain[s].with_mut(|p| check_plain(p, data));
        }
    }

    fn copy(&self, slot: SaveSlot) -> u64 {
        let s = usize::try_from(slot.0).unwrap();
        if self.plain() {
            self.plain[s].with(|p| check_plain(p, 0));
        }
        self.slot[s].load(Relaxed)
    }

    fn write(&self, i: usize, value: u64) {
        let (block, mut from, mut late) = (self.block(i), 0, false);
        loop {
            match self.writers.look(block, &mut from) {
                Look::Free => break,
                Look::Preserve(slot) => {
                    let copy = self.device[i].load(Relaxed);
                    if broken(PreservedBeforeCopy) {
                        thread::yield_now();
                    }
                    self.fill(slot, copy);
                    self.writers.preserved(block, slot);
                    break;
                }
                Look::Full if self.w.give_up => {
                    late = broken(RevokeAfterWrite);
                    if late {
                        break;
                    }
                    // Like a server that lets everything pass: no look at the word in between.
                    self.writers.revocation.revoke(RevokeCause::SaveAreaFull);
                    break;
                }
                Look::Wait | Look::Full => thread::yield_now(),
            }
        }
        self.device[i].store(TORN, Relaxed);
        self.device[i].store(value, Relaxed);
        if late {
            self.writers.revocation.revoke(RevokeCause::SaveAreaFull);
        }
    }

    fn keep(&self, i: usize, data: u64) {
        self.taken[i].fetch_add(1, Relaxed);
        self.image[i].store(data, Relaxed);
    }

    fn give_up(&self) {
        self.given_up.store(1, Relaxed);
    }

    fn read(&self, i: usize) {
        let block = self.block(i);
        let early = broken(TakeBeforeReading).then(|| self.readers.take(block));
        let data = self.device[i].load(Relaxed);
        loop {
            match early.unwrap_or_else(|| self.readers.take(block)) {
                Found::Taken => return self.keep(i, data),
                Found::Gone => return,
                Found::Revoked(_) => return self.give_up(),
                Found::Preserved => {
                    let Some(slot) = self.readers.slots.slot_of(block) else {
                        thread::yield_now();
                        continue;
                    };
                    let late = broken(TakeBeforeCopy);
                    let copy = if late { 0 } else { self.copy(slot) };
                    match self.readers.take_copy(block) {
                        Found::Taken => {
                            let copy = if late { self.copy(slot) } else { copy };
                            return self.keep(i, copy);
                        }
                        Found::Revoked(_) => return self.give_up(),
                        Found::Gone | Found::Preserved => {}
                    }
                }
            }
        }
    }
}

/// Only the access counts: loom reports a race of it.
fn check_plain(_at: *const u64, _data: u64) {}

fn run(w: World) {
    // One memory: revoked, lease, touched, states of 64 blocks, index.
    let memory: Arc<dyn Memory> = PlainMemory::new(16);
    let states = States::at(&memory, 3, 1, BlockCount(64)).unwrap();
    let slots = SlotIndex::at(&memory, 5, 2, w.slots).unwrap();
    let revocation = Revocation::at(&memory, 0, 1).unwrap();
    let pair = |a, b| [AtomicU64::new(a), AtomicU64::new(b)];
    let x = Arc::new(Shared {
        w,
        writers: Writers {
            states: states.clone(),
            slots: slots.clone(),
            revocation: revocation.clone(),
            tries: w.slots,
        },
        readers: Readers {
            states,
            slots,
            revocation,
        },
        device: pair(OLD, OLD + 1),
        slot: pair(TORN, TORN),
        plain: [UnsafeCell::new(TORN), UnsafeCell::new(TORN)],
        taken: [Note::new(0), Note::new(0)],
        image: [Note::new(9), Note::new(9)],
        given_up: Note::new(0),
    });
    let writers: Vec<_> = (0..w.writers.len())
        .map(|n| {
            let x = Arc::clone(&x);
            let value = NEW + u64::try_from(n).unwrap();
            thread::spawn(move || w.writers[n].iter().for_each(|i| x.write(*i, value)))
        })
        .collect();
    let first = usize::from(w.shrink); // a dropped block is not read
    let second = (w.workers == 2).then(|| {
        let x = Arc::clone(&x);
        thread::spawn(move || (first..w.blocks.len()).for_each(|i| x.read(i)))
    });
    if w.shrink {
        x.readers.drop_block(x.block(0));
    }
    (first..w.blocks.len()).for_each(|i| x.read(i));
    if let Some(second) = second {
        second.join().unwrap();
    }
    let wanted = || (first..w.blocks.len()).map(|i| x.block(i));
    let complete = x.readers.complete(wanted());
    let given_up = x.given_up.load(Relaxed) == 1;
    if !given_up {
        assert!(
            complete == Ok(true) && x.readers.complete([x.block(0)].into_iter()) == Ok(true),
            "a backup that can never commit"
        );
        for i in first..w.blocks.len() {
            let was = OLD + u64::try_from(i).unwrap();
            assert_eq!(
                x.image[i].load(Relaxed),
                was,
                "image differs from the instant"
            );
            assert_eq!(x.taken[i].load(Relaxed), 1, "block not taken exactly once");
        }
    }
    for writer in writers {
        writer.join().unwrap();
    }
    for i in 0..w.blocks.len() {
        let last = x.device[i].load(Relaxed);
        let written = w.writers.iter().any(|p| p.contains(&i));
        assert!((NEW..OLD).contains(&last) || !written, "write lost");
        let state = x
            .readers
            .states
            .look(x.block(i), crate::atomic::Ordering::Acquire);
        assert!(given_up || state == State::Done, "state went backwards");
    }
}

const ONE: World = World {
    blocks: &[0],
    slots: 1,
    workers: 1,
    writers: &[&[0]],
    give_up: false,
    shrink: false,
};
const TWO_WORKERS: World = World { workers: 2, ..ONE };
const TWO_WRITERS: World = World {
    writers: &[&[0], &[0]],
    ..ONE
};
/// Two blocks in different words, one slot: it is used again after its owner is done.
const REUSE: World = World {
    blocks: &[0, 32],
    writers: &[&[0, 1]],
    ..ONE
};
/// The same with the two blocks in one word of states.
const NEIGHBOURS: World = World {
    blocks: &[0, 1],
    ..REUSE
};
const REUSE_WORKERS: World = World {
    workers: 2,
    ..REUSE
};
const REUSE_WRITERS: World = World {
    writers: &[&[0], &[1]],
    ..REUSE
};
const NEIGHBOUR_WRITERS: World = World {
    blocks: &[0, 1],
    slots: 2,
    ..REUSE_WRITERS
};
const REVOKE: World = World {
    slots: 0,
    give_up: true,
    ..ONE
};
const REVOKE_LATE: World = World {
    give_up: true,
    writers: &[&[1, 0]],
    ..REUSE
};
const REVOKE_WORKERS: World = World {
    workers: 2,
    ..REVOKE_LATE
};
const REVOKE_WRITERS: World = World {
    blocks: &[0, 32],
    writers: &[&[0], &[1]],
    ..REVOKE
};
const SHRINK: World = World {
    shrink: true,
    ..ONE
};
const SHRINK_REUSE: World = World {
    shrink: true,
    ..REUSE
};

fn with(world: World, rule: Option<Break>, bound: Option<usize>) -> Result<usize, String> {
    explore(rule, bound, move || run(world))
}

/// req B1, A8: every order of the small worlds, up to three preemptions of the larger.
#[test]
fn p1_holds() {
    for (name, world, bound) in [
        ("one", ONE, None),
        ("two workers", TWO_WORKERS, Some(3)),
        ("two writers", TWO_WRITERS, Some(2)),
        ("reuse", REUSE, None),
        ("neighbours", NEIGHBOURS, None),
        ("reuse, two workers", REUSE_WORKERS, Some(2)),
        ("reuse, two writers", REUSE_WRITERS, Some(2)),
        ("neighbours, two writers", NEIGHBOUR_WRITERS, Some(2)),
        ("revoke", REVOKE, None),
        ("revoke late", REVOKE_LATE, None),
        ("revoke, two workers", REVOKE_WORKERS, Some(2)),
        ("revoke, two writers", REVOKE_WRITERS, Some(2)),
        ("shrink", SHRINK, None),
        ("shrink, reuse", SHRINK_REUSE, None),
    ] {
        print!("{name}, preemptions {bound:?}: ");
        with(world, None, bound).unwrap();
    }
}

#[test]
fn p1_every_rule_left_out_is_found() {
    const IMAGE: &str = "differs from the instant";
    const RACE: &str = "Causality violation";
    const TAKEN: &str = "not taken exactly once";
    for (world, rule, found) in [
        (ONE, TakeBeforeReading, IMAGE),
        (TWO_WORKERS, TakeByStore, TAKEN),
        (REUSE_WORKERS, TakeBeforeCopy, IMAGE),
        (TWO_WORKERS, LoserKeeps, TAKEN),
        (ONE, LookRelaxed, ""),
        (REVOKE, NoReaderFence, IMAGE),
        (REVOKE, NoRevokedLoad, IMAGE),
        (REVOKE, RevokeAfterWrite, IMAGE),
        (REVOKE, NoRevokeFence, IMAGE),
        (REVOKE_WRITERS, SeenRevokeNoFence, IMAGE),
        (TWO_WRITERS, NoWaitForPreserving, IMAGE),
        (ONE, PreservedBeforeCopy, ""),
        (ONE, PreservedByStore, ""),
        (REUSE_WRITERS, OwnerBeforePreserved, ""),
        (REUSE, ReclaimRelaxed, RACE),
        (SHRINK, ShrinkOnlyWanted, "never commit"),
    ] {
        let threads = world.writers.len() + world.workers;
        let bound = if threads == 2 || rule == OwnerBeforePreserved {
            3
        } else {
            2
        };
        let violation = with(world, Some(rule), Some(bound)).expect_err("not found");
        assert!(violation.contains(found), "{rule:?}: {violation}");
    }
}
