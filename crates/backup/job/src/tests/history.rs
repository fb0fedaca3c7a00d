//! Random histories: whatever happens between two backups, each image is the volume at its instant.

use super::volume::SimVolume;
use super::world::{Place, VOLUME, back_up, check, environment};
use crate::environment::Environment;
use blktide_format::manifest::ImageKind;
use blktide_testkit::pattern::{noise, stamped};
use blktide_testkit::seed::{Numbers, Seed};
use blktide_types::id::HostId;
use blktide_types::reason::Reason;
use std::sync::Arc;

fn sized(numbers: &mut Numbers, block: u32) -> u64 {
    let blocks = 1 + numbers.below((6 << 20) / u64::from(block)).min(300);
    u64::from(block) * blocks + 512 * numbers.below(u64::from(block) / 512)
}

/// Some writes of all sorts.
pub(super) fn write_some(volume: &SimVolume, numbers: &mut Numbers, sequence: &mut u64) {
    let bytes = volume.bytes().len();
    for _ in 0..numbers.below(20) {
        *sequence += 1;
        let start = numbers.index(bytes / 512) * 512;
        let most = (bytes - start).min(200_000);
        let length = (numbers.index(most / 512) + 1) * 512;
        match numbers.below(5) {
            0 => volume.zero(start, length),
            1 => volume.touch(start, length),
            2 => volume.write(start, &noise(length, Seed(*sequence))),
            _ => volume.write(start, &stamped(length, start as u64, *sequence)),
        }
    }
}

struct History {
    volume: Arc<SimVolume>,
    environment: Environment,
    places: Vec<Place>,
    numbers: Numbers,
    sequence: u64,
    block: u32,
    /// Of each place: the size at its newest image, and whether the tracker has gone on since.
    baselines: [Option<(u64, Tracked)>; 2],
    /// Why the tracker is distrusted now.
    distrust: Option<Reason>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tracked {
    Since,
    Lost,
}

impl History {
    fn new(seed: Seed, in_folder: bool) -> Self {
        let mut numbers = seed.numbers();
        let block = *numbers.pick(&[4096, 16384, 65536, 1 << 20]);
        let bytes = sized(&mut numbers, block).max(4096);
        let places = (0..2)
            .map(|n| {
                if in_folder {
                    Place::in_folder(&format!("history{n}-{:x}", seed.0), seed.nth(n))
                } else {
                    Place::in_memory(seed.nth(n))
                }
            })
            .collect();
        Self {
            volume: SimVolume::new(bytes, block),
            environment: environment(seed.nth(99)),
            places,
            numbers,
            sequence: 0,
            block,
            baselines: [None; 2],
            distrust: None,
        }
    }

    fn lose_track(&mut self) {
        for (_, tracked) in self.baselines.iter_mut().flatten() {
            *tracked = Tracked::Lost;
        }
    }

    /// The reason that the next backup to place `n` must give.
    fn expected(&self, n: usize) -> Option<Reason> {
        match self.baselines[n] {
            None => Some(Reason::FirstBackup),
            Some((bytes, _)) if bytes != self.volume.bytes().len() as u64 => Some(Reason::Resized),
            Some((_, tracked)) => self
                .distrust
                .or((tracked == Tracked::Lost).then_some(Reason::BitmapStale)),
        }
    }

    fn step(&mut self, note: &str) {
        match self.numbers.below(20) {
            0 => {
                let bytes = sized(&mut self.numbers, self.block).max(4096);
                if bytes != self.volume.bytes().len() as u64 {
                    self.volume.resize(bytes);
                    self.distrust = None;
                    self.lose_track();
                }
            }
            1 => {
                let block = self.numbers.below(150);
                let unreadable = self.numbers.chance(1, 2);
                self.volume.set_unreadable(block, unreadable);
            }
            2 => {
                let reason = *self.numbers.pick(&[
                    Reason::UncleanShutdown,
                    Reason::BitmapMissing,
                    Reason::ForeignWrite,
                ]);
                self.volume.distrust(Some(reason));
                self.distrust = Some(reason);
            }
            3..=8 => self.back_up(note),
            _ => write_some(&self.volume, &mut self.numbers, &mut self.sequence),
        }
    }

    fn back_up(&mut self, note: &str) {
        let n = self.numbers.index(2);
        let expected = self.expected(n);
        let place = &mut self.places[n];
        place.reopen();
        let report = back_up(place, &self.volume, &self.environment)
            .unwrap_or_else(|e| panic!("{note}: {e:?}"));
        assert_eq!(report.head.reason, expected, "{note}");
        let incremental = report.head.kind == ImageKind::Incremental;
        assert_eq!(incremental, report.head.reason.is_none(), "{note}");
        // A distrusted tracker begins anew with the next snapshot, whoever takes it.
        if self.distrust.take().is_some() {
            self.lose_track();
        }
        self.baselines[n] = Some((self.volume.bytes().len() as u64, Tracked::Since));
    }
}

fn run(name: &str, worlds: u64, in_folder: bool) {
    let seed = Seed::of_test(name);
    for n in 0..worlds {
        let seed = seed.nth(n);
        let note = format!("{name} world {n}, {seed}");
        let mut history = History::new(seed, in_folder);
        for _ in 0..40 {
            history.step(&note);
        }
        for place in &history.places {
            check(place, &note);
        }
    }
}

/// req A1, A4, B2: random writes, zeroes, unreadable blocks, other sizes, lost trackers, two repositories in turn; each
/// image of each restores byte for byte to what the volume was. trap TG3: each repository has its own baseline.
#[test]
fn every_image_is_the_volume_at_its_instant() {
    run("history", 25, false);
}

/// The same in real folders.
#[test]
fn every_image_is_the_volume_at_its_instant_in_a_folder() {
    run("history in a folder", 4, true);
}

/// req A5: a machine whose newest image is gone, damaged, or whose repository was put back to an older state: the next backup
/// is right, and says why. trap TG7: the backup after the damage heals.
#[test]
fn a_repository_behind_our_back_is_noticed() {
    for (n, what) in [
        "manifest",
        "end",
        "pack",
        "short pack",
        "bad manifest",
        "rolled back",
    ]
    .into_iter()
    .enumerate()
    {
        let seed = Seed::of_test("behind our back").nth(n as u64);
        let mut numbers = seed.numbers();
        let mut sequence = 0;
        let volume = SimVolume::new(4096 * 700 + 512, 4096);
        let environment = environment(seed);
        let mut place = Place::in_memory(seed);
        volume.write(0, &noise(700 * 4096, seed));
        back_up(&mut place, &volume, &environment).unwrap();
        let older = place.memory.fork();
        volume.write(4096 * 5, &noise(4096 * 40, seed.nth(1)));
        let newest = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(newest.head.reason, None);
        write_some(&volume, &mut numbers, &mut sequence);
        damage(&place, &older, what);
        place.truths.pop();
        if what == "bad manifest" || what.ends_with("pack") || what == "manifest" {
            // The image is there, and cannot be restored.
            place.truths.clear();
        }
        let report = back_up(&mut place, &volume, &environment)
            .unwrap_or_else(|e| panic!("{what}, {seed}: {e:?}"));
        let (_, truth) = place.truths.last().unwrap();
        let (restored, target) =
            super::world::restore_over(&place, report.head.sequence, vec![1; truth.len()]);
        assert_eq!(restored.unwrap().damaged, [], "{what}, {seed}");
        assert!(target.bytes() == *truth, "{what}, {seed}");
        if matches!(what, "end" | "rolled back") {
            // An older image is the newest now, and the tracker still knows its generation: a superset.
            assert_eq!(report.head.reason, None, "{what}");
            check(&place, what);
        } else {
            assert_eq!(
                report.head.reason,
                Some(Reason::BaseImageGone),
                "{what}, {seed}"
            );
        }
    }
}

/// Does `what` to the newest image.
fn damage(place: &Place, older: &blktide_repo::memory::MemoryStore, what: &str) {
    let memory = &place.memory;
    let names = memory.names();
    let new: Vec<&String> = {
        let before = older.names();
        names.iter().filter(|name| !before.contains(name)).collect()
    };
    let find = |part: &str| {
        (*new
            .iter()
            .find(|name| name.contains(part))
            .unwrap_or_else(|| panic!("no {part} in {new:?}")))
        .clone()
    };
    match what {
        "manifest" => memory.put(&find("manifest"), None),
        "end" => {
            for name in &new {
                if !name.contains("/packs/") {
                    memory.put(name, None);
                }
            }
        }
        "pack" => memory.put(&find("/packs/"), None),
        "short pack" => {
            let name = find("/packs/");
            let mut bytes = memory.bytes(&name);
            bytes.truncate(bytes.len() / 2);
            memory.put(&name, Some(bytes));
        }
        "bad manifest" => {
            let name = find("manifest");
            let mut bytes = memory.bytes(&name);
            bytes[300] ^= 4;
            memory.put(&name, Some(bytes));
        }
        "rolled back" => {
            for name in &new {
                memory.put(name, None);
            }
        }
        other => panic!("unknown damage {other}"),
    }
}

/// Another machine's backup of the same volume id in between.
#[test]
fn a_clone_shares_nothing_and_says_so() {
    let seed = Seed::of_test("clone");
    let mut place = Place::in_memory(seed);
    let volume = SimVolume::new(1 << 20, 65536);
    let clone = SimVolume::new(1 << 20, 65536);
    volume.write(0, &noise(1 << 20, seed));
    clone.write(0, &noise(1 << 20, seed));
    let here = environment(seed.nth(1));
    let mut there = environment(seed.nth(2));
    there.host = HostId([0x99; 16]);
    there.host_name = "web2".to_owned();
    back_up(&mut place, &volume, &here).unwrap();
    clone.write(65536, &noise(512, seed.nth(3)));
    let theirs = back_up(&mut place, &clone, &there).unwrap();
    assert_eq!(theirs.head.reason, Some(Reason::CloneDetected));
    volume.write(131_072, &noise(512, seed.nth(4)));
    let ours = back_up(&mut place, &volume, &here).unwrap();
    assert_eq!(ours.head.reason, Some(Reason::CloneDetected));
    volume.write(0, &noise(512, seed.nth(5)));
    let next = back_up(&mut place, &volume, &here).unwrap();
    assert_eq!(next.head.reason, None, "alone again");
    check(&place, "clone");
    assert_eq!(place.repository.claims(VOLUME).unwrap().len(), 4);
}
