//! The README's first command: twice in a row, and interrupted at five moments, leaves nothing behind.
//! needs: root, loop, fuse, ext4, space
//! limit: 600 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result};
use blktide_tests::Demo;

const DEMO: Demo<'_> = Demo(&[]);

/// req A5, B1: the main job, end to end, twice.
#[test]
fn twice_in_a_row() -> Result<()> {
    for round in 1..=2 {
        let done = DEMO.run().with_context(|| format!("round {round}"))?;
        println!(
            "figure: demo, round {round}: {:.0} s, {} lines",
            done.seconds,
            done.stdout.lines().count()
        );
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
        DEMO.interrupt(lines, signal)?;
    }
    Ok(())
}
