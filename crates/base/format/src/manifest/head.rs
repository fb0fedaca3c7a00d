//! A manifest's head to facts and back.

use super::{Consistency, Counters, ImageHead, ImageKind, KindCounts, ManifestHead};
use crate::FormatError;
use crate::claim::base_of;
use crate::object::{decode_text, encode_text, field};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{
    Digest, DigestDomainId, GenerationName, HostId, ImageId, SessionId, VolumeId,
};
use blktide_types::reason::Reason;
use blktide_types::unit::BlockSize;
use zerocopy::little_endian::{I64, U64};

pub(super) fn encode_head(head: &ImageHead) -> ManifestHead {
    let (base, base_sequence) = head.base.unwrap_or((ImageId::NONE, 0));
    let (g, c, k) = (&head.geometry, &head.counters, &head.kinds);
    ManifestHead {
        image: head.image.0,
        host: head.host.0,
        base: base.0,
        generation: head.generation.0,
        domain: head.domain.0,
        group: [0; 16],
        previous: head.previous.0,
        state: head.state.0,
        base_state: head.base_state.0,
        sequence: U64::new(head.sequence),
        base_sequence: U64::new(base_sequence),
        volume_bytes: U64::new(g.volume_bytes()),
        instant: I64::new(head.instant.0),
        committed: I64::new(head.committed.0),
        kind: head.kind as u8,
        reason: head.reason.map_or(0, Reason::number),
        consistency: head.consistency as u8,
        block_shift: g.block_size().shift(),
        grain_shift: g.grain().shift(),
        logical_sector_shift: shift_of(g.logical_sector_bytes()),
        physical_sector_shift: shift_of(g.physical_sector_bytes()),
        digest_bytes: 32,
        read_bytes: U64::new(c.read_bytes),
        changed_bytes: U64::new(c.changed_bytes),
        stored_bytes: U64::new(c.stored_bytes),
        preserved_bytes: U64::new(c.preserved_bytes),
        duration: U64::new(c.duration_ns),
        longest_wait: U64::new(c.longest_wait_ns),
        longest_freeze: U64::new(c.longest_freeze_ns),
        blocks_data: U64::new(k.data),
        blocks_zero: U64::new(k.zero),
        blocks_absent: U64::new(k.absent),
        blocks_excluded: U64::new(k.excluded),
        blocks_unreadable: U64::new(k.unreadable),
        volume_name: encode_text(&head.volume_name),
        host_name: encode_text(&head.host_name),
        device: encode_text(&head.device),
        reserved: [0; 432],
    }
}

pub(super) fn decode_head(
    record: &ManifestHead,
    volume: VolumeId,
    session: SessionId,
) -> Result<ImageHead, FormatError> {
    let zero = record.reserved == [0; 432] && record.group == [0; 16];
    field("reserved", zero, u64::MAX)?;
    field(
        "digest_bytes",
        record.digest_bytes == 32,
        record.digest_bytes,
    )?;
    field("image", record.image != [0; 16], 0_u64)?;
    let head = ImageHead {
        image: ImageId(record.image),
        volume,
        volume_name: decode_text(&record.volume_name, "volume_name")?,
        host: HostId(record.host),
        host_name: decode_text(&record.host_name, "host_name")?,
        device: decode_text(&record.device, "device")?,
        session,
        sequence: record.sequence.get(),
        previous: Digest(record.previous),
        base: base_of(record.base, record.base_sequence.get())?,
        state: Digest(record.state),
        base_state: Digest(record.base_state),
        generation: GenerationName(record.generation),
        domain: DigestDomainId(record.domain),
        geometry: decode_geometry(record)?,
        kind: decode_kind(record.kind)?,
        reason: decode_reason(record.reason)?,
        consistency: decode_consistency(record.consistency)?,
        instant: WallTime(record.instant.get()),
        committed: WallTime(record.committed.get()),
        counters: Counters {
            read_bytes: record.read_bytes.get(),
            changed_bytes: record.changed_bytes.get(),
            stored_bytes: record.stored_bytes.get(),
            preserved_bytes: record.preserved_bytes.get(),
            duration_ns: record.duration.get(),
            longest_wait_ns: record.longest_wait.get(),
            longest_freeze_ns: record.longest_freeze.get(),
        },
        kinds: KindCounts {
            data: record.blocks_data.get(),
            zero: record.blocks_zero.get(),
            absent: record.blocks_absent.get(),
            excluded: record.blocks_excluded.get(),
            unreadable: record.blocks_unreadable.get(),
        },
    };
    let based = head.base.is_some() == (head.base_state != Digest::NONE);
    field("base_state", based, u64::MAX)?;
    let total = head.kinds.total();
    field(
        "block counts",
        total == Some(head.geometry.block_count().0),
        total.unwrap_or(u64::MAX),
    )?;
    Ok(head)
}

fn shift_of(power: u32) -> u8 {
    u8::try_from(power.trailing_zeros()).unwrap_or(0)
}

fn decode_geometry(record: &ManifestHead) -> Result<Geometry, FormatError> {
    let geometry = || {
        let logical = 1_u32.checked_shl(record.logical_sector_shift.into())?;
        let physical = 1_u32.checked_shl(record.physical_sector_shift.into())?;
        Geometry::new(
            record.volume_bytes.get(),
            BlockSize::from_shift(record.block_shift)?,
            BlockSize::from_shift(record.grain_shift)?,
            logical,
            physical,
        )
    };
    geometry().ok_or(FormatError::Field {
        field: "geometry",
        value: record.volume_bytes.get(),
    })
}

fn decode_kind(number: u8) -> Result<ImageKind, FormatError> {
    match number {
        1 => Ok(ImageKind::Full),
        2 => Ok(ImageKind::Incremental),
        3 => Ok(ImageKind::Digest),
        other => Err(FormatError::Field {
            field: "kind",
            value: other.into(),
        }),
    }
}

fn decode_reason(number: u8) -> Result<Option<Reason>, FormatError> {
    match (number, Reason::from_number(number)) {
        (0, _) => Ok(None),
        (_, Some(reason)) => Ok(Some(reason)),
        (other, None) => Err(FormatError::Field {
            field: "reason",
            value: other.into(),
        }),
    }
}

fn decode_consistency(number: u8) -> Result<Consistency, FormatError> {
    match number {
        1 => Ok(Consistency::Unmounted),
        2 => Ok(Consistency::Frozen),
        3 => Ok(Consistency::Instant),
        4 => Ok(Consistency::None),
        other => Err(FormatError::Field {
            field: "consistency",
            value: other.into(),
        }),
    }
}
