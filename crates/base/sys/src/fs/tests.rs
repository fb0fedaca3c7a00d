//! Files on the machine's own disk. Oracle: the standard library.

use super::*;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            PathBuf::from("/var/tmp").join(format!("blktide-sys-fs-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// req of P13: one of two creators wins, and what the loser wrote is nowhere.
#[test]
fn create_if_absent_is_one_winner() {
    let folder = Folder::new("create");
    let path = folder.0.join("end");
    assert_eq!(
        create_if_absent(&path, b"first", 0o600).unwrap(),
        Created::Made
    );
    assert_eq!(
        create_if_absent(&path, b"second", 0o600).unwrap(),
        Created::Existed
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"first");
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);
}

#[test]
fn without_tmpfile_it_is_the_same() {
    let folder = Folder::new("named");
    for (round, wanted) in [Created::Made, Created::Existed].into_iter().enumerate() {
        let unnamed = Unnamed::create_named(&folder.0, 0o600).unwrap();
        unnamed
            .file()
            .write_all_at(format!("round {round}").as_bytes(), 0)
            .unwrap();
        assert_eq!(unnamed.publish("x").unwrap(), wanted);
    }
    assert_eq!(std::fs::read(folder.0.join("x")).unwrap(), b"round 0");
    assert_eq!(
        std::fs::read_dir(&folder.0).unwrap().count(),
        1,
        "no temporary name stays"
    );
}

#[test]
fn unpublished_is_gone() {
    let folder = Folder::new("gone");
    drop(Unnamed::create(&folder.0, 0o600, true).unwrap());
    drop(Unnamed::create_named(&folder.0, 0o600).unwrap());
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
}

#[test]
fn folders_overwriting_and_removing() {
    let folder = Folder::new("folders");
    let deep = folder.0.join("a/b/c");
    create_folders(&deep, 0o700).unwrap();
    create_folders(&deep, 0o700).unwrap();
    let path = deep.join("file");
    create_if_absent(&path, b"0123456789", 0o600).unwrap();
    overwrite_in_place(&path, b"xyz").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"xyz3456789");
    assert!(remove_durably(&path).unwrap());
    assert!(!remove_durably(&path).unwrap());
}

#[test]
fn direct_transfers_and_holes() {
    let folder = Folder::new("direct");
    let path = folder.0.join("data");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let Ok(fd) = open_direct_write(&path) else {
        return; // a file system without O_DIRECT
    };
    assert!(is_direct(fd.as_fd()).unwrap());
    write_full(&fd, 65536, &AlignedBuffer::padded(&[5; 4096])).unwrap();
    let back = read_aligned(&fd, 65536, 8192).unwrap();
    assert!(back[..4096].iter().all(|b| *b == 5) && back[4096..].iter().all(|b| *b == 0));
    assert_eq!(size_of(&fd).unwrap(), 1 << 20);
    let (start, end) = next_data(&fd, 0).unwrap().unwrap();
    assert!(start <= 65536 && end >= 65536 + 4096);
    zero_range(&fd, Zeroing::Punch, 65536, 4096).unwrap();
    assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0));
    assert_eq!(
        read_full(&fd, (1 << 20) - 4096, &mut AlignedBuffer::new(8192)).unwrap(),
        4096
    );
    sync_data(&fd).unwrap();
    sync_file_system(&fd).unwrap();
    preallocate(&fd, 0, 2 << 20).unwrap();
    assert_eq!(size_of(&fd).unwrap(), 2 << 20);
}

#[test]
fn file_systems_have_kinds() {
    assert_eq!(
        kind_of(Path::new("/dev/shm")).unwrap(),
        FileSystemKind::Tmpfs
    );
    assert!(free_bytes(Path::new("/var/tmp")).unwrap() > 0);
    assert!(same_file_system(Path::new("/var/tmp"), Path::new("/var/tmp/.")).unwrap());
    assert!(!same_file_system(Path::new("/proc"), Path::new("/var/tmp")).unwrap());
    assert!(FileSystemKind::Nfs.is_remote() && !FileSystemKind::Xfs.is_remote());
}
