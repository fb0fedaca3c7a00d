//! What the kernel's side has counted, and what the kernel says of its programs and links.

use aya::maps::{Map, MapData, PerCpuArray};
use blktide_engine::evidence::Sectors;
use blktide_sys::bpf;
use blktide_volume::VolumeError;
use std::io;
use std::os::fd::AsFd;

use crate::pins::{PROGRAMS, Pins, failed};

/// The `counters` map: a value a CPU, so that CPUs do not wait for each other.
pub(crate) struct Counters(PerCpuArray<MapData, u64>);

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

/// What it has counted since the attach, all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Marks.
    pub(crate) events: u64,
    /// Marks done again because a generation had begun.
    pub(crate) again: u64,
    /// Sectors of requests that completed, as the kernel counts them for this device. None of a device without requests.
    pub(crate) done: Sectors,
    /// Sectors of bios that were queued.
    pub(crate) queued: Sectors,
    /// Commands of somebody's own (`SG_IO` …) that ask the device for data, or move none.
    pub(crate) passed_in: u64,
    /// Those that give it some.
    pub(crate) passed_out: u64,
    /// Sectors that came by another name of the device (its disk), queued: marked, and not in the kernel's count of a partition.
    pub(crate) foreign_queued: u64,
    /// Those that completed. None of a device without requests.
    pub(crate) foreign_done: u64,
}

impl Counted {
    /// Sectors by another way that were seen queued and not done.
    pub(crate) const fn foreign_lag(&self) -> u64 {
        self.foreign_queued.wrapping_sub(self.foreign_done)
    }
}

impl Counters {
    pub(crate) fn open(pins: &Pins) -> Result<Self, VolumeError> {
        let path = pins.folder().join("counters");
        let fail = |e: aya::maps::MapError| failed("open", &path, io::Error::other(e));
        let map = MapData::from_fd(pins.open("counters")?).map_err(fail)?;
        PerCpuArray::try_from(Map::PerCpuArray(map))
            .map(Self)
            .map_err(fail)
    }

    /// Marks so far: see [`Counted::events`].
    pub(crate) fn events(&self) -> io::Result<u64> {
        self.sum(0)
    }

    fn sum(&self, index: u32) -> io::Result<u64> {
        let values = self.0.get(&index, 0).map_err(io::Error::other)?;
        Ok(values.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n)))
    }

    /// All of them now. Each is right; they are not of one moment.
    pub(crate) fn read(&self) -> io::Result<Counted> {
        let sum = |index: u32| self.sum(index);
        let sectors = |index: u32| -> io::Result<Sectors> {
            Ok(Sectors {
                written: sum(index)?,
                discarded: sum(index.saturating_add(1))?,
            })
        };
        Ok(Counted {
            events: sum(0)?,
            again: sum(1)?,
            done: sectors(2)?,
            queued: sectors(7)?,
            passed_in: sum(4)?,
            passed_out: sum(5)?,
            foreign_queued: sum(9)?,
            foreign_done: sum(6)?,
        })
    }
}

/// The kernel's numbers of programs and links, and runs that it skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Running {
    /// Ids of the programs; 0: its pin is gone.
    pub(crate) programs: [u32; 3],
    /// Ids of the links; 0: its pin is gone.
    pub(crate) links: [u32; 3],
    /// Times that each was not run because its processor was in it already; `None`: the kernel does not say.
    pub(crate) skipped: [Option<u64>; 3],
}

impl Running {
    /// Whether each program is there, and run.
    pub(crate) fn is_whole(&self) -> bool {
        let mut all = self.programs.iter().chain(&self.links);
        all.all(|id| *id != 0)
    }

    pub(crate) fn of(pins: &Pins) -> Self {
        let mut running = Self::default();
        let of = |what: &str, name: &str| -> Option<u64> {
            let opened = pins.open(what).ok()?;
            bpf::facts_of(opened.as_fd()).ok()?.number(name)
        };
        let id = |number: Option<u64>| number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let ids = running.programs.iter_mut().zip(running.links.iter_mut());
        let places = ids.zip(running.skipped.iter_mut());
        for (((program, link), skipped), (name, _)) in places.zip(PROGRAMS) {
            *program = id(of(name, "prog_id"));
            let bound = format!("link_{name}");
            *link = id(of(&bound, "link_id"));
            // A link that runs another program is no link of ours.
            if id(of(&bound, "prog_id")) != *program {
                *link = 0;
            }
            *skipped = of(name, "recursion_misses");
        }
        running
    }
}
