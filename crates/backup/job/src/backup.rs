//! A backup: a snapshot of a volume becomes an image of a repository, or nothing does.
//!
//! ```text
//!   open · give up dead claims · newest image
//!      │
//!   claim (pins the base) ─▶ is the base whole? ─▶ what is absent in it
//!      │
//!   snapshot(base's generation, absent) ─▶ kind and reason      (without copy-on-write: copied before its instant, `ahead`)
//!      │
//!   workers: read ─▶ zero test ─▶ digest ─▶ compress ─▶ append, each its own piece, ascending
//!      │
//!   snapshot finished? every wanted block stored? ─▶ begin_commit ─▶ commit
//!      └ any error, any cancel before begin_commit: the claim ends as abandoned
//! ```
//! **Invariant**: committed means every wanted block was taken before anything was revoked; an incremental's wanted set
//! holds all that changed since its base and all that the base has no content of.

use crate::ahead::{self, Copied};
use crate::environment::{Entered, Environment};
use crate::error::JobError;
use crate::pass::{Pass, Reading};
use crate::plan::{BaseFacts, Newest, PlanFacts, RepositoryFacts, after_snapshot, before_snapshot};
use crate::running::{Control, Running};
use crate::source::{Begun, CopyAhead, SnapshotAsk, SnapshotSource, TrackerSays, begin_error};
use blktide_format::manifest::{Counters, ImageHead, ImageKind};
use blktide_image::writer::WantedWords;
use blktide_image::{ImageError, ImageFacts, ImageReader, ImageWriter};
use blktide_repo::{ClaimRequest, ImageEntry, RepoError, Repository, Session, StoreError};
use blktide_types::clock::Instant;
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, GenerationName, ImageId, VolumeId};
use blktide_types::io::SnapshotRead;
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use std::io;
use std::sync::Arc;

/// Opens the repository, in the job's own thread: it may hang.
pub type OpenRepository = Box<dyn FnOnce() -> Result<Repository, RepoError> + Send>;

/// Asks for the free bytes of the repository's storage, in the job's own thread.
pub type FreeBytes = Box<dyn FnOnce() -> io::Result<u64> + Send>;

/// What is to be backed up, and how.
pub struct BackupRequest {
    /// Where to.
    pub repository: OpenRepository,
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub volume_name: String,
    /// What identifies its device, in words that a reboot does not change; empty if nothing does.
    pub device: String,
    /// Makes the snapshot.
    pub source: Arc<dyn SnapshotSource>,
    /// `--full`.
    pub full: bool,
    /// The image that this machine remembers as the newest there.
    pub remembered: Option<ImageId>,
    /// Bytes to read a second at most; 0: no limit.
    pub max_read_rate: u64,
    /// Threads; 0: two more than cores, at least four.
    pub workers: usize,
    /// How much is free, and how much is to be left free: below that the backup is refused before it reads.
    pub min_free: Option<(FreeBytes, u64)>,
}

impl core::fmt::Debug for BackupRequest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BackupRequest")
            .field("volume", &self.volume_name)
            .field("full", &self.full)
            .finish_non_exhaustive()
    }
}

/// An image that now exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupReport {
    /// Its facts: number, kind, reason, counters.
    pub head: ImageHead,
    /// Blocks that the device could not read; they are wanted again by the next backup. A warning if there are any.
    pub unreadable: Vec<BlockRange>,
}

/// Starts a backup. Waits for nothing.
pub fn start(
    request: BackupRequest,
    environment: &Environment,
) -> Result<Running<BackupReport>, JobError> {
    let control = Control::new(
        Arc::clone(&environment.clock),
        environment.on_progress.clone(),
    );
    let environment = environment.clone();
    Running::start("backup", control, move |control| {
        run(request, &environment, control)
    })
}

fn run(
    mut request: BackupRequest,
    environment: &Environment,
    control: &Arc<Control>,
) -> Result<BackupReport, JobError> {
    let open = core::mem::replace(
        &mut request.repository,
        Box::new(|| Err(RepoError::Misuse("opened twice"))),
    );
    let repository = open()?;
    control.check()?;
    // A claim that cannot be given up now costs room, not correctness; what is wrong with the repository shows below.
    // First of all: what a dead backup left may be just the room that is missing.
    drop(environment.give_up_dead(&repository, request.volume));
    check_room(request.min_free.take())?;
    let mut attempt = Attempt {
        request: &request,
        environment,
        control,
        repository: &repository,
        base_is_bad: false,
        started: environment.clock.now(),
    };
    match attempt.run() {
        Err(JobError::Repository { source }) if attempt.is_of_the_base(&source) => {
            // Else a damaged base would fail every backup from now on.
            attempt.base_is_bad = true;
            control.work_again()?;
            attempt.run()
        }
        result => result,
    }
}

fn check_room(min_free: Option<(FreeBytes, u64)>) -> Result<(), JobError> {
    let Some((free_bytes, min_free_bytes)) = min_free else {
        return Ok(());
    };
    let free_bytes = free_bytes().map_err(|source| JobError::RepositoryUnreachable {
        source: ImageError::Repository(RepoError::Store {
            verb: "read",
            name: String::new(),
            source: StoreError::Io(source),
        }),
    })?;
    if free_bytes < min_free_bytes {
        return Err(JobError::RepositoryLow {
            free_bytes,
            min_free_bytes,
        });
    }
    Ok(())
}

/// What a survey of the repository found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) facts: RepositoryFacts,
    pub(crate) newest: Option<ImageEntry>,
}

/// The newest image of the volume, from its head only.
pub(crate) fn survey(repository: &Repository, volume: VolumeId) -> Result<Found, JobError> {
    let (newest, entry) = match repository.latest(volume) {
        Ok(None) => (Newest::None, None),
        Ok(Some(entry)) => (Newest::Usable(base_facts(&entry.head)), Some(entry)),
        Err(error) if is_gone(&error) => (Newest::Unusable, None),
        Err(error) => return Err(error.into()),
    };
    Ok(Found {
        facts: RepositoryFacts {
            newest,
            newest_host: entry.as_ref().map(|entry| entry.head.host),
        },
        newest: entry,
    })
}

/// Whether something of an image is not there any more, or not as it was written. Not: the store failed.
fn is_gone(error: &RepoError) -> bool {
    matches!(
        error,
        RepoError::Damaged { .. }
            | RepoError::BaseGone { .. }
            | RepoError::NoImage
            | RepoError::Store {
                source: StoreError::NotFound,
                ..
            }
    )
}

fn base_facts(head: &ImageHead) -> BaseFacts {
    BaseFacts {
        image: head.image,
        host: head.host,
        geometry: head.geometry,
        device: head.device.clone(),
        generation: head.generation,
    }
}

struct Attempt<'a> {
    request: &'a BackupRequest,
    environment: &'a Environment,
    control: &'a Arc<Control>,
    repository: &'a Repository,
    base_is_bad: bool,
    started: Instant,
}

/// A snapshot, and what is to be made of it.
struct Prepared<'a> {
    begun: Begun,
    reading: Reading<'a>,
    /// What was copied before the instant, if the volume has no copy-on-write.
    copied: Option<Copied>,
    base: Option<Arc<ImageReader>>,
    reason: Option<Reason>,
}

impl Attempt<'_> {
    fn is_of_the_base(&self, error: &ImageError) -> bool {
        let gone = if let ImageError::Repository(error) = error {
            is_gone(error)
        } else {
            matches!(error, ImageError::Damaged { .. })
        };
        gone && !self.base_is_bad
    }

    /// The image that is remembered, unless it is there although not the newest: a clone that made a newer one does not
    /// make it go.
    fn remembered(&self, newest: Option<&ImageEntry>) -> Result<Option<ImageId>, JobError> {
        let (Some(image), Some(newest)) = (self.request.remembered, newest) else {
            return Ok(self.request.remembered);
        };
        if image == newest.head.image {
            return Ok(Some(image));
        }
        let there = self.repository.images_of(self.request.volume)?.images;
        let outrun = there.iter().any(|entry| entry.head.image == image);
        Ok(Some(if outrun { newest.head.image } else { image }))
    }

    fn run(&self) -> Result<BackupReport, JobError> {
        let found = survey(self.repository, self.request.volume)?;
        let mut facts = PlanFacts {
            full_asked: self.request.full,
            host: self.environment.host,
            geometry: self.request.source.geometry(),
            device: self.request.device.clone(),
            repository: found.facts,
            remembered: self.remembered(found.newest.as_ref())?,
        };
        if self.base_is_bad {
            facts.repository.newest = Newest::Unusable;
        }
        self.control.check()?;
        let (session, _entered) = self.claim(&facts, found.newest.as_ref())?;
        if let Some(host) = session.neighbour() {
            facts.repository.newest_host = Some(host);
        }
        let prepared = match self.prepare(&session, &mut facts, found.newest.as_ref()) {
            Ok(prepared) => prepared,
            Err(error) => {
                // The claim that stays if this fails is given up by the next backup.
                drop(session.abandon(self.environment.clock.wall()));
                return Err(error);
            }
        };
        let previous = found.newest.map_or(Digest::NONE, |entry| entry.digest);
        self.write(session, &prepared, previous)
    }

    fn claim(
        &self,
        facts: &PlanFacts,
        newest: Option<&ImageEntry>,
    ) -> Result<(Session, Entered), JobError> {
        let base = before_snapshot(facts)
            .ok()
            .and(newest)
            .map(|entry| (entry.head.image, entry.head.sequence));
        let claiming = self.environment.sessions.claim();
        let session = self.repository.claim(
            &ClaimRequest {
                volume: self.request.volume,
                volume_name: self.request.volume_name.clone(),
                host: self.environment.host,
                host_name: self.environment.host_name.clone(),
                process: self.environment.process,
                base,
                generation: GenerationName::NONE,
                now: self.environment.clock.wall(),
            },
            &*self.environment.random,
        )?;
        let entered = self.environment.sessions.enter(session.facts().session);
        drop(claiming);
        Ok((session, entered))
    }

    /// From the claim to the snapshot: the base is looked at only now that it is pinned.
    fn prepare(
        &self,
        session: &Session,
        facts: &mut PlanFacts,
        newest: Option<&ImageEntry>,
    ) -> Result<Prepared<'_>, JobError> {
        self.control.check()?;
        let (mut base, mut generation) = (None, None);
        if let (Ok(known), Some(entry)) = (before_snapshot(facts), newest) {
            generation = Some(known.generation).filter(|name| !name.is_none());
            base = open_base(self.repository, entry)?;
            if base.is_none() {
                generation = None;
                facts.repository.newest = Newest::Unusable;
            }
        }
        self.control.check()?;
        let ask = SnapshotAsk {
            base: generation,
            absent: generation.and_then(|_| base.as_ref().map(|(_, absent)| absent.clone())),
        };
        let source = &self.request.source;
        let prepared = if let Some(ahead) = source.copy_ahead(&ask).map_err(begin_error)? {
            self.copy_ahead(&*ahead, session, facts)?
        } else {
            let begun = source.begin(&ask).map_err(begin_error)?;
            let reading = self.reading(begun.snapshot.geometry());
            facts.geometry = reading.geometry;
            Prepared {
                reason: reason(facts, begun.tracker),
                begun,
                reading,
                copied: None,
                base: None,
            }
        };
        let base = base.filter(|_| prepared.reason.is_none());
        let absent = base.as_ref().map(|(_, absent)| absent);
        check_wanted(&*prepared.begun.snapshot, absent)?;
        Ok(Prepared {
            base: base.map(|(reader, _)| reader),
            ..prepared
        })
    }

    /// Copies until the instant. What is planned before the first round can only become a full image at the instant: the
    /// tracker may lose its trust, and does not gain it.
    fn copy_ahead(
        &self,
        ahead: &dyn CopyAhead,
        session: &Session,
        facts: &mut PlanFacts,
    ) -> Result<Prepared<'_>, JobError> {
        let reading = self.reading(ahead.geometry());
        facts.geometry = reading.geometry;
        let planned = reason(facts, ahead.tracker());
        let spool = self.request.source.spool();
        let spool = spool.map_err(|source| ImageError::Spool { op: "made", source })?;
        let (begun, copied) = ahead::copy(ahead, spool, session, &reading)?;
        Ok(Prepared {
            reason: planned.or_else(|| reason(facts, begun.tracker)),
            begun,
            reading,
            copied: Some(copied),
            base: None,
        })
    }

    fn reading(&self, geometry: Geometry) -> Reading<'_> {
        let request = self.request;
        Reading::new(
            self.control,
            geometry,
            request.workers,
            request.max_read_rate,
        )
    }

    fn write(
        &self,
        session: Session,
        prepared: &Prepared<'_>,
        previous: Digest,
    ) -> Result<BackupReport, JobError> {
        let snapshot = Arc::clone(&prepared.begun.snapshot);
        let of_words = Arc::clone(&snapshot);
        let wanted_words: WantedWords = Arc::new(move |leaf| {
            let word = usize::try_from(leaf).unwrap_or(usize::MAX);
            of_words.wanted().words().get(word).copied().unwrap_or(0)
        });
        let sequence = session.facts().sequence;
        let writer = ImageWriter::new(
            session,
            prepared.reading.geometry,
            prepared.base.clone(),
            &wanted_words,
        )?;
        let taken = match self.take_all(prepared, &writer) {
            Ok(taken) => taken,
            Err(error) => {
                drop(writer.abandon(self.environment.clock.wall()));
                return Err(error);
            }
        };
        let facts = self.image_facts(prepared, &taken, previous);
        let head = match writer.commit(&facts) {
            Ok(committed) => committed.head,
            Err(error) => self.after_commit(error, &writer, sequence)?,
        };
        Ok(BackupReport {
            head,
            unreadable: taken.unreadable.runs().collect(),
        })
    }

    /// A commit that failed may be an image all the same, if only its reply was lost.
    fn after_commit(
        &self,
        error: ImageError,
        writer: &ImageWriter,
        sequence: u64,
    ) -> Result<ImageHead, JobError> {
        if let Ok(false) = writer.abandon(self.environment.clock.wall())
            && let Some(entry) = self.repository.image(self.request.volume, sequence)?
        {
            return Ok(entry.head);
        }
        Err(error.into())
    }

    /// Reads and stores all that is wanted, and makes sure that it was all. After this a cancel comes too late.
    fn take_all(&self, prepared: &Prepared<'_>, writer: &ImageWriter) -> Result<Taken, JobError> {
        let (snapshot, reading) = (&*prepared.begun.snapshot, &prepared.reading);
        if let Some(copied) = &prepared.copied {
            copied.complete(reading, snapshot, writer)?;
        } else {
            let wanted = snapshot.wanted();
            self.control.set_total(reading.bytes_of(wanted));
            reading.all(Pass {
                blocks: wanted,
                read: &|range, buf| snapshot.read_blocks(range, buf),
                put: &|blocks| writer.put(blocks),
            })?;
        }
        snapshot.finish()?;
        self.control.begin_commit()?;
        Ok(Taken {
            read_bytes: reading.read_bytes(),
            unreadable: reading.unreadable(snapshot.wanted()),
        })
    }

    fn image_facts(&self, prepared: &Prepared<'_>, taken: &Taken, previous: Digest) -> ImageFacts {
        let begun = &prepared.begun;
        let incremental = prepared.reason.is_none();
        let changed = begun.snapshot.changed().filter(|_| incremental).cloned();
        // Of a volume that is copied ahead more is read than it has.
        let wanted = begun.snapshot.wanted();
        let changed_bytes = prepared
            .reading
            .bytes_of(changed.as_ref().unwrap_or(wanted));
        let cost = self.request.source.cost(begun.id);
        let clock = &self.environment.clock;
        ImageFacts {
            device: self.request.device.clone(),
            generation: begun.opened,
            kind: if incremental {
                ImageKind::Incremental
            } else {
                ImageKind::Full
            },
            reason: prepared.reason,
            consistency: begun.consistency,
            instant: begun.instant,
            committed: clock.wall(),
            counters: Counters {
                read_bytes: taken.read_bytes,
                changed_bytes,
                stored_bytes: 0,
                preserved_bytes: cost.preserved_bytes,
                duration_ns: nanos(clock.now().since(self.started)),
                longest_wait_ns: nanos(cost.longest_wait),
                longest_freeze_ns: nanos(cost.longest_freeze),
            },
            changed,
            evidence: begun.evidence.clone(),
            previous,
        }
    }
}

/// Why it is not incremental, now that the tracker has answered.
fn reason(facts: &PlanFacts, tracker: TrackerSays) -> Option<Reason> {
    match before_snapshot(facts) {
        Err(reason) => Some(reason),
        Ok(base) => after_snapshot(facts, base, tracker),
    }
}

/// The base and what is absent in it; `None` if it lacks something it needs.
pub(crate) fn open_base(
    repository: &Repository,
    entry: &ImageEntry,
) -> Result<Option<(Arc<ImageReader>, BlockSet)>, JobError> {
    let opened = ImageReader::open_base(repository, entry)
        .and_then(|reader| reader.absent().map(|absent| (Arc::new(reader), absent)));
    match opened {
        Ok(base) => Ok(Some(base)),
        Err(ImageError::Damaged { .. }) => Ok(None),
        Err(ImageError::Repository(error)) if is_gone(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The volume's answer is not believed blindly: what an image of this kind needs must be wanted (P10).
fn check_wanted(snapshot: &dyn SnapshotRead, absent: Option<&BlockSet>) -> Result<(), JobError> {
    let (wanted, blocks) = (snapshot.wanted(), snapshot.geometry().block_count());
    if wanted.len() != blocks {
        return Err(JobError::Mismatch {
            what: "the wanted set is of another size",
        });
    }
    let what = match absent {
        None if wanted.count() != blocks => "a full image wants every block",
        Some(absent) if !absent.is_subset_of(wanted) => "what the base lacks is not wanted",
        Some(_)
            if snapshot
                .changed()
                .is_none_or(|changed| !changed.is_subset_of(wanted)) =>
        {
            "what changed is not wanted"
        }
        None | Some(_) => return Ok(()),
    };
    Err(JobError::Mismatch { what })
}

fn nanos(duration: core::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

struct Taken {
    read_bytes: u64,
    unreadable: BlockSet,
}

/// What a backup would be now: `backup --dry-run`, `status`. Claims nothing; reads the newest image's head and what it
/// needs. `ask` is told the base's generation and what the base lacks, and answers what the tracker says of it and how many
/// bytes would be wanted.
///
/// Waits: for the repository.
pub fn preview(
    repository: &Repository,
    volume: VolumeId,
    facts: impl FnOnce(RepositoryFacts) -> PlanFacts,
    ask: &dyn Fn(GenerationName, &BlockSet) -> (TrackerSays, u64),
) -> Result<crate::plan::Plan, JobError> {
    let found = survey(repository, volume)?;
    let mut facts = facts(found.facts);
    if let Some(newest) = repository.sequences(volume)?.last()
        && let Ok(claim) = repository.claim_facts(volume, *newest)
    {
        facts.repository.newest_host = Some(claim.host);
    }
    let mut answer = (TrackerSays::Unresolved, 0);
    if let (Ok(base), Some(entry)) = (before_snapshot(&facts), &found.newest) {
        match open_base(repository, entry)? {
            Some((_, absent)) => answer = ask(base.generation, &absent),
            None => facts.repository.newest = Newest::Unusable,
        }
    }
    Ok(crate::plan::plan(&facts, answer.0, answer.1))
}
