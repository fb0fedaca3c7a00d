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
    /// The server is to die: it stops before its next step.
    dies: AtomicU64,
}

/// A queue's thread: one write to block 0. False if it died on the way.
fn write(device: &Device, queue: &mut Queue) -> bool {
    let (mut request, mut actions, mut todo) = (Request::new(), Actions::new(), Vec::new());
    let operation = Operation::Write {
        offset: 0,
        len: 512,
        durable: false,
    };
    todo.push(Event::Start(operation));
    while let Some(event) = todo.pop() {
        if device.dies.load(Relaxed) == 1 {
            return false;
        }
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
    true
}

fn plain(words: usize) -> Arc<dyn Memory> {
    PlainMemory::new(words)
}

/// A volume of one block, and a snapshot on top of a base that is asked for: the block is absent in the base, so it is
/// wanted whatever happens.
struct Volume {
    shape: Shape,
    engine: Engine,
    side: Control,
    prepared: crate::Prepared,
    reader: ReaderMemories,
    device: Arc<Device>,
}

fn volume() -> Volume {
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
    let memories = SnapshotMemories {
        states: plain(shape.states_words()),
        index: plain(SlotIndex::words(1)),
        wanted: plain(shape.wanted_words()),
        save_slots: 1,
        save_area: Arc::new(()),
    };
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
    Volume {
        shape,
        prepared: side.prepare(&asked).unwrap(),
        engine,
        side,
        reader: ReaderMemories {
            control,
            banks,
            states: memories.states,
            index: memories.index,
            wanted: memories.wanted,
        },
        device: Arc::new(Device {
            block: AtomicU64::new(OLD),
            area: AtomicU64::new(0),
            dies: AtomicU64::new(0),
        }),
    }
}

/// One write, one snapshot on top of a base: the image has the block as it was at the instant, and the next increment
/// has it if it was written after.
fn run() {
    let mut x = volume();
    let mut queue = x.engine.queue(0).unwrap();
    let writer = {
        let device = Arc::clone(&x.device);
        thread::spawn(move || write(&device, &mut queue))
    };
    let begun = commit(&mut x.side, &x.prepared);
    let view = SnapshotView::open(&x.shape, &x.reader, &begun, 1).unwrap();
    let changed_before = view.changed().unwrap().contains(BlockIndex(0));
    let image = read(&view, &x.device).expect("nobody revoked");
    assert!(writer.join().unwrap());
    assert_eq!(x.device.block.load(Relaxed), NEW, "write lost");
    let changed_after = x.side.changed_since(NEXT).unwrap().contains(BlockIndex(0));
    match image {
        OLD => assert!(changed_after, "write in no increment"),
        NEW => assert!(changed_before, "a change that nobody is told of"),
        other => panic!("image differs from the instant: {other}"),
    }
    assert_eq!(view.complete(), Ok(true));
}

/// The server dies at any moment of its write; a successor takes over and does it again, while a reader goes on.
fn death() {
    let mut x = volume();
    let begun = commit(&mut x.side, &x.prepared);
    let mut queue = x.engine.queue(0).unwrap();
    let view = SnapshotView::open(&x.shape, &x.reader, &begun, 1).unwrap();
    let writer = {
        let device = Arc::clone(&x.device);
        thread::spawn(move || write(&device, &mut queue))
    };
    let reader = {
        let device = Arc::clone(&x.device);
        thread::spawn(move || read(&view, &device))
    };
    x.device.dies.store(1, Relaxed);
    let answered = writer.join().unwrap();
    x.device.dies.store(0, Relaxed);
    let engine = Engine::open(&x.reader.control, &x.reader.banks).unwrap();
    let mut side = engine.control();
    side.take_over((GenerationName([9; 16]), WallTime(2)))
        .unwrap();
    // What is not answered is found in its slot, and done again.
    if !answered {
        let mut queue = engine.queue(0).unwrap();
        assert!(write(&x.device, &mut queue));
    }
    if let Some(image) = reader.join().unwrap() {
        assert_eq!(image, OLD, "image differs from the instant");
    }
    assert_eq!(x.device.block.load(Relaxed), NEW, "write lost");
    let changed = side.changed_since(NEXT).unwrap();
    assert!(changed.contains(BlockIndex(0)), "write in no increment");
    assert!(!engine.gate_is_set());
}

fn commit(side: &mut Control, prepared: &crate::Prepared) -> crate::Begun {
    let mut hold = side.hold(Instant(0), Duration::from_secs(1)).unwrap();
    while side.poll(&mut hold, Instant(0)) != HoldState::Held {
        thread::yield_now();
    }
    side.commit(&hold, prepared, Instant(0)).unwrap()
}

/// The block as it was at the instant; `None` if the snapshot was revoked.
fn read(view: &SnapshotView, device: &Device) -> Option<u64> {
    let block = BlockIndex(0);
    let bytes = device.block.load(Relaxed);
    match view.take(block) {
        Found::Taken => Some(bytes),
        Found::Preserved => {
            assert!(view.readers().slots.slot_of(block).is_some());
            let copy = device.area.load(Relaxed);
            match view.readers().take_copy(block) {
                Found::Taken => Some(copy),
                Found::Revoked(_) => None,
                other @ (Found::Gone | Found::Preserved) => panic!("{other:?}"),
            }
        }
        Found::Revoked(_) => None,
        Found::Gone => panic!("nobody else reads"),
    }
}

fn with(rule: Option<Break>) -> Result<usize, String> {
    explore(rule, Some(5), run)
}

/// req X3: a death at each moment of a write, up to three preemptions.
#[test]
fn death_holds() {
    explore(None, Some(3), death).unwrap();
}

#[test]
fn death_every_rule_left_out_is_found() {
    // The fence of the revoke itself is not missed here: entering has one, too.
    for rule in [
        TakeoverKeepsSnapshot,
        NoReaderFence,
        NoRevokedLoad,
        NoteTrusted,
    ] {
        explore(Some(rule), Some(3), death).expect_err("not found");
    }
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
