//! Save slots and states by hand; their meetings are explored in `worlds`.

use super::*;
use crate::PlainMemory;

fn writers(slots: u32, tries: u32) -> Writers {
    let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
    Writers {
        states: States::new(&plain(shared::states::WORDS + 10), BlockCount(320)).unwrap(),
        slots: SlotIndex::new(&plain(SlotIndex::words(slots)), slots).unwrap(),
        revocation: Revocation::new(&plain(shared::control::WORDS), 5).unwrap(),
        tries,
    }
}

/// A waiting writer looks through a part of a large save area at a time, and still finds the one slot that is free.
#[test]
fn a_look_goes_on_where_the_last_one_ended() {
    let w = writers(100, 7);
    let mut from = 0;
    for block in 0..100 {
        let Look::Preserve(slot) = w.look(BlockIndex(block), &mut from) else {
            panic!("{block}");
        };
        assert_eq!(slot, SaveSlot(u32::try_from(block).unwrap()));
        w.preserved(BlockIndex(block), slot);
    }
    assert_eq!(w.look(BlockIndex(200), &mut from), Look::Full);
    assert_eq!(w.states.finish(BlockIndex(50)), State::Preserved);
    let looks =
        (1..20).find(|_| w.look(BlockIndex(200), &mut from) == Look::Preserve(SaveSlot(50)));
    assert_eq!(
        looks,
        Some(7),
        "49 slots before it, 7 seen already, 7 a look"
    );
    assert_eq!(w.slots.slot_of(BlockIndex(200)), Some(SaveSlot(50)));
    assert_eq!(w.slots.peak(), 100);
}

/// Four neighbours in a word change each other's states in no way, and nothing goes backwards.
#[test]
fn neighbours_and_directions() {
    use State::{Done, Preserved, Preserving, Wanted};
    let w = writers(4, 4);
    let b = BlockIndex;
    for (block, to) in [(31, Preserving), (32, Preserving), (33, Preserving)] {
        assert!(w.states.advance(b(block), Wanted, to));
    }
    assert!(w.states.advance(b(32), Preserving, Preserved));
    assert!(!w.states.advance(b(32), Preserving, Preserved));
    assert_eq!(w.states.finish(b(33)), Preserving);
    let all = [30, 31, 32, 33, 34].map(|n| w.states.look(b(n), Ordering::Acquire));
    assert_eq!(all, [Wanted, Preserving, Preserved, Done, Wanted]);
    assert_eq!(
        w.states.look(b(320), Ordering::Acquire),
        Done,
        "past the end"
    );
    assert!(!w.states.advance(b(320), Done, Wanted));
    assert_eq!(w.states.len(), BlockCount(320));
}

/// Revoking is for this snapshot and all before it, and the first cause stays.
#[test]
fn revocation_goes_by_sequence() {
    let control: Arc<dyn Memory> = PlainMemory::new(shared::control::WORDS);
    let at = |sequence| Revocation::new(&control, sequence).unwrap();
    assert!(at(5).revoke(RevokeCause::WaitLimit));
    assert!(!at(5).revoke(RevokeCause::Cancelled));
    assert!(!at(3).revoke(RevokeCause::Cancelled));
    assert_eq!(at(5).cause(), Some(RevokeCause::WaitLimit));
    assert_eq!(at(4).cause(), Some(RevokeCause::WaitLimit));
    assert_eq!(at(6).cause(), None);
    assert!(at(6).revoke(RevokeCause::Detached));
}
