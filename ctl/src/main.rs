//! blktidectl: one file a verb.
//!
//! Verbs that give orders ask the daemon; verbs that only read a repository (`images`, `show`, `restore`, `verify`) do it
//! here, and with `-r PATH` need neither configuration nor daemon: a rescue system has neither.
#![forbid(unsafe_code)]

mod attach;
mod backup;
mod cancel;
mod context;
mod demo;
mod detach;
mod device;
mod doctor;
mod file_system;
mod flush;
mod images;
mod interrupt;
mod modes;
mod output;
mod repo;
mod repositories;
mod restore;
mod show;
mod status;
mod tracker;
mod verify;
mod volume;
mod volume_list;

use blktide_api::failure::{Exit, Failure, FailureCode};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

use crate::context::Common;

/// Incremental images of volumes that are in use
#[derive(Parser, Debug)]
#[command(name = "blktidectl", version, propagate_version = true)]
struct CommandLine {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// How everything stands, and what to type
    Status(status::Args),
    /// Volumes: added, removed, listed
    Volume(volume::Args),
    /// An image of a volume: what changed, or everything
    Backup(backup::Args),
    /// Puts the tracker under a volume
    Attach(attach::Args),
    /// Takes the tracker out, and stores the bitmap
    Detach(detach::Args),
    /// Repositories: made, registered, looked at, forgotten
    Repo(repo::Args),
    /// Ends a volume's backups; the next one covers it
    Cancel(cancel::Args),
    /// Which images there are
    Images(images::Args),
    /// Facts of one image, and why it is what it is
    Show(show::Args),
    /// An image to a new file, or over a file or device
    Restore(restore::Args),
    /// That images are whole; with --read-data, every byte
    Verify(verify::Args),
    /// The hook before a shutdown: stores the bitmaps of volumes that are closed
    Flush(flush::Args),
    /// Each device: which modes, what they give and cost, the line to type; and what this kernel has
    Doctor(doctor::Args),
    /// The main job on a real file system, in a folder that goes away again
    Demo(demo::Args),
    /// Not built yet
    #[command(hide = true)]
    Mount(Later),
    /// Not built yet
    #[command(hide = true)]
    Ls(Later),
    /// Not built yet
    #[command(hide = true)]
    Extract(Later),
    /// Not built yet
    #[command(hide = true)]
    Forget(Later),
    /// Not built yet
    #[command(hide = true)]
    Prune(Later),
    /// Not built yet
    #[command(hide = true)]
    Audit(Later),
    /// Not built yet
    #[command(hide = true)]
    Heatmap(Later),
}

/// Whatever stands after a verb that is not built yet.
#[derive(clap::Args, Debug)]
struct Later {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

fn main() -> ExitCode {
    // Wrong usage ends here, with 2; --help and --version with 0.
    let CommandLine { common, verb } = CommandLine::parse();
    let outcome = match &verb {
        Verb::Demo(args) => return demonstrate(args),
        Verb::Status(args) => status::run(args, &common),
        Verb::Volume(args) => volume::run(args, &common),
        Verb::Backup(args) => backup::run(args, &common),
        Verb::Attach(args) => attach::run(args, &common),
        Verb::Detach(args) => detach::run(args, &common),
        Verb::Repo(args) => repo::run(args, &common),
        Verb::Cancel(args) => cancel::run(args, &common),
        Verb::Flush(args) => flush::run(args, &common),
        Verb::Doctor(args) => doctor::run(args, &common),
        Verb::Images(args) => images::run(args, &common),
        Verb::Show(args) => show::run(args, &common),
        Verb::Restore(args) => restore::run(args, &common),
        Verb::Verify(args) => verify::run(args, &common),
        Verb::Mount(later) => not_built("mount", later),
        Verb::Ls(later) => not_built("ls", later),
        Verb::Extract(later) => not_built("extract", later),
        Verb::Forget(later) => not_built("forget", later),
        Verb::Prune(later) => not_built("prune", later),
        Verb::Audit(later) => not_built("audit", later),
        Verb::Heatmap(later) => not_built("heatmap", later),
    };
    match outcome {
        Ok(exit) => output::exit_code(exit),
        Err(failure) => output::failure(&failure, &common),
    }
}

fn demonstrate(args: &demo::Args) -> ExitCode {
    demo::run(args).unwrap_or_else(|error| {
        output::complain(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn not_built(verb: &str, later: &Later) -> Result<Exit, Failure> {
    Err(Failure::new(
        FailureCode::NotBuiltYet,
        format!(
            "{verb} is not built yet ({} words after it)",
            later.words.len()
        ),
    ))
}
