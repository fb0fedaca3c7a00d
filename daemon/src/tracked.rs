//! A volume's tracker, whichever mode it is in: a server that is asked, or what the kernel has.

use blktide_api::config::{Config, Mode, VolumeConfig};
use blktide_types::id::GenerationName;
use blktide_volume::message::{Distrust, Hint, VolumeStatus};
use blktide_volume::{VolumeClient, VolumeError};
use blktide_watch::Watched;
use std::time::Duration;

use crate::volume::options;

const LIMIT: Duration = Duration::from_secs(10);

fn client(config: &Config, volume: &VolumeConfig) -> Result<VolumeClient, VolumeError> {
    VolumeClient::connect(&config.runtime_dir, volume.name.as_str(), LIMIT)
}

/// Facts. Errors: `NotAttached`.
pub(crate) fn status_of(
    config: &Config,
    volume: &VolumeConfig,
) -> Result<VolumeStatus, VolumeError> {
    match volume.mode {
        Mode::Watch => Ok(Watched::look(&options(config, volume))?.status()),
        Mode::Auto | Mode::Ublk | Mode::Fuse => client(config, volume)?.status(),
    }
}

/// Bytes changed since each generation opened, and why nothing is believed, if so.
pub(crate) fn changed_since(
    config: &Config,
    volume: &VolumeConfig,
    generations: &[GenerationName],
) -> Result<(Vec<Option<u64>>, Option<Distrust>), VolumeError> {
    match volume.mode {
        Mode::Watch => Ok(Watched::look(&options(config, volume))?.changed_since(generations)),
        Mode::Auto | Mode::Ublk | Mode::Fuse => client(config, volume)?.changed_since(generations),
    }
}

/// Which boundaries to keep apart (P2). Waits for the volume's control side, if it has no server.
pub(crate) fn hints(
    config: &Config,
    volume: &VolumeConfig,
    hints: &[Hint],
) -> Result<(), VolumeError> {
    match volume.mode {
        Mode::Watch => {
            Watched::open(&options(config, volume), LIMIT)?.hints(hints);
            Ok(())
        }
        Mode::Auto | Mode::Ublk | Mode::Fuse => client(config, volume)?.hints(hints),
    }
}
