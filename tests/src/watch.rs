//! Mode `watch` at its library: a device that is tracked with no process, and its bytes as other people's tools read them.
//!
//! **Invariant**: the oracle is two plain copies of the bytes below the device. The marks that a step is judged by were begun
//! before the first copy and are taken after the second: what is written meanwhile is one mark too many, never a miss.

use anyhow::{Context, Result, ensure};
use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use blktide_sys::spawn::Program;
use blktide_types::id::GenerationName;
use blktide_volume::VolumeOptions;
use blktide_volume::message::{Distrust, VolumeStatus};
use blktide_watch::{
    Ahead, AheadRequest, Attached, Detached, FreezeLimits, InUse, Pins, Watched, attach, detach,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::compare::blocks_that_differ;
use crate::instance::{Instance, binary};
use crate::run::Tool;

/// How long a volume's lock is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// A volume in mode watch. Dropped, it is let go of, whoever uses it.
#[derive(Debug)]
pub struct Tracked {
    options: VolumeOptions,
    over: bool,
}

impl Tracked {
    /// The volume `name` of `instance` on `device`, with blocks and grains of so many bytes; not attached yet.
    pub fn new(instance: &Instance, name: &str, device: &Path, (block, grain): (u32, u32)) -> Self {
        let mut options = VolumeOptions::new(name, device);
        options.runtime_dir = instance.join("run");
        options.state_dir = instance.join("state");
        options.device_dir = instance.join("dev");
        (options.block_size_bytes, options.grain_bytes) = (block, grain);
        Self {
            options,
            over: false,
        }
    }

    /// One that somebody else has attached, and will let go of.
    pub fn of(options: VolumeOptions) -> Self {
        Self {
            options,
            over: true,
        }
    }

    /// The same, attached; it must not have been before.
    pub fn attached(
        instance: &Instance,
        name: &str,
        device: &Path,
        units: (u32, u32),
    ) -> Result<Self> {
        let tracked = Self::new(instance, name, device, units);
        ensure!(tracked.attach()? == Attached::Now, "{name} was attached");
        Ok(tracked)
    }

    /// What it is attached with.
    pub fn options(&self) -> &VolumeOptions {
        &self.options
    }

    /// The same with other options.
    pub fn options_mut(&mut self) -> &mut VolumeOptions {
        &mut self.options
    }

    /// Attaches it.
    pub fn attach(&self) -> Result<Attached> {
        Ok(attach(&self.options, PATIENCE, &|_| ())?)
    }

    /// Detaches it.
    pub fn detach(&self, in_use: InUse) -> Result<Detached> {
        Ok(detach(&self.options, in_use, PATIENCE)?)
    }

    /// Its control side.
    pub fn open(&self) -> Result<Watched> {
        Ok(Watched::open(&self.options, PATIENCE)?)
    }

    /// Ends the kernel's generation; what was written in it, in blocks.
    pub fn drain(&self) -> Result<BTreeSet<u64>> {
        Ok(self.open()?.drain().blocks().map(|b| b.0).collect())
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<VolumeStatus> {
        Ok(Watched::look(&self.options)?.status())
    }

    /// As after a full image whose instant opened the generation that is open now: believed from there on.
    pub fn believe(&self) -> Result<()> {
        // Evidence that was begun while writers go on is begun anew, where nothing is under way.
        drop(self.begin(None)?);
        let mut watched = self.open()?;
        let open = watched.status().generation;
        ensure!(watched.trust(open.0), "its open generation is unknown");
        ensure!(watched.distrusted().is_none(), "not believed");
        Ok(())
    }

    /// Begins a backup on top of the image whose instant opened `base`, as far as asking what it would copy.
    pub fn begin(&self, base: Option<GenerationName>) -> Result<Ahead> {
        self.begin_with(base, FreezeLimits::default())
    }

    /// The same with limits of its own.
    pub fn begin_with(&self, base: Option<GenerationName>, limits: FreezeLimits) -> Result<Ahead> {
        let request = AheadRequest {
            base,
            absent: None,
            limits,
            guard: Arc::new(Program::copy_of(&binary("blktided")?)?),
        };
        Ok(Ahead::begin(&self.options, &request, PATIENCE)?)
    }

    /// Leaves it attached, as a process does that is killed.
    pub fn leave(mut self) {
        self.over = true;
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.options.block_size_bytes
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.over {
            self.over = true;
            drop(self.detach(InUse::LetGo));
        }
    }
}

/// Where the bytes of a device really lie.
#[derive(Debug, Clone)]
pub struct Truth {
    source: PathBuf,
    start: u64,
    bytes: u64,
    folder: PathBuf,
}

/// What a step changed, what was marked in it, and what of the changed was not.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Blocks whose bytes are others.
    pub changed: u64,
    /// Blocks that were marked.
    pub marked: u64,
    /// Blocks of `changed` that are not in `marked`.
    pub missed: Vec<u64>,
}

impl Truth {
    /// `bytes` from `start` of `source`, a file or device; copies go to `folder`.
    pub fn of(source: &Path, (start, bytes): (u64, u64), folder: &Path) -> Self {
        Self {
            source: source.to_owned(),
            start,
            bytes,
            folder: folder.to_owned(),
        }
    }

    /// A plain copy of the bytes as they are now, past the page cache; replaces an earlier one of that name.
    pub fn copy(&self, name: &str) -> Result<PathBuf> {
        let to = self.folder.join(name);
        drop(fs::remove_file(&to));
        Tool::new("dd")
            .args(["bs=1M", "conv=sparse", "status=none"])
            .arg("iflag=direct,skip_bytes,count_bytes")
            .arg(format!("if={}", self.source.display()))
            .arg(format!("of={}", to.display()))
            .arg(format!("skip={}", self.start))
            .arg(format!("count={}", self.bytes))
            .limit(300)
            .run()?
            .ok()?;
        let file = fs::OpenOptions::new().write(true).open(&to)?;
        // A hole at the end is not written.
        file.set_len(self.bytes)?;
        Ok(to)
    }

    /// Blocks that changed from the copy `before` to the copy `after`.
    pub fn changed(&self, before: &Path, after: &Path, block: u32) -> Result<BTreeSet<u64>> {
        let block = usize::try_from(block)?;
        Ok(blocks_that_differ(before, after, block)?
            .into_iter()
            .collect())
    }

    /// Does `step` and says what became of it. The step must leave nothing in a page cache.
    pub fn judge(&self, tracked: &Tracked, step: impl FnOnce() -> Result<()>) -> Result<Figures> {
        tracked.drain()?;
        let before = self.copy("before")?;
        step()?;
        let after = self.copy("after")?;
        let marked = tracked.drain()?;
        let changed = self.changed(&before, &after, tracked.block_bytes())?;
        Ok(Figures::of(&changed, &marked))
    }
}

impl Figures {
    /// Of blocks that changed and blocks that were marked.
    pub fn of(changed: &BTreeSet<u64>, marked: &BTreeSet<u64>) -> Self {
        Self {
            changed: changed.len() as u64,
            marked: marked.len() as u64,
            missed: changed.difference(marked).copied().collect(),
        }
    }

    /// Fails if something was missed, or nothing changed at all.
    pub fn well(&self, what: &str) -> Result<()> {
        ensure!(
            self.missed.is_empty(),
            "{what}: of {} changed blocks {} were not marked: {:?}",
            self.changed,
            self.missed.len(),
            self.missed.get(..self.missed.len().min(20))
        );
        ensure!(self.changed > 0, "{what}: changed nothing");
        Ok(())
    }

    /// Both together.
    pub fn add(&mut self, other: &Self) {
        self.changed += other.changed;
        self.marked += other.marked;
        self.missed.extend(&other.missed);
    }
}

/// Why a backup that began now would not believe the marks; the evidence was sampled for it. The device is to be quiet.
pub fn doubt(tracked: &Tracked) -> Result<Option<Distrust>> {
    Ok(tracked.begin(None)?.distrust().cloned())
}

/// Fails if a backup that began now would not believe the marks.
pub fn no_doubt(tracked: &Tracked) -> Result<()> {
    let distrust = doubt(tracked)?;
    ensure!(distrust.is_none(), "distrusted: {distrust:?}");
    Ok(())
}

/// Takes `sectors` off what the programs have seen complete: as if they had not been run for that much. Nothing may be under way.
pub fn hide_completions(tracked: &Tracked, sectors: u64) -> Result<()> {
    hide(tracked, DONE, sectors)
}

/// Takes `sectors` off all that the programs have seen written.
pub fn hide_writes(tracked: &Tracked, sectors: u64) -> Result<()> {
    hide(tracked, QUEUED, sectors)?;
    hide(tracked, DONE, sectors)
}

/// Takes `sectors` off what the programs have seen complete that came by way of the whole disk.
pub fn hide_foreign(tracked: &Tracked, sectors: u64) -> Result<()> {
    hide(tracked, FOREIGN_DONE, sectors)
}

/// Where `watch.bpf.c` counts sectors written: of requests that completed, of bios that were queued.
const DONE: u32 = 2;
const FOREIGN_DONE: u32 = 6;
const QUEUED: u32 = 7;

fn hide(tracked: &Tracked, counter: u32, sectors: u64) -> Result<()> {
    let options = tracked.options();
    let pin = Pins::of(&options.runtime_dir, &options.name)?
        .folder()
        .join("counters");
    let map = Map::PerCpuArray(MapData::from_pin(pin)?);
    let mut counters = PerCpuArray::<_, u64>::try_from(map)?;
    let mut values: Vec<u64> = counters.get(&counter, 0)?.iter().copied().collect();
    let most = values.iter_mut().max().context("a CPU")?;
    *most = most
        .checked_sub(sectors)
        .context("so much has not been written")?;
    counters.set(counter, PerCpuValues::try_from(values)?, 0)?;
    Ok(())
}

/// One line of a test's report.
#[expect(clippy::print_stdout, reason = "xtask shows the figures of a test")]
pub fn figure(text: &str) {
    println!("figure: {text}");
}

/// Runs a few lines of shell, which end at the first that fails.
pub fn shell(script: &str) -> Result<()> {
    Tool::new("bash")
        .args(["-euc", script])
        .limit(300)
        .run()?
        .ok()
        .with_context(|| script.to_owned())?;
    Ok(())
}
