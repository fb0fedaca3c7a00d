//! Names of objects.
//!
//! ```text
//!   repository
//!   volumes/VID/SEQ/{open, manifest, end, forgotten}
//!   volumes/VID/packs/XX/PACK                          XX: first ⊕ last byte of the id, so that a session's packs spread
//! ```

use blktide_types::id::{ObjectId, VolumeId};

/// Folder of all volumes.
pub(crate) const VOLUMES: &str = "volumes";

/// Folder of a volume.
pub(crate) fn volume(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}")
}

/// Object `what` of a claim.
pub(crate) fn of_claim(volume: VolumeId, sequence: u64, what: &str) -> String {
    format!("{VOLUMES}/{volume}/{sequence}/{what}")
}

/// Folder of a volume's packs.
pub(crate) fn packs(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/packs")
}

/// A pack.
pub fn pack(volume: VolumeId, pack: ObjectId) -> String {
    let (first, last) = (pack.0[0], pack.0[15]);
    format!("{VOLUMES}/{volume}/packs/{:02x}/{pack}", first ^ last)
}

/// The number that a folder's name means; only in the one spelling that is written.
pub(crate) fn sequence(name: &str) -> Option<u64> {
    let is_spelled_so = !name.starts_with('0') && name.bytes().all(|b| b.is_ascii_digit());
    name.parse().ok().filter(|_| is_spelled_so)
}
