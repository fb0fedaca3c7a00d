//! Taking the volume out of the path, and storing its bitmap (P4).
//!
//! ```text
//! asked ─▶ node open? refused ─▶ loop cleared, unbound ─▶ closing = cleared ─▶ FUSE unmounted ─▶ queues end ─▶
//!   bitmap file durable ─▶ marker closed ─▶ ended = clean ─▶ answered
//! ```
//! **Invariant**: the bitmap is stored only after the frontend is gone with no opener left, and while the fence is ours.

use crate::bitmap::{self, HandoverDevice};
use crate::error::Refusal;
use crate::message::Reply;
use crate::save_area::chain;
use crate::server::io_error;
use crate::serving::{Flow, Server};
use crate::start::word;
use blktide_format::shared::control;
use blktide_sys::clock::SystemClock;
use blktide_sys::loopdev::LoopDevice;
use blktide_sys::mounts::DeviceNumber;
use blktide_sys::{Errno, event, fs, fuse, mounts};
use blktide_types::clock::Clock;
use blktide_types::io::RevokeCause;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the kernel may take to let go of the loop device or the mount.
const LET_GO: Duration = Duration::from_secs(10);
/// How long the queues may take to end by themselves once the mount is gone.
const QUEUES_END: Duration = Duration::from_secs(5);

impl Server {
    pub(crate) fn detach(&mut self, id: u64) -> Flow {
        if self.engine.word(control::STATE) == word::ATTACHING {
            let why = "the volume is just being attached; try again";
            self.refuse(id, Refusal::Busy, why);
            return Flow::GoOn;
        }
        let own = match self.own_loop() {
            Ok(own) => own,
            Err(why) => {
                self.refuse(id, Refusal::Failed, &why);
                return Flow::GoOn;
            }
        };
        if let Some(who) = own.and_then(who_uses) {
            let why = format!("{} is in use: {who}", self.start.options.node().display());
            self.refuse(id, Refusal::InUse, &why);
            return Flow::GoOn;
        }
        self.abandon_pending();
        self.tracker.revoke(RevokeCause::Detached);
        self.end_snapshot();
        let was = self.engine.word(control::STATE);
        self.engine.set_word(control::STATE, word::DETACHING);
        let connection = match self.take_out() {
            Ok(connection) => connection,
            Err(why) => {
                self.engine.set_word(control::CLOSING, 0);
                self.engine.set_word(control::STATE, was);
                self.refuse(id, Refusal::InUse, &why);
                return Flow::GoOn;
            }
        };
        self.store_bitmap(connection.as_ref());
        self.reply(id, &Reply::Done);
        Flow::Ended
    }

    /// Our loop device, if it still is that: unbound by others, its number may be anybody's by now.
    fn own_loop(&self) -> Result<Option<LoopDevice>, String> {
        let Some(device) = self.loop_device() else {
            return Ok(None);
        };
        let bound = device.binding().map_err(|e| chain(&e))?;
        let frontend = self.engine.word(control::FRONTEND);
        let ours = bound.is_some_and(|b| is_ours(b.file_system(), frontend));
        Ok(ours.then_some(device))
    }

    /// Clears the loop device and unmounts; words of what is in the way otherwise. The connection that was mounted, if it was.
    fn take_out(&self) -> Result<Option<fuse::Connection>, String> {
        if let Some(device) = self.own_loop()? {
            device.clear().map_err(|e| chain(&e))?;
            let deadline = SystemClock.now().after(LET_GO);
            let unbound = device.wait_unbound(&SystemClock, deadline);
            if !unbound.map_err(|e| chain(&e))? {
                return Err("the kernel still holds the loop device".to_owned());
            }
        }
        self.engine.set_word(control::LOOP_NUMBER, 0);
        self.engine.set_word(control::CLOSING, word::CLEARED);
        let at = self.start.options.mount_point();
        let connection = fuse::Connection::of_mount(&at).ok();
        let deadline = SystemClock.now().after(LET_GO);
        loop {
            match fuse::unmount(&at, false) {
                Ok(()) => return Ok(connection),
                Err(_) if matches!(mounts::at(&at), Ok(None)) => return Ok(connection),
                Err(e) if e.errno() != Some(Errno::BUSY) || SystemClock.now() >= deadline => {
                    return Err(chain(&e));
                }
                // The kernel closes the loop device's file a moment after it is unbound, and tells nobody.
                Err(_) => event::pause(Duration::from_millis(5)).map_err(|e| e.to_string())?,
            }
        }
    }

    /// Waits for the queues' ends, stores the bitmap, says that this server ended cleanly. Also what a successor does that
    /// finds the volume closed. `connection` is the one that was unmounted, if it is known.
    pub(crate) fn store_bitmap(&mut self, connection: Option<&fuse::Connection>) {
        let mut clean = self.queues_end(connection);
        clean &= self.queues.results.try_iter().all(|r| r.is_ok());
        // What somebody else wrote since the last hold, also what still is in the page cache: the evidence is taken after
        // it, and would match at the next attach. If flushing fails here, it fails again below.
        drop(fs::sync_data(&**self.backing.file()));
        if let Some((reason, detail)) = self.gone_past_us() {
            self.distrust(reason, &detail);
        }
        let (start, backing, engine) = (&self.start, &self.backing, &self.engine);
        let stored = if clean {
            HandoverDevice::of(backing)
                .and_then(|device| bitmap::close(&start.options, &device, engine, &self.tracker))
        } else {
            Err(io_error("end the queues", std::io::ErrorKind::Other.into()))
        };
        if let Err(e) = &stored {
            // The marker says 'open': the next life knows.
            self.say(&format!("server: the bitmap was not stored: {}", chain(e)));
        }
        self.engine.set_word(control::ENDED, word::CLEAN);
    }
}

impl Server {
    /// Ends the queues' threads. False: one has failed, or does not end.
    ///
    /// A copy of the mount in another mount namespace keeps the connection alive after ours is gone: then it is aborted.
    /// Nothing of the volume is lost by that, for its loop device is unbound already.
    fn queues_end(&mut self, connection: Option<&fuse::Connection>) -> bool {
        if !self.wait_for_queues(QUEUES_END) {
            self.say("server: something still holds the connection to the kernel; it is aborted");
            let aborted = connection.map(fuse::Connection::abort);
            // Unknown: a predecessor has unmounted it. The keeper's end closes it.
            if !matches!(aborted, Some(Ok(()))) && !self.wait_for_queues(QUEUES_END) {
                return false;
            }
        }
        let mut clean = true;
        for thread in self.queues.threads.drain(..) {
            clean &= thread.join().is_ok();
        }
        clean
    }

    /// Whether all queues' threads end within `limit`.
    fn wait_for_queues(&self, limit: Duration) -> bool {
        let deadline = SystemClock.now().after(limit);
        loop {
            if self.queues.threads.iter().all(JoinHandle::is_finished) {
                return true;
            }
            // A thread's end is rung a moment before it is over, and by one queue for all.
            let paused = event::pause(Duration::from_millis(2));
            if paused.is_err() || SystemClock.now() >= deadline {
                return false;
            }
        }
    }
}

/// Whether a file of this file system is the one that our frontend serves; as long as its number is not known it is.
fn is_ours(file_system: DeviceNumber, frontend: u64) -> bool {
    let ours = file_system.major == 0 && u64::from(file_system.minor) == frontend;
    frontend == 0 || ours
}

/// Who has the node open, mounted or claimed.
fn who_uses(device: LoopDevice) -> Option<String> {
    let deadline = SystemClock.now().after(Duration::from_millis(500));
    loop {
        let found = users_of(device);
        if found.is_none() || SystemClock.now() >= deadline {
            return found;
        }
        // udev and blkid look at a device for a moment after each close.
        if event::pause(Duration::from_millis(20)).is_err() {
            return found;
        }
    }
}

fn users_of(device: LoopDevice) -> Option<String> {
    let block = device.block_device().ok()?;
    if let Some(mount) = block.mounts().ok()?.first() {
        return Some(format!("mounted at {}", mount.at.display()));
    }
    if let Some(holder) = block.holders().ok()?.first() {
        return Some(format!("{holder} is built on it"));
    }
    if block.is_swap().unwrap_or(false) {
        return Some("it is used as swap".to_owned());
    }
    match block.openers() {
        Ok(openers) => {
            if let Some(opener) = openers.first() {
                return Some(format!("{opener} has it open"));
            }
        }
        Err(error) => return Some(format!("nobody can tell whether it is open: {error}")),
    }
    match blktide_sys::blockdev::is_unclaimed(&device.node()) {
        Ok(false) => Some("something in the kernel has claimed it".to_owned()),
        Ok(true) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop device that was unbound and bound to another's file is not ours to clear.
    #[test]
    fn a_loop_device_over_another_file_system_is_not_ours() {
        let number = |major, minor| DeviceNumber { major, minor };
        assert!(is_ours(number(0, 52), 52));
        assert!(!is_ours(number(0, 53), 52), "another FUSE file system");
        assert!(!is_ours(number(8, 52), 52), "a disk");
        assert!(is_ours(number(8, 1), 0), "not known");
    }
}
