//! What follows a server's end, and when a living one is taken for hung.

use crate::start::{Role, word};
use blktide_format::shared::{Shape, queue};
use blktide_sys::mapping::Mapping;
use blktide_sys::process::Exit;
use blktide_sys::spawn::Program;
use blktide_types::clock::Instant;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Deaths in a row after which nothing is tracked any more.
const DEATHS_MAX: u32 = 5;
/// A server that lived so long is not counted as one that keeps dying.
const LIFE_MIN: Duration = Duration::from_secs(10);
/// A queue that stands still for so long, with nothing outstanding at the device, hangs (P7).
const HUNG_AFTER: Duration = Duration::from_secs(10);
/// The time from one look to the next counts for so much at most.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Longest pause between two servers that die at once.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How servers have died.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    in_row: u32,
}

/// What follows a server's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Nothing: the volume is detached.
    Detached,
    /// The connection was ended from outside: no server can serve it any more.
    Gone,
    /// Another server.
    Successor,
}

/// The program that servers were started from before this build came: what goes on if this build cannot (P7).
#[derive(Debug, Default)]
pub(super) struct Older {
    program: Option<Program>,
    /// The server was started from this build.
    tried: bool,
}

impl Older {
    pub(super) const fn new(program: Program) -> Self {
        Self {
            program: Some(program),
            tried: false,
        }
    }

    /// A server was started from the program at hand.
    pub(super) const fn note_start(&mut self) {
        self.tried = true;
    }

    /// A server has died; it had finished requests, or lived long, or not. The program to go back to, if this build's first
    /// server did neither: it may not know the memory's layout.
    pub(super) fn note_death(&mut self, lived: Duration, progress: bool) -> Option<Program> {
        if !self.tried {
            // It was started by the keeper before, from the older one.
            return None;
        }
        let older = self.program.take();
        older.filter(|_| !is_life(lived, progress))
    }
}

/// Whether a server did something, or at least lived: it is not one that keeps dying.
fn is_life(lived: Duration, progress: bool) -> bool {
    progress || lived >= LIFE_MIN
}

/// What comes after a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) role: Role,
    /// Only when servers die again and again, pass-through ones too: not to eat the machine.
    pub(super) pause: Option<Duration>,
}

impl Deaths {
    /// What follows an end, by the words `ENDED` and `CLOSING`. `over`: the connection has ended.
    ///
    /// Unmounted by a detach whose server died before the bitmap was stored: a successor stores it, if one can.
    pub(super) const fn fate(&self, ended: u64, closing: u64, over: bool) -> Fate {
        let stores = closing == word::CLEARED && self.in_row <= DEATHS_MAX;
        if ended == word::CLEAN {
            Fate::Detached
        } else if over && !stores {
            Fate::Gone
        } else {
            Fate::Successor
        }
    }

    /// Counts a death of a server that lived so long, and finished requests or not.
    pub(super) fn count(&mut self, lived: Duration, progress: bool) -> Step {
        if is_life(lived, progress) {
            self.in_row = 0;
        }
        self.in_row = self.in_row.saturating_add(1);
        let role = if self.in_row > DEATHS_MAX {
            Role::PassThrough
        } else {
            Role::Takeover
        };
        let beyond = self.in_row.saturating_sub(DEATHS_MAX + 2);
        let pause =
            Duration::from_millis(10).saturating_mul(1_u32.checked_shl(beyond).unwrap_or(u32::MAX));
        Step {
            role,
            pause: (beyond > 0).then(|| pause.min(PAUSE_MAX)),
        }
    }

    pub(super) const fn in_row(&self) -> u32 {
        self.in_row
    }
}

/// The sum of a word of all queues.
pub(super) fn sum(memory: &Mapping, shape: &Shape, word: usize) -> u64 {
    (0..shape.queues)
        .map(|q| load(memory, shape.queue(q).saturating_add(word)))
        .fold(0, u64::saturating_add)
}

fn load(memory: &Mapping, index: usize) -> u64 {
    memory
        .words()
        .get(index)
        .map_or(0, |w| w.load(Ordering::SeqCst))
}

/// Whether queues stand still.
#[derive(Debug, Default)]
pub(super) struct Hung {
    /// For each queue its tick, and how long that has been seen.
    seen: Vec<(u64, Duration)>,
    last: Option<Instant>,
}

impl Hung {
    /// Looks once; true if a queue hangs. A slow disk is not a hung server: what waits for the device is left alone.
    ///
    /// Time between two looks counts for little: after a suspend it is hours, in which no queue could tick.
    pub(super) fn look(&mut self, memory: &Mapping, shape: &Shape, now: Instant) -> bool {
        let passed = self
            .last
            .map_or(Duration::ZERO, |last| now.since(last).min(LOOK_MAX));
        self.last = Some(now);
        if self.seen.len() != shape.queues {
            self.seen = vec![(0, Duration::ZERO); shape.queues];
        }
        let mut hangs = false;
        for (index, (seen, still)) in self.seen.iter_mut().enumerate() {
            let at = |word: usize| load(memory, shape.queue(index).saturating_add(word));
            let tick = at(queue::TICK);
            // Before its first tick a server is taking over, which may wait for the fence.
            if tick == 0 || tick != *seen || at(queue::OUTSTANDING) != 0 {
                *still = Duration::ZERO;
            } else {
                *still += passed;
            }
            *seen = tick;
            hangs |= *still >= HUNG_AFTER;
        }
        hangs
    }
}

/// How a server ended, in words.
pub(super) fn how(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exit code {code}"),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Unknown => "it is gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_sys::memfd::Memfd;
    use blktide_types::geometry::Geometry;
    use blktide_types::unit::BlockSize;
    use std::path::Path;

    #[test]
    fn five_deaths_without_progress_and_it_passes_through() {
        let mut deaths = Deaths::default();
        for _ in 0..5 {
            assert_eq!(
                deaths.count(Duration::ZERO, false),
                Step {
                    role: Role::Takeover,
                    pause: None
                }
            );
        }
        assert_eq!(deaths.count(Duration::ZERO, false).role, Role::PassThrough);
        let late = (0..100)
            .map(|_| deaths.count(Duration::ZERO, false))
            .last()
            .unwrap();
        assert_eq!(
            late,
            Step {
                role: Role::PassThrough,
                pause: Some(PAUSE_MAX)
            }
        );
        assert_eq!(
            deaths.count(Duration::ZERO, true).role,
            Role::Takeover,
            "progress counts"
        );
        assert_eq!(deaths.in_row(), 1);
        for _ in 0..50 {
            assert_eq!(
                deaths.count(LIFE_MIN, false),
                Step {
                    role: Role::Takeover,
                    pause: None
                },
                "so does a life"
            );
        }
    }

    /// P7: a build that does not know the layout is replaced by the one before, at once.
    #[test]
    fn the_build_before_goes_on_if_this_one_cannot() {
        let adopted = || Older::new(Program::copy_of(Path::new("/bin/sh")).unwrap());
        let mut refusing = adopted();
        let first = refusing.note_death(Duration::ZERO, false);
        assert!(first.is_none(), "that was the older one's");
        refusing.note_start();
        assert!(refusing.note_death(Duration::ZERO, false).is_some());
        assert!(refusing.note_death(Duration::ZERO, false).is_none());
        for (lived, progress) in [(Duration::ZERO, true), (LIFE_MIN, false)] {
            let mut working = adopted();
            working.note_start();
            assert!(working.note_death(lived, progress).is_none());
            let later = working.note_death(Duration::ZERO, false);
            assert!(later.is_none(), "it has shown that it can");
        }
    }

    /// A server that dies after the unmount has not stored the bitmap yet.
    #[test]
    fn a_detach_goes_on_after_a_death() {
        let mut deaths = Deaths::default();
        let over = |deaths: &Deaths, closing| deaths.fate(0, closing, true);
        assert_eq!(over(&deaths, word::CLEARED), Fate::Successor);
        assert_eq!(over(&deaths, 0), Fate::Gone, "nobody detached");
        for _ in 0..=DEATHS_MAX {
            assert_eq!(over(&deaths, word::CLEARED), Fate::Successor);
            deaths.count(Duration::ZERO, false);
        }
        assert_eq!(over(&deaths, word::CLEARED), Fate::Gone, "not for ever");
        let clean = deaths.fate(word::CLEAN, word::CLEARED, true);
        assert_eq!(clean, Fate::Detached);
        assert_eq!(deaths.fate(0, 0, false), Fate::Successor);
    }

    fn memory() -> (Mapping, Shape) {
        let block = BlockSize::DEFAULT;
        let shape = Shape::usual(Geometry::new(1 << 20, block, block, 512, 4096).unwrap());
        let memory = Memfd::create("blktide-test", shape.control_words() as u64 * 8).unwrap();
        (Mapping::new(&memory).unwrap(), shape)
    }

    /// P7: a slow disk is not a hung server.
    #[test]
    fn only_what_stands_still_with_nothing_outstanding_hangs() {
        let (memory, shape) = memory();
        let at = |s: u64| Instant(s * 1_000_000_000);
        let set = |word: usize, value: u64| {
            for q in 0..shape.queues {
                memory.words()[shape.queue(q) + word].store(value, Ordering::SeqCst);
            }
        };
        let mut hung = Hung::default();
        for s in 0..100 {
            assert!(!hung.look(&memory, &shape, at(s)), "taking over");
        }
        for s in 100..200 {
            set(queue::TICK, s);
            assert!(!hung.look(&memory, &shape, at(s)), "ticking");
        }
        set(queue::OUTSTANDING, 1);
        for s in 200..300 {
            assert!(!hung.look(&memory, &shape, at(s)), "waiting for the device");
        }
        set(queue::OUTSTANDING, 0);
        assert!(!hung.look(&memory, &shape, at(10_000)), "a suspend");
        let first = (10_001..10_100).find(|s| hung.look(&memory, &shape, at(*s)));
        assert_eq!(first, Some(10_008), "2 s for the suspend, 8 looks");
    }
}
