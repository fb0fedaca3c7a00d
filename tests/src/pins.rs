//! What an instance keeps in the kernel: pins of watched volumes, which outlive every process.

use std::fs;
use std::path::{Path, PathBuf};

const BPFFS: &str = "/sys/fs/bpf";

/// The folders of the instances whose folder's name contains `part`.
pub fn folders_of(part: &str) -> Vec<PathBuf> {
    // As blktide names them: the path of the runtime folder, with what the BPF file system does not take replaced.
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || c == '-' {
            c
        } else {
            '_'
        }
    };
    let part: String = part.chars().map(plain).collect();
    let entries = fs::read_dir(BPFFS).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("blktide") && name.contains(&part)
        })
        .map(|entry| entry.path())
        .collect()
}

/// Removes the pins of the instance in `root`: nothing marks for it any more.
pub(crate) fn remove_of(root: &Path) {
    for instance in folders_of(&root.display().to_string()) {
        for volume in fs::read_dir(&instance).into_iter().flatten().flatten() {
            for pin in fs::read_dir(volume.path()).into_iter().flatten().flatten() {
                drop(fs::remove_file(pin.path()));
            }
            drop(fs::remove_dir(volume.path()));
        }
        drop(fs::remove_dir(instance));
    }
}
