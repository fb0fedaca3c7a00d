//! The commit: tree finished, packs durable, pack table counted, manifest, end.

use super::tree::{Finished, UseChange};
use super::{Committed, ImageFacts, ImageWriter};
use crate::digest;
use crate::error::ImageError;
use blktide_format::manifest::{
    Counters, ImageHead, PREFIX_BYTES, PackRow, Prefix, SECTION_CHANGED, SECTION_EVIDENCE,
    SECTION_PACKS, Section, encode_packs, encode_prefix,
};
use blktide_format::runs;
use blktide_repo::PackFacts;
use blktide_types::id::{Digest, ImageId, ObjectId, SessionId};
use std::collections::BTreeMap;

pub(super) fn commit(writer: &ImageWriter, facts: &ImageFacts) -> Result<Committed, ImageError> {
    let finished = writer.tree.finish()?;
    let sealed = writer.session.seal()?;
    let base_rows = match &writer.base {
        Some(base) => base.packs()?,
        None => Vec::new(),
    };
    let rows = pack_table(base_rows, &sealed, &finished.uses)?;
    let mut sections = vec![(SECTION_PACKS, encode_packs(&rows))];
    if let Some(changed) = &facts.changed {
        sections.push((SECTION_CHANGED, runs::encode(changed)));
    }
    if !facts.evidence.is_empty() {
        sections.push((SECTION_EVIDENCE, facts.evidence.clone()));
    }
    let head = head(writer, facts, &finished);
    let mut next = 4096_u64;
    let described = sections.iter().map(|(id, bytes)| {
        let offset_bytes = next;
        let bytes_len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        next = next.saturating_add(bytes_len);
        Section {
            id: *id,
            is_critical: *id == SECTION_PACKS,
            offset_bytes,
            bytes: bytes_len,
            digest: digest::of_stored(bytes),
        }
    });
    let prefix = Prefix {
        sections: described.collect(),
        root: finished.root,
        head,
    };
    let repository = writer.session.repository();
    let mut manifest = encode_prefix(repository.id(), &prefix);
    debug_assert_eq!(manifest.len(), PREFIX_BYTES, "the prefix is a fixed part");
    let digest = digest::of_stored(&manifest);
    for (_, bytes) in &sections {
        manifest.extend_from_slice(bytes);
    }
    writer
        .session
        .commit(prefix.head.image, &manifest, digest, facts.committed)?;
    Ok(Committed {
        head: prefix.head,
        digest,
    })
}

fn head(writer: &ImageWriter, facts: &ImageFacts, finished: &Finished) -> ImageHead {
    let claim = writer.session.facts();
    ImageHead {
        image: image_id(claim.session),
        volume: claim.volume,
        volume_name: claim.volume_name.clone(),
        host: claim.host,
        host_name: claim.host_name.clone(),
        device: facts.device.clone(),
        session: claim.session,
        sequence: claim.sequence,
        previous: facts.previous,
        base: writer
            .base
            .as_ref()
            .map(|b| (b.head().image, b.head().sequence)),
        state: writer
            .framer
            .digests()
            .of_state(&finished.root, writer.framer.geometry()),
        base_state: writer
            .base
            .as_ref()
            .map_or(Digest::NONE, |b| b.head().state),
        generation: facts.generation,
        domain: writer.session.repository().facts().domain,
        geometry: *writer.framer.geometry(),
        kind: facts.kind,
        reason: facts.reason,
        consistency: facts.consistency,
        instant: facts.instant,
        committed: facts.committed,
        counters: Counters {
            stored_bytes: writer.session.stored_bytes(),
            ..facts.counters
        },
        kinds: finished.kinds,
    }
}

/// The base's table with what has changed; packs of which nothing is used any more are left out.
fn pack_table(
    base: Vec<PackRow>,
    sealed: &[PackFacts],
    uses: &BTreeMap<ObjectId, UseChange>,
) -> Result<Vec<PackRow>, ImageError> {
    let mut rows: BTreeMap<ObjectId, PackRow> = base.into_iter().map(|r| (r.pack, r)).collect();
    for pack in sealed {
        let row = PackRow {
            pack: pack.pack,
            bytes: pack.bytes,
            digest: pack.digest,
            frames: 0,
            pages: 0,
            entries: pack.entries,
        };
        rows.insert(pack.pack, row);
    }
    for (pack, change) in uses {
        let counted = rows.get_mut(pack).and_then(|row| {
            row.frames = changed(row.frames, change.frames)?;
            row.pages = changed(row.pages, change.pages)?;
            (row.frames.checked_add(row.pages)? <= row.entries).then_some(())
        });
        // Only a base whose table is not what its tree says leads here: do not build on it.
        counted.ok_or(ImageError::Misuse(
            "a base whose pack table does not fit its tree",
        ))?;
    }
    rows.retain(|_, row| row.frames > 0 || row.pages > 0);
    Ok(rows.into_values().collect())
}

fn changed(count: u32, by: i64) -> Option<u32> {
    u32::try_from(i64::from(count).checked_add(by)?).ok()
}

/// The image's id: random as its session's, and not the same.
fn image_id(session: SessionId) -> ImageId {
    let digest = blake3::derive_key("blktide v1 image id", &session.0);
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(digest) {
        *to = from;
    }
    ImageId(id)
}
