//! Requirement rows and traps, and the tests that name them.
//!
//! A test names a row in the comment above it, `/// req A5, B1: what it shows` or `/// trap TA7: …`; the header of an
//! end-to-end file names it for the whole file. What stands above other code is a mention, not a test.

use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crate::source;

type Citations = BTreeMap<String, BTreeSet<String>>;

/// Prints each row with its tests, then those without one; a citation of an unknown row is an error.
pub fn run() -> Result<()> {
    let rows = ids("docs/requirements.md", 1)?;
    let traps = ids("docs/traps.md", 2)?;
    let mut seen = Citations::new();
    let mut unknown = Vec::new();
    for path in source::rust_files()? {
        let name = path.display().to_string();
        for (id, tested) in citations(
            &fs::read_to_string(&path)?,
            name.starts_with("tests/tests/"),
        ) {
            if !rows.contains(&id) && !traps.contains(&id) {
                unknown.push(format!("{name}: no row {id}"));
            } else if tested {
                seen.entry(id).or_default().insert(name.clone());
            }
        }
    }
    for (title, all) in [("requirements", &rows), ("traps", &traps)] {
        report(title, all, &seen);
    }
    ensure!(unknown.is_empty(), "{}", unknown.join("\n"));
    Ok(())
}

fn report(title: &str, all: &[String], seen: &Citations) {
    println!("## {title}");
    let (with, without): (Vec<_>, Vec<_>) = all.iter().partition(|id| seen.contains_key(*id));
    for id in &with {
        let files: Vec<&str> = seen
            .get(*id)
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect();
        println!("{id:5} {}", files.join(" "));
    }
    println!(
        "no test yet ({} of {}): {}\n",
        without.len(),
        all.len(),
        join(&without)
    );
}

fn join(ids: &[&String]) -> String {
    ids.iter()
        .map(|id| id.as_str())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Ids of the rows of a page, in its order: `letters` capitals, then a number.
fn ids(page: &str, letters: usize) -> Result<Vec<String>> {
    let text = fs::read_to_string(page).with_context(|| page.to_owned())?;
    let is_id = |id: &&str| {
        let (word, number) = id.split_at_checked(letters).unwrap_or_default();
        !word.is_empty()
            && word.bytes().all(|b| b.is_ascii_uppercase())
            && number.parse::<u8>().is_ok()
    };
    let found: Vec<String> = text
        .lines()
        .filter_map(|l| l.strip_prefix("| ")?.split(' ').next())
        .filter(is_id)
        .map(str::to_owned)
        .collect();
    ensure!(!found.is_empty(), "{page}: no rows");
    Ok(found)
}

/// The ids that a file names, and whether a test does it.
fn citations(text: &str, end_to_end: bool) -> Vec<(String, bool)> {
    let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
    let mut out = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let Some((comment, header)) = comment_of(line) else {
            continue;
        };
        let Some(list) = comment
            .strip_prefix("req ")
            .or_else(|| comment.strip_prefix("trap "))
        else {
            continue;
        };
        let list = list.split(':').next().unwrap_or_default();
        let tested = if header {
            end_to_end
        } else {
            above_a_test(lines.get(number..).unwrap_or_default())
        };
        for id in list.split(',').map(|id| id.trim().trim_end_matches('.')) {
            let id = id
                .strip_prefix("trap ")
                .or_else(|| id.strip_prefix("req "))
                .unwrap_or(id);
            if id.starts_with(|c: char| c.is_ascii_uppercase()) && !id.contains(' ') {
                out.push((id.to_owned(), tested));
            }
        }
    }
    out
}

fn comment_of(line: &str) -> Option<(&str, bool)> {
    let (text, header) = match line.strip_prefix("//!") {
        Some(text) => (text, true),
        None => (
            line.strip_prefix("///")
                .or_else(|| line.strip_prefix("//"))?,
            false,
        ),
    };
    Some((text.trim_start(), header))
}

/// Whether the comment that begins here stands above `#[test]`.
fn above_a_test(lines: &[&str]) -> bool {
    lines
        .iter()
        .take_while(|l| l.starts_with("//") || l.starts_with("#[") || l.is_empty())
        .any(|l| l.starts_with("#[test]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_test_covers() {
        let text = "/// req A5, B1: shows\n/// more\n#[test]\nfn a() {}\n/// req A6\nfn b() {}\n// trap TA7: x\n#[test]\n";
        let found = citations(text, false);
        let wanted = [("A5", true), ("B1", true), ("A6", false), ("TA7", true)];
        assert_eq!(found, wanted.map(|(id, t)| (id.to_owned(), t)));
    }

    #[test]
    fn a_header_covers_in_end_to_end_files_only() {
        assert_eq!(
            citations("//! req X3: killed\n", true),
            [("X3".to_owned(), true)]
        );
        assert_eq!(
            citations("//! req X3: killed\n", false),
            [("X3".to_owned(), false)]
        );
    }

    #[test]
    fn prose_that_begins_alike_is_none() {
        assert!(citations("/// req of the day\n#[test]\n", false).is_empty());
    }
}
