//! Passed, failed, not run: counted by the case, told in one line a program.

use anyhow::Result;
use blktide_tests::Finished;
use std::process::ExitCode;

use super::results;

/// Lines of a failed program's output that are shown.
const SHOWN_LINES: usize = 120;

/// The counts so far.
#[derive(Debug, Default)]
pub struct Tally {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
    not_run: Vec<(String, String)>,
}

/// What one program's libtest printed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Results {
    passed: u64,
    failed: u64,
    ignored: Vec<String>,
    summaries: u64,
}

impl Results {
    /// Reads libtest's output.
    pub fn of(text: &str) -> Self {
        let mut out = Self::default();
        for line in text.lines() {
            if let Some(counts) = line.strip_prefix("test result: ") {
                out.summaries += 1;
                for part in counts.split(['.', ';']) {
                    match part.trim().split_once(' ') {
                        Some((number, "passed")) => out.passed += number.parse().unwrap_or(0),
                        Some((number, "failed")) => out.failed += number.parse().unwrap_or(0),
                        _ => {}
                    }
                }
            } else if let Some((name, _)) = line
                .strip_prefix("test ")
                .and_then(|l| l.split_once(" ... ignored"))
            {
                out.ignored.push(name.to_owned());
            }
        }
        out
    }
}

impl Tally {
    /// Counts a program's end.
    pub fn add(&mut self, name: &str, ended: Result<Finished>) {
        let done = match ended {
            Ok(done) => done,
            Err(error) => return self.failed(name, &format!("{error:#}")),
        };
        let counts = results(&done);
        for case in &counts.ignored {
            self.not_run(&format!("{name} {case}"), "ignored");
        }
        self.passed += counts.passed;
        let well = done.code == Some(0) && counts.failed == 0 && counts.summaries > 0;
        if well {
            if counts.passed > 0 {
                println!(
                    "ok      {name}: {} passed, {:.1} s",
                    counts.passed, done.seconds
                );
                self.told(&done);
            }
            return;
        }
        self.failed += counts.failed.max(1);
        let why = format!("exit {:?}, signal {:?}", done.code, done.signal);
        self.show(name, &format!("{}\n{}\n{why}", done.stdout, done.stderr));
    }

    /// Counts the end of a script that is one case: its exit code is its word.
    pub fn add_script(&mut self, name: &str, ended: Result<Finished>) {
        match ended {
            Ok(done) if done.code == Some(0) => {
                self.passed += 1;
                println!("ok      {name}: {:.1} s", done.seconds);
                self.told(&done);
            }
            Ok(done) => {
                let why = format!("exit {:?}, signal {:?}", done.code, done.signal);
                self.failed(name, &format!("{}\n{}\n{why}", done.stdout, done.stderr));
            }
            Err(error) => self.failed(name, &format!("{error:#}")),
        }
    }

    /// The figures that a test reports: what follows `figure: ` in a line; libtest has the first one behind the test's name.
    fn told(&self, done: &Finished) {
        for line in done.stdout.lines().chain(done.stderr.lines()) {
            if let Some((_, figure)) = line.split_once("figure: ") {
                println!("          {figure}");
            }
        }
    }

    /// Counts a check that is no case of libtest's.
    pub fn passed(&mut self, name: &str) {
        self.passed += 1;
        println!("ok      {name}");
    }

    /// Counts a failure that is no case of libtest's.
    pub fn failed(&mut self, name: &str, output: &str) {
        self.failed += 1;
        self.show(name, output);
    }

    fn show(&mut self, name: &str, output: &str) {
        let lines: Vec<&str> = output.lines().collect();
        println!("FAILED  {name}");
        for line in lines.iter().skip(lines.len().saturating_sub(SHOWN_LINES)) {
            println!("    | {line}");
        }
        self.failures.push(name.to_owned());
    }

    /// Remembers what could not run.
    pub fn not_run(&mut self, name: &str, why: &str) {
        self.not_run.push((name.to_owned(), why.to_owned()));
    }

    /// Says what failed and what did not run, then the closing line.
    pub fn close(self) -> ExitCode {
        for (name, why) in &self.not_run {
            println!("not run: {name}: {why}");
        }
        for name in &self.failures {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_is_understood() {
        let text = "test a ... ok\ntest b ... ignored, needs a disk\n\n\
                    test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let wanted = Results {
            passed: 3,
            failed: 2,
            ignored: vec!["b".to_owned()],
            summaries: 1,
        };
        assert_eq!(Results::of(text), wanted);
        assert_eq!(Results::of("killed before its end").summaries, 0);
    }
}
