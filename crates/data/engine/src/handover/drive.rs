//! The loop between the machines and whoever performs their actions. No I/O of its own: that is behind the trait.

use super::stop::Bitmap;
use super::{Action, Attach, Begun, Event, Identity, Name, Stop, Stored};
use crate::evidence::Evidence;
use blktide_format::{bitmap_file, marker};
use blktide_types::reason::Reason;
use std::io;

/// The state folder and the device: what the actions are performed on.
pub trait Surroundings {
    /// The content of a file, `None` if it is not there. Of one longer than `limit_bytes` at least one byte more than that.
    fn read(&mut self, name: Name, limit_bytes: u64) -> io::Result<Option<Vec<u8>>>;
    /// Overwrites a file in place from its first byte (creates it if it is not there), then cuts it to this length.
    fn put(&mut self, name: Name, bytes: &[u8]) -> io::Result<()>;
    /// fsync of a file.
    fn sync(&mut self, name: Name) -> io::Result<()>;
    /// Removes a name; success if it is not there.
    fn unlink(&mut self, name: Name) -> io::Result<()>;
    /// fsync of the folder.
    fn sync_folder(&mut self) -> io::Result<()>;
    /// Flush of the backing device.
    fn flush_device(&mut self) -> io::Result<()>;
    /// Evidence of the backing device: [`crate::evidence::collect`].
    fn evidence(&mut self) -> Evidence;
}

/// Why a hand-over did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// Neither marker nor bitmap file could be made to say that the volume is in use; nothing may be served: after a power cut the
    /// old bitmap might be believed.
    #[error(
        "the volume's state folder cannot be written, and what it holds might be believed later"
    )]
    Refused {
        /// The last error.
        source: io::Error,
    },
}

/// Takes a volume up: the fence is held, nothing was served yet. When it returns `Ok`, the first write may be let through.
///
/// Waits: for the evidence's reads and up to four flushes of the state folder's disk.
pub fn attach(identity: Identity, around: &mut dyn Surroundings) -> Result<Begun, HandoverError> {
    let mut machine = Attach::new(identity);
    let mut event = Event::Start;
    let mut last = None;
    loop {
        let action = machine.step(event);
        if let Action::Serve(begun) = action {
            return Ok(begun);
        }
        if matches!(action, Action::Refuse | Action::Ended(_)) {
            let source = last.unwrap_or_else(|| io::ErrorKind::InvalidInput.into());
            return Err(HandoverError::Refused { source });
        }
        event = perform(&action, &identity, around, &mut last);
    }
}

/// Lets a volume go that is provably closed to writers. Whatever it returns, nothing must be served any more.
///
/// Waits: for a flush of the device, the evidence's reads, and four flushes of the state folder's disk.
pub fn stop(identity: Identity, bitmap: Bitmap, around: &mut dyn Surroundings) -> Stored {
    let mut machine = Stop::new(identity, bitmap);
    let mut event = Event::Start;
    let mut last = None;
    loop {
        let action = machine.step(&event);
        if let Action::Ended(stored) = action {
            return stored;
        }
        event = perform(&action, &identity, around, &mut last);
    }
}

/// Makes sure that the volume's bitmap is not believed at its next attach, for `reason`: before somebody writes its backing device
/// past the tracker (P15). The volume is not attached. When it returns `Ok`, that is durable.
///
/// Errors: the last one; then the old bitmap may still be believed, and the device must not be written.
pub fn forget(
    identity: &Identity,
    reason: Reason,
    around: &mut dyn Surroundings,
) -> io::Result<()> {
    let marker = identity.marker(marker::State::Open(Some(reason)));
    let consumed = bitmap_file::consumed(identity.volume, identity.life);
    let by_marker = around
        .put(Name::Marker, &marker)
        .and_then(|()| around.sync(Name::Marker))
        .and_then(|()| around.sync_folder());
    let by_file = around
        .put(Name::Bitmap, &consumed)
        .and_then(|()| around.sync(Name::Bitmap))
        .and_then(|()| around.unlink(Name::Bitmap))
        .and_then(|()| around.sync_folder());
    by_marker.or(by_file)
}

fn perform(
    action: &Action,
    identity: &Identity,
    around: &mut dyn Surroundings,
    last: &mut Option<io::Error>,
) -> Event {
    let done = match action {
        Action::Read(name) => match around.read(*name, identity.file_bytes_max()) {
            Ok(content) => return Event::Content(content),
            Err(error) => Err(error),
        },
        Action::Collect => return Event::Evidence(around.evidence()),
        Action::Put(name, bytes) => around.put(*name, bytes),
        Action::Sync(name) => around.sync(*name),
        Action::Unlink(name) => around.unlink(*name),
        Action::SyncFolder => around.sync_folder(),
        Action::FlushDevice => around.flush_device(),
        Action::Serve(_) | Action::Refuse | Action::Ended(_) => Ok(()),
    };
    match done {
        Ok(()) => Event::Done,
        Err(error) => {
            *last = Some(error);
            Event::Failed
        }
    }
}
