//! The model holds, and finds each planted fault.

use super::{Op, Seen, run, script, shrink};
use crate::broken::{Break, leave_out};
use blktide_testkit::seed::Seed;

const OPS_PER_WORLD: usize = 4_000;

/// Runs `worlds` worlds; a failure is shrunk and printed so that it can be replayed.
fn explore(name: &str, worlds: u64) -> Result<Seen, String> {
    let first = Seed::of_test(name);
    let mut seen = Seen::default();
    for n in 0..worlds {
        let start = first.nth(n);
        let ops = script(start, OPS_PER_WORLD);
        match run(start, &ops) {
            Ok(world) => seen.add(world),
            Err((after, what)) => {
                let least = shrink(start, &ops, after);
                let end = run(start, &least).err();
                return Err(format!(
                    "world {n} of {first} fails after {after} ops: {what}\nleast: {least:?}\nends: {end:?}"
                ));
            }
        }
    }
    Ok(seen)
}

/// req B1, A8, A9: 400,000 random operations, content, changed sets and snapshots compared after each.
/// trap TA2, TE1, TE2, TE8, TE9, TF1, TB2: discards, writes in flight over the instant, writes while a snapshot ends, parts of
/// blocks, data that become holes, servers that die without a word.
///
/// `BLKTIDE_OPS` asks for more.
#[test]
fn no_change_is_missed_and_each_image_is_its_instant() {
    let ops: u64 = std::env::var("BLKTIDE_OPS").map_or(400_000, |t| t.parse().unwrap());
    let worlds = ops.div_ceil(u64::try_from(OPS_PER_WORLD).unwrap());
    let seen = explore("engine model", worlds).unwrap();
    println!("{seen:?}");
    for often in [
        seen.incrementals,
        seen.fulls,
        seen.given_up,
        seen.preserved,
        seen.waited,
        seen.taken_over,
        seen.cuts,
        seen.stops,
        seen.unknown,
    ] {
        assert!(
            often > worlds / 4,
            "something hardly ever happened: {seen:?}"
        );
    }
}

/// Each rule left out is found within some worlds.
#[test]
fn every_planted_fault_is_found() {
    for rule in [
        Break::MarkAfterWrite,
        Break::OverwriteBeforeCopy,
        Break::NameReused,
        Break::NoteTrusted,
        Break::PartialUnmarked,
        Break::LastBlockMissed,
        Break::DiscardUnpreserved,
        Break::DiscardUnmarked,
        Break::MergeForgets,
        Break::TakeoverKeepsSnapshot,
        Break::WrongBankCleared,
        Break::DistrustKeepsNames,
        Break::SilentPassThrough,
        Break::NoWaitForPreserving,
        Break::PreservedBeforeCopy,
        Break::LoserKeeps,
        Break::TakeByStore,
        Break::ParkedUnmarked,
        Break::NoWait,
        Break::OneQueue,
        Break::LeaveBeforeWritten,
    ] {
        let found = find(rule);
        leave_out(None);
        println!("{rule:?}: {found}");
    }
}

fn find(rule: Break) -> String {
    let first = Seed::of_test("planted faults");
    for n in 0..200 {
        let seed = first.nth(n);
        let ops = script(seed, OPS_PER_WORLD);
        leave_out(Some(rule));
        if let Err((after, what)) = run(seed, &ops) {
            return format!("world {n}, after {after}: {what}");
        }
    }
    panic!("{rule:?} was not found");
}

#[test]
fn a_failing_list_is_shortened() {
    leave_out(Some(Break::DiscardUnmarked));
    let seed = Seed(5);
    let mut least: Vec<Op> = Vec::new();
    for n in 0..50 {
        let ops = script(seed.nth(n), OPS_PER_WORLD);
        if let Err((after, _)) = run(seed.nth(n), &ops) {
            least = shrink(seed.nth(n), &ops, after);
            run(seed.nth(n), &least).unwrap_err();
            break;
        }
    }
    leave_out(None);
    println!("{least:?}");
    assert!(!least.is_empty() && least.len() < 100);
}
