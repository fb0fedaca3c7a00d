//! The methods of `io.blktide`, and who may call them.

use crate::backup::{self, Ask, Checked};
use crate::daemon::Shared;
use crate::peers;
use crate::socket::Connection;
use crate::supervise;
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::message::{PROGRESS, ProgressDocument};
use blktide_api::name::Name;
use blktide_api::wire::{Answer, Call, INTERFACE};
use blktide_job::running::{OnProgress, Progress};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a cancel waits for the jobs to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfVolume {
    volume: Name,
    #[serde(default)]
    job: Option<u64>,
    /// Of a detach: a watched volume that is in use is let go of, too.
    #[serde(default)]
    live: bool,
}

/// Answers one call.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    connection: &mut Connection,
    (uid, gid): (u32, u32),
    call: Call,
) -> io::Result<()> {
    let method = call.method.as_str();
    let answered = match method {
        "org.varlink.service.GetInfo" => Ok(json!({
            "vendor": "blktide", "product": "blktided", "version": env!("CARGO_PKG_VERSION"),
            "url": "", "interfaces": ["org.varlink.service", "io.blktide"],
        })),
        "org.varlink.service.GetInterfaceDescription" => Ok(json!({ "description": INTERFACE })),
        "io.blktide.Jobs" => Ok(jobs(shared)),
        "io.blktide.Attach" | "io.blktide.Detach" | "io.blktide.Backup" | "io.blktide.Cancel"
        | "io.blktide.Reload" => {
            let group = shared.config().socket_group.clone();
            if peers::may_change(uid, gid, group.as_deref()) {
                if method == "io.blktide.Backup" {
                    return back_up(shared, connection, call).await;
                }
                change(shared, method, call.parameters).await
            } else {
                Err(not_permitted(uid))
            }
        }
        _ => {
            let answer = Answer::service_error("MethodNotFound", "method", method);
            return connection.send(&answer).await;
        }
    };
    if call.oneway {
        return Ok(());
    }
    let answer = match answered {
        Ok(parameters) => Answer::with(parameters, false),
        Err(failure) => Answer::failure(&failure.document()),
    };
    connection.send(&answer).await
}

fn not_permitted(uid: u32) -> Failure {
    Failure::new(
        FailureCode::NotPermitted,
        format!("user {uid} may not do that"),
    )
    .hint("Run it as root, or as a member of the `socket_group` of the configuration.")
}

fn jobs(shared: &Shared) -> Value {
    let failed: Vec<Value> = shared
        .failures()
        .into_iter()
        .map(|(volume, message)| json!({ "volume": volume, "message": message }))
        .collect();
    json!({ "pid": std::process::id(), "jobs": shared.jobs.list(), "failed": failed })
}

/// Methods that may take their time: in a thread, so that the socket goes on answering.
async fn change(shared: &Arc<Shared>, method: &str, parameters: Value) -> Result<Value, Failure> {
    let (shared, method) = (Arc::clone(shared), method.to_owned());
    in_a_thread(move || {
        if method == "io.blktide.Reload" {
            return shared.reload().map(|lines| json!({ "lines": lines }));
        }
        let of: OfVolume = parse(parameters)?;
        match method.as_str() {
            "io.blktide.Attach" => {
                supervise::attach(&shared, &of.volume).map(|lines| json!({ "lines": lines }))
            }
            "io.blktide.Detach" => supervise::detach(&shared, &of.volume, of.live)
                .map(|lines| json!({ "lines": lines })),
            _ => {
                backup::volume_of(&shared.config(), &of.volume)?;
                let count = shared.jobs.cancel(Some(&of.volume), of.job, CANCEL_LIMIT);
                Ok(json!({ "cancelled": count }))
            }
        }
    })
    .await
}

fn parse<T: for<'de> Deserialize<'de>>(parameters: Value) -> Result<T, Failure> {
    serde_json::from_value(parameters)
        .map_err(|e| Failure::new(FailureCode::Usage, format!("the request is wrong: {e}")))
}

/// Runs `work` in a thread of its own: it may hang for ever, and no pool must run dry of it.
async fn in_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let (send, receive) = oneshot::channel();
    let spawned = std::thread::Builder::new()
        .name("method".to_owned())
        .spawn(move || drop(send.send(work())));
    if let Err(error) = spawned {
        return Err(Failure::new(
            FailureCode::Failed,
            format!("no thread could be started: {error}"),
        ));
    }
    receive.await.unwrap_or_else(|_| {
        Err(Failure::new(
            FailureCode::Failed,
            "a thread of blktided died of a fault of its own",
        ))
    })
}

/// A backup. It goes on if the client goes away: a lost terminal does not cancel.
async fn back_up(shared: &Arc<Shared>, connection: &mut Connection, call: Call) -> io::Result<()> {
    let checked = parse::<Ask>(call.parameters)
        .and_then(|ask| backup::check(&shared.config(), ask).map(|c| (c.dry_run(), c)));
    let (dry_run, checked) = match checked {
        Ok(checked) => checked,
        Err(failure) => return connection.send(&Answer::failure(&failure.document())).await,
    };
    let (progress, mut heard) = mpsc::channel(64);
    let working = Arc::clone(shared);
    let mut work = Box::pin(in_a_thread(move || {
        if dry_run {
            let plan = backup::preview(&working, &checked)?;
            Ok(serde_json::to_value(plan).unwrap_or_default())
        } else {
            run(&working, &checked, &progress)
        }
    }));
    let mut listening = call.more;
    let result = loop {
        tokio::select! {
            biased;
            Some(parameters) = heard.recv(), if listening => {
                if connection.send(&Answer::with(parameters, true)).await.is_err() {
                    listening = false;
                }
            }
            result = &mut work => break result,
        }
    };
    let answer = match result {
        Ok(document) => Answer::with(json!({ "document": document }), false),
        Err(failure) => Answer::failure(&failure.document()),
    };
    connection.send(&answer).await
}

/// Queues, runs, and tells how far it is.
fn run(
    shared: &Arc<Shared>,
    checked: &Checked,
    progress: &mpsc::Sender<Value>,
) -> Result<Value, Failure> {
    let (volume, now) = (checked.volume().clone(), shared.environment.clock.wall());
    let place = shared
        .jobs
        .enter(&volume, checked.repository.clone(), now)
        .ok_or_else(|| Failure::new(FailureCode::Cancelled, "blktided is stopping"))?;
    let id = place.job.id;
    let tell = {
        let (progress, volume) = (progress.clone(), volume.to_string());
        move |state: &str, at: Progress| {
            let document = ProgressDocument {
                message_type: PROGRESS.to_owned(),
                volume: volume.clone(),
                state: state.to_owned(),
                done_bytes: at.done_bytes,
                total_bytes: at.total_bytes,
                stored_bytes: at.stored_bytes,
            };
            let message = json!({ "job": id, "progress": document });
            // A client that is slow misses some of it.
            drop(progress.try_send(message));
        }
    };
    tell("queued", Progress::default());
    if !place.wait_for_turn() {
        return Err(Failure::new(
            FailureCode::Cancelled,
            format!("{volume}: cancelled before it began"),
        ));
    }
    tell("running", Progress::default());
    tracing::info!(%volume, repository = checked.repository, job = id, "backup begins");
    let on_progress: OnProgress = Arc::new(move |at| tell("running", at));
    let result = backup::run(shared, checked, &place, on_progress);
    match &result {
        Ok(done) => {
            let (image, kind) = (&done.image, &done.kind);
            let (read_bytes, stored_bytes) = (done.read_bytes, done.stored_bytes);
            tracing::info!(%volume, job = id, image, kind, read_bytes, stored_bytes, "backup done");
        }
        Err(failure) => {
            tracing::warn!(%volume, job = id, code = %failure.code, "backup failed: {failure}");
        }
    }
    drop(place);
    result.map(|summary| serde_json::to_value(summary).unwrap_or_default())
}
