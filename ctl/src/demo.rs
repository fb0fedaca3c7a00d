//! `demo`: the main job on a real file system, end to end, in a folder that goes away again.
//!
//! ```text
//!  blktidectl demo ──starts──▶ the story (demo::story), in a session of its own: it only acts, never cleans
//!       │ waits for its end, or for SIGINT, SIGTERM, SIGHUP
//!       └─▶ ends the story ─▶ undoes every trace of the folder (demo::traces) ─▶ the last line
//! ```
//! **Invariant**: whatever happened, and wherever the story was, the same clean-up runs: it goes by what the kernel
//! shows of the folder (mounts, loop devices, processes), not by what the story remembers. Signals wait meanwhile.

mod command;
mod proof;
mod recorder;
mod story;
mod superblock;
mod traces;
mod tree;

use anyhow::{Context, Result, bail, ensure};
use blktide_sys::clock::SystemRandom;
use blktide_sys::event::{SignalFd, Signals, Watched, poll, wait_readable};
use blktide_sys::process::{Exit, own_uid};
use blktide_sys::spawn::{Launch, Program, launch};
use blktide_types::clock::Random;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Where it works.
const PARENT: &str = "/var/tmp";
/// Names the folder to the story; marks its processes.
const FOLDER: &str = "BLKTIDE_DEMO_FOLDER";
/// Where `blktided` and `blktidectl` lie, for the story.
const PROGRAMS: &str = "BLKTIDE_DEMO_PROGRAMS";
/// Free space without which it does not begin.
const SPACE_BYTES: u64 = 7 << 30;
/// The file in which the story leaves its last line.
const LAST_LINE: &str = "last-line";
/// How often it is looked whether a story that was killed has ended.
const LOOK: Duration = Duration::from_millis(100);
/// Programs of other packages that the story calls.
const TOOLS: &[(&str, &str)] = &[
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
];

/// Which way of tracking is shown.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A volume that is put under the tracker, then mounted
    Fuse,
    /// A mounted file system that is being written; needs a kernel with BTF
    Watch,
}

impl Mode {
    const fn word(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Watch => "watch",
        }
    }
}

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// How the volume is tracked
    #[arg(long, value_enum, default_value_t = Mode::Fuse)]
    mode: Mode,
}

/// The verb. Exit code 0, 1 (something is not right) or 130 (interrupted); then nothing of it is left.
///
/// Waits: a minute or two.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match (std::env::var_os(FOLDER), std::env::var_os(PROGRAMS)) {
        (Some(folder), Some(programs)) => {
            story::run(args.mode, Path::new(&folder), Path::new(&programs))
                .map(|()| ExitCode::SUCCESS)
        }
        _ => supervise(args.mode),
    }
}

fn supervise(mode: Mode) -> Result<ExitCode> {
    check_machine(mode)?;
    // Before anything is made: from here on a signal is an event, not an end.
    let signals = SignalFd::new(&[Signals::Interrupt, Signals::Terminate, Signals::Reload])?;
    let folder = make_folder()?;
    say(&format!(
        "demo: works in {} and removes it again ({} free, needs {})",
        folder.display(),
        size(blktide_sys::fs::free_bytes(&folder)?),
        size(SPACE_BYTES)
    ));
    let ended = act(mode, &folder, &signals);
    let last_line = std::fs::read_to_string(folder.join(LAST_LINE)).unwrap_or_default();
    let left = traces::undo(&folder);
    ensure!(
        left.is_empty(),
        "demo: could not be removed:\n{}",
        left.join("\n")
    );
    match ended? {
        Ended::Interrupted => {
            say("demo: interrupted; nothing is left of it");
            Ok(ExitCode::from(130))
        }
        Ended::Itself(Exit::Code(0)) if !last_line.is_empty() => {
            say(last_line.trim_end());
            Ok(ExitCode::SUCCESS)
        }
        Ended::Itself(exit) => {
            say(&format!("demo: FAILED ({exit:?}); nothing is left of it"));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn check_machine(mode: Mode) -> Result<()> {
    ensure!(
        own_uid() == 0,
        "demo: needs root, for loop devices and mounts"
    );
    if mode == Mode::Watch {
        blktide_watch::probe().context("demo: mode watch cannot be had on this machine")?;
    }
    for (tool, package) in TOOLS {
        ensure!(
            command::is_there(tool),
            "demo: no program {tool}: apt-get install {package}"
        );
    }
    let devices: &[&str] = match mode {
        Mode::Fuse => &["/dev/fuse", "/dev/loop-control"],
        Mode::Watch => &["/dev/loop-control"],
    };
    for device in devices {
        ensure!(
            Path::new(device).exists(),
            "demo: no {device} on this machine"
        );
    }
    let free = blktide_sys::fs::free_bytes(Path::new(PARENT))?;
    if free < SPACE_BYTES {
        bail!(
            "demo: {PARENT} has {} free and {} are needed",
            size(free),
            size(SPACE_BYTES)
        );
    }
    Ok(())
}

fn make_folder() -> Result<PathBuf> {
    let [a, b, c, d, ..] = SystemRandom::new().id();
    let folder = Path::new(PARENT).join(format!("blktide-demo.{a:02x}{b:02x}{c:02x}{d:02x}"));
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&folder)
        .with_context(|| folder.display().to_string())?;
    Ok(folder)
}

enum Ended {
    Interrupted,
    Itself(Exit),
}

/// Lets the story run, to its end or to a signal's; then it does not run any more.
fn act(mode: Mode, folder: &Path, signals: &SignalFd) -> Result<Ended> {
    let own = std::env::current_exe()?;
    let programs = own.parent().context("a program lies in a folder")?;
    let mut environment: Vec<OsString> = std::env::vars_os()
        .filter(|(name, _)| name != FOLDER && name != PROGRAMS)
        .map(|(name, value)| assignment(&name, &value))
        .collect();
    environment.push(assignment(OsStr::new(FOLDER), folder.as_os_str()));
    environment.push(assignment(OsStr::new(PROGRAMS), programs.as_os_str()));
    let environment: Vec<&OsStr> = environment.iter().map(OsString::as_os_str).collect();
    let story = launch(&Launch {
        program: &Program::this()?,
        arguments: &["blktidectl", "demo", "--mode", mode.word()].map(OsStr::new),
        environment: &environment,
        descriptors: &[],
        new_session: true,
    })?;
    loop {
        let mut watched = [
            Watched::readable(signals),
            Watched::readable(&story.process),
        ];
        poll(&mut watched, None)?;
        if let Some(exit) = story.process.try_wait()? {
            return Ok(Ended::Itself(exit));
        }
        if signals.take()?.is_some() {
            story.process.signal(Signals::Kill)?;
            while !wait_readable(&story.process, Some(LOOK))? {
                // Its writer does not end while the volume is frozen.
                traces::thaw(folder);
            }
            story.process.wait()?;
            return Ok(Ended::Interrupted);
        }
    }
}

fn assignment(name: &OsStr, value: &OsStr) -> OsString {
    let mut text = name.to_owned();
    text.push("=");
    text.push(value);
    text
}

#[expect(clippy::print_stdout, reason = "the demo speaks to a person")]
fn say(line: &str) {
    println!("{line}");
}

/// Bytes as people read them: `1.5 GiB`.
fn size(bytes: u64) -> String {
    let mut unit = 1_u64;
    let mut name = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if bytes / unit < 1024 {
            break;
        }
        unit = unit.saturating_mul(1024);
        name = next;
    }
    let tenths = bytes.saturating_mul(10) / unit;
    if unit == 1 {
        format!("{bytes} B")
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(7 << 30), "7.0 GiB");
    }
}
