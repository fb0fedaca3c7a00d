//! Where a snapshot's originals are kept: fresh for each snapshot, without a name, gone with its last user (P6).
//!
//! **Invariant**: its space is taken before the snapshot begins; it never lies on the tracked volume.

use crate::error::{Refusal, VolumeError};
use crate::message::SaveArea;
use blktide_engine::Snapshot;
use blktide_sys::blockdev::lies_on;
use blktide_sys::fs::{self, Unnamed};
use blktide_sys::memfd::Memfd;
use blktide_sys::mounts::DeviceNumber;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// A save area, as queues find it in their snapshot.
#[derive(Debug)]
pub(crate) struct SaveFile {
    /// What originals are written to.
    pub(crate) file: Arc<OwnedFd>,
    /// Places in it.
    pub(crate) slots: u32,
}

impl SaveFile {
    /// The save area of a snapshot. `tracked`: the node of the tracked volume. `blocks`: more places are never needed.
    ///
    /// Waits: until the space is taken. Errors: `Refused`.
    pub(crate) fn create(
        asked: &SaveArea,
        tracked: Option<DeviceNumber>,
        block_bytes: u64,
        blocks: u64,
    ) -> Result<Self, VolumeError> {
        let (limit, file) = match asked {
            SaveArea::Memory { limit_bytes } => (*limit_bytes, None),
            SaveArea::Path {
                folder,
                limit_bytes,
                min_free_bytes,
            } => {
                refuse_on_volume(folder, tracked)?;
                let free = fs::free_bytes(folder).map_err(failed)?;
                let room = free.saturating_sub(*min_free_bytes);
                let file = Unnamed::create(folder, 0o600, true).map_err(failed)?;
                ((*limit_bytes).min(room), Some(file))
            }
        };
        let slots = (limit / block_bytes).min(blocks).min(1 << 24);
        if slots == 0 {
            return Err(refused(
                Refusal::SaveAreaFailed,
                "there is not room for one block in the save area",
            ));
        }
        let bytes = slots.saturating_mul(block_bytes);
        let file: OwnedFd = match file {
            None => {
                let memory = Memfd::create("blktide-save", bytes).map_err(failed)?;
                memory
                    .allocate(0, bytes)
                    .map_err(|e| refused(Refusal::SaveAreaFailed, &e.to_string()))?;
                memory.into_fd()
            }
            Some(unnamed) => {
                let file: OwnedFd = unnamed
                    .file()
                    .try_clone()
                    .map_err(|e| refused(Refusal::SaveAreaFailed, &e.to_string()))?
                    .into();
                fs::preallocate(&file, 0, bytes)
                    .map_err(|e| refused(Refusal::SaveAreaFailed, &e.to_string()))?;
                file
            }
        };
        Ok(Self {
            file: Arc::new(file),
            slots: u32::try_from(slots).unwrap_or(u32::MAX),
        })
    }

    /// A descriptor through which it can only be read; direct where its file system can.
    pub(crate) fn reader(&self) -> Result<OwnedFd, VolumeError> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let path = Path::new(&path);
        fs::open_direct_read(path)
            .or_else(|_| fs::open_read(path))
            .map_err(failed)
    }

    /// That of a snapshot.
    pub(crate) fn of(snapshot: &Snapshot) -> Option<&Self> {
        snapshot.save_area().downcast_ref()
    }
}

/// trap TE6: originals of a volume kept on the volume itself would have to be preserved themselves.
fn refuse_on_volume(folder: &Path, tracked: Option<DeviceNumber>) -> Result<(), VolumeError> {
    let Some(tracked) = tracked else {
        return Ok(());
    };
    if lies_on(folder, tracked).map_err(failed)? {
        Err(refused(
            Refusal::SaveAreaOnVolume,
            "the save area lies on the volume itself: name another path, or memory",
        ))
    } else {
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: blktide_sys::SysError) -> VolumeError {
    let error: &dyn std::error::Error = &error;
    refused(
        Refusal::SaveAreaFailed,
        &format!("the save area cannot be made: {}", chain(error)),
    )
}

/// An error with all that it came from.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text.push_str(": ");
        text.push_str(&next.to_string());
        source = next.source();
    }
    text
}

pub(crate) fn refused(kind: Refusal, message: &str) -> VolumeError {
    VolumeError::Refused {
        kind,
        message: message.to_owned(),
    }
}
