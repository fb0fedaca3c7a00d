//! Reads the configuration's files; the parsing is the api's.

use anyhow::{Context as _, Result};
use blktide_api::config::{Config, Overrides, ReadFiles};
use std::io;
use std::path::{Path, PathBuf};

struct Disk;

impl ReadFiles for Disk {
    fn read(&self, path: &Path) -> io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(folder)?
            .map(|entry| entry.map(|e| e.path()))
            .collect()
    }
}

/// What command line and environment say.
pub(crate) fn overrides(option: Option<PathBuf>) -> Result<Overrides> {
    let option = option
        .map(std::path::absolute)
        .transpose()
        .context("the path of the configuration")?;
    Ok(Overrides::new(option, |name| {
        std::env::var_os(name).map(PathBuf::from)
    }))
}

/// Everything that is configured.
pub(crate) fn load(overrides: &Overrides) -> Result<Config> {
    Ok(Config::load(overrides, &Disk)?)
}
