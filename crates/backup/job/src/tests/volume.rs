//! A volume with a tracker, small and plain: bytes in a `Vec`, one set of changed blocks a generation.

use crate::source::{BeginError, Begun, SnapshotAsk, SnapshotSource, TrackerSays};
use blktide_format::manifest::Consistency;
use blktide_testkit::reference::ReferenceVolume;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::{BlockOutcome, BlockRead, RevokeCause, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockIndex, BlockSize};
use std::io;
use std::sync::{Arc, Mutex};

/// What happens at a read; told its number, counted from 0 in each snapshot.
pub(super) type AtRead = Arc<dyn Fn(u64) -> Result<(), SourceError> + Send + Sync>;

/// The volume.
pub(super) struct SimVolume {
    state: Mutex<State>,
}

struct State {
    geometry: Geometry,
    reference: ReferenceVolume,
    unreadable: BlockSet,
    generations: Vec<GenerationName>,
    drawn: u64,
    distrust: Option<Reason>,
    at_read: Option<AtRead>,
    snapshots: u64,
    last_truth: Vec<u8>,
}

fn consumer(name: GenerationName) -> String {
    name.to_string()
}

pub(super) fn geometry(bytes: u64, block: u32) -> Geometry {
    Geometry::new(
        bytes,
        BlockSize::new(block).unwrap(),
        BlockSize::new(4096).unwrap(),
        512,
        512,
    )
    .unwrap()
}

impl SimVolume {
    pub(super) fn new(bytes: u64, block: u32) -> Arc<Self> {
        let geometry = geometry(bytes, block);
        Arc::new(Self {
            state: Mutex::new(State {
                geometry,
                reference: reference(&geometry),
                unreadable: BlockSet::new(geometry.block_count()),
                generations: Vec::new(),
                drawn: 0,
                distrust: None,
                at_read: None,
                snapshots: 0,
                last_truth: Vec::new(),
            }),
        })
    }

    pub(super) fn write(&self, offset_bytes: usize, data: &[u8]) {
        self.state
            .lock()
            .unwrap()
            .reference
            .write(offset_bytes, data);
    }

    pub(super) fn zero(&self, offset_bytes: usize, len_bytes: usize) {
        self.state
            .lock()
            .unwrap()
            .reference
            .zero(offset_bytes, len_bytes);
    }

    pub(super) fn touch(&self, offset_bytes: usize, len_bytes: usize) {
        self.state
            .lock()
            .unwrap()
            .reference
            .touch(offset_bytes, len_bytes);
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().reference.bytes().to_vec()
    }

    /// What the newest snapshot must have held, unreadable blocks as zeroes.
    pub(super) fn last_truth(&self) -> Vec<u8> {
        self.state.lock().unwrap().last_truth.clone()
    }

    /// Number of snapshots begun.
    pub(super) fn snapshots(&self) -> u64 {
        self.state.lock().unwrap().snapshots
    }

    pub(super) fn set_unreadable(&self, block: u64, unreadable: bool) {
        let mut state = self.state.lock().unwrap();
        if unreadable {
            state.unreadable.insert(BlockIndex(block));
        } else {
            state.unreadable.remove(BlockIndex(block));
        }
    }

    pub(super) fn at_read(&self, at_read: Option<AtRead>) {
        self.state.lock().unwrap().at_read = at_read;
    }

    /// The tracker is trusted from here on, and knows nothing of before.
    pub(super) fn distrust(&self, reason: Option<Reason>) {
        let mut state = self.state.lock().unwrap();
        state.distrust = reason;
        state.generations.clear();
    }

    /// Another size; the tracker begins anew.
    pub(super) fn resize(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap();
        let block = state.geometry.block_size().bytes();
        let old = state.reference.bytes().to_vec();
        state.geometry = geometry(bytes, block);
        state.reference = reference(&state.geometry);
        let kept = old.len().min(state.reference.bytes().len());
        state.reference.write(0, &old[..kept]);
        state.unreadable = BlockSet::new(state.geometry.block_count());
        state.generations.clear();
        state.distrust = None;
    }
}

fn reference(geometry: &Geometry) -> ReferenceVolume {
    ReferenceVolume::new(
        usize::try_from(geometry.volume_bytes()).unwrap(),
        geometry.block_size().bytes_usize(),
    )
}

impl SnapshotSource for SimVolume {
    fn geometry(&self) -> Geometry {
        self.state.lock().unwrap().geometry
    }

    fn begin(&self, ask: &SnapshotAsk) -> Result<Begun, BeginError> {
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        state.snapshots += 1;
        state.drawn += 1;
        let mut name = [0xa5; 16];
        name[..8].copy_from_slice(&state.drawn.to_le_bytes());
        let opened = GenerationName(name);
        let resolved = ask.base.filter(|base| state.generations.contains(base));
        let tracker = match (state.distrust, resolved) {
            (Some(reason), _) => TrackerSays::Distrusted(reason),
            (None, Some(_)) => TrackerSays::Resolved,
            (None, None) => TrackerSays::Unresolved,
        };
        let (wanted, changed) = match (tracker, resolved) {
            (TrackerSays::Resolved, Some(base)) => {
                let changed = state.reference.changed(&consumer(base));
                let mut wanted = changed.clone();
                wanted.union_with(
                    ask.absent
                        .as_ref()
                        .expect("a base comes with its absent set"),
                );
                (wanted, Some(changed))
            }
            _ => (BlockSet::full(state.geometry.block_count()), None),
        };
        state.reference.begin(&consumer(opened));
        // What is unreadable stays dirty in the generation that opened (P10).
        for block in state.unreadable.blocks() {
            let (start, length) = (
                state.geometry.block_start(block),
                state.geometry.block_bytes(block),
            );
            state
                .reference
                .touch(usize::try_from(start).unwrap(), length as usize);
        }
        state.generations.push(opened);
        if state.distrust.take().is_some() {
            state.generations = vec![opened];
        }
        let bytes = state.reference.bytes().to_vec();
        state.last_truth.clone_from(&bytes);
        // What is unreadable and was not asked for keeps its content from the base.
        for block in state.unreadable.blocks().filter(|b| wanted.contains(*b)) {
            let start = usize::try_from(state.geometry.block_start(block)).unwrap();
            let length = state.geometry.block_bytes(block) as usize;
            state.last_truth[start..start + length].fill(0);
        }
        Ok(Begun {
            snapshot: Arc::new(SimSnapshot {
                geometry: state.geometry,
                bytes,
                unreadable: state.unreadable.clone(),
                taken: Mutex::new((BlockSet::new(wanted.len()), 0)),
                wanted,
                changed,
                at_read: state.at_read.clone(),
                revoked: Mutex::new(None),
            }),
            id: SnapshotId([state.drawn.to_le_bytes()[0]; 16]),
            opened,
            tracker,
            evidence: Vec::new(),
            instant: WallTime(i64::try_from(state.drawn).unwrap()),
            consistency: Consistency::Instant,
        })
    }
}

struct SimSnapshot {
    geometry: Geometry,
    bytes: Vec<u8>,
    unreadable: BlockSet,
    wanted: BlockSet,
    changed: Option<BlockSet>,
    taken: Mutex<(BlockSet, u64)>,
    at_read: Option<AtRead>,
    revoked: Mutex<Option<RevokeCause>>,
}

impl BlockRead for SimSnapshot {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let block_bytes = self.geometry.block_size().bytes_usize();
        assert_eq!(buf.as_ptr() as usize % 4096, 0, "an unaligned buffer");
        assert_eq!(
            buf.len(),
            usize::try_from(range.count().0).unwrap() * block_bytes
        );
        let number = {
            let mut taken = self.taken.lock().unwrap();
            for block in range.blocks() {
                if !self.wanted.contains(block) || taken.0.contains(block) {
                    return Err(SourceError::Io(io::ErrorKind::InvalidInput.into()));
                }
                taken.0.insert(block);
            }
            taken.1 += 1;
            taken.1 - 1
        };
        if let Some(at_read) = &self.at_read {
            at_read(number).inspect_err(|error| {
                if let SourceError::Revoked(cause) = error {
                    *self.revoked.lock().unwrap() = Some(*cause);
                }
            })?;
        }
        let mut outcomes = Vec::new();
        for (block, part) in range.blocks().zip(buf.chunks_exact_mut(block_bytes)) {
            part.fill(0);
            if self.unreadable.contains(block) {
                part.fill(0xee);
                outcomes.push(BlockOutcome::Unreadable);
                continue;
            }
            let start = usize::try_from(self.geometry.block_start(block)).unwrap();
            let length = self.geometry.block_bytes(block) as usize;
            part[..length].copy_from_slice(&self.bytes[start..start + length]);
            outcomes.push(BlockOutcome::Data);
        }
        Ok(outcomes)
    }
}

impl SnapshotRead for SimSnapshot {
    fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    fn finish(&self) -> Result<(), SourceError> {
        if let Some(cause) = *self.revoked.lock().unwrap() {
            return Err(SourceError::Revoked(cause));
        }
        let taken = self.taken.lock().unwrap();
        if taken.0 == self.wanted {
            Ok(())
        } else {
            Err(SourceError::Io(io::ErrorKind::InvalidInput.into()))
        }
    }
}
