//! `restore`: an image to a new file, or over what a file or device holds.
//!
//! **Invariant**: nothing is written before every refusal has been looked for and every question answered; and before a volume's
//! backing device is written its bitmap file is gone, durably, whether the daemon runs or not (P15): `claim → forget → write`.

mod bitmaps;
mod facts;

use anyhow::Result as Anyhow;
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::{ImageName, Name};
use blktide_api::unit::size;
use blktide_format::manifest::ImageHead;
use blktide_image::ImageReader;
use blktide_job::error::JobError;
use blktide_job::file_target::{Claimed, FileTarget};
use blktide_job::restore::{self, Background, ReadBack, RestoreReport, RestoreRequest};
use blktide_job::target::{Contents, TargetFacts, TargetKind, check};
use blktide_sys::clock::SystemClock;
use blktide_types::clock::Clock;
use blktide_types::range::BlockRange;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

use crate::context::{Common, environment};
use crate::interrupt::Interrupts;
use crate::output;
use crate::repositories::{RepositoryOption, find, image_name, job_failure};

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub(crate) struct Args {
    /// [HOST/]VOLUME@NUMBER, @latest or @TIME
    pub(crate) image: ImageName,
    /// A new file, a file or a device
    pub(crate) target: PathBuf,
    /// The target may hold something; it is written over
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Read the target and write only what differs
    #[arg(long)]
    pub(crate) differing_only: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
}

/// Restores. Exit 5 if blocks of the image are damaged: all others are restored, those read as zeroes and are listed.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let interrupts = Interrupts::new()?;
    let (place, repository, entry) = find(&args.image, &args.repository, common)?;
    let head = &entry.head;
    let facts = facts::of(&args.target, &place.path)
        .map_err(|error| Failure::new(FailureCode::Failed, format!("{error:#}")))?;
    let contents = if args.overwrite {
        Contents::Overwrite
    } else {
        Contents::Keep
    };
    let geometry = head.geometry;
    check(
        &facts,
        geometry.volume_bytes(),
        geometry.logical_sector_bytes(),
        contents,
    )
    .map_err(|refusal| job_failure(&JobError::Refused(refusal)))?;
    bitmaps::configuration(common)?;
    if !confirmed(args, head, &facts, common)? {
        return Ok(Exit::Done);
    }
    let begun = SystemClock.now();
    let (target, forgotten) = open_target(args, head, &facts, common)?;
    let target = Arc::new(target);
    let (volume, sequence) = (head.volume, head.sequence);
    let request = RestoreRequest {
        image: Box::new(move || ImageReader::open(&repository, volume, sequence)),
        background: target.background(),
        read_back: args
            .differing_only
            .then(|| Arc::clone(&target) as Arc<dyn ReadBack>),
        target,
        workers: 0,
    };
    let environment = environment(output::progress(common, "restoring"));
    let outcome =
        restore::start(request, &environment).and_then(|running| interrupts.wait(running));
    let report = outcome.map_err(|error| {
        remove_new(args, &facts);
        place.failure(&error)
    })?;
    let seconds = SystemClock.now().since(begun).as_secs_f64();
    tell(
        args,
        &report,
        next_steps(&report, &facts, &forgotten),
        seconds,
        common,
    );
    Ok(if report.damaged.is_empty() {
        Exit::Done
    } else {
        Exit::Damage
    })
}

/// Whether to go on. False: it was a dry run.
fn confirmed(
    args: &Args,
    head: &ImageHead,
    facts: &TargetFacts,
    common: &Common,
) -> Result<bool, Failure> {
    let what = match facts.kind {
        TargetKind::NewFile => "a new file".to_owned(),
        TargetKind::File => format!(
            "the file, {}",
            facts.signature.as_deref().unwrap_or("empty")
        ),
        TargetKind::Device => format!(
            "{}, {}, holding {}",
            facts::device_words(&args.target),
            size(facts.bytes),
            facts
                .signature
                .as_deref()
                .unwrap_or("nothing that is known")
        ),
    };
    let plan = format!(
        "{} ({}) is restored to {}: {what}",
        image_name(head),
        size(head.geometry.volume_bytes()),
        args.target.display()
    );
    if args.dry_run {
        output::text(common, &plan);
        if common.json {
            output::document(
                &json!({"message_type": "plan", "image": image_name(head), "target": args.target, "what": what}),
            );
        }
        return Ok(false);
    }
    if facts.kind == TargetKind::NewFile || args.yes {
        return Ok(true);
    }
    output::complain(&plan);
    if output::asked("Everything that it holds will be gone. Go on?") {
        return Ok(true);
    }
    Err(Failure::new(
        FailureCode::ConfirmationNeeded,
        format!(
            "{} would be written over, and nobody said yes",
            args.target.display()
        ),
    )
    .hint("look at it with --dry-run; then --yes"))
}

/// Opens the target, ready to be written, and says which volumes' bitmaps went for it.
fn open_target(
    args: &Args,
    head: &ImageHead,
    facts: &TargetFacts,
    common: &Common,
) -> Result<(FileTarget, Vec<Name>), Failure> {
    let path = &args.target;
    let claimed = match facts.kind {
        TargetKind::NewFile => Claimed::create(path),
        TargetKind::File => Claimed::file(path),
        TargetKind::Device => Claimed::device(path),
    };
    let claimed = claimed.map_err(|error| job_failure(&error))?;
    let fresh = facts.kind == TargetKind::NewFile;
    // Read again, now that the target is ours: a volume may have come meanwhile.
    let opened = bitmaps::configuration(common)
        .and_then(|config| bitmaps::forget(path, fresh, head.volume, &config))
        .and_then(|forgotten| {
            for volume in &forgotten {
                output::complain(&format!(
                    "the target is volume {volume}, or may be under it: its bitmap file is gone"
                ));
            }
            let keep = if args.differing_only {
                Background::Unknown
            } else {
                Background::Zero
            };
            let ready = claimed.ready(head.geometry.volume_bytes(), keep);
            Ok((ready.map_err(|error| job_failure(&error))?, forgotten))
        });
    opened.inspect_err(|_| remove_new(args, facts))
}

/// Half an image is of use to nobody; should it stay, its head is zero and it mounts nowhere.
fn remove_new(args: &Args, facts: &TargetFacts) {
    if facts.kind == TargetKind::NewFile {
        drop(std::fs::remove_file(&args.target));
    }
}

fn tell(args: &Args, report: &RestoreReport, next: Vec<String>, seconds: f64, common: &Common) {
    if common.json {
        output::document(&json!({
            "message_type": "restore",
            "image": image_name(&report.head),
            "image_id": report.head.image.to_string(),
            "target": args.target,
            "volume_bytes": report.head.geometry.volume_bytes(),
            "written_bytes": report.written_bytes,
            "zeroed_bytes": report.zeroed_bytes,
            "equal_bytes": report.equal_bytes,
            "damaged": ranges_json(&report.damaged),
            "unreadable": ranges_json(&report.unreadable),
            "absent": ranges_json(&report.absent),
            "seconds": seconds,
            "next": next,
        }));
        return;
    }
    for range in &report.damaged {
        let what = report.damage.as_deref().unwrap_or_default();
        output::complain(&format!(
            "damaged, zeroes instead: blocks {} ({what})",
            words(*range)
        ));
    }
    for range in &report.unreadable {
        output::complain(&format!(
            "the device could not read these when the image was made: blocks {}",
            words(*range)
        ));
    }
    output::text(
        common,
        &format!(
            "{} restored to {}: {} written, {} equal already, {seconds:.1} s",
            image_name(&report.head),
            args.target.display(),
            size(report.written_bytes),
            size(report.equal_bytes)
        ),
    );
    for step in next {
        output::text(common, &format!("next: {step}"));
    }
}

fn next_steps(report: &RestoreReport, facts: &TargetFacts, forgotten: &[Name]) -> Vec<String> {
    let full = |volume: &Name| format!("the next backup of volume {volume} reads everything");
    let mut steps: Vec<String> = forgotten.iter().map(full).collect();
    if facts.kind == TargetKind::Device && facts.bytes > report.head.geometry.volume_bytes() {
        steps.push("the device is larger than the volume was: resize2fs or xfs_growfs".to_owned());
    }
    if facts.kind != TargetKind::NewFile {
        steps.push("the original has the same UUID: do not mount both (XFS: -o nouuid)".to_owned());
    }
    steps
}

fn words(range: BlockRange) -> String {
    format!("{} to {}", range.start().0, range.end().0.saturating_sub(1))
}

fn ranges_json(ranges: &[BlockRange]) -> Vec<Value> {
    ranges
        .iter()
        .map(|r| json!({"first_block": r.start().0, "blocks": r.count().0}))
        .collect()
}

/// For [`facts`]: an error with what it is about.
type Found<T> = Anyhow<T>;
