//! This process's mark in claims, and whether the process of a mark still lives.

use blktide_repo::ProcessMark;
use blktide_sys::host;
use blktide_types::id::BootId;

/// This process.
pub(crate) fn own() -> ProcessMark {
    let pid = std::process::id();
    ProcessMark {
        boot: host::boot_id().unwrap_or(BootId::NONE),
        pid,
        start_time: start_time(pid).unwrap_or(0),
    }
}

/// Whether it lives. In doubt it does: a claim is given up only for a process that is certainly gone.
pub(crate) fn is_alive(mark: &ProcessMark) -> bool {
    let Ok(boot) = host::boot_id() else {
        return true;
    };
    if boot != mark.boot {
        return false;
    }
    match std::fs::exists(format!("/proc/{}", mark.pid)) {
        Ok(false) => false,
        Ok(true) => start_time(mark.pid).is_none_or(|start| start == mark.start_time),
        Err(_) => true,
    }
}

/// Field 22 of `/proc/PID/stat`: ticks since the boot.
fn start_time(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_live_and_the_dead_do_not() {
        let own = own();
        assert!(is_alive(&own));
        assert!(own.start_time > 0);
        let other = |change: &dyn Fn(&mut ProcessMark)| {
            let mut mark = own;
            change(&mut mark);
            is_alive(&mark)
        };
        assert!(!other(&|m| m.boot = BootId([7; 16])));
        assert!(
            !other(&|m| m.start_time += 1),
            "another process of that number"
        );
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert!(!other(&|m| m.pid = pid));
    }
}
