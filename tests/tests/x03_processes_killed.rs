//! The volume's processes are killed under load: a pause, no error, no missed change.
//! needs: root, loop, fuse, ext4, fio
//! limit: 420 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_tests::{
    FileSystem, Fio, FioRun, Instance, Mounted, Running, Seed, Stopwatch, binary, count, fill_file,
    kill, number_at, pass, put, text_of, wait_until,
};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VOLUME: &str = "data";

/// A volume with ext4 on it, mounted, and a full backup of it.
fn prepared(instance: &Instance) -> Result<Mounted> {
    let backing = instance.join("backing");
    fill_file(&backing, 192 * MIB)?;
    instance.repo_init("main")?;
    let node = instance.volume_add(VOLUME, &backing, &[])?;
    FileSystem::Ext4.make(&node)?;
    let mounted = Mounted::new(&node, &instance.join("mnt"), &[])?;
    instance.backup_is(VOLUME, "full", Some("first-backup"))?;
    Ok(mounted)
}

/// Writes that verify themselves: in `O_DIRECT` with many under way, or through the page cache.
fn load(mounted: &Mounted, direct: bool) -> Result<Running> {
    let (file, how): (_, &[&str]) = if direct {
        ("direct", &["direct=1", "ioengine=libaio", "iodepth=16"])
    } else {
        ("buffered", &["direct=0", "ioengine=psync", "fsync=64"])
    };
    let mut options = vec![
        "rw=randwrite",
        "bs=4k",
        "size=24m",
        "verify=crc32c",
        "verify_fatal=1",
        "do_verify=1",
    ];
    options.extend_from_slice(how);
    Fio::new(file, &mounted.join(file), &options)
        .limit(180)
        .start()
}

fn judge(running: Running) -> Result<FioRun> {
    Fio::judge(running.finish()?)
}

/// The volume is quiet: what a backup on top of the first image restores to is what the backing device holds.
fn nothing_was_missed(instance: &Instance, mounted: Mounted) -> Result<()> {
    mounted.unmount()?;
    let backup = instance.backup_is(VOLUME, "incremental", None)?;
    instance.image_equals(text_of(&backup, "/image")?, &instance.join("backing"), &[])?;
    FileSystem::Ext4.check(&instance.node(VOLUME))?;
    instance.detach(VOLUME)
}

fn longest_pause(status: &Value) -> String {
    status
        .pointer("/longest_pause_seconds")
        .map_or_else(|| "not said".to_owned(), Value::to_string)
}

/// The pid of a successor of `old`, once it serves.
fn successor(instance: &Instance, old: u32) -> Result<u32> {
    let mut pid = 0;
    wait_until("a successor serves", Duration::from_secs(20), || {
        pid = instance.server_pid(VOLUME).unwrap_or(0);
        Ok(pid != 0 && pid != old)
    })
    .with_context(|| instance.log_tail())?;
    Ok(pid)
}

/// req X3: 100 kills of the server under `fio --verify`; the program's file is deleted and replaced in between.
/// req A8: no change is missed over a takeover.
#[test]
fn the_server_is_killed_under_load() -> Result<()> {
    let mut instance = Instance::new("x03")?;
    let program = instance.join("blktided");
    fs::copy(binary("blktided")?, &program)?;
    instance.start_with(&program)?;
    let mounted = prepared(&instance)?;
    let kills = count(100, 500);
    let mut seed = Seed::of("x03", 0x03)?;
    let (mut done, mut rounds, mut longest) = (0, 0, 0.0_f64);
    let mut old = 0;
    while done < kills {
        let writers = [load(&mounted, true)?, load(&mounted, false)?];
        while done < kills && writers.iter().any(Running::runs) {
            pass(Duration::from_micros(seed.below(250_000)));
            let pid = successor(&instance, old)?;
            kill(pid, "KILL")?;
            old = pid;
            done += 1;
            if done == kills / 3 {
                fs::remove_file(&program)?;
            }
            if done == kills / 3 * 2 {
                put(&program, "this is not a program")?;
            }
        }
        for writer in writers {
            longest = longest.max(judge(writer)?.longest_write_seconds);
        }
        rounds += 1;
    }
    let status = instance.status(VOLUME)?;
    eprintln!(
        "x03: {done} kills in {rounds} rounds, no error; longest write {longest:.3} s, longest pause {}",
        longest_pause(&status)
    );
    nothing_was_missed(&instance, mounted)
}

/// req X3: 20 kills of the keeper, each followed by one of the server: a new keeper takes over from a living server.
#[test]
fn the_keeper_is_killed_under_load() -> Result<()> {
    let instance = Instance::started("x03k")?;
    let mounted = prepared(&instance)?;
    let mut old = 0;
    for round in 0..count(20, 100) {
        let writer = load(&mounted, round % 2 == 0)?;
        let keeper = instance.keeper_pid(VOLUME)?;
        kill(keeper, "KILL")?;
        wait_until("a new keeper", Duration::from_secs(30), || {
            let now = instance.keeper_pid(VOLUME).unwrap_or(0);
            Ok(now != 0 && now != keeper)
        })
        .with_context(|| instance.log_tail())?;
        let server = successor(&instance, old)?;
        kill(server, "KILL")?;
        old = server;
        judge(writer).with_context(|| format!("round {round}\n{}", instance.log_tail()))?;
    }
    nothing_was_missed(&instance, mounted)
}

/// The keeper first, so that it cannot start a successor.
fn kill_both(instance: &Instance) -> Result<u32> {
    let (keeper, server) = (instance.keeper_pid(VOLUME)?, instance.server_pid(VOLUME)?);
    kill(keeper, "KILL")?;
    kill(server, "KILL")?;
    Ok(server)
}

fn write_and_sync(path: &Path) -> Result<()> {
    let file = fs::File::create(path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0)?;
    Ok(file.sync_all()?)
}

/// req X3, A6: both at once: errors for who uses the volume, as after a crash, and no bitmap is believed after it.
/// trap TB9: what may have been written past the tracker is never in an incremental's blind spot.
#[test]
fn both_are_killed() -> Result<()> {
    let instance = Instance::started("x03b")?;
    let mounted = prepared(&instance)?;
    write_and_sync(&mounted.join("before"))?;
    let dead = kill_both(&instance)?;
    let watch = Stopwatch::start();
    if write_and_sync(&mounted.join("after")).is_ok()
        && write_and_sync(&mounted.join("again")).is_ok()
    {
        bail!("writes go on without a server");
    }
    ensure!(
        watch.seconds() < 30.0,
        "the error came after {:.0} s",
        watch.seconds()
    );
    // The dead file system's last state is what is on the device.
    mounted.unmount()?;
    if !instance
        .server_pid(VOLUME)
        .is_ok_and(|pid| pid != 0 && pid != dead)
    {
        // The daemon may have attached it again by itself.
        drop(instance.ctl(&["attach", VOLUME])?);
    }
    successor(&instance, dead)?;
    let backup = instance.backup(VOLUME, &[])?;
    ensure!(
        text_of(&backup, "/reason")? == "tracking-interrupted"
            && text_of(&backup, "/kind")? != "incremental",
        "{backup}"
    );
    instance.image_equals(text_of(&backup, "/image")?, &instance.join("backing"), &[])?;
    FileSystem::Ext4.replay_and_check(&instance.node(VOLUME), &instance.join("scratch"))?;
    ensure!(number_at(&backup, "/read_bytes").is_ok(), "{backup}");
    let next = instance.backup_is(VOLUME, "incremental", None)?;
    instance.image_equals(text_of(&next, "/image")?, &instance.join("backing"), &[])
}
