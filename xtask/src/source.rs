//! Where our own files are.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Top-level folders that hold programs: the plane that composes.
pub const PROGRAMS: &[&str] = &["daemon", "ctl", "dm-target-helper"];

/// The root of the work tree.
pub fn root() -> Result<PathBuf> {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").context("run me as `cargo xtask`")?;
    Ok(Path::new(&own)
        .parent()
        .context("xtask has a parent")?
        .to_owned())
}

/// Every Rust file of ours that the rules hold for: crates, programs, end-to-end tests, xtask itself.
pub fn rust_files() -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for folder in ["crates", "tests", "xtask"].iter().chain(PROGRAMS) {
        if Path::new(folder).is_dir() {
            below(Path::new(folder), &mut out)?;
        }
    }
    out.sort();
    Ok(out)
}

fn below(folder: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            below(&path, out)?;
        } else if path.extension().is_some_and(|x| x == "rs") {
            out.push(path);
        }
    }
    Ok(())
}

/// Packages whose name, or one of whose test files, contains `part`.
pub fn packages_with(part: &str) -> Vec<String> {
    let mut found = Vec::new();
    let planes = fs::read_dir("crates").into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = planes
        .flat_map(|plane| fs::read_dir(plane.path()).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .collect();
    folders.extend(["crates/api", "daemon", "ctl"].map(PathBuf::from));
    for folder in folders.iter().filter(|f| f.join("Cargo.toml").is_file()) {
        let name = format!("blktide-{}", stem(folder));
        let tests = fs::read_dir(folder.join("tests"))
            .into_iter()
            .flatten()
            .flatten();
        if name.contains(part) || tests.into_iter().any(|t| stem(&t.path()).contains(part)) {
            found.push(name);
        }
    }
    found
}

/// The end-to-end tests: files directly in `tests/tests`.
pub fn end_to_end() -> Result<Vec<PathBuf>> {
    let mut out: Vec<PathBuf> = fs::read_dir("tests/tests")?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "rs"))
        .collect();
    out.sort();
    Ok(out)
}

/// `x03_server_killed` of `tests/tests/x03_server_killed.rs`.
pub fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
