//! The slots of one queue: where requests stand from the moment they are taken until they are answered.
//!
//! ```text
//! slot: │ state words │ … │ headers (80 bytes) ║ payload, from the next page on │
//! empty ─ clear ─▶ taken ─▶ done, with result ─ answered ─▶ empty
//! ```
//! **Invariant**: 'done' is stored before the answer is given, and the slot is cleared after it; so a successor performs
//! no request twice that was answered.

use crate::Slot;
use blktide_format::shared::{SLOT_HEADER_OFFSET, SLOT_PAYLOAD_OFFSET, Shape, WORD_BYTES, slot};
use blktide_sys::Errno;
use blktide_sys::fuse::WRITE_HEADERS_BYTES;
use blktide_sys::mapping::Mapping;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A result as its word: bytes, or a negated errno.
fn word_of(result: Result<u64, Errno>) -> u64 {
    match result {
        Ok(bytes) => bytes,
        Err(errno) => i64::from(errno.0).saturating_neg().cast_unsigned(),
    }
}

fn result_of(word: u64) -> Result<u64, Errno> {
    match word.cast_signed() {
        bytes if bytes >= 0 => Ok(word),
        negated => Err(Errno(
            i32::try_from(negated.saturating_neg()).unwrap_or(Errno::IO.0),
        )),
    }
}

/// The slots of one queue.
#[derive(Clone, Debug)]
pub struct Slots {
    mapping: Arc<Mapping>,
    first: usize,
    count: usize,
    slot_bytes: usize,
    payload_bytes: usize,
}

impl Slots {
    /// The slots of `queue` out of the memory of all: an equal share each. `None` if the memory is too short for the shape.
    pub fn of_queue(mapping: &Arc<Mapping>, shape: &Shape, queue: usize) -> Option<Self> {
        let count = shape.slots.checked_div(shape.queues)?;
        if mapping.len() < shape.slots_bytes() || queue >= shape.queues {
            return None;
        }
        Some(Self {
            mapping: Arc::clone(mapping),
            first: queue.checked_mul(count)?,
            count,
            slot_bytes: shape.slot_bytes(),
            payload_bytes: shape.slot_payload_bytes,
        })
    }

    /// Number of slots.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// All of them, from 0.
    pub fn all(&self) -> impl Iterator<Item = Slot> + use<> {
        let numbers: Range<usize> = 0..self.count;
        numbers.map(Slot)
    }

    /// The memory they lie in.
    pub const fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Bytes of a payload at most.
    pub const fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Where the headers of a slot begin.
    pub const fn header(&self, slot: Slot) -> usize {
        self.start(slot).saturating_add(SLOT_HEADER_OFFSET)
    }

    /// Bytes from the headers to the end of the slot.
    pub const fn capacity(&self) -> usize {
        self.payload_bytes.saturating_add(WRITE_HEADERS_BYTES)
    }

    /// Where the payload of a slot begins.
    pub const fn payload(&self, slot: Slot) -> usize {
        self.start(slot).saturating_add(SLOT_PAYLOAD_OFFSET)
    }

    /// The result that stands in a slot: it was performed, and is only to be answered.
    pub fn result(&self, slot: Slot) -> Option<Result<u64, Errno>> {
        (self.load(slot, slot::STATE) == 1).then(|| result_of(self.load(slot, slot::RESULT)))
    }

    /// Stores that the request was performed, with this result. Before the answer.
    pub fn set_result(&self, slot: Slot, result: Result<u64, Errno>) {
        self.store(slot, slot::RESULT, word_of(result), Ordering::Relaxed);
        self.store(slot, slot::STATE, 1, Ordering::Release);
    }

    /// Notes how long the request is that was read.
    pub fn set_length(&self, slot: Slot, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(0);
        self.store(slot, slot::LENGTH, bytes, Ordering::Release);
    }

    /// Empties a slot: headers first, so that at no moment a request stands there with another's state.
    pub fn clear(&self, slot: Slot) {
        let first = self.header(slot) / WORD_BYTES;
        let words = WRITE_HEADERS_BYTES / WORD_BYTES;
        for index in first..first.saturating_add(words) {
            if let Some(word) = self.mapping.words().get(index) {
                word.store(0, Ordering::Release);
            }
        }
        self.store(slot, slot::LENGTH, 0, Ordering::Release);
        self.store(slot, slot::STATE, 0, Ordering::Release);
    }

    const fn start(&self, slot: Slot) -> usize {
        self.first
            .saturating_add(slot.0)
            .saturating_mul(self.slot_bytes)
    }

    fn load(&self, slot: Slot, word: usize) -> u64 {
        let index = (self.start(slot) / WORD_BYTES).saturating_add(word);
        let found = self.mapping.words().get(index);
        found.map_or(0, |w| w.load(Ordering::Acquire))
    }

    fn store(&self, slot: Slot, word: usize, value: u64, order: Ordering) {
        let index = (self.start(slot) / WORD_BYTES).saturating_add(word);
        if let Some(found) = self.mapping.words().get(index) {
            found.store(value, order);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_sys::memfd::Memfd;
    use blktide_types::geometry::Geometry;
    use blktide_types::unit::BlockSize;

    fn shape() -> Shape {
        let block = BlockSize::DEFAULT;
        Shape::usual(Geometry::new(1 << 30, block, block, 512, 4096).unwrap())
    }

    fn slots(queue: usize) -> Slots {
        let shape = shape();
        let memory = Memfd::create("blktide-test", shape.slots_bytes() as u64).unwrap();
        let mapping = Arc::new(Mapping::new(&memory).unwrap());
        Slots::of_queue(&mapping, &shape, queue).unwrap()
    }

    #[test]
    fn the_payload_of_a_write_begins_on_a_page() {
        for queue in 0..2 {
            let slots = slots(queue);
            assert_eq!(slots.count(), 64);
            for slot in slots.all() {
                assert_eq!(slots.payload(slot) % 4096, 0);
                assert_eq!(
                    slots.header(slot) + WRITE_HEADERS_BYTES,
                    slots.payload(slot)
                );
                assert!(slots.header(slot) + slots.capacity() <= slots.mapping().len());
            }
        }
    }

    #[test]
    fn results_lead_back() {
        let slots = slots(1);
        for result in [Ok(0), Ok(4096), Err(Errno::IO), Err(Errno::OPNOTSUPP)] {
            assert_eq!(slots.result(Slot(3)), None);
            slots.set_result(Slot(3), result);
            assert_eq!(slots.result(Slot(3)), Some(result));
            assert_eq!(slots.result(Slot(2)), None);
            slots.clear(Slot(3));
        }
    }
}
