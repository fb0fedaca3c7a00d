//! A volume's tracker, whichever mode it is in: a server that is asked, or what the kernel has. No daemon is needed for it.

use blktide_api::config::{Config, Mode, VolumeConfig};
use blktide_types::id::GenerationName;
use blktide_volume::message::VolumeStatus;
use blktide_volume::{VolumeClient, VolumeError, VolumeOptions};
use blktide_watch::{Detached, InUse, Watched};
use std::io;
use std::time::Duration;

/// Longest wait for a volume's answer, or for its control side, when it is to be detached; a detach itself takes what it takes.
const LIMIT: Duration = Duration::from_secs(10);

/// What the volume's tracker is opened with.
pub(crate) fn options(config: &Config, volume: &VolumeConfig) -> VolumeOptions {
    VolumeOptions {
        state_dir: config.state_dir.clone(),
        runtime_dir: config.runtime_dir.clone(),
        device_dir: config.device_dir.clone(),
        block_size_bytes: volume.block_size.bytes(),
        grain_bytes: volume.grain.bytes(),
        exclusive: volume.exclusive,
        ..VolumeOptions::new(volume.name.as_str(), &volume.device)
    }
}

/// Facts, and for each generation what changed since it opened. Waits: `limit` for a server; for what is watched, a pass
/// over its bitmaps, and nobody.
pub(crate) fn look(
    config: &Config,
    volume: &VolumeConfig,
    generations: &[GenerationName],
    limit: Duration,
) -> Result<(VolumeStatus, Vec<Option<u64>>), VolumeError> {
    match volume.mode {
        Mode::Watch => {
            only_root(volume)?;
            let watched = Watched::look(&options(config, volume))?;
            Ok((watched.status(), watched.changed_since(generations).0))
        }
        Mode::Auto | Mode::Ublk | Mode::Fuse => {
            let name = volume.name.as_str();
            let mut server = VolumeClient::connect(&config.runtime_dir, name, limit)?;
            let status = server.status()?;
            Ok((status, server.changed_since(generations)?.0))
        }
    }
}

/// The kernel's pins are root's: for others everything would look as if it were detached.
fn only_root(volume: &VolumeConfig) -> Result<(), VolumeError> {
    if blktide_sys::process::own_uid() == 0 {
        return Ok(());
    }
    Err(VolumeError::Io {
        what: "look at what the kernel has of it",
        path: volume.device.clone(),
        source: io::ErrorKind::PermissionDenied.into(),
    })
}

/// Detaches. `in_use`: what becomes of a watched volume that is in use; one that has a server is refused then.
pub(crate) fn detach(
    config: &Config,
    volume: &VolumeConfig,
    in_use: InUse,
) -> Result<Detached, VolumeError> {
    match volume.mode {
        Mode::Watch => {
            only_root(volume)?;
            blktide_watch::detach(&options(config, volume), in_use, LIMIT)
        }
        Mode::Auto | Mode::Ublk | Mode::Fuse => {
            let name = volume.name.as_str();
            VolumeClient::connect(&config.runtime_dir, name, LIMIT)?.detach()?;
            Ok(Detached::Stored)
        }
    }
}
