//! A writer that keeps the truth: each write in `O_DIRECT`, one in flight, its number and place in its bytes.
//!
//! ```text
//!  write n:  unit u := [n, u, stream of (seed, n) …]      4096 bytes, inside one block and one request
//! ```
//! **Invariant**: a state of the volume at an instant is an exact prefix of the record: for some N every unit holds its
//! last write ≤ N (or what it held before the first), and nothing of > N. [`Record::prefix_of`] proves or refutes it with
//! nothing but a plain read of the restored file.

use anyhow::{Context, Result, anyhow, ensure};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::clock::Stopwatch;
use crate::seed::Seed;

/// Bytes of one write.
pub const UNIT: usize = 4096;

const O_DIRECT: i32 = if cfg!(target_arch = "aarch64") {
    0o200_000
} else {
    0o40_000
};

/// Opens a file or device past the page cache; reads and writes are in whole, aligned sectors.
pub fn open_direct(path: &Path, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(O_DIRECT)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// One aligned unit of memory.
#[derive(Debug)]
struct Unit {
    memory: Vec<u8>,
    start: usize,
}

impl Unit {
    fn new() -> Self {
        let memory = vec![0; UNIT * 2];
        let start = memory.as_ptr().align_offset(UNIT);
        Self { memory, start }
    }

    fn bytes(&mut self) -> Result<&mut [u8]> {
        self.memory
            .get_mut(self.start..self.start + UNIT)
            .context("an allocation can be aligned")
    }
}

/// Writes `bytes` (whole sectors) at `offset`, past the page cache.
pub fn write_block(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = open_direct(path, true)?;
    let mut unit = Unit::new();
    for (piece, at) in bytes.chunks(UNIT).zip((offset..).step_by(UNIT)) {
        let to = unit
            .bytes()?
            .get_mut(..piece.len())
            .context("a piece fits")?;
        to.copy_from_slice(piece);
        file.write_all_at(to, at)?;
    }
    file.sync_all()?;
    Ok(())
}

fn content(seed: u64, number: u64, unit: u64, out: &mut [u8]) {
    let mut stream = Seed::stream(seed ^ number.rotate_left(32));
    stream.fill(out);
    for (to, from) in out
        .iter_mut()
        .zip(number.to_le_bytes().into_iter().chain(unit.to_le_bytes()))
    {
        *to = from;
    }
}

/// The writer, running.
#[derive(Debug)]
pub struct Recorder {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Result<Record>>,
}

/// What was written, in order.
#[derive(Debug, Clone)]
pub struct Record {
    seed: u64,
    first: u64,
    /// Number n (from 1) wrote unit `units[n - 1]`, counted from the start of the volume.
    units: Vec<u64>,
    /// The longest that one write took.
    pub longest_wait: Duration,
}

impl Recorder {
    /// Writes to random units of `units` (counted in 4096 bytes from the start of `path`), at most one each `pause`.
    pub fn start(
        path: &Path,
        units: std::ops::Range<u64>,
        seed: u64,
        pause: Duration,
    ) -> Result<Self> {
        let file = open_direct(path, true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || write_on(&file, &units, seed, pause, (&stopping, &counted)))?;
        Ok(Self {
            stop,
            written,
            thread,
        })
    }

    /// Writes completed so far.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Ends the writer; any error that a write met is this call's.
    pub fn finish(self) -> Result<Record> {
        self.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .map_err(|_panic| anyhow!("the recorder panicked"))?
    }
}

fn write_on(
    file: &File,
    units: &std::ops::Range<u64>,
    seed: u64,
    pause: Duration,
    (stop, written): (&AtomicBool, &AtomicU64),
) -> Result<Record> {
    let mut choice = Seed::stream(seed);
    let mut page = Unit::new();
    let mut record = Record {
        seed,
        first: units.start,
        units: Vec::new(),
        longest_wait: Duration::ZERO,
    };
    while !stop.load(Ordering::Acquire) {
        let unit = units.start + choice.below(units.end.saturating_sub(units.start));
        let number = record.units.len() as u64 + 1;
        let bytes = page.bytes()?;
        content(seed, number, unit, bytes);
        // In the record before it is on its way: an instant may fall between the two.
        record.units.push(unit);
        let watch = Stopwatch::start();
        file.write_all_at(bytes, unit * UNIT as u64)
            .with_context(|| format!("write {number} to unit {unit}"))?;
        record.longest_wait = record.longest_wait.max(watch.elapsed());
        written.store(number, Ordering::Release);
        if !pause.is_zero() {
            thread::park_timeout(pause);
        }
    }
    Ok(record)
}

impl Record {
    /// Number of writes.
    pub fn count(&self) -> u64 {
        self.units.len() as u64
    }

    /// The N of which `image` is the exact state, where `before` is the volume before the first write (`None`: zeroes).
    ///
    /// Error: what contradicts it, the first unit that does.
    pub fn prefix_of(&self, image: &Path, before: Option<&PathBuf>, end: u64) -> Result<u64> {
        let image = File::open(image).with_context(|| image.display().to_string())?;
        let before = before.map(File::open).transpose()?;
        let mut page = vec![0; UNIT];
        let mut numbers = Vec::new();
        for unit in self.first..end {
            image.read_exact_at(&mut page, unit * UNIT as u64)?;
            numbers.push(self.number_in(&page, unit));
        }
        let last = numbers.iter().flatten().copied().max().unwrap_or(0);
        let mut expected = vec![None; numbers.len()];
        for (number, unit) in (1..=last).zip(&self.units) {
            let at = usize::try_from(unit - self.first)?;
            *expected.get_mut(at).context("a unit of the range")? = Some(number);
        }
        for ((unit, found), wanted) in (self.first..).zip(&numbers).zip(&expected) {
            ensure!(
                found == wanted,
                "unit {unit} holds write {found:?} where a state up to write {last} has {wanted:?}"
            );
            if wanted.is_none() {
                image.read_exact_at(&mut page, unit * UNIT as u64)?;
                let mut old = vec![0; UNIT];
                if let Some(before) = &before {
                    before.read_exact_at(&mut old, unit * UNIT as u64)?;
                }
                ensure!(page == old, "unit {unit} was never written, and changed");
            }
        }
        Ok(last)
    }

    /// The number of the write whose whole content `page` is.
    fn number_in(&self, page: &[u8], unit: u64) -> Option<u64> {
        let number = u64::from_le_bytes(page.first_chunk::<8>().copied()?);
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        if self.units.get(index) != Some(&unit) {
            return None;
        }
        let mut whole = vec![0; page.len()];
        content(self.seed, number, unit, &mut whole);
        (whole == page).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn recorded(name: &str) -> (PathBuf, Record) {
        let path = std::env::temp_dir().join(format!("blktide-{name}-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let mut record = Record {
            seed: 5,
            first: 2,
            units: vec![2, 4, 2, 7, 4],
            longest_wait: Duration::ZERO,
        };
        file.set_len(8 * UNIT as u64).unwrap();
        let mut page = vec![0; UNIT];
        for (unit, number) in record.units.iter().zip(1..) {
            content(5, number, *unit, &mut page);
            file.write_all_at(&page, unit * UNIT as u64).unwrap();
        }
        // Write 6 is known to the record and not in the file: the state is a prefix of 5.
        record.units.push(3);
        (path, record)
    }

    #[test]
    fn a_prefix_is_known_and_its_length_told() {
        let (path, record) = recorded("prefix");
        assert_eq!(record.prefix_of(&path, None, 8).unwrap(), 5);
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_later_write_without_an_earlier_one_is_found() {
        let (path, record) = recorded("later");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; UNIT], 7 * UNIT as u64).unwrap();
        assert!(record.prefix_of(&path, None, 8).is_err(), "write 4 is lost");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_torn_write_and_a_stray_byte_are_found() {
        for (at, name) in [(2 * UNIT + 4000, "torn"), (5 * UNIT, "stray")] {
            let (path, record) = recorded(name);
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[0xa5], at as u64).unwrap();
            assert!(record.prefix_of(&path, None, 8).is_err(), "{name}");
            fs::remove_file(path).unwrap();
        }
    }
}
