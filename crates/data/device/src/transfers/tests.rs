//! Transfers on real files. Oracle: the standard library's reads and writes.

use super::*;
use blktide_sys::event::EventFd;
use blktide_sys::memfd::Memfd;
use std::io::Write;
use std::os::unix::fs::FileExt;

struct World {
    file: std::fs::File,
    mapping: Arc<Mapping>,
    memory: MemoryId,
    transfers: Transfers,
}

fn world(name: &str, bytes: &[u8]) -> World {
    let path = std::path::PathBuf::from("/var/tmp")
        .join(format!("blktide-transfers-{name}-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    let fd = Arc::new(OwnedFd::from(file.try_clone().unwrap()));
    let mut transfers = Transfers::with(fd, 512, 8).unwrap();
    let mapping = Arc::new(Mapping::new(&Memfd::create("blktide-test", 1 << 20).unwrap()).unwrap());
    let memory = transfers.register_memory(Arc::clone(&mapping)).unwrap();
    World {
        file,
        mapping,
        memory,
        transfers,
    }
}

fn one(transfers: &mut Transfers) -> Event {
    loop {
        if let Some(event) = transfers.next_event() {
            return event;
        }
        transfers.wait(None).unwrap();
    }
}

fn done(transfers: &mut Transfers) -> (u64, Result<(), DeviceError>) {
    let event = one(transfers);
    match event.outcome {
        Outcome::Done(result) => (event.token, result),
        other @ (Outcome::Readable | Outcome::TimedOut) => panic!("{other:?}"),
    }
}

#[test]
fn there_and_back() {
    let mut w = world("there", &vec![0; 65536]);
    assert!(w.mapping.copy_in(0, &[7; 8192]));
    let from = MemoryRange {
        memory: w.memory,
        offset: 0,
        len: 8192,
    };
    w.transfers
        .start(1, Target::Backing, Transfer::Write { offset: 4096, from })
        .unwrap();
    assert!(matches!(done(&mut w.transfers), (1, Ok(()))));
    let mut out = [0; 8192];
    w.file.read_exact_at(&mut out, 4096).unwrap();
    assert_eq!(out, [7; 8192]);
    w.transfers
        .start(2, Target::Backing, Transfer::Flush)
        .unwrap();
    assert!(matches!(done(&mut w.transfers), (2, Ok(()))));
    let zero = Transfer::Zero {
        mode: Zeroing::Punch,
        offset: 4096,
        len: 4096,
    };
    w.transfers.start(3, Target::Backing, zero).unwrap();
    assert!(matches!(done(&mut w.transfers), (3, Ok(()))));
    let to = MemoryRange {
        offset: 16384,
        ..from
    };
    w.transfers
        .start(4, Target::Backing, Transfer::Read { offset: 4096, to })
        .unwrap();
    assert!(matches!(done(&mut w.transfers), (4, Ok(()))));
    assert!(w.mapping.copy_out(16384, &mut out));
    assert_eq!(out[..4096], [0; 4096]);
    assert_eq!(out[4096..], [7; 4096]);
}

/// A read past the end is short, is tried for the rest, and fails: never half a block taken for a whole one.
#[test]
fn the_end_of_the_device_is_an_error() {
    let mut w = world("end", &[1; 4096]);
    let to = MemoryRange {
        memory: w.memory,
        offset: 0,
        len: 8192,
    };
    w.transfers
        .start(1, Target::Backing, Transfer::Read { offset: 0, to })
        .unwrap();
    let (_, result) = done(&mut w.transfers);
    assert!(matches!(
        result,
        Err(DeviceError::Transfer {
            errno: Errno::IO,
            kind: TransferKind::Read,
            ..
        })
    ));
}

/// A pipe gives what it has: the rest is asked for until all is there.
#[test]
fn short_reads_are_continued() {
    let mut w = world("short", &[]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let pipe = w.transfers.register_file(Arc::new(reader.into())).unwrap();
    let to = MemoryRange {
        memory: w.memory,
        offset: 0,
        len: 2048,
    };
    w.transfers
        .start(9, Target::File(pipe), Transfer::Read { offset: 0, to })
        .unwrap();
    for round in 1..=4_u8 {
        writer.write_all(&[round; 512]).unwrap();
        w.transfers.wait(None).unwrap();
        let event = w.transfers.next_event();
        assert_eq!(event.is_some(), round == 4, "round {round}");
    }
    let mut out = [0; 2048];
    assert!(w.mapping.copy_out(0, &mut out));
    assert!(
        out.chunks(512)
            .zip(1_u8..)
            .all(|(part, round)| part.iter().all(|b| *b == round))
    );
    assert_eq!(w.transfers.in_flight(), 0);
}

#[test]
fn full_is_said_and_nothing_is_lost() {
    let mut w = world("full", &vec![3; 65536]);
    let to = MemoryRange {
        memory: w.memory,
        offset: 0,
        len: 512,
    };
    for token in 0..8 {
        w.transfers
            .start(
                token,
                Target::Backing,
                Transfer::Read {
                    offset: token * 512,
                    to: MemoryRange {
                        offset: usize::try_from(token).unwrap() * 512,
                        ..to
                    },
                },
            )
            .unwrap();
    }
    let refused = w.transfers.start(99, Target::Backing, Transfer::Flush);
    assert!(matches!(refused, Err(PushError::Full)));
    let mut seen: Vec<u64> = (0..8).map(|_| done(&mut w.transfers).0).collect();
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6, 7]);
    let bad = MemoryRange {
        offset: (1 << 20) - 256,
        ..to
    };
    let refused = w
        .transfers
        .start(99, Target::Backing, Transfer::Read { offset: 0, to: bad });
    assert!(matches!(refused, Err(PushError::BadRange)));
    w.transfers
        .start(100, Target::Backing, Transfer::Flush)
        .unwrap();
    assert_eq!(done(&mut w.transfers).0, 100);
}

#[test]
fn a_watched_file_stays_watched() {
    let mut w = world("watched", &[]);
    let event = EventFd::new().unwrap();
    let file = w
        .transfers
        .register_file(Arc::new(event.try_clone().unwrap().into_fd()))
        .unwrap();
    w.transfers.watch(5, file).unwrap();
    for _ in 0..20 {
        event.ring();
        let seen = one(&mut w.transfers);
        assert!(seen.token == 5 && matches!(seen.outcome, Outcome::Readable));
        assert!(event.take());
    }
    w.transfers.timer(6, Duration::from_millis(1)).unwrap();
    let seen = one(&mut w.transfers);
    assert!(seen.token == 6 && matches!(seen.outcome, Outcome::TimedOut));
}
