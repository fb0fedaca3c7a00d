//! Hints (P2): which generation boundaries to keep apart, one a repository.
//!
//! **Invariant**: a lost hint costs a superset or a full backup, never a change. They lie in the control memory, so
//! a successor keeps them.

use super::Control;
use crate::atomic::Ordering;
use crate::tracker::{halves, name_of};
use blktide_format::shared::hint;
use blktide_types::id::{GenerationName, RepositoryId};

/// A hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The repository whose newest image names it.
    pub repository: RepositoryId,
    /// The generation that opened at that image's instant.
    pub name: GenerationName,
}

impl Control {
    /// Says that `repository`'s newest image of this volume opened `name`. If there is no room the oldest hint goes,
    /// and its repository is returned, to be said in `status`.
    pub fn set_hint(
        &mut self,
        repository: RepositoryId,
        name: GenerationName,
    ) -> Option<RepositoryId> {
        let count = self.engine.inner.shape.hints;
        let order = (0..count).map(|i| self.load(i, hint::ORDER)).max();
        let order = order.unwrap_or(0).saturating_add(1);
        let same = (0..count).find(|i| self.repository(*i) == repository);
        let free = (0..count).find(|i| self.repository(*i).is_none());
        let (place, dropped) = if let Some(place) = same.or(free) {
            (place, None)
        } else {
            let oldest = (0..count).min_by_key(|i| self.load(*i, hint::ORDER))?;
            (oldest, Some(self.repository(oldest)))
        };
        let [id_0, id_1] = halves(GenerationName(repository.0));
        let [name_0, name_1] = halves(name);
        for (word, value) in [
            (hint::NAME_0, name_0),
            (hint::NAME_1, name_1),
            (hint::ORDER, order),
            (hint::REPOSITORY_0, id_0),
            (hint::REPOSITORY_1, id_1),
        ] {
            self.store(place, word, value);
        }
        dropped
    }

    /// Forgets the hint of `repository`.
    pub fn drop_hint(&mut self, repository: RepositoryId) {
        for place in 0..self.engine.inner.shape.hints {
            if self.repository(place) == repository {
                self.store(place, hint::REPOSITORY_0, 0);
                self.store(place, hint::REPOSITORY_1, 0);
            }
        }
    }

    /// The hints there are.
    pub fn hints(&self) -> Vec<Hint> {
        (0..self.engine.inner.shape.hints)
            .map(|place| Hint {
                repository: self.repository(place),
                name: name_of(
                    self.load(place, hint::NAME_0),
                    self.load(place, hint::NAME_1),
                ),
            })
            .filter(|h| !h.repository.is_none())
            .collect()
    }

    pub(super) fn hinted(&self) -> Vec<GenerationName> {
        self.hints().iter().map(|h| h.name).collect()
    }

    fn repository(&self, place: usize) -> RepositoryId {
        RepositoryId(
            name_of(
                self.load(place, hint::REPOSITORY_0),
                self.load(place, hint::REPOSITORY_1),
            )
            .0,
        )
    }

    fn load(&self, place: usize, word: usize) -> u64 {
        let at = place.saturating_mul(hint::WORDS).saturating_add(word);
        self.engine.inner.hints.load(at, Ordering::Relaxed)
    }

    fn store(&self, place: usize, word: usize, value: u64) {
        let at = place.saturating_mul(hint::WORDS).saturating_add(word);
        self.engine.inner.hints.store(at, value, Ordering::Relaxed);
    }
}
