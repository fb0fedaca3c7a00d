//! Ctrl-C as an event, for programs that start others: a handler, not a blocked signal.
//!
//! A blocked signal stays blocked in the programs that are started; a handler does not survive their exec. So what is
//! started here can be interrupted as if a shell had started it.
//! **Invariant**: the handler does nothing but ring one event, which lives as long as the process.

use crate::event::{EventFd, Signals};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

static BELL: AtomicI32 = AtomicI32::new(-1);
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// Signals that ring an event. There is one for the process.
#[derive(Clone, Copy, Debug)]
pub struct Interrupts(&'static EventFd);

impl Interrupts {
    /// Catches `signals` from now on.
    pub fn catch(signals: &[Signals]) -> io::Result<Self> {
        let event = match EVENT.get() {
            Some(event) => event,
            None => {
                let made = EventFd::new()?;
                EVENT.get_or_init(|| made)
            }
        };
        BELL.store(event.as_fd().as_raw_fd(), Ordering::SeqCst);
        let action = SigAction::new(
            SigHandler::Handler(ring),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        for signal in signals {
            // SAFETY: the handler calls nothing but write(2), which is async-signal-safe.
            unsafe { sigaction(signal.nix(), &action) }?;
        }
        Ok(Self(event))
    }

    /// Whether a signal has come since the last call.
    pub fn take(&self) -> bool {
        self.0.take()
    }
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

extern "C" fn ring(_signal: i32) {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: `one` is 8 readable bytes; a full or closed counter makes the call fail, which is harmless.
    let _full = unsafe { libc::write(BELL.load(Ordering::SeqCst), one.as_ptr().cast(), one.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::wait_readable;
    use crate::process::PidFd;
    use std::time::Duration;

    #[test]
    fn a_signal_rings_and_the_process_lives() {
        let interrupts = Interrupts::catch(&[Signals::User1]).unwrap();
        assert!(!interrupts.take());
        PidFd::of_self().unwrap().signal(Signals::User1).unwrap();
        assert!(wait_readable(&interrupts, Some(Duration::from_secs(10))).unwrap());
        assert!(interrupts.take());
        assert!(!interrupts.take());
    }
}
