//! Any object of the repository damaged: the next backup is right all the same, or says which blocks it shares with the damage.

use super::cancel::no_open_claims;
use super::volume::SimVolume;
use super::world::{Place, back_up, check, environment, remember, request, restore_over};
use crate::backup;
use crate::error::JobError;
use blktide_repo::Store;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;

const BYTES: usize = 4096 * 200 + 512;

/// Two images, and a volume that has changed since.
fn world(seed: Seed) -> (Place, Arc<SimVolume>) {
    let volume = SimVolume::new(BYTES as u64, 4096);
    volume.write(0, &noise(4096 * 150, seed));
    let mut place = Place::in_memory(seed);
    let environment = environment(seed);
    for n in 0..2 {
        back_up(&mut place, &volume, &environment).unwrap();
        volume.write(4096 * 9 * (n + 1), &noise(4096 * 7, seed.nth(n as u64)));
    }
    (place, volume)
}

fn damaged(bytes: &[u8], how: u64, seed: Seed) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let at = seed.numbers().index(bytes.len());
    match how {
        0 => return None,
        1 => bytes.truncate(at),
        2 => bytes[at] ^= 1 << (at % 8),
        _ => bytes.extend_from_slice(&[0; 4096]),
    }
    Some(bytes)
}

/// trap TG7: what is damaged is never leant on unseen: every object of a repository gone, cut off, flipped or too long, in turn.
#[test]
fn any_damaged_object_leaves_the_next_backup_right() {
    let seed = Seed::of_test("any object");
    let count = world(seed).0.memory.names().len();
    for n in 0..count {
        for how in 0..4 {
            let seed = seed.nth(n as u64 * 4 + how);
            let (mut place, volume) = world(seed);
            let mut names = place.memory.names();
            names.sort();
            let name = names[n].clone();
            let note = format!("{name} damaged in way {how}, {seed}");
            let bytes = damaged(&place.memory.bytes(&name), how, seed);
            place.memory.put(&name, bytes);
            let result = back_up(&mut place, &volume, &environment(seed));
            if name == "repository" {
                assert!(result.is_err(), "{note}");
                continue;
            }
            let report = result.unwrap_or_else(|e| panic!("{note}: {e:?}"));
            let truth = volume.last_truth();
            let (restored, target) =
                restore_over(&place, report.head.sequence, vec![0xaa; truth.len()]);
            let restored = restored.unwrap_or_else(|e| panic!("{note}: {e:?}"));
            let got = target.bytes();
            if restored.damaged.is_empty() {
                assert!(got == truth, "{note}");
                continue;
            }
            // A flipped bit in content that an incremental shares cannot be seen without reading all: but it is named.
            assert!(
                name.contains("/packs/") && how == 2 && report.head.reason.is_none(),
                "{note}: {:?}",
                restored.damage
            );
            for (block, (got, expected)) in got.chunks(4096).zip(truth.chunks(4096)).enumerate() {
                let block = BlockIndex(block as u64);
                let is_told = restored.damaged.iter().any(|range| range.contains(block));
                assert!(is_told || got == expected, "{note}: {block}");
            }
            // And a full backup heals.
            let mut full = request(&place, &volume);
            full.full = true;
            let healed = backup::start(full, &environment(seed)).unwrap().wait();
            let healed = healed.unwrap_or_else(|e| panic!("{note}: {e:?}"));
            let (restored, target) =
                restore_over(&place, healed.head.sequence, vec![0xaa; truth.len()]);
            assert_eq!(restored.unwrap().damaged, [], "{note}");
            assert!(target.bytes() == volume.bytes(), "{note}");
        }
    }
}

/// req B5: two backups of one volume into one repository at once: two images, both right, and a right next one.
#[test]
fn two_backups_at_once_are_two_images() {
    for n in 0..10 {
        let seed = Seed::of_test("two at once").nth(n);
        let (mut place, volume) = world(seed);
        let environment = environment(seed);
        let one = backup::start(request(&place, &volume), &environment).unwrap();
        let two = backup::start(request(&place, &volume), &environment).unwrap();
        let mut reports = [one.wait().unwrap(), two.wait().unwrap()];
        reports.sort_by_key(|report| report.head.sequence);
        // Nothing was written meanwhile: both instants hold the same.
        for report in &reports {
            remember(&mut place, &volume, report);
        }
        check(&place, "two at once");
        volume.write(0, &noise(4096 * 3, seed.nth(2)));
        let next = back_up(&mut place, &volume, &environment).unwrap();
        assert_eq!(next.head.reason, None);
        check(&place, "after two at once");
        no_open_claims(&place, "after two at once");
    }
}

/// The words and exit codes that scripts rely on.
#[test]
fn errors_have_the_codes_of_the_interface() {
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let cases = [
        (
            JobError::Cancelled {
                commit_in_doubt: false,
            },
            ("cancelled", 130),
        ),
        (JobError::Busy, ("busy", 1)),
        (
            JobError::RepositoryLow {
                free_bytes: 1,
                min_free_bytes: 2,
            },
            ("repository-full", 15),
        ),
        (
            JobError::Target {
                op: "written",
                source: full,
            },
            ("target-failed", 15),
        ),
        (blktide_repo::RepoError::NoImage.into(), ("no_image", 10)),
        (
            blktide_repo::RepoError::ClaimInUse.into(),
            ("claim_in_use", 11),
        ),
    ];
    for (error, expected) in cases {
        assert_eq!((error.code(), error.exit()), expected, "{error:?}");
    }
    let memory = blktide_repo::MemoryStore::new();
    assert!(memory.size("repository").unwrap().is_none());
    let error: JobError = blktide_repo::Repository::open(Arc::new(memory))
        .unwrap_err()
        .into();
    assert_eq!((error.code(), error.exit()), ("no_repository", 10));
}
