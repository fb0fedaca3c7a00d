//! `blktided` killed during backups: no write fails, no half image is seen, the next backup is right.
//! needs: root, loop, fuse
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{Instance, Recorder, Seed, count, fill_file, pass, text_of};
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn images(instance: &Instance) -> Result<BTreeSet<String>> {
    let json = instance.ctl_ok(&["images", "data", "--json"])?.json()?;
    let list = json["images"].as_array().context("images")?;
    list.iter()
        .map(|i| Ok(text_of(i, "/image")?.to_owned()))
        .collect()
}

/// req X3, B6: 20 kills of the daemon during a backup, a writer all the time.
/// trap TB9: a killed process loses no change.
#[test]
fn the_daemon_killed_during_backups() -> Result<()> {
    let mut instance = Instance::started("p13")?;
    let backing = instance.join("backing");
    fill_file(&backing, 96 * MIB)?;
    let before = instance.join("before");
    std::fs::copy(&backing, &before)?;
    instance.repo_init("main")?;
    let node = instance.volume_add("data", &backing, &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    let (keeper, server) = (instance.keeper_pid("data")?, instance.server_pid("data")?);
    let units = 96 * MIB / 4096;
    let writer = Recorder::start(&node, 0..units, 0x13, Duration::from_millis(1))?;
    let mut seed = Seed::of("p13", 0x13)?;
    let (mut interrupted, mut finished) = (0, 0);
    for round in 0..count(20, 200) {
        let known = images(&instance)?;
        let words: &[&str] = if round % 2 == 0 {
            &["backup", "data", "--full", "--json"]
        } else {
            &["backup", "data", "--json"]
        };
        let running = instance.ctl_start(words)?;
        pass(Duration::from_micros(seed.below(if round % 2 == 0 {
            500_000
        } else {
            100_000
        })));
        instance.end_daemon("KILL")?;
        let ended = running.finish()?;
        instance.start()?;
        let now = images(&instance)?;
        let more: Vec<&String> = now.difference(&known).collect();
        ensure!(
            now.is_superset(&known) && more.len() <= 1,
            "round {round}: {known:?} became {now:?}"
        );
        // A reply may be lost, an image that was told may not.
        ensure!(
            ended.code != Some(0) || more.len() == 1,
            "round {round}: told and not there"
        );
        if ended.code == Some(0) {
            finished += 1;
        } else {
            interrupted += 1;
        }
    }
    ensure!(
        (keeper, server) == (instance.keeper_pid("data")?, instance.server_pid("data")?),
        "the volume's processes are the same"
    );
    let last = instance.backup("data", &[])?;
    let kind: Option<&str> = last.pointer("/kind").and_then(Value::as_str);
    ensure!(kind == Some("incremental"), "{last}");
    let record = writer.finish()?;
    let restored = instance.join("restored");
    instance.restore(text_of(&last, "/image")?, &restored, &[])?;
    let prefix = record.prefix_of(&restored, Some(&before), units)?;
    instance.backup_is("data", "incremental", None)?;
    instance.image_equals("data@latest", &backing, &[])?;
    instance.ctl_ok(&["verify", "--read-data"])?;
    println!(
        "figure: {interrupted} backups died with blktided, {finished} were done; no write failed, longest wait {:.4} s; \
         image is write {prefix} of {}",
        record.longest_wait.as_secs_f64(),
        record.count()
    );
    instance.end_daemon("TERM")
}
