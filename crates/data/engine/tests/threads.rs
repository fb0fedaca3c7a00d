//! The engine as it is released, on real threads: two writers, a control side, two readers, two thousand backups.
//!
//! Each writer writes numbers in ascending order, one in flight, to blocks of its own. So an image is right if, for each
//! writer, there is an N such that every block holds its last write up to N: a prefix of the record, nothing missed,
//! nothing of later. Each image is the one before with the wanted blocks put in, so a missed change stays to be seen.
#![forbid(unsafe_code)]
#![cfg(test)]
#![cfg(not(loom))]

use blktide_engine::state::{Found, SlotIndex};
use blktide_engine::{
    Absent, Action, Actions, Begun, Control, Engine, Event, HoldState, Limits, Memory, Operation,
    Outcome, Overflow, PlainMemory, Queue, ReaderMemories, Request, SnapshotMemories,
    SnapshotRequest, SnapshotView,
};
use blktide_format::shared::Shape;
use blktide_testkit::seed::Seed;
use blktide_types::clock::{Instant, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::unit::{BlockIndex, BlockSize};
use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

const BLOCKS: usize = 96;
const SAVE_SLOTS: u32 = 12;
const BACKUPS: u64 = 2_000;

/// One number a block: no order but the protocol's.
struct Device(Vec<AtomicU64>);
/// One number a save slot.
type Area = Vec<AtomicU64>;

fn plain(words: usize) -> Arc<dyn Memory> {
    PlainMemory::new(words)
}

/// Writes `number` to `block`: what a queue's thread does, with I/O that ends at once.
fn write(device: &Device, queue: &mut Queue, block: usize, number: u64) {
    let (mut request, mut actions) = (Request::new(), Actions::new());
    let operation = Operation::Write {
        offset: u64::try_from(block).unwrap() * 4096,
        len: 512,
        durable: false,
    };
    let mut next = vec![Event::Start(operation)];
    while !request.is_idle() || !next.is_empty() {
        let Some(event) = next.pop() else {
            std::thread::yield_now();
            next.push(Event::Again);
            continue;
        };
        request.step(queue, event, Instant(0), &mut actions);
        for action in actions.drain() {
            match action {
                Action::Preserve { ticket, slot, .. } => {
                    let snapshot = queue.snapshot().unwrap();
                    let area = snapshot.save_area().downcast_ref::<Area>().unwrap();
                    let original = device.0[block].load(Relaxed);
                    area[usize::try_from(slot.0).unwrap()].store(original, Relaxed);
                    next.push(Event::Preserved(ticket, Outcome::Safe));
                }
                Action::Perform { .. } => {
                    device.0[block].store(number, Relaxed);
                    next.push(Event::Performed(Ok(512)));
                }
                Action::Complete(result) => assert_eq!(result, Ok(512)),
                Action::WaitGate | Action::WaitSnapshot { .. } => {}
            }
        }
    }
}

fn name(n: u64) -> GenerationName {
    GenerationName((u128::from(n) << 16 | 3).to_le_bytes())
}

struct Opened {
    begun: Begun,
    view: SnapshotView,
    area: Arc<Area>,
}

fn open(engine: &Engine, memories: &[Arc<dyn Memory>; 2], control: &mut Control, n: u64) -> Opened {
    let shape = *engine.shape();
    let area: Arc<Area> = Arc::new((0..SAVE_SLOTS).map(|_| AtomicU64::new(0)).collect());
    let save_area: Arc<Area> = Arc::clone(&area);
    let made = SnapshotMemories {
        states: plain(shape.states_words()),
        index: plain(SlotIndex::words(SAVE_SLOTS)),
        wanted: plain(shape.wanted_words()),
        save_slots: SAVE_SLOTS,
        save_area,
    };
    let asked = SnapshotRequest {
        id: SnapshotId([1; 16]),
        opens: name(n),
        opens_at: WallTime(0),
        base: (n > 1).then(|| name(n - 1)),
        absent: if n > 1 {
            Absent::Words(&[])
        } else {
            Absent::Everything
        },
        limits: Limits {
            overflow: Overflow::Wait,
            wait_limit: Duration::from_secs(1),
            lease: Duration::from_secs(1),
        },
        memories: made.clone(),
    };
    let prepared = control.prepare(&asked).unwrap();
    let begun = loop {
        let mut hold = control.hold(Instant(0), Duration::from_secs(1)).unwrap();
        while control.poll(&mut hold, Instant(0)) == HoldState::Waiting {
            std::thread::yield_now();
        }
        if let Ok(begun) = control.commit(&hold, &prepared, Instant(0)) {
            break begun;
        }
    };
    let reader = ReaderMemories {
        control: Arc::clone(&memories[0]),
        banks: Arc::clone(&memories[1]),
        states: made.states,
        index: made.index,
        wanted: made.wanted,
    };
    let view = SnapshotView::open(&shape, &reader, &begun, SAVE_SLOTS).unwrap();
    Opened { begun, view, area }
}

/// Takes every wanted block that nobody else has, from one end.
fn read(opened: &Opened, device: &Device, backwards: bool, image: &[AtomicU64]) {
    let mut blocks: Vec<_> = opened.view.wanted().blocks().collect();
    if backwards {
        blocks.reverse();
    }
    for block in blocks {
        let index = usize::try_from(block.0).unwrap();
        let bytes = device.0[index].load(Relaxed);
        loop {
            match opened.view.take(block) {
                Found::Taken => image[index].store(bytes, Relaxed),
                Found::Gone => {}
                Found::Revoked(cause) => panic!("revoked: {cause}"),
                Found::Preserved => {
                    let readers = opened.view.readers();
                    let Some(slot) = readers.slots.slot_of(block) else {
                        continue;
                    };
                    let copy = opened.area[usize::try_from(slot.0).unwrap()].load(Relaxed);
                    match readers.take_copy(block) {
                        Found::Taken => image[index].store(copy, Relaxed),
                        Found::Gone | Found::Preserved => continue,
                        Found::Revoked(cause) => panic!("revoked: {cause}"),
                    }
                }
            }
            break;
        }
    }
}

/// Whether the writer's blocks hold a prefix of its record (block of each number, from 1).
fn is_prefix(image: &[u64], record: &[usize], writer: usize) -> Result<(), String> {
    let mine = |block: usize| block % 2 == writer;
    let newest = (0..BLOCKS).filter(|b| mine(*b)).map(|b| image[b]).max();
    let newest = usize::try_from(newest.unwrap_or(0)).unwrap();
    let mut expected = vec![0; BLOCKS];
    for (number, block) in (1..).zip(&record[..newest]) {
        expected[*block] = number;
    }
    match (0..BLOCKS).find(|b| mine(*b) && image[*b] != expected[*b]) {
        None => Ok(()),
        Some(b) => Err(format!(
            "{} at {newest} holds {} and not {}",
            BlockIndex(b as u64),
            image[b],
            expected[b]
        )),
    }
}

/// req B1, A8, A9: each of two thousand images is a prefix of each writer's record.
#[test]
fn every_image_is_a_prefix() {
    let size = BlockSize::IMAGE_MIN;
    let bytes = u64::try_from(BLOCKS).unwrap() * 4096;
    let shape = Shape {
        banks: 5,
        generations: 8,
        ..Shape::usual(Geometry::new(bytes, size, size, 512, 512).unwrap())
    };
    let memories = [plain(shape.control_words()), plain(shape.banks_words())];
    let engine = Engine::create(&memories[0], &memories[1], shape).unwrap();
    let mut control = engine.control();
    control.begin_life(&[], (name(0), WallTime(0))).unwrap();
    let device = Device((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let stop = AtomicBool::new(false);
    let seed = Seed::of_test("threads");
    let mut images = Vec::new();
    let records = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let (engine, device, stop) = (&engine, &device, &stop);
                scope.spawn(move || {
                    let mut queue = engine.queue(writer).unwrap();
                    let mut numbers = seed.nth(writer as u64).numbers();
                    let mut record = Vec::new();
                    while !stop.load(Relaxed) {
                        let block = numbers.index(BLOCKS / 2) * 2 + writer;
                        record.push(block);
                        write(device, &mut queue, block, record.len() as u64);
                        if numbers.chance(1, 8) {
                            std::thread::yield_now();
                        }
                    }
                    record
                })
            })
            .collect();
        let image: Vec<_> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
        for n in 1..=BACKUPS {
            let opened = open(&engine, &memories, &mut control, n);
            assert_eq!(opened.begun.base_resolved, n > 1);
            std::thread::scope(|workers| {
                workers.spawn(|| read(&opened, &device, true, &image));
                read(&opened, &device, false, &image);
            });
            assert_eq!(opened.view.complete(), Ok(true), "backup {n}");
            control.end_snapshot().unwrap();
            images.push(image.iter().map(|b| b.load(Relaxed)).collect::<Vec<_>>());
        }
        stop.store(true, Relaxed);
        writers
            .into_iter()
            .map(|w| w.join().unwrap())
            .collect::<Vec<_>>()
    });
    for (n, image) in (1..).zip(&images) {
        for (writer, record) in records.iter().enumerate() {
            if let Err(what) = is_prefix(image, record, writer) {
                panic!("image {n}, writer {writer}, {seed}: {what}");
            }
        }
    }
    let preserved = engine.total(blktide_format::shared::queue::PRESERVED);
    let writes: usize = records.iter().map(Vec::len).sum();
    println!("{BACKUPS} images, {writes} writes, {preserved} originals preserved");
    assert!(preserved > 0, "nobody ever met");
}
