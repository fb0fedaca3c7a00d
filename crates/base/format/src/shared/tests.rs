//! The layout of the shared memory against a golden head, and against heads that lie.

use super::*;

fn shape() -> Shape {
    let geometry = Geometry::new(
        (1 << 30) + 512 * 7,
        BlockSize::DEFAULT,
        BlockSize::IMAGE_MIN,
        512,
        4096,
    );
    Shape::usual(geometry.unwrap())
}

fn head(shape: &Shape) -> Vec<u64> {
    let mut words = vec![0; control::WORDS];
    for (index, value) in shape.head() {
        words[index] = value;
    }
    words
}

/// The golden file was made by `golden/control_head.py`, which shares no line with this crate.
#[test]
fn the_control_head_is_the_golden_one() {
    let golden = include_bytes!("../../golden/v1/control_head.bin");
    let words: Vec<u64> = golden
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
        .collect();
    assert_eq!(words, head(&shape()));
    assert_eq!(Shape::of_head(|i| words[i]), Ok(shape()));
}

#[test]
fn regions_do_not_overlap() {
    let s = shape();
    assert_eq!(s.queue(0), 128);
    assert_eq!(s.table(0), 128 + 32);
    assert_eq!(s.table(1), 160 + 8 + 64 * 8);
    assert_eq!(s.hint(0), s.table(1) + 520);
    assert_eq!(s.log(), s.hint(0) + 64);
    assert!(s.control_words() * 8 >= s.log() * 8 + s.log_bytes);
    assert_eq!(s.bank_words() % PAGE_WORDS, 0);
    assert!(s.bank_bit_words() as u64 * 64 >= s.geometry.grain_count());
    assert!((s.states_words() - states::WORDS) as u64 * 32 >= s.geometry.block_count().0);
}

#[test]
fn every_flipped_bit_of_a_used_word_is_another_shape_or_refused() {
    let words = head(&shape());
    for (index, _) in shape().head() {
        for bit in 0..64 {
            let mut broken = words.clone();
            broken[index] ^= 1 << bit;
            assert_ne!(Shape::of_head(|i| broken[i]), Ok(shape()), "{index}.{bit}");
        }
    }
}

#[test]
fn another_version_is_refused_by_name() {
    let mut words = head(&shape());
    words[control::VERSION] = 2;
    assert_eq!(
        Shape::of_head(|i| words[i]),
        Err(SharedError::Version {
            version: 2,
            incompat: 0
        })
    );
}

fn watched() -> WatchShape {
    WatchShape {
        volume: blktide_types::id::VolumeId(std::array::from_fn(|i| u8::try_from(i).unwrap())),
        grain: BlockSize::IMAGE_MIN,
        device: 259 << 32 | 5,
        start_sector: 2048,
        sectors: (1 << 21) + 7,
        bio_based: true,
    }
}

fn watch_head(shape: &WatchShape) -> Vec<u64> {
    let mut words = vec![0; watch::WORDS];
    for (index, value) in shape.head() {
        words[index] = value;
    }
    words
}

/// The golden file was made by `golden/watch_head.py`, which shares no line with this crate.
#[test]
fn the_watch_head_is_the_golden_one() {
    let golden = include_bytes!("../../golden/v1/watch_head.bin");
    let words: Vec<u64> = golden
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
        .collect();
    assert_eq!(words, watch_head(&watched()));
    assert_eq!(WatchShape::of_head(|i| words[i]), Ok(watched()));
}

/// trap TA9: no size overflows, and each sector has its bit.
#[test]
fn watch_bitmaps_hold_every_sector() {
    for shift in 9..=20 {
        for sectors in [1, 7, 8, 4095, 4096, 1 << 33, (1 << 53) - 1, 1 << 53] {
            let shape = WatchShape {
                grain: BlockSize::from_shift(shift).unwrap(),
                sectors,
                ..watched()
            };
            let last = (sectors - 1) >> (shift - 9);
            assert_eq!(shape.bit_words() as u64, last / 64 + 1, "{shift} {sectors}");
            assert!(shape.bitmap_words() - shape.bit_words() < PAGE_WORDS);
            assert_eq!(shape.bitmap(4), 512);
            assert_eq!(shape.bitmap(7), 512 + shape.bitmap_words());
            assert_eq!(shape.words(), 512 + 2 * shape.bitmap_words());
            let words = watch_head(&shape);
            assert_eq!(WatchShape::of_head(|i| words[i]), Ok(shape));
        }
    }
}

#[test]
fn every_flipped_bit_of_a_watch_head_is_another_shape_or_refused() {
    let words = watch_head(&watched());
    for (index, _) in watched().head().into_iter().chain([(watch::INCOMPAT, 0)]) {
        for bit in 0..64 {
            let mut broken = words.clone();
            broken[index] ^= 1 << bit;
            let found = WatchShape::of_head(|i| broken[i]);
            assert_ne!(found, Ok(watched()), "{index}.{bit}");
        }
    }
}
