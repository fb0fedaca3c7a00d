//! What there is of a demo in this machine, found by its folder's name, and its undoing.
//!
//! **Invariant**: nothing is unmounted before it was thawed: a frozen file system that nobody has mounted stays frozen for ever.

use blktide_sys::event::{Signals, pause};
use blktide_sys::process::PidFd;
use blktide_sys::{blockdev, fuse, mounts};
use blktide_watch::Pins;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How often a step is tried, a tenth of a second apart: unmounting may have to write back.
const TRIES: u32 = 150;

/// Ends, unmounts, clears and removes all that belongs to `folder`; returns what could not be.
///
/// Order: whoever uses the volume, its freeze, its file systems, its loop devices, then its own processes (they have to serve
/// what an unmount writes back), then their mounts, then what the kernel has of it, then the files.
pub(super) fn undo(folder: &Path) -> Vec<String> {
    end_processes(folder, Part::Users);
    // Who could freeze it again has ended.
    thaw(folder);
    unmount(folder, false);
    clear_loops(folder);
    end_processes(folder, Part::All);
    unmount(folder, true);
    clear_loops(folder);
    again(|| unpin(folder));
    again(|| !folder.exists() || fs::remove_dir_all(folder).is_ok());
    remains(folder)
}

/// What there still is.
fn remains(folder: &Path) -> Vec<String> {
    let mut found: Vec<String> = mounted_below(folder, true)
        .iter()
        .map(|at| format!("mounted: {}", at.display()))
        .collect();
    found.extend(
        loops(folder)
            .iter()
            .map(|d| format!("looped: {}", d.display())),
    );
    found.extend(
        processes(folder, Part::All)
            .iter()
            .map(|pid| format!("running: {pid}")),
    );
    if let Some(pins) = pins(folder) {
        found.push(format!("pinned: {}", pins.display()));
    }
    if folder.exists() {
        found.push(format!("lying about: {}", folder.display()));
    }
    found
}

/// Ends what freeze there is: a killed copier and its killed guard may have left one, and who waits for it cannot end.
pub(super) fn thaw(folder: &Path) {
    for at in mounted_below(folder, false) {
        if let Ok(opened) = fs::File::open(&at) {
            // It was not frozen, or it is thawed now.
            drop(blockdev::thaw(&opened));
        }
    }
}

/// Processes of the demo, but for the one that asks.
pub(super) fn processes_of(folder: &Path) -> Vec<i32> {
    processes(folder, Part::All)
}

/// Where mode watch has its programs and maps, if they are there.
fn pins(folder: &Path) -> Option<PathBuf> {
    let pins = Pins::of(&folder.join("run"), "data").ok()?;
    let instance = pins.folder().parent()?;
    instance.exists().then(|| instance.to_owned())
}

/// Whether none of them is left.
fn unpin(folder: &Path) -> bool {
    pins(folder).is_none_or(|instance| fs::remove_dir_all(instance).is_ok())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All but keepers and servers.
    Users,
    All,
}

fn end_processes(folder: &Path, part: Part) {
    // A keeper may start a server between look and kill: again until there is none.
    again(|| {
        let pids = processes(folder, part);
        for pid in &pids {
            if let Ok(process) = PidFd::open(*pid) {
                // It may have ended meanwhile: then there is nothing to kill.
                drop(process.signal(Signals::Kill));
            }
        }
        if !pids.is_empty() {
            // A writer that waits for a thaw does not end.
            thaw(folder);
        }
        pids.is_empty()
    });
}

/// Processes that name the folder in their command line or environment, or have something below it open.
fn processes(folder: &Path, part: Part) -> Vec<i32> {
    let own = blktide_sys::process::own_pid();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own && belongs(*pid, folder) && (part == Part::All || !serves(*pid)))
        .collect()
}

fn belongs(pid: i32, folder: &Path) -> bool {
    let name = folder.as_os_str().as_encoded_bytes();
    let bears = |file: &str| {
        fs::read(format!("/proc/{pid}/{file}"))
            .is_ok_and(|bytes| bytes.windows(name.len()).any(|part| part == name))
    };
    let opened = || {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        descriptors
            .filter_map(|d| fs::read_link(d.path()).ok())
            .any(|target| target.starts_with(folder))
    };
    bears("cmdline") || bears("environ") || opened()
}

/// Whether it is a keeper or a server: they run `blktided volume`.
fn serves(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|bytes| {
        let mut words = bytes.split(|b| *b == 0).map(String::from_utf8_lossy);
        words.next().is_some_and(|name| name.contains("blktided"))
            && words.next().is_some_and(|word| word == "volume")
    })
}

fn mounted_below(folder: &Path, ours: bool) -> Vec<PathBuf> {
    let all = mounts::all().unwrap_or_default();
    all.into_iter()
        .rev()
        .filter(|m| m.at.starts_with(folder) && (ours || !m.kind.starts_with("fuse")))
        .map(|m| m.at)
        .collect()
}

/// Unmounts what lies below the folder; in the end at any price.
fn unmount(folder: &Path, ours: bool) {
    let clean = again(|| {
        mounted_below(folder, ours).iter().all(|at| {
            // As a program, that can be left to itself should the volume not answer any more.
            run_for_seconds(Command::new("umount").arg(at), 10)
        })
    });
    if !clean {
        for at in mounted_below(folder, ours) {
            drop(fuse::unmount(&at, true));
        }
    }
}

/// Loop devices on files below the folder.
fn loops(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/class/block")
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter(|entry| {
            fs::read_to_string(entry.path().join("loop/backing_file"))
                .is_ok_and(|file| Path::new(file.trim_end()).starts_with(folder))
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

fn clear_loops(folder: &Path) {
    again(|| {
        let found = loops(folder);
        for device in &found {
            run_for_seconds(Command::new("losetup").arg("--detach").arg(device), 10);
        }
        found.is_empty()
    });
}

fn run_for_seconds(command: &mut Command, seconds: u32) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut child) = quiet.spawn() else {
        return false;
    };
    let mut status = None;
    for _ in 0..seconds * 50 {
        status = child.try_wait().ok().flatten();
        if status.is_some() || pause(Duration::from_millis(20)).is_err() {
            break;
        }
    }
    status.is_some_and(|s| s.success())
}

/// Tries until it is true; false if it never was.
fn again(mut step: impl FnMut() -> bool) -> bool {
    (0..TRIES).any(|_| step() || pause(Duration::from_millis(100)).is_err())
}
