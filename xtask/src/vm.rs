//! `cargo xtask vm`: the tests of `tests/vm`, each a script, on stock Debian kernels in virtual machines.
//!
//! ```text
//!  tests/vm/NAME.sh (kernels × modes) ──▶ on the host: makes disks, calls vmrun ──▶ the same script in the guest
//! ```
//! **Invariant**: what cannot run here is named with the reason; once a VM has started, all that goes wrong is a failure.

use anyhow::{Context, Result, bail};
use blktide_tests::{Finished, Tool, leave_nothing};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::test::Tally;
use crate::{build, packages, source};

const FOLDER: &str = "tests/vm";
/// Modes and features that scripts ask for and that are not built yet, and what to say then.
const AWAITED: &[(&str, &str)] = &[("ublk", "mode ublk is not built yet")];
/// vmrun's own exit code for 'no VM here'.
const NO_VM: i32 = 125;
/// The longest that fetching a kernel and a small Debian may take, seconds.
const FETCH_LIMIT: u64 = 900;

/// What was asked for.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Install the packages without asking.
    pub install: bool,
    /// The long form: tests get `LONG=1`, and more time.
    pub long: bool,
    /// Only cases whose name contains this.
    pub only: Option<String>,
    /// Only this kernel.
    pub kernel: Option<String>,
}

impl Wanted {
    /// From the words after `vm`.
    pub fn parse(words: &[&str]) -> Result<Self> {
        const USAGE: &str = "cargo xtask vm [--kernel 6.1|6.12] [--only NAME] [--long] [--install]";
        let mut wanted = Self::default();
        let mut words = words.iter().map(|w| (*w).to_owned());
        while let Some(word) = words.next() {
            match word.as_str() {
                "--install" | "--yes" | "-y" => wanted.install = true,
                "--long" => wanted.long = true,
                "--only" => wanted.only = Some(words.next().context(USAGE)?),
                "--kernel" => wanted.kernel = Some(words.next().context(USAGE)?),
                other => bail!("{USAGE}, not {other}"),
            }
        }
        Ok(wanted)
    }
}

/// What a script's header says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    kernels: Vec<String>,
    modes: Vec<String>,
    limit: u64,
}

impl Header {
    /// The lines `# kernels:`, `# modes:` and `# limit:` at the top of a script.
    pub fn of(text: &str) -> Result<Self> {
        let line = |key: &str| {
            text.lines()
                .take_while(|l| l.starts_with('#'))
                .find_map(|l| l.strip_prefix(key))
                .with_context(|| format!("no line `{key} …` in the header"))
        };
        let words = |key: &str| -> Result<Vec<String>> {
            Ok(line(key)?.split_whitespace().map(str::to_owned).collect())
        };
        let limit = line("# limit:")?.trim().strip_suffix(" s");
        Ok(Self {
            kernels: words("# kernels:")?,
            modes: words("# modes:")?,
            limit: limit.context("limit: in whole seconds, `180 s`")?.parse()?,
        })
    }
}

/// One script on one kernel in one mode.
#[derive(Debug)]
struct Case {
    script: PathBuf,
    kernel: String,
    mode: String,
    limit: u64,
}

impl Case {
    fn name(&self) -> String {
        let script = source::stem(&self.script);
        format!("vm {script} {} {}", self.kernel, self.mode)
    }

    /// Why it is not to be had yet.
    fn awaited(&self) -> Option<&'static str> {
        AWAITED
            .iter()
            .find_map(|(word, why)| (*word == self.mode).then_some(*why))
    }
}

/// The scripts: all of the folder but what they share.
pub fn scripts() -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(FOLDER)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "sh") && !p.ends_with("lib.sh"))
        .collect();
    found.sort();
    Ok(found)
}

fn cases(wanted: &Wanted) -> Result<Vec<Case>> {
    let mut out = Vec::new();
    for script in scripts()? {
        let header = Header::of(&fs::read_to_string(&script)?)
            .with_context(|| script.display().to_string())?;
        for kernel in &header.kernels {
            out.extend(header.modes.iter().map(|mode| Case {
                script: script.clone(),
                kernel: kernel.clone(),
                mode: mode.clone(),
                limit: header.limit,
            }));
        }
    }
    out.retain(|case| wanted.kernel.as_ref().is_none_or(|k| *k == case.kernel));
    out.retain(|case| wanted.only.as_ref().is_none_or(|o| case.name().contains(o)));
    Ok(out)
}

/// The verb.
pub fn run(wanted: &Wanted) -> Result<ExitCode> {
    let mut tally = Tally::default();
    if cases(wanted)?.is_empty() {
        bail!("no VM test is called so");
    }
    add(wanted, &mut tally)?;
    Ok(tally.close())
}

/// Runs the cases that are wanted, into a tally.
pub fn add(wanted: &Wanted, tally: &mut Tally) -> Result<()> {
    let (waiting, able): (Vec<Case>, Vec<Case>) = cases(wanted)?
        .into_iter()
        .partition(|c| c.awaited().is_some());
    for case in &waiting {
        tally.not_run(&case.name(), case.awaited().unwrap_or_default());
    }
    if able.is_empty() {
        return Ok(());
    }
    if let Err(error) = packages::ensure(&packages::vm(), wanted.install) {
        // Not a failure: the tests say so.
        println!("{error:#}");
    }
    let mut programs = None;
    let mut kernels: BTreeMap<String, Option<String>> = BTreeMap::new();
    for case in able {
        let lacks = kernels
            .entry(case.kernel.clone())
            .or_insert_with(|| lacks(&case.kernel));
        if let Some(why) = lacks {
            tally.not_run(&case.name(), why);
            continue;
        }
        let folder = match programs.get_or_insert_with(build::programs) {
            Ok(folder) => folder.clone(),
            Err(error) => {
                tally.failed("programs", &format!("{error:#}"));
                return Ok(());
            }
        };
        tally.add_script(&case.name(), one(wanted, &case, &folder));
    }
    Ok(())
}

/// Why no VM with this kernel is to be had; `None` if one ran.
fn lacks(kernel: &str) -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("VM tests are for x86-64".to_owned());
    }
    if !packages::root() {
        return Some("not root".to_owned());
    }
    let missing = packages::vm().into_iter().find(|(p, _)| !packages::have(p));
    if let Some((program, _)) = missing {
        return Some(format!("no program {program}"));
    }
    let fetch: &[&str] = &["--fetch", "--boot"];
    let tried: &[&str] = &["--timeout", "300", "--", "true"];
    [fetch, tried].into_iter().find_map(|words| {
        let tool = Tool::new(vmrun()).args(["--kernel", kernel]).args(words);
        match tool.limit(FETCH_LIMIT).run() {
            Ok(done) if done.code == Some(NO_VM) => Some(last_line(&done.stderr)),
            Ok(_) => None,
            Err(error) => Some(format!("{error:#}")),
        }
    })
}

fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or("no reason told").to_owned()
}

fn vmrun() -> PathBuf {
    std::path::absolute(Path::new(FOLDER).join("vmrun")).unwrap_or_default()
}

/// One case, in a folder that goes away.
fn one(wanted: &Wanted, case: &Case, programs: &Path) -> Result<Finished> {
    let folder = PathBuf::from(format!("/var/tmp/blktide-vm-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let factor = if wanted.long { 20 } else { 1 };
    let ended = Tool::new("sh")
        .arg(std::path::absolute(&case.script)?)
        .env("RUN", vmrun())
        .env("KERNEL", &case.kernel)
        .env("MODE", &case.mode)
        .env("BIN", programs)
        .env("WORK", &folder)
        .env("TMPDIR", &folder)
        .env("LIMIT", case.limit.saturating_mul(factor).to_string())
        .env("LONG", if wanted.long { "1" } else { "" })
        .folder(&folder)
        .limit(case.limit.saturating_mul(factor))
        .run();
    leave_nothing(&folder);
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_where_a_script_runs() {
        let text =
            "#!/bin/sh\n# What.\n# kernels: 6.1 6.12\n# modes: fuse\n# limit: 90 s\nset -e\n";
        let header = Header::of(text).unwrap();
        assert_eq!(
            (header.kernels.len(), header.modes.len(), header.limit),
            (2, 1, 90)
        );
        assert!(Header::of("#!/bin/sh\nset -e\n# kernels: 6.1\n").is_err());
    }
}
