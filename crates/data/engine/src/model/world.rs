//! The world of the model: one volume, its lives, repositories, and the oracle beside it.

use super::backup::{Backup, Image, memories};
use super::folder::Folder;
use super::server::{Done, Memories, Server, Slot};
use super::{Op, SLOTS, Seen, absent_of, fresh_memories, pick, repository_id, shape_of, span};
use crate::EngineError;
use crate::broken::{Break, broken, leave_out};
use crate::control::{Absent, Limits, SnapshotRequest};
use crate::engine::Engine;
use crate::gate::HoldState;
use crate::handover::{self, Begun, Identity};
use crate::request::{Event, Operation};
use crate::snapshot::Overflow;
use blktide_format::shared::Shape;
use blktide_testkit::disk::{Node, SimDisk};
use blktide_testkit::reference::ReferenceVolume;
use blktide_testkit::seed::Seed;
use blktide_types::clock::{Instant, WallTime};
use blktide_types::id::{BootId, GenerationName, LifeId, SnapshotId, VolumeId};
use blktide_types::io::RevokeCause;
use blktide_types::unit::BlockIndex;
use core::time::Duration;

mod lives;

const REPOSITORIES: usize = 3;
/// The tracker knows at least so many of its newest generations: 12, less two that hints name, a base, and the open one.
const KEPT: u64 = 8;

pub(super) struct World {
    shape: Shape,
    pub(super) disk: SimDisk,
    device: Node,
    server: Option<Server>,
    memories: Memories,
    slots: Vec<Option<Slot>>,
    reference: ReferenceVolume,
    repositories: Vec<Vec<Image>>,
    backup: Option<Backup>,
    now: u64,
    names: u64,
    writes: u64,
    swaps: u64,
    life: u64,
    boot: u64,
    /// The disk before each operation of a hand-over, if a test wants to cut there.
    pub(super) moments: Option<Vec<SimDisk>>,
    /// A planted fault: only what a successor does again is not marked.
    trusting: bool,
    seen: Seen,
}

impl World {
    pub(super) fn new(seed: Seed) -> Self {
        Self::of_shape(shape_of(seed))
    }

    pub(super) fn of_shape(shape: Shape) -> Self {
        let disk = SimDisk::new();
        let bytes = usize::try_from(shape.geometry.volume_bytes()).unwrap();
        let device = disk.add_device(bytes);
        let mut world = Self {
            memories: fresh_memories(&shape),
            disk,
            device,
            server: None,
            slots: vec![None; SLOTS],
            reference: ReferenceVolume::new(bytes, shape.geometry.block_size().bytes_usize()),
            repositories: vec![Vec::new(); REPOSITORIES],
            backup: None,
            now: 0,
            names: 0,
            writes: 0,
            swaps: 0,
            life: 0,
            boot: 1,
            moments: None,
            trusting: broken(Break::NoteTrusted),
            seen: Seen::default(),
            shape,
        };
        if world.trusting {
            leave_out(None);
        }
        world.start();
        world
    }

    pub(super) fn seen(&self) -> Seen {
        self.seen
    }

    pub(super) fn apply(&mut self, op: Op) -> Result<(), String> {
        self.seen.ops += 1;
        self.now += 20_000;
        match op {
            Op::Write(slot, at, len) => {
                self.request(slot, at, len, |offset, len| Operation::Write {
                    offset,
                    len,
                    durable: false,
                })
            }
            Op::Zero(slot, at, len) => {
                self.request(slot, at, len.saturating_mul(3), |offset, len| {
                    Operation::Zero {
                        offset,
                        len,
                        keep: at % 2 == 0,
                    }
                })
            }
            Op::Read(slot, at, len) => {
                self.request(slot, at, len, |offset, len| Operation::Read { offset, len })
            }
            Op::Flush(slot) => self.arrive(slot, Operation::Flush),
            Op::Land(n) => self.land(n, n >> 32 & 7 < 2),
            Op::Short(n) => self.io_event(n, Server::short),
            Op::Fail(n) => self.io_event(n, |s, i, _, _| s.fail(i, n >> 32)),
            Op::Pass(n) => {
                self.now += n % 8_000_000;
                self.again_all()
            }
            Op::Again(n) => self.again(pick(n, SLOTS)),
            Op::Begin(repository, slots, policy) => self.begin(repository, slots, policy),
            Op::Poll => self.poll(),
            Op::Work(n) => self.work(n),
            Op::Shrink(n) => {
                self.shrink(n);
                Ok(())
            }
            Op::Cancel => self.end_backup(),
            Op::Revoke => {
                self.server().control.revoke(RevokeCause::Cancelled);
                Ok(())
            }
            Op::Kill => self.kill(),
            Op::Cut(coin) => {
                self.cut(coin);
                Ok(())
            }
            Op::Stop => self.stop(),
            Op::Distrust => {
                self.distrust();
                Ok(())
            }
            Op::LoseHint(n) => {
                let repository = repository_id(pick(n, REPOSITORIES));
                self.server().control.drop_hint(repository);
                Ok(())
            }
            Op::RollBack(n) => {
                let images = &mut self.repositories[pick(n, REPOSITORIES)];
                if images.len() > 1 {
                    images.pop();
                }
                Ok(())
            }
            Op::PassThrough => self.pass_through(),
        }?;
        self.check()
    }

    /// Everything under way is finished; then the whole volume is compared once more.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        self.drain()?;
        self.check()?;
        if self.disk.peek(self.device) == self.reference.bytes() {
            Ok(())
        } else {
            Err("the volume does not hold what was written".into())
        }
    }

    fn server(&mut self) -> &mut Server {
        self.server.as_mut().unwrap()
    }

    fn name(&mut self) -> GenerationName {
        self.names += 1;
        GenerationName((u128::from(self.names) << 64 | 7).to_le_bytes())
    }

    /// Begins a life: what the hand-over believes, or anew.
    fn start(&mut self) {
        self.memories = fresh_memories(&self.shape);
        let engine = Engine::create(&self.memories.0, &self.memories.1, self.shape).unwrap();
        let mut server = Server::new(engine);
        let (fresh, other) = (self.name(), self.name());
        let identity = self.identity();
        let kept = broken(Break::FileKept);
        let begun = handover::attach(identity, &mut self.folder(kept)).unwrap();
        match begun {
            Begun::Continued {
                generations,
                distrust,
            } => {
                let fresh = (fresh, WallTime(1));
                server.control.begin_life(&generations, fresh).unwrap();
                if let Some(distrust) = distrust {
                    server.control.remember_distrust(distrust, "still owed");
                }
                self.seen.believed += 1;
            }
            Begun::Anew { reason, detail } => {
                let fresh = (fresh, WallTime(1));
                server.control.begin_life(&[], fresh).unwrap();
                let why = (reason, WallTime(1));
                server.control.distrust(why, detail, other);
                self.forget();
            }
        }
        self.server = Some(server);
    }

    fn identity(&mut self) -> Identity {
        self.life += 1;
        Identity {
            volume: VolumeId([1; 16]),
            life: LifeId((u128::from(self.life) << 8 | 1).to_le_bytes()),
            boot: BootId((u128::from(self.boot) << 8 | 1).to_le_bytes()),
            geometry: self.shape.geometry,
            exclusive: true,
        }
    }

    fn folder(&mut self, kept: bool) -> Folder<'_> {
        Folder {
            kept,
            disk: &self.disk,
            device: self.device,
            moments: self.moments.as_mut(),
        }
    }

    /// What of the world a cut does not touch, as it is now.
    pub(super) fn survivable(&self) -> Self {
        Self {
            memories: self.memories.clone(),
            reference: self.reference.clone(),
            repositories: self.repositories.clone(),
            slots: Vec::new(),
            disk: self.disk.fork(),
            server: None,
            backup: None,
            moments: None,
            ..*self
        }
    }

    /// What a power cut leaves of the world: the disk, the repositories (they lie elsewhere), and a new life on them.
    pub(super) fn survivor(&self, disk: SimDisk) -> Self {
        let bytes = disk.peek(self.device);
        let mut next = Self {
            memories: fresh_memories(&self.shape),
            reference: self.reference.clone(),
            repositories: self.repositories.clone(),
            slots: vec![None; SLOTS],
            disk,
            server: None,
            backup: None,
            moments: None,
            boot: self.boot + 1,
            // Lives that the cut has undone are not drawn again.
            life: self.life + 1000,
            names: self.names + 1000,
            seen: Seen::default(),
            ..*self
        };
        next.reference.write(0, &bytes);
        // A name that is not known costs a full backup, never a change.
        next.forget();
        next.start();
        next
    }

    // Requests.

    fn request(
        &mut self,
        slot: u64,
        at: u64,
        len: u64,
        operation: impl Fn(u64, u64) -> Operation,
    ) -> Result<(), String> {
        let sectors = self.shape.geometry.volume_bytes() / 512;
        let first = at % sectors;
        let wanted = 1 + len % (len >> 32 & 31 | 1);
        let count = wanted.min(sectors - first);
        let (offset, len) = (first * 512, count * 512);
        // Requests that overlap while in flight may end in any order: no oracle knows which.
        let clear = self.slots.iter().flatten().all(|s| {
            let (o, l) = span(s.operation);
            o + l <= offset || offset + len <= o
        });
        if clear {
            self.arrive(slot, operation(offset, len))
        } else {
            Ok(())
        }
    }

    fn arrive(&mut self, slot: u64, operation: Operation) -> Result<(), String> {
        let slot = pick(slot, SLOTS);
        if self.slots[slot].is_none() {
            self.writes += 1;
            self.slots[slot] = Some(Slot {
                operation,
                sequence: self.writes,
            });
            self.event(slot, Event::Start(operation))?;
        }
        Ok(())
    }

    fn event(&mut self, slot: usize, event: Event) -> Result<(), String> {
        let mut done = Vec::new();
        let now = Instant(self.now);
        self.server().step(slot, event, now, &mut done);
        self.note(done)
    }

    fn note(&mut self, done: Vec<Done>) -> Result<(), String> {
        for done in done {
            match done {
                Done::Wrote(offset, len, number) => {
                    let bytes = super::server::bytes_of(offset, len, number);
                    self.reference
                        .write(usize::try_from(offset).unwrap(), &bytes);
                }
                Done::Unsure(offset, len) => {
                    let start = usize::try_from(offset).unwrap();
                    let end = start + usize::try_from(len).unwrap();
                    let bytes = self.disk.peek(self.device)[start..end].to_vec();
                    self.reference.write(start, &bytes);
                }
                Done::Completed(slot, result) => {
                    self.seen.completed += 1;
                    let operation = self.slots[slot].take().map(|s| s.operation);
                    if let (Ok(bytes), Some(operation)) = (result, operation)
                        && bytes != span(operation).1
                    {
                        return Err(format!("{operation:?} was answered {bytes}"));
                    }
                }
                Done::Read(offset, len) => {
                    let start = usize::try_from(offset).unwrap();
                    let end = start + usize::try_from(len).unwrap();
                    if self.disk.peek(self.device)[start..end] != self.reference.bytes()[start..end]
                    {
                        return Err(format!("a read at {offset} gives other bytes"));
                    }
                }
                Done::Flushed => {}
            }
        }
        Ok(())
    }

    fn land(&mut self, n: u64, whole: bool) -> Result<(), String> {
        self.io_event(n, |s, n, slots, disk| s.land(n, whole, slots, disk))
    }

    fn io_event(
        &mut self,
        n: u64,
        go: impl Fn(
            &mut Server,
            usize,
            &[Option<Slot>],
            (&SimDisk, Node),
        ) -> (Option<(usize, Event)>, Vec<Done>),
    ) -> Result<(), String> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        if server.io.is_empty() {
            return Ok(());
        }
        let n = pick(n, server.io.len());
        let (event, done) = go(server, n, &self.slots, (&self.disk, self.device));
        self.note(done)?;
        match event {
            Some((slot, event)) => self.event(slot, event),
            None => Ok(()),
        }
    }

    fn again(&mut self, slot: usize) -> Result<(), String> {
        self.event(slot, Event::Again)
    }

    fn again_all(&mut self) -> Result<(), String> {
        (0..SLOTS).try_for_each(|slot| self.again(slot))
    }

    fn drain(&mut self) -> Result<(), String> {
        for _ in 0..10_000 {
            if self.slots.iter().all(Option::is_none) && self.server().io.is_empty() {
                return Ok(());
            }
            self.now += 1_000_000;
            self.poll()?;
            self.again_all()?;
            self.land(0, true)?;
        }
        Err("requests never end".into())
    }

    // Backups.

    fn begin(&mut self, repository: u64, slots: u64, policy: u64) -> Result<(), String> {
        if self.backup.is_some() {
            return Ok(());
        }
        let repository = pick(repository, REPOSITORIES);
        let base = self.repositories[repository].last().cloned();
        let base = base.filter(|_| policy >> 8 & 15 != 0);
        let absent = base.as_ref().map(absent_of);
        let few = if slots >> 32 & 1 == 0 { 4 } else { 20 };
        let save_slots = u32::try_from(1 + slots % few).unwrap();
        let asked = SnapshotRequest {
            id: SnapshotId(self.name().0),
            opens: self.name(),
            opens_at: WallTime(2),
            base: base.as_ref().map(|b| b.name),
            absent: absent
                .as_ref()
                .map_or(Absent::Everything, |a| Absent::Words(a.words())),
            limits: Limits {
                overflow: if policy & 1 == 0 {
                    Overflow::GiveUp
                } else {
                    Overflow::Wait
                },
                wait_limit: Duration::from_millis(5),
                lease: Duration::from_millis(80),
            },
            memories: memories(&self.shape, save_slots),
        };
        let handed = asked.memories.clone();
        match self.server().control.prepare(&asked) {
            Ok(prepared) => {
                if base.is_some() && !prepared.base_resolved() {
                    self.seen.unknown += 1;
                }
                self.backup = Some(Backup::new(repository, base, prepared, handed));
                Ok(())
            }
            Err(EngineError::PassingThrough) => Ok(()),
            Err(other) => Err(format!("prepare: {other}")),
        }
    }

    fn poll(&mut self) -> Result<(), String> {
        let now = Instant(self.now);
        let (Some(backup), Some(server)) = (&mut self.backup, &mut self.server) else {
            return Ok(());
        };
        server.control.tick(now);
        let Some(prepared) = &backup.prepared else {
            return Ok(());
        };
        let Some(hold) = &mut backup.hold else {
            let limit = Duration::from_millis(3);
            backup.hold = server.control.hold(now, limit).ok();
            return Ok(());
        };
        match server.control.poll(hold, now) {
            HoldState::Waiting => Ok(()),
            HoldState::Over => {
                backup.hold = None;
                self.again_all()
            }
            HoldState::Held => {
                match server.control.commit(hold, prepared, now) {
                    Ok(begun) => {
                        if self.disk.peek(self.device) != self.reference.bytes() {
                            return Err("a write was in flight at the instant".into());
                        }
                        self.swaps += 1;
                        self.reference.snapshot("instant");
                        backup.begin(&self.shape, begun, &self.memories);
                    }
                    Err(EngineError::PlanStale) => self.backup = None,
                    Err(other) => return Err(format!("commit: {other}")),
                }
                self.again_all()
            }
        }
    }

    fn work(&mut self, n: u64) -> Result<(), String> {
        let Some(backup) = &mut self.backup else {
            return Ok(());
        };
        let Some(mut living) = backup.living.take() else {
            return Ok(());
        };
        let worked = living.work(
            pick(n, 2),
            &self.shape,
            backup.area(),
            (&self.disk, self.device),
        );
        let through = living.is_through();
        backup.living = Some(living);
        worked?;
        if through {
            self.commit_backup()
        } else {
            Ok(())
        }
    }

    fn shrink(&mut self, n: u64) {
        let blocks = self.shape.geometry.block_count().0;
        if let Some(living) = self.backup.as_mut().and_then(|b| b.living.as_mut()) {
            living.shrink(BlockIndex(n % blocks));
        }
    }

    fn commit_backup(&mut self) -> Result<(), String> {
        let Some(backup) = &self.backup else {
            return Ok(());
        };
        let Some(living) = &backup.living else {
            return Ok(());
        };
        let complete = living.view.complete();
        if living.gave_up || complete.is_err() {
            return self.end_backup();
        }
        if complete != Ok(true) {
            return Err("a backup that can never commit".into());
        }
        // Without a believed base nothing of an earlier image is used.
        let base = backup.base.as_ref().filter(|_| living.begun.base_resolved);
        let mut image = living.image(base);
        image.forgotten = backup.forgotten;
        image.swap = self.swaps;
        for (i, block) in image.blocks.iter().enumerate() {
            if let Some(bytes) = block
                && bytes.as_slice() != self.reference.snapshot_block("instant", i)
            {
                return Err(format!("block {i} of the image is not that of the instant"));
            }
        }
        if base.is_some() {
            self.seen.incrementals += 1;
        } else {
            self.seen.fulls += 1;
        }
        let (repository, name, full) = (backup.repository, image.name, base.is_none());
        self.repositories[repository].push(image);
        let control = &mut self.server().control;
        control.set_hint(repository_id(repository), name);
        if full {
            control.trust(name);
        }
        self.end_backup()
    }

    fn end_backup(&mut self) -> Result<(), String> {
        let Some(backup) = self.backup.take() else {
            return Ok(());
        };
        if backup.living.as_ref().is_some_and(|l| l.gave_up) {
            self.seen.given_up += 1;
        }
        let server = self.server();
        if let Some(prepared) = &backup.prepared {
            server.control.abandon(prepared);
        }
        if let Some(hold) = &backup.hold {
            server.control.release(hold);
        }
        if backup.living.is_some() && server.control.snapshot().is_some() {
            server.control.end_snapshot().map_err(|e| e.to_string())?;
        }
        // Who waits looks again when its time comes.
        Ok(())
    }

    // The oracle.

    /// Every block that differs from a repository's newest image is in what the tracker calls changed since.
    pub(super) fn check(&self) -> Result<(), String> {
        let device = self.disk.peek(self.device);
        let size = self.shape.geometry.block_size().bytes_usize();
        let Some(server) = &self.server else {
            return Ok(());
        };
        for (repository, images) in self.repositories.iter().enumerate() {
            let Some(image) = images.last() else { continue };
            let changed = match server.control.changed_since(image.name) {
                Ok(changed) => changed,
                Err(_) if image.forgotten || self.swaps - image.swap >= KEPT => continue,
                Err(other) => return Err(format!("repository {repository}: {other}")),
            };
            for (i, (block, now)) in image.blocks.iter().zip(device.chunks(size)).enumerate() {
                let index = BlockIndex(u64::try_from(i).unwrap());
                if let Some(then) = block
                    && then.as_slice() != now
                    && !changed.contains(index)
                {
                    return Err(format!("repository {repository}: {index} is not reported"));
                }
            }
        }
        Ok(())
    }
}
