//! The repository's own object: who it is, and the key of its digests.

use crate::object::{self, Expected, Identity, ObjectKind, field, length};
use crate::{FormatError, on_disk};
use blktide_types::clock::WallTime;
use blktide_types::id::{DigestDomainId, ObjectId, RepositoryId, SessionId, VolumeId};
use zerocopy::little_endian::{I64, U16};
use zerocopy::{FromBytes, IntoBytes};

/// Name of the object.
pub const NAME: &str = "repository";

on_disk! {
    /// Body of `repository`.
    pub struct RepositoryBody: 128 {
        /// Name of the digests' key.
        0 => pub domain: [u8; 16],
        /// The digests' key.
        16 => pub domain_key: [u8; 32],
        /// Oldest format version that may read the repository.
        48 => pub reader_version_min: U16,
        /// Oldest format version that may write to it.
        50 => pub writer_version_min: U16,
        /// Zero.
        52 => pub reserved: [u8; 4],
        /// When it was made, nanoseconds since 1970 UTC; shown only.
        56 => pub created: I64,
        /// Zero.
        64 => pub reserved_more: [u8; 64],
    }
}

/// What the object says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepositoryFacts {
    /// The repository.
    pub id: RepositoryId,
    /// Name of the digests' key.
    pub domain: DigestDomainId,
    /// The digests' key.
    pub domain_key: [u8; 32],
    /// When it was made.
    pub created: WallTime,
}

/// The object's bytes.
pub fn encode(facts: &RepositoryFacts) -> Vec<u8> {
    let body = RepositoryBody {
        domain: facts.domain.0,
        domain_key: facts.domain_key,
        reader_version_min: U16::new(1),
        writer_version_min: U16::new(1),
        reserved: [0; 4],
        created: I64::new(facts.created.0),
        reserved_more: [0; 64],
    };
    let identity = Identity {
        repository: facts.id,
        object: ObjectId(facts.id.0),
        volume: VolumeId::NONE,
        session: SessionId::NONE,
    };
    object::encode_small(ObjectKind::Repository, identity, body.as_bytes())
}

/// What `bytes` say.
pub fn decode(bytes: &[u8]) -> Result<RepositoryFacts, FormatError> {
    let expected = Expected {
        volume: Some(VolumeId::NONE),
        session: Some(SessionId::NONE),
        ..Expected::default()
    };
    let (identity, body) = object::decode_small(bytes, ObjectKind::Repository, expected)?;
    let Ok(body) = RepositoryBody::read_from_bytes(body) else {
        return Err(length(size_of::<RepositoryBody>(), body.len()));
    };
    if identity.object.0 != identity.repository.0 || identity.repository.is_none() {
        return Err(FormatError::Identity { field: "object" });
    }
    if body.reader_version_min.get() > object::VERSION {
        return Err(FormatError::Version {
            found: body.reader_version_min.get(),
            supported: object::VERSION,
        });
    }
    let zero = body.reserved == [0; 4] && body.reserved_more == [0; 64];
    field("reserved", zero, u64::MAX)?;
    Ok(RepositoryFacts {
        id: identity.repository,
        domain: DigestDomainId(body.domain),
        domain_key: body.domain_key,
        created: WallTime(body.created.get()),
    })
}
