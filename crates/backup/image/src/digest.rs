//! Digests: of blocks, of pages' content, of whole states, all under the repository's key.
//!
//! Each use has a key of its own, derived from the domain's, so that no block's bytes can pass for a page's.

use blktide_format::page::Child;
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, DigestDomainId};

/// Digests under one key.
#[derive(Clone)]
pub struct Digests {
    domain: DigestDomainId,
    block_key: [u8; 32],
    page_key: [u8; 32],
    state_key: [u8; 32],
}

impl core::fmt::Debug for Digests {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Digests({})", self.domain)
    }
}

impl Digests {
    /// The digests of a domain.
    pub fn new(domain: DigestDomainId, key: &[u8; 32]) -> Self {
        Self {
            domain,
            block_key: blake3::derive_key("blktide v1 block", key),
            page_key: blake3::derive_key("blktide v1 page content", key),
            state_key: blake3::derive_key("blktide v1 state id", key),
        }
    }

    /// Digest of a block's true bytes.
    pub fn of_block(&self, bytes: &[u8]) -> Digest {
        Digest(*blake3::keyed_hash(&self.block_key, bytes).as_bytes())
    }

    /// Content digest of a page, from its content bytes.
    pub fn of_content(&self, bytes: &[u8]) -> Digest {
        Digest(*blake3::keyed_hash(&self.page_key, bytes).as_bytes())
    }

    /// State id of a volume whose tree has this root.
    pub fn of_state(&self, root: &Child, geometry: &Geometry) -> Digest {
        let mut bytes = self.domain.0.to_vec();
        bytes.extend_from_slice(&geometry.volume_bytes().to_le_bytes());
        bytes.push(geometry.block_size().shift());
        match root {
            Child::Constant(kind) => bytes.push(kind.number()),
            Child::Page { content, .. } => {
                bytes.push(15);
                bytes.extend_from_slice(&content.0);
            }
        }
        Digest(*blake3::keyed_hash(&self.state_key, &bytes).as_bytes())
    }
}

/// BLAKE3 of bytes as they are stored, without a key.
pub fn of_stored(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}
