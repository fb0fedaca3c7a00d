//! `blktided volume NAME`: the keeper of one volume, and its server.

use crate::complain;
use crate::config;
use anyhow::{Context as _, Result};
use blktide_api::config::{Config, VolumeConfig};
use blktide_api::name::Name;
use blktide_volume::VolumeOptions;
use std::path::PathBuf;
use std::process::ExitCode;

/// The keeper, in the foreground, until the volume is detached.
pub(crate) fn keep(name: &str, option: Option<PathBuf>) -> Result<()> {
    let name = Name::new(name)?;
    let config = config::load(&config::overrides(option)?)?;
    let volume = config
        .volumes
        .get(&name)
        .with_context(|| format!("no volume {name} is configured"))?;
    blktide_volume::keeper::run(&options(&config, volume))?;
    Ok(())
}

/// The server; its arguments are the keeper's business.
pub(crate) fn server(arguments: &[String]) -> ExitCode {
    match blktide_volume::server::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("blktided volume: {:#}", anyhow::Error::new(error)));
            ExitCode::FAILURE
        }
    }
}

/// What the volume's processes are started with.
pub(crate) fn options(config: &Config, volume: &VolumeConfig) -> VolumeOptions {
    VolumeOptions {
        name: volume.name.to_string(),
        device: volume.device.clone(),
        state_dir: config.state_dir.clone(),
        runtime_dir: config.runtime_dir.clone(),
        device_dir: config.device_dir.clone(),
        block_size_bytes: volume.block_size.bytes(),
        grain_bytes: volume.grain.bytes(),
        exclusive: volume.exclusive,
        ..VolumeOptions::new(volume.name.as_str(), &volume.device)
    }
}
