//! A writer that keeps the truth: direct writes into one file, one in flight, each bearing its number and its place.
//!
//! **Invariant**: the file in an image is an exact prefix of the record: for some N each unit holds its last write ≤ N,
//! or what it held before, and none holds a write > N. That is what 'at an instant' means.

use anyhow::{Context, Result, anyhow, ensure};
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::clock::SystemClock;
use blktide_sys::fs::{open_direct_write, read_full, write_full};
use blktide_types::clock::Clock;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Bytes of one write.
pub(super) const UNIT: usize = 4096;
/// Units of the file.
pub(super) const UNITS: u64 = 8192;
/// What a unit holds before the first write.
const BEFORE: u8 = 0xee;

/// The record so far: write `n` (from 1) went to unit `writes[n - 1]`.
type Writes = Arc<Mutex<Vec<u64>>>;

/// The writer, running. Dropped, it goes on until the process ends.
#[derive(Debug)]
pub(super) struct Recorder {
    writes: Writes,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Duration>>,
}

impl Recorder {
    /// Makes the file, with all its blocks in place, and starts to write to random units of it.
    pub(super) fn start(path: &Path) -> Result<Self> {
        let mut file = File::create_new(path)?;
        let page = vec![BEFORE; UNIT * 64];
        for _ in 0..UNITS / 64 {
            file.write_all(&page)?;
        }
        file.sync_all()?;
        let direct = open_direct_write(path)?;
        let writes = Writes::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (record, stopping) = (Arc::clone(&writes), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || write_on(&direct, &record, &stopping))?;
        Ok(Self {
            writes,
            stop,
            thread,
        })
    }

    /// Writes begun so far.
    pub(super) fn count(&self) -> u64 {
        locked(&self.writes).len() as u64
    }

    /// The record so far.
    pub(super) fn record(&self) -> Record {
        Record(locked(&self.writes).clone())
    }

    /// Ends the writer; the longest that one write took. An error that any write met is this call's.
    pub(super) fn finish(self) -> Result<Duration> {
        self.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .map_err(|_panic| anyhow!("the recorder panicked"))?
    }
}

fn locked(writes: &Mutex<Vec<u64>>) -> std::sync::MutexGuard<'_, Vec<u64>> {
    writes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_on(
    file: &impl std::os::fd::AsFd,
    writes: &Mutex<Vec<u64>>,
    stop: &AtomicBool,
) -> Result<Duration> {
    let mut page = AlignedBuffer::new(UNIT);
    let mut longest = Duration::ZERO;
    for number in 1.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let unit = mixed(number) % UNITS;
        content(number, unit, &mut page);
        // In the record before it is on its way: an instant may fall in between.
        locked(writes).push(unit);
        let begun = SystemClock.now();
        write_full(file, unit * UNIT as u64, &page).with_context(|| format!("write {number}"))?;
        longest = longest.max(SystemClock.now().since(begun));
    }
    Ok(longest)
}

/// Numbers without a pattern (`SplitMix64`'s last step).
fn mixed(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn content(number: u64, unit: u64, out: &mut [u8]) {
    let head = number.to_le_bytes().into_iter().chain(unit.to_le_bytes());
    let body = (0_u64..).flat_map(|i| mixed(number ^ (i << 40)).to_le_bytes());
    for (to, from) in out.iter_mut().zip(head.chain(body)) {
        *to = from;
    }
}

/// What was written, in order.
#[derive(Debug)]
pub(super) struct Record(Vec<u64>);

impl Record {
    /// The number of the write whose whole content `page` is.
    pub(super) fn number_in(&self, page: &[u8]) -> Option<u64> {
        let number = u64::from_le_bytes(page.first_chunk().copied()?);
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        let unit = *self.0.get(index)?;
        let mut whole = vec![0; page.len()];
        content(number, unit, &mut whole);
        (whole == page).then_some(number)
    }

    /// The N of which the file is the exact state; the error says what contradicts it.
    pub(super) fn prefix_of(&self, path: &Path) -> Result<u64> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let mut page = vec![0; UNIT];
        let mut found = BTreeMap::new();
        for unit in 0..UNITS {
            let got = read_full(&file, unit * UNIT as u64, &mut page)?;
            ensure!(got == UNIT, "the recorder's file is short");
            match self.number_in(&page) {
                Some(number) => {
                    found.insert(unit, number);
                }
                None => ensure!(
                    page.iter().all(|b| *b == BEFORE),
                    "unit {unit} of the recorder's file is no write of its record"
                ),
            }
        }
        let last = found.values().copied().max().unwrap_or(0);
        let expected: BTreeMap<u64, u64> = self.0.iter().copied().zip(1..=last).collect();
        for unit in 0..UNITS {
            let (is, should) = (found.get(&unit), expected.get(&unit));
            ensure!(
                is == should,
                "unit {unit} holds write {is:?}; a state up to write {last} has {should:?}"
            );
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// The proof itself must be able to fail: a lost write, a torn one, a later one without an earlier.
    #[test]
    fn only_a_prefix_is_a_prefix() {
        let path = std::env::temp_dir().join(format!("blktide-demo-record-{}", std::process::id()));
        let record = Record(vec![3, 5, 3, 9]);
        let file = File::create(&path).unwrap();
        let mut page = vec![BEFORE; UNIT];
        for unit in 0..UNITS {
            file.write_all_at(&page, unit * UNIT as u64).unwrap();
        }
        assert_eq!(record.prefix_of(&path).unwrap(), 0);
        for (number, unit) in (1..=3).zip(&record.0) {
            content(number, *unit, &mut page);
            file.write_all_at(&page, unit * UNIT as u64).unwrap();
        }
        assert_eq!(record.prefix_of(&path).unwrap(), 3);
        file.write_all_at(&[BEFORE; UNIT], 5 * UNIT as u64).unwrap();
        assert!(record.prefix_of(&path).is_err(), "write 2 is lost");
        content(2, 5, &mut page);
        file.write_all_at(&page, 5 * UNIT as u64).unwrap();
        file.write_all_at(&[0], 5 * UNIT as u64 + 4000).unwrap();
        assert!(record.prefix_of(&path).is_err(), "write 2 is torn");
        std::fs::remove_file(path).unwrap();
    }
}
