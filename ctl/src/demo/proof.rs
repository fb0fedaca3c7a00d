//! That an image equals the volume at its instant: byte for byte, by the file system's own check, by file digests.
//!
//! The truth of an instant is kept in two parts. Before the backup the file system is synced and then left alone,
//! but for the recorder's direct writes into blocks that it has already; a plain copy of the backing file is taken.
//! So at the instant each unit of the volume is as in that copy, or holds a write of the record. What the kernel has written
//! of its own meanwhile (the backup syncs the file system just before its instant: a commit, an inode's times) is looked
//! for right after the backup: such a unit is one of its two states, before or after, and it is counted.
//!
//! An instant inside a freeze has one unit that is neither: the superblock, which says then, and only then, that no journal is
//! to be replayed.

use anyhow::{Context, Result, ensure};
use blktide_sys::fs::{open_direct_read, read_aligned, size_of, write_full};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Mode;
use super::command::tool;
use super::recorder::{Record, UNIT};
use super::superblock::stands_still;
use super::tree::Tree;

const PIECE: usize = 1 << 20;
/// More units than this cannot be the kernel's own.
const OWN_WRITES_MAX: u64 = 64;

/// What was true before a backup, and what was different right after it.
#[derive(Debug)]
pub(super) struct Truth {
    mode: Mode,
    copy: PathBuf,
    backing: PathBuf,
    tree: Tree,
    /// By their first byte.
    after: BTreeMap<u64, Vec<u8>>,
}

/// What the proof found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Proven {
    /// The image is the state after this many writes of the recorder.
    pub(super) prefix: u64,
    /// Units that held a write of the record.
    pub(super) recorded: u64,
    /// Units that the kernel wrote meanwhile.
    pub(super) own: u64,
    /// Units that only a freeze has so: 1, the superblock, or 0.
    pub(super) frozen: u64,
    /// Files whose digests were compared.
    pub(super) files: usize,
}

impl Truth {
    /// Copies the backing file, past the page cache, to a sparse file.
    pub(super) fn keep(mode: Mode, backing: &Path, copy: &Path, tree: &Tree) -> Result<Self> {
        let from = open_direct_read(backing)?;
        let bytes = size_of(&from)?;
        let to = File::create_new(copy)?;
        to.set_len(bytes)?;
        for at in (0..bytes).step_by(PIECE) {
            let piece = read_aligned(&from, at, PIECE)?;
            if piece.iter().any(|b| *b != 0) {
                write_full(&to, at, &piece)?;
            }
        }
        to.set_len(bytes)?;
        Ok(Self {
            mode,
            copy: copy.to_owned(),
            backing: backing.to_owned(),
            tree: tree.clone(),
            after: BTreeMap::new(),
        })
    }

    /// Looks right after the backup which units are not as in the copy any more.
    pub(super) fn look_again(&mut self) -> Result<()> {
        let (then, now) = (File::open(&self.copy)?, open_direct_read(&self.backing)?);
        let bytes = then.metadata()?.len();
        let mut old = vec![0; PIECE];
        for at in (0..bytes).step_by(PIECE) {
            let length = usize::try_from((bytes - at).min(PIECE as u64))?;
            let old = old.get_mut(..length).context("a piece")?;
            then.read_exact_at(old, at)?;
            let new = read_aligned(&now, at, length)?;
            let units = old.chunks(UNIT).zip(new.chunks(UNIT));
            let units = units.zip((at..).step_by(UNIT));
            let differ = units.filter(|((was, is), _)| was != is);
            self.after
                .extend(differ.map(|((_, is), unit)| (unit, is.to_vec())));
        }
        Ok(())
    }

    /// Bytes of the copy that are not holes.
    pub(super) fn kept_bytes(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(fs::metadata(&self.copy)?.blocks() * 512)
    }

    /// Proves a restored image. It is written to where the journal is to be replayed, so it is used up.
    pub(super) fn prove(&self, restored: &Path, dir: &Path, record: &Record) -> Result<Proven> {
        let mut proven = self.compare_bytes(restored, record)?;
        if self.mode == Mode::Fuse {
            // As after a power cut: first the journal, then nothing may be left to mend.
            tool("e2fsck", &["-p".as_ref(), restored.as_os_str()], &[0, 1])?;
        }
        tool(
            "e2fsck",
            &["-f".as_ref(), "-n".as_ref(), restored.as_os_str()],
            &[0],
        )?;
        fs::create_dir_all(dir)?;
        let options = [
            "-o".as_ref(),
            "loop,ro".as_ref(),
            restored.as_os_str(),
            dir.as_os_str(),
        ];
        tool("mount", &options, &[0])?;
        proven.prefix = record.prefix_of(&dir.join("recorder"))?;
        self.tree.compare(&dir.join("tree"))?;
        proven.files = self.tree.count();
        tool("umount", &[dir], &[0])?;
        Ok(proven)
    }

    fn compare_bytes(&self, restored: &Path, record: &Record) -> Result<Proven> {
        let (truth, image) = (File::open(&self.copy)?, File::open(restored)?);
        let bytes = truth.metadata()?.len();
        let length = image.metadata()?.len();
        ensure!(
            length == bytes,
            "the image has {length} bytes, the volume {bytes}"
        );
        let mut proven = Proven::default();
        let mut pieces = [vec![0; PIECE], vec![0; PIECE]];
        for at in (0..bytes).step_by(PIECE) {
            let [old, new] = &mut pieces;
            let length = usize::try_from((bytes - at).min(PIECE as u64))?;
            let old = old.get_mut(..length).context("a piece")?;
            let new = new.get_mut(..length).context("a piece")?;
            truth.read_exact_at(old, at)?;
            image.read_exact_at(new, at)?;
            if old == new {
                continue;
            }
            for ((was, is), unit) in old
                .chunks(UNIT)
                .zip(new.chunks(UNIT))
                .zip((at..).step_by(UNIT))
            {
                if was == is {
                    continue;
                }
                let after = self.after.get(&unit).map_or(was, Vec::as_slice);
                if record.number_in(is).is_some() {
                    proven.recorded += 1;
                } else if unit == 0 && self.mode == Mode::Watch && stands_still(is, after) {
                    proven.frozen += 1;
                } else {
                    ensure!(
                        after == is,
                        "byte {unit} of the image is neither what was there nor what was written"
                    );
                    proven.own += 1;
                }
            }
        }
        ensure!(
            proven.own <= OWN_WRITES_MAX,
            "{} units differ from the truth",
            proven.own
        );
        ensure!(
            self.mode == Mode::Fuse || proven.frozen == 1,
            "the image is not of a moment in which the file system was frozen"
        );
        Ok(proven)
    }
}
