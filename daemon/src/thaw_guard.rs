//! The thaw guard of mode `watch`, as a process.

use crate::complain;
use std::process::ExitCode;

/// The guard, until who started it ends.
pub(crate) fn run() -> ExitCode {
    match blktide_watch::guard::run() {
        Ok(()) => ExitCode::SUCCESS,
        // Nothing is frozen any more: this line may go to any disk.
        Err(error) => {
            complain(&format!(
                "blktided thaw-guard: {:#}",
                anyhow::Error::new(error)
            ));
            ExitCode::FAILURE
        }
    }
}
