//! Power cuts and failing operations at every step of a backup.

use super::disk::{Planted, store};
use crate::testing::{VOLUME, World, facts, geometry, request, words};
use crate::{Committed, Content, Depth, ImageError, ImageReader, ImageWriter, verify};
use blktide_format::manifest::ImageKind;
use blktide_repo::Repository;
use blktide_testkit::clock::TestRandom;
use blktide_testkit::disk::{Failure, Fault, SimDisk};
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::HostId;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;

/// Two blocks, so that a pack is a sector or two and every subset can be tried.
pub(super) fn shape() -> Geometry {
    geometry(2 * 4096, 4096)
}

/// The bytes of the volume at the instant of image `n`.
pub(super) fn truth(n: u8) -> Vec<u8> {
    let mut bytes = vec![7; 2 * 4096];
    bytes[4096..].fill(n);
    bytes
}

/// One backup of `truth(n)`, incremental if there is an image.
fn backup(repository: &Repository, n: u8) -> Result<Committed, ImageError> {
    let random = TestRandom::new(Seed(1000 + u64::from(n)));
    repository.abandon_dead(VOLUME, HostId([3; 16]), WallTime(1), &|_| false)?;
    let latest = repository.latest(VOLUME)?;
    let base_of = latest.as_ref().map(|e| (e.head.image, e.head.sequence));
    let session = repository.claim(&request(base_of), &random)?;
    let base = match &latest {
        Some(entry) => Some(Arc::new(ImageReader::open_base(repository, entry)?)),
        None => None,
    };
    let mut wanted = BlockSet::new(shape().block_count());
    wanted.insert(BlockIndex(1));
    let kind = if base.is_none() {
        wanted.insert(BlockIndex(0));
        ImageKind::Full
    } else {
        ImageKind::Incremental
    };
    let writer = ImageWriter::new(session, shape(), base, &words(&wanted))?;
    let volume = truth(n);
    let all = || -> Result<Committed, ImageError> {
        for block in wanted.blocks() {
            let at = usize::try_from(block.0).unwrap() * 4096;
            writer.put(&[(block, Content::Bytes(&volume[at..at + 4096]))])?;
        }
        writer.commit(&facts(kind, None))
    };
    all().inspect_err(|_| {
        // As a job does it; it may fail as well, and then the claim is open.
        drop(writer.abandon(WallTime(3)));
    })
}

/// Panics unless each image that is visible is whole, those in `sure` are there, and no bytes but those of a truth are read.
pub(super) fn check(repository: &Repository, sure: &[(u64, u8)], at: &str) {
    let listing = repository.images().unwrap();
    assert!(listing.damage.is_empty(), "{at}: {:?}", listing.damage);
    for (sequence, n) in sure {
        let is_there = listing.images.iter().any(|e| e.head.sequence == *sequence);
        assert!(is_there, "{at}: image {sequence} of {n} is gone");
    }
    for entry in &listing.images {
        let reader = ImageReader::open(repository, VOLUME, entry.head.sequence).unwrap();
        let mut buf = vec![0; 2 * 4096];
        reader
            .read_blocks(shape().all_blocks(), &mut buf)
            .unwrap_or_else(|e| panic!("{at}: image {}: {e}", entry.head.sequence));
        let known = sure.iter().find(|(s, _)| *s == entry.head.sequence);
        let fits = match known {
            Some((_, n)) => buf == truth(*n),
            None => (1..9).any(|n| buf == truth(n)),
        };
        assert!(fits, "{at}: image {} is of no instant", entry.head.sequence);
    }
    let proof = verify(repository, None, Depth::Data, 1, &|_| true).unwrap();
    assert!(proof.damage.is_empty(), "{at}: {:?}", proof.damage);
}

/// A disk with a repository and, if asked for, its first image, all of it durable.
fn prepared(seed: Seed, with_image: bool) -> Arc<SimDisk> {
    let disk = Arc::new(SimDisk::new());
    let random = TestRandom::new(seed);
    let folder = store(&disk, Planted::Nothing);
    let repository = Repository::init(Arc::new(folder), &random, WallTime(1)).unwrap();
    if with_image {
        backup(&repository, 1).unwrap();
    }
    assert_eq!(disk.pending(), 0, "nothing is left to chance");
    disk
}

fn open(disk: &Arc<SimDisk>, planted: Planted) -> Repository {
    Repository::open(Arc::new(store(disk, planted))).unwrap()
}

/// Cuts the power at every operation of a backup, with every subset of what was not synced; then checks, and backs up again.
/// Returns how many cuts were tried, or what was found.
fn cut_everywhere(planted: Planted, with_image: bool, limit: usize) -> Result<u64, String> {
    let seed = Seed::of_test("cut_everywhere");
    let start = prepared(seed, with_image);
    let sure: Vec<(u64, u8)> = if with_image { vec![(1, 1)] } else { Vec::new() };
    let mut cuts = 0;
    for operations in 0.. {
        let disk = Arc::new(start.fork());
        let repository = open(&disk, planted);
        disk.fail(Fault {
            kind: None,
            skip: operations,
            failure: Failure::Eio,
            sticky: true,
        });
        let done = backup(&repository, 2);
        let mut sure = sure.clone();
        sure.extend(done.as_ref().ok().map(|c| (c.head.sequence, 2)));
        for cut in disk.cuts(limit, seed.nth(operations)) {
            cuts += 1;
            let at = format!("{planted:?}, cut after {operations} operations, {cut:?}");
            let after = Arc::new(disk.after(&cut));
            let found = std::panic::catch_unwind(|| {
                let repository = open(&after, Planted::Nothing);
                check(&repository, &sure, &at);
                if cuts % 16 == 0 {
                    let again = backup(&repository, 3);
                    let sequence = again.map_or_else(
                        |e| panic!("{at}: the next backup fails: {e}"),
                        |c| c.head.sequence,
                    );
                    let mut sure = sure.clone();
                    sure.push((sequence, 3));
                    check(&repository, &sure, &at);
                }
            });
            if let Err(panic) = found {
                let text = panic.downcast_ref::<String>().cloned();
                return Err(text.unwrap_or_else(|| at.clone()));
            }
        }
        if done.is_ok() {
            return Ok(cuts);
        }
    }
    Err("a backup that never ends".to_owned())
}

/// req X4, trap TG1: power cuts at every step of the commit, with every subset of unsynced writes.
#[test]
fn no_cut_shows_half_an_image_or_loses_a_whole_one() {
    for with_image in [false, true] {
        let cuts = cut_everywhere(Planted::Nothing, with_image, 1 << 12).unwrap();
        println!("{cuts} cuts");
        assert!(cuts > 1000, "{cuts} cuts were tried");
    }
}

/// Each mistake in the order of writes and flushes is found by the same search.
#[test]
fn planted_faults_of_order_are_found() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let found: Vec<_> = [
        Planted::LinkBeforeSync,
        Planted::FolderNotSynced,
        Planted::ParentsNotSynced,
        Planted::PacksAfterEnd,
        Planted::ManifestAfterEnd,
    ]
    .into_iter()
    .map(|planted| (planted, cut_everywhere(planted, false, 64)))
    .collect();
    std::panic::set_hook(hook);
    for (planted, result) in found {
        println!("{planted:?}: {result:?}");
        assert!(result.is_err(), "{planted:?} was not found");
    }
}

/// trap TG1, TB5: every operation fails once, or from then on, in every way: an error or a whole image, and the next backup
/// works. What was said to be an image is one after a power cut.
#[test]
fn failing_operations_leave_nothing_half() {
    let seed = Seed::of_test("failing_operations_leave_nothing_half");
    let start = prepared(seed, true);
    for failure in [
        Failure::Eio,
        Failure::Enospc,
        Failure::LateEio,
        Failure::Short(100),
    ] {
        for sticky in [false, true] {
            for operations in 0..200 {
                let disk = Arc::new(start.fork());
                let repository = open(&disk, Planted::Nothing);
                disk.fail(Fault {
                    kind: None,
                    skip: operations,
                    failure,
                    sticky,
                });
                let done = backup(&repository, 2);
                if let (Err(ImageError::Repository(e)), Failure::Enospc, true) =
                    (&done, failure, sticky)
                {
                    assert!(e.is_full() || !e.is_unreachable(), "{e:?}");
                }
                disk.heal();
                let at = format!("{failure:?} {sticky} at {operations}");
                let mut sure = vec![(1, 1)];
                sure.extend(done.as_ref().ok().map(|c| (c.head.sequence, 2)));
                check(&open(&disk, Planted::Nothing), &sure, &at);
                for cut in disk.cuts(8, seed.nth(operations)) {
                    let after = Arc::new(disk.after(&cut));
                    check(
                        &open(&after, Planted::Nothing),
                        &sure,
                        &format!("{at}, {cut:?}"),
                    );
                }
                let repository = open(&disk, Planted::Nothing);
                let again = backup(&repository, 3).unwrap();
                sure.push((again.head.sequence, 3));
                check(&repository, &sure, &at);
                if done.is_ok() && operations > disk.operations() {
                    break;
                }
            }
        }
    }
}

#[test]
fn the_world_of_these_tests_is_the_one_of_the_others() {
    let world = World::new(Seed::of_test("the_world_of_these_tests"));
    let first = backup(&world.repository, 1).unwrap();
    let second = backup(&world.repository, 2).unwrap();
    check(
        &world.repository,
        &[(first.head.sequence, 1), (second.head.sequence, 2)],
        "plain",
    );
    assert_eq!(second.head.base, Some((first.head.image, 1)));
}
