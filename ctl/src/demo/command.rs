//! The programs that the story calls: `blktidectl` itself, and other people's.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Folders of system programs, which not every `PATH` has.
const FOLDERS: &[&str] = &["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Whether a program is to be had.
pub(super) fn is_there(name: &str) -> bool {
    find(name).is_some()
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(FOLDERS.iter().copied())
        .map(|folder| Path::new(folder).join(name))
        .find(|file| file.is_file())
}

/// Runs a program of somebody else's; its standard output. Any exit code but those of `well` is an error that shows
/// what it said.
pub(super) fn tool<A: AsRef<OsStr>>(name: &str, arguments: &[A], well: &[i32]) -> Result<String> {
    let program = find(name).with_context(|| format!("no program {name}"))?;
    let out = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| name.to_owned())?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(
        out.status.code().is_some_and(|code| well.contains(&code)),
        "{name}: {}\n{text}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(text)
}

/// `blktidectl` with the demo's configuration.
#[derive(Debug)]
pub(super) struct Blktidectl {
    program: PathBuf,
    configuration: PathBuf,
}

impl Blktidectl {
    /// The one in `programs`.
    pub(super) fn new(programs: &Path, configuration: &Path) -> Self {
        Self {
            program: programs.join("blktidectl"),
            configuration: configuration.to_owned(),
        }
    }

    /// Runs a verb that must exit 0; its JSON, or null if it printed none. Progress goes to the terminal, if there is one.
    pub(super) fn run(&self, words: &[&str]) -> Result<Value> {
        self.run_any(words, &[0])
    }

    /// The same for a verb that may exit with one of `well`.
    pub(super) fn run_any(&self, words: &[&str], well: &[i32]) -> Result<Value> {
        let out = Command::new(&self.program)
            .args(words)
            .arg("--json")
            .env("BLKTIDE_CONFIG", &self.configuration)
            .env_remove("BLKTIDE_REPOSITORY")
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| self.program.display().to_string())?;
        let text = String::from_utf8_lossy(&out.stdout);
        if !out.status.code().is_some_and(|code| well.contains(&code)) {
            bail!("blktidectl {}: {}\n{text}", words.join(" "), out.status);
        }
        let text = text.trim();
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(text)
            .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
            .with_context(|| format!("blktidectl {}: no JSON: {text}", words.join(" ")))
    }
}

/// Milliseconds: `12.345`.
pub(super) fn decimal(time: Duration) -> String {
    let micros = time.as_micros();
    format!("{}.{:03}", micros / 1000, micros % 1000)
}

/// The number at `key`.
pub(super) fn number(json: &Value, key: &str) -> Result<u64> {
    json.get(key)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number '{key}': {json}"))
}

/// The text at `key`.
pub(super) fn text<'a>(json: &'a Value, key: &str) -> Result<&'a str> {
    json.get(key)
        .and_then(Value::as_str)
        .with_context(|| format!("no text '{key}': {json}"))
}
