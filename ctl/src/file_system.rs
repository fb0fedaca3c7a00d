//! What a device holds, by its signature: whether a file system is on it that can be frozen.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// So much of the head is looked at.
const HEAD_BYTES: usize = 128 << 10;

/// A file system that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    /// `ext4`, `XFS`.
    pub(crate) name: &'static str,
    /// It can be made to stand still (FIFREEZE).
    pub(crate) freezes: bool,
}

const fn freezes(name: &'static str) -> FileSystem {
    let freezes = true;
    FileSystem { name, freezes }
}

const fn does_not(name: &'static str) -> FileSystem {
    let freezes = false;
    FileSystem { name, freezes }
}

/// Where each says who it is.
const KNOWN: &[(usize, &[u8], FileSystem)] = &[
    // ext2, ext3 and ext4 look alike here, and all of them freeze.
    (0x438, &[0x53, 0xef], freezes("ext4")),
    (0, b"XFSB", freezes("XFS")),
    (0x1_0040, b"_BHRfS_M", freezes("btrfs")),
    (0x400, &[0x10, 0x20, 0xf5, 0xf2], freezes("f2fs")),
    (0x8000, b"JFS1", freezes("JFS")),
    (0x406, &[0x34, 0x34], freezes("NILFS2")),
    (3, b"NTFS    ", does_not("NTFS")),
    (3, b"EXFAT   ", does_not("exFAT")),
    (0x52, b"FAT32   ", does_not("FAT")),
    (0x36, b"FAT1", does_not("FAT")),
];

/// The file system on a device or file; `None`: none that is known, or it cannot be read.
pub(crate) fn on(path: &Path) -> Option<FileSystem> {
    let mut head = Vec::new();
    let limit = u64::try_from(HEAD_BYTES).ok()?;
    File::open(path)
        .ok()?
        .take(limit)
        .read_to_end(&mut head)
        .ok()?;
    of(&head)
}

fn of(head: &[u8]) -> Option<FileSystem> {
    KNOWN
        .iter()
        .find(|(offset, magic, _)| {
            let end = offset.saturating_add(magic.len());
            head.get(*offset..end) == Some(*magic)
        })
        .map(|(_, _, found)| *found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_known() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&vec![0; HEAD_BYTES]), None);
        for (offset, magic, wanted) in KNOWN {
            let mut head = vec![0; HEAD_BYTES];
            head[*offset..offset + magic.len()].copy_from_slice(magic);
            assert_eq!(of(&head), Some(*wanted));
        }
    }
}
