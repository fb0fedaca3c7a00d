//! The bytes of FUSE 7.x, in host order (linux/fuse.h): requests decoded, answers encoded.
//!
//! Invariant: decoding never reads past the request's own length and never panics, whatever the bytes are.

use super::{NODE_ROOT, VOLUME_FILE};
use crate::mapping::Mapping;

const HEADER_BYTES: usize = 40;
/// The longest part of a request that is looked at: header, and body or name.
const LOOKED_AT_BYTES: usize = HEADER_BYTES + 256;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const ACCESS: u32 = 34;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const SYNCFS: u32 = 50;

const FLAG_ASYNC_READ: u64 = 1;
const FLAG_BIG_WRITES: u64 = 1 << 5;
const FLAG_ASYNC_DIO: u64 = 1 << 15;
const FLAG_WRITEBACK_CACHE: u64 = 1 << 16;
const FLAG_MAX_PAGES: u64 = 1 << 22;
const FLAG_INIT_EXT: u64 = 1 << 30;
/// Without these a request of `max_write` would be cut, or its loop request would wait for it alone.
const FLAGS_NEEDED: u64 = FLAG_BIG_WRITES | FLAG_ASYNC_DIO | FLAG_MAX_PAGES;
const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// Seconds for which the kernel may believe attributes and names: they never change.
const VALID_SECONDS: u64 = 86_400;

/// What the kernel offers in INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitRequest {
    /// 7 in every kernel so far.
    pub major: u32,
    /// Version within.
    pub minor: u32,
    /// Bytes of read-ahead it offers.
    pub max_readahead: u32,
    /// Its flags.
    pub flags: u64,
}

impl InitRequest {
    /// Whether the kernel can do what a volume needs.
    pub const fn suffices(&self) -> bool {
        self.major >= 7 && self.flags & FLAGS_NEEDED == FLAGS_NEEDED
    }
}

/// What is asked. Offsets and lengths in bytes, as the kernel sent them: check them against the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The first request of a connection.
    Init(InitRequest),
    /// A name in the folder; `volume`: that of the volume's file.
    Lookup {
        /// Whether it is the volume's file.
        volume: bool,
    },
    /// Not to be answered.
    Forget,
    /// Not to be answered.
    Interrupt,
    /// Attributes of the node.
    GetAttr,
    /// Attributes are to change; `size`: to this many bytes.
    SetAttr {
        /// The new size, if that is asked.
        size: Option<u64>,
    },
    /// Opens the file.
    Open,
    /// Opens the folder.
    OpenDir,
    /// Reads.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
    },
    /// Writes the payload, which begins [`super::WRITE_HEADERS_BYTES`] after the request's first byte.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
    },
    /// Everything answered so far to stable storage.
    Sync,
    /// fallocate(2).
    Fallocate {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Its flags.
        mode: u32,
    },
    /// Size and free space.
    StatFs,
    /// An answer of success without content is all that is needed (FLUSH, RELEASE, ACCESS, READDIR of nothing …).
    Nothing,
    /// The connection ends (unmount). Answered with nothing.
    Destroy,
    /// One that is not served; `ENOSYS` is right.
    Other(u32),
}

/// A request as it stands in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The kernel's name for it: goes into the answer.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// Bytes of the request, with headers and payload.
    pub len: u32,
    /// What is asked.
    pub operation: Operation,
}

/// Bytes that are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The length is zero: no request stands there.
    #[error("no request")]
    Empty,
    /// A length that contradicts itself, or lies outside the memory.
    #[error("a damaged request")]
    Damaged,
}

impl Request {
    /// Decodes the request that stands in `memory` at `offset`, in at most `capacity` bytes.
    pub fn decode(memory: &Mapping, offset: usize, capacity: usize) -> Result<Self, DecodeError> {
        let mut bytes = [0_u8; LOOKED_AT_BYTES];
        let look = capacity.min(LOOKED_AT_BYTES);
        let head = bytes.get_mut(..look).ok_or(DecodeError::Damaged)?;
        if !memory.copy_out(offset, head) {
            return Err(DecodeError::Damaged);
        }
        Self::from_bytes(head, capacity)
    }

    /// Decodes from the request's first bytes; `capacity` bounds its length.
    pub fn from_bytes(bytes: &[u8], capacity: usize) -> Result<Self, DecodeError> {
        let header = Reader(bytes);
        let len = header.u32(0)?;
        let bytes_len = usize::try_from(len).unwrap_or(usize::MAX);
        if len == 0 {
            return Err(DecodeError::Empty);
        }
        if bytes_len < HEADER_BYTES || bytes_len > capacity {
            return Err(DecodeError::Damaged);
        }
        let body = bytes
            .get(HEADER_BYTES..bytes_len.min(bytes.len()))
            .ok_or(DecodeError::Damaged)?;
        let operation = decode_operation(header.u32(4)?, Reader(body))?;
        if let Operation::Write { len: payload, .. } = operation
            && usize::try_from(payload).unwrap_or(usize::MAX)
                > bytes_len.saturating_sub(super::WRITE_HEADERS_BYTES)
        {
            return Err(DecodeError::Damaged);
        }
        Ok(Self {
            unique: header.u64(8)?,
            node: header.u64(16)?,
            len,
            operation,
        })
    }

    /// Whether the kernel waits for an answer to it.
    pub const fn wants_answer(&self) -> bool {
        !matches!(self.operation, Operation::Forget | Operation::Interrupt)
    }
}

fn decode_operation(code: u32, body: Reader<'_>) -> Result<Operation, DecodeError> {
    Ok(match code {
        INIT => {
            let low = body.u32(12)?;
            let extended = u64::from(low) & FLAG_INIT_EXT != 0;
            let high = if extended { body.u32(16)? } else { 0 };
            Operation::Init(InitRequest {
                major: body.u32(0)?,
                minor: body.u32(4)?,
                max_readahead: body.u32(8)?,
                flags: u64::from(low) | u64::from(high) << 32,
            })
        }
        LOOKUP => Operation::Lookup {
            volume: body.name() == Some(VOLUME_FILE.as_bytes()),
        },
        FORGET | BATCH_FORGET => Operation::Forget,
        INTERRUPT => Operation::Interrupt,
        GETATTR => Operation::GetAttr,
        SETATTR => {
            let size_asked = body.u32(0)? & 1 << 3 != 0;
            Operation::SetAttr {
                size: if size_asked {
                    Some(body.u64(16)?)
                } else {
                    None
                },
            }
        }
        OPEN => Operation::Open,
        OPENDIR => Operation::OpenDir,
        READ => Operation::Read {
            offset: body.u64(8)?,
            len: body.u32(16)?,
        },
        WRITE => Operation::Write {
            offset: body.u64(8)?,
            len: body.u32(16)?,
        },
        FSYNC | FSYNCDIR | SYNCFS => Operation::Sync,
        FALLOCATE => Operation::Fallocate {
            offset: body.u64(8)?,
            len: body.u64(16)?,
            mode: body.u32(24)?,
        },
        STATFS => Operation::StatFs,
        FLUSH | RELEASE | RELEASEDIR | ACCESS | READDIR | READDIRPLUS => Operation::Nothing,
        DESTROY => Operation::Destroy,
        other => Operation::Other(other),
    })
}

#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], DecodeError> {
        let part = at.checked_add(N).and_then(|end| self.0.get(at..end));
        part.and_then(|p| p.try_into().ok())
            .ok_or(DecodeError::Damaged)
    }

    fn u32(self, at: usize) -> Result<u32, DecodeError> {
        self.array(at).map(u32::from_ne_bytes)
    }

    fn u64(self, at: usize) -> Result<u64, DecodeError> {
        self.array(at).map(u64::from_ne_bytes)
    }

    /// The bytes before the first zero.
    fn name(self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|b| *b == 0)?;
        self.0.get(..end)
    }
}

/// What the kernel is told of the volume's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeShape {
    /// Its size.
    pub volume_bytes: u64,
    /// The longest WRITE and READ; a multiple of 4096.
    pub max_write_bytes: u32,
    /// Requests that the kernel may have under way.
    pub max_background: u16,
}

/// An answer, encoded.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    bytes: [u8; Self::MAX_BYTES],
    len: usize,
}

impl Answer {
    const MAX_BYTES: usize = 16 + 128;
    const HEADER: usize = 16;

    fn new(unique: u64, body_len: usize) -> Self {
        let mut answer = Self {
            bytes: [0; Self::MAX_BYTES],
            len: Self::HEADER + body_len,
        };
        answer.put(0, &u32::try_from(answer.len).unwrap_or(0).to_ne_bytes());
        answer.put(8, &unique.to_ne_bytes());
        answer
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        if let Some(to) = self
            .bytes
            .get_mut(at..)
            .and_then(|b| b.get_mut(..value.len()))
        {
            to.copy_from_slice(value);
        }
    }

    /// Puts `value` at `at` of the body.
    fn body(mut self, at: usize, value: &[u8]) -> Self {
        self.put(Self::HEADER + at, value);
        self
    }

    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&self.bytes)
    }

    /// Success, without content.
    pub fn done(unique: u64) -> Self {
        Self::new(unique, 0)
    }

    /// Failure with this errno (positive).
    pub fn error(unique: u64, errno: crate::Errno) -> Self {
        let mut answer = Self::new(unique, 0);
        answer.put(4, &errno.0.saturating_neg().to_ne_bytes());
        answer
    }

    /// Success of a READ; `len` bytes of data follow.
    pub fn data(unique: u64, len: u32) -> Self {
        let mut answer = Self::new(unique, 0);
        let total = u32::try_from(answer.len).unwrap_or(0).saturating_add(len);
        answer.put(0, &total.to_ne_bytes());
        answer
    }

    /// Success of a WRITE of `len` bytes.
    pub fn written(unique: u64, len: u32) -> Self {
        Self::new(unique, 8).body(0, &len.to_ne_bytes())
    }

    /// The answer to INIT: version 7, the flags that both want, no write-back cache, no request time-out.
    pub fn init(unique: u64, offered: &InitRequest, shape: &VolumeShape) -> Self {
        let wanted = FLAG_ASYNC_READ | FLAGS_NEEDED | FLAG_INIT_EXT;
        debug_assert_eq!(wanted & FLAG_WRITEBACK_CACHE, 0);
        let flags = (offered.flags & wanted).to_ne_bytes();
        let (low, high) = flags.split_at(4);
        let (low, high) = if cfg!(target_endian = "little") {
            (low, high)
        } else {
            (high, low)
        };
        let pages = u16::try_from(shape.max_write_bytes / 4096).unwrap_or(u16::MAX);
        Self::new(unique, 64)
            .body(0, &7_u32.to_ne_bytes())
            .body(4, &offered.minor.min(38).to_ne_bytes())
            .body(8, &offered.max_readahead.to_ne_bytes())
            .body(12, low)
            .body(16, &shape.max_background.to_ne_bytes())
            .body(18, &shape.max_background.to_ne_bytes())
            .body(20, &shape.max_write_bytes.to_ne_bytes())
            .body(24, &1_u32.to_ne_bytes())
            .body(28, &pages.to_ne_bytes())
            .body(32, high)
    }

    /// The answer to a LOOKUP that found the volume's file.
    pub fn entry(unique: u64, shape: &VolumeShape) -> Self {
        Self::new(unique, 128)
            .body(0, &super::NODE_VOLUME.to_ne_bytes())
            .body(8, &1_u64.to_ne_bytes())
            .body(16, &VALID_SECONDS.to_ne_bytes())
            .body(24, &VALID_SECONDS.to_ne_bytes())
            .attributes(40, super::NODE_VOLUME, shape)
    }

    /// Attributes of a node.
    pub fn attr(unique: u64, node: u64, shape: &VolumeShape) -> Self {
        Self::new(unique, 104)
            .body(0, &VALID_SECONDS.to_ne_bytes())
            .attributes(16, node, shape)
    }

    fn attributes(self, at: usize, node: u64, shape: &VolumeShape) -> Self {
        let folder = node == NODE_ROOT;
        let size = if folder { 0 } else { shape.volume_bytes };
        let mode: u32 = if folder {
            libc::S_IFDIR | 0o500
        } else {
            libc::S_IFREG | 0o600
        };
        let links: u32 = if folder { 2 } else { 1 };
        self.body(at, &node.to_ne_bytes())
            .body(at + 8, &size.to_ne_bytes())
            .body(at + 16, &(size / 512).to_ne_bytes())
            .body(at + 60, &mode.to_ne_bytes())
            .body(at + 64, &links.to_ne_bytes())
            .body(at + 80, &4096_u32.to_ne_bytes())
    }

    /// The file or the folder is open.
    pub fn opened(unique: u64) -> Self {
        Self::new(unique, 16).body(8, &OPEN_KEEP_CACHE.to_ne_bytes())
    }

    /// Size and free space: all of it in use.
    pub fn statfs(unique: u64, shape: &VolumeShape) -> Self {
        let blocks = shape.volume_bytes / 4096;
        Self::new(unique, 80)
            .body(0, &blocks.to_ne_bytes())
            .body(40, &4096_u32.to_ne_bytes())
            .body(44, &255_u32.to_ne_bytes())
            .body(48, &4096_u32.to_ne_bytes())
    }
}

#[cfg(test)]
mod tests;
