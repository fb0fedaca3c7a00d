//! `status`: from facts that are at hand to the document and its exit code. Pure; the binaries gather.
//!
//! The facts are configuration, the records of earlier backups, what the volume's server answers from memory, and
//! the jobs. Neither a volume nor a repository is touched.

use crate::config::{Attach, Config, Mode, VolumeConfig};
use crate::failure::Exit;
use crate::message::{
    JobDocument, STATUS, StatusDocument, VolumeDocument, VolumeRepositoryDocument,
};
use crate::record::{Record, Records};
use crate::time;
use crate::unit;
use blktide_types::clock::WallTime;
use blktide_types::reason::Reason;
use core::time::Duration;

/// What is known of one volume.
#[derive(Clone, Debug)]
pub struct VolumeFacts<'a> {
    /// Its configuration.
    pub config: &'a VolumeConfig,
    /// Its backups.
    pub records: Records,
    /// What its server says; `None`: it is not attached.
    pub live: Option<LiveFacts>,
    /// Its processes should be there and do not answer, or could not be started.
    pub failed: Option<String>,
    /// It was detached cleanly: its bitmap lies in the state folder.
    pub closed: bool,
    /// Where its node is mounted.
    pub mountpoint: Option<String>,
    /// When its file was written, the start of `max_age` for a volume without images.
    pub configured: WallTime,
    /// Its job.
    pub job: Option<JobDocument>,
}

/// What a volume's server says.
#[derive(Clone, Debug)]
pub struct LiveFacts {
    /// attached · attaching · passing-through · detaching.
    pub state: String,
    /// The server; 0: there is none (mode watch).
    pub pid: u32,
    /// The keeper; 0: dead, or there is none.
    pub keeper_pid: u32,
    /// Size.
    pub volume_bytes: u64,
    /// Number of the open generation.
    pub generation_number: u64,
    /// Distrust: reason, since (nanoseconds since 1970), detail.
    pub distrust: Option<(String, i64, String)>,
    /// For each record's generation what changed since; `None`: not known.
    pub changed_bytes: Vec<(String, Option<u64>)>,
    /// What its processes warn of, as codes.
    pub warnings: Vec<String>,
    /// Servers that have died and were replaced.
    pub takeovers: u64,
    /// The longest that a takeover made the volume stand still, nanoseconds.
    pub longest_pause_ns: u64,
}

/// A warning of a volume's processes, in words; a code of a later version is its own words.
pub fn warning_text(code: &str) -> &str {
    match code {
        "memory-not-locked" => {
            "memory cannot be locked: under memory pressure the volume may wait for its own writes"
        }
        "no-io-flusher" => {
            "PR_SET_IO_FLUSHER is refused (no CAP_SYS_RESOURCE): under memory pressure the volume may wait for its own writes"
        }
        "may-be-killed" => {
            "oom_score_adj cannot be lowered: the kernel may kill the volume's processes when memory runs out"
        }
        "fuse-request-timeout" => {
            "fs.fuse.max_request_timeout is set: the kernel gives the volume up when its device is slow; set it to 0"
        }
        "program-on-disk" => {
            "programs may not be run from memory (vm.memfd_noexec): a server's restart reads the disk"
        }
        other => other,
    }
}

/// The document, and what `status` exits with.
pub fn assemble(
    config: &Config,
    host: &str,
    daemon_runs: bool,
    volumes: &[VolumeFacts<'_>],
    now: WallTime,
) -> (StatusDocument, Exit) {
    let mut document = StatusDocument {
        message_type: STATUS.to_owned(),
        daemon: if daemon_runs {
            "running"
        } else {
            "unreachable"
        }
        .to_owned(),
        host: host.to_owned(),
        volumes: volumes
            .iter()
            .map(|facts| volume(config, facts, now))
            .collect(),
        warnings: Vec::new(),
        advice: Vec::new(),
    };
    if !daemon_runs {
        document.warnings.push("daemon-unreachable".to_owned());
        document.advice.push(
            "blktided does not run: no backup can start. Tracking goes on. Start it: systemctl start blktided".to_owned(),
        );
    }
    let wanted =
        !document.advice.is_empty() || document.volumes.iter().any(|v| !v.advice.is_empty());
    let exit = if wanted { Exit::Warnings } else { Exit::Done };
    (document, exit)
}

fn volume(config: &Config, facts: &VolumeFacts<'_>, now: WallTime) -> VolumeDocument {
    let name = facts.config.name.to_string();
    let live = facts.live.as_ref();
    let state = state_of(facts);
    let (tracking, distrust) = tracking_of(live, &state);
    let repositories: Vec<VolumeRepositoryDocument> = repositories_of(config, facts, now);
    let default = repositories.first();
    let mut document = VolumeDocument {
        name,
        pid: live.map(|l| l.pid).filter(|p| *p != 0),
        keeper_pid: live.map(|l| l.keeper_pid).filter(|p| *p != 0),
        device: facts.config.device.display().to_string(),
        mountpoint: facts.mountpoint.clone(),
        node: config.node_of(facts.config).display().to_string(),
        mode: facts.config.mode.word().to_owned(),
        size_bytes: size_of(facts),
        block_size_bytes: facts.config.block_size.bytes(),
        tracking: tracking.to_owned(),
        distrust_reason: distrust.as_ref().map(|d| d.0.clone()),
        distrust_time: distrust
            .as_ref()
            .filter(|d| d.1 != 0)
            .map(|d| time::rfc3339(WallTime(d.1))),
        distrust_detail: distrust.map(|d| d.2).filter(|d| !d.is_empty()),
        changed_bytes: default.and_then(|r| r.changed_bytes),
        generation: live.map(|l| l.generation_number),
        last_image: default.and_then(|r| r.last_image.clone()),
        job: facts.job.clone(),
        warnings: live.map(|l| l.warnings.clone()).unwrap_or_default(),
        takeovers: live.map(|l| l.takeovers),
        longest_pause_seconds: live.map(|l| Duration::from_nanos(l.longest_pause_ns).as_secs_f64()),
        advice: Vec::new(),
        repositories,
        state,
    };
    advise(&mut document, facts);
    document
}

fn state_of(facts: &VolumeFacts<'_>) -> String {
    match &facts.live {
        Some(live) if live.state == "detaching" => "attached".to_owned(),
        Some(live) => live.state.clone(),
        None if facts.failed.is_some() => "failed".to_owned(),
        None => "detached".to_owned(),
    }
}

type Distrust = Option<(String, i64, String)>;

fn tracking_of(live: Option<&LiveFacts>, state: &str) -> (&'static str, Distrust) {
    match live {
        None => ("off", None),
        Some(live) if state == "passing-through" => (
            "off",
            Some(live.distrust.clone().unwrap_or_else(|| {
                let reason = Reason::TrackingInterrupted.code().to_owned();
                (reason, 0, "passed through".to_owned())
            })),
        ),
        Some(live) if live.distrust.is_some() => ("distrusted", live.distrust.clone()),
        Some(_) => ("trusted", None),
    }
}

fn size_of(facts: &VolumeFacts<'_>) -> Option<u64> {
    let recorded = || facts.records.repositories.values().next_back();
    facts
        .live
        .as_ref()
        .map(|l| l.volume_bytes)
        .or_else(|| recorded().map(|r| r.volume_bytes))
}

/// The default repository first, then all others that have something of it.
fn repositories_of(
    config: &Config,
    facts: &VolumeFacts<'_>,
    now: WallTime,
) -> Vec<VolumeRepositoryDocument> {
    let default = facts.config.repository.as_str();
    let others = facts
        .records
        .repositories
        .keys()
        .map(String::as_str)
        .filter(|name| *name != default);
    let known = |name: &str| {
        config
            .repositories
            .keys()
            .any(|registered| registered.as_str() == name)
    };
    std::iter::once(default)
        .chain(others.filter(|name| known(name)))
        .map(|name| repository(facts, name, now))
        .collect()
}

fn repository(facts: &VolumeFacts<'_>, name: &str, now: WallTime) -> VolumeRepositoryDocument {
    let record = facts.records.repositories.get(name);
    let since = record
        .and_then(|r| time::from_rfc3339(&r.time).ok())
        .unwrap_or(facts.configured);
    let age = u128::try_from(now.0.saturating_sub(since.0)).unwrap_or(0);
    let changed_bytes = record.and_then(|r| changed_since(facts, r));
    let reason = next_reason(facts, record, changed_bytes);
    let read = if reason.is_none() {
        changed_bytes
    } else {
        size_of(facts)
    };
    VolumeRepositoryDocument {
        repository: name.to_owned(),
        last_image: record.map(|r| format!("{}@{}", facts.config.name, r.number)),
        last_time: record.map(|r| r.time.clone()),
        overdue: age > facts.config.max_age.as_nanos(),
        changed_bytes,
        discarded_bytes: changed_bytes.map(|_| 0),
        next_kind: if reason.is_none() {
            "incremental"
        } else {
            "full"
        }
        .to_owned(),
        next_reason: reason,
        next_read_bytes: read,
    }
}

fn changed_since(facts: &VolumeFacts<'_>, record: &Record) -> Option<u64> {
    facts
        .live
        .as_ref()?
        .changed_bytes
        .iter()
        .find(|(generation, _)| *generation == record.generation)
        .and_then(|(_, bytes)| *bytes)
}

/// As far as this machine can tell; the repository may know better.
fn next_reason(
    facts: &VolumeFacts<'_>,
    record: Option<&Record>,
    changed: Option<u64>,
) -> Option<String> {
    let word = |reason: Reason| Some(reason.code().to_owned());
    let Some(record) = record else {
        return word(Reason::FirstBackup);
    };
    if record.block_size_bytes != facts.config.block_size.bytes() {
        return word(Reason::BlockSizeChanged);
    }
    let Some(live) = &facts.live else {
        // What the stored bitmap says is known after the attach only.
        return if facts.closed {
            None
        } else {
            word(Reason::TrackingInterrupted)
        };
    };
    if record.volume_bytes != live.volume_bytes {
        return word(Reason::Resized);
    }
    if let Some((reason, _, _)) = &live.distrust {
        return Some(reason.clone());
    }
    if changed.is_none() {
        return word(Reason::BitmapStale);
    }
    None
}

/// What wants a person, and what to type.
fn advise(document: &mut VolumeDocument, facts: &VolumeFacts<'_>) {
    let name = &document.name;
    let mut advice = Vec::new();
    if let Some(why) = &facts.failed {
        advice.push(format!(
            "{name} could not be attached: {why}. Then: blktidectl attach {name}"
        ));
        document.warnings.push("attach-failed".to_owned());
    } else if document.state == "passing-through" {
        advice.push(format!(
            "{name} passes everything through, untracked. Unmount it, then: blktidectl detach {name} && blktidectl attach {name}"
        ));
        document.warnings.push("passing-through".to_owned());
    } else if document.state == "detached" && facts.config.attach == Attach::Boot {
        let then = match facts.config.mode {
            Mode::Watch => String::new(),
            Mode::Auto | Mode::Ublk | Mode::Fuse => format!(", then mount {}", document.node),
        };
        advice.push(format!(
            "{name} is not tracked. blktidectl attach {name}{then}"
        ));
        document.warnings.push("detached".to_owned());
    }
    if document.pid.is_some() && document.keeper_pid.is_none() {
        advice.push(format!(
            "{name} has lost its keeper; blktided starts a new one by itself while it runs"
        ));
        document.warnings.push("keeper-dead".to_owned());
    }
    for repository in document.repositories.iter().filter(|r| r.overdue) {
        let age = unit::duration(facts.config.max_age);
        advice.push(format!(
            "{name}: no image in {} for {age}. blktidectl backup {name} -r {}",
            repository.repository, repository.repository
        ));
        document.warnings.push("overdue".to_owned());
    }
    if document.distrust_reason.as_deref() == Some(Reason::TrackerSuspect.code()) {
        advice.push(format!(
            "{name}: a missed change was found; please report it. blktidectl backup {name} --full"
        ));
    }
    document.advice = advice;
}

#[cfg(test)]
mod tests;
