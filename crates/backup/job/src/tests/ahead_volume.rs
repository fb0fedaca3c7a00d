//! A volume without copy-on-write, small and plain: it is written while it is copied, and what was written is told by a
//! reference that knows nothing of copies.

use super::volume::geometry;
use crate::source::{BeginError, Begun, CopyAhead, Round, RoundCost};
use crate::source::{SnapshotAsk, SnapshotSource, TrackerSays};
use blktide_format::manifest::Consistency;
use blktide_testkit::pattern::noise;
use blktide_testkit::reference::ReferenceVolume;
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::{BlockOutcome, BlockRead, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// The change set of the round.
const ROUND: &str = "round";

/// A call of the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    Begin,
    Spool,
    /// Which round, which read of it.
    ReadNow(u64, u64),
    Next(u64),
    ReadLast(u64),
    Finish,
}

/// Told of each call before it is answered.
pub(super) type AtCall = Arc<dyn Fn(Call) -> io::Result<()> + Send + Sync>;

/// What is untrue of the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// A block that was never copied is not among the last.
    NeverCopied,
    /// The last are more than what is wanted.
    LastNotWanted,
    /// The last have another size.
    LastOfAnotherSize,
    /// A block that changed is not wanted.
    ChangedNotWanted,
    /// The first round has another size.
    FirstOfAnotherSize,
    /// A later round has another size.
    RoundOfAnotherSize,
    /// A read tells of too few blocks.
    ShortRead,
    /// The snapshot has another shape.
    AnotherShape,
}

impl Lie {
    pub(super) const ALL: [Self; 8] = [
        Self::NeverCopied,
        Self::LastNotWanted,
        Self::LastOfAnotherSize,
        Self::ChangedNotWanted,
        Self::FirstOfAnotherSize,
        Self::RoundOfAnotherSize,
        Self::ShortRead,
        Self::AnotherShape,
    ];
}

/// How the next backup goes.
#[derive(Clone, Default)]
pub(super) struct Plan {
    /// Rounds after the first.
    pub(super) rounds: u64,
    /// Whether it is written meanwhile.
    pub(super) writes: bool,
    pub(super) at_call: Option<AtCall>,
    pub(super) lie: Option<Lie>,
    /// The tracker is not believed from the instant on.
    pub(super) distrust_at_instant: Option<Reason>,
    /// Where the spool lies; a file of its own if not given.
    pub(super) spool: Option<&'static str>,
    /// Leave out of the first round what is in here.
    pub(super) not_first: Vec<u64>,
}

/// What became of a backup, for the test to compare.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// What its image must restore to, unreadable blocks as zeroes.
    pub(super) truth: Vec<u8>,
    /// How often each block was told to be read.
    pub(super) told: Vec<u64>,
    /// How often it was.
    pub(super) read: Vec<u64>,
    pub(super) unreadable: Vec<u64>,
    pub(super) rounds: Vec<RoundCost>,
    pub(super) changed: Option<BlockSet>,
}

pub(super) struct AheadVolume(Arc<Mutex<State>>);

struct State {
    geometry: Geometry,
    reference: ReferenceVolume,
    numbers: Numbers,
    written: u64,
    generations: Vec<GenerationName>,
    drawn: u64,
    distrust: Option<Reason>,
    unreadable: BlockSet,
    plan: Plan,
    seen: Seen,
    running: bool,
}

impl State {
    fn write_some(&mut self, most: u64) {
        let bytes = self.reference.bytes().len();
        for _ in 0..self.numbers.below(most) {
            self.written += 1;
            let start = self.numbers.index(bytes / 512) * 512;
            let most = (bytes - start).min(30_000);
            let length = (self.numbers.index(most / 512) + 1) * 512;
            match self.numbers.below(4) {
                0 => self.reference.zero(start, length),
                1 => self.reference.touch(start, length),
                _ => self
                    .reference
                    .write(start, &noise(length, Seed(self.written))),
            }
        }
    }

    fn copy(&self, block: BlockIndex, to: &mut [u8], from: usize) {
        let start = usize::try_from(self.geometry.block_start(block)).unwrap();
        let length = self.geometry.block_bytes(block) as usize;
        to[from..length].copy_from_slice(&self.reference.bytes()[start + from..start + length]);
    }

    fn told(&mut self, set: &BlockSet) {
        for block in set.blocks() {
            self.seen.told[usize::try_from(block.0).unwrap()] += 1;
        }
    }

    fn is_unreadable(&mut self, block: BlockIndex, to: &mut [u8]) -> BlockOutcome {
        let number = usize::try_from(block.0).unwrap();
        self.seen.read[number] += 1;
        self.seen.unreadable.retain(|b| *b != block.0);
        if self.unreadable.contains(block) {
            self.seen.unreadable.push(block.0);
            to.fill(0xee);
            return BlockOutcome::Unreadable;
        }
        BlockOutcome::Data
    }
}

impl AheadVolume {
    pub(super) fn new(bytes: u64, block: u32, seed: Seed) -> Arc<Self> {
        let geometry = geometry(bytes, block);
        let length = usize::try_from(bytes).unwrap();
        let mut reference = ReferenceVolume::new(length, geometry.block_size().bytes_usize());
        reference.write(0, &noise(length / 3 / 512 * 512, seed));
        Arc::new(Self(Arc::new(Mutex::new(State {
            geometry,
            reference,
            numbers: seed.numbers(),
            written: seed.0,
            generations: Vec::new(),
            drawn: 0,
            distrust: None,
            unreadable: BlockSet::new(geometry.block_count()),
            plan: Plan::default(),
            seen: Seen::default(),
            running: false,
        }))))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn plan(&self, plan: Plan) {
        self.lock().plan = plan;
    }

    pub(super) fn seen(&self) -> Seen {
        self.lock().seen.clone()
    }

    pub(super) fn write_some(&self, most: u64) {
        self.lock().write_some(most);
    }

    pub(super) fn write(&self, offset_bytes: usize, data: &[u8]) {
        self.lock().reference.write(offset_bytes, data);
    }

    pub(super) fn set_unreadable(&self, block: u64, unreadable: bool) {
        let mut state = self.lock();
        if unreadable {
            state.unreadable.insert(BlockIndex(block));
        } else {
            state.unreadable.remove(BlockIndex(block));
        }
    }

    pub(super) fn distrust(&self, reason: Reason) {
        let mut state = self.lock();
        state.distrust = Some(reason);
        state.generations.clear();
    }

    /// Whether a backup has not been ended at the volume.
    pub(super) fn is_running(&self) -> bool {
        self.lock().running
    }
}

fn call(state: &Mutex<State>, call: Call) -> io::Result<()> {
    // Not under the lock: the test may look at the volume.
    let at_call = state.lock().unwrap().plan.at_call.clone();
    at_call.map_or(Ok(()), |at_call| at_call(call))
}

impl SnapshotSource for AheadVolume {
    fn geometry(&self) -> Geometry {
        self.lock().geometry
    }

    fn begin(&self, _ask: &SnapshotAsk) -> Result<Begun, BeginError> {
        panic!("a volume without copy-on-write was asked for a snapshot");
    }

    fn copy_ahead(&self, ask: &SnapshotAsk) -> Result<Option<Box<dyn CopyAhead>>, BeginError> {
        call(&self.0, Call::Begin).map_err(BeginError::Io)?;
        let mut state = self.lock();
        let base = ask.base.filter(|base| state.generations.contains(base));
        let tracker = match (state.distrust, base) {
            (Some(reason), _) => TrackerSays::Distrusted(reason),
            (None, Some(_)) => TrackerSays::Resolved,
            (None, None) => TrackerSays::Unresolved,
        };
        let count = state.geometry.block_count();
        let blocks = usize::try_from(count.0).unwrap();
        state.seen = Seen {
            told: vec![0; blocks],
            read: vec![0; blocks],
            ..Seen::default()
        };
        state.reference.begin(ROUND);
        state.running = true;
        let base = base.filter(|_| tracker == TrackerSays::Resolved);
        let absent = ask.absent.clone().unwrap_or_else(|| BlockSet::new(count));
        let mut first = wanted(&state, base, &absent).0;
        for block in &state.plan.not_first {
            first.remove(BlockIndex(*block));
        }
        state.told(&first);
        if state.plan.lie == Some(Lie::FirstOfAnotherSize) {
            first = larger(state.geometry.block_count());
        }
        Ok(Some(Box::new(Copying {
            geometry: state.geometry,
            state: Arc::clone(&self.0),
            base,
            absent,
            tracker,
            own: Mutex::new(Own {
                copied: first.clone(),
                owed: BlockSet::new(count),
                round: 0,
                reads: 0,
            }),
            first,
        })))
    }

    fn spool(&self) -> io::Result<File> {
        call(&self.0, Call::Spool)?;
        let mut options = File::options();
        options.read(true).write(true);
        if let Some(path) = self.lock().plan.spool {
            return options.open(path);
        }
        let path = super::world::scratch(&format!("spool-{:p}", Arc::as_ptr(&self.0)));
        let file = options.create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

/// What is wanted, and what of it has changed.
fn wanted(
    state: &State,
    base: Option<GenerationName>,
    absent: &BlockSet,
) -> (BlockSet, Option<BlockSet>) {
    match base {
        Some(base) => {
            let changed = state.reference.changed(&base.to_string());
            let mut wanted = changed.clone();
            wanted.union_with(absent);
            (wanted, Some(changed))
        }
        None => (BlockSet::full(state.geometry.block_count()), None),
    }
}

fn larger(count: BlockCount) -> BlockSet {
    BlockSet::new(BlockCount(count.0 + 1))
}

/// What a copying knows: which blocks were told, and which of those copies are void and not yet told again.
struct Own {
    copied: BlockSet,
    owed: BlockSet,
    round: u64,
    reads: u64,
}

struct Copying {
    geometry: Geometry,
    state: Arc<Mutex<State>>,
    base: Option<GenerationName>,
    absent: BlockSet,
    tracker: TrackerSays,
    first: BlockSet,
    own: Mutex<Own>,
}

impl Drop for Copying {
    fn drop(&mut self) {
        // A test that has failed holds the lock.
        if let Ok(mut state) = self.state.lock() {
            state.running = false;
        }
    }
}

impl CopyAhead for Copying {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn tracker(&self) -> TrackerSays {
        self.tracker
    }

    fn first(&self) -> BlockSet {
        self.first.clone()
    }

    fn read_now(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let (round, read) = {
            let mut own = self.own.lock().unwrap();
            own.reads += 1;
            (own.round, own.reads - 1)
        };
        call(&self.state, Call::ReadNow(round, read)).map_err(SourceError::Io)?;
        let block_bytes = self.geometry.block_size().bytes_usize();
        assert_eq!(buf.as_ptr() as usize % 4096, 0, "an unaligned buffer");
        let mut state = self.state.lock().unwrap();
        let mut outcomes = Vec::new();
        for (block, part) in range.blocks().zip(buf.chunks_exact_mut(block_bytes)) {
            part.fill(0);
            state.copy(block, part, 0);
            outcomes.push(state.is_unreadable(block, part));
        }
        // Torn: what comes now is in the second halves, not in the first.
        if state.plan.writes {
            state.write_some(3);
            for ((block, part), outcome) in range
                .blocks()
                .zip(buf.chunks_exact_mut(block_bytes))
                .zip(&outcomes)
            {
                if *outcome == BlockOutcome::Data {
                    let half = self.geometry.block_bytes(block) as usize / 2;
                    state.copy(block, part, half);
                }
            }
            state.write_some(2);
        }
        if state.plan.lie == Some(Lie::ShortRead) {
            outcomes.pop();
        }
        Ok(outcomes)
    }

    fn next(&self, cost: RoundCost) -> Result<Round, BeginError> {
        let mut own = self.own.lock().unwrap();
        call(&self.state, Call::Next(own.round)).map_err(BeginError::Io)?;
        let mut state = self.state.lock().unwrap();
        let (state, own) = (&mut *state, &mut *own);
        state.seen.rounds.push(cost);
        if state.plan.writes {
            state.write_some(4);
        }
        own.owed.union_with(&state.reference.changed(ROUND));
        state.reference.begin(ROUND);
        let round = own.round;
        own.round += 1;
        own.reads = 0;
        if round < state.plan.rounds {
            let mut again = own.owed.clone();
            for block in own.owed.blocks() {
                // Some wait for a later round.
                if state.numbers.chance(1, 4) {
                    again.remove(block);
                }
            }
            own.owed.subtract(&again);
            own.copied.union_with(&again);
            state.told(&again);
            if state.plan.lie == Some(Lie::RoundOfAnotherSize) {
                again = larger(self.geometry.block_count());
            }
            return Ok(Round::Again(again));
        }
        Ok(self.instant(state, own))
    }
}

impl Copying {
    /// Nothing is written while this runs.
    fn instant(&self, state: &mut State, own: &Own) -> Round {
        state.drawn += 1;
        let mut name = [0x5a; 16];
        name[..8].copy_from_slice(&state.drawn.to_le_bytes());
        let opened = GenerationName(name);
        let (base, tracker) = match state.plan.distrust_at_instant {
            Some(reason) => (None, TrackerSays::Distrusted(reason)),
            None => (self.base, self.tracker),
        };
        let (mut wanted, changed) = wanted(state, base, &self.absent);
        let mut kept = own.copied.clone();
        kept.subtract(&own.owed);
        let mut last = wanted.clone();
        last.subtract(&kept);
        state.told(&last);
        state.seen.truth = state.reference.bytes().to_vec();
        state.seen.changed.clone_from(&changed);
        state.reference.begin(&opened.to_string());
        if state.distrust.take().is_some() || state.plan.distrust_at_instant.is_some() {
            state.generations.clear();
        }
        state.generations.push(opened);
        lie(state.plan.lie, own, &mut wanted, &mut last);
        let shape = match state.plan.lie {
            Some(Lie::AnotherShape) => geometry(
                self.geometry.volume_bytes() + 512,
                self.geometry.block_size().bytes(),
            ),
            _ => self.geometry,
        };
        let snapshot = Last {
            geometry: shape,
            left: Mutex::new((last.clone(), 0)),
            state: Arc::clone(&self.state),
            bytes: state.reference.clone(),
            wanted,
            changed,
        };
        Round::Instant {
            begun: Begun {
                snapshot: Arc::new(snapshot),
                id: SnapshotId([1; 16]),
                opened,
                tracker,
                evidence: Vec::new(),
                instant: WallTime(i64::try_from(state.drawn).unwrap()),
                consistency: Consistency::Instant,
            },
            last,
        }
    }
}

fn lie(lie: Option<Lie>, own: &Own, wanted: &mut BlockSet, last: &mut BlockSet) {
    match lie {
        Some(Lie::NeverCopied) => {
            let never = last.blocks().find(|block| !own.copied.contains(*block));
            last.remove(never.expect("the plan leaves a block out of the first round"));
        }
        Some(Lie::LastNotWanted) => {
            let mut others = BlockSet::full(wanted.len());
            others.subtract(wanted);
            match others.blocks().next() {
                Some(block) => last.insert(block),
                None => wanted.remove(last.blocks().next().expect("something is left")),
            }
        }
        Some(Lie::LastOfAnotherSize) => *last = larger(last.len()),
        Some(Lie::ChangedNotWanted) => {
            let block = wanted.blocks().next().expect("something is wanted");
            wanted.remove(block);
            last.remove(block);
        }
        Some(
            Lie::FirstOfAnotherSize | Lie::RoundOfAnotherSize | Lie::ShortRead | Lie::AnotherShape,
        )
        | None => {}
    }
}

/// The last blocks, as they were at the instant.
struct Last {
    geometry: Geometry,
    wanted: BlockSet,
    changed: Option<BlockSet>,
    bytes: ReferenceVolume,
    left: Mutex<(BlockSet, u64)>,
    state: Arc<Mutex<State>>,
}

impl BlockRead for Last {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let block_bytes = self.geometry.block_size().bytes_usize();
        let number = {
            let mut left = self.left.lock().unwrap();
            for block in range.blocks() {
                assert!(left.0.contains(block), "{block:?} is not among the last");
                left.0.remove(block);
            }
            left.1 += 1;
            left.1 - 1
        };
        call(&self.state, Call::ReadLast(number)).map_err(SourceError::Io)?;
        let mut state = self.state.lock().unwrap();
        let mut outcomes = Vec::new();
        for (block, part) in range.blocks().zip(buf.chunks_exact_mut(block_bytes)) {
            part.fill(0);
            let bytes = self.bytes.block(usize::try_from(block.0).unwrap());
            part[..bytes.len()].copy_from_slice(bytes);
            outcomes.push(state.is_unreadable(block, part));
        }
        if state.plan.writes {
            state.write_some(3);
        }
        Ok(outcomes)
    }
}

impl SnapshotRead for Last {
    fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    fn finish(&self) -> Result<(), SourceError> {
        call(&self.state, Call::Finish).map_err(SourceError::Io)?;
        assert!(self.left.lock().unwrap().0.is_empty(), "not all was read");
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        // What could not be read is wanted again (P10), and has no content in the image.
        let wanted = |block: &u64| self.wanted.contains(BlockIndex(*block));
        state.seen.unreadable.retain(wanted);
        state.seen.unreadable.sort_unstable();
        for block in state.seen.unreadable.iter().map(|block| BlockIndex(*block)) {
            let start = usize::try_from(self.geometry.block_start(block)).unwrap();
            let length = self.geometry.block_bytes(block) as usize;
            state.seen.truth[start..start + length].fill(0);
            state.reference.touch(start, length);
        }
        Ok(())
    }
}
