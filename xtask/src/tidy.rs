//! The rules of this repository that no compiler checks: headers, sizes, names, tests that say what they need.

use anyhow::{Result, ensure};
use blktide_types::reason::Reason;
use std::fs;
use std::path::Path;

use crate::{imports, source, test, vm};

/// The one crate with unsafe code.
const UNSAFE_CRATE: &str = "crates/base/sys/src/lib.rs";
const LINES_MAX: usize = 700;
const COLUMNS_MAX: usize = 180;
/// Endings of type names that say nothing.
const EMPTY_ENDINGS: &[&str] = &[
    "Manager", "Handler", "Helper", "Util", "Utils", "Info", "Data", "Impl",
];
/// Words that the glossary leaves out, as parts of declared names.
const LEFT_OUT: &[&str] = &[
    "cluster",
    "checkpoint",
    "vault",
    "datastore",
    "changelog",
    "changeid",
];
/// Module names that hide what is in them.
const EMPTY_MODULES: &[&str] = &[
    "util", "utils", "common", "helpers", "helper", "prelude", "misc",
];
const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "docs/guide.md",
    "docs/format.md",
    "docs/failures.md",
    "docs/concurrency.md",
    "docs/glossary.md",
    "docs/watch.md",
];

/// Fails with one line for each place that breaks a rule.
pub fn run() -> Result<()> {
    let mut errors = Vec::new();
    imports::check(&mut errors)?;
    for path in source::rust_files()? {
        check_file(&path, &fs::read_to_string(&path)?, &mut errors);
    }
    for page in PAGES {
        if !Path::new(page).is_file() {
            errors.push(format!("{page}: missing"));
        }
    }
    check_end_to_end(&mut errors)?;
    for script in vm::scripts()? {
        if let Err(error) = vm::Header::of(&fs::read_to_string(&script)?) {
            errors.push(format!("{}: {error:#}", script.display()));
        }
    }
    check_architecture(&mut errors);
    check_reasons(&mut errors);
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(())
}

fn check_file(path: &Path, text: &str, errors: &mut Vec<String>) {
    let name = path.display().to_string();
    let mut wrong = |what: String| errors.push(format!("{name}: {what}"));
    if text.lines().count() > LINES_MAX {
        wrong(format!("more than {LINES_MAX} lines"));
    }
    if !text.starts_with("//! ") {
        wrong("no one-sentence purpose on line 1".to_owned());
    }
    if is_crate_root(path) && name != UNSAFE_CRATE && !text.contains("#![forbid(unsafe_code)]") {
        wrong("no #![forbid(unsafe_code)]".to_owned());
    }
    if EMPTY_MODULES.contains(&source::stem(path).as_str()) {
        wrong("a file is named after what is in it".to_owned());
    }
    for (line, number) in text.lines().zip(1..) {
        if line.chars().count() > COLUMNS_MAX {
            wrong(format!("{number}: more than {COLUMNS_MAX} columns"));
        }
        if let Some(what) = declared(line).and_then(name_fault) {
            wrong(format!("{number}: {what}"));
        }
    }
}

/// Whether the file is the root of a crate: library, program, integration test, example, bench.
fn is_crate_root(path: &Path) -> bool {
    let parts: Vec<String> = path
        .iter()
        .map(|p| p.to_string_lossy().into_owned())
        .collect();
    let [.., folder, file] = parts.as_slice() else {
        return false;
    };
    matches!(file.as_str(), "lib.rs" | "main.rs") && folder == "src"
        || matches!(folder.as_str(), "tests" | "examples" | "benches")
            && !parts.iter().any(|p| p == "src")
}

/// The name that a line declares, and whether it is a function's.
fn declared(line: &str) -> Option<(&str, bool)> {
    let mut words = line.split_whitespace().skip_while(|w| {
        w.starts_with("pub") || matches!(*w, "const" | "async" | "unsafe" | "extern" | "\"C\"")
    });
    let keyword = words.next()?;
    let name = words.next()?;
    let end = name
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(name.len());
    match keyword {
        "fn" => Some((name.get(..end)?, true)),
        "struct" | "enum" | "trait" | "type" | "mod" => Some((name.get(..end)?, false)),
        _ => None,
    }
}

fn name_fault((name, function): (&str, bool)) -> Option<String> {
    if function && name.starts_with("get_") {
        return Some(format!("{name}: without get_"));
    }
    if !function && let Some(ending) = EMPTY_ENDINGS.iter().find(|e| name.ends_with(*e)) {
        return Some(format!("{name}: '{ending}' says nothing"));
    }
    let lower = name.to_lowercase().replace('_', "");
    LEFT_OUT
        .iter()
        .find(|word| lower.contains(*word))
        .map(|word| format!("{name}: the glossary leaves '{word}' out"))
}

/// Each end-to-end test says what it needs and how long it may take, and is a target that `cargo test` alone leaves out.
fn check_end_to_end(errors: &mut Vec<String>) -> Result<()> {
    let manifest = fs::read_to_string("tests/Cargo.toml")?;
    for path in source::end_to_end()? {
        let name = source::stem(&path);
        if let Err(error) = test::Header::read(&path) {
            errors.push(format!("{}: {error:#}", path.display()));
        }
        if !manifest.contains(&format!("[[test]]\nname = \"{name}\"\ntest = false\n")) {
            errors.push(format!(
                "tests/Cargo.toml: no `[[test]]`, `name = \"{name}\"`, `test = false`"
            ));
        }
    }
    Ok(())
}

fn check_architecture(errors: &mut Vec<String>) {
    if let Ok(text) = fs::read_to_string("ARCHITECTURE.md")
        && text.lines().count() > 300
    {
        errors.push("ARCHITECTURE.md: more than 300 lines".to_owned());
    }
}

/// Each reason of the closed list has its section in the manual.
fn check_reasons(errors: &mut Vec<String>) {
    let page = "docs/failures.md";
    let text = fs::read_to_string(page).unwrap_or_default();
    for reason in Reason::ALL {
        if !text.contains(&format!("\n### `{reason}`\n")) {
            errors.push(format!("{page}: no section for `{reason}`"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> Vec<String> {
        let mut errors = Vec::new();
        check_file(Path::new(path), text, &mut errors);
        errors
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        let fault = |line| declared(line).and_then(name_fault);
        assert!(fault("pub(crate) struct BlockManager {").is_some());
        assert!(fault("    pub const fn get_block(&self) -> u64 {").is_some());
        assert!(fault("struct ClusterMap;").is_some());
        assert!(fault("pub fn block_bytes(&self) -> u32 {").is_none());
        assert!(fault("    // struct InodeData is the kernel's").is_none());
        assert!(fault("    Data,").is_none());
    }

    #[test]
    fn a_root_forbids_unsafe_and_a_file_has_a_purpose() {
        assert_eq!(
            faults("crates/data/engine/src/lib.rs", "//! Purpose.\n").len(),
            1
        );
        assert_eq!(
            faults("crates/data/engine/tests/model.rs", "//! Purpose.\n").len(),
            1
        );
        assert_eq!(
            faults("crates/data/engine/src/gate.rs", "//! Purpose.\n").len(),
            0
        );
        assert_eq!(
            faults("crates/base/sys/src/lib.rs", "//! Purpose.\n").len(),
            0
        );
        assert_eq!(
            faults("crates/data/engine/src/gate.rs", "use x;\n").len(),
            1
        );
        assert_eq!(
            faults("crates/data/engine/src/util.rs", "//! Purpose.\n").len(),
            1
        );
        let long = format!("//! Purpose.\n{}", "\n".repeat(LINES_MAX));
        assert_eq!(faults("ctl/src/verb.rs", &long).len(), 1);
    }
}
