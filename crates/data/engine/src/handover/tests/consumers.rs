//! Generations as names (P2) over lives: two repositories in turn, one lagging; rolled back, hints lost, backups that
//! die before and after their commit, clean stops and others. The oracle: an incremental laid over its base is the volume.

use super::super::{Begun, Bitmap, Stored, attach, stop};
use super::folder::{Folder, identity};
use crate::control::{Absent, Control, Limits, SnapshotMemories, SnapshotRequest};
use crate::engine::Engine;
use crate::evidence::Evidence;
use crate::gate::HoldState;
use crate::snapshot::Overflow;
use crate::state::SlotIndex;
use crate::{Memory, PlainMemory};
use blktide_format::shared::Shape;
use blktide_testkit::disk::SimDisk;
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::clock::{Instant, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, RepositoryId, SnapshotId};
use blktide_types::range::BlockRange;
use blktide_types::unit::{BlockIndex, BlockSize};
use core::time::Duration;
use std::sync::Arc;

const BLOCKS: usize = 40;

/// An image: the generation that opened at its instant, and what it holds.
#[derive(Clone)]
struct Image {
    opened: GenerationName,
    content: Vec<u64>,
}

struct World {
    disk: SimDisk,
    control: Control,
    shape: Shape,
    volume: Vec<u64>,
    repositories: [Vec<Image>; 2],
    names: u64,
    lives: u8,
    boot: u8,
    incrementals: u64,
    fulls: u64,
}

fn shape() -> Shape {
    let (block, grain) = (BlockSize::new(8192).unwrap(), BlockSize::IMAGE_MIN);
    Shape {
        generations: 7,
        banks: 6,
        hints: 2,
        log_bytes: 8,
        ..Shape::usual(Geometry::new(BLOCKS as u64 * 8192, block, grain, 512, 512).unwrap())
    }
}

fn fresh_control(shape: Shape) -> Control {
    let control: Arc<dyn Memory> = PlainMemory::new(shape.control_words());
    let banks: Arc<dyn Memory> = PlainMemory::new(shape.banks_words());
    Engine::create(&control, &banks, shape).unwrap().control()
}

impl World {
    fn new() -> Self {
        let shape = shape();
        let mut world = Self {
            disk: SimDisk::new(),
            control: fresh_control(shape),
            shape,
            volume: vec![0; BLOCKS],
            repositories: [Vec::new(), Vec::new()],
            names: 0,
            lives: 0,
            boot: 0,
            incrementals: 0,
            fulls: 0,
        };
        world.attach();
        world
    }

    fn name(&mut self) -> GenerationName {
        self.names += 1;
        GenerationName((u128::from(self.names) << 40 | 3).to_le_bytes())
    }

    fn folder<T>(&self, run: impl FnOnce(&mut Folder<'_>) -> T) -> T {
        let mut look = |_: &SimDisk| ();
        run(&mut Folder {
            disk: &self.disk,
            node: self.disk.root(),
            plant: None,
            attaching: true,
            evidence: Evidence::blind(),
            look: &mut look,
        })
    }

    fn who(&self) -> super::super::Identity {
        super::super::Identity {
            geometry: self.shape.geometry,
            ..identity(self.lives, self.boot)
        }
    }

    fn attach(&mut self) {
        self.lives += 1;
        let (fresh, other) = ((self.name(), WallTime(1)), self.name());
        self.control = fresh_control(self.shape);
        let begun = self.folder(|f| attach(self.who(), f)).unwrap();
        match begun {
            Begun::Continued { generations, .. } => {
                self.control.begin_life(&generations, fresh).unwrap();
            }
            Begun::Anew { reason, detail } => {
                self.control.begin_life(&[], fresh).unwrap();
                self.control.distrust((reason, WallTime(1)), detail, other);
            }
        }
    }

    fn clean_restart(&mut self) {
        let bitmap = Bitmap::Known {
            generations: self.control.export(),
            distrust: None,
        };
        let stored = self.folder(|f| stop(self.who(), bitmap, f));
        assert_eq!(stored, Stored::Whole);
        self.boot += 1;
        self.attach();
    }

    /// The daemon says again which boundaries to keep, as it does at each attach.
    fn hint(&mut self) {
        for (number, images) in (1..).zip(&self.repositories) {
            if let Some(newest) = images.last() {
                self.control
                    .set_hint(RepositoryId([number; 16]), newest.opened);
            }
        }
    }

    fn write(&mut self, numbers: &mut Numbers) {
        let start = numbers.index(BLOCKS);
        let end = (start + 1 + numbers.index(4)).min(BLOCKS);
        let index = |block: usize| BlockIndex(block as u64);
        self.control
            .mark(BlockRange::new(index(start), index(end)).unwrap());
        for block in &mut self.volume[start..end] {
            *block = numbers.next_u64();
        }
    }

    /// The instant of a backup on `base`; the generation that it opened.
    fn snapshot(&mut self, base: Option<GenerationName>) -> GenerationName {
        let opens = self.name();
        let plain = |words| -> Arc<dyn Memory> { PlainMemory::new(words) };
        let asked = SnapshotRequest {
            id: SnapshotId([1; 16]),
            opens,
            opens_at: WallTime(1),
            base,
            absent: Absent::Words(&[]),
            limits: Limits {
                overflow: Overflow::GiveUp,
                wait_limit: Duration::from_secs(1),
                lease: Duration::from_secs(2),
            },
            memories: SnapshotMemories {
                states: plain(self.shape.states_words()),
                index: plain(SlotIndex::words(1)),
                wanted: plain(self.shape.wanted_words()),
                save_slots: 1,
                save_area: Arc::new(()),
            },
        };
        let prepared = self.control.prepare(&asked).unwrap();
        let limit = Duration::from_secs(1);
        let mut hold = self.control.hold(Instant(0), limit).unwrap();
        let state = self.control.poll(&mut hold, Instant(0));
        assert_eq!(state, HoldState::Held);
        self.control.commit(&hold, &prepared, Instant(0)).unwrap();
        opens
    }

    /// A backup: `dies` = 1 after the instant, 2 after the commit and before the daemon heard of it.
    fn backup(&mut self, repository: usize, dies: u64) -> Result<(), String> {
        let base = self.repositories[repository].last().cloned();
        let name = base.as_ref().map(|b| b.opened);
        let changed = name.and_then(|n| self.control.changed_since(n).ok());
        let opened = self.snapshot(name);
        self.control.end_snapshot().unwrap();
        if dies == 1 {
            return Ok(());
        }
        let content = if let (Some(base), Some(changed)) = (base, changed) {
            self.incrementals += 1;
            let mut content = base.content;
            for block in changed.blocks() {
                let block = usize::try_from(block.0).unwrap();
                content[block] = self.volume[block];
            }
            content
        } else {
            self.fulls += 1;
            self.volume.clone()
        };
        if content != self.volume {
            return Err(format!(
                "repository {repository}: the image of {opened} is not the volume"
            ));
        }
        self.repositories[repository].push(Image { opened, content });
        if dies != 2 {
            let id = RepositoryId([u8::try_from(repository).unwrap() + 1; 16]);
            self.control.set_hint(id, opened);
        }
        Ok(())
    }

    fn step(&mut self, numbers: &mut Numbers) -> Result<(), String> {
        match numbers.below(40) {
            0..20 => self.write(numbers),
            20..28 => self.backup(0, numbers.below(6))?,
            // The lagging one.
            28..30 => self.backup(1, numbers.below(6))?,
            30 => {
                let id = numbers.pick(&[1_u8, 2]);
                self.control.drop_hint(RepositoryId([*id; 16]));
            }
            31..33 => {
                let repository = numbers.index(2);
                let gone = numbers.below(3);
                for _ in 0..gone {
                    self.repositories[repository].pop();
                }
            }
            33..38 => self.clean_restart(),
            38 => {
                // Killed: same boot, nothing stored.
                self.write(numbers);
                self.attach();
            }
            _ => {
                // The power goes.
                self.write(numbers);
                let cuts = self.disk.cuts(8, Seed(numbers.next_u64()));
                self.disk = self.disk.after(numbers.pick(&cuts));
                self.boot += 1;
                self.attach();
            }
        }
        Ok(())
    }
}

/// req A5, A9, trap TG1, TG3, TB8: whatever happens to repositories, hints and lives, an incremental lacks nothing.
#[test]
fn two_consumers_over_many_lives() {
    let seed = Seed::of_test("two_consumers_over_many_lives");
    let (mut incrementals, mut fulls) = (0, 0);
    for round in 0..40 {
        let mut numbers = seed.nth(round).numbers();
        let mut world = World::new();
        for step in 0..120 {
            if world.lives > 120 {
                break;
            }
            world
                .step(&mut numbers)
                .unwrap_or_else(|e| panic!("{seed}, round {round}, step {step}: {e}"));
        }
        incrementals += world.incrementals;
        fulls += world.fulls;
    }
    assert!(
        incrementals > 300,
        "{incrementals} incrementals, {fulls} in full"
    );
    assert!(fulls > 50, "{incrementals} incrementals, {fulls} in full");
}

/// req A5, A9: two clean reboots between two backups of the lagging consumer, while the other backs up daily: still incremental.
#[test]
fn a_lagging_consumer_is_still_incremental_after_two_reboots() {
    let seed = Seed::of_test("a_lagging_consumer");
    let mut numbers = seed.numbers();
    let mut world = World::new();
    world.backup(0, 0).unwrap();
    world.backup(1, 0).unwrap();
    for _ in 0..2 {
        for _ in 0..9 {
            world.write(&mut numbers);
            world.backup(0, 0).unwrap();
        }
        world.clean_restart();
        world.hint();
        world.write(&mut numbers);
    }
    let before = world.incrementals;
    world.backup(1, 0).unwrap();
    world.backup(0, 0).unwrap();
    assert_eq!(world.incrementals, before + 2, "{seed}");
}

/// req A5: a repository rolled back to an older image: known names give all since then, unknown ones a full backup.
#[test]
fn a_repository_rolled_back_gets_all_since_its_image() {
    let seed = Seed::of_test("rolled_back");
    let mut numbers = seed.numbers();
    let mut world = World::new();
    world.backup(0, 0).unwrap();
    for _ in 0..2 {
        world.write(&mut numbers);
        world.backup(0, 0).unwrap();
    }
    world.repositories[0].truncate(1);
    world.clean_restart();
    world.backup(0, 0).unwrap();
    let (incrementals, fulls) = (world.incrementals, world.fulls);
    assert_eq!((incrementals, fulls), (3, 1), "{seed}");
    // The power goes: all names are forgotten, the image's is stale.
    world.boot += 1;
    world.attach();
    world.backup(0, 0).unwrap();
    assert_eq!((world.incrementals, world.fulls), (incrementals, fulls + 1));
}
