//! The server's start: what `blktided volume NAME --server` runs. All it needs is inherited.

use crate::error::VolumeError;

/// Runs a server on the descriptors its keeper has put at their numbers. Returns when the volume has been detached cleanly.
pub fn run(arguments: &[String]) -> Result<(), VolumeError> {
    let _ = arguments;
    Err(VolumeError::Layout { why: String::new() })
}
