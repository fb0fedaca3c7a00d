//! Who may import whom: the table of the architecture, checked from `cargo metadata`.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

use crate::source::PROGRAMS;

/// What each library may import of ours. A program (and `tests`) may import every library.
const MAY: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("format", &["types"]),
    ("sys", &["types", "format"]),
    ("testkit", &["types", "format"]),
    ("engine", &["types", "format"]),
    ("device", &["types", "format", "sys"]),
    ("frontend", &["types", "format", "sys"]),
    (
        "volume",
        &["types", "format", "sys", "engine", "device", "frontend"],
    ),
    (
        "watch",
        &["types", "format", "sys", "engine", "device", "volume"],
    ),
    ("repo", &["types", "format", "sys"]),
    ("image", &["types", "format", "sys", "repo"]),
    ("job", &["types", "format", "sys", "repo", "image"]),
    ("api", &["types"]),
];
/// What a test of a library may import beyond that.
const TESTS_MAY: &[&str] = &["blktide-testkit", "blktide-sys"];
/// External crates that only these packages may name.
const ONLY: &[(&str, &[&str])] = &[
    ("tokio", &["blktide-daemon"]),
    ("libc", &["blktide-sys"]),
    ("nix", &["blktide-sys"]),
    ("io-uring", &["blktide-sys"]),
    ("loom", &["blktide-engine"]),
    // blktide-tests: what the programs counted is taken back, as if they had not been run.
    ("aya", &["blktide-watch", "blktide-tests"]),
    // blktide-job: its bench compares with the plain pipeline.
    ("zstd", &["blktide-image", "blktide-job"]),
    ("clap", PROGRAM),
    ("indicatif", PROGRAM),
    ("tracing-subscriber", PROGRAM),
    (
        "anyhow",
        &["blktide-daemon", "blktide-ctl", "blktide-tests", "xtask"],
    ),
];
const PROGRAM: &[&str] = &["blktide-daemon", "blktide-ctl"];

/// Adds a line to `errors` for each edge that the tables forbid, and each package named against its folder.
pub fn check(errors: &mut Vec<String>) -> Result<()> {
    let out = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .output()?;
    let meta: Value = serde_json::from_slice(&out.stdout)
        .with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
    let root = meta["workspace_root"].as_str().context("workspace_root")?;
    let packages = meta["packages"].as_array().context("packages")?;
    for package in packages {
        let name = package["name"].as_str().context("name")?;
        let manifest = package["manifest_path"].as_str().context("manifest")?;
        check_name(
            name,
            manifest.strip_prefix(root).unwrap_or(manifest),
            errors,
        );
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            check_edge(name, dependency, errors)?;
        }
    }
    Ok(())
}

fn check_name(name: &str, manifest: &str, errors: &mut Vec<String>) {
    let folders: Vec<&str> = manifest.trim_start_matches('/').split('/').collect();
    let wanted = match folders.as_slice() {
        ["crates", _, folder, _] | ["crates", folder, _] => format!("blktide-{folder}"),
        ["xtask", _] => "xtask".to_owned(),
        ["tests", _] => "blktide-tests".to_owned(),
        [folder, _] if PROGRAMS.contains(folder) => format!("blktide-{folder}"),
        _ => {
            errors.push(format!("{manifest}: a package where none belongs"));
            return;
        }
    };
    if name != wanted {
        errors.push(format!(
            "{manifest}: package {name} should be named {wanted}"
        ));
    }
}

fn check_edge(name: &str, dependency: &Value, errors: &mut Vec<String>) -> Result<()> {
    let to = dependency["name"].as_str().context("dependency")?;
    if let Some((_, users)) = ONLY.iter().find(|(external, _)| *external == to)
        && !users.contains(&name)
    {
        errors.push(format!("{name}: may not name {to}"));
    }
    let may: BTreeMap<String, &[&str]> = MAY
        .iter()
        .map(|(from, to)| (format!("blktide-{from}"), *to))
        .collect();
    let (Some(allowed), Some(ours)) = (may.get(name), to.strip_prefix("blktide-")) else {
        return Ok(());
    };
    let in_tests = dependency["kind"].as_str() == Some("dev") && TESTS_MAY.contains(&to);
    if !allowed.contains(&ours) && !in_tests {
        errors.push(format!("{name} may not import {to}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn edge(from: &str, to: &str, kind: Option<&str>) -> usize {
        let mut errors = Vec::new();
        check_edge(from, &json!({"name": to, "kind": kind}), &mut errors).unwrap();
        errors.len()
    }

    #[test]
    fn planes_do_not_know_each_other() {
        assert_eq!(edge("blktide-engine", "blktide-image", None), 1);
        assert_eq!(edge("blktide-job", "blktide-engine", Some("dev")), 1);
        assert_eq!(
            edge("blktide-engine", "blktide-sys", None),
            1,
            "the engine does no I/O"
        );
        assert_eq!(edge("blktide-volume", "blktide-engine", None), 0);
        assert_eq!(edge("blktide-daemon", "blktide-job", None), 0);
        assert_eq!(edge("blktide-api", "blktide-format", None), 1);
        assert_eq!(edge("blktide-job", "blktide-testkit", None), 1);
        assert_eq!(edge("blktide-job", "blktide-testkit", Some("dev")), 0);
        assert_eq!(edge("blktide-repo", "libc", None), 1);
    }

    #[test]
    fn the_name_follows_the_folder() {
        let named = |name: &str, manifest: &str| {
            let mut errors = Vec::new();
            check_name(name, manifest, &mut errors);
            errors.len()
        };
        assert_eq!(named("blktide-engine", "/crates/data/engine/Cargo.toml"), 0);
        assert_eq!(named("engine", "/crates/data/engine/Cargo.toml"), 1);
        assert_eq!(named("blktide-util", "/util/Cargo.toml"), 1);
    }
}
