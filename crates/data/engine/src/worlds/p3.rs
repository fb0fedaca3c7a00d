//! P3: requests enter, look, mark, write, leave; a hold with a deadline swaps; the reader reads the closed generation.

use super::explore;
use crate::PlainMemory;
use crate::atomic::{AtomicU64, Memory, Ordering::Relaxed, Words};
use crate::broken::Break::{self, *};
use crate::broken::broken;
use crate::gate::{Entry, Gate, HoldState};
use crate::tracker::{Epoch, Marks};
use blktide_types::clock::Instant;
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;
use core::time::Duration;
use loom::sync::Notify;
use loom::thread;
use std::sync::Arc;

#[derive(Clone, Copy)]
struct World {
    /// Each in its own queue, all to one block.
    requests: usize,
    /// Request 0 has to wait once, after it has marked.
    park: bool,
    /// The hold may expire at any moment.
    deadline: bool,
    /// After the expiry another asker holds and commits.
    second: bool,
}

struct Shared {
    w: World,
    gate: Gate,
    marks: Marks,
    opened: [Notify; 2],
    device: [AtomicU64; 2],
}

impl Shared {
    /// The steps of `Request`: enter, look, mark, perform, leave.
    fn request(&self, q: usize) {
        let (mut marked, mut parked) = (false, !self.w.park || q != 0);
        loop {
            let early = broken(LookBeforeEntering).then(|| self.marks.epoch());
            if self.gate.enter(q) == Entry::Shut {
                self.opened[q].wait();
                continue;
            }
            let epoch = early.unwrap_or_else(|| self.marks.epoch());
            if !(marked && broken(ParkedUnmarked)) {
                self.marks.mark(epoch, 0, 512);
            }
            marked = true;
            if !parked {
                parked = true;
                self.gate.leave(q);
                continue;
            }
            if broken(LeaveBeforeWritten) {
                self.gate.leave(q);
            }
            self.device[q].store(1, Relaxed);
            if !broken(LeaveBeforeWritten) {
                self.gate.leave(q);
            }
            return;
        }
    }

    /// The steps of `Control`: hold, poll, commit. What the reader of the closed generation read, if there was a swap.
    fn snapshot(&self) -> Option<[u64; 2]> {
        let mut hold = self.gate.hold(Instant(0), Duration::from_secs(1)).ok()?;
        loop {
            match self.gate.poll(&mut hold, Instant(0)) {
                HoldState::Held => break,
                HoldState::Over => return None,
                HoldState::Waiting => thread::yield_now(),
            }
        }
        self.gate.begin_commit(&hold).ok()?;
        if broken(GateOpensFirst) {
            self.open();
        }
        self.marks.swap(Epoch::new(1, 0, false, 0));
        let closed = self.is_marked(0);
        let read = |q: usize| {
            if closed {
                self.device[q].load(Relaxed)
            } else {
                0
            }
        };
        let image = [read(0), read(1)];
        self.open();
        Some(image)
    }

    fn open(&self) {
        self.gate.open();
        self.opened.iter().for_each(Notify::notify);
    }

    fn expire(&self, id: u64) -> bool {
        let won = self.gate.expire(id);
        self.opened.iter().for_each(Notify::notify);
        won
    }

    fn is_marked(&self, bank: usize) -> bool {
        self.marks.bank(bank).unwrap().load(0, Relaxed) & 1 == 1
    }
}

fn run(w: World) {
    // One memory: gate, sequence of holds, two counters, epoch, two banks.
    let memory: Arc<dyn Memory> = PlainMemory::new(8);
    let size = BlockSize::IMAGE_MIN;
    let geometry = Geometry::new(4096, size, size, 512, 512).unwrap();
    let word = |i| Words::new(&memory, i, 1).unwrap();
    let inside = [2, 3];
    let x = Arc::new(Shared {
        w,
        gate: Gate::new(&memory, 0, 1, &inside[..w.requests]).unwrap(),
        marks: Marks::new(word(4), Box::new([word(5), word(6)]), geometry),
        opened: [Notify::new(), Notify::new()],
        device: [AtomicU64::new(0), AtomicU64::new(0)],
    });
    let requests: Vec<_> = (0..w.requests)
        .map(|q| {
            let x = Arc::clone(&x);
            thread::spawn(move || x.request(q))
        })
        .collect();
    let timer = w.deadline.then(|| {
        let x = Arc::clone(&x);
        thread::spawn(move || (x.expire(1) && w.second).then(|| x.snapshot()).flatten())
    });
    let mut image = x.snapshot();
    if let Some(second) = timer.and_then(|t| t.join().unwrap()) {
        assert!(image.is_none(), "two swaps");
        image = Some(second);
    }
    for request in requests {
        request.join().unwrap();
    }
    let swapped = x.marks.epoch().bank() == 1;
    assert_eq!(swapped, image.is_some(), "swap without a commit");
    assert_eq!(x.gate.inside(), 0, "a queue never empties");
    for q in 0..w.requests {
        assert_eq!(x.device[q].load(Relaxed), 1, "write lost");
        let in_image = image.is_some_and(|i| i[q] == 1);
        assert!(
            in_image || x.is_marked(usize::from(swapped)),
            "write in no increment"
        );
    }
}

const ONE: World = World {
    requests: 1,
    park: false,
    deadline: false,
    second: false,
};
const TWO: World = World { requests: 2, ..ONE };
const PARK: World = World { park: true, ..ONE };
const EXPIRES: World = World {
    deadline: true,
    ..ONE
};
const AGAIN: World = World {
    second: true,
    ..EXPIRES
};

fn with(world: World, rule: Option<Break>) -> Result<usize, String> {
    let bound = (world.requests == 2 || world.deadline).then_some(2);
    explore(rule, bound, move || run(world))
}

/// req B1: every order with one request; up to two preemptions with two requests or with a deadline.
#[test]
fn p3_holds() {
    for (name, world) in [
        ("one", ONE),
        ("two", TWO),
        ("park", PARK),
        ("expires", EXPIRES),
        ("again", AGAIN),
    ] {
        print!("{name}: ");
        with(world, None).unwrap();
    }
}

#[test]
fn p3_every_rule_left_out_is_found() {
    const LOST: &str = "in no increment";
    for (world, rule, found) in [
        (ONE, LookBeforeEntering, LOST),
        (ONE, NoEnterFence, LOST),
        (ONE, NoHoldFence, LOST),
        (ONE, GateRelaxed, LOST),
        (ONE, LeaveRelaxed, LOST),
        (ONE, CountRelaxed, LOST),
        (ONE, LeaveBeforeWritten, LOST),
        (ONE, NoWait, LOST),
        (TWO, OneQueue, LOST),
        (PARK, ParkedUnmarked, LOST),
        (ONE, GateOpensFirst, LOST),
        (EXPIRES, ExpiredCommits, LOST),
        (AGAIN, ExpiryIsAStore, ""),
        (AGAIN, NoHoldId, ""),
    ] {
        let violation = with(world, Some(rule)).expect_err("not found");
        assert!(violation.contains(found), "{rule:?}: {violation}");
    }
}
