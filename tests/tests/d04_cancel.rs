//! A cancelled backup forgets nothing: cancelled at random moments under a writer, the next incremental covers it all.
//! needs: root, loop, fuse
//! limit: 300 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{Instance, Recorder, Seed, Stopwatch, count, fill_file, pass, text_of};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn micros(seconds: f64) -> u64 {
    u64::try_from(Duration::from_secs_f64(seconds).as_micros()).unwrap_or(u64::MAX)
}

/// req D4: cancel at 100 random moments, under a writer.
/// trap TG1: given up at any point, both intervals are in the next.
/// trap TG2: nothing has to be cleaned by hand.
#[test]
fn cancelled_at_random_moments() -> Result<()> {
    let instance = Instance::started("d04")?;
    let backing = instance.join("backing");
    fill_file(&backing, 96 * MIB)?;
    let before = instance.join("before");
    std::fs::copy(&backing, &before)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    let watch = Stopwatch::start();
    instance.backup_is("data", "full", Some("first-backup"))?;
    // A moment is drawn from the time that a backup takes on this machine.
    let full_us = micros(watch.seconds());
    let units = 96 * MIB / 4096;
    let writer = Recorder::start(&node, 0..units, 0xd04, Duration::from_millis(2))?;
    let mut seed = Seed::of("d04", 0xd04)?;
    let (mut cancelled, mut done, mut slowest) = (0, 0, 0.0_f64);
    for round in 0..count(100, 1000) {
        let words: &[&str] = if round % 3 == 0 {
            &["backup", "data", "--json", "--full"]
        } else {
            &["backup", "data", "--json"]
        };
        let running = instance.ctl_start(words)?;
        let span_us = if round % 3 == 0 { full_us } else { full_us / 3 };
        pass(Duration::from_micros(seed.below(span_us)));
        let watch = Stopwatch::start();
        let cancel = instance.ctl(&["cancel", "data"])?;
        slowest = slowest.max(watch.seconds());
        let ended = running.finish()?;
        match ended.code {
            Some(0) => done += 1,
            Some(1 | 130) => {
                ensure!(
                    ended.stdout.contains("cancelled"),
                    "{}\n{}",
                    ended.stdout,
                    ended.stderr
                );
                cancelled += 1;
            }
            other => ensure!(
                false,
                "backup {other:?}, cancel {cancel:?}\n{}\n{}",
                ended.stdout,
                ended.stderr
            ),
        }
    }
    let last = instance.backup("data", &[])?;
    ensure!(text_of(&last, "/kind")? == "incremental", "{last}");
    let under_the_writer = text_of(&last, "/image")?.to_owned();
    let record = writer.finish()?;
    let restored = instance.join("restored");
    instance.restore(&under_the_writer, &restored, &[])?;
    let prefix = record.prefix_of(&restored, Some(&before), units)?;
    instance.backup_is("data", "incremental", None)?;
    instance.image_equals("data@latest", &backing, &[])?;
    instance.ctl_ok(&["verify", "--read-data"])?;
    println!(
        "figure: {cancelled} cancelled, {done} done before the cancel; slowest answer {slowest:.3} s; \
         longest wait of a write {:.4} s; image is write {prefix} of {}",
        record.longest_wait.as_secs_f64(),
        record.count()
    );
    ensure!(cancelled > 20, "only {cancelled} were cancelled in time");
    ensure!(slowest < 5.0, "a cancel took {slowest} s to answer");
    Ok(())
}
