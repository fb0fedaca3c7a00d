//! The log ring in shared memory: the data path writes, the keeper drains it, or nobody does.
//!
//! **Invariant**: writing never waits. What is not drained in time is overwritten.

use blktide_format::shared::{Shape, WORD_BYTES, control};
use blktide_sys::mapping::Mapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The ring.
#[derive(Debug)]
pub(crate) struct Log {
    memory: Arc<Mapping>,
    start: usize,
    bytes: usize,
    tail: u64,
}

impl Log {
    /// The ring of a volume's control memory.
    pub(crate) fn new(memory: &Arc<Mapping>, shape: &Shape) -> Self {
        let head = memory.words().get(control::LOG_HEAD);
        Self {
            start: shape.log().saturating_mul(WORD_BYTES),
            bytes: shape.log_bytes.max(1),
            tail: head.map_or(0, |w| w.load(Ordering::Acquire)),
            memory: Arc::clone(memory),
        }
    }

    /// Appends a line. For one thread.
    pub(crate) fn say(&self, text: &str) {
        let Some(head) = self.memory.words().get(control::LOG_HEAD) else {
            return;
        };
        let at = head.load(Ordering::Relaxed);
        let line = text.bytes().chain([b'\n']);
        let mut count = 0;
        for (i, byte) in (at..).zip(line.take(self.bytes / 2)) {
            let place = self.start.saturating_add(self.place(i));
            if !self.memory.copy_in(place, &[byte]) {
                return;
            }
            count += 1;
        }
        head.store(at.wrapping_add(count), Ordering::Release);
    }

    /// What was appended since the last call.
    pub(crate) fn drain(&mut self) -> String {
        let head = self.memory.words().get(control::LOG_HEAD);
        let head = head.map_or(0, |w| w.load(Ordering::Acquire));
        let size = u64::try_from(self.bytes).unwrap_or(u64::MAX);
        let from = self.tail.max(head.saturating_sub(size));
        let mut text = Vec::new();
        for i in from..head {
            let mut byte = [0];
            if self
                .memory
                .copy_out(self.start.saturating_add(self.place(i)), &mut byte)
            {
                text.extend(byte);
            }
        }
        self.tail = head;
        String::from_utf8_lossy(&text).into_owned()
    }

    fn place(&self, at: u64) -> usize {
        let size = u64::try_from(self.bytes).unwrap_or(1);
        usize::try_from(at % size).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_sys::memfd::Memfd;
    use blktide_types::geometry::Geometry;
    use blktide_types::unit::BlockSize;

    fn ring(log_bytes: usize) -> (Log, Log) {
        let block = BlockSize::DEFAULT;
        let mut shape = Shape::usual(Geometry::new(1 << 20, block, block, 512, 512).unwrap());
        shape.log_bytes = log_bytes;
        let bytes = (shape.control_words() * WORD_BYTES) as u64;
        let memory = Memfd::create("blktide-test", bytes).unwrap();
        let memory = Arc::new(Mapping::new(&memory).unwrap());
        (Log::new(&memory, &shape), Log::new(&memory, &shape))
    }

    #[test]
    fn lines_come_out_as_they_went_in() {
        let (writer, mut reader) = ring(256);
        assert_eq!(reader.drain(), "");
        for round in 0..100 {
            writer.say(&format!("line {round}"));
            writer.say("and – not only ASCII");
            assert_eq!(
                reader.drain(),
                format!("line {round}\nand – not only ASCII\n")
            );
        }
    }

    /// Nobody drains: the newest lines are there, and nothing else was written over.
    #[test]
    fn what_is_not_drained_is_overwritten() {
        let (writer, mut reader) = ring(64);
        for round in 0..1000 {
            writer.say(&format!("line {round}"));
        }
        let text = reader.drain();
        assert!(text.ends_with("line 998\nline 999\n"), "{text}");
        assert!(text.len() <= 64);
    }
}
