//! Where the kernel keeps what marks: pins in the BPF file system, one folder a volume.
//!
//! ```text
//! /sys/fs/bpf/blktide/NAME/         _NAME while it is being made
//!    bio_queue rq_issue rq_done          programs
//!    link_…                              what has them run
//!    marks control banks counters        maps
//! ```
//! **Invariant**: a folder that bears the volume's name is whole; what a process that died has left half made bears
//! another one, which no volume can have.

use blktide_sys::bpf;
use blktide_volume::VolumeError;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where systemd, and everybody else, mounts the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Longest name of a folder.
const NAME_BYTES_MAX: usize = 255;

/// The programs, with the tracepoints that run them.
pub(crate) const PROGRAMS: [(&str, &str); 3] = [
    ("bio_queue", "block_bio_queue"),
    ("rq_issue", "block_rq_issue"),
    ("rq_done", "block_rq_complete"),
];

/// The maps.
pub(crate) const MAPS: [&str; 4] = ["marks", "control", "banks", "counters"];

/// The pins of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    folder: PathBuf,
    unfinished: PathBuf,
}

impl Pins {
    /// Those of volume `name` of the instance that has this runtime folder.
    ///
    /// Errors: `Layout`: the folder's name is too long to tell instances apart by it.
    pub fn of(runtime_dir: &Path, name: &str) -> Result<Self, VolumeError> {
        let instance = instance_of(runtime_dir);
        if instance.len() > NAME_BYTES_MAX {
            return Err(VolumeError::Layout {
                why: format!("runtime_dir {} is too long", runtime_dir.display()),
            });
        }
        let folder = Path::new(BPFFS).join(instance);
        Ok(Self {
            unfinished: folder.join(format!("_{name}")),
            folder: folder.join(name),
        })
    }

    /// The volume's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the volume is tracked, or was until its pins were lost.
    pub fn exist(&self) -> bool {
        self.folder.is_dir()
    }

    /// Opens a pinned map, program or link (`link_…`).
    pub(crate) fn open(&self, what: &str) -> Result<OwnedFd, VolumeError> {
        let path = self.folder.join(what);
        bpf::open_pinned(&path).map_err(|e| failed("open", &path, io::Error::other(e)))
    }

    /// Opens a folder for new pins; what was left half made goes.
    pub(crate) fn begin(&self) -> Result<Unfinished, VolumeError> {
        let at = Path::new(BPFFS);
        let is = bpf::is_bpffs(at).map_err(|e| failed("look at", at, io::Error::other(e)))?;
        if !is {
            bpf::mount_bpffs(at).map_err(|e| failed("mount", at, io::Error::other(e)))?;
        }
        clear(&self.unfinished)?;
        let fail = |e| failed("make", &self.unfinished, e);
        std::fs::create_dir_all(&self.unfinished).map_err(fail)?;
        Ok(Unfinished {
            pins: self.clone(),
            done: false,
        })
    }

    /// Removes all pins: nothing marks any more once it has returned. What is not there is removed.
    pub(crate) fn remove(&self) -> Result<(), VolumeError> {
        clear(&self.folder)?;
        clear(&self.unfinished)?;
        if let Some(instance) = self.folder.parent() {
            // Other volumes may be there.
            drop(std::fs::remove_dir(instance));
        }
        Ok(())
    }
}

/// Pins in the making; dropped unfinished they go.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pins: Pins,
    done: bool,
}

impl Unfinished {
    pub(crate) fn path(&self, what: &str) -> PathBuf {
        self.pins.unfinished.join(what)
    }

    /// The pins as they are now, under the name that they do not bear yet.
    pub(crate) fn as_pins(&self) -> Pins {
        Pins {
            folder: self.pins.unfinished.clone(),
            unfinished: self.pins.unfinished.clone(),
        }
    }

    /// Gives the folder the volume's name: from now on the volume is attached.
    #[expect(
        clippy::disallowed_methods,
        reason = "the BPF file system is memory: there is nothing to sync"
    )]
    pub(crate) fn publish(mut self) -> Result<(), VolumeError> {
        let (from, to) = (&self.pins.unfinished, &self.pins.folder);
        std::fs::rename(from, to).map_err(|e| failed("name", to, e))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.done {
            // The next attach tries again.
            drop(clear(&self.pins.unfinished));
        }
    }
}

fn instance_of(runtime_dir: &Path) -> String {
    if runtime_dir == Path::new("/run/blktide") {
        return "blktide".to_owned();
    }
    let text = runtime_dir.to_string_lossy();
    // The BPF file system takes no dots.
    let word = text.chars().map(|c| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' => c,
        _ => '_',
    });
    format!("blktide{}", word.collect::<String>())
}

/// Removes a folder of pins, links first: a program without a link does not run.
fn clear(folder: &Path) -> Result<(), VolumeError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("read", folder, e)),
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_by_key(|path| {
        let name = path.file_name().map(std::ffi::OsStr::to_string_lossy);
        !name.is_some_and(|n| n.starts_with("link_"))
    });
    for path in paths {
        std::fs::remove_file(&path).map_err(|e| failed("remove", &path, e))?;
    }
    std::fs::remove_dir(folder).map_err(|e| failed("remove", folder, e))
}

pub(crate) fn failed(what: &'static str, path: &Path, source: io::Error) -> VolumeError {
    VolumeError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_and_volumes_have_folders_of_their_own() {
        let of = |dir: &str| Pins::of(Path::new(dir), "data").unwrap();
        assert_eq!(
            of("/run/blktide").folder,
            Path::new("/sys/fs/bpf/blktide/data")
        );
        let other = of("/var/tmp/b-1.d/run");
        assert_eq!(
            other.folder,
            Path::new("/sys/fs/bpf/blktide_var_tmp_b-1_d_run/data")
        );
        Pins::of(Path::new(&"/a".repeat(200)), "data").unwrap_err();
    }
}
