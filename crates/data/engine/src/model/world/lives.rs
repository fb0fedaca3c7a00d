//! How a server's life ends in the model: killed, cut, stopped, distrusted, passed through.

use super::World;
use crate::broken::{Break, broken, leave_out};
use crate::engine::Engine;
use crate::handover::{self, Bitmap, Stored};
use crate::model::server::{Server, Slot};
use crate::model::{SLOTS, pick, span};
use crate::request::{Event, Operation};
use blktide_format::shared::queue;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::id::LifeId;
use blktide_types::reason::Reason;

impl World {
    pub(super) fn kill(&mut self) -> Result<(), String> {
        let coin = self.now.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let name = self.name();
        let engine = Engine::open(&self.memories.0, &self.memories.1).map_err(|e| e.to_string())?;
        let mut next = Server::new(engine);
        next.control
            .take_over((name, WallTime(3)))
            .map_err(|e| e.to_string())?;
        if let Some(dead) = self.server.replace(next) {
            self.count(&dead);
            dead.die(&self.slots, (&self.disk, self.device), coin);
        }
        self.seen.taken_over += 1;
        // What was prepared died with its server; a reader goes on, and must notice.
        self.backup.take_if(|b| b.living.is_none());
        // The fence is passed: what its slots hold is done again. Who trusts the notes in them does not mark.
        if self.trusting {
            leave_out(Some(Break::NoteTrusted));
        }
        let again = (0..SLOTS).try_for_each(|slot| match self.slots[slot] {
            Some(found) => self.event(slot, Event::Start(found.operation)),
            None => Ok(()),
        });
        if self.trusting {
            leave_out(None);
        }
        again
    }

    pub(super) fn cut(&mut self, coin: u64) {
        if let Some(dead) = self.server.take() {
            self.count(&dead);
            dead.die(&self.slots, (&self.disk, self.device), coin);
        }
        self.slots = vec![None; SLOTS];
        self.backup = None;
        let cuts = self.disk.cuts(8, Seed(coin));
        let cut = &cuts[pick(coin, cuts.len())];
        self.disk = self.disk.after(cut);
        // What was not flushed is one thing or the other: from here on it is what is there.
        let bytes = self.disk.peek(self.device);
        self.reference.write(0, &bytes);
        self.boot += 1;
        self.start();
        self.seen.cuts += 1;
    }

    pub(super) fn stop(&mut self) -> Result<(), String> {
        self.end_backup()?;
        self.drain()?;
        let control = &self.server().control;
        let trust = control.trusted();
        let bitmap = Bitmap::Known {
            generations: control.export(),
            distrust: trust.reason.map(|reason| (reason, trust.since)),
        };
        if let Some(dead) = self.server.take() {
            self.count(&dead);
        }
        let mut identity = self.identity();
        // The life that ends is the one that began last.
        identity.life = LifeId((u128::from(self.life - 1) << 8 | 1).to_le_bytes());
        self.life -= 1;
        let stored = handover::stop(identity, bitmap, &mut self.folder(false));
        self.start();
        self.seen.stops += 1;
        if stored == Stored::Whole {
            Ok(())
        } else {
            Err(format!("the bitmap was not stored: {stored:?}"))
        }
    }

    pub(super) fn distrust(&mut self) {
        let name = self.name();
        // Somebody writes past us, and it is noticed.
        let sector = self.now / 20_000 % (self.shape.geometry.volume_bytes() / 512);
        let taken = |s: &Slot| {
            let (offset, len) = span(s.operation);
            offset <= sector * 512 && sector * 512 < offset + len
        };
        if !self.slots.iter().flatten().any(taken) {
            let bytes = [0xf0; 512];
            self.disk
                .write_at(self.device, sector * 512, &bytes)
                .unwrap();
            self.reference
                .write(usize::try_from(sector * 512).unwrap(), &bytes);
        }
        self.server().control.distrust(
            (Reason::ForeignWrite, WallTime(5)),
            "sectors were written past us",
            name,
        );
        if !broken(Break::DistrustKeepsNames) {
            self.forget();
        }
    }

    pub(super) fn pass_through(&mut self) -> Result<(), String> {
        self.kill()?;
        self.drain()?;
        let (name, other) = (self.name(), self.name());
        self.server().control.pass_through(WallTime(6), name);
        // A write that nobody sees.
        self.request(1, self.now / 20_000, 1 << 36, |offset, len| {
            Operation::Write {
                offset,
                len,
                durable: false,
            }
        })?;
        self.drain()?;
        self.forget();
        self.kill()?;
        if !broken(Break::SilentPassThrough) {
            self.server().control.end_pass_through(WallTime(7), other);
        }
        Ok(())
    }

    pub(super) fn forget(&mut self) {
        for image in self.repositories.iter_mut().flatten() {
            image.forgotten = true;
        }
        if let Some(backup) = &mut self.backup {
            backup.forgotten = true;
        }
    }

    pub(super) fn count(&mut self, server: &Server) {
        self.seen.waited += server.waited;
        self.seen.preserved += server.engine.total(queue::PRESERVED);
    }
}
