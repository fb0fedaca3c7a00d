//! One instance of blktide: own folder, own configuration, own daemon; nothing of it is left after its drop.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::cgroup::{cgroups_of, remove};
use crate::clock::wait_until;
use crate::compare::same_bytes;
use crate::pins;
use crate::run::{Finished, Running, Tool, kill, pids_naming};

/// The program `name` under test: from `BLKTIDE_BIN_DIR`, else from the folder in which this test was built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("BLKTIDE_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe()?
            .parent()
            .and_then(Path::parent)
            .context("a test lies in target/PROFILE/deps")?
            .to_owned(),
    };
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "no {}: cargo build -p blktide-daemon -p blktide-ctl, or set BLKTIDE_BIN_DIR",
        path.display()
    );
    Ok(path)
}

/// What `blktidectl` said.
#[derive(Debug, Clone)]
pub struct Reply {
    /// How it ended.
    pub finished: Finished,
}

impl Reply {
    /// Fails unless it exited with `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        Ok(Self {
            finished: self.finished.exits(code)?,
        })
    }

    /// The one JSON document on its standard output; with `--json-lines`, the last.
    pub fn json(&self) -> Result<Value> {
        let text = self.finished.stdout.trim();
        serde_json::from_str(text)
            .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
            .with_context(|| format!("no JSON: {text}\n{}", self.finished.stderr))
    }

    /// The `code` of the error it reported in JSON.
    pub fn error_code(&self) -> Result<String> {
        let json = self.json()?;
        Ok(text_of(&json, "/code")?.to_owned())
    }
}

/// The text at `pointer`, or an error that shows the document.
pub fn text_of<'a>(json: &'a Value, pointer: &str) -> Result<&'a str> {
    json.pointer(pointer)
        .and_then(Value::as_str)
        .with_context(|| format!("no text at {pointer}: {json}"))
}

/// An instance. Made with [`Instance::new`], running after [`Instance::start`].
#[derive(Debug)]
pub struct Instance {
    root: PathBuf,
    daemon: Option<Child>,
}

impl Instance {
    /// A folder with a configuration in it; nothing runs yet.
    pub fn new(name: &str) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let root = PathBuf::from(format!(
            "/var/tmp/blktide-test-{name}-{}-{}.d",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir_all(&root)?;
        let instance = Self { root, daemon: None };
        for folder in ["run", "state", "volumes.d", "repositories.d", "dev", "save"] {
            fs::create_dir(instance.join(folder))?;
        }
        instance.configure("", "")?;
        Ok(instance)
    }

    /// An instance with its daemon running.
    pub fn started(name: &str) -> Result<Self> {
        let mut instance = Self::new(name)?;
        instance.start()?;
        Ok(instance)
    }

    /// Writes the configuration anew, with more keys for `[defaults]` and `[defaults.save_area]`; before the start.
    pub fn configure(&self, defaults: &str, save_area: &str) -> Result<()> {
        let root = self.root.display();
        let path = if save_area.contains("memory =") || save_area.contains("path =") {
            String::new()
        } else {
            format!("path = \"{root}/save\"\n")
        };
        let text = format!(
            "runtime_dir = \"{root}/run\"\n\
             state_dir = \"{root}/state\"\n\
             volumes_dir = \"{root}/volumes.d\"\n\
             repositories_dir = \"{root}/repositories.d\"\n\
             device_dir = \"{root}/dev\"\n\
             [defaults]\nmode = \"fuse\"\nrepository = \"main\"\n{defaults}\n\
             [defaults.save_area]\n{path}{save_area}\n"
        );
        put(&self.config(), &text)
    }

    /// The folder of everything.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the folder.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.join("blktide.toml")
    }

    /// The node of a volume, `dev/NAME`.
    pub fn node(&self, volume: &str) -> PathBuf {
        self.join("dev").join(volume)
    }

    /// The folder in which a volume's bitmap file and marker lie.
    pub fn state_of(&self, volume: &str) -> PathBuf {
        self.join("state").join(volume)
    }

    /// The folder of a repository that [`Instance::repo_init`] made.
    pub fn repository(&self, name: &str) -> PathBuf {
        self.join(format!("repository-{name}"))
    }

    /// Starts `blktided` and waits until its socket answers.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(&binary("blktided")?)
    }

    /// The same with another file of the program, for tests that replace or delete it.
    pub fn start_with(&mut self, program: &Path) -> Result<()> {
        ensure!(self.daemon.is_none(), "blktided runs already");
        let log = self.log()?;
        let child = Command::new(program)
            .arg("--config")
            .arg(self.config())
            .env("BLKTIDE_CONFIG", self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| program.display().to_string())?;
        let child = self.daemon.insert(child);
        let socket = self.root.join("run/blktide.sock");
        wait_until("blktided answers", Duration::from_secs(20), || {
            if let Some(status) = child.try_wait()? {
                bail!("blktided ended: {status}");
            }
            Ok(UnixStream::connect(&socket).is_ok())
        })
        .with_context(|| self.log_tail())
    }

    /// Makes the daemon read its configuration again.
    pub fn reload(&self) -> Result<()> {
        kill(self.daemon_pid()?, "HUP")
    }

    fn log(&self) -> Result<File> {
        Ok(OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.join("blktided.log"))?)
    }

    /// The last lines of the daemon's and the volumes' log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.join("blktided.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(60);
        lines.get(from..).unwrap_or_default().join("\n")
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> Result<u32> {
        Ok(self.daemon.as_ref().context("blktided does not run")?.id())
    }

    /// Ends the daemon with `signal` ("TERM": must exit 0 within 20 s; "KILL": dies).
    pub fn end_daemon(&mut self, signal: &str) -> Result<()> {
        let mut child = self.daemon.take().context("blktided does not run")?;
        kill(child.id(), signal)?;
        let mut status = None;
        wait_until("blktided ends", Duration::from_secs(20), || {
            status = child.try_wait()?;
            Ok(status.is_some())
        })?;
        ensure!(
            signal != "TERM" || status.is_some_and(|s| s.success()),
            "blktided ended with {status:?}\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// `blktidectl` with this instance's configuration, not yet run.
    pub fn ctl_tool(&self, args: &[&str]) -> Result<Tool> {
        Ok(Tool::new(binary("blktidectl")?)
            .env("BLKTIDE_CONFIG", self.config())
            .without_env("BLKTIDE_REPOSITORY")
            .args(args)
            .limit(300))
    }

    /// Runs `blktidectl`; how it ended is the caller's to judge.
    pub fn ctl(&self, args: &[&str]) -> Result<Reply> {
        Ok(Reply {
            finished: self.ctl_tool(args)?.run()?,
        })
    }

    /// Runs `blktidectl`, which must exit 0.
    pub fn ctl_ok(&self, args: &[&str]) -> Result<Reply> {
        self.ctl(args)?.exits(0).with_context(|| self.log_tail())
    }

    /// Starts `blktidectl` beside the test.
    pub fn ctl_start(&self, args: &[&str]) -> Result<Running> {
        self.ctl_tool(args)?.start()
    }

    /// Creates a repository and registers it; its folder.
    pub fn repo_init(&self, name: &str) -> Result<PathBuf> {
        let folder = self.repository(name);
        self.ctl_ok(&["repo", "init", name, &folder.display().to_string()])?;
        Ok(folder)
    }

    /// Registers a volume and attaches it; waits for its node.
    pub fn volume_add(&self, name: &str, device: &Path, more: &[&str]) -> Result<PathBuf> {
        let device = device.display().to_string();
        let mut args = vec![
            "volume", "add", name, "--device", &device, "--mode", "fuse", "--yes",
        ];
        args.extend_from_slice(more);
        self.ctl_ok(&args)?;
        self.wait_for_node(name)
    }

    /// Registers a volume in mode watch and attaches it: its device is used as before.
    pub fn watch_add(&self, name: &str, device: &Path, more: &[&str]) -> Result<()> {
        let device = device.display().to_string();
        let mut args = vec![
            "volume", "add", name, "--device", &device, "--mode", "watch", "--yes",
        ];
        args.extend_from_slice(more);
        self.ctl_ok(&args)?;
        Ok(())
    }

    /// Attaches a volume; waits for its node.
    pub fn attach(&self, name: &str) -> Result<PathBuf> {
        self.ctl_ok(&["attach", name])?;
        self.wait_for_node(name)
    }

    /// Detaches a volume, which must succeed.
    pub fn detach(&self, name: &str) -> Result<()> {
        self.ctl_ok(&["detach", name, "--yes"])?;
        Ok(())
    }

    fn wait_for_node(&self, name: &str) -> Result<PathBuf> {
        let node = self.node(name);
        wait_until(
            "the volume's node is there",
            Duration::from_secs(20),
            || Ok(node.exists()),
        )
        .with_context(|| self.log_tail())?;
        Ok(node)
    }

    /// A backup of `volume`, which must succeed; its summary.
    pub fn backup(&self, volume: &str, more: &[&str]) -> Result<Value> {
        let mut args = vec!["backup", volume, "--json"];
        args.extend_from_slice(more);
        let summary = self.ctl_ok(&args)?.json()?;
        ensure!(
            text_of(&summary, "/message_type")? == "summary",
            "no summary: {summary}"
        );
        Ok(summary)
    }

    /// A backup that must be of `kind` for `reason` (`None`: null).
    pub fn backup_is(&self, volume: &str, kind: &str, reason: Option<&str>) -> Result<Value> {
        let summary = self.backup(volume, &[])?;
        ensure!(
            text_of(&summary, "/kind")? == kind
                && summary.pointer("/reason").and_then(Value::as_str) == reason,
            "wanted {kind}, {reason:?}: {summary}\n{}",
            self.log_tail()
        );
        Ok(summary)
    }

    /// Restores an image to a new file.
    pub fn restore(&self, image: &str, target: &Path, more: &[&str]) -> Result<()> {
        let target = target.display().to_string();
        let mut args = vec!["restore", image, &target, "--yes"];
        args.extend_from_slice(more);
        self.ctl_ok(&args)?;
        Ok(())
    }

    /// Fails unless `image`, restored to a new file, equals the first `size_bytes` of `truth` byte for byte (`cmp`).
    pub fn image_equals(&self, image: &str, truth: &Path, more: &[&str]) -> Result<()> {
        let volume = image.split('@').next().unwrap_or_default();
        let bytes = self.size_bytes(volume)?;
        let target = self.join(format!("restored-{volume}"));
        drop(fs::remove_file(&target));
        self.restore(image, &target, more)?;
        let length = fs::metadata(&target)?.len();
        ensure!(
            length == bytes,
            "{image} has {length} bytes, the volume {bytes}"
        );
        same_bytes(truth, &target, bytes).with_context(|| format!("{image} differs"))?;
        fs::remove_file(&target)?;
        Ok(())
    }

    /// Bytes of a volume, as `status` says.
    pub fn size_bytes(&self, volume: &str) -> Result<u64> {
        let status = self.status(volume)?;
        number_at(&status, "/size_bytes")
    }

    /// The volume's part of `status`, whatever the exit code says.
    pub fn status(&self, volume: &str) -> Result<Value> {
        let json = self.ctl(&["status", volume, "--json"])?.json()?;
        json.pointer("/volumes/0")
            .cloned()
            .with_context(|| format!("no volume: {json}"))
    }

    /// Process id of the volume's server.
    pub fn server_pid(&self, volume: &str) -> Result<u32> {
        pid_at(&self.status(volume)?, "/pid")
    }

    /// Process id of the volume's keeper.
    pub fn keeper_pid(&self, volume: &str) -> Result<u32> {
        pid_at(&self.status(volume)?, "/keeper_pid")
    }
}

/// The number at `pointer`, or an error that shows the document.
pub fn number_at(json: &Value, pointer: &str) -> Result<u64> {
    json.pointer(pointer)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number at {pointer}: {json}"))
}

fn pid_at(status: &Value, pointer: &str) -> Result<u32> {
    Ok(u32::try_from(number_at(status, pointer)?)?)
}

/// Writes a small file of a test's own.
#[expect(
    clippy::disallowed_methods,
    reason = "a test's own file; nothing to be durable"
)]
pub fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}

impl Drop for Instance {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "what a failed test's daemon said")]
            {
                eprintln!("--- blktided.log\n{}", self.log_tail());
            }
        }
        // While servers live the loop devices can write back and go.
        unmount_below(&self.root, false);
        clear_loops_below(&self.root);
        if let Some(mut child) = self.daemon.take() {
            drop(kill(child.id(), "KILL"));
            drop(child.wait());
        }
        leave_nothing(&self.root);
    }
}

/// Ends and removes all that belongs to an instance's folder: processes that name it, mounts, loop devices, itself.
pub fn leave_nothing(root: &Path) {
    unmount_below(root, false);
    clear_loops_below(root);
    let name = root.display().to_string();
    // A keeper may start a server between look and kill: again until there is none.
    drop(wait_until("processes end", Duration::from_secs(10), || {
        let pids = pids_naming(&name);
        for pid in &pids {
            drop(kill(*pid, "KILL"));
        }
        Ok(pids.is_empty())
    }));
    unmount_below(root, true);
    pins::remove_of(root);
    clear_loops_below(root);
    let part = root.file_name().unwrap_or_default().to_string_lossy();
    for group in cgroups_of(&part) {
        remove(&group);
    }
    drop(fs::remove_dir_all(root));
}

/// What is there of any instance whose folder's name contains `part`: mounts, loop devices, processes, pins, folders.
pub fn remains(part: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for target in mounts.lines().filter_map(|l| l.split(' ').nth(4)) {
        if target.contains(part) {
            found.push(format!("mounted: {target}"));
        }
    }
    for (device, backing) in loops() {
        if backing.display().to_string().contains(part) {
            found.push(format!(
                "looped: {} on {}",
                device.display(),
                backing.display()
            ));
        }
    }
    for folder in pins::folders_of(part) {
        found.push(format!("pinned: {}", folder.display()));
    }
    for pid in pids_naming(part) {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        found.push(format!(
            "running: {pid} {}",
            String::from_utf8_lossy(&words).replace('\0', " ")
        ));
    }
    let folders = fs::read_dir("/var/tmp").into_iter().flatten().flatten();
    let named = folders.filter(|e| e.file_name().to_string_lossy().contains(part));
    for path in named.map(|e| e.path()).chain(cgroups_of(part)) {
        found.push(format!("lying about: {}", path.display()));
    }
    found
}

/// Each bound loop device and its file.
fn loops() -> Vec<(PathBuf, PathBuf)> {
    let entries = fs::read_dir("/sys/class/block")
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|entry| {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            let device = Path::new("/dev").join(entry.file_name());
            Some((device, PathBuf::from(backing.trim_end())))
        })
        .collect()
}

/// Unmounts what is mounted below `root`, youngest first; `fuse` says whether our own mounts go as well.
fn unmount_below(root: &Path, fuse: bool) {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in text.lines().rev() {
        let (Some(target), Some((_, after))) = (line.split(' ').nth(4), line.split_once(" - "))
        else {
            continue;
        };
        if Path::new(target).starts_with(root) && (fuse || !after.starts_with("fuse")) {
            let mut tool = Tool::new("umount").limit(20);
            if !fuse {
                // What a test froze and was killed would hang everybody who comes near.
                drop(
                    Tool::new("fsfreeze")
                        .args(["--unfreeze", target])
                        .limit(20)
                        .run(),
                );
            }
            if fuse {
                tool = tool.arg("--lazy");
            }
            drop(tool.arg(target).run());
        }
    }
}

/// Clears each loop device whose file lies below `root`.
fn clear_loops_below(root: &Path) {
    for (device, backing) in loops() {
        if backing.starts_with(root) {
            drop(
                Tool::new("losetup")
                    .arg("--detach")
                    .arg(device)
                    .limit(20)
                    .run(),
            );
        }
    }
}
