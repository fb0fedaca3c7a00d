//! The frontend against a kernel that is the test: a socket that keeps message boundaries stands for /dev/fuse.

use super::*;
use blktide_format::shared::{SLOT_HEADER_OFFSET, Shape, slot};
use blktide_sys::mapping::Mapping;
use blktide_sys::memfd::Memfd;
use blktide_sys::socket::PacketSocket;
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockSize;
use std::sync::atomic::{AtomicU64, Ordering};

const SLOT_BYTES: usize = 4096 + 65536;
const VOLUME: VolumeShape = VolumeShape {
    volume_bytes: 1 << 20,
    max_write_bytes: 65536,
    max_background: 128,
};

struct World {
    kernel: PacketSocket,
    device: FuseDevice,
    mapping: Arc<Mapping>,
    frontend: FuseFrontend,
}

fn shape() -> Shape {
    let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT, BlockSize::IMAGE_MIN, 512, 4096);
    Shape {
        slots: 4,
        slot_payload_bytes: 65536,
        ..Shape::usual(geometry.unwrap())
    }
}

fn frontend(device: &FuseDevice, mapping: &Arc<Mapping>) -> FuseFrontend {
    let slots = Slots::of_queue(mapping, &shape(), 1).unwrap();
    let mut frontend = FuseFrontend::new(device.try_clone().unwrap(), slots, VOLUME);
    drop(frontend.run().unwrap());
    frontend
}

fn world() -> World {
    let (kernel, ours) = PacketSocket::pair().unwrap();
    let memory = Memfd::create("slots", shape().slots_bytes() as u64).unwrap();
    let mapping = Arc::new(Mapping::new(&memory).unwrap());
    let device = FuseDevice::from_fd(ours.into_fd());
    let frontend = frontend(&device, &mapping);
    World {
        kernel,
        device,
        mapping,
        frontend,
    }
}

/// A request of linux/fuse.h, by hand.
fn request(code: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(40 + body.len())
        .unwrap()
        .to_ne_bytes()
        .to_vec();
    bytes.extend(code.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn transfer(offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = 1_u64.to_ne_bytes().to_vec();
    body.extend(offset.to_ne_bytes());
    body.extend(len.to_ne_bytes());
    body.extend([0; 20]);
    body.extend(payload);
    body
}

fn fallocate(offset: u64, len: u64, mode: i32) -> Vec<u8> {
    let mut body = 1_u64.to_ne_bytes().to_vec();
    body.extend(offset.to_ne_bytes());
    body.extend(len.to_ne_bytes());
    body.extend(mode.to_ne_bytes());
    body.extend([0; 4]);
    body
}

impl World {
    fn send(&self, bytes: &[u8]) {
        self.kernel.send(bytes, &[]).unwrap();
    }

    /// The next answer: unique, errno, body.
    fn answer(&self) -> (u64, i32, Vec<u8>) {
        let mut buffer = vec![0; 1 << 16];
        self.kernel.set_nonblocking(true).unwrap();
        let got = self.kernel.receive(&mut buffer).unwrap().bytes;
        assert_eq!(buffer[..4], u32::try_from(got).unwrap().to_ne_bytes());
        let errno = -i32::from_ne_bytes(buffer[4..8].try_into().unwrap());
        let unique = u64::from_ne_bytes(buffer[8..16].try_into().unwrap());
        (unique, errno, buffer[16..got].to_vec())
    }

    fn no_answer(&self) {
        self.kernel.set_nonblocking(true).unwrap();
        assert!(
            self.kernel
                .receive(&mut [0; 64])
                .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
        );
    }

    /// What a death does: the frontend is gone, the memory stays.
    fn successor(&mut self) {
        self.frontend = frontend(&self.device, &self.mapping);
    }

    /// What the successor finds, in order.
    fn left(&mut self) -> Vec<Next> {
        std::iter::from_fn(|| self.frontend.next_left()).collect()
    }

    fn take(&mut self) -> (Slot, Work) {
        match self.frontend.next().unwrap() {
            Next::Request(slot, work) => (slot, work),
            other @ (Next::Handled | Next::Nothing | Next::NoSlot | Next::Gone) => {
                panic!("{other:?}")
            }
        }
    }

    fn word(&self, slot: Slot, byte: usize) -> &AtomicU64 {
        &self.mapping.words()[((2 + slot.0) * SLOT_BYTES + byte) / 8]
    }

    fn header(&self, slot: Slot) -> u64 {
        self.word(slot, SLOT_HEADER_OFFSET).load(Ordering::SeqCst)
    }

    fn state(&self, slot: Slot) -> &AtomicU64 {
        self.word(slot, slot::STATE * 8)
    }
}

const WRITE: Work = Work::Write {
    offset: 8192,
    len: 512,
};

#[test]
fn a_write_stands_in_its_slot_until_it_is_answered() {
    let mut w = world();
    assert_eq!(w.frontend.next().unwrap(), Next::Nothing);
    w.send(&request(16, 77, 2, &transfer(8192, 512, &[5; 512])));
    let (slot, work) = w.take();
    assert_eq!(work, WRITE);
    let at = w.frontend.slots().payload(slot);
    let mut payload = [0; 512];
    assert!(at.is_multiple_of(4096) && w.mapping.copy_out(at, &mut payload));
    assert_eq!(payload, [5; 512]);
    assert_ne!(w.header(slot), 0);
    assert_eq!(w.frontend.under_way(), 1);
    w.frontend.complete(slot, Ok(512)).unwrap();
    let (unique, errno, body) = w.answer();
    assert_eq!(
        (unique, errno, &body[..4]),
        (77, 0, &512_u32.to_ne_bytes()[..])
    );
    assert_eq!((w.header(slot), w.frontend.under_way()), (0, 0));
}

/// req X3: whoever takes over finishes what was not finished, and answers what was.
/// trap TB9: a request that was performed and perhaps answered is never performed again.
#[test]
fn a_death_at_each_moment() {
    // Before anything: the slots are empty.
    let mut w = world();
    w.successor();
    assert_eq!(w.left(), []);
    // After it was received (and perhaps performed): again, from the beginning.
    w.send(&request(16, 1, 2, &transfer(8192, 512, &[9; 512])));
    let (slot, _) = w.take();
    w.successor();
    assert_eq!(w.left(), [Next::Request(slot, WRITE)]);
    w.no_answer();
    // After 'done', before the answer: answered with the stored result, not performed.
    w.frontend.slots().set_result(slot, Err(Errno::NOSPC));
    w.successor();
    assert_eq!(w.left(), [Next::Handled]);
    assert_eq!(w.answer().1, Errno::NOSPC.0);
    assert_eq!(w.header(slot), 0);
    // After the answer, between the two stores that empty the slot: empty, and the next request is not 'done'.
    w.state(slot).store(1, Ordering::SeqCst);
    w.successor();
    assert_eq!(w.left(), []);
    for unique in 2..4 {
        w.send(&request(16, unique, 2, &transfer(8192, 512, &[9; 512])));
        w.take();
    }
    w.successor();
    let again = w.left();
    assert_eq!(again.len(), 2, "a stale 'done' is not these requests'");
    assert!(again.iter().all(|n| matches!(n, Next::Request(_, WRITE))));
    w.no_answer();
}

#[test]
fn reads_give_data() {
    let mut w = world();
    w.send(&request(15, 1, 2, &transfer(4096, 1024, &[])));
    let (slot, work) = w.take();
    assert_eq!(
        work,
        Work::Read {
            offset: 4096,
            len: 1024
        }
    );
    assert!(
        w.mapping
            .copy_in(w.frontend.slots().payload(slot), &[3; 1024])
    );
    w.frontend.complete(slot, Ok(1024)).unwrap();
    assert_eq!(w.answer(), (1, 0, vec![3; 1024]));
    w.send(&request(15, 2, 2, &transfer(0, 512, &[])));
    let (slot, _) = w.take();
    w.frontend.complete(slot, Err(Errno::IO)).unwrap();
    assert_eq!(w.answer(), (2, Errno::IO.0, vec![]));
}

/// P9: a discard and a write-zeroes are both zeroes; nothing of the data path is ever answered with `ENOSYS`.
#[test]
fn zeroes_and_what_is_refused() {
    let mut w = world();
    for (mode, keep) in [(3, false), (2, false), (0x11, true), (0x10, true)] {
        w.send(&request(43, 4, 2, &fallocate(512, 1 << 19, mode)));
        let (slot, work) = w.take();
        assert_eq!(
            work,
            Work::Zero {
                offset: 512,
                len: 1 << 19,
                keep
            }
        );
        w.frontend.complete(slot, Err(Errno::OPNOTSUPP)).unwrap();
        assert_eq!(w.answer().1, Errno::OPNOTSUPP.0);
    }
    let mut longer = [0; 88];
    longer[0] = 8;
    let refused = [
        (
            request(43, 5, 2, &fallocate(0, 4096, 0x08)),
            Errno::OPNOTSUPP,
        ),
        (request(43, 5, 2, &fallocate(0, 4096, 0)), Errno::OPNOTSUPP),
        (request(15, 5, 2, &transfer(0, 65537, &[])), Errno::INVAL),
        (request(4, 5, 2, &longer), Errno::PERM),
        (request(1, 5, 1, b"other\0"), Errno::NOENT),
        (request(22, 5, 2, &[0; 16]), Errno::NOSYS),
    ];
    for (bytes, errno) in refused {
        w.send(&bytes);
        assert_eq!(w.frontend.next().unwrap(), Next::Handled);
        assert_eq!(w.answer(), (5, errno.0, vec![]));
    }
    w.send(&request(20, 6, 2, &[0; 16]));
    assert_eq!(w.take().1, Work::Flush);
}

#[test]
fn full_is_said_and_the_end_is_seen() {
    let mut w = world();
    for unique in 1..=2 {
        w.send(&request(20, unique, 2, &[0; 16]));
        w.take();
    }
    w.send(&request(20, 3, 2, &[0; 16]));
    assert_eq!(w.frontend.next().unwrap(), Next::NoSlot);
    w.frontend.complete(Slot(0), Ok(0)).unwrap();
    w.take();
    w.frontend.complete(Slot(1), Ok(0)).unwrap();
    assert_eq!([w.answer().0, w.answer().0], [2, 1]);
    let (kernel, _) = PacketSocket::pair().unwrap();
    w.kernel = kernel;
    assert_eq!(w.frontend.next().unwrap(), Next::Gone);
}
