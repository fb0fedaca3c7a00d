//! `status`: how everything stands, and what to type. Answers within a second, whatever is away or hangs.
//!
//! Facts come from the configuration, the records of earlier backups, the volumes' servers (which answer from memory), what the
//! kernel has of volumes that are watched, and the daemon's list of jobs. Neither a volume's data nor a repository is touched.

use blktide_api::config::{Config, VolumeConfig};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::message::{JobDocument, StatusDocument, VolumeDocument};
use blktide_api::name::Name;
use blktide_api::record::{FILE_NAME, Records};
use blktide_api::status::{LiveFacts, VolumeFacts, assemble, warning_text};
use blktide_api::unit::size;
use blktide_format::marker;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::clock::SystemClock;
use blktide_sys::host;
use blktide_types::clock::{Clock, WallTime};
use blktide_types::id::GenerationName;
use blktide_volume::error::VolumeError;
use blktide_volume::message::{VolumeState, VolumeStatus};
use serde_json::{Value, json};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::context::{Common, chain, client};
use crate::output;
use crate::tracker;

/// Longest wait for any one answer.
const LIMIT: Duration = Duration::from_millis(400);

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Only this volume
    pub(crate) volume: Option<Name>,
}

/// Exit 0: all well. 3: something wants you.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let chosen: Vec<&VolumeConfig> = match &args.volume {
        None => config.volumes.values().collect(),
        Some(name) => vec![config.volumes.get(name).ok_or_else(|| {
            Failure::new(
                FailureCode::NoSuchVolume,
                format!("no volume '{name}' is configured"),
            )
            .hint("blktidectl volume list")
        })?],
    };
    let jobs = client(&config, Some(LIMIT)).and_then(|mut daemon| daemon.call("Jobs", json!({})));
    let answers = ask_all(&config, &chosen);
    let facts: Vec<VolumeFacts<'_>> = chosen
        .iter()
        .zip(answers)
        .map(|(volume, answer)| facts(&config, volume, answer, jobs.as_ref().ok()))
        .collect();
    // A daemon that answers late runs all the same.
    let runs = !matches!(&jobs, Err(failure) if failure.code == FailureCode::DaemonUnreachable);
    let (document, exit) = assemble(
        &config,
        &host::host_name(),
        runs,
        &facts,
        SystemClock.wall(),
    );
    if common.json {
        output::document(&document);
    } else {
        tell(&document, common);
    }
    Ok(exit)
}

/// What a volume's server answers.
type Answer = Result<(VolumeStatus, Vec<(String, Option<u64>)>), VolumeError>;

/// Asks all volumes at once: one that does not answer costs no more than its limit.
fn ask_all(config: &Config, volumes: &[&VolumeConfig]) -> Vec<(Records, Option<Answer>)> {
    thread::scope(|scope| {
        let asked: Vec<_> = volumes
            .iter()
            .map(|volume| {
                scope.spawn(|| {
                    let records = records(config, &volume.name);
                    let answer = ask(config, volume, &records);
                    (records, Some(answer))
                })
            })
            .collect();
        asked
            .into_iter()
            .map(|thread| thread.join().unwrap_or_default())
            .collect()
    })
}

fn records(config: &Config, name: &Name) -> Records {
    let path = config.volume_state_dir(name).join(FILE_NAME);
    Records::parse(&std::fs::read_to_string(path).unwrap_or_default())
}

fn ask(config: &Config, volume: &VolumeConfig, records: &Records) -> Answer {
    let (known, names): (Vec<String>, Vec<GenerationName>) = records
        .repositories
        .values()
        .filter_map(|r| {
            let name: GenerationName = r.generation.parse().ok()?;
            Some((r.generation.clone(), name))
        })
        .unzip();
    let (status, bytes) = tracker::look(config, volume, &names, LIMIT)?;
    Ok((status, known.into_iter().zip(bytes).collect()))
}

fn facts<'a>(
    config: &Config,
    volume: &'a VolumeConfig,
    (records, answer): (Records, Option<Answer>),
    jobs: Option<&Value>,
) -> VolumeFacts<'a> {
    let told = jobs.and_then(|jobs| failed_of(jobs, &volume.name));
    let (live, silent) = match answer {
        Some(Ok((status, changed))) => (Some(live(status, changed)), None),
        Some(Err(VolumeError::NotAttached { .. })) => (None, None),
        Some(Err(error)) => (None, Some(chain(&error))),
        None => (None, Some("it could not be asked".to_owned())),
    };
    VolumeFacts {
        config: volume,
        records,
        failed: if live.is_some() {
            None
        } else {
            silent.or(told)
        },
        closed: is_closed(config, &volume.name),
        mountpoint: live
            .as_ref()
            .and_then(|_| mountpoint(&config.node_of(volume))),
        live,
        configured: configured(config, &volume.name),
        job: jobs.and_then(|jobs| job_of(jobs, &volume.name)),
    }
}

fn live(status: VolumeStatus, changed_bytes: Vec<(String, Option<u64>)>) -> LiveFacts {
    LiveFacts {
        state: match status.state {
            VolumeState::Attaching => "attaching",
            VolumeState::Attached => "attached",
            VolumeState::PassingThrough => "passing-through",
            VolumeState::Detaching => "detaching",
        }
        .to_owned(),
        pid: status.pid,
        keeper_pid: status.keeper_pid,
        volume_bytes: status.volume_bytes,
        generation_number: status.generation_number,
        distrust: status.distrust.map(|d| (d.reason, d.since_ns, d.detail)),
        changed_bytes,
        warnings: status.warnings,
        takeovers: status.takeovers,
        longest_pause_ns: status.longest_pause_ns,
    }
}

fn failed_of(jobs: &Value, name: &Name) -> Option<String> {
    let list = jobs.get("failed")?.as_array()?;
    let entry = list
        .iter()
        .find(|f| f.get("volume").and_then(Value::as_str) == Some(name.as_str()))?;
    entry.get("message")?.as_str().map(str::to_owned)
}

/// The volume's first job, and how many wait behind it.
fn job_of(jobs: &Value, name: &Name) -> Option<JobDocument> {
    let list = jobs.get("jobs")?.as_array()?;
    let mut own = list
        .iter()
        .filter(|j| j.get("volume").and_then(Value::as_str) == Some(name.as_str()));
    let first = own.next()?;
    let mut job: JobDocument = serde_json::from_value(first.clone()).ok()?;
    job.queued = own.count() as u64;
    Some(job)
}

/// Whether its last life ended with a stored bitmap.
fn is_closed(config: &Config, name: &Name) -> bool {
    let marker = std::fs::read(config.volume_state_dir(name).join("marker"));
    marker.is_ok_and(|bytes| {
        marker::decode(&bytes).is_ok_and(|marker| marker.state == marker::State::Closed)
    })
}

fn mountpoint(node: &Path) -> Option<String> {
    let device = BlockDevice::at(node).ok()?;
    let mounts = device.mounts().ok()?;
    mounts.first().map(|mount| mount.at.display().to_string())
}

/// When the volume's file was written.
fn configured(config: &Config, name: &Name) -> WallTime {
    let written = std::fs::metadata(config.volume_file(name)).and_then(|facts| facts.modified());
    let since = written
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_nanos()).ok());
    // Unknown: as if it were new, so that nothing is called overdue for want of a time.
    since.map_or_else(|| SystemClock.wall(), WallTime)
}

fn tell(document: &StatusDocument, common: &Common) {
    for volume in &document.volumes {
        tell_volume(volume, common);
    }
    if document.volumes.is_empty() {
        output::text(
            common,
            "no volumes; blktidectl volume add NAME --device PATH adds one",
        );
    }
    let advice = document
        .volumes
        .iter()
        .flat_map(|v| &v.advice)
        .chain(&document.advice);
    for line in advice {
        output::text(common, &format!("! {line}"));
    }
}

fn tell_volume(volume: &VolumeDocument, common: &Common) {
    let place = volume
        .mountpoint
        .as_ref()
        .map_or_else(String::new, |at| format!(" on {at}"));
    let trust = match (&volume.distrust_reason, &volume.distrust_detail) {
        (Some(reason), Some(detail)) => format!("{} ({reason}: {detail})", volume.tracking),
        (Some(reason), None) => format!("{} ({reason})", volume.tracking),
        (None, _) => volume.tracking.clone(),
    };
    let bytes = volume
        .size_bytes
        .map_or_else(|| "size unknown".to_owned(), size);
    output::text(
        common,
        &format!(
            "{}: {}{place}, {bytes}, {}: {trust}",
            volume.name, volume.state, volume.mode
        ),
    );
    for repository in &volume.repositories {
        let last = repository.last_image.as_deref().unwrap_or("no image");
        let time = repository
            .last_time
            .as_deref()
            .map_or_else(String::new, |t| format!(" of {t}"));
        let why = repository
            .next_reason
            .as_deref()
            .map_or_else(String::new, |r| format!(" ({r})"));
        let read = repository
            .next_read_bytes
            .map_or_else(String::new, |b| format!(", reads {}", size(b)));
        let line = format!(
            "  {}: {last}{time}; next: {}{why}{read}",
            repository.repository, repository.next_kind
        );
        output::text(common, &line);
    }
    if let Some(job) = &volume.job {
        let line = format!(
            "  {} into {}: {}, {} of {}, since {}",
            job.kind,
            job.repository,
            job.state,
            size(job.done_bytes),
            size(job.total_bytes),
            job.since
        );
        output::text(common, &line);
    }
    for warning in &volume.warnings {
        output::text(common, &format!("  note: {}", warning_text(warning)));
    }
}
