//! `cargo xtask test`: all tests that this machine can run, each with a limit of time, and what is left behind counted.
//!
//! ```text
//!  the shipped marker → unit and model tests → examples in the docs → loom models → programs (release, static)
//!    → end to end, by need → on stock kernels in virtual machines
//! ```
//! **Invariant**: a test that did not run is named, with the reason; a test that left something behind has failed.

mod marker;
mod probe;
mod tally;

use anyhow::{Context, Result, bail};
use blktide_tests::{Finished, Stopwatch, Tool, leave_nothing, remains};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::build::{self, TestProgram};
use crate::{packages, source, vm};
pub use tally::Tally;

/// The longest that one program of unit or model tests may run, seconds.
const UNIT_LIMIT: u64 = 600;

/// What was asked for.
#[derive(Debug, Default)]
pub struct Wanted {
    install: bool,
    long: bool,
    only: Option<String>,
}

impl Wanted {
    /// From the words after `test`.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let mut wanted = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--install" | "--yes" | "-y" => wanted.install = true,
                "--long" => wanted.long = true,
                "--only" => wanted.only = Some((*words.next().context("--only NAME")?).to_owned()),
                other => bail!("cargo xtask test [--install] [--long] [--only NAME], not {other}"),
            }
        }
        Ok(wanted)
    }

    fn names(&self, package: &str, target: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| target.contains(only) || package.contains(only))
    }

    fn limit(&self, seconds: u64) -> u64 {
        if self.long {
            seconds.saturating_mul(20)
        } else {
            seconds
        }
    }
}

/// What an end-to-end file says of itself.
#[derive(Debug)]
pub struct Header {
    needs: Vec<String>,
    limit: u64,
}

impl Header {
    /// The `needs:` and `limit:` lines of a file's header.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let line = |key: &str| {
            text.lines()
                .take_while(|l| l.starts_with("//!"))
                .find_map(|l| l.strip_prefix(key))
                .with_context(|| format!("no line `{key} …` in the header"))
        };
        let needs: Vec<String> = line("//! needs:")?
            .split(',')
            .map(|w| w.trim().to_owned())
            .collect();
        if let Some(word) = needs.iter().find(|w| !probe::WORDS.contains(&w.as_str())) {
            bail!("needs: nobody knows how to probe for '{word}'");
        }
        let limit = line("//! limit:")?;
        let limit = limit
            .trim()
            .strip_suffix(" s")
            .context("limit: in whole seconds, `180 s`")?;
        Ok(Self {
            needs,
            limit: limit.parse()?,
        })
    }
}

/// Runs the tests; the exit code says whether all passed.
pub fn run(wanted: &Wanted) -> Result<ExitCode> {
    if let Err(error) = packages::ensure(packages::TEST, wanted.install) {
        // Not a failure: the tests that need them say so.
        println!("{error:#}");
    }
    let watch = Stopwatch::start();
    let mut tally = Tally::default();
    if wanted.names("watch", "marker") {
        marker::check(&mut tally);
    }
    unit(wanted, &mut tally);
    if wanted.only.is_none() {
        examples(&mut tally);
    }
    loom(wanted, &mut tally);
    end_to_end(wanted, &mut tally)?;
    let in_vms = vm::Wanted {
        install: wanted.install,
        long: wanted.long,
        only: wanted.only.clone(),
        kernel: None,
    };
    vm::add(&in_vms, &mut tally)?;
    println!("{:.0} s in all", watch.seconds());
    Ok(tally.close())
}

/// The tests of the libraries and programs: no rights, no devices.
fn unit(wanted: &Wanted, tally: &mut Tally) {
    let packages = match &wanted.only {
        None => Vec::new(),
        Some(only) => source::packages_with(only),
    };
    let mut words: Vec<&str> = packages.iter().flat_map(|p| ["-p", p.as_str()]).collect();
    match &wanted.only {
        None => words.push("--workspace"),
        Some(_) if words.is_empty() => return,
        Some(_) => {}
    }
    match build::tests(&words, &[]) {
        Ok(programs) => run_each(wanted, &programs, tally),
        Err(error) => tally.failed("unit tests", &format!("{error:#}")),
    }
}

fn run_each(wanted: &Wanted, programs: &[TestProgram], tally: &mut Tally) {
    for program in programs
        .iter()
        .filter(|p| wanted.names(&p.package, &p.target))
    {
        let mut tool = Tool::new(&program.path)
            .folder(&program.folder)
            .env("RUST_LIB_BACKTRACE", "0")
            .limit(wanted.limit(UNIT_LIMIT));
        if wanted.long {
            tool = tool.env("BLKTIDE_TEST_LONG", "1");
        }
        let name = format!("{} {}", program.package, program.target);
        tally.add(&name, tool.run());
    }
}

/// The examples in the documentation.
fn examples(tally: &mut Tally) {
    let tool = Tool::new("cargo")
        .args(["test", "--quiet", "--workspace", "--doc"])
        .limit(UNIT_LIMIT);
    tally.add("examples in the documentation", tool.run());
}

/// The engine's atomics under every order of a small world: the same code, built with loom's.
fn loom(wanted: &Wanted, tally: &mut Tally) {
    if !wanted.names("loom", "worlds") {
        return;
    }
    let target = build::target_folder().join("loom").display().to_string();
    let environment = [
        ("RUSTFLAGS", "--cfg loom"),
        ("CARGO_TARGET_DIR", target.as_str()),
    ];
    let words = ["--release", "-p", "blktide-engine", "--lib"];
    let programs = match build::tests(&words, &environment) {
        Ok(programs) => programs,
        Err(error) => return tally.failed("loom models", &format!("{error:#}")),
    };
    for program in &programs {
        let tool = Tool::new(&program.path)
            .arg("worlds")
            .folder(&program.folder)
            .limit(wanted.limit(UNIT_LIMIT));
        tally.add("loom models", tool.run());
    }
}

/// The tests by real processes, each if this machine has what it needs.
fn end_to_end(wanted: &Wanted, tally: &mut Tally) -> Result<()> {
    let mut able = Vec::new();
    for path in source::end_to_end()? {
        let name = source::stem(&path);
        if !wanted.names("tests", &name) {
            continue;
        }
        let header = Header::read(&path).with_context(|| name.clone())?;
        let lacking: Vec<String> = header
            .needs
            .iter()
            .filter_map(|need| probe::lacks(need))
            .collect();
        if lacking.is_empty() {
            able.push((name, header));
        } else {
            tally.not_run(&name, &lacking.join(", "));
        }
    }
    if able.is_empty() {
        return Ok(());
    }
    let folder = match build::programs() {
        Ok(folder) => folder,
        Err(error) => {
            tally.failed("programs", &format!("{error:#}"));
            return Ok(());
        }
    };
    let mut words = vec!["-p", "blktide-tests"];
    for (name, _) in &able {
        words.extend(["--test", name]);
    }
    let programs = match build::tests(&words, &[]) {
        Ok(programs) => programs,
        Err(error) => {
            tally.failed("end-to-end tests", &format!("{error:#}"));
            return Ok(());
        }
    };
    for (name, header) in &able {
        match programs.iter().find(|p| &p.target == name) {
            Some(program) => one(wanted, program, header, &folder, tally),
            None => tally.failed(name, "cargo built no such program"),
        }
    }
    Ok(())
}

/// One end-to-end program, and what it left behind.
fn one(wanted: &Wanted, program: &TestProgram, header: &Header, folder: &Path, tally: &mut Tally) {
    let mark = format!("blktide-run-{}-{}", std::process::id(), program.target);
    let mut tool = Tool::new(&program.path)
        .args(["--test-threads", "1", "--nocapture"])
        .folder(&program.folder)
        .env("RUST_LIB_BACKTRACE", "0")
        .env("BLKTIDE_BIN_DIR", folder)
        .env("BLKTIDE_TEST_MARK", &mark)
        .limit(wanted.limit(header.limit));
    if wanted.long {
        tool = tool.env("BLKTIDE_TEST_LONG", "1");
    }
    let (pid, ended) = match tool.start() {
        Ok(running) => (running.pid(), running.finish()),
        Err(error) => return tally.failed(&program.target, &format!("{error:#}")),
    };
    tally.add(&program.target, ended);
    let mut left = remains(&format!("-{pid}-"));
    left.extend(
        blktide_tests::pids_naming(&mark)
            .iter()
            .map(|pid| format!("running: {pid}")),
    );
    if !left.is_empty() {
        tally.failed(
            &format!("{}: left behind", program.target),
            &left.join("\n"),
        );
        clean(pid, &mark);
    }
}

fn clean(pid: u32, mark: &str) {
    for pid in blktide_tests::pids_naming(mark) {
        drop(blktide_tests::kill(pid, "KILL"));
    }
    let part = format!("-{pid}-");
    let folders: Vec<PathBuf> = fs::read_dir("/var/tmp")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            let name = source::stem(p);
            name.starts_with("blktide-test-") && name.contains(&part)
        })
        .collect();
    for folder in folders {
        leave_nothing(&folder);
    }
}

/// What libtest printed, as counts; used by [`Tally`].
fn results(done: &Finished) -> tally::Results {
    tally::Results::of(&done.stdout)
}
