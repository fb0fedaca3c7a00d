//! The wire against bytes written out by hand from linux/fuse.h.

use super::*;

fn request(code: u32, body: &[u8], payload: usize) -> Vec<u8> {
    let len = u32::try_from(40 + body.len() + payload).unwrap();
    let mut bytes = Vec::new();
    bytes.extend(len.to_ne_bytes());
    bytes.extend(code.to_ne_bytes());
    bytes.extend(0x1122_3344_u64.to_ne_bytes());
    bytes.extend(2_u64.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn write_body(offset: u64, len: u32) -> Vec<u8> {
    let mut body = 7_u64.to_ne_bytes().to_vec();
    body.extend(offset.to_ne_bytes());
    body.extend(len.to_ne_bytes());
    body.extend([0; 20]);
    body
}

#[test]
fn a_write_is_read_from_its_place() {
    let bytes = request(16, &write_body(1 << 40, 4096), 4096);
    let request = Request::from_bytes(&bytes, 80 + 65536).unwrap();
    assert_eq!(request.unique, 0x1122_3344);
    assert_eq!(request.node, 2);
    assert_eq!(
        request.operation,
        Operation::Write {
            offset: 1 << 40,
            len: 4096
        }
    );
    assert_eq!(bytes.len(), crate::fuse::WRITE_HEADERS_BYTES);
}

#[test]
fn a_payload_longer_than_the_request_is_refused() {
    let bytes = request(16, &write_body(0, 4097), 4096);
    assert_eq!(
        Request::from_bytes(&bytes, 80 + 65536),
        Err(DecodeError::Damaged)
    );
}

#[test]
fn an_empty_slot_is_no_request() {
    assert_eq!(Request::from_bytes(&[0; 80], 80), Err(DecodeError::Empty));
}

#[test]
fn every_truncation_and_every_length_is_survived() {
    for code in 0..60 {
        let whole = request(code, &[0xff; 64], 0);
        for cut in 0..whole.len() {
            assert!(
                Request::from_bytes(&whole[..cut], cut).is_err(),
                "code {code} cut {cut}"
            );
        }
        for len in 0_u32..200 {
            let mut bytes = whole.clone();
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            if let Ok(request) = Request::from_bytes(&bytes, 104) {
                assert!(request.len == len && (40..=104).contains(&len));
            }
        }
    }
}

#[test]
fn names_and_sizes() {
    let lookup = |name: &[u8]| {
        Request::from_bytes(&request(1, name, 0), 4096)
            .unwrap()
            .operation
    };
    assert_eq!(lookup(b"volume\0"), Operation::Lookup { volume: true });
    assert_eq!(lookup(b"volumes\0"), Operation::Lookup { volume: false });
    assert_eq!(lookup(b"volume"), Operation::Lookup { volume: false });
    let mut body = [0; 88];
    body[0] = 8;
    body[16..24].copy_from_slice(&99_u64.to_ne_bytes());
    let set = Request::from_bytes(&request(4, &body, 0), 4096)
        .unwrap()
        .operation;
    assert_eq!(set, Operation::SetAttr { size: Some(99) });
}

#[test]
fn answers_have_their_lengths() {
    let shape = VolumeShape {
        volume_bytes: 10 << 20,
        max_write_bytes: 256 << 10,
        max_background: 128,
    };
    let offered = InitRequest {
        major: 7,
        minor: 44,
        max_readahead: 131_072,
        flags: u64::MAX,
    };
    for (answer, len) in [
        (Answer::done(1), 16),
        (Answer::error(1, crate::Errno::IO), 16),
        (Answer::written(1, 512), 24),
        (Answer::init(1, &offered, &shape), 80),
        (Answer::entry(1, &shape), 144),
        (Answer::attr(1, 2, &shape), 120),
        (Answer::opened(1), 32),
        (Answer::statfs(1, &shape), 96),
    ] {
        assert_eq!(answer.bytes().len(), len);
        assert_eq!(
            answer.bytes()[..4],
            u32::try_from(len).unwrap().to_ne_bytes()
        );
        assert_eq!(answer.bytes()[8..16], 1_u64.to_ne_bytes());
    }
    assert_eq!(Answer::data(1, 100).bytes()[..4], 116_u32.to_ne_bytes());
    assert_eq!(
        Answer::error(1, crate::Errno::IO).bytes()[4..8],
        (-5_i32).to_ne_bytes()
    );
}

/// trap: with the write-back cache the kernel would answer writes that no server has seen.
#[test]
fn the_write_back_cache_is_never_asked_for() {
    let shape = VolumeShape {
        volume_bytes: 1 << 20,
        max_write_bytes: 256 << 10,
        max_background: 128,
    };
    let offered = InitRequest {
        major: 7,
        minor: 44,
        max_readahead: 0,
        flags: u64::MAX,
    };
    let answer = Answer::init(1, &offered, &shape);
    let body = &answer.bytes()[16..];
    let flags = u32::from_ne_bytes(body[12..16].try_into().unwrap());
    assert_eq!(flags & 1 << 16, 0);
    assert_eq!(
        flags & (1 << 5 | 1 << 15 | 1 << 22),
        1 << 5 | 1 << 15 | 1 << 22
    );
    assert_eq!(body[28..30], 64_u16.to_ne_bytes());
    assert_eq!(body[40..42], [0, 0], "no request time-out");
}
