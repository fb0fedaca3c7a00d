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
    /// or the store's if nothing fits and something could not be read, or if an image above the newest that fits could not
    /// be: it may be the one. Cost: two small reads an image.
    pub fn resolve(
        &self,
        host: Option<&str>,
        volume_name: &str,
        which: Which,
    ) -> Result<ImageEntry, RepoError> {
        let is_meant = |e: &ImageEntry| {
            let of_host =
                host.is_none_or(|h| e.head.host_name == h || e.head.host.to_string() == h);
            of_host && which.fits(e) && e.head.volume_name == volume_name
        };
        let mut hosts: Vec<HostId> = Vec::new();
        let mut volumes = Vec::new();
        let mut best: Option<(ImageEntry, Option<RepoError>)> = None;
        let mut damage = None;
        for volume in self.volumes()? {
            let mut newest: Option<ImageEntry> = None;
            let mut doubt = None;
            let mut is_past = false;
            // Ascending: the last that fits is the volume's newest.
            for sequence in self.sequences(volume)? {
                match self.image(volume, sequence) {
                    Ok(Some(entry)) if is_meant(&entry) => {
                        if !hosts.contains(&entry.head.host) {
                            hosts.push(entry.head.host);
                        }
                        newest = Some(entry);
                        damage = damage.or(doubt.take());
                        is_past = false;
                    }
                    Ok(Some(entry)) => is_past |= which.is_before(&entry),
                    Ok(None) => {}
                    Err(e) if is_past || doubt.is_some() => damage = damage.or(Some(e)),
                    Err(e) => doubt = Some(e),
                }
            }
            let Some(newest) = newest else {
                damage = damage.or(doubt);
                continue;
            };
            volumes.push(volume);
            if best
                .as_ref()
                .is_none_or(|(b, _)| b.head.committed <= newest.head.committed)
            {
                best = Some((newest, doubt));
            }
        }
        if hosts.len() > 1 {
            return Err(RepoError::Ambiguous { volumes });
        }
        match (best, damage) {
            (Some((_, Some(doubt))), _) if !matches!(which, Which::Number(_)) => Err(doubt),
            (Some((entry, _)), _) => Ok(entry),
            (None, Some(damage)) => Err(damage),
            (None, None) => Err(RepoError::NoImage),
        }
    }
}

impl Which {
    fn fits(self, entry: &ImageEntry) -> bool {
        match self {
            Self::Number(number) => entry.head.sequence == number,
            Self::Latest => true,
            Self::Newest { from, until } => (from..=until).contains(&entry.head.instant),
        }
    }

    /// Whether an image is of a later moment than is meant: so are those above it.
    fn is_before(self, entry: &ImageEntry) -> bool {
        matches!(self, Self::Newest { until, .. } if until < entry.head.instant)
    }
}
