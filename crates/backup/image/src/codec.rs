//! Compressing frames, and back, with a bound on what comes out.

use crate::error::ImageError;
use blktide_format::entry::Codec;
use std::io;
use std::sync::{Mutex, PoisonError};

/// The level at which more work stops to pay.
const LEVEL: i32 = 1;

/// What a worker compresses with; kept between calls.
pub(crate) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// Where a frame's raw bytes are put together.
    pub(crate) raw: Vec<u8>,
    out: Vec<u8>,
}

impl Compressor {
    fn new() -> Result<Self, ImageError> {
        Ok(Self {
            zstd: zstd::bulk::Compressor::new(LEVEL).map_err(ImageError::Compress)?,
            raw: Vec::new(),
            out: Vec::new(),
        })
    }

    /// `self.raw` as it is to be stored: compressed if that is shorter.
    pub(crate) fn compress(&mut self) -> (Codec, &[u8]) {
        // Room for less than the raw bytes: what does not fit is no gain.
        self.out.resize(self.raw.len().saturating_sub(1), 0);
        match self
            .zstd
            .compress_to_buffer(&self.raw, self.out.as_mut_slice())
        {
            Ok(len) => match self.out.get(..len) {
                Some(out) => (Codec::Zstd, out),
                None => (Codec::Raw, &self.raw),
            },
            Err(_does_not_fit) => (Codec::Raw, &self.raw),
        }
    }
}

/// Compressors that no worker is using.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<Vec<Compressor>>,
}

impl Pool {
    pub(crate) fn take(&self) -> Result<Compressor, ImageError> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        match idle {
            Some(compressor) => Ok(compressor),
            None => Compressor::new(),
        }
    }

    pub(crate) fn put(&self, compressor: Compressor) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(compressor);
    }
}

/// The `raw_bytes` bytes that `stored` holds; never more are made.
pub(crate) fn decompress(codec: Codec, stored: &[u8], raw_bytes: u32) -> io::Result<Vec<u8>> {
    let len = usize::try_from(raw_bytes).map_err(io::Error::other)?;
    let raw = match codec {
        Codec::Raw => stored.to_vec(),
        Codec::Zstd => zstd::bulk::decompress(stored, len)?,
    };
    if raw.len() == len {
        Ok(raw)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}
