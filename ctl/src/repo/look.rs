//! `repo status` and `repo unlock`.

use blktide_api::config::{Config, RepositoryConfig};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::message::{REPOSITORIES, RepositoriesDocument, RepositoryDocument};
use blktide_api::name::Name;
use blktide_api::time::local;
use blktide_api::unit::size;
use blktide_repo::{ClaimEntry, ClaimState, RepoError, Repository};
use blktide_sys::clock::SystemClock;
use blktide_sys::host;
use blktide_types::clock::Clock;
use blktide_types::id::VolumeId;

use super::{registered, repository_failure};
use crate::context::{Common, chain};
use crate::output;
use crate::repositories::open;

/// One line a repository. Exit 1 if one could not be read.
pub(super) fn status(
    config: &Config,
    name: Option<&Name>,
    common: &Common,
) -> Result<Exit, Failure> {
    let chosen: Vec<&RepositoryConfig> = match name {
        Some(name) => vec![registered(config, name)?],
        None => config.repositories.values().collect(),
    };
    let documents: Vec<RepositoryDocument> =
        chosen.iter().map(|repository| facts(repository)).collect();
    let failed = documents.iter().any(|d| d.error.is_some());
    for document in &documents {
        output::text(common, &line(document));
        for claim in &document.open_claims {
            output::text(common, &format!("  open claim: {claim}"));
        }
    }
    if documents.is_empty() {
        output::text(
            common,
            "no repositories; blktidectl repo init NAME PATH makes one",
        );
    }
    if common.json {
        output::document(&RepositoriesDocument {
            message_type: REPOSITORIES.to_owned(),
            repositories: documents,
        });
    }
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn facts(known: &RepositoryConfig) -> RepositoryDocument {
    let mut document = RepositoryDocument {
        name: known.name.to_string(),
        path: known.path.display().to_string(),
        repository_id: None,
        images: None,
        free_bytes: blktide_sys::fs::free_bytes(&known.path).ok(),
        open_claims: Vec::new(),
        last_verify: None,
        error: None,
    };
    if let Err(error) = look_into(known, &mut document) {
        document.error = Some(chain(&error));
    }
    document
}

fn look_into(known: &RepositoryConfig, document: &mut RepositoryDocument) -> Result<(), RepoError> {
    let repository = open(&known.path)?;
    document.repository_id = Some(repository.id().to_string());
    document.images = Some(repository.images()?.images.len() as u64);
    document.open_claims = open_claims(&repository)?
        .iter()
        .map(|(_, claim)| words(claim))
        .collect();
    Ok(())
}

fn line(document: &RepositoryDocument) -> String {
    let free = document.free_bytes.map_or_else(|| "?".to_owned(), size);
    match (&document.error, document.images) {
        (Some(error), _) => format!("{}: {}: {error}", document.name, document.path),
        (None, images) => format!(
            "{}: {}: {} images, {free} free, never verified by a schedule",
            document.name,
            document.path,
            images.unwrap_or(0)
        ),
    }
}

/// Claims that are neither committed nor given up.
fn open_claims(repository: &Repository) -> Result<Vec<(VolumeId, ClaimEntry)>, RepoError> {
    let mut found = Vec::new();
    for volume in repository.volumes()? {
        for sequence in repository.sequences(volume)? {
            // The end first: it is there for nearly all, and then the claim need not be read.
            match repository.end_facts(volume, sequence) {
                Ok(None) => {}
                Ok(Some(_)) | Err(RepoError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            match repository.claim_entry(volume, sequence) {
                Ok(claim) if claim.state == ClaimState::Open => found.push((volume, claim)),
                Ok(_) | Err(RepoError::Damaged { .. } | RepoError::NoImage) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

fn words(claim: &ClaimEntry) -> String {
    let facts = &claim.facts;
    format!(
        "{}/{}@{} of {}, process {}",
        facts.host_name,
        facts.volume_name,
        facts.sequence,
        local(facts.time),
        facts.pid
    )
}

/// Gives up dead sessions' claims. A living one's is in the way (11); another machine's needs a yes, nobody here can know.
pub(super) fn unlock(
    config: &Config,
    name: &Name,
    yes: bool,
    common: &Common,
) -> Result<Exit, Failure> {
    let known = registered(config, name)?;
    let failure = |error| repository_failure(&known.path, error);
    let repository = open(&known.path).map_err(failure)?;
    let own = host::machine_id().ok();
    let mut given_up = Vec::new();
    for (volume, claim) in open_claims(&repository).map_err(failure)? {
        let told = words(&claim);
        if Some(claim.facts.host) == own {
            if lives(&claim) {
                return Err(
                    Failure::new(FailureCode::ClaimInTheWay, format!("{told} is at work"))
                        .hint("blktidectl cancel VOLUME"),
                );
            }
        } else if !yes
            && !output::asked(&format!(
                "{told} is another machine's. Is that session dead?"
            ))
        {
            return Err(Failure::new(
                FailureCode::ConfirmationNeeded,
                format!("{told} is another machine's"),
            )
            .hint("make sure that it is dead; then: blktidectl repo unlock NAME --yes"));
        }
        let sequence = claim.facts.sequence;
        repository
            .abandon(volume, sequence, SystemClock.wall())
            .map_err(failure)?;
        given_up.push(format!("given up: {told}"));
    }
    if given_up.is_empty() {
        given_up.push("no open claims".to_owned());
    }
    output::done(common, "repo unlock", &[name.to_string()], &given_up);
    Ok(Exit::Done)
}

/// Whether the claim's process, of this machine, lives. In doubt it does.
fn lives(claim: &ClaimEntry) -> bool {
    let mark = claim.process();
    if host::boot_id().is_ok_and(|boot| boot != mark.boot) {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{}/stat", mark.pid)) {
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        Ok(text) => {
            // Field 22, counted behind the name, which stands in parentheses and may hold anything.
            let start = text
                .rsplit_once(')')
                .and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
            start.is_none_or(|start: u64| start == mark.start_time)
        }
    }
}
