//! Images of blocks that were stored early, against images that were written directly, and against a plain model.

use super::{EarlyBlocks, EarlyWriter};
use crate::testing::{
    Model, VOLUME, World, bytes_of, content, facts, geometry, put_all, times, words,
};
use crate::verify::{Depth, verify};
use crate::writer::tests::{Truth, check_packs};
use crate::{Content, ImageError, ImageReader, ImageWriter};
use blktide_format::manifest::ImageKind;
use blktide_repo::Session;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file without a name.
fn spool() -> File {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "blktide-spool-{}-{}",
        std::process::id(),
        MADE.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::path::Path::new("/var/tmp").join(name);
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    std::fs::remove_file(&path).unwrap();
    file.unwrap()
}

fn claim(world: &World, base: Option<&ImageReader>) -> Session {
    let request = world.request(base);
    world.repository.claim(&request, &world.random).unwrap()
}

fn some(geometry: Geometry, numbers: &mut Numbers, runs: u64) -> BlockSet {
    let mut set = BlockSet::new(geometry.block_count());
    for _ in 0..numbers.below(runs) {
        let start = numbers.below(geometry.block_count().0);
        let log = numbers.below(9);
        let end = (start + 1 + numbers.below(1 << log)).min(geometry.block_count().0);
        set.insert_range(BlockRange::new(BlockIndex(start), BlockIndex(end)).unwrap());
    }
    set
}

fn clean(world: &World, note: &str) {
    let proof = verify(&world.repository, None, Depth::Data, 2, &|_| true).unwrap();
    assert_eq!(proof.damage, [], "{note}");
    assert!(proof.is_complete, "{note}");
}

/// Puts `set` as `truth` has it: in pieces, in any order.
fn put_early(early: &EarlyWriter<'_>, truth: &Truth, set: &BlockSet, numbers: &mut Numbers) {
    let blocks: Vec<_> = set.blocks().collect();
    let mut parts: Vec<_> = blocks.chunks(1 + numbers.index(100)).collect();
    numbers.shuffle(&mut parts);
    for part in parts {
        let contents: Vec<_> = part
            .iter()
            .map(|b| (*b, content(truth.model(*b))))
            .collect();
        early.put(&contents).unwrap();
    }
}

/// Random histories: each image is made twice on the same base, once of blocks stored early in several rounds, and is the same
/// image both times, the model of its instant, and proven whole.
#[test]
fn what_is_kept_is_as_if_put() {
    let seed = Seed::of_test("what_is_kept_is_as_if_put");
    for n in 0..times(12) {
        let seed = seed.nth(n);
        let note = format!("world {n}, {seed}");
        let mut numbers = seed.numbers();
        let block_bytes = 4096 << numbers.below(5);
        let blocks = [1, 63, 64, 65, 130, 700, 4097][numbers.index(7)];
        let bytes = blocks * block_bytes - numbers.below(8) * 512;
        let geometry = geometry(bytes, u32::try_from(block_bytes).unwrap());
        let world = World::new(seed);
        let mut truth = Truth::new(geometry);
        let mut base: Option<Arc<ImageReader>> = None;
        for _ in 0..3 {
            let session = claim(&world, base.as_deref());
            let early = EarlyWriter::new(&session, geometry, spool());
            let mut copied = BlockSet::new(geometry.block_count());
            let mut now = truth.clone();
            for _ in 0..=numbers.below(4) {
                let round = some(geometry, &mut numbers, 30);
                for block in round.blocks() {
                    now.set(block, &mut numbers);
                }
                put_early(&early, &now, &round, &mut numbers);
                copied.union_with(&round);
            }
            let early = early.finish().unwrap();
            let wanted = some(geometry, &mut numbers, 40);
            let mut kept = BlockSet::new(geometry.block_count());
            for block in wanted.blocks() {
                if copied.contains(block) && numbers.chance(3, 4) {
                    kept.insert(block);
                } else {
                    now.set(block, &mut numbers);
                }
                let at = usize::try_from(block.0).unwrap();
                truth.blocks[at] = now.blocks[at].clone();
            }
            let writer =
                ImageWriter::new(session, geometry, base.clone(), &words(&wanted)).unwrap();
            let mut rest = wanted.clone();
            rest.subtract(&kept);
            let first = numbers.chance(1, 2);
            if first {
                put_all(&writer, &rest, 50, |b| truth.model(b));
            }
            let mut done = 0;
            let step = 1 + numbers.below(200);
            for start in (0..blocks).step_by(usize::try_from(step).unwrap()) {
                let end = BlockIndex((start + step).min(blocks));
                let range = BlockRange::new(BlockIndex(start), end).unwrap();
                done += writer.keep(&early, &kept, range).unwrap().0;
            }
            assert_eq!(done, kept.count().0, "{note}");
            if !first {
                put_all(&writer, &rest, 50, |b| truth.model(b));
            }
            let made = writer
                .commit(&facts(ImageKind::Full, Some(wanted.clone())))
                .unwrap();
            let direct = world.backup(geometry, base.clone(), (&wanted, 64), |b| truth.model(b));
            assert_eq!(made.head.state, direct.head.state, "{note}");
            assert_eq!(made.head.kinds, direct.head.kinds, "{note}");
            let reader = world.reader(made.head.sequence);
            truth.check(&reader);
            check_packs(&reader);
            clean(&world, &note);
            base = Some(Arc::new(reader));
        }
    }
}

/// Several threads in each round, and several that keep: the same state as one thread that puts.
#[test]
fn threads_keep_the_same_tree() {
    const BLOCKS: u64 = 3000;
    let seed = Seed::of_test("threads_keep_the_same_tree");
    let geometry = geometry(BLOCKS * 4096, 4096);
    let world = World::new(seed);
    let volume = noise(usize::try_from(BLOCKS).unwrap() * 4096, seed);
    let before = noise(volume.len(), seed.nth(1));
    let all = BlockSet::full(geometry.block_count());
    let one = world.backup(geometry, None, (&all, 64), |b| {
        Model::Bytes(bytes_of(geometry, &volume, b))
    });
    let session = claim(&world, None);
    let early = EarlyWriter::new(&session, geometry, spool());
    let in_pieces = |piece: u64, each: &(dyn Fn(BlockRange) + Sync)| {
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let start = next.fetch_add(piece, Ordering::Relaxed);
                        let end = BlockIndex((start + piece).min(BLOCKS));
                        match BlockRange::new(BlockIndex(start), end).filter(|r| r.count().0 > 0) {
                            Some(range) => each(range),
                            None => return,
                        }
                    }
                });
            }
        });
    };
    for bytes in [&before, &volume] {
        in_pieces(48, &|range| {
            let blocks: Vec<_> = range
                .blocks()
                .map(|b| (b, Content::Bytes(bytes_of(geometry, bytes, b))))
                .collect();
            early.put(&blocks).unwrap();
        });
    }
    let early = early.finish().unwrap();
    let writer = ImageWriter::new(session, geometry, None, &words(&all)).unwrap();
    in_pieces(64, &|range| {
        let kept = writer.keep(&early, &all, range).unwrap();
        assert_eq!(kept, range.count());
    });
    let many = writer.commit(&facts(ImageKind::Full, None)).unwrap();
    assert_eq!(many.head.state, one.head.state);
    check_packs(&world.reader(many.head.sequence));
    clean(&world, "threads");
}

/// A pack of which nothing is kept is in no table, and nothing is wrong with it or without it.
#[test]
fn a_pack_that_is_not_used_is_in_no_table() {
    let seed = Seed::of_test("a_pack_that_is_not_used");
    let geometry = geometry(34 << 20, 1 << 20);
    let world = World::new(seed);
    let volume = noise(34 << 20, seed);
    let session = claim(&world, None);
    let early = EarlyWriter::new(&session, geometry, spool());
    let short = vec![7; 1 << 20];
    for block in geometry.all_blocks().blocks() {
        let bytes = Content::Bytes(bytes_of(geometry, &volume, block));
        early.put(&[(block, bytes)]).unwrap();
    }
    for block in geometry.all_blocks().blocks() {
        early.put(&[(block, Content::Bytes(&short))]).unwrap();
    }
    let early = early.finish().unwrap();
    let all = BlockSet::full(geometry.block_count());
    let writer = ImageWriter::new(session, geometry, None, &words(&all)).unwrap();
    writer.keep(&early, &all, geometry.all_blocks()).unwrap();
    let made = writer.commit(&facts(ImageKind::Full, None)).unwrap();
    let reader = world.reader(made.head.sequence);
    check_packs(&reader);
    let packs = world
        .repository
        .packs_of(VOLUME, reader.head().session)
        .unwrap();
    assert_eq!(packs.len(), 2);
    assert_eq!(reader.packs().unwrap().len(), 1, "one of them is used");
    clean(&world, "with the unused pack");
    let used = reader.packs().unwrap()[0].pack;
    let unused = packs.into_iter().find(|pack| *pack != used).unwrap();
    world
        .store
        .put(&blktide_repo::name::pack(VOLUME, unused), None);
    clean(&world, "without it");
}

/// Three blocks of three leaves, two of them wanted.
struct Small {
    world: World,
    geometry: Geometry,
    wanted: BlockSet,
}

const BLOCK: [u8; 4096] = [9; 4096];

fn small(name: &str) -> Small {
    let geometry = geometry(200 * 4096 - 512, 4096);
    let mut wanted = BlockSet::new(geometry.block_count());
    wanted.insert(BlockIndex(3));
    wanted.insert(BlockIndex(199));
    Small {
        world: World::new(Seed::of_test(name)),
        geometry,
        wanted,
    }
}

impl Small {
    /// With blocks 3, 70 and 199 stored early, and the file that says so.
    fn early(&self) -> (ImageWriter, EarlyBlocks, File) {
        let session = claim(&self.world, None);
        let file = spool();
        let early = EarlyWriter::new(&session, self.geometry, file.try_clone().unwrap());
        for block in [3, 70, 199] {
            early
                .put(&[(BlockIndex(block), Content::Bytes(&BLOCK))])
                .unwrap();
        }
        let early = early.finish().unwrap();
        let writer = ImageWriter::new(session, self.geometry, None, &words(&self.wanted)).unwrap();
        (writer, early, file)
    }

    /// No image, and no pack of it.
    fn gone(&self, writer: &ImageWriter) {
        writer.commit(&facts(ImageKind::Full, None)).unwrap_err();
        assert!(writer.abandon(WallTime(1)).unwrap());
        let session = writer.session().facts().session;
        assert_eq!(self.world.repository.packs_of(VOLUME, session).unwrap(), []);
        assert_eq!(self.world.repository.latest(VOLUME).unwrap(), None);
    }
}

/// What was put early is in no image unless it is kept.
#[test]
fn what_is_not_kept_is_missing() {
    let small = small("what_is_not_kept_is_missing");
    let (writer, early, _file) = small.early();
    let first = BlockRange::new(BlockIndex(0), BlockIndex(64)).unwrap();
    assert_eq!(writer.keep(&early, &small.wanted, first).unwrap().0, 1);
    let short = writer.commit(&facts(ImageKind::Full, None));
    assert!(matches!(short, Err(ImageError::Incomplete { missing: 1 })));
    writer
        .keep(
            &early,
            &small.wanted,
            BlockRange::new(BlockIndex(64), BlockIndex(200)).unwrap(),
        )
        .unwrap();
    let made = writer.commit(&facts(ImageKind::Full, None)).unwrap();
    assert_eq!(made.head.kinds.data, 2);
    clean(&small.world, "complete");
}

/// Never put, not wanted, kept twice, kept and put, of another session, past the end: refused, and no image comes of it.
#[test]
fn keeping_what_cannot_be_kept_is_refused() {
    type Mistake<'a> = (&'a str, Box<dyn Fn(&ImageWriter, &EarlyBlocks) -> bool>);
    let small = small("keeping_what_cannot_be_kept");
    let all = small.geometry.all_blocks();
    let of = move |blocks: &[u64]| {
        let mut set = BlockSet::new(all.count());
        for block in blocks {
            set.insert(BlockIndex(*block));
        }
        set
    };
    let misused = |result| matches!(result, Err(ImageError::Misuse(_)));
    let (_, other, _file) = small.early();
    let mistakes: Vec<Mistake<'_>> = vec![
        (
            "not wanted",
            Box::new(move |writer, early| misused(writer.keep(early, &of(&[70]), all))),
        ),
        (
            "kept twice",
            Box::new(move |writer, early| {
                writer.keep(early, &of(&[3]), all).unwrap();
                misused(writer.keep(early, &of(&[3]), all))
            }),
        ),
        (
            "put and kept",
            Box::new(move |writer, early| {
                writer
                    .put(&[(BlockIndex(199), Content::Unreadable)])
                    .unwrap();
                misused(writer.keep(early, &of(&[199]), all))
            }),
        ),
        (
            "of another session",
            Box::new(move |writer, _| misused(writer.keep(&other, &of(&[3]), all))),
        ),
    ];
    for (what, is_refused) in mistakes {
        let (writer, early, _file) = small.early();
        assert!(is_refused(&writer, &early), "{what}");
        small.gone(&writer);
    }
    let session = claim(&small.world, None);
    let early = EarlyWriter::new(&session, small.geometry, spool());
    assert!(matches!(
        early.put(&[(BlockIndex(200), Content::Bytes(&BLOCK))]),
        Err(ImageError::Misuse(_))
    ));
    early.put(&[(BlockIndex(4), Content::Unreadable)]).unwrap();
    let early = early.finish().unwrap();
    let words = words(&small.wanted);
    let writer = ImageWriter::new(session, small.geometry, None, &words).unwrap();
    let never_put = writer.keep(&early, &small.wanted, all);
    assert!(matches!(never_put, Err(ImageError::Misuse(_))));
    small.gone(&writer);
}

/// A spool that is cut, or of which any one byte is another, is an error and never an image.
#[test]
fn a_spool_that_is_not_as_written_is_an_error() {
    let small = small("a_spool_that_is_not_as_written");
    let (_, _, file) = small.early();
    let bytes = file.metadata().unwrap().len();
    let all = small.geometry.all_blocks();
    for at in (0..bytes).step_by(7).chain([bytes - 1]) {
        for is_cut in [true, false] {
            let (writer, early, file) = small.early();
            if is_cut {
                file.set_len(at).unwrap();
            } else {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
            }
            // Blocks 3, 70 and 199: all that is in the spool.
            let read = [(0, 1 << 3), (1, 1 << 6), (3, 1 << 7)]
                .into_iter()
                .try_for_each(|(leaf, mask)| early.of_leaf(leaf, mask).map(drop));
            let Err(ImageError::Spool { op: "read", source }) = read else {
                panic!("at {at}: {read:?}");
            };
            let expected = [io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData];
            assert!(expected.contains(&source.kind()), "at {at}: {source:?}");
            let kept = writer.keep(&early, &small.wanted, all);
            // Block 199 is the last one's in the file; 70, between them, is not wanted.
            assert!(kept.is_err() || !is_cut, "at {at}");
            if kept.is_err() {
                small.gone(&writer);
            }
        }
    }
}

/// A spool without room: the error is the system's, and it stays one.
#[test]
fn a_spool_without_room_is_an_error_for_good() {
    let small = small("a_spool_without_room");
    let session = claim(&small.world, None);
    let mut options = File::options();
    let full = options.read(true).write(true).open("/dev/full").unwrap();
    let early = EarlyWriter::new(&session, small.geometry, full);
    let put = || early.put(&[(BlockIndex(3), Content::Bytes(&BLOCK))]);
    let Err(ImageError::Spool {
        op: "written",
        source,
    }) = put()
    else {
        panic!("written to a full disk");
    };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    assert!(matches!(put(), Err(ImageError::Spool { .. })));
    assert!(matches!(early.finish(), Err(ImageError::Spool { .. })));
    assert!(session.abandon(WallTime(1)).unwrap());
}
