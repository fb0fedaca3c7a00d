//! One request's ways, each by hand.

use super::*;
use crate::control::{Absent, Control, Limits, SnapshotMemories, SnapshotRequest};
use crate::state::SlotIndex;
use crate::{Engine, HoldState, Memory, PlainMemory};
use blktide_format::shared::Shape;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::unit::BlockSize;
use std::sync::Arc;

const BLOCK: u64 = 65536;
const BLOCKS: u64 = 2048;
const LIMIT: Duration = Duration::from_millis(50);

struct Bench {
    engine: Engine,
    control: Control,
    queue: Queue,
    now: u64,
}

impl Bench {
    fn new() -> Self {
        let geometry = Geometry::new(
            BLOCKS * BLOCK - 65536 + 512,
            BlockSize::DEFAULT,
            BlockSize::DEFAULT,
            512,
            512,
        );
        let shape = Shape::usual(geometry.unwrap());
        let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
        let engine = Engine::create(
            &plain(shape.control_words()),
            &plain(shape.banks_words()),
            shape,
        )
        .unwrap();
        let mut control = engine.control();
        control
            .begin_life(&[], (GenerationName([1; 16]), WallTime(0)))
            .unwrap();
        Self {
            queue: engine.queue(0).unwrap(),
            control,
            engine,
            now: 0,
        }
    }

    /// Everything is wanted; `save_slots` places.
    fn snapshot(&mut self, save_slots: u32, overflow: Overflow) {
        let shape = *self.engine.shape();
        let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
        let asked = SnapshotRequest {
            id: SnapshotId([9; 16]),
            opens: GenerationName([2; 16]),
            opens_at: WallTime(0),
            base: None,
            absent: Absent::Everything,
            limits: Limits {
                overflow,
                wait_limit: LIMIT,
                lease: Duration::from_secs(1),
            },
            memories: SnapshotMemories {
                states: plain(shape.states_words()),
                index: plain(SlotIndex::words(save_slots)),
                wanted: plain(shape.wanted_words()),
                save_slots,
                save_area: Arc::new(()),
            },
        };
        let prepared = self.control.prepare(&asked).unwrap();
        let mut hold = self.control.hold(Instant(0), LIMIT).unwrap();
        assert_eq!(self.control.poll(&mut hold, Instant(0)), HoldState::Held);
        self.control.commit(&hold, &prepared, Instant(0)).unwrap();
    }

    fn step(&mut self, request: &mut Request, event: Event) -> Vec<Action> {
        let mut actions = Actions::new();
        request.step(&mut self.queue, event, Instant(self.now), &mut actions);
        actions.drain().collect()
    }

    fn revoked(&self) -> Option<RevokeCause> {
        self.control.snapshot().unwrap().revoked()
    }
}

fn write(offset: u64, len: u64) -> Operation {
    Operation::Write {
        offset,
        len,
        durable: false,
    }
}

fn zero(offset: u64, len: u64) -> Operation {
    Operation::Zero {
        offset,
        len,
        keep: false,
    }
}

fn tickets(actions: &[Action]) -> Vec<Ticket> {
    actions
        .iter()
        .filter_map(|a| match a {
            Action::Preserve { ticket, .. } => Some(*ticket),
            Action::Perform { .. }
            | Action::Complete(_)
            | Action::WaitGate
            | Action::WaitSnapshot { .. } => None,
        })
        .collect()
}

#[test]
fn without_a_snapshot_a_write_is_one_step() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    let actions = bench.step(&mut request, Event::Start(write(512, 1024)));
    let operation = write(512, 1024);
    assert_eq!(actions, [Action::Perform { operation, done: 0 }]);
    assert_eq!(bench.engine.queue_word(0, queue::INSIDE), 1);
    let changed = bench
        .control
        .changed_since(GenerationName([1; 16]))
        .unwrap();
    assert!(
        changed.contains(BlockIndex(0)),
        "marked before it is performed"
    );
    let actions = bench.step(&mut request, Event::Performed(Ok(1024)));
    assert_eq!(actions, [Action::Complete(Ok(1024))]);
    assert_eq!(bench.engine.queue_word(0, queue::INSIDE), 0);
}

/// trap TA6, TD4: what ends past the volume is refused, unperformed.
#[test]
fn past_the_end_is_refused() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    let end = bench.engine.shape().geometry.volume_bytes();
    for operation in [write(end, 512), zero(end - 512, 1024), write(u64::MAX, 512)] {
        let actions = bench.step(&mut request, Event::Start(operation));
        assert_eq!(actions, [Action::Complete(Err(Errno::INVALID))]);
    }
    let actions = bench.step(&mut request, Event::Start(write(end - 512, 512)));
    assert!(matches!(actions[..], [Action::Perform { .. }]));
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    bench.step(&mut request, Event::Start(write(0, 4096)));
    let actions = bench.step(&mut request, Event::Performed(Ok(512)));
    let operation = write(512, 3584);
    let done = 512;
    assert_eq!(actions, [Action::Perform { operation, done }]);
    let actions = bench.step(&mut request, Event::Performed(Ok(0)));
    assert_eq!(actions, [Action::Complete(Err(Errno::IO))]);
    assert_eq!(bench.engine.queue_word(0, queue::INSIDE), 0);
    bench.step(&mut request, Event::Start(Operation::Flush));
    let actions = bench.step(&mut request, Event::Performed(Ok(0)));
    assert_eq!(actions, [Action::Complete(Ok(0))]);
}

/// trap TE9, TA2: a write to a part of two wanted blocks preserves both, whole, before it is performed.
#[test]
fn wanted_blocks_are_preserved_first() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    bench.snapshot(8, Overflow::GiveUp);
    let actions = bench.step(&mut request, Event::Start(write(BLOCK - 512, 1024)));
    let spans: Vec<_> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Preserve { offset, len, .. } => Some((*offset, *len)),
            Action::Perform { .. }
            | Action::Complete(_)
            | Action::WaitGate
            | Action::WaitSnapshot { .. } => None,
        })
        .collect();
    assert_eq!(spans, [(0, BLOCK), (BLOCK, BLOCK)]);
    let tickets = tickets(&actions);
    let one = bench.step(&mut request, Event::Preserved(tickets[0], Outcome::Safe));
    assert_eq!(one, []);
    let two = bench.step(&mut request, Event::Preserved(tickets[1], Outcome::Safe));
    assert!(matches!(two[..], [Action::Perform { .. }]));
    bench.step(&mut request, Event::Performed(Ok(1024)));
    // Now they are preserved: the next write goes straight on.
    let actions = bench.step(&mut request, Event::Start(write(0, 512)));
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    // The short last block is preserved with its true length.
    let mut other = Request::new();
    let end = bench.engine.shape().geometry.volume_bytes();
    let actions = bench.step(&mut other, Event::Start(write(end - 512, 512)));
    assert!(matches!(actions[..], [Action::Preserve { len: 512, .. }]));
}

/// req D2: an original that cannot be kept never fails the write.
#[test]
fn what_cannot_be_preserved_revokes_and_the_write_goes_on() {
    for (outcome, cause) in [
        (Outcome::Unreadable, RevokeCause::OriginalUnreadable),
        (Outcome::SaveAreaFull, RevokeCause::SaveAreaFull),
        (Outcome::SaveAreaFailed, RevokeCause::SaveAreaFailed),
    ] {
        let (mut bench, mut request) = (Bench::new(), Request::new());
        bench.snapshot(4, Overflow::Wait);
        let actions = bench.step(&mut request, Event::Start(write(0, 512)));
        let ticket = tickets(&actions)[0];
        let actions = bench.step(&mut request, Event::Preserved(ticket, outcome));
        assert!(matches!(actions[..], [Action::Perform { .. }]));
        assert_eq!(bench.revoked(), Some(cause));
    }
}

/// req D2, D4: give-up: nobody waits.
#[test]
fn a_full_save_area_revokes_at_once() {
    let (mut bench, mut one, mut two) = (Bench::new(), Request::new(), Request::new());
    bench.snapshot(1, Overflow::GiveUp);
    bench.step(&mut one, Event::Start(write(0, 512)));
    let actions = bench.step(&mut two, Event::Start(write(BLOCK, 512)));
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    assert_eq!(bench.revoked(), Some(RevokeCause::SaveAreaFull));
}

/// req D2, D4: wait: for `wait_limit`, outside, then the snapshot goes.
#[test]
fn a_full_save_area_holds_a_write_for_the_limit() {
    let (mut bench, mut one, mut two) = (Bench::new(), Request::new(), Request::new());
    bench.snapshot(1, Overflow::Wait);
    bench.step(&mut one, Event::Start(write(0, 512)));
    let actions = bench.step(&mut two, Event::Start(write(BLOCK, 512)));
    assert!(matches!(actions[..], [Action::WaitSnapshot { .. }]));
    assert_eq!(
        bench.engine.queue_word(0, queue::INSIDE),
        1,
        "it waits outside"
    );
    assert_eq!(two.deadline(), Some(Instant(0).after(LIMIT)));
    bench.now = 49_000_000;
    let actions = bench.step(&mut two, Event::Again);
    assert!(matches!(actions[..], [Action::WaitSnapshot { .. }]));
    bench.now = 50_000_000;
    let actions = bench.step(&mut two, Event::Again);
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    assert_eq!(bench.revoked(), Some(RevokeCause::WaitLimit));
    assert_eq!(bench.engine.queue_word(0, queue::LONGEST_WAIT), 50_000_000);
}

/// req D4: a save area that never answers holds a write for `wait_limit`; its late answer is nobody's.
#[test]
fn a_preserve_that_never_ends_is_given_up() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    bench.snapshot(4, Overflow::GiveUp);
    let actions = bench.step(&mut request, Event::Start(write(0, 512)));
    let late = tickets(&actions)[0];
    assert_eq!(bench.step(&mut request, Event::Again), []);
    bench.now = 50_000_000;
    let actions = bench.step(&mut request, Event::Again);
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    assert_eq!(bench.revoked(), Some(RevokeCause::WaitLimit));
    bench.step(&mut request, Event::Performed(Ok(512)));
    assert_eq!(
        bench.step(&mut request, Event::Preserved(late, Outcome::Safe)),
        []
    );
    bench.step(&mut request, Event::Start(write(BLOCK, 512)));
    assert_eq!(
        bench.step(&mut request, Event::Preserved(late, Outcome::Safe)),
        []
    );
    assert_eq!(Ticket::of_number(late.number()), late);
}

/// req D4: half of a queue's requests may wait, not more.
#[test]
fn too_many_waiting_requests_revoke() {
    let mut bench = Bench::new();
    bench.snapshot(1, Overflow::Wait);
    bench.step(&mut Request::new(), Event::Start(write(0, 512)));
    let mut requests: Vec<Request> = (0..33).map(|_| Request::new()).collect();
    for (n, request) in (1..).zip(&mut requests) {
        let actions = bench.step(request, Event::Start(write(n * BLOCK, 512)));
        let last = n == 33;
        assert_eq!(matches!(actions[..], [Action::Perform { .. }]), last, "{n}");
    }
    assert_eq!(bench.revoked(), Some(RevokeCause::QueueFull));
    assert_eq!(bench.engine.queue_word(0, queue::PARKED), 32);
    for request in &mut requests[..32] {
        let actions = bench.step(request, Event::Again);
        assert!(matches!(actions[..], [Action::Perform { .. }]));
    }
    assert_eq!(bench.engine.queue_word(0, queue::PARKED), 0);
}

/// trap TA2, TA3, req D4: zeroes in a wanted set go by pieces of at most 1 MiB, each preserved first; elsewhere by
/// 64 MiB; each piece leaves, so that a hold need not wait for all.
#[test]
fn zeroes_go_by_pieces() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    let len = 100 << 20;
    let mut ends = Vec::new();
    let mut actions = bench.step(&mut request, Event::Start(zero(0, len)));
    while let [
        Action::Perform {
            operation: Operation::Zero { offset, len, .. },
            ..
        },
    ] = actions[..]
    {
        ends.push(offset + len);
        actions = bench.step(&mut request, Event::Performed(Ok(len)));
    }
    assert_eq!(actions, [Action::Complete(Ok(len))]);
    assert_eq!(ends, [64 << 20, len]);
    bench.snapshot(64, Overflow::GiveUp);
    let (mut todo, mut pieces, mut kept) = (vec![Event::Start(zero(0, 3 << 20))], 0, 0);
    while let Some(event) = todo.pop() {
        for action in bench.step(&mut request, event) {
            match action {
                Action::Preserve { ticket, .. } => {
                    kept += 1;
                    todo.push(Event::Preserved(ticket, Outcome::Safe));
                }
                Action::Perform { operation, .. } => {
                    assert_eq!(kept, (pieces + 1) * 16, "preserved before");
                    assert!(operation.span().1 <= 1 << 20);
                    pieces += 1;
                    todo.push(Event::Performed(Ok(operation.span().1)));
                }
                Action::Complete(result) => assert_eq!(result, Ok(3 << 20)),
                Action::WaitGate | Action::WaitSnapshot { .. } => panic!("nothing to wait for"),
            }
        }
    }
    assert_eq!((pieces, kept), (3, 48));
}

/// A write that finds the gate set waits outside, and is marked in the generation in which it goes on.
#[test]
fn a_write_at_the_gate_is_marked_after_it_opens() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    let hold = bench.control.hold(Instant(0), LIMIT).unwrap();
    let actions = bench.step(&mut request, Event::Start(write(0, 512)));
    assert_eq!(actions, [Action::WaitGate]);
    assert_eq!(bench.engine.queue_word(0, queue::INSIDE), 0);
    assert_eq!(bench.step(&mut request, Event::Again), [Action::WaitGate]);
    assert!(bench.control.release(&hold));
    bench.snapshot(4, Overflow::GiveUp);
    bench.control.end_snapshot().unwrap();
    let actions = bench.step(&mut request, Event::Again);
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    let changed = bench
        .control
        .changed_since(GenerationName([2; 16]))
        .unwrap();
    assert!(changed.contains(BlockIndex(0)));
}

/// Tracking off: nothing is marked, nothing preserved, and that is said.
#[test]
fn passing_through_says_so() {
    let (mut bench, mut request) = (Bench::new(), Request::new());
    bench
        .control
        .pass_through(WallTime(7), GenerationName([5; 16]));
    let actions = bench.step(&mut request, Event::Start(write(0, 512)));
    assert!(matches!(actions[..], [Action::Perform { .. }]));
    let trust = bench.control.trusted();
    assert_eq!(
        trust.reason,
        Some(blktide_types::reason::Reason::TrackingInterrupted)
    );
    let unknown = bench.control.changed_since(GenerationName([5; 16]));
    assert!(matches!(unknown, Err(crate::EngineError::PassingThrough)));
    assert!(bench.control.distrust_detail().contains("passes through"));
}
