//! BPF objects that somebody else has loaded: opened where they are pinned, and what the kernel says of them.
//!
//! ```text
//!   /sys/fs/bpf/…/marks ── open_pinned ──▶ descriptor ─┬─ facts_of: /proc/self/fdinfo
//!                                                      └─ Mapping::of_bpf_array
//! ```
//! Invariant: nothing here loads, attaches or changes anything.

use crate::Result;
use crate::error::{SysError, check, retry};
use nix::mount::{MsFlags, mount};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens the map, program or link that is pinned at `path` (`BPF_OBJ_GET`), for reading and writing: a map that was opened
/// for reading only cannot be mapped at all.
///
/// `ENOENT`: nothing is pinned there. `EACCES`: what is there is no pin.
pub fn open_pinned(path: &Path) -> Result<OwnedFd> {
    let fail = |e| SysError::call("BPF_OBJ_GET", path, e);
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| fail(e.into()))?;
    let attributes = ObjectGet {
        path: u64::try_from(name.as_ptr().addr()).map_err(|e| fail(io::Error::other(e)))?,
        fd: 0,
        flags: 0,
    };
    let size = size_of::<ObjectGet>();
    let opened = retry(|| {
        // SAFETY: reads `size` bytes of `attributes` and the string in it, which both live for the length of the call.
        check(unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size) })
    });
    let raw = opened.and_then(|n| i32::try_from(n).map_err(io::Error::other));
    let raw = raw.map_err(fail)?;
    // SAFETY: the kernel has just made this descriptor (close-on-exec, as all of BPF), and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The part of `union bpf_attr` that `BPF_OBJ_GET` reads.
#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
}

const BPF_OBJ_GET: libc::c_int = 7;

/// What the kernel says of an open BPF object. All of the names below are there since Linux 5.12.
///
/// | of a | names |
/// |---|---|
/// | map | `map_type`, `key_size`, `value_size`, `max_entries`, `map_flags`, `memlock`, `map_id`, `frozen` |
/// | program | `prog_type`, `prog_jited`, `prog_tag`, `memlock`, `prog_id`, `run_cnt`, `recursion_misses` (the youngest: 5.12) |
/// | link | `link_type`, `link_id`, `prog_tag`, `prog_id`; of a raw tracepoint `tp_name` |
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts(BTreeMap<String, String>);

impl Facts {
    /// A number (decimal, or hexadecimal with `0x`). `None` if this kernel, or this object, has none of that name.
    pub fn number(&self, name: &str) -> Option<u64> {
        let text = self.text(name)?;
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }

    /// As the kernel writes it: a tag, a kind, the name of a tracepoint.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|l| l.split_once(':'));
        Self(
            lines
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
        )
    }
}

/// Reads what the kernel says of `fd` in `/proc/self/fdinfo`.
pub fn facts_of(fd: BorrowedFd<'_>) -> Result<Facts> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|e| SysError::call("read", path, e))?;
    Ok(Facts::parse(&text))
}

const BPF_MAP_TYPE_ARRAY: u64 = 2;
const BPF_F_MMAPABLE: u64 = 1 << 10;

/// Bytes of the array `fd` that can be mapped (before rounding up to pages); refused if it is not one that can be mapped.
pub fn array_bytes(fd: &impl AsFd) -> Result<u64> {
    array_bytes_in(&facts_of(fd.as_fd())?)
}

fn array_bytes_in(facts: &Facts) -> Result<u64> {
    let refuse = |why| SysError::unfit("BPF map", why);
    let number = |name| facts.number(name);
    if number("map_type") != Some(BPF_MAP_TYPE_ARRAY) {
        return Err(refuse("it is not an array"));
    }
    if number("map_flags").is_none_or(|flags| flags & BPF_F_MMAPABLE == 0) {
        return Err(refuse("it was not made to be mapped"));
    }
    // The kernel gives each value a multiple of eight bytes.
    let one = number("value_size").and_then(|n| n.checked_next_multiple_of(8));
    let all = one
        .zip(number("max_entries"))
        .and_then(|(one, n)| one.checked_mul(n));
    all.ok_or_else(|| refuse("its size is not known"))
}

/// Whether `path` lies in a BPF file system.
pub fn is_bpffs(path: &Path) -> Result<bool> {
    use nix::sys::statfs::{FsType, statfs};
    let found = statfs(path).map_err(|e| SysError::call("statfs", path, e.into()))?;
    Ok(found.filesystem_type() == FsType(BPF_FS_MAGIC))
}

const BPF_FS_MAGIC: libc::__fsword_t = 0xcafe_4a11;

/// Mounts a BPF file system at the folder `at` (`/sys/fs/bpf`), for root only. What lies there already is hidden by it: ask
/// [`is_bpffs`] before.
pub fn mount_bpffs(at: &Path) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), at, Some("bpf"), flags, Some("mode=700"))
        .map_err(|e| SysError::call("mount", at, e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t2061\nmap_type:\t2\nkey_size:\t4\n\
        value_size:\t12\nmax_entries:\t1000\nmap_flags:\t0x400\nmap_extra:\t0x0\nmemlock:\t16384\nmap_id:\t77\nfrozen:\t0\n";
    const LINK: &str = "link_type:\traw_tracepoint\nlink_id:\t5\nprog_tag:\t1234567812345678\n\
        prog_id:\t9\ntp_name:\tblock_bio_queue\n";

    #[test]
    fn what_the_kernel_writes_is_read() {
        let map = Facts::parse(MAP);
        assert_eq!(map.number("map_flags"), Some(0x400));
        assert_eq!(map.number("map_id"), Some(77));
        assert_eq!(map.number("recursion_misses"), None);
        let link = Facts::parse(LINK);
        assert_eq!(
            (link.number("link_id"), link.number("prog_id")),
            (Some(5), Some(9))
        );
        assert_eq!(link.number("link_type"), None);
        assert_eq!(link.text("tp_name"), Some("block_bio_queue"));
    }

    #[test]
    fn only_an_array_that_can_be_mapped_has_bytes() {
        assert_eq!(array_bytes_in(&Facts::parse(MAP)).unwrap(), 16_000);
        for (from, to) in [
            ("map_type:\t2", "map_type:\t6"),
            ("0x400", "0x80"),
            ("max_entries:\t1000", "max_entries:\t18446744073709551615"),
            ("value_size", "size_of_value"),
        ] {
            array_bytes_in(&Facts::parse(&MAP.replace(from, to))).unwrap_err();
        }
        array_bytes_in(&Facts::parse(LINK)).unwrap_err();
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let plain = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(matches!(array_bytes(&plain), Err(SysError::Unfit { .. })));
        assert_eq!(facts_of(plain.as_fd()).unwrap().number("pos"), Some(0));
        assert!(!is_bpffs(Path::new("/proc")).unwrap());
        // ENOENT; EPERM where this user may not ask at all.
        let missing = open_pinned(Path::new("/nowhere/at/all")).unwrap_err();
        let known = [Some(crate::Errno::NOENT), Some(crate::Errno::PERM)];
        assert!(known.contains(&missing.errno()), "{missing}");
    }
}
