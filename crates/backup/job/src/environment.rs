//! What a job is given by its process: clocks, randomness, who we are, and which of our sessions still run.

use crate::running::OnProgress;
use blktide_repo::{ClaimEntry, ClaimState, ProcessMark, RepoError, Repository};
use blktide_types::clock::{Clock, Random};
use blktide_types::id::{HostId, SessionId, VolumeId};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Says whether a process of this machine still lives.
pub type IsAlive = Arc<dyn Fn(&ProcessMark) -> bool + Send + Sync>;

/// What a job is given by its process. Made once, cloned for each job.
#[derive(Clone)]
pub struct Environment {
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub random: Arc<dyn Random>,
    /// Who wants to know how far a job is.
    pub on_progress: Option<OnProgress>,
    /// This machine.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// This process.
    pub process: ProcessMark,
    /// Whether a process of this machine lives.
    pub is_alive: IsAlive,
    /// Sessions of this process that still have a thread.
    pub sessions: Arc<OpenSessions>,
}

impl core::fmt::Debug for Environment {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Environment")
            .field("host", &self.host)
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

/// The sessions of this process that still have a thread, be it one that hangs.
///
/// So a claim that a failed job of this process could not give up (the repository failed just then) is given up by
/// the next job: nobody has to clean up by hand.
#[derive(Debug, Default)]
pub struct OpenSessions {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    sessions: BTreeSet<SessionId>,
    /// Jobs that are making a claim: its session is not known yet.
    claiming: usize,
}

/// A job that is making a claim, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claiming<'a>(&'a OpenSessions);

impl Drop for Claiming<'_> {
    fn drop(&mut self) {
        let mut open = self.0.lock();
        open.claiming = open.claiming.saturating_sub(1);
    }
}

/// A session's entry, until it is dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    sessions: Arc<OpenSessions>,
    session: SessionId,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.sessions.lock().sessions.remove(&self.session);
    }
}

impl OpenSessions {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held from before the claim is made until its session has been entered.
    pub(crate) fn claim(&self) -> Claiming<'_> {
        let mut open = self.lock();
        open.claiming = open.claiming.saturating_add(1);
        Claiming(self)
    }

    pub(crate) fn enter(self: &Arc<Self>, session: SessionId) -> Entered {
        self.lock().sessions.insert(session);
        Entered {
            sessions: Arc::clone(self),
            session,
        }
    }

    /// Whether a claim of this process may have a thread. Asked after the claim was seen in the repository.
    fn may_hold(&self, session: SessionId) -> bool {
        let open = self.lock();
        open.claiming > 0 || open.sessions.contains(&session)
    }
}

impl Environment {
    /// Gives up the open claims of this machine that nobody works at any more. Cost: one small read a claim.
    ///
    /// Errors: the repository's; then such claims stay, and cost nothing but their packs' room.
    pub fn give_up_dead(&self, repository: &Repository, volume: VolumeId) -> Result<(), RepoError> {
        for sequence in repository.sequences(volume)? {
            // The end first: of nearly all claims it is there, and then the claim need not be read.
            match repository.end_facts(volume, sequence) {
                Ok(None) => {}
                Ok(Some(_)) | Err(RepoError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            let claim = match repository.claim_entry(volume, sequence) {
                Ok(claim) => claim,
                Err(RepoError::Damaged { .. } | RepoError::NoImage) => continue,
                Err(error) => return Err(error),
            };
            if claim.state == ClaimState::Open
                && claim.facts.host == self.host
                && self.is_left_behind(&claim)
            {
                repository.abandon(volume, sequence, self.clock.wall())?;
            }
        }
        Ok(())
    }

    fn is_left_behind(&self, claim: &ClaimEntry) -> bool {
        let process = claim.process();
        if process == self.process {
            !self.sessions.may_hold(claim.facts.session)
        } else {
            !(self.is_alive)(&process)
        }
    }
}
