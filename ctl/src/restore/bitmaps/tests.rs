//! Which bitmaps a restore makes worthless, by name, inode, number and layer.

use super::*;
use std::io::Write as _;

const IMAGE: VolumeId = VolumeId([7; 16]);
const OTHER: VolumeId = VolumeId([8; 16]);

/// A folder with a configuration; removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("blktidectl-bitmaps-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("volumes.d")).unwrap();
        let place = Self(folder);
        let dir = |part: &str| place.path(part).display().to_string();
        let text = format!(
            "state_dir = '{}'\nvolumes_dir = '{}'\nrepositories_dir = '{}'\n",
            dir("state"),
            dir("volumes.d"),
            dir("repositories.d")
        );
        place.put("blktide.toml", &text);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        path
    }

    /// A volume that was attached and detached.
    fn volume(&self, name: &str, device: &Path, id: VolumeId) {
        self.volume_of("fuse", name, device, id);
    }

    fn volume_of(&self, mode: &str, name: &str, device: &Path, id: VolumeId) {
        let text = format!("device = '{}'\nmode = '{mode}'\n", device.display());
        self.put(&format!("volumes.d/{name}.toml"), &text);
        fs::create_dir_all(self.path("state").join(name)).unwrap();
        self.put(&format!("state/{name}/volume-id"), &format!("{id}\n"));
        self.put(&format!("state/{name}/bitmap"), "clean");
    }

    fn common(&self) -> Common {
        Common {
            config: Some(self.path("blktide.toml")),
            ..Common::default()
        }
    }

    fn forget(&self, target: &Path, fresh: bool) -> Vec<String> {
        let config = configuration(&self.common()).unwrap();
        let gone = forget(target, fresh, IMAGE, &config).unwrap();
        for name in config.volumes.keys() {
            let bitmap = config.volume_state_dir(name).join("bitmap");
            assert!(!(gone.contains(name) && bitmap.exists()), "{name}");
        }
        gone.iter().map(ToString::to_string).collect()
    }

    fn bitmap(&self, name: &str) -> bool {
        self.path("state").join(name).join("bitmap").exists()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// trap TC8: the same file by a hard link or a symbolic link; a file beside it is left alone.
#[test]
fn the_same_file_by_another_name() {
    let place = Place::new("names");
    let backing = place.put("backing", "x");
    let beside = place.put("beside", "x");
    let (hard, soft) = (place.path("hard"), place.path("soft"));
    fs::hard_link(&backing, &hard).unwrap();
    std::os::unix::fs::symlink(&backing, &soft).unwrap();
    for target in [&hard, &soft, &backing] {
        place.volume("data", &backing, OTHER);
        place.volume("beside", &beside, IMAGE);
        assert_eq!(place.forget(target, false), ["data"], "{target:?}");
        assert!(!place.bitmap("data") && place.bitmap("beside"));
    }
}

/// trap TC8: a backing file that was lost is made anew from an older image, also through a linked folder.
#[test]
fn a_lost_file_made_anew() {
    let place = Place::new("anew");
    let backing = place.path("backing");
    let linked = place.path("linked");
    std::os::unix::fs::symlink(&place.0, &linked).unwrap();
    for target in [backing.clone(), linked.join("backing")] {
        place.volume("data", &backing, OTHER);
        place.put("backing", "");
        assert_eq!(place.forget(&target, true), ["data"], "{target:?}");
        fs::remove_file(&backing).unwrap();
    }
}

/// A volume whose device is away: in doubt its bitmap goes.
#[test]
fn a_device_that_is_away() {
    let place = Place::new("away");
    let target = place.put("target", "x");
    place.volume("own", Path::new("/dev/disk/by-uuid/none-such"), IMAGE);
    place.volume("disk", Path::new("/dev/disk/by-uuid/nor-this"), OTHER);
    place.volume("file", &place.path("none-such"), OTHER);
    assert_eq!(place.forget(&target, true), ["own"]);
    assert_eq!(place.forget(&target, false), ["file"]);
    assert!(place.bitmap("disk"), "no file is a disk");
}

/// A volume that was never attached has nothing to forget, and is in nobody's way.
#[test]
fn a_volume_without_state() {
    let place = Place::new("stateless");
    let backing = place.put("backing", "x");
    place.volume("data", &backing, IMAGE);
    fs::remove_dir_all(place.path("state")).unwrap();
    assert!(place.forget(&backing, false).is_empty());
}

/// A bitmap that cannot go keeps the target from being written.
#[test]
fn a_bitmap_that_stays() {
    let place = Place::new("stays");
    let backing = place.put("backing", "x");
    place.volume("data", &backing, IMAGE);
    fs::remove_file(place.path("state/data/bitmap")).unwrap();
    fs::create_dir_all(place.path("state/data/bitmap/in-the-way")).unwrap();
    let config = configuration(&place.common()).unwrap();
    let failure = forget(&backing, false, IMAGE, &config).unwrap_err();
    assert_eq!(failure.code, FailureCode::Failed);
    assert!(failure.hint.contains("volume data"), "{failure:?}");
}

/// A typing error in one volume's file does not hide another's bitmap; no volumes at all are no hindrance.
#[test]
fn a_configuration_that_does_not_load() {
    let place = Place::new("typo");
    assert!(configuration(&place.common()).unwrap().volumes.is_empty());
    place.put("volumes.d/other.toml", "devise = '/nowhere'\n");
    let failure = configuration(&place.common()).unwrap_err();
    assert_eq!(failure.code, FailureCode::TargetRefused);
    assert!(failure.message.contains("other.toml:1"), "{failure:?}");
}

/// Devices of this machine, as far as it has any: each is related to itself, a disk to its partitions both ways.
#[test]
fn disks_and_their_partitions() {
    for entry in fs::read_dir("/sys/class/block").unwrap().flatten() {
        let Ok(folder) = fs::canonicalize(entry.path()) else {
            continue;
        };
        let number = |folder: &Path| {
            DeviceNumber::parse(&fs::read_to_string(folder.join("dev")).unwrap()).unwrap()
        };
        let own = number(&folder);
        assert!(related(own, own));
        if folder.join("partition").exists() {
            let disk = number(folder.parent().unwrap());
            assert!(related(own, disk) && related(disk, own));
        }
    }
}

/// trap TC8: a watched volume that was detached has a bitmap file like any other. (One that is attached has none, and marks what is
/// restored.)
#[test]
fn the_bitmap_of_a_watched_volume_goes_as_well() {
    let place = Place::new("watched");
    let device = Path::new("/dev/disk/by-uuid/none-such");
    place.volume_of("watch", "own", device, IMAGE);
    place.volume_of("watch", "other", device, OTHER);
    let target = place.put("target", "x");
    assert_eq!(place.forget(&target, true), ["own"]);
    assert!(place.bitmap("other"));
}
