//! Evidence over file systems that other people's tools made, changed and repaired; and over what nobody made.

use super::*;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

mod xfs_log;

/// An image in a file that is gone when the test ends.
struct Image {
    path: PathBuf,
}

impl Image {
    fn new(name: &str, mebibytes: u64) -> Self {
        let name = format!("blktide-evidence-{}-{name}", std::process::id());
        let path = PathBuf::from("/var/tmp").join(name);
        File::create(&path)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        Self { path }
    }

    /// Runs `program options… image`; its output.
    fn run(&self, program: &str, options: &[&str]) -> String {
        let output = Command::new(program)
            .args(options)
            .arg(&self.path)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("{program}: {e}"));
        // e2fsck: 1 = errors corrected.
        let fine = output.status.code().is_some_and(|c| c <= 1);
        assert!(fine, "{program} {options:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn mkfs(name: &str, options: &[&str]) -> Self {
        let image = Self::new(name, 64);
        image.run("mkfs.ext4", &[&["-q", "-F"], options].concat());
        image
    }

    fn evidence(&self) -> Evidence {
        collect(&self.open())
    }

    fn open(&self) -> Plain {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .unwrap();
        Plain { file }
    }

    fn flip(&self, at: u64) {
        let file = self.open().file;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}

struct Plain {
    file: File,
}

impl ReadAt for Plain {
    fn len_bytes(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn read_exact_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(offset_bytes.is_multiple_of(4096), "as O_DIRECT wants it");
        let end = offset_bytes + buf.len() as u64;
        assert!(buf.len().is_multiple_of(4096) || end == self.len_bytes());
        self.file.read_exact_at(buf, offset_bytes)
    }
}

/// Bytes in memory; may fail, counts what is read.
struct Memory {
    bytes: Vec<u8>,
    bad: Option<u64>,
    read_bytes: Cell<u64>,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            bad: None,
            read_bytes: Cell::new(0),
        }
    }
}

impl ReadAt for Memory {
    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        let end = start + buf.len();
        self.read_bytes
            .set(self.read_bytes.get() + buf.len() as u64);
        if self
            .bad
            .is_some_and(|bad| (offset_bytes..end as u64).contains(&bad))
        {
            return Err(io::Error::from_raw_os_error(5));
        }
        buf.copy_from_slice(&self.bytes[start..end]);
        Ok(())
    }
}

const EXT4_KINDS: &[(&str, &[&str])] = &[
    ("4k", &["-b", "4096"]),
    ("1k", &["-b", "1024"]),
    ("32bit", &["-b", "1024", "-O", "^64bit,^metadata_csum"]),
    ("meta_bg", &["-b", "1024", "-O", "meta_bg,^resize_inode"]),
    (
        "meta_bg_32bit",
        &[
            "-b",
            "1024",
            "-O",
            "meta_bg,^resize_inode,^64bit,^metadata_csum",
        ],
    ),
    ("ext3", &["-t", "ext3", "-b", "1024"]),
    ("bigalloc", &["-b", "4096", "-O", "bigalloc"]),
    (
        "small_groups",
        &["-b", "1024", "-g", "256", "-O", "^resize_inode,^flex_bg"],
    ),
    ("sparse2", &["-b", "1024", "-O", "sparse_super2"]),
];

/// req A6: a clean ext4 with its journal inside is strong, whatever it was made with; and the evidence covers the
/// superblock, each descriptor block and the journal's superblock where e2fsprogs says that they are.
#[test]
fn ext4_covers_what_e2fsprogs_shows() {
    for (name, options) in EXT4_KINDS {
        let image = Image::mkfs(name, options);
        let before = image.evidence();
        assert_eq!(
            (before.kind(), before.class()),
            (Kind::Ext4, Class::Strong),
            "{name}"
        );
        assert_eq!(
            compare(&before.block(), &image.evidence(), false),
            Ok(()),
            "{name}"
        );
        let (block_bytes, blocks) = structures(&image);
        assert!(blocks.len() >= 2, "{name}: {blocks:?}");
        for block in blocks {
            // The last bytes of a block: those that chosen fields would leave out.
            for at in [block * block_bytes + 8, block * block_bytes + 1000] {
                image.flip(at);
                let now = image.evidence();
                let verdict = compare(&before.block(), &now, true);
                assert_eq!(
                    verdict,
                    Err(Reason::ForeignWrite),
                    "{name}: byte {at} of block {block}"
                );
                image.flip(at);
            }
        }
        assert_eq!(image.evidence(), before);
        image.flip(1024 + 0x17f);
        assert_eq!(
            compare(&before.block(), &image.evidence(), true),
            Err(Reason::ForeignWrite)
        );
    }
}

/// Block size, and the blocks of descriptors and of the journal's superblock, by dumpe2fs and debugfs.
fn structures(image: &Image) -> (u64, Vec<u64>) {
    let dump = image.run("dumpe2fs", &[]);
    let value = |key: &str| {
        let line = dump.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace()
            .last()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let meta = dump
        .lines()
        .any(|l| l.starts_with("Filesystem features") && l.contains("meta_bg"));
    let mut blocks = Vec::new();
    let mut primary = false;
    for line in dump.lines() {
        // Without meta_bg the primary ones are group 0's; with it each meta group's first is the primary one.
        primary |= line.contains("rimary superblock at");
        let descriptors = ["Group descriptors at ", "Group descriptor at "]
            .iter()
            .find_map(|k| line.split(k).nth(1));
        if let Some(range) = descriptors {
            let range = range.split([',', ' ', '(']).next().unwrap().trim();
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            let number = |t: &str| t.parse::<u64>().unwrap();
            if meta || blocks.is_empty() {
                blocks.extend(number(from)..=number(to));
            }
        }
    }
    assert!(primary, "{dump}");
    if meta {
        // Copies lie in the second and last group of each meta group.
        let descriptor_bytes = if dump.contains("64bit") { 64 } else { 32 };
        let per_block = value("Block size:") / descriptor_bytes;
        let group = value("Blocks per group:");
        let first = value("First block:");
        blocks.retain(|b| ((b - first) / group).is_multiple_of(per_block));
    }
    let journal = image.run("debugfs", &["-R", "bmap <8> 0"]);
    blocks.push(journal.trim().parse().unwrap());
    (value("Block size:"), blocks)
}

/// req A6: what repaired, checked or wrote to the file system elsewhere is seen, reading it is not.
#[test]
fn ext4_tools_that_write_are_seen() {
    let image = Image::mkfs("tools", &[]);
    let before = image.evidence();
    image.run("e2fsck", &["-fn"]);
    image.run("dumpe2fs", &["-h"]);
    assert_eq!(compare(&before.block(), &image.evidence(), false), Ok(()));
    image.run("e2fsck", &["-fy"]);
    let checked = image.evidence();
    assert_eq!(
        compare(&before.block(), &checked, false),
        Err(Reason::ForeignWrite)
    );
    image.run("debugfs", &["-w", "-R", "mkdir /elsewhere"]);
    let written = image.evidence();
    assert_eq!(
        compare(&checked.block(), &written, true),
        Err(Reason::ForeignWrite)
    );
    // Damage that no tool wrote through the file system; its repair is seen.
    image.flip(1024 + 0x10);
    image.run("e2fsck", &["-fy"]);
    assert_eq!(
        compare(&written.block(), &image.evidence(), true),
        Err(Reason::ForeignWrite)
    );
}

/// req A6: a journal that is not empty proves nothing (any mount would replay it), and its replay is seen.
#[test]
fn ext4_journal_to_replay_is_weak() {
    let image = Image::mkfs("replay", &["-b", "1024"]);
    assert_eq!(image.evidence().class(), Class::Strong);
    let script = image.path.with_extension("script");
    let mut file = File::create(&script).unwrap();
    io::Write::write_all(&mut file, b"jo\njw -b 5000 /dev/zero\njc\n").unwrap();
    image.run("debugfs", &["-w", "-f", script.to_str().unwrap()]);
    std::fs::remove_file(script).unwrap();
    let dirty = image.evidence();
    assert_eq!(dirty.class(), Class::Weak);
    assert_eq!(
        compare(&dirty.block(), &image.evidence(), false),
        Err(Reason::ForeignWriteUnknown)
    );
    assert_eq!(
        compare(&dirty.block(), &image.evidence(), true),
        Ok(()),
        "exclusive waives it"
    );
    image.run("e2fsck", &["-p"]);
    let replayed = image.evidence();
    assert_eq!(replayed.class(), Class::Strong);
    assert_eq!(
        compare(&dirty.block(), &replayed, true),
        Err(Reason::ForeignWrite)
    );
}

/// req A6: no journal, a journal elsewhere, or errors noted: weak.
#[test]
fn ext4_without_an_internal_clean_journal_is_weak() {
    let bare = Image::mkfs("bare", &["-O", "^has_journal"]);
    assert_eq!(
        (bare.evidence().kind(), bare.evidence().class()),
        (Kind::Ext4, Class::Weak)
    );
    for (at, value) in [(0xe4, 7), (0x3a, 2), (0x3a, 0), (0x62, 0x08)] {
        let image = Image::mkfs("weak", &[]);
        image.open().file.write_all_at(&[value], 1024 + at).unwrap();
        let class = image.evidence().class();
        // 0x62: a feature bit that says nothing here.
        let expected = if at == 0x62 {
            Class::Strong
        } else {
            Class::Weak
        };
        assert_eq!(class, expected, "superblock byte {at:#x} = {value}");
    }
}

/// req A6: XFS as made is strong; each group's four sectors and the log's end are covered; repair is seen.
#[test]
fn xfs_covers_groups_and_the_end_of_the_log() {
    let image = Image::new("xfs", 400);
    image.run("mkfs.xfs", &["-q", "-f"]);
    let before = image.evidence();
    assert_eq!((before.kind(), before.class()), (Kind::Xfs, Class::Strong));
    assert_eq!(compare(&before.block(), &image.evidence(), false), Ok(()));
    let field = |name: &str| {
        let shown = image.run("xfs_db", &["-r", "-c", "sb 0", "-c", &format!("p {name}")]);
        shown
            .trim()
            .split(" = ")
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let (block, groups, group_blocks) = (field("blocksize"), field("agcount"), field("agblocks"));
    assert!(groups >= 4);
    for group in 0..groups {
        for sector in 0..4 {
            let at = group * group_blocks * block + sector * 512 + 300;
            image.flip(at);
            assert_eq!(
                compare(&before.block(), &image.evidence(), true),
                Err(Reason::ForeignWrite),
                "sector {sector} of group {group}"
            );
            image.flip(at);
        }
    }
    assert_eq!(image.evidence(), before);
    // Another cycle of the log, as mounts elsewhere leave it.
    image.run("xfs_db", &["-x", "-c", "logformat -c 9"]);
    assert_eq!(
        compare(&before.block(), &image.evidence(), true),
        Err(Reason::ForeignWrite)
    );
    let before = image.evidence();
    image.run("xfs_db", &["-x", "-c", "agi 1", "-c", "write newino 5"]);
    image.run("xfs_repair", &[]);
    assert_eq!(
        compare(&before.block(), &image.evidence(), true),
        Err(Reason::ForeignWrite)
    );
}

/// req A6: of a volume that we know nothing about, equal ends prove nothing; different ones do.
#[test]
fn unknown_content_is_weak() {
    let mut bytes = noise(1 << 20, Seed(5));
    let look = |bytes: &[u8]| collect(&Memory::new(bytes.to_vec()));
    let before = look(&bytes);
    assert_eq!(
        (before.kind(), before.class()),
        (Kind::Unknown, Class::Weak)
    );
    bytes[500_000] ^= 1;
    assert_eq!(
        compare(&before.block(), &look(&bytes), false),
        Err(Reason::ForeignWriteUnknown)
    );
    assert_eq!(compare(&before.block(), &look(&bytes), true), Ok(()));
    bytes[0] ^= 1;
    assert_eq!(
        compare(&before.block(), &look(&bytes), true),
        Err(Reason::ForeignWrite)
    );
    for len in [512, 4096, 5120, 100_000 / 512 * 512] {
        assert_eq!(look(&bytes[..len]).kind(), Kind::Unknown);
    }
}

/// What cannot be read, or was taken by other rules, is never the same.
#[test]
fn unreadable_is_equal_to_nothing() {
    let image = Image::mkfs("bad", &["-b", "1024"]);
    let mut memory = Memory::new(std::fs::read(&image.path).unwrap());
    let good = collect(&memory);
    memory.bad = Some(2048);
    let bad = collect(&memory);
    assert_eq!(bad, Evidence::UNREADABLE);
    let mut other_rules = good.block();
    other_rules.rules.set(2);
    for (stored, now) in [
        (good.block(), bad),
        (bad.block(), good),
        (bad.block(), bad),
        (other_rules, good),
    ] {
        assert_eq!(
            compare(&stored, &now, true),
            Err(Reason::ForeignWriteUnknown)
        );
    }
}

/// req X6: superblocks that lie cost neither a panic nor unbounded reading, and never look strong by accident.
#[test]
fn hostile_superblocks_are_bounded() {
    let seed = Seed::of_test("hostile_superblocks_are_bounded");
    let ext4 = Image::mkfs("hostile", &["-b", "1024"]);
    let xfs = Image::new("hostile-xfs", 300);
    xfs.run("mkfs.xfs", &["-q", "-f"]);
    for (image, start, len) in [(&ext4, 1024, 1024), (&xfs, 0, 512)] {
        let mut bytes = std::fs::read(&image.path).unwrap();
        bytes.truncate(8 << 20);
        let good: Vec<u8> = bytes[start..start + len].to_vec();
        let mut numbers = seed.numbers();
        for round in 0..600 {
            bytes[start..start + len].copy_from_slice(&good);
            for _ in 0..=numbers.below(6) {
                let at = start + numbers.index(len) / 4 * 4;
                let value = match numbers.below(4) {
                    0 => 0,
                    1 => u64::MAX,
                    2 => 1 << numbers.below(32),
                    _ => numbers.next_u64(),
                };
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()[..4]);
            }
            let memory = Memory::new(std::mem::take(&mut bytes));
            let evidence = collect(&memory);
            let read = memory.read_bytes.get();
            assert!(read <= 130 << 20, "{seed} round {round}: {read} bytes");
            assert_eq!(evidence, collect(&memory), "{seed} round {round}");
            bytes = memory.bytes;
        }
    }
}
