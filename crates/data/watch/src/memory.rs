//! The engine's memories in the kernel: they outlive every process.

use blktide_engine::Memory;
use blktide_sys::bpf;
use blktide_sys::mapping::Mapping;
use blktide_volume::VolumeError;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::pins::{Pins, failed};

/// A pinned map as the engine takes it. Its pages are in memory from the start, and are never swapped out.
#[derive(Debug)]
pub(crate) struct PinnedMemory(Mapping);

impl PinnedMemory {
    pub(crate) fn open(pins: &Pins, name: &str) -> Result<Arc<dyn Memory>, VolumeError> {
        Ok(Arc::new(Self(map(pins, name)?)))
    }
}

impl Memory for PinnedMemory {
    fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }
}

/// Maps a whole pinned array.
fn map(pins: &Pins, name: &str) -> Result<Mapping, VolumeError> {
    let opened = pins.open(name)?;
    let fail =
        |e: blktide_sys::SysError| failed("map", &pins.folder().join(name), io::Error::other(e));
    let bytes = bpf::array_bytes(&opened).map_err(fail)?;
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    Mapping::of_bpf_array(&opened, bytes).map_err(fail)
}
