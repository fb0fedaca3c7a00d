//! Restores: onto garbage, onto what is nearly equal, into sparse files, from damaged images.

use super::volume::SimVolume;
use super::world::{
    MemoryTarget, Place, back_up, environment, restore_over, restore_request, scratch, verify,
};
use crate::file_target::{Claimed, FileTarget};
use crate::restore::{self, Background, HEAD_BYTES};
use blktide_image::Depth;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::io::BlockWrite;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::Arc;

/// 64 blocks of noise, a long run of zeroes, 30 more of noise, a short last block.
fn world(seed: Seed, block: u32) -> (Place, Arc<SimVolume>) {
    let size = block as usize;
    let volume = SimVolume::new(size as u64 * 600 + 1536, block);
    volume.write(0, &noise(size * 64, seed));
    volume.write(size * 570, &noise(size * 30 + 1536, seed.nth(1)));
    let mut place = Place::in_memory(seed);
    back_up(&mut place, &volume, &environment(seed)).unwrap();
    (place, volume)
}

/// trap TF1, TF2, TF3: onto a target full of old data every zero is written, and what held data before holds zeroes after.
#[test]
fn zeroes_overwrite_what_was_there() {
    let seed = Seed::of_test("zeroes");
    let (mut place, volume) = world(seed, 4096);
    let old = volume.bytes();
    volume.zero(4096 * 10, 4096 * 40);
    back_up(&mut place, &volume, &environment(seed)).unwrap();
    let (report, target) = restore_over(&place, place.truths[1].0, old);
    let report = report.unwrap();
    assert!(target.bytes() == volume.bytes());
    assert_eq!(
        report.written_bytes + report.zeroed_bytes,
        volume.bytes().len() as u64,
        "every byte once"
    );
}

/// req A2: the block with the superblock is zeroed first and written last.
#[test]
fn the_head_is_zeroed_first_and_written_last() {
    let seed = Seed::of_test("head");
    let (place, volume) = world(seed, 65536);
    let (report, target) = restore_over(&place, 1, vec![0xaa; volume.bytes().len()]);
    report.unwrap();
    let writes = target.writes.lock().unwrap();
    assert_eq!(writes[0], (0, HEAD_BYTES));
    let first_of_the_end = writes
        .iter()
        .skip(1)
        .position(|(offset, _)| *offset < HEAD_BYTES)
        .unwrap()
        + 1;
    assert!(
        writes[first_of_the_end..]
            .iter()
            .all(|(offset, length)| offset + length <= HEAD_BYTES)
    );
    assert!(first_of_the_end > 2);
}

/// A restore that is cut off leaves no superblock.
#[test]
fn a_cancelled_restore_leaves_a_zeroed_head() {
    struct CancelAt(
        Arc<MemoryTarget>,
        std::sync::OnceLock<Arc<crate::running::Control>>,
    );
    impl BlockWrite for CancelAt {
        fn write_at(&self, offset_bytes: u64, buf: &[u8]) -> std::io::Result<()> {
            if offset_bytes >= HEAD_BYTES {
                self.1.wait().cancel();
            }
            self.0.write_at(offset_bytes, buf)
        }
        fn zero_at(&self, offset_bytes: u64, len_bytes: u64) -> std::io::Result<()> {
            self.0.zero_at(offset_bytes, len_bytes)
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let seed = Seed::of_test("cut off");
    let (place, volume) = world(seed, 65536);
    let memory = MemoryTarget::of(volume.bytes());
    let target = Arc::new(CancelAt(Arc::clone(&memory), std::sync::OnceLock::new()));
    let request = restore_request(&place, 1, Arc::<CancelAt>::clone(&target));
    let running = restore::start(request, &environment(seed)).unwrap();
    target.1.set(Arc::clone(running.control())).unwrap();
    assert_eq!(running.wait().unwrap_err().code(), "cancelled");
    let head = usize::try_from(HEAD_BYTES).unwrap();
    assert!(memory.bytes()[..head].iter().all(|b| *b == 0));
}

/// req F4: what is equal already is not written; if all is equal, nothing is.
#[test]
fn only_what_differs_is_written() {
    let seed = Seed::of_test("differing");
    for block in [4096_u32, 65536] {
        let (place, volume) = world(seed, block);
        let mut differing = volume.bytes();
        let size = block as usize;
        let last = differing.len() - 1;
        for at in [size * 40, size * 399, last] {
            differing[at] ^= 1;
        }
        for (before, blocks) in [(volume.bytes(), 0), (differing, 3)] {
            let target = MemoryTarget::of(before);
            let mut request = restore_request(&place, 1, Arc::<MemoryTarget>::clone(&target));
            request.read_back = Some(Arc::<MemoryTarget>::clone(&target));
            let report = restore::start(request, &environment(seed))
                .unwrap()
                .wait()
                .unwrap();
            assert!(target.bytes() == volume.bytes(), "{block}");
            let writes = target.writes.lock().unwrap().clone();
            let in_rest = writes.iter().filter(|(at, _)| *at >= HEAD_BYTES).count();
            assert_eq!(in_rest, blocks, "{writes:?}");
            if blocks == 0 {
                assert_eq!(writes, []);
                assert_eq!(report.equal_bytes, volume.bytes().len() as u64);
            }
        }
    }
}

/// req A2: into a new file: sparse, and equal by cmp(1); over an existing file: the same. Nobody else may have it.
#[test]
fn files_are_sparse_and_equal() {
    let seed = Seed::of_test("files");
    for block in [4096_u32, 65536] {
        let (place, volume) = world(seed, block);
        let (new, truth) = (
            scratch(&format!("new-{block}")),
            scratch(&format!("truth-{block}")),
        );
        let bytes = volume.bytes().len() as u64;
        {
            use std::io::Write as _;
            std::fs::File::create(&truth)
                .unwrap()
                .write_all(&volume.bytes())
                .unwrap();
        }
        for round in 0..3 {
            let target = Arc::new(match round {
                0 => FileTarget::create(&new, bytes).unwrap(),
                1 => FileTarget::overwrite(&new, bytes, Background::Zero).unwrap(),
                _ => {
                    std::fs::File::options()
                        .write(true)
                        .open(&new)
                        .and_then(|f| {
                            std::os::unix::fs::FileExt::write_all_at(&f, &[9; 5000], 777_777)
                        })
                        .unwrap();
                    FileTarget::overwrite(&new, bytes, Background::Unknown).unwrap()
                }
            });
            let refused = FileTarget::overwrite(&new, bytes, Background::Zero).unwrap_err();
            assert_eq!(refused.code(), "target_in_use");
            let mut request = restore_request(&place, 1, Arc::<FileTarget>::clone(&target));
            request.background = target.background();
            if round == 2 {
                request.read_back = Some(Arc::<FileTarget>::clone(&target));
            }
            restore::start(request, &environment(seed))
                .unwrap()
                .wait()
                .unwrap();
            drop(target);
            let same = Command::new("cmp").arg(&new).arg(&truth).status().unwrap();
            assert!(same.success(), "round {round}, block {block}");
            let blocks = std::fs::metadata(&new).unwrap().blocks() * 512;
            assert!(
                blocks < u64::from(block) * 120,
                "round {round}: {blocks} bytes allocated of {bytes}"
            );
        }
        assert!(FileTarget::create(&new, bytes).is_err(), "it exists");
        std::fs::remove_file(&new).unwrap();
        std::fs::remove_file(&truth).unwrap();
    }
}

/// trap TC8: a claim keeps others out and changes nothing; a device's tracker can be told before anything is written.
#[test]
fn a_claim_changes_nothing() {
    let path = scratch("claim");
    drop(Claimed::create(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    Claimed::create(&path).unwrap_err();
    let mut file = std::fs::File::options().write(true).open(&path).unwrap();
    std::io::Write::write_all(&mut file, b"what it held").unwrap();
    let claimed = Claimed::file(&path).unwrap();
    assert_eq!(Claimed::file(&path).unwrap_err().code(), "target_in_use");
    assert!(matches!(
        file.try_lock(),
        Err(std::fs::TryLockError::WouldBlock)
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"what it held");
    drop(claimed.ready(4096, Background::Zero).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
    std::fs::remove_file(&path).unwrap();
}

/// trap TG8: damage costs the blocks it lies in, these are named, all else is restored; verify finds the same.
#[test]
fn damage_costs_what_it_hits_and_is_named() {
    let seed = Seed::of_test("damage");
    for n in 0..12 {
        let (place, volume) = world(seed.nth(n), 65536);
        let truth = volume.bytes();
        let packs: Vec<String> = place
            .memory
            .names()
            .into_iter()
            .filter(|name| name.contains("/packs/"))
            .collect();
        let name = &packs[seed.nth(n).numbers().index(packs.len())];
        let mut bytes = place.memory.bytes(name);
        let at = seed.nth(100 + n).numbers().index(bytes.len());
        bytes[at] ^= 0x20;
        place.memory.put(name, Some(bytes));
        let note = format!("bit in byte {at} of {name}");
        let proof = verify(&place, Depth::Data).wait().unwrap();
        assert!(!proof.damage.is_empty(), "{note} is not found");
        let (report, target) = restore_over(&place, 1, vec![0xaa; truth.len()]);
        let Ok(report) = report else {
            // The head of the image itself.
            continue;
        };
        assert_eq!(report.damaged.is_empty(), report.damage.is_none());
        let restored = target.bytes();
        for (block, (got, expected)) in restored.chunks(65536).zip(truth.chunks(65536)).enumerate()
        {
            let named = report
                .damaged
                .iter()
                .any(|range: &BlockRange| range.contains(BlockIndex(block as u64)));
            if named {
                assert!(got.iter().all(|b| *b == 0), "{note}: block {block}");
            } else {
                assert!(
                    got == expected,
                    "{note}: block {block} is wrong and not named"
                );
            }
        }
    }
}

/// Blocks that the device could not read are zeroes, and named.
#[test]
fn unreadable_blocks_are_named() {
    let seed = Seed::of_test("unreadable");
    let volume = SimVolume::new(4096 * 300, 4096);
    volume.write(0, &noise(4096 * 300, seed));
    volume.set_unreadable(17, true);
    volume.set_unreadable(18, true);
    let mut place = Place::in_memory(seed);
    let report = back_up(&mut place, &volume, &environment(seed)).unwrap();
    let range = BlockRange::new(BlockIndex(17), BlockIndex(19)).unwrap();
    assert_eq!(report.unreadable, [range]);
    let (restored, target) = restore_over(&place, 1, vec![0xaa; 4096 * 300]);
    assert_eq!(restored.unwrap().unreadable, [range]);
    assert!(target.bytes() == place.truths[0].1);
    volume.set_unreadable(17, false);
    volume.set_unreadable(18, false);
    let next = back_up(&mut place, &volume, &environment(seed)).unwrap();
    assert_eq!(
        (next.head.reason, next.head.counters.read_bytes),
        (None, 2 * 4096),
        "they are wanted again"
    );
    assert!(next.unreadable.is_empty());
    let (restored, target) = restore_over(&place, next.head.sequence, vec![0xaa; 4096 * 300]);
    assert_eq!(restored.unwrap().unreadable, []);
    assert!(target.bytes() == volume.bytes());
}
