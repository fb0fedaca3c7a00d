//! The guard over a pretended file system.

use super::*;
use blktide_sys::event::wait_readable;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A file system of one bit, that somebody else may thaw or that cannot be thawed.
#[derive(Default)]
struct Pretended {
    frozen: AtomicBool,
    thaws: AtomicU32,
    broken: AtomicBool,
}

impl Freezes for Pretended {
    fn freeze(&self) -> Result<(), FreezeError> {
        if self.frozen.swap(true, Ordering::SeqCst) {
            return Err(FreezeError::AlreadyFrozen);
        }
        Ok(())
    }

    fn thaw(&self) -> Result<(), FreezeError> {
        self.thaws.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            return Err(FreezeError::Other(Errno::IO.error()));
        }
        if self.frozen.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        Err(FreezeError::NotFrozen)
    }
}

const LONG: Duration = Duration::from_secs(50);

struct Asker(Option<PacketSocket>);

impl Asker {
    fn say(&self, request: Request) {
        let socket = self.0.as_ref().unwrap();
        socket.send(&request.encode(), &[]).unwrap();
    }

    fn hear(&self) -> Reply {
        let socket = self.0.as_ref().unwrap();
        assert!(wait_readable(socket, Some(LONG)).unwrap());
        let mut bytes = [0; MESSAGE_BYTES];
        let got = socket.receive_bytes(&mut bytes).unwrap();
        Reply::decode(bytes.get(..got)).unwrap()
    }

    fn freeze(&self, number: u64, limit: Duration) {
        self.say(Request::Freeze { number, limit });
        assert!(matches!(self.hear(), Reply::Frozen { number: n, .. } if n == number));
    }

    fn over(&self) -> (u64, By, Option<Errno>) {
        let heard = self.hear();
        let Reply::Thawed(over) = heard else {
            panic!("{heard:?}");
        };
        (over.number, over.by, over.error)
    }

    fn ends(&mut self) {
        self.0 = None;
    }
}

/// Runs `story` as the asker of a guard; how the guard ended.
fn with_guard(mount: &Pretended, story: impl FnOnce(&mut Asker)) -> io::Result<()> {
    let (ours, theirs) = PacketSocket::pair().unwrap();
    std::thread::scope(|scope| {
        let guard = scope.spawn(move || {
            let socket = theirs;
            Post::new(&socket, mount, &SystemClock)?.serve(3)
        });
        let mut asker = Asker(Some(ours));
        assert_eq!(asker.hear(), Reply::Ready { refused: 3 });
        story(&mut asker);
        drop(asker);
        guard.join().unwrap()
    })
}

#[test]
fn asked_again_and_again() {
    let mount = Pretended::default();
    with_guard(&mount, |asker| {
        for number in 1..20 {
            asker.freeze(number, LONG);
            assert!(mount.frozen.load(Ordering::SeqCst));
            // Another freeze's thaw means nothing.
            asker.say(Request::Thaw { number: number - 1 });
            asker.say(Request::Thaw { number });
            assert_eq!(asker.over(), (number, By::Asked, None));
            assert!(!mount.frozen.load(Ordering::SeqCst));
        }
    })
    .unwrap();
    assert_eq!(mount.thaws.load(Ordering::SeqCst), 19);
}

#[test]
fn the_limit_thaws_and_a_late_word_does_not() {
    let mount = Pretended::default();
    with_guard(&mount, |asker| {
        asker.freeze(1, Duration::from_millis(3));
        assert_eq!(asker.over(), (1, By::Limit, None));
        asker.say(Request::Thaw { number: 1 });
        asker.freeze(2, LONG);
        asker.say(Request::Thaw { number: 2 });
        assert_eq!(asker.over(), (2, By::Asked, None));
    })
    .unwrap();
    assert_eq!(mount.thaws.load(Ordering::SeqCst), 2);
}

#[test]
fn the_end_of_the_asker_thaws() {
    let mount = Pretended::default();
    with_guard(&mount, |asker| {
        asker.freeze(1, LONG);
        asker.ends();
    })
    .unwrap();
    assert!(!mount.frozen.load(Ordering::SeqCst));
    with_guard(&mount, |asker| {
        // It ends before it can be told.
        asker.say(Request::Freeze {
            number: 1,
            limit: LONG,
        });
        asker.ends();
    })
    .unwrap();
    assert!(!mount.frozen.load(Ordering::SeqCst));
}

#[test]
fn what_is_not_understood_thaws() {
    let mount = Pretended::default();
    with_guard(&mount, |asker| {
        asker.freeze(1, LONG);
        asker.0.as_ref().unwrap().send(b"?", &[]).unwrap();
        assert_eq!(asker.over(), (1, By::Fault, None));
        asker.freeze(2, LONG);
        asker.say(Request::Freeze {
            number: 3,
            limit: LONG,
        });
        assert_eq!(asker.over(), (2, By::Fault, None));
    })
    .unwrap();
    let ended = with_guard(&mount, |asker| {
        asker.0.as_ref().unwrap().send(b"?", &[]).unwrap();
    });
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn what_is_anothers_is_told_and_left() {
    let mount = Pretended::default();
    mount.freeze().unwrap();
    with_guard(&mount, |asker| {
        asker.say(Request::Freeze {
            number: 1,
            limit: LONG,
        });
        let errno = Errno::BUSY;
        assert_eq!(asker.hear(), Reply::Failed { number: 1, errno });
    })
    .unwrap();
    assert!(mount.frozen.load(Ordering::SeqCst));
    mount.thaw().unwrap();
    with_guard(&mount, |asker| {
        asker.freeze(1, LONG);
        mount.thaw().unwrap();
        asker.say(Request::Thaw { number: 1 });
        assert_eq!(asker.over(), (1, By::Asked, Some(Errno::INVAL)));
    })
    .unwrap();
}

#[test]
fn what_cannot_be_thawed_is_told() {
    let mount = Pretended::default();
    mount.broken.store(true, Ordering::SeqCst);
    let ended = with_guard(&mount, |asker| {
        asker.freeze(1, LONG);
        asker.say(Request::Thaw { number: 1 });
        assert_eq!(asker.over(), (1, By::Asked, Some(Errno::IO)));
    });
    assert_eq!(Errno::of(&ended.unwrap_err()), Errno::IO);
}

#[test]
fn refusals_have_words() {
    assert_eq!(refused_words(0b101), ["locked memory", "I/O flusher"]);
    assert!(refused_words(0).is_empty());
}
