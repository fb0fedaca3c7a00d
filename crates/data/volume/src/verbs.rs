//! What the control thread does for each request of the volume socket.

use crate::error::Refusal;
use crate::message::{
    Distrust, Hint, Reply, Request, SnapshotFigures, Text, VolumeState, VolumeStatus,
};
use crate::serving::{Flow, Server};
use crate::snapshotting::Open;
use crate::start::word;
use blktide_engine::EngineError;
use blktide_format::shared::{control, queue};
use blktide_sys::loopdev::LoopDevice;
use blktide_sys::process::PidFd;
use blktide_types::id::GenerationName;
use blktide_types::io::RevokeCause;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use std::os::fd::OwnedFd;

/// Names that one question may hold.
const GENERATIONS_MAX: usize = 64;

impl Server {
    pub(crate) fn handle(&mut self, id: u64, request: Request, descriptors: Vec<OwnedFd>) -> Flow {
        match request {
            Request::Status => {
                let status = Box::new(self.status());
                self.reply(id, &Reply::Status(status));
            }
            Request::ChangedSince { generations } => self.changed_since(id, &generations),
            Request::Hints { hints } => {
                self.hints(&hints);
                self.reply(id, &Reply::Done);
            }
            Request::SnapshotBegin(asked) => self.begin_snapshot(id, asked, descriptors),
            Request::SnapshotEnd { snapshot } => {
                let own = self.open.as_ref();
                if own.is_some_and(|o| o.connection == id && o.snapshot == snapshot.0) {
                    let figures = self.end_snapshot();
                    self.reply(id, &Reply::SnapshotEnded(figures));
                } else {
                    self.refuse(id, Refusal::NoSnapshot, "there is no such snapshot");
                }
            }
            Request::Cancel => {
                self.abandon_pending();
                self.tracker.revoke(RevokeCause::Cancelled);
                self.reply(id, &Reply::Done);
            }
            Request::Trust { generation } => {
                if self.tracker.trust(generation.0) {
                    self.say("tracker: trusted again, a full image covers what was forgotten");
                    self.reply(id, &Reply::Done);
                } else {
                    let why = "that generation has been forgotten: take another full backup";
                    self.refuse(id, Refusal::Invalid, why);
                }
            }
            Request::Unreadable { first, count } => {
                let end = BlockIndex(first.saturating_add(count));
                if let Some(range) = BlockRange::new(BlockIndex(first), end) {
                    self.tracker.mark(range);
                }
                self.reply(id, &Reply::Done);
            }
            Request::Flush => self.reply(id, &Reply::Done),
            Request::Detach => return self.detach(id),
            Request::Adopt => self.adopt(id, descriptors),
        }
        Flow::GoOn
    }

    /// Hands everything to a new keeper; its own descriptor came with the request.
    fn adopt(&mut self, id: u64, descriptors: Vec<OwnedFd>) {
        if self.has_keeper() {
            return self.refuse(id, Refusal::KeeperAlive, "the volume's keeper is alive");
        }
        let keeper = descriptors.into_iter().next();
        let keeper = keeper.and_then(|fd| PidFd::from_fd(fd).ok());
        let all = PidFd::of_self().ok().and_then(|own| {
            let all = self.inherited.descriptors(&own);
            let copies = all.into_iter().map(|fd| fd.try_clone_to_owned());
            copies.collect::<Result<Vec<_>, _>>().ok()
        });
        let (Some(keeper), Some(all)) = (keeper, all) else {
            let why = "the descriptors cannot be handed on";
            return self.refuse(id, Refusal::Failed, why);
        };
        let pid = std::process::id();
        if self.reply_with(id, &Reply::Adopted { pid }, &all) {
            self.say(&format!(
                "server: process {} is the new keeper",
                keeper.pid()
            ));
            self.set_keeper(keeper);
        }
    }

    fn hints(&mut self, hints: &[Hint]) {
        for old in self.tracker.hints() {
            if !hints.iter().any(|h| h.repository.0 == old.repository) {
                self.tracker.drop_hint(old.repository);
            }
        }
        for hint in hints {
            let dropped = self.tracker.set_hint(hint.repository.0, hint.generation.0);
            if let Some(dropped) = dropped {
                self.say(&format!(
                    "tracker: too many repositories; the next backup to {dropped} may read more"
                ));
            }
        }
    }

    fn changed_since(&mut self, id: u64, generations: &[Text<GenerationName>]) {
        if generations.len() > GENERATIONS_MAX {
            return self.refuse(id, Refusal::Invalid, "too many generations");
        }
        let mut changed_bytes = Vec::new();
        for name in generations {
            let known = match self.tracker.changed_since(name.0) {
                Ok(set) => Some(self.bytes_in(&set)),
                Err(EngineError::UnknownGeneration { .. } | EngineError::PassingThrough) => None,
                Err(e) => {
                    let why = e.to_string();
                    return self.refuse(id, Refusal::Failed, &why);
                }
            };
            changed_bytes.push(known);
        }
        let distrust = self.distrusted();
        let reply = Reply::ChangedSince {
            changed_bytes,
            distrust,
        };
        self.reply(id, &reply);
    }

    fn bytes_in(&self, set: &blktide_types::set::BlockSet) -> u64 {
        let geometry = self.engine.shape().geometry;
        set.runs().map(|run| geometry.bytes_of(run).1).sum()
    }

    /// Why no bitmap is believed, if none is.
    pub(crate) fn distrusted(&self) -> Option<Distrust> {
        let trust = self.tracker.trusted();
        trust.reason.map(|reason| Distrust {
            reason: reason.code().to_owned(),
            since_ns: trust.since.0,
            detail: self.tracker.distrust_detail(),
        })
    }

    /// What the living snapshot has cost so far, or the last one.
    pub(crate) fn figures(&self) -> SnapshotFigures {
        let block = self.engine.shape().geometry.block_size().bytes_u64();
        let before = self.open.as_ref().map_or(0, |o| o.preserved_before);
        let queues = 0..self.engine.shape().queues;
        let waits = queues.map(|q| self.engine.queue_word(q, queue::LONGEST_WAIT));
        let peak = self.open.as_ref().map_or(0, Open::peak);
        SnapshotFigures {
            save_area_peak_bytes: peak.saturating_mul(block),
            preserved_bytes: self
                .engine
                .total(queue::PRESERVED)
                .saturating_sub(before)
                .saturating_mul(block),
            longest_wait_ns: waits.max().unwrap_or(0),
        }
    }

    fn status(&self) -> VolumeStatus {
        let geometry = self.engine.shape().geometry;
        let word = |index| self.engine.word(index);
        let open = self.tracker.generations().last().copied();
        let open_name = open.map_or(GenerationName::NONE, |g| g.name);
        let changed = self.tracker.changed_since(open_name).ok();
        let options = &self.start.options;
        VolumeStatus {
            name: options.name.clone(),
            state: match word(control::STATE) {
                word::ATTACHED => VolumeState::Attached,
                word::PASSING_THROUGH => VolumeState::PassingThrough,
                word::DETACHING => VolumeState::Detaching,
                _ => VolumeState::Attaching,
            },
            pid: std::process::id(),
            keeper_pid: u32::try_from(word(control::KEEPER_PID)).unwrap_or(0),
            volume_id: self.life.volume.to_string(),
            node: options.node(),
            loop_device: self.loop_device().map(|l| l.node()),
            device: options.device.clone(),
            volume_bytes: geometry.volume_bytes(),
            block_size_bytes: geometry.block_size().bytes(),
            grain_bytes: geometry.grain().bytes(),
            logical_sector_bytes: geometry.logical_sector_bytes(),
            physical_sector_bytes: geometry.physical_sector_bytes(),
            generation: Text(open_name),
            generation_number: open.map_or(0, |g| g.counter),
            changed_bytes: changed.map_or(0, |set| self.bytes_in(&set)),
            distrust: self.distrusted(),
            takeovers: word(control::STARTS).saturating_sub(1),
            longest_pause_ns: word(control::LONGEST_PAUSE),
            requests: self.engine.total(queue::FINISHED),
            requests_finished: word(control::LEFT_REQUESTS),
            snapshot: self.open.as_ref().map(|_| self.figures()),
            warnings: word::warnings(word(control::WARNINGS)),
        }
    }

    /// The loop device, once there is one.
    pub(crate) fn loop_device(&self) -> Option<LoopDevice> {
        let number = self.engine.word(control::LOOP_NUMBER).checked_sub(1)?;
        u32::try_from(number).ok().map(LoopDevice::of_number)
    }
}
