//! Whether the marker of mode watch that is shipped is what its source makes.
//!
//! Another clang may make another object that is as right: only the one that the shipped object was made with decides.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

#[path = "../../../crates/data/watch/bpf/recipe.rs"]
mod recipe;

use super::tally::Tally;
use crate::build;

/// The crate.
const FOLDER: &str = "crates/data/watch";
/// The clang of Debian 12, with which the shipped object is made.
const VERSION: &str = "clang version 14.";
const NAME: &str = "the shipped marker is what its source makes";

/// Makes it anew and compares every byte.
pub fn check(tally: &mut Tally) {
    let version = Command::new(recipe::clang()).arg("--version").output();
    let text = version.map_or(String::new(), |out| {
        String::from_utf8_lossy(&out.stdout).into_owned()
    });
    if !text.contains(VERSION) {
        let found = text.lines().next().unwrap_or("no clang");
        return tally.not_run(NAME, &format!("made with {VERSION}x, here is: {found}"));
    }
    if !crate::packages::have("llvm-strip") {
        return tally.not_run(NAME, "no program llvm-strip");
    }
    match compare() {
        Ok(()) => tally.passed(NAME),
        Err(error) => tally.failed(NAME, &format!("{error:#}")),
    }
}

fn compare() -> Result<()> {
    let made = std::path::absolute(build::target_folder())?.join("marker.bpf.o");
    std::fs::create_dir_all(build::target_folder())?;
    ensure!(
        recipe::compile(Path::new(FOLDER), &made),
        "{} does not compile",
        recipe::SOURCE
    );
    let shipped = Path::new(FOLDER).join(recipe::SHIPPED);
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    ensure!(
        read(&made)? == read(&shipped)?,
        "cp {} {}",
        made.display(),
        shipped.display()
    );
    Ok(())
}
