//! Marks and tables against plain numbers.

use super::*;
use crate::PlainMemory;
use crate::atomic::Memory;
use blktide_format::shared::Shape;
use blktide_testkit::seed::Seed;
use blktide_types::unit::BlockSize;
use std::collections::BTreeSet;
use std::sync::Arc;

fn marks(geometry: Geometry) -> (Marks, Words) {
    let memory: Arc<dyn Memory> = PlainMemory::new(1 + index(geometry.grain_count().div_ceil(64)));
    let epoch = Words::new(&memory, 0, 1).unwrap();
    let bank = Words::new(&memory, 1, memory.words().len() - 1).unwrap();
    (Marks::new(epoch, Box::new([bank.clone()]), geometry), bank)
}

/// req A5, trap TA7, TA8, TA9, TA11: each byte of a range lies in a marked grain and in a marked block, and nothing else
/// is marked, for every size of block and grain, with an odd end.
#[test]
fn marks_are_those_of_plain_division() {
    let start = Seed::of_test("marks");
    let mut numbers = start.numbers();
    for _ in 0..3000 {
        let block = BlockSize::from_shift(12 + u8::try_from(numbers.below(9)).unwrap()).unwrap();
        let grain = 9 + u8::try_from(numbers.below(u64::from(block.shift()) - 8)).unwrap();
        let grain = BlockSize::from_shift(grain).unwrap();
        let bytes = (numbers.below(40) * block.bytes_u64() + 512 * numbers.below(40)).max(512);
        let geometry = Geometry::new(bytes, block, grain, 512, 4096).unwrap();
        let (marks, bank) = marks(geometry);
        let (mut grains, mut blocks) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..numbers.below(4) {
            let offset = numbers.below(bytes / 512) * 512;
            let len = 1 + numbers.below(bytes - offset);
            marks.mark(marks.epoch(), offset, len);
            grains.extend(offset / grain.bytes_u64()..=(offset + len - 1) / grain.bytes_u64());
            blocks.extend(offset / block.bytes_u64()..=(offset + len - 1) / block.bytes_u64());
        }
        let marked: BTreeSet<u64> = (0..geometry.grain_count())
            .filter(|g| any_bit(bank.all(), *g, g + 1))
            .collect();
        assert_eq!(marked, grains, "{start} {geometry:?}");
        let found: BTreeSet<u64> = marked_blocks(&geometry, bank.all())
            .blocks()
            .map(|b| b.0)
            .collect();
        assert_eq!(found, blocks, "{start} {geometry:?}");
        for b in 0..geometry.block_count().0 {
            let one = block_marked(&geometry, bank.all(), BlockIndex(b));
            assert_eq!(one, blocks.contains(&b), "{start} {geometry:?} {b}");
        }
    }
}

/// trap TA9: no overflow at 64 TiB.
#[test]
fn the_last_sector_of_64_tib_is_marked() {
    let bytes = 64_u64 << 40;
    let grain = BlockSize::MAX;
    let geometry = Geometry::new(bytes, grain, grain, 512, 4096).unwrap();
    let (marks, bank) = marks(geometry);
    marks.mark(marks.epoch(), bytes - 512, 512);
    assert!(any_bit(bank.all(), (64 << 20) - 1, 64 << 20));
    assert_eq!(marked_blocks(&geometry, bank.all()).count().0, 1);
}

/// A write that ends past the end marks up to the end and touches nothing else.
#[test]
fn nothing_is_marked_past_the_end() {
    let size = BlockSize::IMAGE_MIN;
    let geometry = Geometry::new(3 * 4096, size, size, 512, 512).unwrap();
    let (marks, bank) = marks(geometry);
    marks.mark(marks.epoch(), 4096, u64::MAX);
    assert_eq!(bank.load(0, Ordering::Relaxed), 0b110);
    marks.mark(marks.epoch(), u64::MAX, 512);
    assert_eq!(bank.load(0, Ordering::Relaxed), 0b110);
}

#[test]
fn an_epoch_is_its_parts() {
    let epoch = Epoch::new(11, 1, true, 1 << 40);
    assert_eq!(
        (
            epoch.bank(),
            epoch.table(),
            epoch.snapshot(),
            epoch.sequence()
        ),
        (11, 1, Some(1 << 40), 1 << 40)
    );
    assert_eq!(Epoch::new(0, 0, false, 7).snapshot(), None);
}

/// Each flipped bit of a table makes it no table (or leaves it alone, where no entry reaches).
#[test]
fn a_table_with_a_flipped_bit_is_none() {
    let size = BlockSize::IMAGE_MIN;
    let shape = Shape::usual(Geometry::new(1 << 20, size, size, 512, 512).unwrap());
    let memory: Arc<dyn Memory> = PlainMemory::new(shape.table_words());
    let words = Words::new(&memory, 0, shape.table_words()).unwrap();
    let list: Vec<_> = (1..4)
        .map(|n| Generation {
            name: GenerationName([n; 16]),
            counter: u64::from(n),
            opened: WallTime(-i64::from(n)),
            bank: usize::from(n),
        })
        .collect();
    store_table(&words, &list);
    assert_eq!(load_table(&words, 12).as_ref(), Some(&list));
    assert_eq!(load_table(&words, 3), None, "a bank that does not exist");
    for word in [0, 1]
        .into_iter()
        .chain(table::WORDS..table::WORDS + 3 * generation::WORDS)
    {
        for bit in 0..64 {
            let was = words.load(word, Ordering::Relaxed);
            words.store(word, was ^ 1 << bit, Ordering::Relaxed);
            assert_eq!(load_table(&words, 12), None, "word {word}, bit {bit}");
            words.store(word, was, Ordering::Relaxed);
        }
    }
    let [low, high] = halves(GenerationName(*b"0123456789abcdef"));
    assert_eq!(name_of(low, high), GenerationName(*b"0123456789abcdef"));
}
