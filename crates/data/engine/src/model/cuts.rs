//! Power cuts at every step: of a write, a preserve, a snapshot's begin and end, a stop and a start.
//!
//! Before each op, and before each disk operation of a hand-over, the power goes in every way that the disk allows (all
//! subsets of what is not synced, or a choice of them where there are many). What then starts must not believe a
//! bitmap that lacks a change.

use super::world::World;
use super::{Op, SLOTS, script};
use crate::broken::{Break, leave_out};
use blktide_format::shared::Shape;
use blktide_testkit::disk::SimDisk;
use blktide_testkit::seed::Seed;
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;

/// Two blocks, the second one short.
fn small() -> World {
    let size = BlockSize::IMAGE_MIN;
    let geometry = Geometry::new(4096 + 1024, size, size, 512, 512).unwrap();
    World::of_shape(Shape {
        queues: 2,
        slots: SLOTS,
        generations: 6,
        banks: 5,
        hints: 2,
        log_bytes: 8,
        ..Shape::usual(geometry)
    })
}

#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    believed: u64,
    images: u64,
}

fn cut_everywhere(
    world: &World,
    disk: &SimDisk,
    seed: Seed,
    tally: &mut Tally,
) -> Result<(), String> {
    for cut in disk.cuts(32, seed) {
        let survivor = world.survivor(disk.after(&cut));
        tally.cuts += 1;
        tally.believed += survivor.seen().believed;
        survivor
            .check()
            .map_err(|what| format!("{cut:?}: {what}"))?;
    }
    Ok(())
}

/// The ops of a seed, with more stops than usual, and no cut but ours.
fn ops(seed: Seed) -> Vec<Op> {
    let mut numbers = seed.nth(1).numbers();
    let mut ops = script(seed, 150);
    for op in &mut ops {
        *op = match numbers.below(100) {
            0..3 => Op::Stop,
            3..30 => Op::Work(numbers.next_u64()),
            30..40 => Op::Poll,
            40..44 => Op::Begin(0, 1 << 32 | 9, 1),
            _ if matches!(op, Op::Cut(_)) => Op::Stop,
            _ => *op,
        }
    }
    ops
}

fn run(seed: Seed, tally: &mut Tally) -> Result<(), String> {
    let mut world = small();
    for (i, op) in ops(seed).into_iter().enumerate() {
        let at = seed.nth(u64::try_from(i).unwrap());
        world.moments = Some(Vec::new());
        cut_everywhere(&world, &world.disk, at, tally)
            .map_err(|e| format!("before {op:?}: {e}"))?;
        let before = world.survivable();
        world.apply(op)?;
        for disk in world.moments.take().unwrap_or_default() {
            // Images are those of before: a hand-over commits none.
            cut_everywhere(&before, &disk, at, tally).map_err(|e| format!("within {op:?}: {e}"))?;
        }
    }
    tally.images += world.seen().incrementals + world.seen().fulls;
    Ok(())
}

/// req A5, X3, trap TB1, TB7: no believed bitmap lacks a change, wherever the power goes, whichever writes survive it.
#[test]
fn no_cut_makes_a_bitmap_believed_that_lacks_a_change() {
    let start = Seed::of_test("engine cuts");
    let mut tally = Tally::default();
    for n in 0..20 {
        let seed = start.nth(n);
        if let Err(what) = run(seed, &mut tally) {
            panic!("world {n} of {start}: {what}");
        }
    }
    println!("{tally:?}");
    assert!(
        tally.cuts > 20_000 && tally.believed > 100 && tally.images > 12,
        "{tally:?}"
    );
    assert!(tally.believed < tally.cuts / 4, "{tally:?}");
}

#[test]
fn a_file_that_is_not_consumed_is_found() {
    leave_out(Some(Break::FileKept));
    let start = Seed::of_test("engine cuts");
    let found = (0..20).find_map(|n| run(start.nth(n), &mut Tally::default()).err());
    leave_out(None);
    println!("{found:?}");
    assert!(found.is_some_and(|what| what.contains("is not reported")));
}
