//! Packs: where frames and pages are appended, by several threads.
//!
//! ```text
//!   append ─▶ copied behind the last entry, under the lock ─▶ a full MiB is written outside of it ─▶ 32 MiB: next pack
//!   seal   ─▶ transfers in flight are over ─▶ tail, cut, fsync, link ─▶ counted as durable
//! ```
//! **Invariant**: a pack's name appears once all its bytes are durable; after any failure nothing more is appended.

use crate::error::RepoError;
use crate::name;
use crate::store::{Created, Store, StoreError, Upload};
use blktide_format::entry::{self, Codec, EntryFacts, EntryKind, Place};
use blktide_format::object::{self, Identity, ObjectKind, crc64};
use blktide_sys::buffer::AlignedBuffer;
use blktide_types::id::{Digest, ObjectId, RepositoryId, SessionId, VolumeId};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A pack is closed when it has grown to this.
pub const PACK_BYTES: u64 = 32 << 20;
/// Bytes of one transfer.
const PIECE_BYTES: usize = 1 << 20;

/// A pack that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackFacts {
    /// Its id.
    pub pack: ObjectId,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its header and its entries' headers.
    pub digest: Digest,
    /// Entries in it.
    pub entries: u32,
}

/// What is to be appended.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry<'a> {
    /// Frame or page.
    pub kind: EntryKind,
    /// First block of the leaf, or of what the page covers.
    pub first_block: u64,
    /// log2 of the block size.
    pub block_shift: u8,
    /// How it is stored.
    pub codec: Codec,
    /// Bytes once decompressed.
    pub raw_bytes: u32,
    /// The bytes to store.
    pub payload: &'a [u8],
}

/// The packs of one session.
pub(crate) struct Packs {
    store: Arc<dyn Store>,
    repository: RepositoryId,
    volume: VolumeId,
    session: SessionId,
    pack_bytes: u64,
    state: Mutex<State>,
    /// Told after each transfer.
    transferred: Condvar,
}

#[derive(Default)]
struct State {
    current: Option<Open>,
    begun: u32,
    durable: Vec<PackFacts>,
    stored_bytes: u64,
    is_failed: bool,
}

/// A pack that is being filled.
struct Open {
    id: ObjectId,
    /// Shared with the transfers under way.
    upload: Arc<Box<dyn Upload>>,
    buffer: AlignedBuffer,
    filled: usize,
    buffer_at: u64,
    headers: blake3::Hasher,
    entries: u32,
}

/// A full piece that is not yet written.
struct Piece {
    upload: Arc<Box<dyn Upload>>,
    offset_bytes: u64,
    buffer: AlignedBuffer,
}

impl Open {
    const fn len_bytes(&self) -> u64 {
        self.buffer_at.saturating_add(self.filled as u64)
    }

    /// Copies `bytes` behind what is there; pieces that become full go to `full`.
    fn copy(&mut self, mut bytes: &[u8], full: &mut Vec<Piece>) {
        while !bytes.is_empty() {
            let room = PIECE_BYTES.saturating_sub(self.filled);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            let end = self.filled.saturating_add(now.len());
            if let Some(to) = self.buffer.get_mut(self.filled..end) {
                to.copy_from_slice(now);
            }
            self.filled = end;
            bytes = rest;
            if self.filled == PIECE_BYTES {
                let buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::new(PIECE_BYTES));
                full.push(Piece {
                    upload: Arc::clone(&self.upload),
                    offset_bytes: self.buffer_at,
                    buffer,
                });
                self.filled = 0;
                self.buffer_at = self.buffer_at.saturating_add(PIECE_BYTES as u64);
            }
        }
    }
}

impl Packs {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        repository: RepositoryId,
        volume: VolumeId,
        session: SessionId,
    ) -> Self {
        Self {
            store,
            repository,
            volume,
            session,
            pack_bytes: PACK_BYTES,
            state: Mutex::new(State::default()),
            transferred: Condvar::new(),
        }
    }

    /// Appends an entry and says where it lies. Waits: when a piece or a pack is full, for the store.
    ///
    /// Errors: then the packs have failed for good.
    pub(crate) fn append(&self, new: &NewEntry<'_>) -> Result<Place, RepoError> {
        let mut state = self.lock();
        if state.is_failed {
            return Err(RepoError::Poisoned);
        }
        let grown = u64::from(entry::HEADER_BYTES).saturating_add(new.payload.len() as u64);
        let is_full =
            |o: &Open| o.entries > 0 && o.len_bytes().saturating_add(grown) > self.pack_bytes;
        let mut full = Vec::new();
        let old = state.current.take_if(|o| is_full(o));
        let placed = self.place(&mut state, new, &mut full);
        if placed.is_ok() {
            state.stored_bytes = state.stored_bytes.saturating_add(grown);
        }
        drop(state);
        let done = placed.and_then(|place| {
            self.write(full)?;
            if let Some(old) = old {
                self.publish(old)?;
            }
            Ok(place)
        });
        if done.is_err() {
            self.lock().is_failed = true;
        }
        done
    }

    /// Makes all packs durable and returns their facts. Nothing may be appended while or after it runs.
    pub(crate) fn seal(&self) -> Result<Vec<PackFacts>, RepoError> {
        let mut state = self.lock();
        if state.is_failed {
            return Err(RepoError::Poisoned);
        }
        let last = state.current.take();
        drop(state);
        if let Some(last) = last
            && let Err(e) = self.publish(last)
        {
            self.lock().is_failed = true;
            return Err(e);
        }
        Ok(self.lock().durable.clone())
    }

    /// Bytes appended so far.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.lock().stored_bytes
    }

    /// No more appends; every pack that was begun may be there.
    pub(crate) fn stop(&self) -> Vec<ObjectId> {
        let mut state = self.lock();
        state.is_failed = true;
        state.current = None;
        (0..state.begun)
            .map(|n| object::object_id(self.session, n))
            .collect()
    }

    fn place(
        &self,
        state: &mut State,
        new: &NewEntry<'_>,
        full: &mut Vec<Piece>,
    ) -> Result<Place, RepoError> {
        if state.current.is_none() {
            state.current = Some(self.begin(state.begun, full)?);
            state.begun = state.begun.saturating_add(1);
        }
        let too_large = |_| RepoError::Misuse("an entry that is too large");
        let stored_bytes = u32::try_from(new.payload.len()).map_err(too_large)?;
        let Some(open) = state.current.as_mut() else {
            return Err(RepoError::Poisoned);
        };
        let facts = EntryFacts {
            kind: new.kind,
            codec: new.codec,
            block_shift: new.block_shift,
            raw_bytes: new.raw_bytes,
            stored_bytes,
            first_block: new.first_block,
            payload_checksum: crc64(&[new.payload]),
        };
        let offset_bytes = u32::try_from(open.len_bytes()).map_err(too_large)?;
        let header = entry::encode(&facts, open.id, offset_bytes);
        let header = entry::header_bytes(&header);
        open.headers.update(header);
        open.entries = open.entries.saturating_add(1);
        open.copy(header, full);
        open.copy(new.payload, full);
        Ok(Place {
            pack: open.id,
            offset_bytes,
            stored_bytes,
            raw_bytes: new.raw_bytes,
            codec: new.codec,
        })
    }

    fn begin(&self, counter: u32, full: &mut Vec<Piece>) -> Result<Open, RepoError> {
        let id = object::object_id(self.session, counter);
        let name = name::pack(self.volume, id);
        let upload = self
            .store
            .upload(&name)
            .map_err(RepoError::at("create", &name))?;
        let mut open = Open {
            id,
            upload: Arc::new(upload),
            buffer: AlignedBuffer::new(PIECE_BYTES),
            filled: 0,
            buffer_at: 0,
            headers: blake3::Hasher::new(),
            entries: 0,
        };
        let identity = Identity {
            repository: self.repository,
            object: id,
            volume: self.volume,
            session: self.session,
        };
        let header = object::encode_header(ObjectKind::Pack, identity, 0, 0);
        let header = object::header_bytes(&header);
        open.headers.update(header);
        open.copy(header, full);
        Ok(open)
    }

    /// Writes full pieces, outside the lock.
    fn write(&self, pieces: Vec<Piece>) -> Result<(), RepoError> {
        let mut result = Ok(());
        for piece in pieces {
            if result.is_ok() {
                result = piece.upload.write_at(piece.offset_bytes, &piece.buffer);
            }
            let state = self.lock();
            drop(piece);
            drop(state);
            self.transferred.notify_all();
        }
        result.map_err(RepoError::at("write", "a pack"))
    }

    fn publish(&self, open: Open) -> Result<(), RepoError> {
        let bytes = open.len_bytes();
        let name = name::pack(self.volume, open.id);
        let facts = PackFacts {
            pack: open.id,
            bytes,
            digest: Digest(*open.headers.finalize().as_bytes()),
            entries: open.entries,
        };
        let tail = open.filled.next_multiple_of(AlignedBuffer::ALIGN);
        if let Some(tail) = open.buffer.get(..tail).filter(|t| !t.is_empty()) {
            // Bytes behind the last entry are zero, and cut off before the pack gets its name.
            open.upload
                .write_at(open.buffer_at, tail)
                .map_err(RepoError::at("write", &name))?;
        }
        let upload = self.alone(open.upload);
        match upload
            .publish(bytes)
            .map_err(RepoError::at("create", &name))?
        {
            Created::New => {
                self.lock().durable.push(facts);
                Ok(())
            }
            // Ids are random: nobody else makes a pack of this name.
            Created::Existed => Err(RepoError::at("create", &name)(StoreError::Io(
                std::io::ErrorKind::AlreadyExists.into(),
            ))),
        }
    }

    /// The upload, once no transfer of it is under way.
    fn alone(&self, mut upload: Arc<Box<dyn Upload>>) -> Box<dyn Upload> {
        let mut state = self.lock();
        loop {
            match Arc::try_unwrap(upload) {
                Ok(alone) => return alone,
                Err(shared) => upload = shared,
            }
            state = self
                .transferred
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
