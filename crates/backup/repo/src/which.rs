//! Which image of a volume is meant: `@3`, `@latest`, `@2026-11-17`.

use crate::error::RepoError;
use crate::repository::{ImageEntry, Repository};
use blktide_types::clock::WallTime;
use blktide_types::id::HostId;

/// Which image of a volume is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The image of this number.
    Number(u64),
    /// The newest.
    Latest,
    /// The newest whose instant lies in `from ..= until` (`from` may be the beginning of time).
    Newest {
        /// Earliest instant.
        from: WallTime,
        /// Latest instant.
        until: WallTime,
    },
}

impl Repository {
    /// The image that a name means. `host`: name or id of the machine; `None`: any.
    ///
    /// Two volumes of one name on one machine (removed and added again): the one with the later image is meant, unless
    /// only the other has such a number. Errors: `NoImage`; `Ambiguous` if several machines have such an image; `Damaged`
    /// if nothing fits and something could not be read. Cost: two small reads an image.
    pub fn resolve(
        &self,
        host: Option<&str>,
        volume_name: &str,
        which: Which,
    ) -> Result<ImageEntry, RepoError> {
        let listing = self.images()?;
        let is_meant = |e: &ImageEntry| {
            let of_host =
                host.is_none_or(|h| e.head.host_name == h || e.head.host.to_string() == h);
            let fits = match which {
                Which::Number(number) => e.head.sequence == number,
                Which::Latest => true,
                Which::Newest { from, until } => (from..=until).contains(&e.head.instant),
            };
            of_host && fits && e.head.volume_name == volume_name
        };
        let mut hosts: Vec<HostId> = Vec::new();
        let mut volumes = Vec::new();
        let mut best: Option<ImageEntry> = None;
        // Ascending by number within a volume: the last that fits is the volume's newest.
        for entry in listing.images.into_iter().filter(is_meant) {
            if !hosts.contains(&entry.head.host) {
                hosts.push(entry.head.host);
            }
            if !volumes.contains(&entry.head.volume) {
                volumes.push(entry.head.volume);
            }
            let is_better = best.as_ref().is_none_or(|b| {
                b.head.volume == entry.head.volume || b.head.committed <= entry.head.committed
            });
            if is_better {
                best = Some(entry);
            }
        }
        if hosts.len() > 1 {
            return Err(RepoError::Ambiguous { volumes });
        }
        match (best, listing.damage.into_iter().next()) {
            (Some(entry), _) => Ok(entry),
            (None, Some(damage)) => Err(damage),
            (None, None) => Err(RepoError::NoImage),
        }
    }
}
