//! What this kernel has of what the modes need.

use blktide_sys::bpf;
use blktide_watch::{BPFFS, Missing};
use serde::Serialize;
use std::path::Path;

/// Number of `CAP_BPF`, of `CAP_SYS_ADMIN`, which stands for it, and of `CAP_PERFMON`.
const CAP_BPF: u32 = 39;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;

/// Facts of the kernel, and of what this process may.
#[derive(Debug, Serialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, and a key of the document"
)]
pub(super) struct Kernel {
    release: String,
    /// It describes its structures.
    btf: bool,
    /// At its usual place.
    bpf_file_system: bool,
    /// `none`, `integrity`, `confidentiality`.
    lockdown: String,
    /// `CAP_BPF` and `CAP_PERFMON`, or root.
    may_load_programs: bool,
    /// It takes the marker's programs: asked by loading them.
    watch: bool,
    watch_why_not: Option<String>,
    fuse: bool,
    r#loop: bool,
    ublk: bool,
    device_mapper: bool,
}

impl Kernel {
    /// Looks. Waits: for the kernel's check of the programs, half a second.
    pub(super) fn look() -> (Self, Result<(), Missing>) {
        let probed = blktide_watch::probe();
        let there = |path: &str| Path::new(path).exists();
        let facts = Self {
            release: text_of("/proc/sys/kernel/osrelease"),
            btf: there("/sys/kernel/btf/vmlinux"),
            bpf_file_system: bpf::is_bpffs(Path::new(BPFFS)).unwrap_or(false),
            lockdown: lockdown_in(&text_of("/sys/kernel/security/lockdown")).to_owned(),
            may_load_programs: may_load(&text_of("/proc/self/status")),
            watch: probed.is_ok(),
            watch_why_not: probed.as_ref().err().map(ToString::to_string),
            fuse: there("/dev/fuse"),
            r#loop: there("/dev/loop-control"),
            ublk: there("/dev/ublk-control"),
            device_mapper: there("/dev/mapper/control"),
        };
        (facts, probed)
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<String> {
        let there = |is: bool| if is { "there" } else { "not there" };
        let watch = match &self.watch_why_not {
            None => "it takes the programs that mark writes (block_bio_queue, block_rq_issue, block_rq_complete), and counts runs that it skips".to_owned(),
            Some(why) => format!("no: {why}"),
        };
        vec![
            format!("kernel {}", self.release),
            format!("  watch {watch}"),
            format!(
                "        BTF {}; BPF file system {}; lockdown {}; this process {} load programs",
                there(self.btf),
                if self.bpf_file_system {
                    "mounted"
                } else {
                    "not mounted (attach mounts it)"
                },
                self.lockdown,
                if self.may_load_programs {
                    "may"
                } else {
                    "may not"
                },
            ),
            format!(
                "  fuse  /dev/fuse {}; loop devices {}",
                there(self.fuse),
                there(self.r#loop)
            ),
            format!(
                "  ublk  {}; device-mapper {}; the mode is not built yet",
                there(self.ublk),
                there(self.device_mapper)
            ),
        ]
    }
}

fn text_of(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}

/// The word in brackets; a kernel that has no such file has no lockdown.
fn lockdown_in(text: &str) -> &str {
    let inner = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or("none", |(word, _)| word)
}

fn may_load(status: &str) -> bool {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .unwrap_or(0);
    let has = |capability: u32| effective >> capability & 1 == 1;
    has(CAP_SYS_ADMIN) || has(CAP_BPF) && has(CAP_PERFMON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        assert_eq!(lockdown_in("none [integrity] confidentiality"), "integrity");
        assert_eq!(lockdown_in("[none] integrity confidentiality"), "none");
        assert_eq!(lockdown_in(""), "none");
        assert!(may_load("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(may_load("CapEff:\t000000c000000000\n"), "BPF and PERFMON");
        assert!(!may_load("CapEff:\t0000008000000000\n"), "BPF alone");
        assert!(!may_load("CapEff:\t0000000000000000\n"));
        assert!(!may_load(""));
    }
}
