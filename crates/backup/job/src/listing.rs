//! Which images there are: from their heads alone, no block is read.

use crate::error::JobError;
use blktide_repo::{ImageEntry, Listing, Repository};
use blktide_types::id::HostId;

/// Which images to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of the volumes of this name only.
    pub volume_name: Option<String>,
    /// Of this machine only.
    pub host: Option<HostId>,
}

impl Filter {
    fn fits(&self, entry: &ImageEntry) -> bool {
        self.host.is_none_or(|host| entry.head.host == host)
            && self
                .volume_name
                .as_ref()
                .is_none_or(|name| entry.head.volume_name == *name)
    }
}

/// The images of a repository that fit, by volume's name, machine, number; and what could not be listed.
///
/// Waits: two small reads an image.
pub fn images(repository: &Repository, filter: &Filter) -> Result<Listing, JobError> {
    let mut listing = repository.images()?;
    listing.images.retain(|entry| filter.fits(entry));
    listing.images.sort_by(|a, b| {
        let key = |entry: &ImageEntry| {
            let head = &entry.head;
            (
                head.volume_name.clone(),
                head.host_name.clone(),
                head.volume,
                head.sequence,
            )
        };
        key(a).cmp(&key(b))
    });
    Ok(listing)
}
