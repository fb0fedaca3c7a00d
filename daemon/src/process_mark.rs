//! This process's mark in claims, and whether the process of a mark still lives.

use blktide_repo::ProcessMark;
use blktide_sys::host;
use blktide_types::id::BootId;
use std::io;

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
    match std::fs::read_to_string(format!("/proc/{}/stat", mark.pid)) {
        Ok(stat) => fields(&stat).is_none_or(|(state, start)| {
            // A zombie is dead, whether somebody has asked after it or not.
            !matches!(state, "Z" | "X") && start == mark.start_time
        }),
        // Ended between two system calls: ESRCH.
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound) && !is_gone(&error),
    }
}

fn is_gone(error: &io::Error) -> bool {
    const ESRCH: i32 = 3;
    error.raw_os_error() == Some(ESRCH)
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    fields(&stat).map(|(_, start)| start)
}

/// Fields 3 and 22 of `/proc/PID/stat`: state, and start in ticks since the boot.
fn fields(stat: &str) -> Option<(&str, u64)> {
    // The name stands in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut rest = rest.split_whitespace();
    let state = rest.next()?;
    Some((state, rest.nth(18)?.parse().ok()?))
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
        let exited = blktide_sys::process::PidFd::open(i32::try_from(pid).unwrap()).unwrap();
        blktide_sys::event::wait_readable(&exited, None).unwrap();
        let start = start_time(pid).unwrap();
        let child_lives = || other(&|m| (m.pid, m.start_time) = (pid, start));
        assert!(!child_lives(), "a zombie");
        child.wait().unwrap();
        assert!(!child_lives());
    }
}
