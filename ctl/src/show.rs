//! `show`: the facts of one image, and why it is what it is, without reading a block.

use blktide_api::failure::{Exit, Failure};
use blktide_api::name::ImageName;
use blktide_api::time::{local, rfc3339};
use blktide_api::unit::size;
use blktide_format::manifest::{Consistency, ImageHead};
use blktide_types::reason::Reason;
use serde_json::{Value, json};
use std::time::Duration;

use crate::context::Common;
use crate::images::kind_word;
use crate::output;
use crate::repositories::{RepositoryOption, find, image_name};

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// [HOST/]VOLUME@NUMBER, @latest or @TIME
    pub(crate) image: ImageName,
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
}

/// Shows. Cost: two small reads for each image of the volume.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let (place, _repository, entry) = find(&args.image, &args.repository, common)?;
    if common.json {
        output::document(&facts(&place.name, &entry.head));
    } else {
        for (name, value) in lines(&place.name, &entry.head) {
            output::text(common, &format!("{name:16} {value}"));
        }
    }
    Ok(Exit::Done)
}

const fn consistency_word(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Unmounted => "unmounted",
        Consistency::Frozen => "frozen",
        Consistency::Instant => "instant",
        Consistency::None => "none",
    }
}

fn facts(repository: &str, head: &ImageHead) -> Value {
    let counters = &head.counters;
    json!({
        "message_type": "image",
        "image": image_name(head),
        "image_id": head.image.to_string(),
        "number": head.sequence,
        "host": head.host_name,
        "host_id": head.host.to_string(),
        "repository": repository,
        "volume": head.volume_name,
        "volume_id": head.volume.to_string(),
        "device": head.device,
        "kind": kind_word(head.kind),
        "reason": head.reason.map(Reason::code),
        "reason_text": head.reason.map(reason_text),
        "consistency": consistency_word(head.consistency),
        "time": rfc3339(head.instant),
        "commit_time": rfc3339(head.committed),
        "base_image_id": head.base.map(|(id, _)| id.to_string()),
        "base_number": head.base.map(|(_, number)| number),
        "state_id": head.state.to_string(),
        "base_state_id": head.base.map(|_| head.base_state.to_string()),
        "generation": head.generation.to_string(),
        "volume_bytes": head.geometry.volume_bytes(),
        "block_size_bytes": head.geometry.block_size().bytes(),
        "grain_bytes": head.geometry.grain().bytes(),
        "logical_sector_bytes": head.geometry.logical_sector_bytes(),
        "read_bytes": counters.read_bytes,
        "changed_bytes": counters.changed_bytes,
        "stored_bytes": counters.stored_bytes,
        "preserved_bytes": counters.preserved_bytes,
        "data_blocks": head.kinds.data,
        "zero_blocks": head.kinds.zero,
        "unreadable_blocks": head.kinds.unreadable,
        "seconds": Duration::from_nanos(counters.duration_ns).as_secs_f64(),
        "longest_wait_seconds": Duration::from_nanos(counters.longest_wait_ns).as_secs_f64(),
        "longest_freeze_seconds": Duration::from_nanos(counters.longest_freeze_ns).as_secs_f64(),
    })
}

fn lines(repository: &str, head: &ImageHead) -> Vec<(&'static str, String)> {
    let why = head.reason.map_or_else(
        || kind_word(head.kind).to_owned(),
        |r| format!("{}: {r}", kind_word(head.kind)),
    );
    let mut out = vec![
        ("image", format!("{} in {repository}", image_name(head))),
        ("id", head.image.to_string()),
        (
            "time",
            format!(
                "{} ({})",
                local(head.instant),
                consistency_word(head.consistency)
            ),
        ),
        ("kind", why),
    ];
    if let Some(reason) = head.reason {
        out.push(("", reason_text(reason).to_owned()));
    }
    if let Some((_, number)) = head.base {
        out.push((
            "built on",
            format!("{}@{number}; complete by itself", head.volume_name),
        ));
    }
    out.extend([
        (
            "volume",
            format!(
                "{}, blocks of {}, {}",
                size(head.geometry.volume_bytes()),
                size(head.geometry.block_size().bytes_u64()),
                head.device
            ),
        ),
        (
            "read, stored",
            format!(
                "{}, {}",
                size(head.counters.read_bytes),
                size(head.counters.stored_bytes)
            ),
        ),
        (
            "blocks",
            format!(
                "{} with content, {} of zeroes, {} unreadable",
                head.kinds.data, head.kinds.zero, head.kinds.unreadable
            ),
        ),
        ("state id", head.state.to_string()),
    ]);
    out
}

/// What a reason means, in one sentence. The manual has a section for each (docs/failures.md).
const fn reason_text(reason: Reason) -> &'static str {
    match reason {
        Reason::FirstBackup => "there was no image of this volume in this repository yet",
        Reason::Asked => "a full backup was asked for",
        Reason::BitmapMissing => {
            "the bitmap file or the marker of the last clean stop was not there"
        }
        Reason::BitmapDamaged => "the bitmap file or the marker failed its checks",
        Reason::BitmapOtherVolume => "the bitmap file was another volume's",
        Reason::BitmapOtherSize => "the bitmap file counted other blocks than the volume has",
        Reason::BitmapStale => {
            "the bitmap was of another life, or did not know the instant of the last image"
        }
        Reason::UncleanShutdown => "the machine had gone down without a clean stop of the volume",
        Reason::ForeignWrite => "the volume had been written while the tracker was away",
        Reason::ForeignWriteUnknown => {
            "nothing on the volume could show a write while the tracker was away"
        }
        Reason::CloneDetected => {
            "another machine had backed up the same volume into this repository"
        }
        Reason::DeviceChanged => "the backing device was another than at the last image",
        Reason::Resized => "the volume had another size than at the last image",
        Reason::TrackingInterrupted => {
            "tracking had a gap: a failed attach, a pass-through, or both processes dead"
        }
        Reason::TrackerSuspect => "a canary or an audit had found a missed change",
        Reason::BaseImageGone => {
            "the last image, or something it needs, was gone from the repository"
        }
        Reason::BlockSizeChanged => "the block size had been changed",
        Reason::BootNotCovered => "the last writes before the boot could not be seen",
    }
}
