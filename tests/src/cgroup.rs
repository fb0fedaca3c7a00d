//! Cgroups of a test's own, of either version: a device that is slow, a process that has little memory.

use anyhow::{Context, Result, ensure};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::clock::wait_until;
use crate::instance::Instance;
use crate::run::{Running, Tool};

/// Where controllers of version 1 are mounted, and all of version 2.
const FIRST: [&str; 2] = ["/sys/fs/cgroup/blkio", "/sys/fs/cgroup/memory"];
const SECOND: &str = "/sys/fs/cgroup";

/// A cgroup, removed when dropped; who is in it then goes back to its parent.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// Of `instance`: whoever is in it does `iops` writes a second on `device`, a whole disk. What waits, waits in the
    /// kernel, before the disk's driver.
    pub fn throttled(instance: &Instance, device: &Path, iops: u64) -> Result<Self> {
        let [blkio, _] = FIRST;
        let number = number_of(device)?;
        if Path::new(blkio)
            .join("blkio.throttle.write_iops_device")
            .exists()
        {
            let group = Self::make(blkio, instance)?;
            group.put(
                "blkio.throttle.write_iops_device",
                &format!("{number} {iops}"),
            )?;
            return Ok(group);
        }
        let group = Self::second("io", instance)?;
        group.put("io.max", &format!("{number} wiops={iops}"))?;
        Ok(group)
    }

    /// Of `instance`: whoever is in it has `bytes` of memory; the rest goes to swap.
    pub fn small(instance: &Instance, bytes: u64) -> Result<Self> {
        let [_, memory] = FIRST;
        if Path::new(memory).join("memory.limit_in_bytes").exists() {
            let group = Self::make(memory, instance)?;
            group.put("memory.limit_in_bytes", &bytes.to_string())?;
            return Ok(group);
        }
        let group = Self::second("memory", instance)?;
        group.put("memory.max", &bytes.to_string())?;
        Ok(group)
    }

    /// A line of shell that puts the shell into it.
    pub fn line(&self) -> String {
        format!("echo 0 > {}/cgroup.procs", self.folder.display())
    }

    /// Writes blocks of 4 KiB at random to `target`, inside it, with more `options` of fio's, until it is told to end.
    pub fn write(&self, target: &Path, options: &str) -> Result<Running> {
        let fio = "exec fio --thread --name=load --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --time_based --runtime=1000 --minimal";
        let script = format!(
            "{}; {fio} --filename={} {options}",
            self.line(),
            target.display()
        );
        Tool::new("bash")
            .args(["-euc", &script])
            .limit(1000)
            .start()
    }

    fn second(controller: &str, instance: &Instance) -> Result<Self> {
        let known = fs::read_to_string(Path::new(SECOND).join("cgroup.subtree_control"))?;
        ensure!(
            known.split_whitespace().any(|word| word == controller),
            "no cgroup with {controller} here"
        );
        Self::make(SECOND, instance)
    }

    fn make(parent: &str, instance: &Instance) -> Result<Self> {
        let name = instance.root().file_name().context("an instance's name")?;
        let folder = Path::new(parent).join(name);
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { folder })
    }

    fn put(&self, file: &str, text: &str) -> Result<()> {
        put(&self.folder.join(file), text)
    }
}

fn put(path: &Path, text: &str) -> Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("{text} to {}", path.display()))
}

fn number_of(device: &Path) -> Result<String> {
    let name = device.file_name().context("a device has a name")?;
    let path = Path::new("/sys/class/block").join(name).join("dev");
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Removes one, once nobody is in it.
pub(crate) fn remove(folder: &Path) {
    let gone = wait_until("the cgroup is empty", Duration::from_secs(10), || {
        let pids = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            if let Some(parent) = folder.parent() {
                drop(put(&parent.join("cgroup.procs"), pid));
            }
        }
        Ok(fs::remove_dir(folder).is_ok())
    });
    drop(gone);
}

/// Those whose name contains `part`.
pub(crate) fn cgroups_of(part: &str) -> Vec<PathBuf> {
    let parents = FIRST.into_iter().chain([SECOND]);
    let entries = parents.flat_map(|p| fs::read_dir(p).into_iter().flatten().flatten());
    entries
        .filter(|e| e.file_name().to_string_lossy().contains(part))
        .map(|e| e.path())
        .collect()
}

/// A file system that stands still until this is dropped (`fsfreeze`).
#[derive(Debug)]
pub struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    /// Freezes what is mounted at `dir`.
    pub fn new(dir: &'a Path) -> Result<Self> {
        Tool::new("fsfreeze").arg("--freeze").arg(dir).run()?.ok()?;
        Ok(Self(dir))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        drop(Tool::new("fsfreeze").arg("--unfreeze").arg(self.0).run());
    }
}
