//! The records of a volume's backups, on disk, and the hints made of them.

use blktide_api::config::Config;
use blktide_api::name::Name;
use blktide_api::record::{FILE_NAME, Record, Records};
use blktide_sys::fs;
use blktide_volume::message::{Hint, Text};
use std::path::PathBuf;

use crate::tracked;

fn path(config: &Config, volume: &Name) -> PathBuf {
    config.volume_state_dir(volume).join(FILE_NAME)
}

/// What is remembered; nothing if there is nothing, or nothing that can be read.
pub(crate) fn read(config: &Config, volume: &Name) -> Records {
    std::fs::read_to_string(path(config, volume))
        .map(|text| Records::parse(&text))
        .unwrap_or_default()
}

/// Remembers the newest image in a repository. A record that cannot be written costs what its module says; the image
/// exists all the same.
pub(crate) fn remember(config: &Config, volume: &Name, repository: &str, record: Record) {
    let mut records = read(config, volume);
    records.repositories.insert(repository.to_owned(), record);
    let path = path(config, volume);
    let written = fs::create_folders(&config.volume_state_dir(volume), 0o700)
        .and_then(|()| fs::remove_durably(&path))
        .and_then(|_| fs::create_if_absent(&path, records.text().as_bytes(), 0o644));
    if let Err(error) = written {
        tracing::warn!(%volume, %error, "the record of the backup could not be written");
    }
}

/// Tells the volume which boundaries to keep apart (P2): each repository's newest image's.
pub(crate) fn send_hints(config: &Config, volume: &Name) {
    let records = read(config, volume);
    let hints: Vec<Hint> = records
        .repositories
        .values()
        .filter_map(|record| {
            Some(Hint {
                repository: Text(record.repository_id.parse().ok()?),
                generation: Text(record.generation.parse().ok()?),
            })
        })
        .take(8)
        .collect();
    let Some(known) = config.volumes.get(volume) else {
        return;
    };
    if let Err(error) = tracked::hints(config, known, &hints) {
        tracing::warn!(%volume, %error, "the volume did not take the hints; a later backup may read more");
    }
}
