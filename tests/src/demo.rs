//! `blktidectl demo`, run to its end and interrupted, and what it leaves behind.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::clock::wait_until;
use crate::instance::{binary, remains};
use crate::run::{Finished, Running, Tool};

/// Part of the name of each demo's folder.
const NAME: &str = "blktide-demo";

/// The demo with these words after `demo`.
#[derive(Clone, Copy, Debug)]
pub struct Demo<'a>(pub &'a [&'a str]);

impl Demo<'_> {
    fn start(&self) -> Result<Running> {
        Tool::new(binary("blktidectl")?)
            .arg("demo")
            .args(self.0)
            .limit(280)
            .start()
    }

    /// Runs it to its end, which must be well, and leave nothing behind.
    pub fn run(&self) -> Result<Finished> {
        let before = there();
        let done = self.start()?.finish()?.ok()?;
        let last = done.stdout.trim_end().lines().last().unwrap_or_default();
        ensure!(last.starts_with("demo: OK"), "it ended with: {last}");
        nothing_new(&before, "a whole run")?;
        Ok(done)
    }

    /// Sends `signal` ("INT") when it has said so many lines: it says that it was interrupted, and leaves nothing behind.
    pub fn interrupt(&self, lines: usize, signal: &str) -> Result<()> {
        self.interrupt_after(lines, signal, |_folder| Ok(()))
    }

    /// The same after `meanwhile` was done, which is told the demo's folder.
    pub fn interrupt_after(
        &self,
        lines: usize,
        signal: &str,
        meanwhile: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let before = there();
        let mut running = self.start()?;
        wait_until(
            &format!("demo says {lines} lines"),
            Duration::from_secs(200),
            || {
                let said = running.output()?.lines().count();
                ensure!(
                    running.runs() || said >= lines,
                    "it ended after {said} lines"
                );
                Ok(said >= lines)
            },
        )?;
        let said = running.output()?;
        let folder = said.split_whitespace().nth(3).context("its folder")?;
        meanwhile(Path::new(folder))?;
        running.signal(signal)?;
        let done = running.finish()?;
        ensure!(
            done.code == Some(130),
            "after {lines} lines: {:?}\n{}\n{}",
            done.code,
            done.stdout,
            done.stderr
        );
        nothing_new(&before, &format!("{signal} after {lines} lines"))
    }
}

fn there() -> BTreeSet<String> {
    remains(NAME).into_iter().collect()
}

fn nothing_new(before: &BTreeSet<String>, when: &str) -> Result<()> {
    // A process that is ending may still be seen for a moment.
    let mut left = Vec::new();
    let gone = wait_until("nothing is left", Duration::from_secs(10), || {
        left = there().difference(before).cloned().collect();
        Ok(left.is_empty())
    });
    ensure!(gone.is_ok(), "{when} left behind:\n{}", left.join("\n"));
    Ok(())
}
