//! `volume add | remove | list`: which volumes there are.

mod add;
mod plan;

use blktide_api::client::Client;
use blktide_api::config::{Config, VolumeConfig};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::Name;
use blktide_sys::fs;
use blktide_watch::InUse;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

use crate::context::{Common, chain};
use crate::output;

const LIMIT: Duration = Duration::from_secs(10);

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum What {
    /// Register a volume and put the tracker under it
    Add(Add),
    /// Detach volumes and forget them; images stay
    Remove(Remove),
    /// Which volumes there are
    List,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the interface"
)]
struct Add {
    /// Its name
    name: Name,
    /// A device, a file, or a mount point
    #[arg(long, value_name = "PATH")]
    device: PathBuf,
    /// auto, watch, ublk or fuse
    #[arg(long, value_name = "M")]
    mode: Option<String>,
    /// 4 KiB to 1 MiB, a power of two
    #[arg(long, value_name = "S")]
    block_size: Option<String>,
    /// The repository of its backups
    #[arg(short, long, value_name = "R")]
    repository: Option<Name>,
    /// Register only
    #[arg(long)]
    no_attach: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Show the plan only
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the interface"
)]
struct Remove {
    /// The volumes
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<Name>,
    /// All that are configured
    #[arg(long)]
    all: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Say what would be done only
    #[arg(long)]
    dry_run: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    match &args.what {
        What::Add(add) => add::run(add, common),
        What::Remove(remove) => run_remove(remove, common),
        What::List => crate::volume_list::run(common),
    }
}

/// Tells the daemon, if it is there.
fn reload(config: &Config) {
    let told = Client::connect(&config.socket(), Some(LIMIT))
        .and_then(|mut client| client.call("Reload", json!({})));
    // Without a daemon there is nobody to tell; one that starts reads the files.
    drop(told);
}

fn run_remove(remove: &Remove, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let names: Vec<Name> = if remove.all {
        config.volumes.keys().cloned().collect()
    } else {
        remove.names.clone()
    };
    let volumes: Vec<&VolumeConfig> = names
        .iter()
        .map(|name| {
            config.volumes.get(name).ok_or_else(|| {
                let message = format!("no volume {name} is configured");
                Failure::new(FailureCode::NoSuchVolume, message)
            })
        })
        .collect::<Result<_, _>>()?;
    let list: Vec<String> = names.iter().map(ToString::to_string).collect();
    let list = list.join(", ");
    if remove.dry_run {
        let line = format!("would detach {list} and delete configuration and bitmap; no image");
        output::text(common, &line);
        return Ok(Exit::Done);
    }
    let question = format!("Detach {list} and delete configuration and bitmap (images stay)?");
    if !remove.yes && !names.is_empty() {
        confirmed(&question)?;
    }
    let mut lines = Vec::new();
    for volume in volumes {
        let name = &volume.name;
        detach(&config, volume)?;
        forget(&config, name)?;
        lines.push(format!("{name} is removed; its images stay"));
    }
    reload(&config);
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    output::done(common, "volume remove", &names, &lines);
    Ok(Exit::Done)
}

/// Asks; without a terminal, or with another answer than yes: refused (13).
pub(crate) fn confirmed(question: &str) -> Result<(), Failure> {
    use std::io::IsTerminal as _;
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(
            FailureCode::ConfirmationNeeded,
            format!("{question} There is no terminal to ask at"),
        )
        .hint("--yes answers; --dry-run shows what would be done."));
    }
    if output::asked(question) {
        return Ok(());
    }
    Err(Failure::new(FailureCode::NotConfirmed, "nothing was done"))
}

/// By the daemon, which then knows; without one, directly. What is watched is let go of although it is in use.
fn detach(config: &Config, volume: &VolumeConfig) -> Result<(), Failure> {
    match crate::detach::detach(config, volume, InUse::LetGo) {
        Err(failure) if failure.code != FailureCode::NotAttached => Err(failure),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn forget(config: &Config, name: &Name) -> Result<(), Failure> {
    let failed = |what: String| {
        move |error: &dyn std::error::Error| {
            Failure::new(FailureCode::Failed, format!("{what}: {}", chain(error)))
        }
    };
    let file = config.volume_file(name);
    let says = failed(format!("{} could not be removed", file.display()));
    fs::remove_durably(&file).map_err(|e| says(&e))?;
    let state = config.volume_state_dir(name);
    let says = failed(format!("{} could not be removed", state.display()));
    match std::fs::remove_dir_all(&state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(says(&error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
