//! Every process of ours is killed at random while a watched file system is written and backed up: not a mark is lost, no writer
//! gets an error, nothing stays frozen.
//!
//! The oracle: after all kills, one more incremental on top of the chain is the device, byte for byte (`cmp`), and fio's own verify.
//! needs: root, loop, fuse, ext4, bpf, fio, space
//! limit: 300 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Fio, Instance, LoopDevice, Mounted, Seed, Tool, count, kill, make_file, pass,
    text_of,
};
use std::fs;
use std::path::Path;
use std::time::Duration;

const BYTES: u64 = 384 << 20;

/// Processes whose parent is `pid`.
fn children_of(pid: u32) -> Vec<u32> {
    let children = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(children).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|p| p.parse().ok())
        .collect()
}

/// Whether a file can be made on the file system within a time: it is not frozen.
fn is_written(folder: &Path) -> Result<()> {
    Tool::new("dd")
        .args([
            "if=/dev/zero",
            "bs=4k",
            "count=1",
            "oflag=direct",
            "status=none",
        ])
        .arg(format!("of={}", folder.join("alive").display()))
        .limit(30)
        .run()?
        .ok()
        .context("the file system is frozen")?;
    Ok(())
}

/// req X9, X3, A5: SIGKILL of the daemon, of the guard, of both, at moments that are drawn, with a backup running or not.
/// trap TE4: nothing stays frozen, whoever dies.
/// trap TG1: a backup that was killed is covered by the next.
#[test]
fn kills_lose_no_mark() -> Result<()> {
    let mut instance = Instance::started("x09k")?;
    let backing = instance.join("backing");
    make_file(&backing, BYTES)?;
    let device = LoopDevice::new(&backing, 512)?;
    FileSystem::Ext4.make(device.path())?;
    let mounted = Mounted::new(device.path(), &instance.join("mnt"), &[])?;
    instance.repo_init("main")?;
    instance.watch_add("data", device.path(), &[])?;
    instance.backup_is("data", "full", Some("first-backup"))?;
    let file = mounted.join("written");
    let options = [
        "rw=randwrite",
        "bs=4k",
        "size=96m",
        "direct=1",
        "ioengine=libaio",
        "iodepth=4",
        "rate=8m",
        "verify=crc32c",
        "verify_backlog=4096",
        "time_based",
        "runtime=280",
    ];
    let writer = Fio::new("w", &file, &options).limit(290).start()?;
    let mut seed = Seed::stream(0x09);
    let kills = count(40, 200);
    let (mut during, mut guards) = (0, 0);
    for _ in 0..kills {
        let running = (seed.below(4) > 0)
            .then(|| instance.ctl_start(&["backup", "data", "--json"]))
            .transpose()?;
        pass(Duration::from_millis(seed.below(600)));
        let daemon = instance.daemon_pid()?;
        let helpers = children_of(daemon);
        if seed.below(3) == 0 {
            for pid in &helpers {
                // It may have ended by itself.
                drop(kill(*pid, "KILL"));
                guards += 1;
            }
        }
        if seed.below(3) > 0 {
            during += u64::from(running.as_ref().is_some_and(blktide_tests::Running::runs));
            instance.end_daemon("KILL")?;
            instance.start()?;
        }
        drop(running);
        is_written(mounted.dir())?;
        let status = instance.status("data")?;
        ensure!(
            text_of(&status, "/tracking")? == "trusted"
                && text_of(&status, "/state")? == "attached",
            "{status}"
        );
    }
    ensure!(
        writer.runs(),
        "the writer ended: {:?}",
        writer.finish().map(Fio::judge)
    );
    Tool::new("kill")
        .args(["-INT", &writer.pid().to_string()])
        .run()?
        .ok()?;
    Fio::judge(writer.finish()?)?;
    instance.ctl(&["cancel", "data"])?;
    mounted.unmount()?;
    let last = instance.backup_is("data", "incremental", None)?;
    ensure!(text_of(&last, "/consistency")? == "unmounted", "{last}");
    instance.image_equals("data@latest", &backing, &[])?;
    FileSystem::Ext4.check(device.path())?;
    instance.ctl_ok(&["verify", "--read-data"])?;
    println!(
        "figure: {}",
        format_args!(
            "{kills} draws, {during} daemons killed in a backup, {guards} guards; the chain's last image is the device"
        )
    );
    instance.detach("data")
}
