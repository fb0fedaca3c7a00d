//! `backup`: asks the daemon for backups and tells how they go. Ctrl-C cancels; a lost terminal does not.

use blktide_api::client::{Client, LIMIT};
use blktide_api::config::Config;
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::message::{PlanDocument, ProgressDocument, SummaryDocument};
use blktide_api::name::Name;
use blktide_api::time::{from_rfc3339, local};
use blktide_api::unit::{duration, parse_duration, parse_rate, size};
use blktide_job::running::{OnProgress, Progress};
use blktide_sys::event::{SignalFd, Signals, wait_readable};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::context::Common;
use crate::output;
use crate::repositories::RepositoryOption;

/// How often it is looked whether the daemon has answered while signals are waited for.
const LOOK: Duration = Duration::from_millis(20);

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the interface"
)]
pub(crate) struct Args {
    /// The volumes
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) volumes: Vec<Name>,
    /// Every volume that is configured
    #[arg(long)]
    pub(crate) all: bool,
    /// Read and store everything, sharing nothing with an earlier image
    #[arg(long)]
    pub(crate) full: bool,
    /// Blocks that the file system does not use, too
    #[arg(long)]
    pub(crate) all_blocks: bool,
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    /// Read no faster than this, e.g. "200 MiB/s"; 0: no limit
    #[arg(long, value_name = "S")]
    pub(crate) max_read_rate: Option<String>,
    /// Wait so long for a quiet moment first (not built yet)
    #[arg(long, value_name = "S")]
    pub(crate) wait_quiet: Option<String>,
    /// Say what would be done: kind, reason, bytes
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// One JSON document a line: progress, the last being the summary
    #[arg(long)]
    pub(crate) json_lines: bool,
}

/// What all volumes' requests have in common.
struct Asking<'a> {
    config: &'a Config,
    common: &'a Common,
    form: Form,
    signals: &'a SignalFd,
}

/// How documents are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
    JsonLines,
}

/// Backs up one volume after the other; one that fails does not keep the others from theirs.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let parameters = parameters(args)?;
    let config = common.load()?;
    let names = if args.all {
        config.volumes.keys().cloned().collect()
    } else {
        args.volumes.clone()
    };
    if names.is_empty() {
        return Err(
            Failure::new(FailureCode::NoSuchVolume, "no volume is configured")
                .hint("blktidectl volume add NAME --device PATH"),
        );
    }
    let signals = SignalFd::new(&[Signals::Interrupt, Signals::Terminate])
        .map_err(|e| Failure::new(FailureCode::Failed, e.to_string()))?;
    let form = match (args.json_lines, common.json) {
        (true, _) => Form::JsonLines,
        (false, true) => Form::Json,
        (false, false) => Form::Text,
    };
    let with = Asking {
        config: &config,
        common,
        form,
        signals: &signals,
    };
    let mut outcomes = Vec::new();
    for name in names {
        let outcome = one(&with, &name, &parameters);
        if form == Form::JsonLines
            && let Ok(document) = &outcome
        {
            print(document);
        }
        let interrupted =
            matches!(&outcome, Err(failure) if failure.code == FailureCode::Interrupted);
        outcomes.push(outcome);
        if interrupted {
            break;
        }
    }
    conclude(outcomes, form, common, args)
}

fn parameters(args: &Args) -> Result<Value, Failure> {
    let usage = |text: String| Failure::new(FailureCode::Usage, text);
    if let Some(time) = &args.wait_quiet {
        parse_duration(time).map_err(|e| usage(e.to_string()))?;
        return Err(Failure::new(
            FailureCode::NotBuiltYet,
            "--wait-quiet is not built yet",
        ));
    }
    let repository = args.repository.asked()?.map(|r| absolute(&r.to_string()));
    let rate = args
        .max_read_rate
        .as_deref()
        .map(parse_rate)
        .transpose()
        .map_err(|e| usage(e.to_string()))?;
    Ok(json!({
        "repository": repository,
        "full": args.full,
        "all_blocks": args.all_blocks,
        "max_read_rate": rate.map(|r| r.unwrap_or(0)),
        "dry_run": args.dry_run,
    }))
}

/// The daemon has another working directory.
fn absolute(reference: &str) -> String {
    if !reference.contains('/') {
        return reference.to_owned();
    }
    std::path::absolute(PathBuf::from(reference))
        .map_or_else(|_| reference.to_owned(), |p| p.display().to_string())
}

fn one(with: &Asking<'_>, name: &Name, parameters: &Value) -> Result<Value, Failure> {
    let mut parameters = parameters.clone();
    if let Some(map) = parameters.as_object_mut() {
        map.insert("volume".to_owned(), json!(name));
    }
    let mut client = Client::connect(&with.config.socket(), None)?;
    let job = Arc::new(AtomicU64::new(0));
    let (heard, shown) = (Arc::clone(&job), listener(with.form, with.common));
    let asking = thread::spawn(move || {
        client.call_more("Backup", parameters, true, &mut |answer| {
            if let Some(number) = answer.get("job").and_then(Value::as_u64) {
                heard.store(number, Ordering::SeqCst);
            }
            if let Some(progress) = answer.get("progress") {
                shown(progress);
            }
        })
    });
    let mut interrupted = false;
    while !asking.is_finished() {
        let arrived = wait_readable(with.signals, Some(LOOK)).unwrap_or(false);
        if arrived && with.signals.take().is_ok_and(|signal| signal.is_some()) {
            interrupted = true;
            cancel(with.config, name, job.load(Ordering::SeqCst));
        }
    }
    let died = || Failure::new(FailureCode::Failed, "a thread died of a fault of its own");
    let answer = asking.join().map_err(|_panic| died())?;
    match answer {
        Ok(mut reply) => Ok(reply
            .get_mut("document")
            .map(Value::take)
            .unwrap_or_default()),
        Err(failure) if interrupted && failure.code == FailureCode::Cancelled => Err(Failure {
            code: FailureCode::Interrupted,
            ..failure
        }),
        Err(failure) => Err(failure),
    }
}

/// Asks for the job's end; the answer to the backup itself tells whether it came in time.
fn cancel(config: &Config, name: &Name, job: u64) {
    let mut parameters = json!({ "volume": name });
    if job != 0
        && let Some(map) = parameters.as_object_mut()
    {
        map.insert("job".to_owned(), json!(job));
    }
    let asked = Client::connect(&config.socket(), Some(LIMIT * 2))
        .and_then(|mut client| client.call("Cancel", parameters));
    if let Err(failure) = asked {
        output::complain(&format!("the backup could not be cancelled: {failure}"));
    }
}

fn listener(form: Form, common: &Common) -> Box<dyn Fn(&Value) + Send> {
    let bar: Option<OnProgress> = if form == Form::Text {
        output::progress(common, "reading")
    } else {
        None
    };
    Box::new(move |value| {
        let Ok(at) = serde_json::from_value::<ProgressDocument>(value.clone()) else {
            return;
        };
        if form == Form::JsonLines {
            output::document(&at);
        } else if let Some(bar) = &bar {
            bar(Progress {
                done_bytes: at.done_bytes,
                total_bytes: at.total_bytes,
                stored_bytes: at.stored_bytes,
            });
        }
    })
}

fn conclude(
    outcomes: Vec<Result<Value, Failure>>,
    form: Form,
    common: &Common,
    args: &Args,
) -> Result<Exit, Failure> {
    let single = outcomes.len() == 1 && !args.all;
    let mut exit = Exit::Done;
    let mut documents = Vec::new();
    let mut first_failure: Option<Failure> = None;
    for outcome in outcomes {
        match outcome {
            Ok(document) => {
                if form == Form::Text {
                    tell(&document, common);
                }
                if has_warnings(&document) && exit == Exit::Done {
                    exit = Exit::Warnings;
                }
                documents.push(document);
            }
            Err(failure) if single => {
                if form == Form::JsonLines && !common.json {
                    output::document(&failure.document());
                }
                return Err(failure);
            }
            Err(failure) => {
                output::complain(&format!("blktidectl: {failure}"));
                if !failure.hint.is_empty() {
                    output::complain(&format!("            {}", failure.hint));
                }
                documents.push(serde_json::to_value(failure.document()).unwrap_or_default());
                if form == Form::JsonLines {
                    output::document(&failure.document());
                }
                first_failure.get_or_insert(failure);
            }
        }
    }
    if form == Form::Json {
        match (single, documents.pop()) {
            (true, Some(document)) => print(&document),
            (_, last) => {
                documents.extend(last);
                output::document(&json!({ "message_type": "summaries", "summaries": documents }));
            }
        }
    }
    Ok(first_failure.map_or(exit, |failure| failure.exit()))
}

/// A document as its type has it: `message_type` comes first.
fn print(document: &Value) {
    if let Ok(summary) = serde_json::from_value::<SummaryDocument>(document.clone()) {
        output::document(&summary);
    } else if let Ok(plan) = serde_json::from_value::<PlanDocument>(document.clone()) {
        output::document(&plan);
    } else {
        output::document(document);
    }
}

fn has_warnings(document: &Value) -> bool {
    document
        .get("warnings")
        .and_then(Value::as_array)
        .is_some_and(|warnings| !warnings.is_empty())
}

fn tell(document: &Value, common: &Common) {
    if let Ok(plan) = serde_json::from_value::<PlanDocument>(document.clone()) {
        let why = plan
            .reason
            .map_or_else(String::new, |reason| format!(" ({reason})"));
        output::text(
            common,
            &format!(
                "{}: would be {}{why}: reads {} of {}, stores at most {}; {} free in {}",
                plan.volume,
                plan.kind,
                size(plan.read_bytes),
                size(plan.volume_bytes),
                size(plan.stored_bytes_max),
                size(plan.free_bytes),
                plan.repository,
            ),
        );
    } else if let Ok(summary) = serde_json::from_value::<SummaryDocument>(document.clone()) {
        tell_summary(&summary, common);
    }
}

fn tell_summary(summary: &SummaryDocument, common: &Common) {
    let say = |text: String| output::text(common, &text);
    let why = summary
        .reason
        .as_deref()
        .map_or_else(String::new, |reason| format!(" ({reason})"));
    say(format!(
        "{} in {}: {}{why}, read {} of {}, changed {}, stored {}, {}",
        summary.image,
        summary.repository,
        summary.kind,
        size(summary.read_bytes),
        size(summary.volume_bytes),
        size(summary.changed_bytes),
        size(summary.stored_bytes),
        duration(Duration::try_from_secs_f64(summary.seconds).unwrap_or_default()),
    ));
    if let Some(text) = &summary.reason_text {
        say(format!("  {text}"));
    }
    if summary.save_area_in_memory {
        say(
            "  The save area lies on the volume itself: originals were kept in memory instead."
                .to_owned(),
        );
    }
    for warning in &summary.warnings {
        say(format!("  warning: {warning}"));
    }
    if common.verbose {
        let time = from_rfc3339(&summary.time).map_or_else(|_| summary.time.clone(), local);
        say(format!("  its instant: {time} ({})", summary.consistency));
        say(format!(
            "  originals kept: {}, at most {} at a time; longest wait of a write: {:.1} ms",
            size(summary.preserved_bytes),
            size(summary.save_area_peak_bytes),
            summary.longest_wait_seconds * 1000.0,
        ));
    }
}
