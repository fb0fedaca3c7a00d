//! The oracle: bytes against bytes, by plain reads and by other people's tools.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::run::Tool;

/// Fails, saying where, unless the first `bytes` of both are equal (`cmp`).
pub fn same_bytes(a: &Path, b: &Path, bytes: u64) -> Result<()> {
    Tool::new("cmp")
        .arg("--bytes")
        .arg(bytes.to_string())
        .arg(a)
        .arg(b)
        .limit(600)
        .run()?
        .ok()?;
    Ok(())
}

/// Fails unless both folders hold the same names and contents (`diff -r`).
pub fn same_trees(a: &Path, b: &Path) -> Result<()> {
    Tool::new("diff")
        .args(["-r", "--no-dereference", "--brief"])
        .arg(a)
        .arg(b)
        .limit(600)
        .run()?
        .ok()?;
    Ok(())
}

/// Numbers of the blocks in which two states of a volume differ; a length that differs counts as blocks of its own.
pub fn blocks_that_differ(a: &Path, b: &Path, block_bytes: usize) -> Result<Vec<u64>> {
    ensure!(block_bytes > 0, "a block has bytes");
    let mut left = File::open(a).with_context(|| a.display().to_string())?;
    let mut right = File::open(b).with_context(|| b.display().to_string())?;
    let mut pages = [vec![0; block_bytes], vec![0; block_bytes]];
    let mut differing = Vec::new();
    for block in 0.. {
        let [of_left, of_right] = &mut pages;
        let bytes_left = fill(&mut left, of_left)?;
        let bytes_right = fill(&mut right, of_right)?;
        if bytes_left == 0 && bytes_right == 0 {
            break;
        }
        if of_left.get(..bytes_left) != of_right.get(..bytes_right) {
            differing.push(block);
        }
    }
    Ok(differing)
}

/// Copies a file or device to a new sparse file, by `dd` with direct reads where `direct` asks for them.
pub fn copy_sparse(from: &Path, to: &Path, direct: bool) -> Result<()> {
    let mut tool = Tool::new("dd")
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .args(["bs=1M", "conv=sparse", "status=none"])
        .limit(600);
    if direct {
        tool = tool.arg("iflag=direct");
    }
    tool.run()?.ok()?;
    Ok(())
}

fn fill(file: &mut File, out: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(filled)
}
