//! What is said: documents and text on standard output, progress and errors on standard error.

use blktide_api::failure::{Exit, Failure};
use blktide_api::message::{DONE, DoneDocument};
use blktide_job::running::{OnProgress, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use crate::context::Common;

/// The exit code of the process.
pub(crate) fn exit_code(exit: Exit) -> ExitCode {
    ExitCode::from(exit.number())
}

/// Prints a document as one line of JSON.
pub(crate) fn document(value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => line(&text),
        Err(error) => complain(&format!("a document could not be written: {error}")),
    }
}

/// Tells what was done: lines for people, a document for scripts.
pub(crate) fn done(common: &Common, verb: &str, names: &[String], lines: &[String]) {
    for line in lines {
        text(common, line);
    }
    if common.json {
        document(&DoneDocument {
            message_type: DONE.to_owned(),
            verb: verb.to_owned(),
            names: names.to_vec(),
            lines: lines.to_vec(),
            warnings: Vec::new(),
        });
    }
}

/// Prints a line for people, unless they asked for quiet or JSON.
pub(crate) fn text(common: &Common, words: &str) {
    if !common.quiet && !common.json {
        line(words);
    }
}

/// A line on standard output. A reader that went away (`| head`) is none of our business.
fn line(words: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{words}"));
}

/// A line on standard error.
pub(crate) fn complain(words: &str) {
    let mut err = std::io::stderr().lock();
    drop(writeln!(err, "{words}"));
}

/// Tells of a failure: the text and what to do next on standard error, the document on standard output if JSON is wanted.
pub(crate) fn failure(failure: &Failure, common: &Common) -> ExitCode {
    complain(&format!("blktidectl: {}", failure.message));
    if !failure.hint.is_empty() {
        complain(&format!("            {}", failure.hint));
    }
    if common.json {
        document(&failure.document());
    }
    exit_code(failure.exit())
}

/// A line that shows how far a job is, where there is a terminal to show it.
pub(crate) fn progress(common: &Common, what: &'static str) -> Option<OnProgress> {
    if common.quiet || common.json || !std::io::stderr().is_terminal() {
        return None;
    }
    let style = ProgressStyle::with_template(
        "{prefix} {percent:>3} %  {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style).with_prefix(what);
    Some(Arc::new(move |progress: Progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        if progress.done_bytes >= progress.total_bytes && progress.total_bytes > 0 {
            bar.finish_and_clear();
        }
    }))
}

/// Asks on the terminal; false without one.
pub(crate) fn asked(question: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    let mut err = std::io::stderr().lock();
    drop(write!(err, "{question} [y/N] "));
    drop(err.flush());
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}
