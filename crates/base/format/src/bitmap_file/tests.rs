//! The bitmap file against its golden, every damage, and files that no writer of ours made.

use super::*;
use blktide_types::unit::BlockSize;

const GOLDEN: &[u8] = include_bytes!("../../golden/v1/bitmap_file.bin");

fn geometry() -> Geometry {
    Geometry::new(
        300 * 4096 + 2048,
        BlockSize::DEFAULT,
        BlockSize::IMAGE_MIN,
        512,
        4096,
    )
    .unwrap()
}

fn set(grains: impl IntoIterator<Item = u64>) -> BlockSet {
    let mut set = BlockSet::new(BlockCount(301));
    grains.into_iter().for_each(|g| set.insert(BlockIndex(g)));
    set
}

fn sample() -> Content {
    Content {
        volume: VolumeId(*b"0123456789abcdef"),
        life: LifeId(*b"a life, 16 bytes"),
        geometry: geometry(),
        distrust: Some((Reason::UncleanShutdown, WallTime(1_794_873_600_000_000_001))),
        generations: vec![
            Generation {
                name: GenerationName(*b"first generation"),
                counter: 7,
                opened: WallTime(-1),
                grains: set([3, 4, 300]),
            },
            Generation {
                name: GenerationName(*b"second, the open"),
                counter: 8,
                opened: WallTime(1_794_873_600_000_000_000),
                grains: set((0..301).step_by(3)),
            },
        ],
        evidence: EvidenceBlock {
            kind: 2,
            class: 1,
            rules: U16::new(1),
            reserved: U32::new(0),
            digest: core::array::from_fn(|i| u8::try_from(i).unwrap()),
            covered_bytes: U64::new(5120),
            reserved_2: [0; 16],
        },
    }
}

/// The file with `edit` done to it and a checksum that holds: what an attacker or a bug would write.
fn forged(edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = GOLDEN.to_vec();
    edit(&mut bytes);
    let len = bytes.len() as u64;
    bytes[64..72].copy_from_slice(&len.to_le_bytes());
    let mut digest = crc64fast::Digest::new();
    digest.write(&bytes[..104]);
    digest.write(&bytes[112..]);
    bytes[104..112].copy_from_slice(&digest.sum64().to_le_bytes());
    bytes
}

fn read(bytes: &[u8]) -> Result<Vec<Generation>, FormatError> {
    decode(bytes)?.generations(&geometry())
}

/// What version 1 wrote, byte for byte. This file never changes.
#[test]
fn golden_v1_is_still_what_we_write_and_read() {
    assert_eq!(encode(&sample()).unwrap(), GOLDEN);
    let checked = decode(GOLDEN).unwrap();
    let sample = sample();
    assert_eq!(
        checked.generations(&geometry()).unwrap(),
        sample.generations
    );
    assert_eq!(
        (checked.volume(), checked.life()),
        (sample.volume, sample.life)
    );
    assert_eq!(checked.distrust(), sample.distrust);
    assert_eq!(checked.evidence(), sample.evidence);
}

/// req A5, X6: every single-bit flip is found.
#[test]
fn every_bit_flip_is_refused() {
    for bit in 0..GOLDEN.len() * 8 {
        let mut bytes = GOLDEN.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bytes).is_err(), "flip of bit {bit} was not seen");
    }
}

/// req A5: every way to be cut off, and a tail that does not belong to it.
#[test]
fn every_truncation_is_refused() {
    for len in 0..GOLDEN.len() {
        assert!(
            decode(&GOLDEN[..len]).is_err(),
            "{len} bytes were taken for a whole file"
        );
    }
    decode(&[GOLDEN, &[0]].concat()).unwrap_err();
}

/// req A5: once its first bytes are overwritten, nothing of a file is believed, at whatever sector the disk stopped.
#[test]
fn a_consumed_file_is_refused() {
    let head = consumed(VolumeId(*b"0123456789abcdef"), LifeId(*b"a life, 16 bytes"));
    let bytes = [&head, &GOLDEN[head.len()..]].concat();
    assert_eq!(
        decode(&bytes).unwrap_err(),
        FormatError::Magic {
            found: MAGIC_CONSUMED
        }
    );
}

/// req A5: another size, grain or block size is seen before a bit is looked at.
#[test]
fn another_shape_does_not_fit() {
    let checked = decode(GOLDEN).unwrap();
    let (block, grain) = (BlockSize::DEFAULT, BlockSize::IMAGE_MIN);
    let small = BlockSize::new(512).unwrap();
    let whole = geometry().volume_bytes();
    for (bytes, block, grain) in [
        (whole + 512, block, grain),
        (whole, block, block),
        (whole, grain, grain),
        (whole, block, small),
    ] {
        let other = Geometry::new(bytes, block, grain, 512, 512).unwrap();
        assert!(!checked.fits(&other));
        checked.generations(&other).unwrap_err();
    }
    assert!(checked.fits(&geometry()));
}

/// req X6: what a hostile writer might say with a checksum that holds: an error, no panic, no large allocation.
#[test]
fn hostile_files_are_refused() {
    let first = 112;
    let run = first + 48;
    let put = |at: usize, value: u64| {
        forged(move |b| b[at..at + 8].copy_from_slice(&value.to_le_bytes()))
    };
    let hostile = [
        forged(|b| b[12] = 1), // unknown feature
        forged(|b| b[20..24].copy_from_slice(&u32::MAX.to_le_bytes())), // generations
        forged(|b| b[20] = 0),
        forged(|b| b[20] = 1), // fewer than there are
        forged(|b| b[20] = 3),
        forged(|b| b[75] = 1), // reserved
        forged(|b| b[95] = 1),
        forged(|b| b[72] = 200), // a reason that there is not
        forged(|b| b[first..first + 16].fill(0)), // a nameless generation
        forged(|b| b[first + 32] = 9), // encoding
        put(first + 40, u64::MAX), // payload
        put(first + 40, 31),
        put(run, 301), // run past the end
        put(run + 8, u64::MAX),
        put(run + 8, 0),
        put(run + 16, 5),                  // touches its neighbour
        put(run + 16, 0),                  // not ascending
        put(run + 32 + 48 + 32, u64::MAX), // bits past the end
        forged(|b| b.truncate(200)),
        forged(|b| b.truncate(150)),
    ];
    for (number, bytes) in hostile.iter().enumerate() {
        assert!(read(bytes).is_err(), "hostile file {number} was read");
    }
    read(&forged(|_| ())).unwrap();
}

/// A change that fills the volume is one run, an empty one none; both come back.
#[test]
fn empty_and_full_come_back() {
    let mut content = sample();
    content.generations[0].grains = set([]);
    content.generations[1].grains = set(0..301);
    let bytes = encode(&content).unwrap();
    assert_eq!(bytes.len(), 112 + 48 + 48 + 16 + 64);
    assert_eq!(read(&bytes).unwrap(), content.generations);
    content.generations.clear();
    encode(&content).unwrap_err();
}
