//! The README's first command: twice in a row, and interrupted at five moments, leaves nothing behind.
//! needs: root, loop, fuse, ext4, space
//! limit: 600 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Result, ensure};
use blktide_tests::{Running, Tool, binary, remains, wait_until};
use std::collections::BTreeSet;
use std::time::Duration;

const NAME: &str = "blktide-demo";

fn there() -> BTreeSet<String> {
    remains(NAME).into_iter().collect()
}

fn start() -> Result<Running> {
    Tool::new(binary("blktidectl")?)
        .arg("demo")
        .limit(280)
        .start()
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

/// req A5, B1: the main job, end to end, twice.
#[test]
fn twice_in_a_row() -> Result<()> {
    for round in 1..=2 {
        let before = there();
        let done = start()?.finish()?.ok()?;
        let last = done.stdout.trim_end().lines().last().unwrap_or_default();
        ensure!(
            last.starts_with("demo: OK"),
            "round {round} ended with: {last}"
        );
        println!(
            "figure: demo, round {round}: {:.0} s, {} lines",
            done.seconds,
            done.stdout.lines().count()
        );
        nothing_new(&before, &format!("round {round}"))?;
    }
    Ok(())
}

/// req D4: interrupted (SIGINT, SIGTERM) when it has said so many lines.
#[test]
fn interrupted_at_five_moments() -> Result<()> {
    for (lines, signal) in [
        (1, "INT"),
        (5, "TERM"),
        (9, "INT"),
        (13, "INT"),
        (17, "TERM"),
    ] {
        let before = there();
        let mut running = start()?;
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
        running.signal(signal)?;
        let done = running.finish()?;
        ensure!(
            done.code == Some(130),
            "after {lines} lines: {:?}\n{}\n{}",
            done.code,
            done.stdout,
            done.stderr
        );
        nothing_new(&before, &format!("{signal} after {lines} lines"))?;
    }
    Ok(())
}
