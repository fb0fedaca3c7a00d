//! Which machine this is, and which boot.

use crate::Result;
use crate::error::SysError;
use blktide_types::id::{BootId, HostId};
use std::io;
use std::path::Path;

/// The kernel's id of this boot.
pub fn boot_id() -> Result<BootId> {
    read_id(Path::new("/proc/sys/kernel/random/boot_id")).map(BootId)
}

/// The machine's id (machine-id(5)); `NotFound` where it was never set.
pub fn machine_id() -> Result<HostId> {
    read_id(Path::new("/etc/machine-id"))
        .or_else(|_| read_id(Path::new("/var/lib/dbus/machine-id")))
        .map(HostId)
}

/// The machine's name, as the kernel has it.
pub fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    text.trim().to_owned()
}

fn read_id(path: &Path) -> Result<[u8; 16]> {
    let fail = |e| SysError::call("read", path, e);
    let text = std::fs::read_to_string(path).map_err(fail)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id: BootId = digits
        .to_ascii_lowercase()
        .parse()
        .map_err(|e| fail(io::Error::new(io::ErrorKind::InvalidData, e)))?;
    Ok(id.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_boot_has_an_id() {
        let id = boot_id().unwrap();
        assert!(!id.is_none());
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert_eq!(text.trim().replace('-', ""), id.to_string());
    }
}
