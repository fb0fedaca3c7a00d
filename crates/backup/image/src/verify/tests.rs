//! Every flip found, and nothing believed that is not what was written.

use super::{Depth, Proof, verify};
use crate::testing::{Model, VOLUME, World, facts, geometry};
use crate::{ImageError, ImageReader};
use blktide_format::claim::{EndFacts, Outcome, decode_end, encode_end};
use blktide_format::entry::{Codec, EntryKind, Place};
use blktide_format::manifest::{
    ImageKind, PackRow, Prefix, Section, decode_prefix, encode_packs, encode_prefix,
};
use blktide_format::page::{BlockKind, Child, Inner, Leaf};
use blktide_repo::{MemoryStore, NewEntry, Repository, Session};
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::id::Digest;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Two images, the second on top of the first; less than 16 KiB of objects.
fn small(seed: Seed) -> World {
    let geometry = geometry(70 * 4096 - 512, 4096);
    let world = World::new(seed);
    let block = |b: BlockIndex| vec![u8::try_from(b.0).unwrap() | 128; 4096];
    let blocks: Vec<Vec<u8>> = (0..70).map(|b| block(BlockIndex(b))).collect();
    let model = |b: BlockIndex| match b.0 {
        0..=17 | 69 => Model::Bytes(&blocks[usize::try_from(b.0).unwrap()]),
        30 => Model::Unreadable,
        _ => Model::Absent,
    };
    let all = BlockSet::full(geometry.block_count());
    world.backup(geometry, None, (&all, 70), model);
    let mut wanted = BlockSet::new(geometry.block_count());
    wanted.insert_range(BlockRange::new(BlockIndex(3), BlockIndex(5)).unwrap());
    let base = Arc::new(world.reader(1));
    let other = vec![99; 4096];
    world.backup(geometry, Some(base), (&wanted, 2), |_| Model::Bytes(&other));
    world
}

fn proof(store: &MemoryStore, depth: Depth) -> Result<Proof, ImageError> {
    let repository = Repository::open(Arc::new(store.clone()))?;
    verify(&repository, None, depth, 1, &|_| true)
}

fn is_found(store: &MemoryStore, depth: Depth) -> bool {
    proof(store, depth).map_or(true, |p| !p.damage.is_empty())
}

/// Tells `run` each number below `count`, on two threads.
fn in_parallel(count: usize, run: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    run(n);
                }
            });
        }
    });
}

/// trap TG13: an untouched repository always passes, and every byte of it was looked at.
#[test]
fn an_untouched_repository_passes() {
    let world = small(Seed::of_test("an_untouched_repository_passes"));
    for depth in [Depth::Structure, Depth::Data] {
        let proof = proof(&world.store, depth).unwrap();
        assert_eq!(proof.damage, []);
        assert_eq!(proof.images, 2);
        assert!(proof.is_complete);
        if depth == Depth::Data {
            let names = world.store.names();
            let packs = names.iter().filter(|n| n.contains("/packs/"));
            let bytes: usize = packs.map(|n| world.store.bytes(n).len()).sum();
            // The newest image's pages are read again to be counted.
            assert!(proof.checked_bytes >= bytes as u64);
        }
    }
}

/// req X6: every single-bit flip of every object is found by a verification of the data.
#[test]
fn every_bit_flip_is_found() {
    let world = small(Seed::of_test("every_bit_flip_is_found"));
    let names = world.store.names();
    let total: usize = names.iter().map(|n| world.store.bytes(n).len()).sum();
    println!("{} objects, {total} bytes", names.len());
    assert!(total <= 16 << 10, "a small repository");
    for name in &names {
        let bytes = world.store.bytes(name);
        in_parallel(bytes.len() * 8, |bit| {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let store = world.store.fork();
            store.put(name, Some(flipped));
            assert!(is_found(&store, Depth::Data), "bit {bit} of {name}");
        });
    }
}

/// req X6: every object cut at every length, or with a byte behind it.
#[test]
fn every_truncation_is_found() {
    let world = small(Seed::of_test("every_truncation_is_found"));
    for name in &world.store.names() {
        let bytes = world.store.bytes(name);
        in_parallel(bytes.len(), |len| {
            let store = world.store.fork();
            store.put(name, Some(bytes[..len].to_vec()));
            assert!(is_found(&store, Depth::Data), "{name} cut to {len} bytes");
        });
        let mut longer = bytes.clone();
        longer.push(0);
        let store = world.store.fork();
        store.put(name, Some(longer));
        assert!(
            is_found(&store, Depth::Structure),
            "{name} with a byte more"
        );
    }
}

/// req X6: an object in another's place. An `end` taken away alone is not damage: the claim is then open, as after a cut.
#[test]
fn swapped_and_missing_objects_are_found() {
    let world = small(Seed::of_test("swapped_and_missing_objects_are_found"));
    let names = world.store.names();
    for a in &names {
        for b in names.iter().filter(|b| *b != a) {
            let store = world.store.fork();
            store.put(a, Some(world.store.bytes(b)));
            assert!(
                is_found(&store, Depth::Structure),
                "{b} in the place of {a}"
            );
        }
        if !a.ends_with("/end") {
            let store = world.store.fork();
            store.put(a, None);
            assert!(is_found(&store, Depth::Structure), "{a} gone");
        }
    }
}

/// trap TG8: damage is told as the blocks that each image loses, all of it, and what is not damaged is read.
#[test]
fn damage_is_told_by_image_and_range() {
    let world = small(Seed::of_test("damage_is_told_by_image_and_range"));
    let names = world.store.names();
    let (pack, bytes) = names
        .iter()
        .filter(|n| n.contains("/packs/"))
        .map(|n| (n.clone(), world.store.bytes(n)))
        .max_by_key(|(_, b)| b.len())
        .unwrap();
    // The first entry is the frame of blocks 0 to 15 of the first image; the second has 3 and 4 anew.
    let mut flipped = bytes;
    flipped[128 + 48] ^= 1;
    world.store.put(&pack, Some(flipped));
    let found = proof(&world.store, Depth::Data).unwrap().damage;
    let told: Vec<_> = found
        .iter()
        .filter_map(|d| Some((d.sequence?, d.range?.start().0, d.range?.end().0)))
        .collect();
    assert_eq!(told, [(1, 0, 16), (2, 0, 3), (2, 5, 16)]);
    assert!(found.iter().all(|d| d.object == pack));
    let reader = world.reader(2);
    let range = BlockRange::new(BlockIndex(0), BlockIndex(18)).unwrap();
    let mut buf = vec![0; 18 * 4096];
    reader.read_blocks(range, &mut buf).unwrap_err();
    let salvaged = reader.salvage_blocks(range, &mut buf).unwrap();
    for (block, kind) in (0..).zip(&salvaged.kinds) {
        let is_whole = [3, 4, 16, 17].contains(&block);
        assert_eq!(*kind, is_whole.then_some(BlockKind::Data), "block {block}");
    }
    // A structure's verification reads no frame.
    assert_eq!(proof(&world.store, Depth::Structure).unwrap().damage, []);
}

/// Replaces an image's manifest prefix, and its end so that it fits.
fn forge(world: &World, sequence: u64, change: impl Fn(&mut Prefix)) -> MemoryStore {
    let store = world.store.fork();
    let id = world.repository.id();
    let name = |what: &str| format!("volumes/{VOLUME}/{sequence}/{what}");
    let mut manifest = store.bytes(&name("manifest"));
    let mut prefix = decode_prefix(&manifest, id, VOLUME, sequence).unwrap();
    change(&mut prefix);
    let encoded = encode_prefix(id, &prefix);
    let digest = Digest(*blake3::hash(&encoded).as_bytes());
    manifest.splice(..4096, encoded);
    store.put(&name("manifest"), Some(manifest));
    let end = decode_end(&store.bytes(&name("end")), id, VOLUME, sequence).unwrap();
    let forged = EndFacts {
        outcome: Outcome::Committed {
            image: prefix.head.image,
            digest,
        },
        ..end
    };
    store.put(&name("end"), Some(encode_end(id, VOLUME, &forged)));
    store
}

/// req X6: objects whose checksums are right and whose content is hostile: an error, no panic, no huge allocation.
#[test]
fn hostile_manifests_are_refused() {
    let world = small(Seed::of_test("hostile_manifests_are_refused"));
    let root_of = |sequence| *world.reader(sequence).root();
    let Child::Page {
        content,
        physical,
        place,
    } = root_of(2)
    else {
        panic!("the image has pages");
    };
    let moved = |offset_bytes, stored_bytes, raw_bytes| Child::Page {
        content,
        physical,
        place: Place {
            offset_bytes,
            stored_bytes,
            raw_bytes,
            ..place
        },
    };
    let section = |bytes| {
        move |prefix: &mut Prefix| {
            let last = prefix.sections.len() - 1;
            prefix.sections[last] = Section {
                bytes,
                ..prefix.sections[last]
            };
        }
    };
    let forged = [
        forge(&world, 2, section(1 << 47)),
        forge(&world, 2, section(1 << 60)),
        forge(&world, 2, |p| {
            p.root = moved(128, place.stored_bytes, place.raw_bytes);
        }),
        forge(&world, 2, |p| {
            p.root = moved(u32::MAX, place.stored_bytes, place.raw_bytes);
        }),
        forge(&world, 2, |p| {
            p.root = moved(place.offset_bytes, 1 << 20, 1 << 20);
        }),
        forge(&world, 2, |p| {
            p.root = moved(place.offset_bytes, u32::MAX, u32::MAX);
        }),
        forge(&world, 2, |p| p.root = root_of(1)),
        forge(&world, 2, |p| p.root = Child::Constant(BlockKind::Zero)),
        forge(&world, 2, |p| p.sections.clear()),
        forge(&world, 2, |p| p.head.state = Digest([1; 32])),
        forge(&world, 2, |p| p.head.domain.0 = [9; 16]),
        forge(&world, 2, |p| p.head.kinds.data += 1),
        forge(&world, 2, |p| p.head.geometry = geometry(1 << 50, 4096)),
        forge(&world, 2, |p| p.head.session.0 = [9; 16]),
    ];
    for (n, store) in forged.iter().enumerate() {
        assert!(is_found(store, Depth::Structure), "forged manifest {n}");
        let repository = Repository::open(Arc::new(store.clone())).unwrap();
        if let Ok(reader) = ImageReader::open(&repository, VOLUME, 2) {
            // Whatever comes of it: no panic.
            let mut buf = vec![0; 70 * 4096];
            let all = BlockRange::new(BlockIndex(0), BlockIndex(70)).unwrap();
            drop(reader.read_blocks(all, &mut buf));
            reader.runs(all).take(1000).for_each(drop);
            drop((reader.absent(), reader.changed(), reader.packs()));
        }
    }
}

/// Puts pages into packs whose digests and checksums are right, by a session that never ends.
struct Forger<'a> {
    world: &'a World,
    honest: ImageReader,
    session: Session,
    leaf: Leaf,
}

impl<'a> Forger<'a> {
    fn new(world: &'a World) -> Self {
        let honest = world.reader(2);
        let crate::reader::LeafNode::Page(leaf) = honest.leaf(0).unwrap() else {
            panic!("a page");
        };
        let claim = world.repository.claim(&world.request(None), &world.random);
        Self {
            world,
            leaf: (*leaf).clone(),
            honest,
            session: claim.unwrap(),
        }
    }

    fn entry(&self, kind: EntryKind, first_block: u64, payload: &[u8]) -> Place {
        let entry = NewEntry {
            kind,
            first_block,
            block_shift: 12,
            codec: Codec::Raw,
            raw_bytes: u32::try_from(payload.len()).unwrap(),
            payload,
        };
        self.session.append(&entry).unwrap()
    }

    fn leaf(&self, leaf: &Leaf) -> Child {
        let payload = leaf.encode();
        Child::Page {
            content: self.honest.digests().of_content(&leaf.content_bytes()),
            physical: crate::digest::of_stored(&payload),
            place: self.entry(EntryKind::Page { level: 0 }, leaf.first_block, &payload),
        }
    }

    fn root(&self, children: Vec<Child>) -> Child {
        let inner = Inner {
            level: 1,
            first_block: 0,
            block_shift: 12,
            children,
        };
        let payload = inner.encode();
        Child::Page {
            content: self.honest.digests().of_content(&inner.content_bytes()),
            physical: crate::digest::of_stored(&payload),
            place: self.entry(EntryKind::Page { level: 1 }, 0, &payload),
        }
    }

    /// The store and an open reader, with `root` for image 2's.
    fn with_root(&self, root: Child) -> (MemoryStore, ImageReader) {
        self.session.seal().unwrap();
        let store = forge(self.world, 2, |p| p.root = root);
        let repository = Repository::open(Arc::new(store.clone())).unwrap();
        let reader = ImageReader::open(&repository, VOLUME, 2).unwrap();
        (store, reader)
    }
}

/// req X6: pages that point at themselves, at another leaf, or that have too few entries.
#[test]
fn pages_that_point_elsewhere_are_refused() {
    let world = small(Seed::of_test("pages_that_point_elsewhere_are_refused"));
    let forger = Forger::new(&world);
    let good = forger.leaf(&forger.leaf);
    let elsewhere = forger.leaf(&Leaf {
        first_block: 64,
        blocks: forger.leaf.blocks[..6].to_vec(),
        ..forger.leaf.clone()
    });
    let loop_to = forger.root(vec![good, good]);
    let roots = [
        forger.root(vec![good, elsewhere]),
        forger.root(vec![elsewhere, good]),
        forger.root(vec![loop_to, loop_to]),
        forger.root(vec![good]),
        good,
    ];
    for (n, root) in roots.iter().enumerate() {
        let (store, reader) = forger.with_root(*root);
        assert!(is_found(&store, Depth::Structure), "forged tree {n}");
        let mut buf = vec![0; 70 * 4096];
        let read = reader.read_blocks(reader.geometry().all_blocks(), &mut buf);
        assert!(
            matches!(read, Err(ImageError::Damaged { .. })),
            "forged tree {n}"
        );
    }
}

/// req X6: a frame whose checksum is right and whose blocks are others. The digests in the leaf are what finds it.
#[test]
fn a_frame_of_other_content_is_found() {
    let world = small(Seed::of_test("a_frame_of_other_content_is_found"));
    let forger = Forger::new(&world);
    let other = vec![55; 16 * 4096];
    let frame = forger.entry(EntryKind::Frame { blocks: 0xFFFF }, 0, &other);
    let mut leaf = forger.leaf.clone();
    leaf.frames[0] = frame;
    let last = forger.honest.child(0, 1).unwrap();
    let (store, reader) = forger.with_root(forger.root(vec![forger.leaf(&leaf), last]));
    assert!(is_found(&store, Depth::Data));
    let mut buf = vec![0; 70 * 4096];
    let salvaged = reader
        .salvage_blocks(reader.geometry().all_blocks(), &mut buf)
        .unwrap();
    assert_eq!(salvaged.kinds.iter().filter(|k| k.is_none()).count(), 14);
    assert!(!buf.contains(&55), "no byte of it is handed out");
}

/// A pack table that does not count what the tree uses: prune would delete what is needed.
#[test]
fn wrong_use_counts_are_found() {
    let world = small(Seed::of_test("wrong_use_counts_are_found"));
    let rows = world.reader(2).packs().unwrap();
    let with = |change: &dyn Fn(&mut Vec<PackRow>)| {
        let mut rows = rows.clone();
        change(&mut rows);
        let table = encode_packs(&rows);
        let store = forge(&world, 2, |p| {
            let grown = table.len() as u64;
            let shrunk = p.sections[0].bytes;
            p.sections[0].bytes = grown;
            p.sections[0].digest = Digest(*blake3::hash(&table).as_bytes());
            for section in &mut p.sections[1..] {
                section.offset_bytes += grown;
                section.offset_bytes -= shrunk;
            }
        });
        let name = format!("volumes/{VOLUME}/2/manifest");
        let mut manifest = store.bytes(&name);
        let old = encode_packs(&world.reader(2).packs().unwrap()).len();
        manifest.splice(4096..4096 + old, table);
        store.put(&name, Some(manifest));
        store
    };
    assert!(!is_found(&with(&|_| ()), Depth::Data), "unchanged");
    assert!(is_found(
        &with(&|rows| rows[0].frames += 1),
        Depth::Structure
    ));
    assert!(is_found(
        &with(&|rows| rows[1].pages -= 1),
        Depth::Structure
    ));
    assert!(is_found(&with(&|rows| rows.truncate(1)), Depth::Structure));
    assert!(is_found(
        &with(&|rows| rows[0].digest = Digest([1; 32])),
        Depth::Data
    ));
    assert!(is_found(&with(&|rows| rows[0].entries += 1), Depth::Data));
}

/// What an older image has shown is not read again, and what only a missing image would have shown is read all the same.
#[test]
fn packs_of_a_missing_image_are_read_from_their_start() {
    let world = small(Seed::of_test("packs_of_a_missing_image"));
    let end = format!("volumes/{VOLUME}/1/end");
    world.store.put(&end, None);
    assert_eq!(proof(&world.store, Depth::Data).unwrap().damage, []);
    let names = world.store.names();
    for name in names.iter().filter(|n| n.contains("/packs/")) {
        let bytes = world.store.bytes(name);
        in_parallel(bytes.len(), |at| {
            let mut changed = bytes.clone();
            changed[at] ^= 64;
            let store = world.store.fork();
            store.put(name, Some(changed));
            assert!(is_found(&store, Depth::Data), "byte {at} of {name}");
        });
    }
}

#[test]
fn one_image_alone_and_an_end_by_the_caller() {
    let world = small(Seed::of_test("one_image_alone"));
    let one = |n| {
        verify(
            &world.repository,
            Some((VOLUME, n)),
            Depth::Data,
            2,
            &|_| true,
        )
    };
    let first = one(1).unwrap();
    assert_eq!((first.images, first.damage.len()), (1, 0));
    one(3).unwrap_err();
    let ended = verify(&world.repository, None, Depth::Data, 2, &|_| false).unwrap();
    assert!(!ended.is_complete);
    let writer = world.begin(geometry(4096, 4096), None, &BlockSet::new(BlockCount(1)));
    writer.commit(&facts(ImageKind::Full, None)).unwrap();
    assert!(!writer.abandon(WallTime(1)).unwrap(), "it is an image");
}
