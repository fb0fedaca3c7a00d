//! The repository's objects: goldens refused when damaged, and decoders that take any bytes.

#![expect(
    clippy::arithmetic_side_effects,
    reason = "a test may end by an overflow"
)]

use super::*;
use crate::manifest::{PREFIX_BYTES, decode_packs, decode_prefix};
use crate::page::{Inner, Leaf};
use crate::{claim, entry, repository, runs};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use proptest::prelude::*;

const REPOSITORY: &[u8] = include_bytes!("../../golden/v1/repository.bin");
const CLAIM: &[u8] = include_bytes!("../../golden/v1/claim.bin");
const END: &[u8] = include_bytes!("../../golden/v1/end.bin");
const MANIFEST: &[u8] = include_bytes!("../../golden/v1/manifest.bin");
const PACK: &[u8] = include_bytes!("../../golden/v1/pack.bin");

const ID: RepositoryId = RepositoryId(*b"a repository, 16");
const VOLUME: VolumeId = VolumeId(*b"0123456789abcdef");
const SESSION: SessionId = SessionId(*b"session, sixteen");

type Decode = fn(&[u8]) -> Result<(), FormatError>;

/// Each golden with its decoder, and the bytes that this decoder answers for.
fn goldens() -> [(&'static str, &'static [u8], Decode); 6] {
    [
        ("repository", REPOSITORY, |b| {
            repository::decode(b).map(drop)
        }),
        ("claim", CLAIM, |b| {
            claim::decode_claim(b, ID, VOLUME, 1).map(drop)
        }),
        ("end", END, |b| {
            claim::decode_end(b, ID, VOLUME, 1).map(drop)
        }),
        ("prefix", &MANIFEST[..PREFIX_BYTES], |b| {
            decode_prefix(b, ID, VOLUME, 1).map(drop)
        }),
        ("pack header", &PACK[..HEADER_BYTES], |b| {
            let expected = Expected {
                object: Some(object_id(SESSION, 0)),
                ..Expected::default()
            };
            decode_header(b, ObjectKind::Pack, expected).map(drop)
        }),
        (
            "entry header",
            &PACK[HEADER_BYTES..HEADER_BYTES + 48],
            |b| entry::decode(b, object_id(SESSION, 0), 128).map(drop),
        ),
    ]
}

/// req X6: every single-bit flip and every truncation of what version 1 wrote is refused.
#[test]
fn every_flip_and_truncation_of_a_golden_is_refused() {
    for (name, bytes, decode) in goldens() {
        assert_eq!(decode(bytes), Ok(()), "{name}");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            decode(&flipped).expect_err(name);
        }
        for len in 0..bytes.len() {
            decode(&bytes[..len]).expect_err(name);
        }
    }
}

/// An object that is whole and somebody else's.
#[test]
fn what_belongs_elsewhere_is_refused() {
    let other = VolumeId([1; 16]);
    let identity = |field| Err(FormatError::Identity { field });
    let claim_of =
        |id, volume, sequence| claim::decode_claim(CLAIM, id, volume, sequence).map(drop);
    assert_eq!(
        claim_of(RepositoryId([1; 16]), VOLUME, 1),
        identity("repository")
    );
    assert_eq!(claim_of(ID, other, 1), identity("volume"));
    assert_eq!(claim_of(ID, VOLUME, 2), identity("sequence"));
    let end = |volume, sequence| claim::decode_end(END, ID, volume, sequence).map(drop);
    assert_eq!(end(other, 1), identity("volume"));
    assert_eq!(end(VOLUME, 2), identity("sequence"));
    let manifest = |volume, sequence| decode_prefix(MANIFEST, ID, volume, sequence).map(drop);
    assert_eq!(manifest(other, 1), identity("volume"));
    assert_eq!(manifest(VOLUME, 2), identity("sequence"));
    // An entry at another offset, or in another pack.
    let entry = &PACK[HEADER_BYTES..];
    for (pack, offset) in [(object_id(SESSION, 0), 129), (object_id(SESSION, 1), 128)] {
        let refused = entry::decode(entry, pack, offset);
        assert!(matches!(refused, Err(FormatError::Checksum { .. })));
    }
}

/// What is new and must be understood is refused by its name, and told apart from damage.
#[test]
fn later_versions_and_features_are_refused_by_name() {
    let change = |at: usize, value: u8| {
        let mut bytes = CLAIM.to_vec();
        bytes[at] = value;
        let checksum = crc64(&[&bytes[..120]]);
        bytes[120..128].copy_from_slice(&checksum.to_le_bytes());
        claim::decode_claim(&bytes, ID, VOLUME, 1).unwrap_err()
    };
    assert!(matches!(
        change(8, 2),
        FormatError::Version { found: 2, .. }
    ));
    assert_eq!(change(13, 1), FormatError::Feature { bits: 256 });
    // Compatible bits are ignored.
    let mut bytes = CLAIM.to_vec();
    bytes[16] = 1;
    let checksum = crc64(&[&bytes[..120]]);
    bytes[120..128].copy_from_slice(&checksum.to_le_bytes());
    claim::decode_claim(&bytes, ID, VOLUME, 1).unwrap();
}

/// The leaf and the inner page of the golden pack, and the first blocks they are of.
fn pages() -> (Vec<u8>, Vec<u8>) {
    let pack = object_id(SESSION, 0);
    let (mut at, mut found) = (HEADER_BYTES, Vec::new());
    while at < PACK.len() {
        let (facts, _) = entry::decode(&PACK[at..], pack, u32::try_from(at).unwrap()).unwrap();
        let end = at + 48 + usize::try_from(facts.stored_bytes).unwrap();
        if let entry::EntryKind::Page { .. } = facts.kind {
            found.push(PACK[at + 48..end].to_vec());
        }
        at = end;
    }
    (found[0].clone(), found[2].clone())
}

proptest! {
    /// req X6: pages have no checksum of their own. Whatever decodes is the one encoding of what it says; nothing panics.
    #[test]
    fn a_page_has_one_encoding(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let (leaf, inner) = pages();
        for mut bytes in [leaf, inner] {
            for (at, value) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Ok(leaf) = Leaf::decode(&bytes, 12, 0, 64) {
                prop_assert_eq!(leaf.encode(), &*bytes);
            }
            if let Ok(inner) = Inner::decode(&bytes, 1, 12, 0, 2) {
                prop_assert_eq!(inner.encode(), &*bytes);
            }
            bytes.truncate(cut.index(bytes.len()));
            prop_assert!(Leaf::decode(&bytes, 12, 0, 64).is_err());
            prop_assert!(Inner::decode(&bytes, 1, 12, 0, 2).is_err());
        }
    }

    /// A set of blocks and its runs lead to each other, one to one.
    #[test]
    fn runs_have_one_encoding(
        len in 1_u64..500, parts in proptest::collection::vec((0_u64..500, 1_u64..60), 0..20),
        noise in proptest::collection::vec(any::<u8>(), 0..12),
    ) {
        let mut set = BlockSet::new(BlockCount(len));
        for (start, count) in parts {
            set.insert_range(BlockRange::new(BlockIndex(start), BlockIndex(start + count)).unwrap());
        }
        prop_assert_eq!(runs::decode(&runs::encode(&set), BlockCount(len)).unwrap(), set);
        if let Ok(set) = runs::decode(&noise, BlockCount(len)) {
            prop_assert_eq!(runs::encode(&set), noise);
        }
    }

    /// Any bytes at all: refused or decoded, without a panic.
    #[test]
    fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        for (_, _, decode) in goldens() {
            prop_assert!(decode(&noise).is_err());
        }
        drop(decode_packs(&noise));
        drop(Leaf::decode(&noise, 12, 0, 64));
    }
}
