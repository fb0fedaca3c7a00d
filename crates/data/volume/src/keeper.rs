//! The keeper: holds what must outlive a server, and starts servers.

use crate::error::VolumeError;
use crate::options::VolumeOptions;

/// Runs the keeper of a volume until it is detached: attaches it, or adopts a living server whose keeper is dead.
///
/// Stays in the foreground; logs to standard error. Errors: `AlreadyAttached`, `Layout`, `ServerEnded`, `Io`; then nothing is left
/// mounted or looped.
pub fn run(options: &VolumeOptions) -> Result<(), VolumeError> {
    Err(VolumeError::Layout {
        why: options.name.clone(),
    })
}
