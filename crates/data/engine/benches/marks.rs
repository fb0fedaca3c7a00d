//! What marking and the fast path cost: `cargo bench -p blktide-engine`. Prints; asserts nothing about time.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "a bench: it prints what it measured with the real clock"
)]

use blktide_engine::tracker::marked_blocks;
use blktide_engine::{Actions, Engine, Event, Memory, Operation, PlainMemory, Request};
use blktide_format::shared::Shape;
use blktide_types::clock::{Instant, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::unit::BlockSize;
use std::hint::black_box;
use std::sync::Arc;

/// Runs `step` some times and prints nanoseconds a unit.
fn time(what: &str, units: u64, rounds: u64, mut step: impl FnMut(u64)) {
    let start = std::time::Instant::now();
    for round in 0..rounds {
        step(round);
    }
    let nanos = start.elapsed().as_nanos() as f64;
    println!("{what}: {:.2} ns", nanos / (units * rounds) as f64);
}

fn main() {
    let bytes = 1_u64 << 40;
    let (block, grain) = (BlockSize::DEFAULT, BlockSize::IMAGE_MIN);
    let shape = Shape::usual(Geometry::new(bytes, block, grain, 512, 4096).unwrap());
    let control: Arc<dyn Memory> = PlainMemory::new(shape.control_words());
    let banks: Arc<dyn Memory> = PlainMemory::new(shape.banks_words());
    let engine = Engine::create(&control, &banks, shape).unwrap();
    let mut side = engine.control();
    side.begin_life(&[], (GenerationName([1; 16]), WallTime(0)))
        .unwrap();
    let mut queue = engine.queue(0).unwrap();
    let (mut request, mut actions) = (Request::new(), Actions::new());
    let mut write = |offset, len| {
        let operation = Operation::Write {
            offset,
            len,
            durable: false,
        };
        for event in [Event::Start(operation), Event::Performed(Ok(len))] {
            request.step(&mut queue, event, Instant(0), &mut actions);
            black_box(actions.drain().count());
        }
    };
    let spread = |round: u64| (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (bytes >> 20)) << 20;
    time(
        "4 KiB write, bit clear, whole life of a request",
        1,
        1 << 18,
        |r| {
            write(spread(r), 4096);
        },
    );
    time(
        "4 KiB write, bit set, whole life of a request",
        1,
        1 << 20,
        |r| {
            write(spread(r % 4096), 4096);
        },
    );
    time("256 KiB write, bits set", 1, 1 << 20, |r| {
        write(spread(r % 4096), 256 << 10);
    });
    let grains = (64 << 20) / grain.bytes_u64();
    time("64 MiB of marks at once, a bit", grains, 1 << 12, |r| {
        write(spread(r) & !((64 << 20) - 1), 64 << 20);
    });
    let bank = banks.words().get(..shape.bank_bit_words()).unwrap();
    time(
        "blocks of a bank of 1 TiB, a grain",
        shape.geometry.grain_count(),
        2,
        |_| {
            black_box(marked_blocks(&shape.geometry, bank).count());
        },
    );
}
