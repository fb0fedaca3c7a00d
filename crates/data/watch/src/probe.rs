//! Whether this kernel takes the programs of the marker, and if not, what it lacks: asked by loading them.
//!
//! ```text
//! probe: BTF? ─▶ programs loaded over small maps ─▶ skipped runs counted? ─▶ BPF file system? ─▶ all of it let go of
//! ```
//! **Invariant**: nothing is attached, pinned or mounted by it; it marks nothing and leaves nothing.

use blktide_sys::{Errno, bpf};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::marker;
use crate::pins::BPFFS;

/// The oldest kernel whose structures have all fields that the marker reads (`request_queue.disk`).
const OLDEST: (u32, u32) = (5, 15);
/// Lines of the kernel's own words that are told.
const LINES_MAX: usize = 3;

/// What mode watch needs and this machine does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// The kernel does not describe its structures.
    #[error(
        "the kernel does not describe its structures: there is no /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)"
    )]
    NoBtf,
    /// Programs cannot be kept.
    #[error("the kernel has no BPF file system, where programs are kept (/sys/fs/bpf)")]
    NoBpfFileSystem,
    /// Nobody may look into the kernel.
    #[error(
        "the kernel is locked down (lockdown=confidentiality): not even root may load a program that looks into it"
    )]
    Lockdown,
    /// Only root may.
    #[error(
        "this process may not load programs into the kernel: root is needed, or CAP_BPF and CAP_PERFMON"
    )]
    NotPermitted,
    /// It was made before the fields that the programs read.
    #[error("kernel {release} is too old: mode watch needs Linux 5.15 or newer")]
    TooOld {
        /// Its release, as it says itself.
        release: String,
    },
    /// Anything else.
    #[error("the kernel does not take the programs: {words}")]
    Refused {
        /// The kernel's last words.
        words: String,
    },
}

/// Loads the marker's programs over small maps and lets go of them again.
///
/// Waits: for the kernel's check of the programs, some tens of milliseconds.
/// Errors: what is missing.
pub fn probe() -> Result<(), Missing> {
    if std::fs::metadata("/sys/kernel/btf/vmlinux").is_err() {
        return Err(Missing::NoBtf);
    }
    let tried = marker::try_load(&counts_skipped_runs).map_err(|e| Failed::of(&e));
    let facts = Facts {
        release: text_of("/proc/sys/kernel/osrelease"),
        lockdown: text_of("/sys/kernel/security/lockdown"),
        has_bpf_file_system: bpf::is_bpffs(Path::new(BPFFS)).unwrap_or(false)
            || text_of("/proc/filesystems").contains("\tbpf"),
    };
    match tried {
        Err(failed) => Err(failed.explained(&facts)),
        Ok(false) => Err(facts.too_old()),
        Ok(true) if !facts.has_bpf_file_system => Err(Missing::NoBpfFileSystem),
        Ok(true) => Ok(()),
    }
}

/// Whether the kernel says how often it skipped a program's run; without that nothing could be believed.
fn counts_skipped_runs(program: BorrowedFd<'_>) -> bool {
    bpf::facts_of(program).is_ok_and(|facts| facts.number("recursion_misses").is_some())
}

fn text_of(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}

/// What is known of the kernel without loading anything.
struct Facts {
    release: String,
    /// `none [integrity] confidentiality`; empty: there is no lockdown.
    lockdown: String,
    has_bpf_file_system: bool,
}

impl Facts {
    fn too_old(&self) -> Missing {
        Missing::TooOld {
            release: self.release.clone(),
        }
    }

    fn is_old(&self) -> bool {
        let mut parts = self.release.split(|c: char| !c.is_ascii_digit());
        let mut number = || parts.next()?.parse::<u32>().ok();
        number()
            .zip(number())
            .is_some_and(|version| version < OLDEST)
    }
}

/// How loading failed.
struct Failed {
    number: Option<Errno>,
    words: String,
}

impl Failed {
    fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut number = None;
        let mut below = Some(error);
        while let Some(cause) = below {
            number = cause
                .downcast_ref::<io::Error>()
                .filter(|e| e.raw_os_error().is_some())
                .map(Errno::of)
                .or(number);
            below = cause.source();
        }
        Self {
            number,
            words: last_lines(&marker::chain(error)),
        }
    }

    fn explained(self, facts: &Facts) -> Missing {
        if self.number == Some(Errno::PERM) && facts.lockdown.contains("[confidentiality]") {
            return Missing::Lockdown;
        }
        // (What the kernel's check of a program finds is EACCES or EINVAL.)
        if self.number == Some(Errno::PERM) {
            return Missing::NotPermitted;
        }
        if facts.is_old() {
            return facts.too_old();
        }
        Missing::Refused { words: self.words }
    }
}

/// The end of what the kernel's check says is what it stumbled over.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let first = lines.len().saturating_sub(LINES_MAX);
    let last: Vec<&str> = lines.iter().skip(first).map(|l| l.trim()).collect();
    last.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(number: Option<Errno>, release: &str, lockdown: &str) -> Missing {
        let facts = Facts {
            release: release.to_owned(),
            lockdown: lockdown.to_owned(),
            has_bpf_file_system: true,
        };
        let words = "no such field".to_owned();
        Failed { number, words }.explained(&facts)
    }

    #[test]
    fn each_refusal_has_its_words() {
        let old = Missing::TooOld {
            release: "5.10.0-28-amd64".to_owned(),
        };
        let refused = Missing::Refused {
            words: "no such field".to_owned(),
        };
        let locked = "none integrity [confidentiality]";
        let half = "none [integrity] confidentiality";
        for (number, release, lockdown, wanted) in [
            (Some(Errno::PERM), "6.1.0", locked, Missing::Lockdown),
            (Some(Errno::PERM), "6.1.0", half, Missing::NotPermitted),
            (Some(Errno::PERM), "6.1.0", "", Missing::NotPermitted),
            (Some(Errno::INVAL), "5.10.0-28-amd64", "", old.clone()),
            (None, "5.10.0-28-amd64", "", old),
            (Some(Errno::INVAL), "5.15.1", "", refused.clone()),
            (Some(Errno::ACCES), "6.12.9-amd64", "", refused.clone()),
            (None, "of a kind of its own", locked, refused),
        ] {
            assert_eq!(explained(number, release, lockdown), wanted, "{release}");
        }
    }

    #[test]
    fn the_kernels_last_words_are_one_line() {
        assert_eq!(last_lines("a\nb\n\n c\nd\n"), "b; c; d");
        assert_eq!(last_lines(""), "");
    }

    #[test]
    fn the_number_below_the_words_is_found() {
        let error = crate::pins::failed("load", Path::new("/x"), Errno::PERM.error());
        assert_eq!(Failed::of(&error).number, Some(Errno::PERM));
        assert_eq!(Failed::of(&io::Error::other("words")).number, None);
    }
}
