//! What becomes of copies that cannot be started.

use super::*;
use blktide_device::Backing;
use blktide_engine::{
    Absent, Engine, Limits, Memory, Overflow, PlainMemory, SnapshotMemories, SnapshotRequest,
};
use blktide_format::shared::Shape;
use blktide_sys::clock::SystemClock;
use blktide_types::clock::{Clock, Instant, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use std::path::PathBuf;
use std::time::Duration;

/// A snapshot with a save area that no ring can know.
fn snapshot(block: BlockSize) -> Arc<Snapshot> {
    let shape = Shape::usual(Geometry::new(1 << 20, block, block, 512, 4096).unwrap());
    let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
    let (control, banks) = (plain(shape.control_words()), plain(shape.banks_words()));
    let engine = Engine::create(&control, &banks, shape).unwrap();
    let mut side = engine.control();
    let name = |n| (GenerationName([n; 16]), WallTime(0));
    side.begin_life(&[], name(1)).unwrap();
    let asked = SnapshotRequest {
        id: SnapshotId([1; 16]),
        opens: name(2).0,
        opens_at: name(2).1,
        base: None,
        absent: Absent::Everything,
        limits: Limits {
            overflow: Overflow::GiveUp,
            wait_limit: Duration::from_secs(1),
            lease: Duration::from_secs(1),
        },
        memories: SnapshotMemories {
            states: plain(shape.states_words()),
            index: plain(blktide_engine::state::SlotIndex::words(1)),
            wanted: plain(shape.wanted_words()),
            save_slots: 1,
            save_area: Arc::new(()),
        },
    };
    let prepared = side.prepare(&asked).unwrap();
    let mut hold = side.hold(Instant(0), Duration::from_secs(1)).unwrap();
    let _held = side.poll(&mut hold, Instant(0));
    side.commit(&hold, &prepared, Instant(0)).unwrap();
    Arc::clone(side.snapshot().unwrap())
}

/// P8: a request that waits for a copy hears of it, also if the copy waited for a buffer and then could not start.
#[test]
fn a_queued_copy_that_cannot_start_is_told_of() {
    let path = PathBuf::from("/var/tmp").join(format!("blktide-volume-{}", std::process::id()));
    std::fs::File::create(&path)
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let backing = Backing::open(&path, &SystemClock, Some(SystemClock.now())).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut transfers = Transfers::new(&backing, 64).unwrap();
    let block = BlockSize::DEFAULT;
    let mut preserves = Preserves::new(&mut transfers, block, 4 << 56, 32).unwrap();
    let file = transfers.register_file(Arc::clone(backing.file())).unwrap();
    let snapshot = snapshot(block);
    let copy = |slot: usize| Copy {
        slot: Slot(slot),
        ticket: Ticket::of_number(0),
        save: SaveSlot(0),
        offset: 0,
        len: block.bytes_u64(),
        snapshot: Arc::clone(&snapshot),
    };
    // All buffers are busy: with writes that are about to end.
    for buffer in 0..BUFFERS {
        preserves.moving[buffer] = Some(Moving {
            copy: copy(buffer),
            file,
            writing: true,
        });
        preserves.count += 1;
    }
    assert!(preserves.start(&mut transfers, copy(20)).is_none());
    assert!(preserves.start(&mut transfers, copy(21)).is_none());
    let over = preserves.advance(&mut transfers, 0, Ok(())).unwrap();
    assert_eq!((over.slot, over.outcome), (Slot(0), Outcome::Safe));
    for slot in [20, 21] {
        let failed = preserves.next_failed().unwrap();
        assert_eq!(
            (failed.slot, failed.outcome),
            (Slot(slot), Outcome::SaveAreaFailed)
        );
    }
    assert!(preserves.next_failed().is_none());
    assert_eq!(preserves.under_way(), 15);
}
