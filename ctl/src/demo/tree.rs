//! A real tree of files, copied into the volume, with the digest of each.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Where files are taken from, in this order, until there are enough.
const SOURCES: &[&str] = &[
    "/usr/share",
    "/usr/lib",
    "/usr/bin",
    "/usr/sbin",
    "/opt",
    "/usr/local",
];
/// Enough.
const WANTED_BYTES: u64 = 560 << 20;
/// Too little for a demo.
const LEAST_BYTES: u64 = 500 << 20;
/// A larger file is left out, so that many are taken.
const FILE_BYTES_MAX: u64 = 48 << 20;

/// The files that are in the volume, and the digest of each.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    files: BTreeMap<PathBuf, (u64, blake3::Hash)>,
    /// Bytes of all.
    pub(super) bytes: u64,
}

impl Tree {
    /// Copies regular files of this machine below `into`.
    pub(super) fn copy(into: &Path) -> Result<Self> {
        let mut tree = Self::default();
        for source in SOURCES {
            tree.copy_below(Path::new(source), into)?;
        }
        ensure!(
            tree.bytes >= LEAST_BYTES,
            "this machine has only {} of files to copy",
            super::size(tree.bytes)
        );
        Ok(tree)
    }

    fn copy_below(&mut self, folder: &Path, into: &Path) -> Result<()> {
        // What cannot be read is not copied: it is a demo's material, nothing more.
        let mut entries: Vec<_> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if self.bytes >= WANTED_BYTES {
                break;
            }
            let path = entry.path();
            let Ok(facts) = fs::symlink_metadata(&path) else {
                continue;
            };
            if facts.is_dir() {
                self.copy_below(&path, into)?;
            } else if facts.is_file() && facts.len() <= FILE_BYTES_MAX {
                let name = path.strip_prefix("/").unwrap_or(&path).to_owned();
                if let Ok(bytes) = fs::read(&path) {
                    self.put(into, name, &bytes)?;
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, into: &Path, name: PathBuf, bytes: &[u8]) -> Result<()> {
        let target = into.join(&name);
        fs::create_dir_all(target.parent().context("a file lies in a folder")?)?;
        File::create(&target)
            .and_then(|mut file| file.write_all(bytes))
            .with_context(|| target.display().to_string())?;
        let length = bytes.len() as u64;
        self.files.insert(name, (length, blake3::hash(bytes)));
        self.bytes += length;
        Ok(())
    }

    /// Number of files.
    pub(super) fn count(&self) -> usize {
        self.files.len()
    }

    /// Writes to about `blocks` places, each in another block of 64 KiB: files overwritten in part, some new, some removed.
    pub(super) fn change(&mut self, at: &Path, blocks: u64) -> Result<Changed> {
        let mut done = Changed::default();
        let names: Vec<PathBuf> = self.files.keys().cloned().collect();
        let step = (names.len() / 300).max(1);
        for (number, name) in names.iter().step_by(step).enumerate() {
            if number % 10 == 9 {
                fs::remove_file(at.join(name))?;
                let length = self.files.remove(name).map_or(0, |(length, _)| length);
                self.bytes = self.bytes.saturating_sub(length);
                done.removed += 1;
                continue;
            }
            if done.places >= blocks {
                break;
            }
            let mut bytes = fs::read(at.join(name))?;
            for page in bytes.chunks_mut(65536) {
                for byte in page.iter_mut().take(200) {
                    *byte = byte.wrapping_add(1);
                }
                done.places += 1;
            }
            self.put(at, name.clone(), &bytes)?;
            done.overwritten += 1;
        }
        for number in 0..20_u8 {
            let name = PathBuf::from(format!("new/file-{number}"));
            self.put(at, name, &vec![number; 20_000])?;
            done.made += 1;
        }
        Ok(done)
    }

    /// Fails unless exactly these files, with these contents, are below `at`.
    pub(super) fn compare(&self, at: &Path) -> Result<()> {
        for (name, (length, digest)) in &self.files {
            let mut bytes = Vec::new();
            File::open(at.join(name))
                .and_then(|mut file| file.read_to_end(&mut bytes))
                .with_context(|| format!("{} in the image", name.display()))?;
            ensure!(
                bytes.len() as u64 == *length && blake3::hash(&bytes) == *digest,
                "{} in the image has another digest than what was written",
                name.display()
            );
        }
        let there = count_files(at)?;
        ensure!(
            there == self.files.len(),
            "the image has {there} files, {} were there",
            self.files.len()
        );
        Ok(())
    }
}

/// What [`Tree::change`] did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Changed {
    /// Files overwritten.
    pub(super) overwritten: u64,
    /// Files made.
    pub(super) made: u64,
    /// Files removed.
    pub(super) removed: u64,
    /// Places written to, each in a block of its own.
    pub(super) places: u64,
}

fn count_files(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count += count_files(&entry.path())?;
        } else {
            count += 1;
        }
    }
    Ok(count)
}
