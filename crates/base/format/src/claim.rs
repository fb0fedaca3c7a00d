//! A claim (`open`) and what became of it (`end`), P13.
//!
//! **Invariant**: both are written once, by create-if-absent; an image exists iff its end says `committed`.

use crate::object::{
    self, COUNTER_CLAIM, COUNTER_END, Expected, Identity, ObjectKind, decode_text, encode_text,
    field, length, object_id,
};
use crate::{FormatError, on_disk};
use blktide_types::clock::WallTime;
use blktide_types::id::{
    BootId, Digest, GenerationName, HostId, ImageId, RepositoryId, SessionId, VolumeId,
};
use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

on_disk! {
    /// Body of `open`.
    pub struct ClaimBody: 256 {
        /// The number that is claimed: the folder's name.
        0 => pub sequence: U64,
        /// The pinned base's number; 0 without one.
        8 => pub base_sequence: U64,
        /// The pinned base; zero without one.
        16 => pub base: [u8; 16],
        /// The machine.
        32 => pub host: [u8; 16],
        /// Its boot.
        48 => pub boot: [u8; 16],
        /// Start of the process, in the kernel's ticks since the boot.
        64 => pub process_start: U64,
        /// The process.
        72 => pub pid: U32,
        /// Zero.
        76 => pub reserved: U32,
        /// The tracker's open generation; zero if nothing tracks.
        80 => pub generation: [u8; 16],
        /// When, nanoseconds since 1970 UTC; shown only.
        96 => pub time: I64,
        /// Zero.
        104 => pub reserved_more: [u8; 24],
        /// Name of the volume, UTF-8, zero-filled.
        128 => pub volume_name: [u8; 64],
        /// Name of the machine, UTF-8, zero-filled.
        192 => pub host_name: [u8; 64],
    }
}

on_disk! {
    /// Body of `end`.
    pub struct EndBody: 128 {
        /// The claim's number.
        0 => pub sequence: U64,
        /// 1 committed, 2 abandoned.
        8 => pub outcome: U32,
        /// Zero.
        12 => pub reserved: U32,
        /// The image; zero if abandoned.
        16 => pub image: [u8; 16],
        /// BLAKE3 of the manifest's first 4096 bytes; zero if abandoned.
        32 => pub digest: [u8; 32],
        /// Who wrote this end: the session itself, or who gave it up.
        64 => pub writer: [u8; 16],
        /// When, nanoseconds since 1970 UTC; shown only.
        80 => pub time: I64,
        /// Zero.
        88 => pub reserved_more: [u8; 40],
    }
}

/// What a claim says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimFacts {
    /// The number that is claimed.
    pub sequence: u64,
    /// The run.
    pub session: SessionId,
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub volume_name: String,
    /// The machine.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// Its boot.
    pub boot: BootId,
    /// The process.
    pub pid: u32,
    /// Start of the process, in ticks since the boot.
    pub process_start: u64,
    /// The pinned base and its number.
    pub base: Option<(ImageId, u64)>,
    /// The tracker's open generation.
    pub generation: GenerationName,
    /// When; shown only.
    pub time: WallTime,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An image.
    Committed {
        /// The image.
        image: ImageId,
        /// Digest of its manifest's prefix.
        digest: Digest,
    },
    /// None, ever.
    Abandoned,
}

/// What an end says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndFacts {
    /// The claim's number.
    pub sequence: u64,
    /// The run whose claim it ends.
    pub session: SessionId,
    /// What became of it.
    pub outcome: Outcome,
    /// Who wrote this end.
    pub writer: SessionId,
    /// When; shown only.
    pub time: WallTime,
}

/// Bytes of an `open`.
pub fn encode_claim(repository: RepositoryId, facts: &ClaimFacts) -> Vec<u8> {
    let (base, base_sequence) = facts.base.unwrap_or((ImageId::NONE, 0));
    let body = ClaimBody {
        sequence: U64::new(facts.sequence),
        base_sequence: U64::new(base_sequence),
        base: base.0,
        host: facts.host.0,
        boot: facts.boot.0,
        process_start: U64::new(facts.process_start),
        pid: U32::new(facts.pid),
        reserved: U32::new(0),
        generation: facts.generation.0,
        time: I64::new(facts.time.0),
        reserved_more: [0; 24],
        volume_name: encode_text(&facts.volume_name),
        host_name: encode_text(&facts.host_name),
    };
    let identity = Identity {
        repository,
        object: object_id(facts.session, COUNTER_CLAIM),
        volume: facts.volume,
        session: facts.session,
    };
    object::encode_small(ObjectKind::Claim, identity, body.as_bytes())
}

/// What the `open` of `volume` at `sequence` says.
pub fn decode_claim(
    bytes: &[u8],
    repository: RepositoryId,
    volume: VolumeId,
    sequence: u64,
) -> Result<ClaimFacts, FormatError> {
    let expected = Expected {
        repository: Some(repository),
        volume: Some(volume),
        ..Expected::default()
    };
    let (identity, body) = object::decode_small(bytes, ObjectKind::Claim, expected)?;
    let Ok(body) = ClaimBody::read_from_bytes(body) else {
        return Err(length(size_of::<ClaimBody>(), body.len()));
    };
    if body.sequence.get() != sequence {
        return Err(FormatError::Identity { field: "sequence" });
    }
    if identity.object != object_id(identity.session, COUNTER_CLAIM) {
        return Err(FormatError::Identity { field: "object" });
    }
    let zero = body.reserved.get() == 0 && body.reserved_more == [0; 24];
    field("reserved", zero, u64::MAX)?;
    Ok(ClaimFacts {
        sequence,
        session: identity.session,
        volume,
        volume_name: decode_text(&body.volume_name, "volume_name")?,
        host: HostId(body.host),
        host_name: decode_text(&body.host_name, "host_name")?,
        boot: BootId(body.boot),
        pid: body.pid.get(),
        process_start: body.process_start.get(),
        base: base_of(body.base, body.base_sequence.get())?,
        generation: GenerationName(body.generation),
        time: WallTime(body.time.get()),
    })
}

/// Bytes of an `end`.
pub fn encode_end(repository: RepositoryId, volume: VolumeId, facts: &EndFacts) -> Vec<u8> {
    let (outcome, image, digest) = match facts.outcome {
        Outcome::Committed { image, digest } => (1, image, digest),
        Outcome::Abandoned => (2, ImageId::NONE, Digest::NONE),
    };
    let body = EndBody {
        sequence: U64::new(facts.sequence),
        outcome: U32::new(outcome),
        reserved: U32::new(0),
        image: image.0,
        digest: digest.0,
        writer: facts.writer.0,
        time: I64::new(facts.time.0),
        reserved_more: [0; 40],
    };
    let identity = Identity {
        repository,
        object: object_id(facts.session, COUNTER_END),
        volume,
        session: facts.session,
    };
    object::encode_small(ObjectKind::End, identity, body.as_bytes())
}

/// What the `end` of `volume` at `sequence` says.
pub fn decode_end(
    bytes: &[u8],
    repository: RepositoryId,
    volume: VolumeId,
    sequence: u64,
) -> Result<EndFacts, FormatError> {
    let expected = Expected {
        repository: Some(repository),
        volume: Some(volume),
        ..Expected::default()
    };
    let (identity, body) = object::decode_small(bytes, ObjectKind::End, expected)?;
    let Ok(body) = EndBody::read_from_bytes(body) else {
        return Err(length(size_of::<EndBody>(), body.len()));
    };
    if identity.object != object_id(identity.session, COUNTER_END) {
        return Err(FormatError::Identity { field: "object" });
    }
    if body.sequence.get() != sequence {
        return Err(FormatError::Identity { field: "sequence" });
    }
    let zero = body.reserved.get() == 0 && body.reserved_more == [0; 40];
    field("reserved", zero, u64::MAX)?;
    let (image, digest) = (ImageId(body.image), Digest(body.digest));
    let outcome = match body.outcome.get() {
        1 if !image.is_none() && digest != Digest::NONE => Outcome::Committed { image, digest },
        2 if image.is_none() && digest == Digest::NONE => Outcome::Abandoned,
        other => {
            return Err(FormatError::Field {
                field: "outcome",
                value: other.into(),
            });
        }
    };
    Ok(EndFacts {
        sequence,
        session: identity.session,
        outcome,
        writer: SessionId(body.writer),
        time: WallTime(body.time.get()),
    })
}

/// A base of two fields that are both there or both zero.
pub(crate) fn base_of(
    image: [u8; 16],
    sequence: u64,
) -> Result<Option<(ImageId, u64)>, FormatError> {
    match (ImageId(image), sequence) {
        (ImageId::NONE, 0) => Ok(None),
        (image, sequence) if !image.is_none() && sequence != 0 => Ok(Some((image, sequence))),
        (_, sequence) => Err(FormatError::Field {
            field: "base",
            value: sequence,
        }),
    }
}
