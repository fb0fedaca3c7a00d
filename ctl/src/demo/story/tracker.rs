//! How the tracker comes to the volume: below it before it is mounted (fuse), beside it while it is in use (watch).

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::super::command::{number, text, tool};
use super::super::size;
use super::{Story, VOLUME_BYTES};

impl Story {
    /// Mode fuse: a volume on a file of its own; the node to make a file system on.
    pub(super) fn track(&self) -> Result<PathBuf> {
        let volume = self.make_volume()?;
        self.make_repository()?;
        self.tell(&format!(
            "volume: a sparse file of {}; repository: a folder",
            size(VOLUME_BYTES)
        ));
        self.add(&volume, "fuse")?;
        let status = self.status()?;
        let node = self.path("dev/data");
        ensure!(node.exists(), "no node: {status}");
        self.tell(&format!(
            "tracker attached under {}: keeper {}, server {}, blocks of {}",
            fs::canonicalize(&node)?.display(),
            number(&status, "keeper_pid")?,
            number(&status, "pid")?,
            size(number(&status, "block_size_bytes")?)
        ));
        Ok(node)
    }

    /// Mode watch: a device that nobody tracks, as a server has one.
    pub(super) fn loop_device(&self) -> Result<PathBuf> {
        let volume = self.make_volume()?;
        let words = ["--find", "--show", "--direct-io=on"].map(std::ffi::OsStr::new);
        let made = tool(
            "losetup",
            &[&words[..], &[volume.as_os_str()]].concat(),
            &[0],
        )?;
        let device = PathBuf::from(made.trim());
        self.tell(&format!(
            "volume: {}, a loop device on a sparse file of {}",
            device.display(),
            size(VOLUME_BYTES)
        ));
        Ok(device)
    }

    /// Mode watch: attaches to what is mounted and being written.
    pub(super) fn watch(&self, device: &Path) -> Result<()> {
        self.make_repository()?;
        self.add(device, "watch")?;
        let status = self.status()?;
        ensure!(
            status.get("keeper_pid") == Some(&Value::Null),
            "a process tracks: {status}"
        );
        self.tell(&format!(
            "tracker attached to {}, mounted and being written: in the kernel, with no process; blocks of {}",
            device.display(),
            size(number(&status, "block_size_bytes")?)
        ));
        Ok(())
    }

    /// Mode watch: what was written meanwhile is known, and believed.
    pub(super) fn still_tracked(&self) -> Result<()> {
        let status = self.status()?;
        ensure!(
            text(&status, "tracking")? == "trusted",
            "not believed: {status}"
        );
        self.tell(&format!(
            "  its status: tracking trusted, {} changed since data@1",
            size(number(&status, "changed_bytes")?)
        ));
        Ok(())
    }

    fn make_volume(&self) -> Result<PathBuf> {
        let volume = self.path("volume");
        File::create_new(&volume)?.set_len(VOLUME_BYTES)?;
        Ok(volume)
    }

    fn make_repository(&self) -> Result<()> {
        let repository = self.path("repository").display().to_string();
        self.ctl.run(&["repo", "init", "main", &repository])?;
        Ok(())
    }

    fn add(&self, device: &Path, mode: &str) -> Result<()> {
        let device = device.display().to_string();
        self.ctl.run(&[
            "volume", "add", "data", "--device", &device, "--mode", mode, "--yes",
        ])?;
        let status = self.status()?;
        ensure!(
            text(&status, "state")? == "attached",
            "not attached: {status}"
        );
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        // Exit 3 is well here: a volume without an image wants a backup.
        let json = self.ctl.run_any(&["status", "data"], &[0, 3])?;
        json.pointer("/volumes/0")
            .cloned()
            .context("status shows no volume")
    }
}
