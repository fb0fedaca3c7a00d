//! Storage that loses power: folders, files and devices behind one volatile cache.
//!
//! ```text
//! write, link, unlink …  ──▶  seen (what programs read)          cut: stable + any subset of pending, in order
//!                        └─▶  pending ──sync(node)──▶ stable
//! ```
//! **Model, harsher than a real disk.** Every 512-byte sector of a write, every change of a length and every
//! change of a folder's entry is a change of its own. A power cut keeps any subset of those not yet synced, in
//! their order. [`SimDisk::sync`] of a file makes its content and length stable and says nothing about its name;
//! `sync` of a folder makes its entries stable and says nothing about what they lead to. After a failed `sync` the
//! changes it covered may be lost, and no later `sync` settles them (as Linux does it: the error is told once).
//! A sector is whole or not there; nothing is written elsewhere by mistake.
//!
//! Operations are counted, and any of them can be made to fail with [`SimDisk::fail`].

mod cut;
mod state;

pub use cut::Cut;

use crate::seed::Seed;
use state::{Inode, State, What};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that a cut keeps or loses together.
pub const SECTOR_BYTES: usize = 512;

/// A file, a folder or a device. Stays the same over cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(u64);

/// What kind of operation a [`Fault`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `create`, `create_folder`, `create_unnamed`.
    Create,
    /// `open`, `list`, `len`.
    Look,
    /// `read_at`.
    Read,
    /// `write_at`, `set_len`.
    Write,
    /// `link`, `unlink`, `rename`.
    Entry,
    /// `sync`.
    Sync,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EIO, and nothing was done.
    Eio,
    /// ENOSPC, and nothing was done.
    Enospc,
    /// EIO, but it was done.
    LateEio,
    /// A transfer of at most so many bytes; other operations succeed.
    Short(usize),
}

/// An operation that is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which operations are counted; `None`: all.
    pub kind: Option<Kind>,
    /// How many of them succeed first.
    pub skip: u64,
    /// How it fails.
    pub failure: Failure,
    /// Whether all later ones fail, too.
    pub sticky: bool,
}

/// Simulated storage. All methods take `&self`; threads may share it.
#[derive(Debug)]
pub struct SimDisk {
    state: Mutex<State>,
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl SimDisk {
    /// Storage with one empty root folder.
    pub fn new() -> Self {
        let mut state = State::default();
        state.add(Inode::Folder(BTreeMap::new()));
        Self::from_state(state)
    }

    /// The root folder.
    pub const fn root(&self) -> Node {
        Node(0)
    }

    /// Adds a device of `len_bytes` zeroes. It has no name and is there after every cut.
    pub fn add_device(&self, len_bytes: usize) -> Node {
        self.lock().add(Inode::Device(vec![0; len_bytes]))
    }

    /// Creates an empty file; `AlreadyExists` if the name is taken.
    pub fn create(&self, folder: Node, name: &str) -> io::Result<Node> {
        self.create_inode(folder, name, Inode::File(Vec::new()))
    }

    /// Creates an empty folder; `AlreadyExists` if the name is taken.
    pub fn create_folder(&self, folder: Node, name: &str) -> io::Result<Node> {
        self.create_inode(folder, name, Inode::Folder(BTreeMap::new()))
    }

    /// Creates a file without a name (`O_TMPFILE`).
    pub fn create_unnamed(&self) -> io::Result<Node> {
        let mut state = self.lock();
        state.operate(Kind::Create, |state| Ok(state.add(Inode::File(Vec::new()))))
    }

    /// The node of a name; `NotFound`.
    pub fn open(&self, folder: Node, name: &str) -> io::Result<Node> {
        let mut state = self.lock();
        state.operate(Kind::Look, |state| state.entry(folder, name))
    }

    /// Names in a folder, ascending.
    pub fn list(&self, folder: Node) -> io::Result<Vec<String>> {
        let mut state = self.lock();
        state.operate(Kind::Look, |state| {
            Ok(state.folder(folder)?.keys().cloned().collect())
        })
    }

    /// Length in bytes of a file or device.
    pub fn len(&self, node: Node) -> io::Result<u64> {
        let mut state = self.lock();
        state.operate(Kind::Look, |state| {
            Ok(u64::try_from(state.bytes(node)?.len()).expect("a length"))
        })
    }

    /// Reads at most `buf.len()` bytes; 0 at the end.
    pub fn read_at(&self, node: Node, offset_bytes: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let limit = state.transfer_limit(Kind::Read, buf.len());
        state.operate(Kind::Read, |state| {
            let bytes = state.bytes(node)?;
            let start = usize::try_from(offset_bytes).map_or(bytes.len(), |o| o.min(bytes.len()));
            let count = (bytes.len() - start).min(limit);
            buf[..count].copy_from_slice(&bytes[start..start + count]);
            Ok(count)
        })
    }

    /// The whole content, as one `read_at` of everything.
    pub fn read(&self, node: Node) -> io::Result<Vec<u8>> {
        let mut all = vec![0; self.peek(node).len()];
        let count = self.read_at(node, 0, &mut all)?;
        all.truncate(count);
        Ok(all)
    }

    /// Writes at most all of `data`, growing a file; returns how much. Volatile until [`SimDisk::sync`].
    pub fn write_at(&self, node: Node, offset_bytes: u64, data: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let limit = state.transfer_limit(Kind::Write, data.len());
        state.operate(Kind::Write, |state| {
            state.write(node, offset_bytes, &data[..limit])?;
            Ok(limit)
        })
    }

    /// Cuts or grows a file. Volatile until [`SimDisk::sync`].
    pub fn set_len(&self, node: Node, len_bytes: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.operate(Kind::Write, |state| {
            state.bytes(node)?;
            let len = usize::try_from(len_bytes).expect("a test's length");
            state.change(node, What::Length(len));
            Ok(())
        })
    }

    /// Gives `node` one more name (`linkat`); `AlreadyExists`. Volatile until `sync(folder)`.
    pub fn link(&self, node: Node, folder: Node, name: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.operate(Kind::Entry, |state| state.enter_new(folder, name, node))
    }

    /// Removes a name; `NotFound`. Volatile until `sync(folder)`.
    pub fn unlink(&self, folder: Node, name: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.operate(Kind::Entry, |state| {
            state.entry(folder, name)?;
            state.change(folder, What::Entry(name.to_owned(), None));
            Ok(())
        })
    }

    /// Renames within a folder, replacing what has the new name: at once or not at all.
    pub fn rename(&self, folder: Node, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.lock();
        state.operate(Kind::Entry, |state| {
            let node = state.entry(folder, from)?;
            state.change(folder, What::Rename(from.to_owned(), to.to_owned(), node));
            Ok(())
        })
    }

    /// Makes what was done to this file, folder or device stable. Not the name of a file: that is its folder's.
    pub fn sync(&self, node: Node) -> io::Result<()> {
        let mut state = self.lock();
        let result = state.operate(Kind::Sync, |state| {
            state.settle(node);
            Ok(())
        });
        if result.is_err() {
            state.strand(node);
        }
        result
    }

    /// Content as programs see it, without an operation being counted. For a test's eyes.
    pub fn peek(&self, node: Node) -> Vec<u8> {
        self.lock()
            .bytes(node)
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    }

    /// The node of a name, without an operation being counted. For a test's eyes.
    pub fn peek_entry(&self, folder: Node, name: &str) -> Option<Node> {
        self.lock().entry(folder, name).ok()
    }

    /// Lets an operation fail. Several faults may wait at once.
    pub fn fail(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// No more faults.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// Operations so far, failed ones counted.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Number of changes that a cut may lose now.
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    /// Which subsets to try: all of them if there are at most `limit`; else none, all, each alone, all but each,
    /// and random ones of `seed`, `limit` in all (but never fewer than the ones named).
    pub fn cuts(&self, limit: usize, seed: Seed) -> Vec<Cut> {
        cut::cuts(self.pending(), limit, seed)
    }

    /// The storage as `cut` leaves it: nothing pending, no faults, no operation counted.
    #[must_use]
    pub fn after(&self, cut: &Cut) -> Self {
        Self::from_state(self.lock().after(cut))
    }

    /// A copy of everything, pending changes and faults included: to go two ways from here.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::from_state(self.lock().clone())
    }

    /// A number that differs if what programs see, what is stable or what is pending differs: to recognise a state that was
    /// looked at before.
    pub fn fingerprint(&self) -> u64 {
        self.lock().fingerprint()
    }

    fn create_inode(&self, folder: Node, name: &str, inode: Inode) -> io::Result<Node> {
        let mut state = self.lock();
        state.operate(Kind::Create, |state| {
            let node = state.add(inode);
            state.enter_new(folder, name, node).map(|()| node)
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const fn from_state(state: State) -> Self {
        Self {
            state: Mutex::new(state),
        }
    }
}

#[cfg(test)]
mod tests;
