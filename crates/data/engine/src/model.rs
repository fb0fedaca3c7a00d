//! The engine against a volume that cannot be wrong: random operations, every step compared.
//!
//! A run is a list of [`Op`]s made from a seed. Each op can be interpreted in every state, so a list that fails can be
//! shortened by leaving ops out until each one that is left is needed.
//!
//! The oracle is `testkit`'s reference volume: a plain `Vec<u8>`. After each op: every block of the device that differs
//! from a repository's newest image must be in what the tracker calls changed since; every committed image must
//! equal the copy of the volume that was made at its instant; every read must give what was written.

mod backup;
mod cuts;
mod folder;
mod server;
mod tests;
mod world;

use crate::PlainMemory;
use crate::atomic::Memory;
use crate::request::Operation;
use backup::Image;
use blktide_format::shared::Shape;
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::geometry::Geometry;
use blktide_types::id::RepositoryId;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex, BlockSize};
use server::Memories;
use std::sync::Arc;
use world::World;

/// Request slots of a world, of both queues.
const SLOTS: usize = 6;

/// One step of the world. Numbers are reduced to what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// A request arrives: slot, first sector, sectors.
    Write(u64, u64, u64),
    /// The same, with zeroes; every second one keeps the space.
    Zero(u64, u64, u64),
    /// A read.
    Read(u64, u64, u64),
    /// A flush.
    Flush(u64),
    /// One I/O under way goes one step further: landing half, landing whole.
    Land(u64),
    /// One I/O under way ends short.
    Short(u64),
    /// One I/O under way fails.
    Fail(u64),
    /// One I/O never ends until the server dies (time passes over it).
    Pass(u64),
    /// A request that waits outside looks again.
    Again(u64),
    /// A backup into a repository begins: repository, save slots, policy.
    Begin(u64, u64, u64),
    /// The control side goes on with its hold.
    Poll,
    /// A worker of the backup goes one step further.
    Work(u64),
    /// The backup drops a block.
    Shrink(u64),
    /// The backup is cancelled by its job.
    Cancel,
    /// The server revokes the snapshot.
    Revoke,
    /// The server dies; a successor takes over.
    Kill,
    /// The power goes: what was not flushed survives by coin.
    Cut(u64),
    /// Everything is stopped in order, and started again.
    Stop,
    /// The tracker is distrusted.
    Distrust,
    /// A repository's hint is forgotten.
    LoseHint(u64),
    /// A repository is put back to its older image.
    RollBack(u64),
    /// Servers died too often: everything passes through, then tracking begins anew.
    PassThrough,
}

/// The ops of a seed.
pub(crate) fn script(seed: Seed, len: usize) -> Vec<Op> {
    let mut numbers = seed.numbers();
    (0..len).map(|_| draw(&mut numbers)).collect()
}

type Make = fn(u64, u64, u64) -> Op;

fn draw(n: &mut Numbers) -> Op {
    let (a, b, c) = (n.next_u64(), n.next_u64(), n.next_u64());
    let mut dice = n.below(10_000);
    let table: [(u64, Make); 21] = [
        (1500, |a, b, c| Op::Write(a, b, c)),
        (250, |a, b, c| Op::Zero(a, b, c)),
        (200, |a, b, c| Op::Read(a, b, c)),
        (100, |a, _, _| Op::Flush(a)),
        (2800, |a, _, _| Op::Land(a)),
        (60, |a, _, _| Op::Short(a)),
        (8, |a, _, _| Op::Fail(a)),
        (10, |a, _, _| Op::Pass(a)),
        (300, |a, _, _| Op::Again(a)),
        (500, |a, b, c| Op::Begin(a, b, c)),
        (900, |_, _, _| Op::Poll),
        (60, |a, _, _| Op::Shrink(a)),
        (15, |_, _, _| Op::Cancel),
        (8, |_, _, _| Op::Revoke),
        (8, |_, _, _| Op::Kill),
        (2, |a, _, _| Op::Cut(a)),
        (6, |_, _, _| Op::Stop),
        (2, |_, _, _| Op::Distrust),
        (15, |a, _, _| Op::LoseHint(a)),
        (15, |a, _, _| Op::RollBack(a)),
        (2, |_, _, _| Op::PassThrough),
    ];
    for (weight, make) in table {
        if dice < weight {
            return make(a, b, c);
        }
        dice -= weight;
    }
    Op::Work(a)
}

/// What a run has seen: a test asks that everything happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) ops: u64,
    pub(crate) completed: u64,
    pub(crate) incrementals: u64,
    pub(crate) fulls: u64,
    pub(crate) given_up: u64,
    pub(crate) preserved: u64,
    pub(crate) waited: u64,
    pub(crate) taken_over: u64,
    pub(crate) cuts: u64,
    pub(crate) stops: u64,
    pub(crate) unknown: u64,
    pub(crate) believed: u64,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.ops += other.ops;
        self.completed += other.completed;
        self.incrementals += other.incrementals;
        self.fulls += other.fulls;
        self.given_up += other.given_up;
        self.preserved += other.preserved;
        self.waited += other.waited;
        self.taken_over += other.taken_over;
        self.cuts += other.cuts;
        self.stops += other.stops;
        self.unknown += other.unknown;
        self.believed += other.believed;
    }
}

/// Runs `ops` in the world of `seed`; the violation, if there is one, and after how many ops.
pub(crate) fn run(seed: Seed, ops: &[Op]) -> Result<Seen, (usize, String)> {
    let mut world = World::new(seed);
    for (i, op) in ops.iter().enumerate() {
        world.apply(*op).map_err(|what| (i + 1, what))?;
    }
    world.finish().map_err(|what| (ops.len(), what))?;
    Ok(world.seen())
}

/// A failing list with everything left out that is not needed to fail.
pub(crate) fn shrink(seed: Seed, ops: &[Op], failed_after: usize) -> Vec<Op> {
    let mut ops = ops[..failed_after.min(ops.len())].to_vec();
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 {
        let mut start = 0;
        while start < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(start..(start + chunk).min(ops.len()));
            match run(seed, &fewer) {
                Err((after, _)) => {
                    fewer.truncate(after);
                    ops = fewer;
                }
                Ok(_) => start += chunk,
            }
        }
        chunk /= 2;
    }
    ops
}

fn shape_of(seed: Seed) -> Shape {
    let mut numbers = seed.numbers();
    let block = BlockSize::from_shift(*numbers.pick(&[12, 12, 13])).unwrap();
    let grain = *numbers.pick(&[9_u8, 11, 12]);
    let grain = BlockSize::from_shift(grain.min(block.shift())).unwrap();
    let bytes = block.bytes_u64() * (6 + numbers.below(8)) + 512 * numbers.below(8);
    Shape {
        queues: 2,
        slots: SLOTS,
        generations: 12,
        banks: 5,
        hints: 2,
        log_bytes: 8,
        ..Shape::usual(Geometry::new(bytes, block, grain, 512, 4096).unwrap())
    }
}

fn fresh_memories(shape: &Shape) -> Memories {
    let control: Arc<dyn Memory> = PlainMemory::new(shape.control_words());
    let banks: Arc<dyn Memory> = PlainMemory::new(shape.banks_words());
    (control, banks)
}

fn absent_of(image: &Image) -> BlockSet {
    let mut set = BlockSet::new(BlockCount(u64::try_from(image.blocks.len()).unwrap()));
    for (i, block) in (0_u64..).zip(&image.blocks) {
        if block.is_none() {
            set.insert(BlockIndex(i));
        }
    }
    set
}

fn repository_id(repository: usize) -> RepositoryId {
    let [low, ..] = repository.to_le_bytes();
    RepositoryId([low + 1; 16])
}

fn span(operation: Operation) -> (u64, u64) {
    match operation {
        Operation::Read { offset, len }
        | Operation::Write { offset, len, .. }
        | Operation::Zero { offset, len, .. } => (offset, len),
        Operation::Flush => (0, 0),
    }
}

fn pick(n: u64, out_of: usize) -> usize {
    usize::try_from(n % u64::try_from(out_of.max(1)).unwrap()).unwrap()
}
