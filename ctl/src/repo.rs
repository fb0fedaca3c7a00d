//! `repo`: repositories: made, registered, looked at, forgotten.

mod checks;
mod look;

use blktide_api::config::{Config, RepositoryConfig, repository_file};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::Name;
use blktide_api::unit::MinFree;
use blktide_repo::{FolderStore, RepoError, Repository};
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::fs::{Created, create_folders, create_if_absent, remove_durably};
use blktide_types::clock::Clock;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::context::{Common, chain, reload};
use crate::output;
use crate::repositories::{job_failure, open};

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Action {
    /// Makes a repository in a folder, and registers it
    Init {
        /// What it is to be called
        name: Name,
        /// The folder: new, or empty
        path: PathBuf,
    },
    /// Registers one that exists
    Add {
        /// What it is to be called
        name: Name,
        /// The folder
        path: PathBuf,
    },
    /// Forgets the registration; the repository stays as it is
    Remove {
        /// Its name
        name: Name,
    },
    /// Space, images, open claims
    Status {
        /// Only this one
        name: Option<Name>,
    },
    /// Gives up the claims of dead sessions
    Unlock {
        /// Its name
        name: Name,
        /// Do not ask; other machines' claims are given up as well
        #[arg(short, long)]
        yes: bool,
    },
}

/// Does it.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    match &args.action {
        Action::Init { name, path } => init(&config, name, path, common),
        Action::Add { name, path } => add(&config, name, path, common),
        Action::Remove { name } => remove(&config, name, common),
        Action::Status { name } => look::status(&config, name.as_ref(), common),
        Action::Unlock { name, yes } => look::unlock(&config, name, *yes, common),
    }
}

fn init(config: &Config, name: &Name, path: &Path, common: &Common) -> Result<Exit, Failure> {
    not_registered(config, name)?;
    let path = absolute(path)?;
    checks::may_hold_a_repository(config, &path)?;
    create_folders(&path, 0o700).map_err(|error| failed(&error))?;
    let store = Arc::new(FolderStore::new(&path));
    Repository::init(store, &SystemRandom::new(), SystemClock.wall())
        .map_err(|error| repository_failure(&path, error))?;
    register(config, name, &path)?;
    let lines = [format!("repository {name} made in {}", path.display())];
    output::done(common, "repo init", &[name.to_string()], &lines);
    Ok(Exit::Done)
}

fn add(config: &Config, name: &Name, path: &Path, common: &Common) -> Result<Exit, Failure> {
    not_registered(config, name)?;
    let path = absolute(path)?;
    open(&path).map_err(|error| repository_failure(&path, error))?;
    register(config, name, &path)?;
    let lines = [format!("repository {name} is {}", path.display())];
    output::done(common, "repo add", &[name.to_string()], &lines);
    Ok(Exit::Done)
}

fn remove(config: &Config, name: &Name, common: &Common) -> Result<Exit, Failure> {
    registered(config, name)?;
    if let Some(volume) = config.volumes.values().find(|v| v.repository == *name) {
        output::complain(&format!(
            "volume {} is still backed up into {name} by default",
            volume.name
        ));
    }
    remove_durably(&config.repository_file(name)).map_err(|error| failed(&error))?;
    reload(config)?;
    let lines = [format!(
        "{name} is forgotten; the repository itself is as it was"
    )];
    output::done(common, "repo remove", &[name.to_string()], &lines);
    Ok(Exit::Done)
}

fn register(config: &Config, name: &Name, path: &Path) -> Result<(), Failure> {
    let text = repository_file(&RepositoryConfig {
        name: name.clone(),
        path: path.to_owned(),
        keep: None,
        min_free: MinFree::Percent(5),
        plaintext: false,
    });
    create_folders(&config.repositories_dir, 0o755).map_err(|error| failed(&error))?;
    let file = config.repository_file(name);
    match create_if_absent(&file, text.as_bytes(), 0o644).map_err(|error| failed(&error))? {
        Created::Made => reload(config),
        Created::Existed => Err(taken(name)),
    }
}

fn not_registered(config: &Config, name: &Name) -> Result<(), Failure> {
    if config.repositories.contains_key(name) {
        return Err(taken(name));
    }
    Ok(())
}

fn taken(name: &Name) -> Failure {
    Failure::new(
        FailureCode::AlreadyThere,
        format!("a repository '{name}' is registered already"),
    )
    .hint("take another name, or: blktidectl repo remove NAME")
}

/// The registered repository of this name.
fn registered<'a>(config: &'a Config, name: &Name) -> Result<&'a RepositoryConfig, Failure> {
    config.repositories.get(name).ok_or_else(|| {
        Failure::new(
            FailureCode::NoSuchRepository,
            format!("no repository '{name}' is registered"),
        )
        .hint("blktidectl repo status")
    })
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| failed(&error))
}

fn failed(error: &dyn std::error::Error) -> Failure {
    Failure::new(FailureCode::Failed, chain(error))
}

fn repository_failure(path: &Path, error: RepoError) -> Failure {
    let exists = matches!(error, RepoError::Exists);
    let failure = job_failure(&error.into());
    let failure = Failure {
        message: format!("{}: {}", path.display(), failure.message),
        ..failure
    };
    if exists {
        return Failure {
            code: FailureCode::AlreadyThere,
            ..failure
        }
        .hint("blktidectl repo add NAME PATH registers one that exists");
    }
    failure
}
