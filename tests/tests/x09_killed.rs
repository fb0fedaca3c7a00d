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
    pids_naming, text_of,
};
use std::fs;
use std::path::Path;
use std::time::Duration;

const BYTES: u64 = 384 << 20;
/// Times that a guard is looked for.
const LOOKS: u32 = 40;
/// What is written meanwhile.
const WRITER: [&str; 11] = [
    "rw=randwrite",
    "bs=4k",
    "size=96m",
    "direct=1",
    "ioengine=libaio",
    "iodepth=4",
    "rate=512k",
    "verify=crc32c",
    "verify_backlog=512",
    "time_based",
    "runtime=280",
];

/// Thaw guards of a file system that is mounted there.
fn guards_of(mount: &Path) -> Vec<u32> {
    let is_guard = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("thaw-guard")
    };
    let all = pids_naming(&mount.to_string_lossy());
    all.into_iter().filter(is_guard).collect()
}

/// Waits for a guard, not for long, and kills all there are; how many that were.
fn kill_guards(mount: &Path) -> u64 {
    for _ in 0..LOOKS {
        let found = guards_of(mount);
        if !found.is_empty() {
            // Some may have ended by themselves.
            return found
                .iter()
                .map(|pid| u64::from(kill(*pid, "KILL").is_ok()))
                .sum();
        }
    }
    0
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
    let writer = Fio::new("w", &file, &WRITER).limit(290).start()?;
    let mut seed = Seed::stream(0x09);
    let kills = count(40, 200);
    let (mut daemons, mut during, mut guards) = (0, 0, 0);
    let mut draws = 0;
    // A fast machine's backups are short: some more draws until both kinds were met.
    while daemons + guards < kills || (during == 0 || guards == 0) && draws < 4 * kills {
        draws += 1;
        let running = (seed.below(4) > 0)
            .then(|| instance.ctl_start(&["backup", "data", "--json"]))
            .transpose()?;
        pass(Duration::from_millis(seed.below(600)));
        if seed.below(3) == 0 {
            guards += kill_guards(mounted.dir());
        }
        if seed.below(3) > 0 {
            daemons += 1;
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
    Fio::stop(writer)?;
    ensure!(
        during > 0 && guards > 0,
        "{during} daemons, {guards} guards were killed"
    );
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
            "{draws} draws, {daemons} daemons killed, {during} of them in a backup, and {guards} guards; the chain's last image is the device"
        )
    );
    instance.detach("data")
}
