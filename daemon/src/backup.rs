//! One backup, from the request to the summary: the volume's client and the job joined.

use crate::daemon::Shared;
use crate::jobs::Place;
use crate::source::{Source, VolumeSource, geometry};
use crate::volume::options;
use crate::watched::WatchSource;
use crate::{records, tracked};
use blktide_api::config::{Config, Mode, RepositoryConfig, SavePlace, VolumeConfig};
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::message::{PLAN, PlanDocument, SUMMARY, SummaryDocument};
use blktide_api::name::{Name, RepositoryRef};
use blktide_api::reason_text;
use blktide_api::record::Record;
use blktide_api::time::rfc3339;
use blktide_api::unit::{MinFree, size};
use blktide_format::manifest::{Consistency, ImageHead, ImageKind};
use blktide_job::backup::{BackupReport, BackupRequest, OpenRepository};
use blktide_job::error::JobError;
use blktide_job::plan::PlanFacts;
use blktide_job::running::OnProgress;
use blktide_job::source::TrackerSays;
use blktide_repo::{FolderStore, RepoError, Repository};
use blktide_sys::blockdev::{self, BlockDevice};
use blktide_sys::fs;
use blktide_types::id::{ImageId, RepositoryId, VolumeId};
use blktide_types::io::RevokeCause;
use blktide_types::reason::Reason;
use blktide_volume::VolumeError;
use blktide_volume::message::{VolumeState, VolumeStatus};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// What was asked for.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the verb"
)]
pub(crate) struct Ask {
    pub(crate) volume: Name,
    #[serde(default)]
    repository: Option<String>,
    #[serde(default)]
    full: bool,
    /// Makes no difference until a file system's unused blocks are left out.
    #[serde(default)]
    #[expect(dead_code, reason = "accepted, and without effect so far")]
    all_blocks: bool,
    #[serde(default)]
    max_read_rate: Option<u64>,
    #[serde(default)]
    dry_run: bool,
}

/// A request, checked against the configuration.
pub(crate) struct Checked {
    config: Arc<Config>,
    volume: VolumeConfig,
    /// What it is called in records and documents.
    pub(crate) repository: String,
    path: PathBuf,
    min_free: MinFree,
    ask: Ask,
}

impl Checked {
    /// The volume.
    pub(crate) const fn volume(&self) -> &Name {
        &self.volume.name
    }

    /// Whether it is only to be said what would be done.
    pub(crate) const fn dry_run(&self) -> bool {
        self.ask.dry_run
    }
}

/// What the repository's thread found out, for the words of a failure.
#[derive(Default)]
struct Seen {
    failure: Mutex<Option<Failure>>,
    id: OnceLock<RepositoryId>,
    free_bytes: OnceLock<(u64, u64)>,
}

/// Looks the names up.
pub(crate) fn check(config: &Arc<Config>, ask: Ask) -> Result<Checked, Failure> {
    let volume = volume_of(config, &ask.volume)?.clone();
    if let SavePlace::Device(path) = &volume.save_area.place {
        let message = format!(
            "a save area on a device is not built yet: {}",
            path.display()
        );
        return Err(Failure::new(FailureCode::NotBuiltYet, message)
            .hint("Say `path` or `memory` in [save_area]."));
    }
    let reference = match &ask.repository {
        Some(text) => text
            .parse()
            .map_err(|e| Failure::new(FailureCode::Usage, format!("{e}")))?,
        None => RepositoryRef::Name(volume.repository.clone()),
    };
    let registered = find_repository(config, &reference)?;
    let (repository, path, min_free) = match registered {
        Some(r) => (r.name.to_string(), r.path.clone(), r.min_free),
        None => (
            reference.to_string(),
            PathBuf::from(reference.to_string()),
            MinFree::Percent(5),
        ),
    };
    if !path.is_absolute() {
        let message = format!("'{}' is not an absolute path", path.display());
        return Err(Failure::new(FailureCode::Usage, message));
    }
    Ok(Checked {
        config: Arc::clone(config),
        volume,
        repository,
        path,
        min_free,
        ask,
    })
}

/// The volume of a name.
pub(crate) fn volume_of<'a>(config: &'a Config, name: &Name) -> Result<&'a VolumeConfig, Failure> {
    config.volumes.get(name).ok_or_else(|| {
        Failure::new(
            FailureCode::NoSuchVolume,
            format!("no volume {name} is configured"),
        )
        .hint("`blktidectl volume list` shows those that are; `volume add` adds one.")
    })
}

fn find_repository<'a>(
    config: &'a Config,
    reference: &RepositoryRef,
) -> Result<Option<&'a RepositoryConfig>, Failure> {
    match reference {
        RepositoryRef::Path(path) => {
            Ok(config.repositories.values().find(|r| r.path == *path))
        }
        RepositoryRef::Name(name) => match config.repositories.get(name) {
            Some(found) => Ok(Some(found)),
            None => Err(Failure::new(
                FailureCode::NoSuchRepository,
                format!("no repository {name} is registered"),
            )
            .hint(format!(
                "`blktidectl repo init {name} PATH` makes one, `repo add {name} PATH` registers one that exists."
            ))),
        },
    }
}

/// Makes the backup; `place` is first of its volume's. Waits for its end.
pub(crate) fn run(
    shared: &Shared,
    checked: &Checked,
    place: &Place,
    on_progress: OnProgress,
) -> Result<SummaryDocument, Failure> {
    let started = shared.environment.clock.now();
    let (source, status, volume_id) = facts(checked)?;
    let seen = Arc::new(Seen::default());
    let request = request(checked, &source, volume_id, &seen, &status);
    let mut environment = shared.environment.clone();
    environment.on_progress = Some(on_progress);
    let running = blktide_job::backup::start(request, &environment)
        .map_err(|e| failure(&e, &seen, checked))?;
    place
        .job
        .works_with(Arc::clone(running.control()), Arc::clone(&source));
    let result = running.wait();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            // A thread of the job may hang for ever: the writers must not.
            source.revoke();
            return Err(failure(&error, &seen, checked));
        }
    };
    committed(checked, &*source, &seen, &report);
    let seconds = shared.environment.clock.now().since(started).as_secs_f64();
    Ok(summary(checked, &*source, &report, &status, seconds))
}

/// What `--dry-run` tells.
pub(crate) fn preview(shared: &Shared, checked: &Checked) -> Result<PlanDocument, Failure> {
    let (source, status, volume_id) = facts(checked)?;
    let seen = Arc::new(Seen::default());
    let repository =
        opener(checked, &seen, &status)().map_err(|e| failure(&e.into(), &seen, checked))?;
    let geometry = source.geometry();
    let plan = blktide_job::backup::preview(
        &repository,
        volume_id,
        |repository| PlanFacts {
            full_asked: checked.ask.full,
            host: shared.environment.host,
            geometry,
            device: device_words(&checked.volume.device),
            repository,
            remembered: remembered(checked, volume_id, &seen),
        },
        &|generation, absent| {
            let asked = tracked::changed_since(&checked.config, &checked.volume, &[generation]);
            match asked {
                Ok((_, Some(distrust))) => (
                    TrackerSays::Distrusted(
                        Reason::from_code(&distrust.reason).unwrap_or(Reason::TrackingInterrupted),
                    ),
                    0,
                ),
                Ok((changed, None)) => match changed.first().copied().flatten() {
                    Some(bytes) => {
                        let absent = absent.count().0 * geometry.block_size().bytes_u64();
                        (TrackerSays::Resolved, bytes.saturating_add(absent))
                    }
                    None => (TrackerSays::Unresolved, 0),
                },
                Err(_) => (TrackerSays::Off, 0),
            }
        },
    )
    .map_err(|e| failure(&e, &seen, checked))?;
    Ok(PlanDocument {
        message_type: PLAN.to_owned(),
        host: shared.environment.host_name.clone(),
        repository: checked.repository.clone(),
        volume: checked.volume.name.to_string(),
        kind: kind_word(plan.kind).to_owned(),
        reason: plan.reason.map(|r| r.code().to_owned()),
        volume_bytes: geometry.volume_bytes(),
        read_bytes: plan.read_bytes,
        stored_bytes_max: plan.stored_bytes_max,
        free_bytes: fs::free_bytes(&checked.path).unwrap_or(0),
    })
}

/// The volume as its server tells it now.
fn facts(checked: &Checked) -> Result<(Arc<dyn Source>, VolumeStatus, VolumeId), Failure> {
    let status = tracked::status_of(&checked.config, &checked.volume)
        .map_err(|e| volume_failure(&checked.volume.name, &e))?;
    if status.state != VolumeState::Attached {
        let message = format!("volume {} is {}", status.name, word(status.state));
        return Err(Failure::new(FailureCode::NotAttached, message)
            .hint("`blktidectl status` says what to do."));
    }
    let unusable =
        |what: &str| Failure::new(FailureCode::Failed, format!("the volume told {what}"));
    let geometry = geometry(&status).ok_or_else(|| unusable("sizes that contradict each other"))?;
    let id = status
        .volume_id
        .parse()
        .map_err(|_source| unusable("no id"))?;
    let volume = checked.volume.clone();
    let source: Arc<dyn Source> = if volume.mode == Mode::Watch {
        let options = options(&checked.config, &volume);
        Arc::new(WatchSource::new(options, volume, geometry))
    } else {
        let runtime_dir = checked.config.runtime_dir.clone();
        let node = status.loop_device.clone();
        Arc::new(VolumeSource::new(runtime_dir, volume, geometry, node))
    };
    Ok((source, status, id))
}

const fn word(state: VolumeState) -> &'static str {
    match state {
        VolumeState::Attaching => "still being attached",
        VolumeState::Attached => "attached",
        VolumeState::PassingThrough => "passing everything through, untracked",
        VolumeState::Detaching => "being detached",
    }
}

/// An error of the volume's processes, as it is told.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the enum is open; what is not named is a plain failure"
)]
pub(crate) fn volume_failure(name: &Name, error: &VolumeError) -> Failure {
    let words = crate::daemon::chain(error);
    match error {
        VolumeError::NotAttached { .. } => Failure::new(
            FailureCode::NotAttached,
            format!("volume {name} is not attached"),
        )
        .hint(format!("blktidectl attach {name}")),
        VolumeError::NoAnswer { .. } => Failure::new(FailureCode::TimedOut, words),
        VolumeError::Refused { kind, .. } if *kind == blktide_volume::error::Refusal::InUse => {
            Failure::new(FailureCode::VolumeOpen, words).hint(format!(
                "Unmount it or end what uses it, then: blktidectl detach {name}"
            ))
        }
        VolumeError::Refused { kind, .. } if *kind == blktide_volume::error::Refusal::Busy => {
            Failure::new(FailureCode::Busy, words)
        }
        VolumeError::Refused { kind, .. }
            if *kind == blktide_volume::error::Refusal::Unwatchable =>
        {
            Failure::new(FailureCode::ModeRefused, words)
                .hint("blktidectl doctor shows what each device can have")
        }
        _ => Failure::new(FailureCode::Failed, words),
    }
}

fn request(
    checked: &Checked,
    source: &Arc<dyn Source>,
    volume: VolumeId,
    seen: &Arc<Seen>,
    status: &VolumeStatus,
) -> BackupRequest {
    let rate = checked.ask.max_read_rate.or(checked.volume.max_read_rate);
    BackupRequest {
        repository: opener(checked, seen, status),
        volume,
        volume_name: checked.volume.name.to_string(),
        device: device_words(&checked.volume.device),
        source: Arc::<dyn Source>::clone(source),
        full: checked.ask.full,
        remembered: remembered_any(checked, volume),
        max_read_rate: rate.unwrap_or(0),
        workers: 0,
        min_free: Some(room(checked, seen)),
    }
}

/// What is free beyond what is to be left free, so that both numbers come from the same moment, in a thread that may hang.
fn room(checked: &Checked, seen: &Arc<Seen>) -> (blktide_job::backup::FreeBytes, u64) {
    let (path, min_free, seen) = (checked.path.clone(), checked.min_free, Arc::clone(seen));
    let ask = move || {
        let free = fs::free_bytes(&path).map_err(std::io::Error::other)?;
        let total = fs::total_bytes(&path).map_err(std::io::Error::other)?;
        let wanted = min_free.bytes_of(total);
        seen.free_bytes.get_or_init(|| (free, wanted));
        Ok(u64::from(free >= wanted))
    };
    (Box::new(ask), 1)
}

/// Opens the repository, unless it lies on the volume itself (P8).
fn opener(checked: &Checked, seen: &Arc<Seen>, status: &VolumeStatus) -> OpenRepository {
    let (path, name) = (checked.path.clone(), checked.repository.clone());
    let node = if checked.volume.mode == Mode::Watch {
        Some(status.device.clone())
    } else {
        status.loop_device.clone()
    };
    let seen = Arc::clone(seen);
    Box::new(move || {
        if node.is_some_and(|node| lies_on(&path, &node)) {
            let message = format!("repository {name} lies on the volume that is to be backed up");
            let failure = Failure::new(FailureCode::RepositoryOnTrackedVolume, message)
                .hint("Writing it would need the very blocks that it waits for. Put it elsewhere.");
            *lock(&seen.failure) = Some(failure);
            return Err(RepoError::Misuse("the repository lies on the volume"));
        }
        let repository = Repository::open(Arc::new(FolderStore::new(&path)))?;
        seen.id.get_or_init(|| repository.id());
        Ok(repository)
    })
}

/// Also through partitions, LVM and LUKS on the volume.
fn lies_on(path: &Path, node: &Path) -> bool {
    BlockDevice::at(node).is_ok_and(|node| {
        // What cannot be looked at cannot be opened either, and that says why.
        blockdev::lies_on(path, node.number()).unwrap_or(false)
    })
}

/// What identifies a device over reboots: model and serial number. A file has nothing of the kind.
fn device_words(device: &Path) -> String {
    let Ok(Some(device)) = fs::kind_of(device).map(|_| BlockDevice::at(device).ok()) else {
        return String::new();
    };
    match device.model_and_serial() {
        (model, Some(serial)) => format!("{} {serial}", model.unwrap_or_default())
            .trim()
            .to_owned(),
        (_, None) => String::new(),
    }
}

fn record(checked: &Checked) -> Option<Record> {
    records::read(&checked.config, &checked.volume.name)
        .repositories
        .remove(&checked.repository)
}

fn remembered_any(checked: &Checked, volume: VolumeId) -> Option<ImageId> {
    let record = record(checked)?;
    (record.volume_id == volume.to_string())
        .then(|| record.image_id.parse().ok())
        .flatten()
}

/// The image that this machine remembers, if it was in this very repository.
fn remembered(checked: &Checked, volume: VolumeId, seen: &Seen) -> Option<ImageId> {
    let here = seen.id.get()?.to_string();
    record(checked).filter(|r| r.repository_id == here)?;
    remembered_any(checked, volume)
}

/// Everything that an image that now exists has for consequence here. What fails costs the next backup more, nothing else.
fn committed(checked: &Checked, source: &dyn Source, seen: &Seen, report: &BackupReport) {
    let head = &report.head;
    let name = &checked.volume.name;
    if head.kind == ImageKind::Full && source.opened() == Some(head.generation) {
        match source.trust() {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(volume = %name, "what the full image covers was distrusted again meanwhile");
            }
            Err(error) => {
                tracing::warn!(volume = %name, %error, "the tracker could not be told of the full image");
            }
        }
    }
    source.release();
    let record = Record {
        repository_id: seen.id.get().map(ToString::to_string).unwrap_or_default(),
        volume_id: head.volume.to_string(),
        number: head.sequence,
        image_id: head.image.to_string(),
        time: rfc3339(head.instant),
        generation: head.generation.to_string(),
        volume_bytes: head.geometry.volume_bytes(),
        block_size_bytes: head.geometry.block_size().bytes(),
    };
    records::remember(&checked.config, name, &checked.repository, record);
    records::send_hints(&checked.config, name);
}

fn summary(
    checked: &Checked,
    source: &dyn Source,
    report: &BackupReport,
    status: &VolumeStatus,
    seconds: f64,
) -> SummaryDocument {
    let head: &ImageHead = &report.head;
    let figures = source.figures();
    let seconds_of = |nanos| Duration::from_nanos(nanos).as_secs_f64();
    // What the tracker saw is evidence only for the reason that it gave.
    let detail = |reason: Reason| {
        let distrust = status.distrust.as_ref();
        distrust
            .filter(|d| d.reason == reason.code())
            .map(|d| d.detail.as_str())
    };
    SummaryDocument {
        message_type: SUMMARY.to_owned(),
        host: head.host_name.clone(),
        repository: checked.repository.clone(),
        volume: checked.volume.name.to_string(),
        image: format!("{}@{}", checked.volume.name, head.sequence),
        image_id: head.image.to_string(),
        kind: kind_word(head.kind).to_owned(),
        reason: head.reason.map(|r| r.code().to_owned()),
        consistency: consistency_word(head.consistency).to_owned(),
        time: rfc3339(head.instant),
        volume_bytes: head.geometry.volume_bytes(),
        read_bytes: head.counters.read_bytes,
        changed_bytes: head.counters.changed_bytes,
        stored_bytes: head.counters.stored_bytes,
        longest_freeze_seconds: seconds_of(head.counters.longest_freeze_ns),
        longest_wait_seconds: seconds_of(head.counters.longest_wait_ns),
        seconds,
        warnings: if report.unreadable.is_empty() {
            Vec::new()
        } else {
            vec!["unreadable-blocks".to_owned()]
        },
        save_area_peak_bytes: figures.save_area_peak_bytes,
        preserved_bytes: head.counters.preserved_bytes,
        reason_text: head
            .reason
            .map(|r| reason_text::text(r).paragraph(detail(r))),
        save_area_in_memory: source.used_memory_instead(),
    }
}

pub(crate) const fn kind_word(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Full => "full",
        ImageKind::Incremental => "incremental",
        ImageKind::Digest => "digest",
    }
}

const fn consistency_word(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Unmounted => "unmounted",
        Consistency::Frozen => "frozen",
        Consistency::Instant => "instant",
        Consistency::None => "none",
    }
}

/// A job's error in the interface's words.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the enum is open; what is not named is a plain failure"
)]
fn failure(error: &JobError, seen: &Seen, checked: &Checked) -> Failure {
    if let Some(failure) = lock(&seen.failure).take() {
        return failure;
    }
    let (name, repository) = (&checked.volume.name, &checked.repository);
    let words = format!("{name}: {}", crate::daemon::chain(error));
    let code = match error.code() {
        "no_repository" => FailureCode::NoSuchRepository,
        "claim_in_use" => FailureCode::ClaimInTheWay,
        "damaged" => FailureCode::DamageFound,
        word => FailureCode::from_code(word).unwrap_or(FailureCode::Failed),
    };
    let failure = Failure::new(code, words);
    match error {
        JobError::RepositoryLow { .. } => {
            let (free, wanted) = seen.free_bytes.get().copied().unwrap_or_default();
            let message = format!(
                "repository {repository} has {} free, and {} are to be left free",
                size(free),
                size(wanted)
            );
            Failure::new(FailureCode::RepositoryFull, message)
                .hint("Make room there, or lower `min_free` in its file.")
        }
        JobError::RepositoryFull { .. } => failure.hint(format!(
            "Nothing is lost: the next backup covers this one. Make room at {}.",
            checked.path.display()
        )),
        JobError::SnapshotRevoked { cause } => failure.hint(revoked_hint(*cause)),
        JobError::Busy => failure.hint("Writers did not pause for long enough. Try again."),
        JobError::Cancelled { .. } => failure.hint("Nothing is lost: the next backup covers it."),
        _ if code == FailureCode::NoSuchRepository => failure.hint(format!(
            "Is {} mounted? `blktidectl repo status`",
            checked.path.display()
        )),
        _ => failure,
    }
}

const fn revoked_hint(cause: RevokeCause) -> &'static str {
    match cause {
        RevokeCause::SaveAreaFull | RevokeCause::WaitLimit | RevokeCause::QueueFull => {
            "No write was lost and no change is forgotten. Enlarge `limit` of the save area, or say `overflow = \"wait\"`."
        }
        RevokeCause::SaveAreaFailed => {
            "No write was lost and no change is forgotten. Look at the disk of the save area."
        }
        RevokeCause::Distrusted => {
            "No write was lost. The next backup reads everything; `blktidectl status` says why."
        }
        RevokeCause::ReaderStalled
        | RevokeCause::OriginalUnreadable
        | RevokeCause::ServerDied
        | RevokeCause::Detached
        | RevokeCause::Cancelled => {
            "No write was lost and no change is forgotten: the next backup covers this one."
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
