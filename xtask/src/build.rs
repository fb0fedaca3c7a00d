//! Building the programs and the tests with cargo.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// A test program that cargo built.
#[derive(Debug, Clone)]
pub struct TestProgram {
    /// The package, `blktide-engine`.
    pub package: String,
    /// The target, `model`.
    pub target: String,
    /// The file to run.
    pub path: PathBuf,
    /// The folder to run it in.
    pub folder: PathBuf,
}

/// The target triple of this machine.
fn host() -> Result<String> {
    let out = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(out.stdout)?;
    Ok(text
        .lines()
        .find_map(|l| l.strip_prefix("host: "))
        .context("rustc -vV names no host")?
        .to_owned())
}

/// The folder that cargo builds into.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

/// Builds `blktided` and `blktidectl` for release, static: the volume's program must start with no disk to load
/// libraries from. Returns their folder.
pub fn programs() -> Result<PathBuf> {
    let host = host()?;
    let status = Command::new("cargo")
        .args(["build", "--release", "--target", &host])
        .args(["-p", "blktide-daemon", "-p", "blktide-ctl"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .stdin(Stdio::null())
        .status()?;
    ensure!(status.success(), "the programs do not build");
    let folder = target_folder().join(&host).join("release");
    Ok(std::path::absolute(folder)?)
}

/// Builds tests (`cargo test --no-run` with `words`) and lists them.
pub fn tests(words: &[&str], environment: &[(&str, &str)]) -> Result<Vec<TestProgram>> {
    let out = Command::new("cargo")
        .args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .args(words)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        out.status.success(),
        "the tests do not build: cargo test {}",
        words.join(" ")
    );
    let mut found: Vec<TestProgram> = String::from_utf8(out.stdout)?
        .lines()
        .filter_map(|line| test_program(&serde_json::from_str(line).ok()?))
        .collect();
    found.sort_by(|a, b| (&a.package, &a.target).cmp(&(&b.package, &b.target)));
    Ok(found)
}

fn test_program(message: &Value) -> Option<TestProgram> {
    let path = message.get("executable")?.as_str()?;
    if message.pointer("/profile/test") != Some(&Value::Bool(true)) {
        return None;
    }
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let folder = manifest.parent()?.to_owned();
    let name = message.get("package_id")?.as_str()?;
    // path+file:///…/crates/base/types#blktide-types@0.1.0, or …/xtask#0.1.0
    let package = match name.rsplit_once('#') {
        Some((_, last)) if last.contains('@') => last.split('@').next()?.to_owned(),
        _ => folder.file_name()?.to_string_lossy().into_owned(),
    };
    Some(TestProgram {
        package,
        target: message.pointer("/target/name")?.as_str()?.to_owned(),
        path: PathBuf::from(path),
        folder,
    })
}

/// Becomes `program`: signals and the exit code are its own from here on.
pub fn hand_over(program: &Path, words: &[&str]) -> Result<ExitCode> {
    let error = Command::new(program).args(words).exec();
    Err(error).with_context(|| program.display().to_string())
}
