//! The demo of mode watch: once, and interrupted at four moments, leaves nothing behind: no pin, and nothing frozen.
//! needs: root, loop, bpf, ext4, space
//! limit: 600 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{Demo, Tool};

const DEMO: Demo<'_> = Demo(&["--mode", "watch"]);

/// req X9: attached to what is mounted and written, a full and an incremental image, nothing unmounted, no process that tracks.
#[test]
fn once() -> Result<()> {
    let done = DEMO.run()?;
    for line in [
        "tracker attached to /dev/loop",
        "no process of ours runs",
        "data@2: incremental",
        "was mounted once",
    ] {
        ensure!(done.stdout.contains(line), "no '{line}':\n{}", done.stdout);
    }
    let last = done.stdout.trim_end().lines().last().context("a line")?;
    println!("figure: {:.0} s: {last}", done.seconds);
    Ok(())
}

/// req D4: interrupted when it has said so many lines: nothing attached yet, attached, in the full backup with its freeze, no blktided.
#[test]
fn interrupted_at_four_moments() -> Result<()> {
    for (lines, signal) in [(3, "TERM"), (7, "INT"), (8, "INT"), (11, "TERM")] {
        DEMO.interrupt(lines, signal)?;
    }
    Ok(())
}

/// req D4: a file system that somebody has frozen, who is not there any more to thaw it, is thawed: its writer could not even end.
#[test]
fn interrupted_while_frozen() -> Result<()> {
    DEMO.interrupt_after(7, "INT", |folder| {
        Tool::new("fsfreeze")
            .arg("--freeze")
            .arg(folder.join("mnt"))
            .run()?
            .ok()?;
        Ok(())
    })
}
