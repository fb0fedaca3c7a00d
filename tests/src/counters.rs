//! What the kernel counted at a block device.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Counts since the device came to be (`/sys/class/block/NAME/stat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

impl DeviceCounters {
    /// The counts of `device` (`/dev/loop3`; a symlink is followed) at this moment.
    pub fn of(device: &Path) -> Result<Self> {
        let real = fs::canonicalize(device)?;
        let name = real.file_name().context("a device has a name")?;
        let path = Path::new("/sys/class/block").join(name).join("stat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let field = |n: usize| -> Result<u64> {
            Ok(text
                .split_ascii_whitespace()
                .nth(n)
                .context("stat is short")?
                .parse()?)
        };
        Ok(Self {
            read_bytes: field(2)? * 512,
            written_bytes: field(6)? * 512,
        })
    }

    /// What came to be since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
        }
    }
}

/// Writes that a device is at.
pub fn in_flight(device: &Path) -> Result<u64> {
    let name = device.file_name().context("a name")?;
    let path = Path::new("/sys/class/block").join(name).join("inflight");
    let text = fs::read_to_string(path)?;
    let writes = text.split_whitespace().nth(1).context("two numbers")?;
    Ok(writes.parse()?)
}
