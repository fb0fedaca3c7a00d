//! Who may give orders on the control socket: root, the daemon's own user, and the members of `socket_group`.

use std::path::Path;

/// Whether a peer may change something.
pub(crate) fn may_change(uid: u32, gid: u32, group: Option<&str>) -> bool {
    uid == 0
        || uid == blktide_sys::process::own_uid()
        || group.is_some_and(|group| is_member(uid, gid, group))
}

fn is_member(uid: u32, gid: u32, group: &str) -> bool {
    let groups = read(Path::new("/etc/group"));
    let users = read(Path::new("/etc/passwd"));
    member_by(&groups, &users, uid, gid, group)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn member_by(groups: &str, users: &str, uid: u32, gid: u32, group: &str) -> bool {
    let line = groups
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&group));
    let Some(fields) = line else {
        return false;
    };
    if fields.get(2).and_then(|g| g.parse().ok()) == Some(gid) {
        return true;
    }
    let name = users
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| f.get(2).and_then(|u| u.parse().ok()) == Some(uid))
        .and_then(|f| f.first().copied());
    let members = fields.get(3).copied().unwrap_or_default();
    name.is_some_and(|name| members.split(',').any(|member| member == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_by_group_and_by_name() {
        let groups = "root:x:0:\nbackup:x:34:ann,bob\n";
        let users = "ann:x:1000:1000::/:/bin/sh\neve:x:1001:1001::/:/bin/sh\n";
        assert!(member_by(groups, users, 1000, 1000, "backup"));
        assert!(!member_by(groups, users, 1001, 1001, "backup"));
        assert!(member_by(groups, users, 1001, 34, "backup"));
        assert!(!member_by(groups, users, 1000, 1000, "wheel"));
        assert!(!member_by("", "", 1000, 1000, "backup"));
    }
}
