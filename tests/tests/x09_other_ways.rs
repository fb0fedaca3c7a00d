//! Mode watch: ways around the marks. Each is seen, refused at the attach, or found out at the next backup.
//! needs: root, loop, bpf, ext4, fio
//! limit: 240 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use blktide_tests::{
    FileSystem, Instance, LoopDevice, Mounted, NodeHolder, Tool, Tracked, Truth, doubt, figure,
    hide_writes, make_file, no_doubt, put, shell, write_block,
};
use blktide_volume::VolumeError;
use blktide_volume::error::Refusal;
use blktide_watch::{Attached, Detached, InUse, Pins};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const FINE: (u32, u32) = (4096, 4096);

/// A loop device of its own, not in use.
struct Disk {
    instance: Instance,
    file: PathBuf,
    node: LoopDevice,
}

impl Disk {
    fn new(name: &str) -> Result<Self> {
        let instance = Instance::new(name)?;
        let file = instance.join("disk");
        make_file(&file, 64 * MIB)?;
        let node = LoopDevice::new(&file, 512)?;
        Ok(Self {
            instance,
            file,
            node,
        })
    }

    fn with_ext4(name: &str) -> Result<Self> {
        let this = Self::new(name)?;
        FileSystem::Ext4.make(this.node.path())?;
        Ok(this)
    }

    fn tracked(&self) -> Tracked {
        Tracked::new(&self.instance, "data", self.node.path(), FINE)
    }

    /// Attached and believed.
    fn believed(&self) -> Result<Tracked> {
        let tracked = Tracked::attached(&self.instance, "data", self.node.path(), FINE)?;
        tracked.believe()?;
        no_doubt(&tracked)?;
        Ok(tracked)
    }

    /// Mounts it, writes, unmounts.
    fn touch(&self, text: &str) -> Result<()> {
        let mounted = Mounted::new(self.node.path(), &self.instance.join("mnt"), &[])?;
        put(&mounted.join(text), text)?;
        mounted.unmount()
    }
}

/// The attach must be refused, with this word.
fn refused(tracked: &Tracked, word: &str) -> Result<()> {
    match tracked.attach() {
        Ok(attached) => bail!("attached ({attached:?}) in spite of {word}"),
        Err(error) => {
            let known = matches!(
                error.downcast_ref(),
                Some(VolumeError::Refused {
                    kind: Refusal::Unwatchable,
                    ..
                })
            );
            ensure!(
                known && error.to_string().contains(&format!("[{word}]")),
                "{error:#}"
            );
            Ok(())
        }
    }
}

/// The next backup must believe nothing, for this reason and because of this.
fn found_out(tracked: &Tracked, reason: &str, because: &str) -> Result<()> {
    let distrust = doubt(tracked)?.with_context(|| format!("believed in spite of {because}"))?;
    ensure!(
        distrust.reason == reason && distrust.detail.contains(because),
        "wanted {reason}, {because}: {distrust:?}"
    );
    Ok(())
}

/// What the tracker says of its trust now.
fn reason(tracked: &Tracked) -> Result<Option<String>> {
    Ok(tracked.status()?.distrust.map(|d| d.reason))
}

/// trap TA15: a loop device in a file of the watched file system: its writes arrive, and are marked.
#[test]
fn a_device_on_a_file_of_the_volume_is_seen() -> Result<()> {
    let disk = Disk::with_ext4("x09stacked")?;
    let mounted = Mounted::new(disk.node.path(), &disk.instance.join("mnt"), &[])?;
    let tracked = Tracked::attached(&disk.instance, "data", disk.node.path(), FINE)?;
    tracked.believe()?;
    make_file(&mounted.join("inner"), 32 * MIB)?;
    mounted.sync()?;
    let truth = Truth::of(&disk.file, (0, 64 * MIB), disk.instance.root());
    let inner = LoopDevice::new(&mounted.join("inner"), 512)?;
    let figures = truth.judge(&tracked, || {
        shell(&format!(
            "dd if=/dev/urandom of={} bs=64k count=300 oflag=direct status=none; mkfs.ext4 -q -F {}",
            inner.path().display(),
            inner.path().display()
        ))?;
        mounted.sync()
    })?;
    figures.well("stacked")?;
    drop(inner);
    no_doubt(&tracked)?;
    figure(&format!(
        "stacked on a file of the volume: changed {}, marked {}, missed {}",
        figures.changed,
        figures.marked,
        figures.missed.len()
    ));
    Ok(())
}

/// trap TA15: the file below a loop device, open for writing: refused at the attach, found out later; for reading it may be.
#[test]
fn the_file_below_a_loop_device() -> Result<()> {
    let disk = Disk::new("x09file")?;
    let tracked = disk.tracked();
    let writer = OpenOptions::new().write(true).open(&disk.file)?;
    refused(&tracked, "file-open")?;
    drop(writer);
    let reader = fs::File::open(&disk.file)?;
    ensure!(tracked.attach()? == Attached::Now);
    tracked.believe()?;
    no_doubt(&tracked)?;
    drop(reader);
    for append in [false, true] {
        let _writer = OpenOptions::new()
            .write(true)
            .append(append)
            .open(&disk.file)?;
        found_out(&tracked, "foreign-write", "is open for writing")?;
        tracked.believe()?;
    }
    no_doubt(&tracked)
}

/// trap TA15: the same by another name of the file.
#[test]
fn the_file_below_a_loop_device_by_another_name() -> Result<()> {
    let disk = Disk::new("x09link")?;
    let other = disk.instance.join("other-name");
    fs::hard_link(&disk.file, &other)?;
    let tracked = disk.tracked();
    let writer = OpenOptions::new().write(true).open(&other)?;
    refused(&tracked, "file-open")?;
    drop(writer);
    ensure!(tracked.attach()? == Attached::Now);
    tracked.believe()?;
    let _writer = OpenOptions::new().write(true).open(&other)?;
    found_out(&tracked, "foreign-write", "is open for writing")
}

/// trap TA15: the device below a loop device, open for writing.
#[test]
fn the_device_below_a_loop_device() -> Result<()> {
    let disk = Disk::new("x09below")?;
    let upper = LoopDevice::new(disk.node.path(), 512)?;
    let tracked = Tracked::new(&disk.instance, "upper", upper.path(), FINE);
    let writer = OpenOptions::new().write(true).open(disk.node.path())?;
    refused(&tracked, "file-open")?;
    drop(writer);
    ensure!(tracked.attach()? == Attached::Now);
    tracked.believe()?;
    no_doubt(&tracked)?;
    let _writer = OpenOptions::new().write(true).open(disk.node.path())?;
    found_out(&tracked, "foreign-write", "is open for writing")
}

fn statistics(device: &Path, on: u8) -> Result<()> {
    let name = device.file_name().context("a name")?.to_string_lossy();
    shell(&format!(
        "echo {on} > /sys/class/block/{name}/queue/iostats"
    ))
}

/// req X9: a disk that does not count its sectors: refused at the attach, found out later.
#[test]
fn a_disk_without_statistics() -> Result<()> {
    let disk = Disk::new("x09stats")?;
    let tracked = disk.tracked();
    statistics(disk.node.path(), 0)?;
    let first = refused(&tracked, "statistics-off");
    statistics(disk.node.path(), 1)?;
    first?;
    ensure!(tracked.attach()? == Attached::Now);
    tracked.believe()?;
    no_doubt(&tracked)?;
    statistics(disk.node.path(), 0)?;
    let second = found_out(&tracked, "tracking-interrupted", "[statistics-off");
    statistics(disk.node.path(), 1)?;
    second?;
    // Off for a while between two backups: what was written then is marked, and missing in the kernel's count.
    let tracked = {
        drop(tracked);
        disk.believed()?
    };
    statistics(disk.node.path(), 0)?;
    let written = write_block(disk.node.path(), 8 * 4096, &[5; 4096]);
    statistics(disk.node.path(), 1)?;
    written?;
    let marked = tracked.drain()?;
    ensure!(marked.contains(&8), "not marked: {marked:?}");
    Ok(())
}

/// What is pinned below this folder.
fn pins(tracked: &Tracked) -> Result<PathBuf> {
    let options = tracked.options();
    Ok(Pins::of(&options.runtime_dir, &options.name)?
        .folder()
        .to_owned())
}

/// req X9: a program or what has it run was taken out of the kernel, by hand or by a tool that cleans up.
#[test]
fn a_program_taken_out_of_the_kernel() -> Result<()> {
    for name in ["link_bio_queue", "link_rq_issue", "link_rq_done"] {
        let disk = Disk::new("x09unlinked")?;
        let tracked = disk.believed()?;
        fs::remove_file(pins(&tracked)?.join(name))?;
        write_block(disk.node.path(), 0, &[1; 4096])?;
        found_out(&tracked, "tracking-interrupted", "[links-gone").context(name)?;
        // A full backup would not make it good: the programs do not run.
        tracked.believe()?;
        found_out(&tracked, "tracking-interrupted", "[links-gone").context(name)?;
        // The next attach mends it, and what went by is not forgotten.
        ensure!(
            tracked.attach()? == Attached::Now,
            "{name}: said to be whole"
        );
        ensure!(reason(&tracked)?.is_some(), "{name}: believed again");
        write_block(disk.node.path(), 4096, &[1; 4096])?;
        ensure!(tracked.drain()?.contains(&1), "{name}: not mended");
    }
    Ok(())
}

/// trap TA10: the kernel has counted a write that the programs were not run for: nothing is believed.
#[test]
fn a_write_that_the_programs_were_not_run_for() -> Result<()> {
    let disk = Disk::new("x09notrun")?;
    let tracked = disk.believed()?;
    write_block(disk.node.path(), 0, &[1; 4096])?;
    hide_writes(&tracked, 8)?;
    found_out(&tracked, "tracker-suspect", "[sectors-unseen")?;
    tracked.believe()?;
    no_doubt(&tracked)
}

/// req X9: all pins gone: not attached; the next attach says that there was a gap.
#[test]
fn all_pins_gone() -> Result<()> {
    let disk = Disk::new("x09unpinned")?;
    let tracked = disk.believed()?;
    let folder = pins(&tracked)?;
    for entry in fs::read_dir(&folder)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(&folder)?;
    ensure!(
        matches!(
            tracked
                .open()
                .map_err(anyhow::Error::downcast::<VolumeError>),
            Err(Ok(VolumeError::NotAttached { .. }))
        ),
        "attached without pins"
    );
    write_block(disk.node.path(), 0, &[1; 4096])?;
    ensure!(tracked.attach()? == Attached::Now);
    let reason = reason(&tracked)?;
    ensure!(
        reason.as_deref() == Some("tracking-interrupted"),
        "{reason:?}"
    );
    Ok(())
}

/// req X9: the device grows under the tracker: found out, and begun anew with the new size.
#[test]
fn another_size() -> Result<()> {
    let disk = Disk::new("x09size")?;
    let tracked = disk.believed()?;
    OpenOptions::new()
        .write(true)
        .open(&disk.file)?
        .set_len(80 * MIB)?;
    Tool::new("losetup")
        .arg("--set-capacity")
        .arg(disk.node.path())
        .run()?
        .ok()?;
    found_out(&tracked, "resized", "[device-resized")?;
    ensure!(tracked.attach()? == Attached::Now, "said to be whole");
    ensure!(
        reason(&tracked)?.is_some(),
        "believed after a change of size"
    );
    ensure!(tracked.status()?.volume_bytes == 80 * MIB);
    write_block(disk.node.path(), 80 * MIB - 4096, &[1; 4096])?;
    let last = 80 * MIB / 4096 - 1;
    ensure!(
        tracked.drain()?.contains(&last),
        "the new end is not tracked"
    );
    Ok(())
}

/// req X9: another disk in the place of the watched one, with its number and its size.
#[test]
fn another_disk_with_the_same_number() -> Result<()> {
    let disk = Disk::new("x09exchanged")?;
    let tracked = disk.believed()?;
    let other = disk.instance.join("other");
    make_file(&other, 64 * MIB)?;
    write_block(&other, 4096, &[7; 4096])?;
    let node = disk.node.path().display().to_string();
    shell(&format!(
        "losetup --detach {node}; losetup --direct-io=on {node} {}",
        other.display()
    ))?;
    found_out(&tracked, "device-changed", "[device-moved")?;
    // The new one is watched by then: believed again after a full backup.
    tracked.believe()?;
    write_block(disk.node.path(), 3 * 4096, &[8; 4096])?;
    no_doubt(&tracked)?;
    let bytes = tracked.status()?.changed_bytes;
    ensure!(bytes == 4096, "{bytes} bytes marked on the new disk");
    Ok(())
}

/// req A5: a bitmap that was stored is believed if nothing happened, and not if something did.
/// trap TA14: what the tracker itself reads and writes is no change.
/// req A6: a foreign write between detach and attach.
#[test]
fn the_bitmap_over_a_stop() -> Result<()> {
    let disk = Disk::with_ext4("x09stop")?;
    let tracked = disk.believed()?;
    disk.touch("marked")?;
    let known = tracked.drain()?;
    ensure!(!known.is_empty(), "nothing was marked");
    let first = tracked.status()?;
    ensure!(
        first.changed_bytes == known.len() as u64 * 4096,
        "{} bytes",
        first.changed_bytes
    );
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(
        reason(&tracked)?.is_none(),
        "{:?}",
        tracked.status()?.distrust
    );
    let (bytes, _) = tracked.open()?.changed_since(&[first.generation.0]);
    ensure!(
        bytes == [Some(first.changed_bytes)],
        "{bytes:?} bytes were remembered"
    );
    no_doubt(&tracked)?;
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    disk.touch("foreign")?;
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(
        reason(&tracked)?.as_deref() == Some("foreign-write"),
        "{:?}",
        reason(&tracked)?
    );
    tracked.believe()?;
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    let mounted = Mounted::new(disk.node.path(), &disk.instance.join("mnt"), &[])?;
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(
        reason(&tracked)?
            .as_deref()
            .is_some_and(|r| ["tracking-interrupted", "foreign-write"].contains(&r)),
        "{:?}",
        reason(&tracked)?
    );
    drop(mounted);
    Ok(())
}

/// req A6: on a volume that shows nothing a write by dd between detach and attach cannot be seen: it is not believed.
#[test]
fn a_raw_volume_over_a_stop() -> Result<()> {
    let disk = Disk::new("x09raw")?;
    let tracked = disk.believed()?;
    write_block(disk.node.path(), 0, &[1; 4096])?;
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    shell(&format!(
        "dd if=/dev/urandom of={} bs=4k count=1 seek=9 oflag=direct conv=notrunc status=none",
        disk.node.path().display()
    ))?;
    ensure!(tracked.attach()? == Attached::Now);
    let reason = reason(&tracked)?;
    // Which of the two depends on whether the write fell on what the evidence looks at.
    let known = ["foreign-write-unknown", "foreign-write"];
    ensure!(
        reason.as_deref().is_some_and(|r| known.contains(&r)),
        "{reason:?}"
    );
    Ok(())
}

/// req A5, A6: a program that has the node open so that it could write. No fence keeps it away: it is a user like any other, so that
/// the bitmap is not stored while it is there, and one that was stored is not believed.
#[test]
fn a_plain_opener_over_a_stop() -> Result<()> {
    let disk = Disk::new("x09opener")?;
    let mut tracked = disk.tracked();
    // Nobody else writes it while it is not watched, says the administrator. What is seen is stronger.
    tracked.options_mut().exclusive = true;
    tracked.attach()?;
    tracked.believe()?;
    let holder = NodeHolder::of(disk.node.path(), "<>")?;
    let busy = tracked
        .detach(InUse::Refuse)
        .map_err(anyhow::Error::downcast::<VolumeError>);
    ensure!(
        matches!(
            &busy,
            Err(Ok(VolumeError::Refused { kind: Refusal::InUse, message })) if message.contains("by sleep (")
        ),
        "{busy:?}"
    );
    drop(holder);
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    // Over a start of the machine no count would show what it has written by now.
    let holder = NodeHolder::of(disk.node.path(), "<>")?;
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(
        reason(&tracked)?.as_deref() == Some("tracking-interrupted"),
        "{:?}",
        reason(&tracked)?
    );
    drop(holder);
    // Without it the same is believed.
    tracked.believe()?;
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(reason(&tracked)?.is_none(), "{:?}", reason(&tracked)?);
    Ok(())
}

/// trap TC10: attached twice, detached twice, detached in use, attached while in use.
#[test]
fn twice() -> Result<()> {
    let disk = Disk::with_ext4("x09twice")?;
    let tracked = disk.believed()?;
    let name = tracked.status()?.generation;
    ensure!(tracked.attach()? == Attached::Before);
    ensure!(
        tracked.status()?.generation == name && reason(&tracked)?.is_none(),
        "attached anew"
    );
    let mounted = Mounted::new(disk.node.path(), &disk.instance.join("mnt"), &[])?;
    ensure!(tracked.attach()? == Attached::Before);
    let busy = tracked
        .detach(InUse::Refuse)
        .map_err(anyhow::Error::downcast::<VolumeError>);
    ensure!(
        matches!(
            busy,
            Err(Ok(VolumeError::Refused {
                kind: Refusal::InUse,
                ..
            }))
        ),
        "{busy:?}"
    );
    put(&mounted.join("still"), "marked")?;
    mounted.sync()?;
    ensure!(
        !tracked.drain()?.is_empty(),
        "a refused detach ended the marks"
    );
    ensure!(tracked.detach(InUse::LetGo)? == Detached::Live);
    let gone = tracked
        .detach(InUse::LetGo)
        .map_err(anyhow::Error::downcast::<VolumeError>);
    ensure!(
        matches!(gone, Err(Ok(VolumeError::NotAttached { .. }))),
        "{gone:?}"
    );
    ensure!(tracked.attach()? == Attached::Now);
    ensure!(
        reason(&tracked)?.as_deref() == Some("tracking-interrupted"),
        "{:?}",
        reason(&tracked)?
    );
    mounted.unmount()?;
    ensure!(tracked.detach(InUse::Refuse)? == Detached::Stored);
    let gone = tracked
        .detach(InUse::Refuse)
        .map_err(anyhow::Error::downcast::<VolumeError>);
    ensure!(
        matches!(gone, Err(Ok(VolumeError::NotAttached { .. }))),
        "{gone:?}"
    );
    Ok(())
}
