//! Repositories and images by the names that people type: without daemon, and with a path without configuration.

use blktide_api::failure::{Failure, FailureCode};
use blktide_api::name::{ImageName, RepositoryRef, Which};
use blktide_format::manifest::ImageHead;
use blktide_job::error::JobError;
use blktide_repo::{FolderStore, ImageEntry, RepoError, Repository};
use blktide_sys::host;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::context::{Common, chain};

/// `-r`.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct RepositoryOption {
    /// A registered repository, or the path of one [env: `BLKTIDE_REPOSITORY`]
    #[arg(short, long, value_name = "NAME-OR-PATH")]
    pub(crate) repository: Option<RepositoryRef>,
}

impl RepositoryOption {
    /// What was asked for, on the command line or in the environment.
    pub(crate) fn asked(&self) -> Result<Option<RepositoryRef>, Failure> {
        if let Some(reference) = &self.repository {
            return Ok(Some(reference.clone()));
        }
        match std::env::var("BLKTIDE_REPOSITORY") {
            Ok(text) if !text.is_empty() => text
                .parse()
                .map(Some)
                .map_err(|error| Failure::new(FailureCode::Usage, chain(&error))),
            _ => Ok(None),
        }
    }

    /// The repositories that are meant: the one asked for, else all that are registered.
    pub(crate) fn places(&self, common: &Common) -> Result<Vec<Place>, Failure> {
        match self.asked()? {
            Some(RepositoryRef::Path(path)) => Ok(vec![Place {
                name: path.display().to_string(),
                path,
            }]),
            Some(RepositoryRef::Name(name)) => {
                let config = common.load()?;
                let known = config.repositories.get(&name).ok_or_else(|| {
                    no_repository(format!("no repository '{name}' is registered"))
                        .hint("blktidectl repo add NAME PATH, or give its path: -r /PATH")
                })?;
                Ok(vec![Place {
                    name: name.to_string(),
                    path: known.path.clone(),
                }])
            }
            None => {
                let config = common.load()?;
                let all: Vec<Place> = config
                    .repositories
                    .values()
                    .map(|known| Place {
                        name: known.name.to_string(),
                        path: known.path.clone(),
                    })
                    .collect();
                if all.is_empty() {
                    return Err(
                        no_repository("no repository is registered".to_owned()).hint(
                            "blktidectl repo init NAME PATH, or give the path of one: -r /PATH",
                        ),
                    );
                }
                Ok(all)
            }
        }
    }
}

fn no_repository(message: String) -> Failure {
    Failure::new(FailureCode::NoSuchRepository, message)
}

/// Where a repository lies, and what people call it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Place {
    /// Opens it. Cost: one read.
    pub(crate) fn open(&self) -> Result<Repository, Failure> {
        open(&self.path).map_err(|error| self.failure(&error.into()))
    }

    /// A job's error, told of this repository.
    pub(crate) fn failure(&self, error: &JobError) -> Failure {
        let failure = job_failure(error);
        Failure {
            message: format!("{}: {}", self.name, failure.message),
            ..failure
        }
    }
}

/// Opens a repository in a folder.
pub(crate) fn open(path: &Path) -> Result<Repository, RepoError> {
    Repository::open(Arc::new(FolderStore::new(path)))
}

/// A job's error in the interface's words.
pub(crate) fn job_failure(error: &JobError) -> Failure {
    let code = match error.code() {
        "no_repository" => FailureCode::NoSuchRepository,
        "no_image" => FailureCode::NoSuchImage,
        "ambiguous_image" => FailureCode::ImageAmbiguous,
        "claim_in_use" => FailureCode::ClaimInTheWay,
        "damaged" => FailureCode::DamageFound,
        "target_holds_repository" => FailureCode::TargetRefused,
        word => FailureCode::from_code(word).unwrap_or(FailureCode::Failed),
    };
    let failure = Failure::new(code, chain(error));
    if let JobError::Refused(refusal) = error {
        failure.hint(refusal.hint())
    } else {
        failure
    }
}

/// The image that a name means, and where it is. In more than one repository: refused.
pub(crate) fn find(
    name: &ImageName,
    option: &RepositoryOption,
    common: &Common,
) -> Result<(Place, Repository, ImageEntry), Failure> {
    let mut found = Vec::new();
    let mut first_error = None;
    for place in option.places(common)? {
        let outcome = place.open().and_then(|repository| {
            Ok((
                resolve(&repository, name).map_err(|e| place.failure(&e.into()))?,
                repository,
            ))
        });
        match outcome {
            Ok((entry, repository)) => found.push((place, repository, entry)),
            Err(error) => {
                if error.code != FailureCode::NoSuchImage {
                    first_error.get_or_insert(error);
                }
            }
        }
    }
    if found.len() > 1 {
        let names: Vec<&str> = found
            .iter()
            .map(|(place, ..)| place.name.as_str())
            .collect();
        return Err(Failure::new(
            FailureCode::ImageAmbiguous,
            format!("{name} is in {}", names.join(" and in ")),
        )
        .hint("say which repository: -r NAME"));
    }
    match (found.pop(), first_error) {
        // The one that could not be looked into may have it too, and a newer one.
        (Some(_), Some(error)) => Err(error.hint("say which repository: -r NAME")),
        (Some(one), None) => Ok(one),
        (None, Some(error)) => Err(error),
        (None, None) => Err(Failure::new(
            FailureCode::NoSuchImage,
            format!("there is no image {name}"),
        )
        .hint(
            "blktidectl images --all-hosts shows what there is; another machine's is HOST/NAME@N",
        )),
    }
}

fn resolve(repository: &Repository, name: &ImageName) -> Result<ImageEntry, RepoError> {
    let which = match &name.which {
        Which::Number(number) => blktide_repo::Which::Number(*number),
        Which::Latest => blktide_repo::Which::Latest,
        Which::NotAfter(moment) => {
            let (from, until) = moment.local_range().ok_or(RepoError::NoImage)?;
            blktide_repo::Which::Newest { from, until }
        }
    };
    let volume = name.volume.as_str();
    if let Some(host) = &name.host {
        return repository.resolve(Some(host), volume, which);
    }
    let own = host::machine_id()
        .map(|id| id.to_string())
        .unwrap_or_default();
    match repository.resolve(Some(&own), volume, which) {
        // A rescue system is another machine: whose image it is goes without saying if there is only one. A machine that has
        // images of this name means its own.
        Err(RepoError::NoImage) => {
            match repository.resolve(Some(&own), volume, blktide_repo::Which::Latest) {
                Err(RepoError::NoImage) => repository.resolve(None, volume, which),
                _ => Err(RepoError::NoImage),
            }
        }
        other => other,
    }
}

/// `data@4`, with the machine before it if it is not this one.
pub(crate) fn image_name(head: &ImageHead) -> String {
    let name = format!("{}@{}", head.volume_name, head.sequence);
    if host::machine_id().is_ok_and(|own| own == head.host) {
        name
    } else {
        format!("{}/{name}", head.host_name)
    }
}
