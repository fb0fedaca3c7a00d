//! Loading the kernel's side: programs checked by the kernel, maps, links; all of it pinned.
//!
//! **Invariant**: the links are made last, after every word that the programs read is right; and all of them or none.

use aya::programs::links::FdLink;
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use blktide_format::shared::{Shape, WatchShape};
use blktide_types::unit::BlockSize;
use blktide_volume::VolumeError;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use crate::pins::{MAPS, PROGRAMS, Unfinished};
use crate::target::Target;

/// The object: made from `bpf/watch.bpf.c` when this was built, or shipped.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/watch.bpf.o"));

/// What the marker is loaded for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) target: &'a Target,
    pub(crate) watch: WatchShape,
    /// The engine's memories.
    pub(crate) engine: Shape,
}

/// A sector is 512 bytes, whatever the device's own are.
const SECTOR_SHIFT: u8 = 9;
/// Bytes that a bitmap has at most (two of them are kept): beyond that the grain is coarser.
const BITMAP_BYTES_MAX: u64 = 64 << 20;

/// The unit of one bit for a volume of `bytes`: what is asked for, or coarser, so that bitmaps stay small; at most `block`.
pub(crate) fn grain_for(bytes: u64, asked: BlockSize, block: BlockSize) -> BlockSize {
    let mut grain = if asked.shift() < block.shift() {
        asked
    } else {
        block
    };
    while grain.shift() < block.shift() && bytes / grain.bytes_u64() / 8 > BITMAP_BYTES_MAX {
        grain = BlockSize::from_shift(grain.shift().saturating_add(1)).unwrap_or(block);
    }
    grain
}

/// The programs and maps, in the kernel, and nothing runs yet.
#[derive(Debug)]
pub(crate) struct Marker {
    loaded: Ebpf,
}

impl Marker {
    /// Loads all of it, and pins maps and programs.
    pub(crate) fn load(plan: &Plan<'_>, to: &Unfinished) -> Result<Self, VolumeError> {
        let mut loaded = create(plan).map_err(|e| refused(&e))?;
        let btf = Btf::from_sys_fs().map_err(|e| refused(&e))?;
        for (name, tracepoint) in PROGRAMS {
            let program = program_of(&mut loaded, name)?;
            program.load(tracepoint, &btf).map_err(|e| refused(&e))?;
            program.pin(to.path(name)).map_err(|e| refused(&e))?;
        }
        for name in MAPS {
            let map = loaded.map(name).ok_or_else(|| lacks(name))?;
            map.pin(to.path(name)).map_err(|e| refused(&e))?;
        }
        Ok(Self { loaded })
    }

    /// From here on everything is marked.
    pub(crate) fn run(mut self, to: &Unfinished) -> Result<(), VolumeError> {
        for (name, _) in PROGRAMS {
            let program = program_of(&mut self.loaded, name)?;
            let attach = |program: &mut BtfTracePoint| -> Result<FdLink, ProgramError> {
                let id = program.attach()?;
                Ok(program.take_link(id)?.into())
            };
            let link = attach(program).map_err(|e| refused(&e))?;
            link.pin(to.path(&format!("link_{name}")))
                .map_err(|e| refused(&e))?;
        }
        Ok(())
    }
}

/// Loads all of it over small maps and asks `ask` about each program; nothing of it stays. False: `ask` said no of one.
pub(crate) fn try_load(ask: &dyn Fn(BorrowedFd<'_>) -> bool) -> Result<bool, EbpfError> {
    let mut loaded = EbpfLoader::new().load(OBJECT)?;
    let btf = Btf::from_sys_fs()?;
    let mut all = true;
    for (name, tracepoint) in PROGRAMS {
        let program = loaded.program_mut(name).ok_or(ProgramError::NotLoaded)?;
        let program: &mut BtfTracePoint = program.try_into()?;
        program.load(tracepoint, &btf)?;
        all &= ask(program.fd()?.as_fd());
    }
    Ok(all)
}

fn create(plan: &Plan<'_>) -> Result<Ebpf, EbpfError> {
    let (disk, target) = (plan.target.disk, plan.target);
    let partition = if target.is_partition() {
        // As the kernel packs a device's number.
        target.number.major << 20 | target.number.minor
    } else {
        0
    };
    let watch = &plan.watch;
    let bitmap_words = u64::try_from(watch.bitmap_words()).unwrap_or(u64::MAX);
    let shift = u32::from(watch.grain.shift().saturating_sub(SECTOR_SHIFT));
    let entries = |words: usize| u32::try_from(words).unwrap_or(u32::MAX);
    EbpfLoader::new()
        .override_global("disk_major", &disk.major, true)
        .override_global("disk_minor", &disk.minor, true)
        .override_global("partition", &partition, true)
        .override_global("start_sector", &watch.start_sector, true)
        .override_global("sectors", &watch.sectors, true)
        .override_global("bitmap_words", &bitmap_words, true)
        .override_global("grain_shift", &shift, true)
        .map_max_entries("marks", entries(watch.words()))
        .map_max_entries("control", entries(plan.engine.control_words()))
        .map_max_entries("banks", entries(plan.engine.banks_words()))
        .load(OBJECT)
}

fn program_of<'a>(loaded: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, VolumeError> {
    let program = loaded.program_mut(name).ok_or_else(|| lacks(name))?;
    program.try_into().map_err(|e: ProgramError| refused(&e))
}

fn lacks(what: &str) -> VolumeError {
    VolumeError::Layout {
        why: format!("the marker's object has no {what}"),
    }
}

/// The kernel's word, with all that lies below it.
fn refused(error: &dyn std::error::Error) -> VolumeError {
    VolumeError::Io {
        what: "load the marker into the kernel",
        path: Path::new("/sys/fs/bpf").to_owned(),
        source: io::Error::other(chain(error)),
    }
}

/// An error and what lies below it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(cause) = below {
        let words = cause.to_string();
        // Some print what they wrap.
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        below = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// trap TA9: two bitmaps of 32 MiB a TiB by 4 KiB, and never more than 64 MiB each below the block size.
    #[test]
    fn large_volumes_have_coarser_grains() {
        let (asked, block) = (BlockSize::new(4096).unwrap(), BlockSize::DEFAULT);
        let grain = |bytes| grain_for(bytes, asked, block).bytes();
        assert_eq!(grain(1 << 20), 4096);
        assert_eq!(grain(2 << 40), 4096);
        assert_eq!(grain((2 << 40) + 4096 * 8), 8192, "not one byte more");
        assert_eq!(grain(3 << 40), 8192);
        assert_eq!(grain(64 << 40), 65536);
        assert_eq!(
            grain_for(1 << 30, block, asked).bytes(),
            4096,
            "at most the block"
        );
    }
}
