//! What opening and reading cost.

use crate::ImageReader;
use crate::testing::{Model, VOLUME, World, geometry};
use blktide_repo::memory::Asked;
use blktide_repo::{RepoError, Repository, Which};
use blktide_testkit::seed::Seed;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;

/// Opens the newest image and reads one block, from nothing: what it asked of the store.
fn one_block(world: &World, block: u64) -> (Asked, Vec<u8>) {
    world.store.asked();
    let repository = Repository::open(Arc::new(world.store.clone())).unwrap();
    let newest = repository.latest(VOLUME).unwrap().unwrap();
    let reader = ImageReader::open(&repository, VOLUME, newest.head.sequence).unwrap();
    let range = BlockRange::new(BlockIndex(block), BlockIndex(block + 1)).unwrap();
    let mut buf = vec![0; 4096];
    reader.read_blocks(range, &mut buf).unwrap();
    (world.store.asked(), buf)
}

/// req A4: the newest of 1, 100 and 1000 incrementals opens, and gives a block, for the same number of objects and requests
/// and the same bytes: no chain is walked.
#[test]
fn the_cost_of_a_block_does_not_depend_on_history() {
    let seed = Seed::of_test("the_cost_of_a_block_does_not_depend_on_history");
    let blocks = 64 * 64 + 10;
    let geometry = geometry(blocks * 4096, 4096);
    let world = World::new(seed);
    let mut numbers = seed.numbers();
    let mut noise = |n: u8| {
        let mut bytes = vec![n; 4096];
        numbers.fill(&mut bytes[..64]);
        bytes
    };
    let first: Vec<Vec<u8>> = (0..blocks).map(|_| noise(1)).collect();
    let all = BlockSet::full(geometry.block_count());
    world.backup(geometry, None, (&all, 256), |b| {
        Model::Bytes(&first[usize::try_from(b.0).unwrap()])
    });
    let mut costs = Vec::new();
    for n in 1..=1000_u64 {
        // Never block 7: what is read at the end lies in the oldest pack, found by the newest map.
        let block = 8 + n * 37 % (blocks - 8);
        let mut wanted = BlockSet::new(geometry.block_count());
        wanted.insert(BlockIndex(block));
        let bytes = noise(2);
        let base = Arc::new(world.reader(n));
        world.backup(geometry, Some(base), (&wanted, 1), |_| Model::Bytes(&bytes));
        if [1, 100, 1000].contains(&n) {
            for (read, truth) in [(block, &bytes), (7, &first[7])] {
                let (asked, got) = one_block(&world, read);
                assert_eq!(&got, truth);
                println!("{n} incrementals: {asked:?}");
                costs.push((
                    asked.gets,
                    asked.objects.len(),
                    asked.lists,
                    asked.got_bytes,
                ));
            }
        }
    }
    let (gets, _, lists, bytes) = costs[0];
    for cost in &costs {
        // The repository's object, end and manifest; a page a level and a frame, each at most in a pack of its own.
        assert!(cost.0 == gets && cost.1 <= 3 + 3 + 1, "{costs:?}");
        // A frame of one block or of 16, a pack more in a page's list: no more than that.
        assert!(cost.2 == lists && cost.3 <= bytes + 6000, "{costs:?}");
    }
}

/// An image that cannot be read may be the newest: the one below it is not given in its stead, but by its number.
#[test]
fn the_newest_is_not_an_older_one() {
    let world = World::new(Seed::of_test("the_newest_is_not_an_older_one"));
    let geometry = geometry(64 * 4096, 4096);
    let all = BlockSet::full(geometry.block_count());
    let bytes = [1; 4096];
    for _ in 0..2 {
        world.backup(geometry, None, (&all, 64), |_| Model::Bytes(&bytes));
    }
    let store = world.repository.store();
    store
        .delete(&world.repository.manifest_name(VOLUME, 2))
        .unwrap();
    let resolve = |which| world.repository.resolve(None, "data", which);
    let newest = resolve(Which::Latest);
    assert!(matches!(newest, Err(RepoError::Damaged { .. })));
    assert_eq!(resolve(Which::Number(1)).unwrap().head.sequence, 1);
    world.backup(geometry, None, (&all, 64), |_| Model::Bytes(&bytes));
    assert_eq!(resolve(Which::Latest).unwrap().head.sequence, 3);
}
