//! `doctor`: each block device: which modes, what each gives and costs, which one `auto` takes and why, and the line to type;
//! before that, what this kernel has.
//!
//! Reads sysfs, signatures and the configuration; loads the marker's programs once to see whether the kernel takes them, and lets go
//! of them. Nothing is changed.

mod kernel;

use blktide_api::config::{Config, Mode};
use blktide_api::failure::{Exit, Failure};
use blktide_api::name::Name;
use blktide_api::unit::size;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::host;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::context::Common;
use crate::device::{self, Found};
use crate::modes::{self, Facts};
use crate::output;
use kernel::Kernel;

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Only these: devices, files or mount points
    devices: Vec<PathBuf>,
}

/// The answer for scripts.
#[derive(Debug, Serialize)]
struct Document {
    message_type: &'static str,
    host: String,
    kernel: Kernel,
    devices: Vec<Entry>,
    /// The lines to type.
    commands: Vec<String>,
}

/// One device.
#[derive(Debug, Serialize)]
struct Entry {
    device: String,
    size_bytes: Option<u64>,
    what: Option<String>,
    used_by: Option<String>,
    file_system: Option<&'static str>,
    /// The volume that it is, or is the node of.
    volume: Option<String>,
    /// Why it is nothing to protect by itself.
    skipped: Option<String>,
    modes: Vec<ModeOf>,
    /// What `auto` takes.
    auto: Option<&'static str>,
    /// Why that, or why nothing.
    why: Option<String>,
    command: Option<String>,
}

/// One mode of a device.
#[derive(Debug, Serialize)]
struct ModeOf {
    mode: &'static str,
    possible: bool,
    why_not: Option<String>,
    promise: &'static str,
    cost: &'static str,
}

/// Exit 0, whatever was found.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let (kernel, marker) = Kernel::look();
    let chosen = if args.devices.is_empty() {
        all_devices()
    } else {
        args.devices.clone()
    };
    let mut taken: BTreeSet<String> = config.volumes.keys().map(ToString::to_string).collect();
    let mut devices = Vec::new();
    for path in &chosen {
        let mut found = look(&config, path, marker.as_ref().err());
        suggest(&mut found, path, &mut taken);
        devices.push(found);
    }
    let document = Document {
        message_type: "doctor",
        host: host::host_name(),
        commands: devices.iter().filter_map(|d| d.command.clone()).collect(),
        kernel,
        devices,
    };
    if common.json {
        output::document(&document);
    } else {
        for line in lines(&document) {
            output::text(common, &line);
        }
    }
    Ok(Exit::Done)
}

/// All but what is empty and what is memory.
fn all_devices() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/class/block").into_iter().flatten();
    let mut nodes: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().replace('!', "/"))
        .filter(|name| !name.starts_with("ram") && !name.starts_with("zram"))
        .map(|name| Path::new("/dev").join(name))
        .filter(|node| BlockDevice::at(node).is_ok_and(|d| d.bytes().is_ok_and(|bytes| bytes > 0)))
        .collect();
    nodes.sort();
    nodes
}

fn look(config: &Config, path: &Path, lacks: Option<&blktide_watch::Missing>) -> Entry {
    let mut told = Entry {
        device: path.display().to_string(),
        size_bytes: None,
        what: None,
        used_by: None,
        file_system: None,
        volume: volume_of(config, path),
        skipped: None,
        modes: Vec::new(),
        auto: None,
        why: None,
        command: None,
    };
    let found = match device::look(path) {
        Ok(found) => found,
        Err(failure) => {
            let hint = if failure.hint.is_empty() {
                String::new()
            } else {
                format!(". {}", failure.hint)
            };
            told.skipped = Some(format!("{}{hint}", failure.message));
            return told;
        }
    };
    let facts = found.facts(lacks);
    told.device = found.real.display().to_string();
    told.size_bytes = Some(found.bytes);
    told.what = Some(found.what.clone());
    told.used_by.clone_from(&found.used_by);
    told.file_system = facts.file_system.map(|f| f.name);
    told.volume = told.volume.or_else(|| volume_of(config, &found.real));
    told.modes = modes::ALL
        .iter()
        .map(|mode| mode_of(&facts, *mode))
        .collect();
    match facts.auto() {
        Ok((mode, why)) => (told.auto, told.why) = (Some(mode.word()), Some(why)),
        Err(why) => told.why = Some(why),
    }
    told.skipped = parts(&found);
    told
}

/// A disk is not the thing to protect if its partitions are.
fn parts(found: &Found) -> Option<String> {
    let device = BlockDevice::of_number(found.number?).ok()?;
    let partitions = device.partitions().ok()?;
    (!partitions.is_empty()).then(|| format!("it has partitions: take {}", partitions.join(", ")))
}

fn mode_of(facts: &Facts, mode: Mode) -> ModeOf {
    let why_not = facts.refusal(mode);
    ModeOf {
        mode: mode.word(),
        possible: why_not.is_none(),
        why_not,
        promise: modes::promise(mode),
        cost: modes::cost(mode),
    }
}

fn volume_of(config: &Config, path: &Path) -> Option<String> {
    let real = std::fs::canonicalize(path).ok()?;
    let is = |other: PathBuf| std::fs::canonicalize(other).is_ok_and(|other| other == real);
    config
        .volumes
        .values()
        .find(|v| is(v.device.clone()) || is(config.node_of(v)))
        .map(|v| v.name.to_string())
}

/// Puts in the line to type, if there is one; `names` are taken already.
fn suggest(found: &mut Entry, given: &Path, names: &mut BTreeSet<String>) {
    let (None, None, Some(mode)) = (&found.volume, &found.skipped, found.auto) else {
        return;
    };
    let name = name_for(found.used_by.as_deref(), &found.device, names);
    let device = if given.is_dir() {
        given.display().to_string()
    } else {
        found.device.clone()
    };
    found.command = Some(format!(
        "blktidectl volume add {name} --device {} --mode {mode}",
        quoted(&device)
    ));
    names.insert(name);
}

/// As a shell takes it for one word.
fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.,:=+@".contains(c);
    if path.chars().all(plain) {
        return path.to_owned();
    }
    format!("'{}'", path.replace('\'', r"'\''"))
}

/// After the mount point, else after the device.
fn name_for(used_by: Option<&str>, device: &str, taken: &BTreeSet<String>) -> String {
    let mounted = used_by
        .and_then(|user| user.strip_prefix("mounted at "))
        .and_then(|list| list.split(", ").next());
    let path = mounted.unwrap_or(device);
    let last = path.rsplit('/').find(|part| !part.is_empty());
    let clean: String = last
        .unwrap_or("root")
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(40)
        .collect();
    let clean = clean.trim_matches('-');
    let base = if Name::new(clean).is_ok() {
        clean
    } else {
        "volume"
    };
    let numbered = (2..).map(|n: u32| format!("{base}-{n}"));
    std::iter::once(base.to_owned())
        .chain(numbered)
        .find(|name| !taken.contains(name))
        .unwrap_or_default()
}

fn lines(document: &Document) -> Vec<String> {
    let mut lines = document.kernel.lines();
    lines.push("modes".to_owned());
    for mode in modes::ALL {
        let (word, built) = (
            mode.word(),
            if mode == Mode::Ublk {
                " (not built yet)"
            } else {
                ""
            },
        );
        lines.push(format!("  {word:5} gives  {}{built}", modes::promise(mode)));
        lines.push(format!("        costs  {}", modes::cost(mode)));
    }
    for device in &document.devices {
        lines.extend(device_lines(device));
    }
    if document.commands.is_empty() {
        lines.push("nothing to type".to_owned());
    } else {
        lines.push("to type, as root (after `blktidectl repo init main PATH`, once):".to_owned());
        lines.extend(document.commands.iter().map(|c| format!("  {c}")));
    }
    lines
}

fn device_lines(device: &Entry) -> Vec<String> {
    let bytes = device
        .size_bytes
        .map_or_else(String::new, |b| format!(", {}", size(b)));
    let what = device.what.as_deref().unwrap_or("not looked into");
    let held = device
        .file_system
        .map_or_else(String::new, |f| format!(", {f}"));
    let used = device
        .used_by
        .as_ref()
        .map_or_else(String::new, |user| format!(", in use: {user}"));
    let mut lines = vec![format!("{}: {what}{bytes}{held}{used}", device.device)];
    if let Some(volume) = &device.volume {
        lines.push(format!("  is volume {volume} already"));
        return lines;
    }
    if let Some(why) = &device.skipped {
        lines.push(format!("  not by itself: {why}"));
        return lines;
    }
    let built = device.modes.iter().filter(|m| m.mode != Mode::Ublk.word());
    for mode in built {
        let word = match &mode.why_not {
            None => "possible".to_owned(),
            Some(why) => format!("no: {why}"),
        };
        lines.push(format!("  {:5} {word}", mode.mode));
    }
    let why = device.why.as_deref().unwrap_or_default();
    lines.push(match device.auto {
        Some(mode) => format!("  auto  takes {mode}: {why}"),
        None => format!("  auto  takes nothing: {why}"),
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_named_after_what_they_are() {
        let taken = BTreeSet::from(["srv".to_owned(), "srv-2".to_owned()]);
        let name = |used, device| name_for(used, device, &taken);
        assert_eq!(name(Some("mounted at /"), "/dev/vda1"), "root");
        assert_eq!(name(Some("mounted at /srv, /mnt"), "/dev/vda1"), "srv-3");
        assert_eq!(name(Some("mounted at /home/a b.c"), "/dev/vda1"), "a-b-c");
        assert_eq!(name(Some("dm-0 is built on it"), "/dev/vda1"), "vda1");
        assert_eq!(name(None, "/dev/mapper/vg-données"), "vg-donn-es");
        assert_eq!(name(None, "/dev/--"), "volume");
    }

    #[test]
    fn what_is_to_be_typed_is_one_word() {
        assert_eq!(quoted("/dev/disk/by-id/x_1:2"), "/dev/disk/by-id/x_1:2");
        assert_eq!(quoted("/srv/a b"), "'/srv/a b'");
        assert_eq!(quoted("/it's"), r"'/it'\''s'");
    }

    #[test]
    fn a_device_in_use_that_cannot_be_watched_says_why_and_nothing_to_type() {
        let facts = Facts {
            used_by: Some("mounted at /srv".to_owned()),
            against_watch: vec!["it is a zoned device".to_owned()],
            ..Facts::default()
        };
        let mut device = Entry {
            device: "/dev/vdz".to_owned(),
            size_bytes: Some(1 << 30),
            what: Some("block device".to_owned()),
            used_by: facts.used_by.clone(),
            file_system: None,
            volume: None,
            skipped: None,
            modes: modes::ALL.iter().map(|m| mode_of(&facts, *m)).collect(),
            auto: None,
            why: facts.auto().err(),
            command: None,
        };
        suggest(&mut device, Path::new("/dev/vdz"), &mut BTreeSet::new());
        assert_eq!(device.command, None);
        let told = device_lines(&device).join("\n");
        for words in [
            "in use: mounted at /srv",
            "watch no: it is a zoned device",
            "fuse  no: it can only be put under a device that is not in use",
            "auto  takes nothing",
        ] {
            assert!(told.contains(words), "{told}");
        }
    }
}
