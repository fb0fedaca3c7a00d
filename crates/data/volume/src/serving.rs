//! The server's control thread: volume socket, holds, the lease, upkeep.
//!
//! ```text
//! poll: listener │ connections │ a queue has ended │ time ─▶ one thing at a time ─▶ poll
//! ```
//! **Invariant**: requests wait for this thread only within a hold, and a hold ends by itself. Whatever a client does (says
//! nothing, says rubbish, goes away), this thread goes on.

use crate::bitmap::Life;
use crate::error::{Refusal, VolumeError};
use crate::inherited::Inherited;
use crate::log::Log;
use crate::message::{Reply, Request};
use crate::server::{Queues, Tracker, io_error};
use crate::snapshotting::{Open, Pending};
use crate::start::{Start, word};
use crate::transport::{self, Incoming};
use blktide_device::Backing;
use blktide_engine::Engine;
use blktide_format::shared::control;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::event::{Readiness, Watched, poll};
use blktide_sys::process::PidFd;
use blktide_sys::socket::{PacketListener, PacketSocket};
use blktide_types::clock::{Clock, Random};
use blktide_types::id::GenerationName;
use blktide_types::io::RevokeCause;
use blktide_types::reason::Reason;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Clients at once.
const CONNECTIONS_MAX: usize = 32;

/// A client.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) socket: PacketSocket,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// With the next message.
    GoOn,
    /// The volume is detached.
    Ended,
}

/// The server of one volume, as its control thread has it.
pub(crate) struct Server {
    pub(crate) start: Start,
    pub(crate) inherited: Inherited,
    pub(crate) engine: Engine,
    pub(crate) tracker: Tracker,
    pub(crate) backing: Backing,
    pub(crate) queues: Queues,
    pub(crate) life: Life,
    pub(crate) log: Option<Log>,
    pub(crate) random: SystemRandom,
    pub(crate) open: Option<Open>,
    pub(crate) pending: Option<Pending>,
    listener: PacketListener,
    connections: Vec<Connection>,
    keeper: Option<PidFd>,
    next_id: u64,
}

impl Server {
    pub(crate) fn new(
        start: Start,
        inherited: Inherited,
        (engine, tracker): (Engine, Tracker),
        backing: Backing,
        queues: Queues,
    ) -> Result<Self, VolumeError> {
        let listener = inherited.listener.as_fd().try_clone_to_owned();
        let listener = listener.map_err(|e| io_error("listen", e))?;
        let keeper = inherited.other.try_clone();
        let keeper = keeper.map_err(|e| io_error("watch the keeper", e))?;
        engine.set_word(
            control::SERVER_PID,
            u64::try_from(blktide_sys::process::own_pid()).unwrap_or(0),
        );
        Ok(Self {
            life: Life::of_words(&engine),
            listener: PacketListener::from_fd(listener),
            keeper: Some(keeper),
            start,
            inherited,
            engine,
            tracker,
            backing,
            queues,
            log: None,
            random: SystemRandom::new(),
            open: None,
            pending: None,
            connections: Vec::new(),
            next_id: 1,
        })
    }

    pub(crate) fn with_life(mut self, life: Life, log: Log) -> Self {
        self.life = life;
        self.log = Some(log);
        self
    }

    /// Serves until the volume is detached.
    pub(crate) fn serve(mut self) -> Result<(), VolumeError> {
        loop {
            let ready = self.wait().map_err(|e| io_error("poll", e))?;
            if ready.contains(&Ready::QueueEnded) {
                return self.queues_ended();
            }
            for one in ready {
                let Ready::Connection(id) = one else {
                    self.accept();
                    continue;
                };
                if self.receive(id) == Flow::Ended {
                    return Ok(());
                }
            }
            self.turn();
        }
    }

    pub(crate) fn say(&self, text: &str) {
        if let Some(log) = &self.log {
            log.say(text);
        }
    }

    /// A generation's name, and when: for whatever opens one.
    pub(crate) fn fresh(&self) -> GenerationName {
        GenerationName(self.random.id())
    }

    pub(crate) fn distrust(&mut self, reason: Reason, detail: &str) {
        let (wall, fresh) = (SystemClock.wall(), self.fresh());
        self.say(&format!("tracker: distrusted, {reason}: {detail}"));
        self.tracker.distrust((reason, wall), detail, fresh);
    }

    /// Whether every request of a dead predecessor is done: before that there is no hold (P3).
    pub(crate) fn recovered(&self) -> bool {
        let mut bells = self.queues.bells.iter();
        bells.all(|b| b.recovered.load(Ordering::Acquire))
    }

    fn wait(&self) -> io::Result<Vec<Ready>> {
        let limit = if let Some(pending) = &self.pending {
            pending.patience()
        } else if self.open.is_some() {
            Duration::from_millis(50)
        } else {
            Duration::from_millis(500)
        };
        let mut watched = vec![Watched::readable(&*self.queues.ended)];
        // A client's request may take long, and only this thread ends a hold in time: clients wait for it.
        if !self.pending.as_ref().is_some_and(Pending::holds) {
            watched.push(Watched::readable(&self.listener));
            let sockets = self.connections.iter().map(|c| &c.socket);
            watched.extend(sockets.map(Watched::readable));
        }
        poll(&mut watched, Some(limit))?;
        let what = [Ready::QueueEnded, Ready::Listener];
        let connections = self.connections.iter().map(|c| Ready::Connection(c.id));
        let ready = what.into_iter().chain(connections).zip(&watched);
        Ok(ready
            .filter(|(_, w)| w.readiness != Readiness::Waiting)
            .map(|(what, _)| what)
            .collect())
    }

    fn accept(&mut self) {
        while let Ok(Some(socket)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX || socket.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.next_id;
            self.next_id = id.wrapping_add(1);
            self.connections.push(Connection { id, socket });
        }
    }

    fn receive(&mut self, id: u64) -> Flow {
        let Some(connection) = self.connections.iter().find(|c| c.id == id) else {
            return Flow::GoOn;
        };
        match transport::receive::<Request>(&connection.socket) {
            Ok(Incoming::Message(request, descriptors)) => self.handle(id, request, descriptors),
            Ok(Incoming::Garbage) => {
                let why = "this is no message of the volume socket";
                self.refuse(id, Refusal::Invalid, why);
                Flow::GoOn
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Flow::GoOn,
            Ok(Incoming::Closed) | Err(_) => {
                self.close(id);
                Flow::GoOn
            }
        }
    }

    /// A client is gone, and with it its snapshot.
    fn close(&mut self, id: u64) {
        self.connections.retain(|c| c.id != id);
        if self.pending.as_ref().is_some_and(|p| p.connection == id) {
            self.abandon_pending();
        }
        if self.open.as_ref().is_some_and(|o| o.connection == id) {
            self.tracker.revoke(RevokeCause::ReaderStalled);
            self.end_snapshot();
        }
    }

    pub(crate) fn reply(&mut self, id: u64, reply: &Reply) {
        self.reply_with(id, reply, &[]);
    }

    pub(crate) fn refuse(&mut self, id: u64, kind: Refusal, message: &str) {
        let message = message.to_owned();
        self.reply(id, &Reply::Error { kind, message });
    }

    /// Replies; a client that does not take its reply is dropped.
    pub(crate) fn reply_with(&mut self, id: u64, reply: &Reply, beside: &[OwnedFd]) -> bool {
        let beside: Vec<BorrowedFd<'_>> = beside.iter().map(AsFd::as_fd).collect();
        let Some(connection) = self.connections.iter().find(|c| c.id == id) else {
            return false;
        };
        let sent = transport::send(&connection.socket, reply, &beside).is_ok();
        if !sent {
            self.close(id);
        }
        sent
    }

    /// What is done without being asked.
    fn turn(&mut self) {
        self.go_on_with_hold();
        self.tracker.tick(SystemClock.now());
        let ended = self.keeper.as_ref().map(PidFd::has_ended);
        if matches!(ended, Some(Ok(true))) {
            self.keeper = None;
            self.engine.set_word(control::KEEPER_PID, 0);
            self.say("server: the keeper is dead; the volume goes on without one");
        }
    }

    /// Whether a keeper lives.
    pub(crate) const fn has_keeper(&self) -> bool {
        self.keeper.is_some()
    }

    pub(crate) fn set_keeper(&mut self, keeper: PidFd) {
        let pid = u64::try_from(keeper.pid()).unwrap_or(0);
        self.engine.set_word(control::KEEPER_PID, pid);
        self.keeper = Some(keeper);
    }

    /// A queue's thread has ended though nobody detached: its ring failed, or the connection is gone.
    fn queues_ended(mut self) -> Result<(), VolumeError> {
        if let Ok(Err(e)) = self.queues.results.try_recv() {
            return Err(io_error("serve a queue", e));
        }
        if self.engine.word(control::CLOSING) == word::CLEARED {
            // A predecessor has unmounted and died.
            self.store_bitmap(None);
            return Ok(());
        }
        self.distrust(
            Reason::TrackingInterrupted,
            "the connection to the kernel ended without a detach",
        );
        self.engine.set_word(control::ENDED, word::REFUSED);
        Err(VolumeError::FrontendGone)
    }
}

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    QueueEnded,
    Listener,
    Connection(u64),
}
