//! The whole of version 1 against a second encoder's repository (`crates/base/format/golden/repository.py`).

use crate::testing::geometry;
use crate::{BlockKind, Content, Depth, ImageFacts, ImageReader, ImageWriter, verify};
use blktide_format::manifest::{Consistency, Counters, ImageKind};
use blktide_repo::{ClaimRequest, MemoryStore, ProcessMark, Repository};
use blktide_types::clock::{Random, WallTime};
use blktide_types::id::{BootId, Digest, GenerationName, HostId, ObjectId, VolumeId};
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::{Arc, Mutex};

const GOLDEN: [(&str, &[u8]); 5] = [
    (
        "repository",
        include_bytes!("../../../base/format/golden/v1/repository.bin"),
    ),
    (
        "open",
        include_bytes!("../../../base/format/golden/v1/claim.bin"),
    ),
    (
        "manifest",
        include_bytes!("../../../base/format/golden/v1/manifest.bin"),
    ),
    (
        "end",
        include_bytes!("../../../base/format/golden/v1/end.bin"),
    ),
    (
        "pack",
        include_bytes!("../../../base/format/golden/v1/pack.bin"),
    ),
];

const VOLUME: VolumeId = VolumeId(*b"0123456789abcdef");
const SESSION: &[u8; 16] = b"session, sixteen";

/// Numbers as a script says them.
struct Script(Mutex<Vec<u8>>);

impl Random for Script {
    fn fill(&self, out: &mut [u8]) {
        let mut script = self.0.lock().unwrap();
        let rest = script.split_off(out.len());
        out.copy_from_slice(&std::mem::replace(&mut *script, rest));
    }
}

/// The sample's blocks with content, and its length in blocks.
fn sample() -> Vec<(u64, Vec<u8>)> {
    let noise = |seed: u64, len: usize| {
        let (mut out, mut x) = (Vec::new(), seed);
        while out.len() < len {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            out.extend_from_slice(&x.to_le_bytes());
        }
        out.truncate(len);
        out
    };
    vec![
        (0, noise(1, 4096)),
        (2, noise(2, 4096)),
        (64, noise(3, 4096)),
        (65, noise(4, 512)),
    ]
}

/// Where an object of the golden lies in a store.
fn place(name: &str) -> String {
    match name {
        "repository" => name.to_owned(),
        "pack" => {
            let mut id = ObjectId(*SESSION);
            id.0[12..].fill(0);
            blktide_repo::name::pack(VOLUME, id)
        }
        other => format!("volumes/{VOLUME}/1/{other}"),
    }
}

/// What version 1 wrote is read: by our reader, byte by byte, and found whole.
#[test]
fn golden_v1_is_still_what_we_read() {
    let store = MemoryStore::new();
    for (name, bytes) in GOLDEN {
        store.put(&place(name), Some(bytes.to_vec()));
    }
    let repository = Repository::open(Arc::new(store)).unwrap();
    let proof = verify(&repository, None, Depth::Data, 1, &|_| true).unwrap();
    assert_eq!((proof.images, proof.damage), (1, vec![]));
    let reader = ImageReader::open(&repository, VOLUME, 1).unwrap();
    let head = reader.head();
    assert_eq!(head.reason, Some(Reason::FirstBackup));
    assert_eq!(
        (head.host_name.as_str(), head.device.as_str()),
        ("web1", "/dev/test")
    );
    assert_eq!(
        reader.kind_of(BlockIndex(3)).unwrap(),
        BlockKind::Unreadable
    );
    let mut buf = vec![0; 66 * 4096];
    let kinds = reader
        .read_blocks(reader.geometry().all_blocks(), &mut buf)
        .unwrap();
    assert_eq!(kinds.iter().filter(|k| **k == BlockKind::Data).count(), 4);
    for (block, bytes) in sample() {
        let at = usize::try_from(block).unwrap() * 4096;
        assert_eq!(&buf[at..at + bytes.len()], bytes);
    }
}

/// What we write is, byte for byte, what version 1 wrote: every object, placed where it lies.
#[test]
fn golden_v1_is_still_what_we_write() {
    let mut script: Vec<u8> = (0..32).collect();
    for id in [b"a repository, 16", b"a digest domain!", SESSION] {
        script.extend_from_slice(id);
    }
    let random = Script(Mutex::new(script));
    let store = MemoryStore::new();
    let created = 1_794_873_600_000_000_000;
    let repository = Repository::init(Arc::new(store.clone()), &random, WallTime(created)).unwrap();
    let request = ClaimRequest {
        volume: VOLUME,
        volume_name: "data".to_owned(),
        host: HostId(*b"a host, 16 bytes"),
        host_name: "web1".to_owned(),
        process: ProcessMark {
            boot: BootId(*b"a boot, 16 bytes"),
            pid: 4711,
            start_time: 99,
        },
        base: None,
        generation: GenerationName(*b"a generation, 16"),
        now: WallTime(created + 1),
    };
    let geometry = geometry(65 * 4096 + 512, 4096);
    let session = repository.claim(&request, &random).unwrap();
    let all = BlockSet::full(geometry.block_count());
    let words = crate::testing::words(&all);
    let writer = ImageWriter::new(session, geometry, None, &words).unwrap();
    let (data, zero) = (sample(), vec![0; 4096]);
    let content = |block| match data.iter().find(|(b, _)| *b == block) {
        Some((_, bytes)) => Content::Bytes(bytes),
        None if block == 1 => Content::Bytes(&zero),
        None if block == 3 => Content::Unreadable,
        None => Content::Absent,
    };
    let blocks: Vec<_> = (0..66).map(|b| (BlockIndex(b), content(b))).collect();
    writer.put(&blocks).unwrap();
    let facts = ImageFacts {
        device: "/dev/test".to_owned(),
        generation: GenerationName(*b"opened generatio"),
        kind: ImageKind::Full,
        reason: Some(Reason::FirstBackup),
        consistency: Consistency::Instant,
        instant: WallTime(created + 2),
        committed: WallTime(created + 3),
        counters: Counters {
            read_bytes: 270_848,
            changed_bytes: 270_848,
            stored_bytes: 0,
            preserved_bytes: 11,
            duration_ns: 12,
            longest_wait_ns: 13,
            longest_freeze_ns: 14,
        },
        changed: Some(all),
        evidence: b"what the file system shows".to_vec(),
        previous: Digest::NONE,
    };
    writer.commit(&facts).unwrap();
    for (name, golden) in GOLDEN {
        assert!(store.bytes(&place(name)) == golden, "{name} is another");
    }
    assert_eq!(store.names().len(), GOLDEN.len());
}
