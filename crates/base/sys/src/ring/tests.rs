//! The ring on real files. Oracle: plain read(2) and write(2).

use super::*;
use crate::event::EventFd;
use crate::memfd::Memfd;
use std::os::unix::fs::FileExt;

fn scratch(name: &str, bytes: &[u8]) -> (std::fs::File, Arc<OwnedFd>) {
    let path = std::env::temp_dir().join(format!("blktide-sys-ring-{name}-{}", std::process::id()));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let fd = Arc::new(OwnedFd::from(file.try_clone().unwrap()));
    (file, fd)
}

fn one(ring: &mut Ring) -> Completion {
    loop {
        if let Some(done) = ring.next_completion() {
            return done;
        }
        ring.submit_and_wait(None).unwrap();
    }
}

#[test]
fn shared_memory_to_a_file_and_back() {
    let (file, fd) = scratch("shared", &[0; 16384]);
    let memory = Memfd::create("blktide-test", 16384).unwrap();
    let mapping = Arc::new(Mapping::new(&memory).unwrap());
    let mut ring = Ring::new(8).unwrap();
    let file_id = ring.register_file(fd).unwrap();
    let memory_id = ring.register_memory(Arc::clone(&mapping)).unwrap();
    assert!(mapping.copy_in(4096, b"a tide of blocks"));
    let range = MemoryRange {
        memory: memory_id,
        offset: 4096,
        len: 4096,
    };
    ring.write(11, file_id, 8192, range).unwrap();
    let done = one(&mut ring);
    assert_eq!((done.token, done.result), (11, Ok(4096)));
    let mut out = [0; 16];
    file.read_exact_at(&mut out, 8192).unwrap();
    assert_eq!(&out, b"a tide of blocks");
    file.write_all_at(b"ebb", 100).unwrap();
    ring.read(
        12,
        file_id,
        100,
        MemoryRange {
            offset: 0,
            len: 3,
            ..range
        },
    )
    .unwrap();
    assert_eq!(one(&mut ring).result, Ok(3));
    let mut out = [0; 3];
    assert!(mapping.copy_out(0, &mut out));
    assert_eq!(&out, b"ebb");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn ranges_outside_the_mapping_are_not_taken() {
    let memory = Memfd::create("blktide-test", 8192).unwrap();
    let (_file, fd) = scratch("outside", &[0; 10]);
    let mut ring = Ring::new(2).unwrap();
    let file = ring.register_file(fd).unwrap();
    let memory = ring
        .register_memory(Arc::new(Mapping::new(&memory).unwrap()))
        .unwrap();
    let range = MemoryRange {
        memory,
        offset: 8000,
        len: 193,
    };
    assert!(matches!(
        ring.read(1, file, 0, range),
        Err(PushError::BadRange)
    ));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn owned_buffers_come_back() {
    let (file, fd) = scratch("owned", b"0123456789");
    let mut ring = Ring::new(4).unwrap();
    let id = ring.register_file(fd).unwrap();
    ring.read_owned(5, (id, 4), AlignedBuffer::new(4096), 100)
        .unwrap();
    let done = one(&mut ring);
    assert_eq!((done.token, done.result), (5, Ok(6)));
    assert_eq!(&done.buffer.as_ref().unwrap()[..6], b"456789");
    ring.write_owned(6, (id, 0), done.buffer.unwrap(), 2)
        .unwrap();
    assert_eq!(one(&mut ring).result, Ok(2));
    ring.sync_data(7, id).unwrap();
    assert_eq!(one(&mut ring).result, Ok(0));
    let mut out = [0; 3];
    file.read_exact_at(&mut out, 0).unwrap();
    assert_eq!(&out, b"452");
}

#[test]
fn full_is_said_and_drains() {
    let (_file, fd) = scratch("full", &[1; 4096]);
    let mut ring = Ring::new(4).unwrap();
    let id = ring.register_file(fd).unwrap();
    for token in 0..4 {
        ring.read_owned(token, (id, 0), AlignedBuffer::new(4096), 16)
            .unwrap();
    }
    let (error, back) = ring
        .read_owned(9, (id, 0), AlignedBuffer::new(8192), 16)
        .unwrap_err();
    assert!(matches!(error, PushError::Full));
    assert_eq!(back.len(), 8192);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.push(one(&mut ring).token);
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
    ring.sync_data(10, id).unwrap();
    assert_eq!(one(&mut ring).token, 10);
}

#[test]
fn errors_are_the_kernels() {
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut ring = Ring::new(4).unwrap();
    let id = ring.register_file(Arc::new(file.into())).unwrap();
    ring.write_owned(1, (id, 0), AlignedBuffer::new(4096), 16)
        .unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::BADF));
}

#[test]
fn polls_and_timeouts() {
    let event = EventFd::new().unwrap();
    let mut ring = Ring::new(4).unwrap();
    let id = ring
        .register_file(Arc::new(event.try_clone().unwrap().into_fd()))
        .unwrap();
    ring.poll_readable(3, id).unwrap();
    ring.submit_and_wait(Some(Duration::from_millis(1)))
        .unwrap();
    assert!(ring.next_completion().is_none());
    for _ in 0..3 {
        event.ring();
        let done = one(&mut ring);
        assert!(done.token == 3 && done.more && done.result.unwrap() != 0);
        event.take();
    }
    ring.timeout(4, Duration::from_millis(1)).unwrap();
    let done = one(&mut ring);
    assert_eq!((done.token, done.result), (4, Err(Errno::TIME)));
    assert_eq!(ring.in_flight(), 1, "the poll stays armed");
}

#[test]
fn zeroes_by_fallocate() {
    let (file, fd) = scratch("zero", &[9; 16384]);
    let mut ring = Ring::new(4).unwrap();
    let id = ring.register_file(fd).unwrap();
    ring.fallocate(1, id, Zeroing::Punch, (4096, 8192)).unwrap();
    let result = one(&mut ring).result;
    assert!(
        matches!(result, Ok(0) | Err(Errno::OPNOTSUPP)),
        "{result:?}"
    );
    if result.is_ok() {
        let mut out = [1; 16384];
        file.read_exact_at(&mut out, 0).unwrap();
        assert!(out[..4096].iter().all(|b| *b == 9) && out[4096..12288].iter().all(|b| *b == 0));
        assert_eq!(file.metadata().unwrap().len(), 16384);
    }
}

#[test]
fn a_forgotten_file_leaves_its_place() {
    let mut ring = Ring::new(4).unwrap();
    let (_keep, first) = scratch("forget-1", b"first");
    let (_keep, second) = scratch("forget-2", b"second");
    let id = ring.register_file(first).unwrap();
    ring.forget_file(id).unwrap();
    ring.forget_file(id).unwrap_err();
    let refused = ring.read_owned(1, (id, 0), AlignedBuffer::new(4096), 8);
    assert!(matches!(refused, Err((PushError::UnknownFile, _))));
    let again = ring.register_file(second).unwrap();
    assert_eq!(again, id);
    ring.read_owned(2, (again, 0), AlignedBuffer::new(4096), 8)
        .unwrap();
    assert_eq!(&one(&mut ring).buffer.unwrap()[..6], b"second");
    for _ in 0..50 {
        let (_keep, file) = scratch("forget-3", b"x");
        let id = ring.register_file(file).unwrap();
        ring.forget_file(id).unwrap();
    }
}
