//! A cancelled backup forgets nothing.
//! needs: root, loop, fuse, ext4
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::Result;
use blktide_tests::Instance;

/// req D4: x
#[test]
fn cancel() -> Result<()> {
    let _i = Instance::new("d04")?;
    Ok(())
}
