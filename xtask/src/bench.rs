//! The benches: each `[[bench]]` of the workspace, in release, one after the other.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::{Command, ExitCode};

use crate::build;

/// The package whose benches run the programs.
const END_TO_END: &str = "blktide-tests";

/// Runs all benches, or those whose name contains `name`.
pub fn run(name: Option<&str>) -> Result<ExitCode> {
    let out = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .output()?;
    let meta: Value = serde_json::from_slice(&out.stdout)?;
    let mut ran = 0;
    for package in meta["packages"].as_array().context("packages")? {
        for target in package["targets"].as_array().context("targets")? {
            let is_bench = target["kind"]
                .as_array()
                .is_some_and(|k| k.contains(&Value::from("bench")));
            let bench = target["name"].as_str().unwrap_or_default();
            if is_bench && name.is_none_or(|n| bench.contains(n)) {
                let package = package["name"].as_str().unwrap_or_default();
                println!("## {package} {bench}");
                let mut cargo = Command::new("cargo");
                cargo.args(["bench", "--quiet", "-p", package, "--bench", bench]);
                if package == END_TO_END {
                    cargo.env("BLKTIDE_BIN_DIR", build::programs()?);
                }
                let status = cargo.status()?;
                ensure!(status.success(), "{package} {bench}: {status}");
                ran += 1;
            }
        }
    }
    ensure!(ran > 0, "no such bench");
    Ok(ExitCode::SUCCESS)
}
