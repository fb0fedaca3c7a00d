//! Trees against a plain model.

use crate::testing::{Model, VOLUME, World, bytes_of, facts, geometry, put_all, times, words};
use crate::{BlockKind, ImageError, ImageReader, ImageWriter};
use blktide_format::manifest::ImageKind;
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::geometry::Geometry;
use blktide_types::id::ObjectId;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What each block of a volume is: the whole model.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Truth {
    geometry: Geometry,
    pub(super) blocks: Vec<(BlockKind, Vec<u8>)>,
}

impl Truth {
    pub(super) fn new(geometry: Geometry) -> Self {
        let count = usize::try_from(geometry.block_count().0).unwrap();
        Self {
            geometry,
            blocks: vec![(BlockKind::Absent, Vec::new()); count],
        }
    }

    pub(super) fn set(&mut self, block: BlockIndex, numbers: &mut Numbers) {
        let len = usize::try_from(self.geometry.block_bytes(block)).unwrap();
        let to = &mut self.blocks[usize::try_from(block.0).unwrap()];
        *to = match numbers.below(10) {
            0 => (BlockKind::Unreadable, Vec::new()),
            1 => (BlockKind::Excluded, Vec::new()),
            2 => (BlockKind::Absent, Vec::new()),
            3..=5 => (BlockKind::Zero, vec![0; len]),
            6 => {
                // Zero but for its last byte (TA7).
                let mut bytes = vec![0; len];
                bytes[len - 1] = 1;
                (BlockKind::Data, bytes)
            }
            7 => (
                BlockKind::Data,
                vec![u8::try_from(numbers.below(9)).unwrap() + 1; len],
            ),
            _ => {
                let mut bytes = vec![0; len];
                numbers.fill(&mut bytes);
                bytes[0] |= 1;
                (BlockKind::Data, bytes)
            }
        };
    }

    pub(super) fn model(&self, block: BlockIndex) -> Model<'_> {
        let (kind, bytes) = &self.blocks[usize::try_from(block.0).unwrap()];
        match kind {
            BlockKind::Data | BlockKind::Zero => Model::Bytes(bytes),
            BlockKind::Absent => Model::Absent,
            BlockKind::Excluded => Model::Excluded,
            BlockKind::Unreadable => Model::Unreadable,
        }
    }

    /// Compares all that an image says with the model.
    pub(super) fn check(&self, reader: &ImageReader) {
        let all = self.geometry.all_blocks();
        let kinds = reader.kinds(all).unwrap();
        let truth: Vec<BlockKind> = self.blocks.iter().map(|(k, _)| *k).collect();
        assert_eq!(kinds, truth);
        let size = self.geometry.block_size().bytes_usize();
        let mut buf = vec![0xAA; kinds.len() * size];
        assert_eq!(reader.read_blocks(all, &mut buf).unwrap(), truth);
        for (i, (_, bytes)) in self.blocks.iter().enumerate() {
            let got = &buf[i * size..(i + 1) * size];
            assert_eq!(&got[..bytes.len()], bytes, "block {i}");
            assert!(got[bytes.len()..].iter().all(|b| *b == 0), "block {i}");
        }
        let missing = reader.absent().unwrap();
        for (block, (kind, _)) in (0..).zip(&self.blocks) {
            assert_eq!(
                missing.contains(BlockIndex(block)),
                kind.is_without_content()
            );
        }
        let counted = &reader.head().kinds;
        let count = |of| truth.iter().filter(|k| **k == of).count() as u64;
        assert_eq!(counted.data, count(BlockKind::Data));
        assert_eq!(counted.zero, count(BlockKind::Zero));
        assert_eq!(counted.absent, count(BlockKind::Absent));
        assert_eq!(counted.excluded, count(BlockKind::Excluded));
        assert_eq!(counted.unreadable, count(BlockKind::Unreadable));
    }
}

/// The pack table as a walk over the whole tree counts it: not the writer's arithmetic.
fn counted(reader: &ImageReader) -> BTreeMap<ObjectId, (u32, u32)> {
    use crate::reader::{LeafNode, Page};
    use blktide_format::page::Child;
    let mut uses: BTreeMap<ObjectId, (u32, u32)> = BTreeMap::new();
    let mut todo = vec![(reader.root_level(), 0_u64, *reader.root())];
    while let Some((level, index, child)) = todo.pop() {
        let Child::Page { place, .. } = child else {
            continue;
        };
        uses.entry(place.pack).or_default().1 += 1;
        match reader.page(level, index, &child).unwrap() {
            Page::Inner(inner) => {
                todo.extend(
                    (index * 64..)
                        .zip(&inner.children)
                        .map(|(i, c)| (level - 1, i, *c)),
                );
            }
            Page::Leaf(leaf) => {
                assert!(matches!(reader.leaf(index).unwrap(), LeafNode::Page(_)));
                for frame in &leaf.frames {
                    uses.entry(frame.pack).or_default().0 += 1;
                }
            }
        }
    }
    uses
}

pub(super) fn check_packs(reader: &ImageReader) {
    let table: BTreeMap<ObjectId, (u32, u32)> = reader
        .packs()
        .unwrap()
        .iter()
        .map(|r| (r.pack, (r.frames, r.pages)))
        .collect();
    assert_eq!(table, counted(reader));
}

/// Random histories of incrementals, sizes, block sizes and pieces: each image, old ones too, is the model of its instant.
/// req A4, trap TA7, TF1
#[test]
fn histories_agree_with_a_plain_model() {
    let seed = Seed::of_test("histories_agree_with_a_plain_model");
    for n in 0..times(8) {
        let seed = seed.nth(n);
        println!("seed {seed:?}");
        let mut numbers = seed.numbers();
        let block_bytes = 4096 << numbers.below(3);
        let blocks = [1, 63, 64, 65, 130, 4096, 4097, 4200][numbers.index(8)];
        let short = numbers.below(8) * 512;
        let geometry = geometry(
            blocks * block_bytes - short,
            u32::try_from(block_bytes).unwrap(),
        );
        let world = World::new(seed);
        let mut truth = Truth::new(geometry);
        let mut history: Vec<(u64, Truth)> = Vec::new();
        let mut base: Option<Arc<ImageReader>> = None;
        for _ in 0..5 {
            let mut wanted = BlockSet::new(geometry.block_count());
            let changes = numbers.below(60);
            for _ in 0..changes {
                let start = numbers.below(geometry.block_count().0);
                let log = numbers.below(8);
                let len = 1 + numbers.below(1 << log);
                let end = (start + len).min(geometry.block_count().0);
                wanted.insert_range(BlockRange::new(BlockIndex(start), BlockIndex(end)).unwrap());
            }
            for block in wanted.blocks() {
                truth.set(block, &mut numbers);
            }
            let pieces = 1 + numbers.index(300);
            let done = world.backup(geometry, base.clone(), (&wanted, pieces), |b| {
                truth.model(b)
            });
            let reader = world.reader(done.head.sequence);
            assert_eq!(reader.head(), &done.head);
            assert_eq!(reader.changed().unwrap().unwrap(), wanted);
            assert_eq!(reader.evidence().unwrap().unwrap(), b"evidence");
            check_packs(&reader);
            history.push((done.head.sequence, truth.clone()));
            let entry = world.repository.latest(VOLUME).unwrap().unwrap();
            base = Some(Arc::new(
                ImageReader::open_base(&world.repository, &entry).unwrap(),
            ));
        }
        for (sequence, truth) in &history {
            truth.check(&world.reader(*sequence));
        }
    }
}

/// The same contents by different histories have one state id, and different contents have different ones.
/// req A4
#[test]
fn equal_states_have_equal_ids() {
    let seed = Seed::of_test("equal_states_have_equal_ids");
    let geometry = geometry(300 * 4096 - 512, 4096);
    let mut numbers = seed.numbers();
    let mut truth = Truth::new(geometry);
    for block in geometry.all_blocks().blocks() {
        truth.set(block, &mut numbers);
    }
    let world = World::new(seed);
    let all = BlockSet::full(geometry.block_count());
    let whole = world.backup(geometry, None, (&all, 7), |b| truth.model(b));
    // Another way there: garbage first, then all of it again in several incrementals, in other pieces.
    let mut garbage = truth.clone();
    for block in (0..300).step_by(3) {
        garbage.set(BlockIndex(block), &mut numbers);
    }
    let first = world.backup(geometry, None, (&all, 100), |b| garbage.model(b));
    assert_ne!(first.head.state, whole.head.state);
    let mut last = first;
    for part in 0..3 {
        let mut wanted = BlockSet::new(geometry.block_count());
        for block in (part * 100..(part + 1) * 100).filter(|b| b % 3 == 0) {
            wanted.insert(BlockIndex(block));
        }
        let base = Arc::new(world.reader(last.head.sequence));
        last = world.backup(geometry, Some(base), (&wanted, 1), |b| truth.model(b));
    }
    assert_eq!(last.head.state, whole.head.state);
    // Nothing changed: the same state, and not one byte added to packs.
    let base = Arc::new(world.reader(last.head.sequence));
    let nothing = BlockSet::new(geometry.block_count());
    let same = world.backup(geometry, Some(base), (&nothing, 1), |b| truth.model(b));
    assert_eq!(same.head.state, whole.head.state);
    assert_eq!(same.head.counters.stored_bytes, 0);
}

/// A sparse volume has no pages at all, whatever its size.
#[test]
fn a_volume_of_one_kind_is_a_constant() {
    let seed = Seed::of_test("a_volume_of_one_kind_is_a_constant");
    let geometry = geometry(70_000 * 4096, 4096);
    let world = World::new(seed);
    let zero = vec![0; 4096];
    let all = BlockSet::full(geometry.block_count());
    let done = world.backup(geometry, None, (&all, 256), |_| Model::Bytes(&zero));
    assert_eq!(done.head.counters.stored_bytes, 0);
    assert_eq!(done.head.kinds.zero, 70_000);
    let reader = world.reader(done.head.sequence);
    let runs: Vec<_> = reader
        .runs(geometry.all_blocks())
        .map(Result::unwrap)
        .collect();
    assert_eq!(runs, vec![(geometry.all_blocks(), BlockKind::Zero)]);
}

/// Several threads, out of order by a window: the same state as one thread.
#[test]
fn threads_make_the_same_tree() {
    let seed = Seed::of_test("threads_make_the_same_tree");
    let geometry = geometry(5000 * 4096, 4096);
    let world = World::new(seed);
    let mut numbers = seed.numbers();
    let mut volume = vec![0; 5000 * 4096];
    for at in (0..volume.len()).step_by(9000) {
        volume[at] = u8::try_from(numbers.below(256)).unwrap();
    }
    let all = BlockSet::full(geometry.block_count());
    let model = |b| Model::Bytes(bytes_of(geometry, &volume, b));
    let one = world.backup(geometry, None, (&all, 64), model);
    let writer = world.begin(geometry, None, &all);
    let next = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let piece = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) * 48;
                    if piece >= 5000 {
                        return;
                    }
                    let mut part = BlockSet::new(geometry.block_count());
                    let end = (piece + 48).min(5000);
                    part.insert_range(BlockRange::new(BlockIndex(piece), BlockIndex(end)).unwrap());
                    put_all(&writer, &part, 48, model);
                }
            });
        }
    });
    let many = writer.commit(&facts(ImageKind::Full, None)).unwrap();
    assert_eq!(many.head.state, one.head.state);
    assert_eq!(many.head.kinds, one.head.kinds);
    check_packs(&world.reader(many.head.sequence));
}

#[test]
fn what_is_not_wanted_or_comes_twice_is_refused_and_nothing_is_committed() {
    let seed = Seed::of_test("what_is_not_wanted_or_comes_twice");
    let geometry = geometry(200 * 4096, 4096);
    let world = World::new(seed);
    let block = vec![1; 4096];
    let mut wanted = BlockSet::new(geometry.block_count());
    for block in [3, 4, 70] {
        wanted.insert(BlockIndex(block));
    }
    let bytes = crate::Content::Bytes(&block);
    let misused = |blocks: &[u64]| {
        let writer = world.begin(geometry, None, &wanted);
        let put = |b: &u64| writer.put(&[(BlockIndex(*b), bytes)]);
        let (last, before) = blocks.split_last().unwrap();
        for block in before {
            put(block).unwrap();
        }
        assert!(matches!(put(last), Err(ImageError::Misuse(_))));
        writer.commit(&facts(ImageKind::Full, None)).unwrap_err();
        assert!(writer.abandon(blktide_types::clock::WallTime(1)).unwrap());
    };
    misused(&[5]);
    misused(&[3, 3]);
    misused(&[70, 70]);
    misused(&[3, 4, 70, 4]);
    misused(&[500]);
    let writer = world.begin(geometry, None, &wanted);
    writer.put(&[(BlockIndex(3), bytes)]).unwrap();
    let short = writer.commit(&facts(ImageKind::Full, None));
    assert!(matches!(short, Err(ImageError::Incomplete { missing: 2 })));
    // The rest can be marked, and then it is complete.
    writer
        .mark(geometry.all_blocks(), BlockKind::Absent)
        .unwrap();
    writer.commit(&facts(ImageKind::Full, None)).unwrap();
}

#[test]
fn a_base_of_another_shape_or_unpinned_is_refused() {
    let seed = Seed::of_test("a_base_of_another_shape");
    let world = World::new(seed);
    let small = geometry(10 * 4096, 4096);
    let all = BlockSet::full(small.block_count());
    world.backup(small, None, (&all, 10), |_| Model::Absent);
    let base = Arc::new(world.reader(1));
    for other in [geometry(11 * 4096, 4096), geometry(10 * 4096, 8192)] {
        let request = world.request(Some(&base));
        let session = world.repository.claim(&request, &world.random).unwrap();
        let words = words(&BlockSet::new(other.block_count()));
        let made = ImageWriter::new(session, other, Some(Arc::clone(&base)), &words);
        assert!(matches!(made, Err(ImageError::Misuse(_))));
    }
    let session = world
        .repository
        .claim(&world.request(None), &world.random)
        .unwrap();
    let made = ImageWriter::new(session, small, Some(base), &words(&all));
    assert!(matches!(made, Err(ImageError::Misuse(_))));
}
