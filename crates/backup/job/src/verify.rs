//! A verification: every page, or every stored byte; all damage, not the first.

use crate::backup::OpenRepository;
use crate::environment::Environment;
use crate::error::JobError;
use crate::pieces::default_workers;
use crate::running::{Control, Running};
use blktide_image::{Depth, Proof};
use blktide_repo::{RepoError, Repository};
use blktide_types::id::VolumeId;
use std::sync::Arc;

/// Finds the one image to verify, in the job's own thread; `None`: the whole repository.
pub type FindImage =
    Box<dyn FnOnce(&Repository) -> Result<Option<(VolumeId, u64)>, RepoError> + Send>;

/// What is to be verified, and how deep.
pub struct VerifyRequest {
    /// Where.
    pub repository: OpenRepository,
    /// What of it.
    pub image: FindImage,
    /// How deep.
    pub depth: Depth,
    /// Threads; 0: two more than cores, at least four.
    pub workers: usize,
}

impl core::fmt::Debug for VerifyRequest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("VerifyRequest")
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

/// Starts a verification. Waits for nothing. Damage is no error: it is in the proof.
pub fn start(
    request: VerifyRequest,
    environment: &Environment,
) -> Result<Running<Proof>, JobError> {
    let control = Control::new(
        Arc::clone(&environment.clock),
        environment.on_progress.clone(),
    );
    Running::start("verify", control, move |control| run(request, control))
}

fn run(request: VerifyRequest, control: &Arc<Control>) -> Result<Proof, JobError> {
    let repository = (request.repository)()?;
    control.check()?;
    let image = (request.image)(&repository)?;
    let workers = if request.workers == 0 {
        default_workers()
    } else {
        request.workers
    };
    let proof = blktide_image::verify(
        &repository,
        image,
        request.depth,
        workers,
        &|checked_bytes| {
            control.advance(checked_bytes, 0);
            !control.is_cancelled()
        },
    )?;
    control.check()?;
    Ok(proof)
}
