//! blktided: jobs and control socket; and the keeper and server of one volume.
//!
//! ```text
//!   blktided                    the daemon: this file's rest
//!   blktided volume NAME        the keeper of a volume, in the foreground
//!   blktided volume NAME --server …   its server: started by the keeper, never by hand
//!   blktided thaw-guard         who freezes a file system and thaws it: started by who needs it, never by hand
//! ```
#![forbid(unsafe_code)]

mod backup;
mod config;
mod daemon;
mod jobs;
mod methods;
mod notify;
mod peers;
mod process_mark;
mod records;
mod socket;
mod source;
mod supervise;
mod thaw_guard;
mod tracked;
mod volume;
mod watched;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "blktided",
    version,
    about = "Jobs and control socket of blktide; with 'volume NAME': the data path of one volume"
)]
struct Arguments {
    /// The configuration [default: /etc/blktide/blktide.toml]
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Keep and serve one volume, in the foreground
    Volume {
        /// Its name
        name: String,
    },
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|w| w.to_string_lossy().into_owned())
        .collect();
    if words.first().is_some_and(|w| w == "volume") && words.iter().any(|w| w == "--server") {
        // The way back needs no disk: nothing is read or parsed before the server runs.
        return volume::server(&words);
    }
    if words == [blktide_watch::guard::ROLE] {
        return thaw_guard::run();
    }
    let arguments = Arguments::parse();
    let result = match arguments.role {
        Some(Role::Volume { name }) => volume::keep(&name, arguments.config),
        None => daemon::run(arguments.config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("blktided: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A line on standard error; if that is gone there is nobody to tell.
pub(crate) fn complain(line: &str) {
    use std::io::Write as _;
    drop(writeln!(std::io::stderr(), "{line}"));
}
