//! The whole engine at once: requests, control and reader over one volume of two blocks.

use super::explore;
use crate::atomic::{AtomicU64, Memory, Ordering::Relaxed};
use crate::broken::Break::{self, *};
use crate::control::{Absent, Control, Limits, SnapshotMemories, SnapshotRequest};
use crate::request::{Action, Actions, Event, Operation, Outcome, Request};
use crate::snapshot::{Overflow, ReaderMemories, SnapshotView};
use crate::state::{Found, SlotIndex};
use crate::{Engine, HoldState, PlainMemory, Queue};
use blktide_format::shared::Shape;
use blktide_types::clock::{Instant, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::unit::{BlockIndex, BlockSize};
use core::time::Duration;
use loom::thread;
use std::sync::Arc;

const OLD: u64 = 10;
const NEW: u64 = 2;
const BASE: GenerationName = GenerationName([1; 16]);
const NEXT: GenerationName = GenerationName([2; 16]);

struct Device {
    block: AtomicU64,
    area: AtomicU64,
}

/// A queue's thread: one write to block 0.
fn write(device: &Device, queue: &mut Queue) {
    let (mut request, mut actions, mut todo) = (Request::new(), Actions::new(), Vec::new());
    let operation = Operation::Write {
        offset: 0,
        len: 512,
        durable: false,
    };
    todo.push(Event::Start(operation));
    while let Some(event) = todo.pop() {
        request.step(queue, event, Instant(0), &mut actions);
        for action in actions.drain() {
            match action {
                Action::Preserve { ticket, .. } => {
                    device.area.store(device.block.load(Relaxed), Relaxed);
                    todo.push(Event::Preserved(ticket, Outcome::Safe));
                }
                Action::Perform { .. } => {
                    device.block.store(NEW, Relaxed);
                    todo.push(Event::Performed(Ok(512)));
                }
                Action::Complete(result) => assert_eq!(result, Ok(512)),
                Action::WaitGate | Action::WaitSnapshot { .. } => {
                    thread::yield_now();
                    todo.push(Event::Again);
                }
            }
        }
    }
    assert!(request.is_idle());
}

fn plain(words: usize) -> Arc<dyn Memory> {
    PlainMemory::new(words)
}

/// One write, one snapshot on top of a base: the image has the block as it was at the instant, and the next increment
/// has it if it was written after.
fn run() {
    let size = BlockSize::IMAGE_MIN;
    let geometry = Geometry::new(4096, size, size, 512, 512).unwrap();
    let shape = Shape {
        queues: 1,
        slots: 1,
        banks: 2,
        generations: 3,
        hints: 1,
        log_bytes: 8,
        ..Shape::usual(geometry)
    };
    let (control, banks) = (plain(shape.control_words()), plain(shape.banks_words()));
    let engine = Engine::create(&control, &banks, shape).unwrap();
    let mut side = engine.control();
    side.begin_life(&[], (BASE, WallTime(0))).unwrap();
    let device = Arc::new(Device {
        block: AtomicU64::new(OLD),
        area: AtomicU64::new(0),
    });
    let memories = SnapshotMemories {
        states: plain(shape.states_words()),
        index: plain(SlotIndex::words(1)),
        wanted: plain(shape.wanted_words()),
        save_slots: 1,
        save_area: Arc::new(()),
    };
    // The block is absent in the base, so it is wanted whatever happens.
    let asked = SnapshotRequest {
        id: SnapshotId([3; 16]),
        opens: NEXT,
        opens_at: WallTime(1),
        base: Some(BASE),
        absent: Absent::Words(&[1]),
        limits: Limits {
            overflow: Overflow::GiveUp,
            wait_limit: Duration::from_secs(1),
            lease: Duration::from_secs(1),
        },
        memories: memories.clone(),
    };
    let mut queue = engine.queue(0).unwrap();
    let prepared = side.prepare(&asked).unwrap();
    let writer = {
        let device = Arc::clone(&device);
        thread::spawn(move || write(&device, &mut queue))
    };
    let begun = commit(&mut side, &prepared);
    let reader = ReaderMemories {
        control: Arc::clone(&control),
        banks: Arc::clone(&banks),
        states: memories.states,
        index: memories.index,
        wanted: memories.wanted,
    };
    let view = SnapshotView::open(&shape, &reader, &begun, 1).unwrap();
    let changed_before = view.changed().unwrap().contains(BlockIndex(0));
    let image = read(&view, &device);
    writer.join().unwrap();
    assert_eq!(device.block.load(Relaxed), NEW, "write lost");
    let changed_after = side.changed_since(NEXT).unwrap().contains(BlockIndex(0));
    match image {
        OLD => assert!(changed_after, "write in no increment"),
        NEW => assert!(changed_before, "a change that nobody is told of"),
        other => panic!("image differs from the instant: {other}"),
    }
    assert_eq!(view.complete(), Ok(true));
}

fn commit(side: &mut Control, prepared: &crate::Prepared) -> crate::Begun {
    let mut hold = side.hold(Instant(0), Duration::from_secs(1)).unwrap();
    while side.poll(&mut hold, Instant(0)) != HoldState::Held {
        thread::yield_now();
    }
    side.commit(&hold, prepared, Instant(0)).unwrap()
}

fn read(view: &SnapshotView, device: &Device) -> u64 {
    let block = BlockIndex(0);
    let bytes = device.block.load(Relaxed);
    match view.take(block) {
        Found::Taken => bytes,
        Found::Preserved => {
            assert!(view.readers().slots.slot_of(block).is_some());
            let copy = device.area.load(Relaxed);
            assert_eq!(view.readers().take_copy(block), Found::Taken);
            copy
        }
        other @ (Found::Gone | Found::Revoked(_)) => panic!("{other:?}"),
    }
}

fn with(rule: Option<Break>) -> Result<usize, String> {
    explore(rule, Some(5), run)
}

/// req B1, A8: up to five preemptions of a write, a swap and a reader.
#[test]
fn whole_holds() {
    with(None).unwrap();
}

#[test]
fn whole_every_rule_left_out_is_found() {
    for rule in [
        NoEnterFence,
        NoHoldFence,
        LookBeforeEntering,
        NoWait,
        LeaveBeforeWritten,
        GateOpensFirst,
        PreservedBeforeCopy,
    ] {
        with(Some(rule)).expect_err("not found");
    }
}
