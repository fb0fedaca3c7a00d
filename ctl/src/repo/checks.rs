//! Where a repository may not be made.

use blktide_api::config::{Config, VolumeConfig};
use blktide_api::failure::{Failure, FailureCode};
use blktide_sys::blockdev::{BlockDevice, lies_on};
use blktide_sys::mounts;
use std::path::{Path, PathBuf};

use super::failed;

/// Refuses a tracked file system, a mount point of fstab with nothing mounted, and a folder that holds something else.
pub(super) fn may_hold_a_repository(config: &Config, path: &Path) -> Result<(), Failure> {
    let there = existing(path);
    if let Some(volume) = tracked(config, &there) {
        return Err(Failure::new(
            FailureCode::RepositoryOnTrackedVolume,
            format!(
                "{} lies on volume {volume}, which it is to protect",
                path.display()
            ),
        )
        .hint("take a folder on another file system"));
    }
    if let Some(point) = unmounted(
        path,
        &std::fs::read_to_string("/etc/fstab").unwrap_or_default(),
    )? {
        return Err(Failure::new(
            FailureCode::RepositoryNotMounted,
            format!(
                "{} is a mount point, and nothing is mounted there",
                point.display()
            ),
        )
        .hint(format!("mount {} first", point.display())));
    }
    let holds_more = path.is_dir()
        && !path.join("repository").exists()
        && path.read_dir().is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name() != "lost+found")
        });
    if holds_more {
        return Err(Failure::new(
            FailureCode::TargetNotEmpty,
            format!("{} holds something else", path.display()),
        )
        .hint("take a new folder"));
    }
    Ok(())
}

/// The nearest folder above that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// The volume that a folder lies on.
fn tracked(config: &Config, there: &Path) -> Option<String> {
    let lies = |volume: &&VolumeConfig| {
        BlockDevice::at(&config.node_of(volume))
            .is_ok_and(|node| lies_on(there, node.number()).unwrap_or(false))
    };
    config
        .volumes
        .values()
        .find(lies)
        .map(|volume| volume.name.to_string())
}

/// The deepest mount point of fstab at or above `path`, if nothing is mounted there.
fn unmounted(path: &Path, fstab: &str) -> Result<Option<PathBuf>, Failure> {
    let Some(point) = deepest_point(path, fstab) else {
        return Ok(None);
    };
    let mounted = mounts::at(&point)
        .map_err(|error| failed(&error))?
        .is_some();
    Ok((!mounted).then_some(point))
}

fn deepest_point(path: &Path, fstab: &str) -> Option<PathBuf> {
    fstab
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .filter_map(|line| line.split_whitespace().nth(1))
        .map(PathBuf::from)
        .filter(|point| point.is_absolute() && point != Path::new("/") && path.starts_with(point))
        .max_by_key(|point| point.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_point_counts() {
        let fstab = "# /dev/x /mnt/nas/old ext4\nUUID=1 / ext4 defaults 0 1\nnas:/a /mnt/nas nfs _netdev 0 0\n\
                     nas:/b /mnt/nas/deep nfs _netdev 0 0\ntmpfs none swap sw 0 0\n";
        let point = |path: &str| deepest_point(Path::new(path), fstab);
        assert_eq!(point("/mnt/nas/blktide"), Some(PathBuf::from("/mnt/nas")));
        assert_eq!(
            point("/mnt/nas/deep/x"),
            Some(PathBuf::from("/mnt/nas/deep"))
        );
        assert_eq!(point("/mnt/nasty"), None);
        assert_eq!(point("/var/backups"), None);
    }
}
