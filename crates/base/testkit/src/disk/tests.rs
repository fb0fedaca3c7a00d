//! The simulated storage against what is said of it.

use super::*;
use std::collections::BTreeSet;

fn names_after_cuts(disk: &SimDisk) -> BTreeSet<String> {
    let shown = |disk: SimDisk| {
        let root = disk.root();
        disk.list(root)
            .unwrap()
            .iter()
            .map(|name| {
                let node = disk.open(root, name).unwrap();
                format!("{name}={}", String::from_utf8_lossy(&disk.peek(node)))
            })
            .collect::<Vec<_>>()
            .join(",")
    };
    disk.cuts(1 << 12, Seed(1))
        .iter()
        .map(|cut| shown(disk.after(cut)))
        .collect()
}

fn set(items: &[&str]) -> BTreeSet<String> {
    items.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn content_and_name_are_lost_apart() {
    let disk = SimDisk::new();
    let file = disk.create(disk.root(), "a").unwrap();
    disk.write_at(file, 0, b"xy").unwrap();
    assert_eq!(names_after_cuts(&disk), set(&["", "a=", "a=\0\0", "a=xy"]));
    disk.sync(file).unwrap();
    assert_eq!(names_after_cuts(&disk), set(&["", "a=xy"]));
    disk.sync(disk.root()).unwrap();
    assert_eq!(names_after_cuts(&disk), set(&["a=xy"]));
    disk.unlink(disk.root(), "a").unwrap();
    assert_eq!(names_after_cuts(&disk), set(&["a=xy", ""]));
    assert_eq!(
        disk.open(disk.root(), "a").unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
}

#[test]
fn a_write_is_torn_at_sectors() {
    let disk = SimDisk::new();
    let device = disk.add_device(2048);
    assert_eq!(disk.write_at(device, 256, &[7; 1024]).unwrap(), 1024);
    assert_eq!(disk.pending(), 3);
    let kept: BTreeSet<Vec<u8>> = disk
        .cuts(8, Seed(1))
        .iter()
        .map(|cut| disk.after(cut).peek(device))
        .collect();
    assert_eq!(kept.len(), 8);
    assert!(
        kept.iter()
            .any(|b| b[256] == 7 && b[512] == 0 && b[1024] == 7)
    );
    assert!(kept.iter().all(|b| b[255] == 0 && b[1280] == 0));
    assert!(
        disk.write_at(device, 2048, &[1]).is_err(),
        "a device does not grow"
    );
}

#[test]
fn a_rename_is_whole_and_link_does_not_replace() {
    let disk = SimDisk::new();
    let root = disk.root();
    for (name, content) in [("old", b"1"), ("new", b"2")] {
        let file = disk.create(root, name).unwrap();
        disk.write_at(file, 0, content).unwrap();
        disk.sync(file).unwrap();
    }
    disk.sync(root).unwrap();
    disk.rename(root, "new", "old").unwrap();
    assert_eq!(names_after_cuts(&disk), set(&["new=2,old=1", "old=2"]));
    let unnamed = disk.create_unnamed().unwrap();
    assert_eq!(
        disk.link(unnamed, root, "old").unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    disk.link(unnamed, root, "third").unwrap();
    assert_eq!(disk.open(root, "third").unwrap(), unnamed);
}

#[test]
fn faults_come_when_they_are_due() {
    let disk = SimDisk::new();
    let device = disk.add_device(4096);
    disk.fail(Fault {
        kind: Some(Kind::Write),
        skip: 1,
        failure: Failure::Enospc,
        sticky: false,
    });
    disk.fail(Fault {
        kind: Some(Kind::Read),
        skip: 0,
        failure: Failure::Short(3),
        sticky: false,
    });
    disk.write_at(device, 0, &[1; 512]).unwrap();
    assert_eq!(
        disk.write_at(device, 0, &[2; 512])
            .unwrap_err()
            .raw_os_error(),
        Some(28)
    );
    assert_eq!(disk.peek(device)[0], 1);
    let mut buf = [0; 8];
    assert_eq!(disk.read_at(device, 0, &mut buf).unwrap(), 3);
    assert_eq!(disk.read_at(device, 0, &mut buf).unwrap(), 8);
    disk.fail(Fault {
        kind: None,
        skip: 0,
        failure: Failure::LateEio,
        sticky: true,
    });
    disk.write_at(device, 0, &[3; 512]).unwrap_err();
    assert_eq!(disk.peek(device)[0], 3, "done, and yet an error");
    disk.read_at(device, 0, &mut buf).unwrap_err();
    disk.heal();
    disk.read_at(device, 0, &mut buf).unwrap();
    assert_eq!(disk.operations(), 7);
}

#[test]
fn a_failed_sync_is_not_made_good_by_the_next() {
    let disk = SimDisk::new();
    let device = disk.add_device(512);
    disk.write_at(device, 0, &[1; 512]).unwrap();
    disk.fail(Fault {
        kind: Some(Kind::Sync),
        skip: 0,
        failure: Failure::Eio,
        sticky: false,
    });
    assert!(disk.sync(device).is_err());
    disk.sync(device).unwrap();
    assert_eq!(disk.pending(), 1, "still to be lost");
    disk.write_at(device, 0, &[2; 512]).unwrap();
    disk.sync(device).unwrap();
    assert_eq!(disk.pending(), 0, "written anew, and that was synced");
    assert_eq!(disk.after(&Cut::keeping(Vec::new())).peek(device)[0], 2);
}

#[test]
fn many_changes_are_sampled_few_are_enumerated() {
    assert_eq!(cut::cuts(3, 8, Seed(1)).len(), 8);
    let sampled = cut::cuts(40, 500, Seed(1));
    assert_eq!(sampled.len(), 500);
    assert_eq!(sampled, cut::cuts(40, 500, Seed(1)), "replays");
    assert!(sampled.iter().all(|c| c.kept().len() == 40));
    assert_eq!(cut::cuts(0, 1, Seed(1)).len(), 1);
}
