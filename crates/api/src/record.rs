//! What this machine remembers of its backups: `state_dir/NAME/backups.json`, one entry a repository.
//!
//! A cache. It lets `status` answer without the repository, names the hints that the tracker keeps apart (P2), and lets a
//! backup see that the newest image it made is gone. Lost or damaged, it costs those three things until the next backup.

use crate::name::Name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "backups.json";

/// All of a volume's records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// By the repository's name or path.
    pub repositories: BTreeMap<String, Record>,
}

/// The newest image of a volume in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The repository's id.
    pub repository_id: String,
    /// The volume's id.
    pub volume_id: String,
    /// The image's number.
    pub number: u64,
    /// Its id.
    pub image_id: String,
    /// Its instant, RFC 3339.
    pub time: String,
    /// The generation that opened at its instant; empty: nothing tracked.
    pub generation: String,
    /// Size of the volume then.
    pub volume_bytes: u64,
    /// Its unit then.
    pub block_size_bytes: u32,
}

impl Records {
    /// Of a file's text; what cannot be read is forgotten.
    pub fn parse(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }

    /// As a file's text.
    pub fn text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// The record of a repository.
    pub fn of(&self, repository: &Name) -> Option<&Record> {
        self.repositories.get(repository.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back_and_damage_is_nothing() {
        let mut records = Records::default();
        records.repositories.insert(
            "main".to_owned(),
            Record {
                repository_id: "0".repeat(32),
                volume_id: "1".repeat(32),
                number: 4,
                image_id: "2".repeat(32),
                time: "2026-11-17T01:10:30Z".to_owned(),
                generation: "3".repeat(32),
                volume_bytes: 1 << 30,
                block_size_bytes: 65536,
            },
        );
        let text = records.text();
        assert_eq!(Records::parse(&text), records);
        for cut in 0..text.len() {
            assert_eq!(Records::parse(text.get(..cut).unwrap()), Records::default());
        }
    }
}
