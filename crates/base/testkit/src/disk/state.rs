//! What the simulated storage holds, and how a change is applied, settled or lost.

use super::{Cut, Failure, Fault, Kind, Node, SECTOR_BYTES};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[derive(Clone, Debug, Hash)]
pub(super) enum Inode {
    File(Vec<u8>),
    Device(Vec<u8>),
    Folder(BTreeMap<String, Node>),
}

#[derive(Clone, Debug, Hash)]
pub(super) enum What {
    Sector(usize, Vec<u8>),
    Length(usize),
    Entry(String, Option<Node>),
    Rename(String, String, Node),
}

#[derive(Clone, Debug, Hash)]
pub(super) struct Change {
    node: Node,
    what: What,
    /// A sync that should have settled it failed: no later one will.
    stranded: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct State {
    seen: BTreeMap<Node, Inode>,
    stable: BTreeMap<Node, Inode>,
    pub(super) pending: Vec<Change>,
    pub(super) faults: Vec<Fault>,
    pub(super) operations: u64,
}

impl State {
    /// Adds a node that nothing leads to: of itself a cut can neither lose nor show it.
    pub(super) fn add(&mut self, inode: Inode) -> Node {
        let node = Node(u64::try_from(self.seen.len()).expect("a count"));
        let empty = match &inode {
            Inode::File(_) => Inode::File(Vec::new()),
            Inode::Device(bytes) => Inode::Device(bytes.clone()),
            Inode::Folder(_) => Inode::Folder(BTreeMap::new()),
        };
        self.stable.insert(node, empty);
        self.seen.insert(node, inode);
        node
    }

    /// Counts an operation and performs it, unless a fault says otherwise.
    pub(super) fn operate<T>(
        &mut self,
        kind: Kind,
        perform: impl FnOnce(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        self.operations += 1;
        match self.due(kind, true) {
            Some(Failure::Eio) => Err(io::Error::from_raw_os_error(EIO)),
            Some(Failure::Enospc) => Err(io::Error::from_raw_os_error(ENOSPC)),
            Some(Failure::LateEio) => {
                perform(self)?;
                Err(io::Error::from_raw_os_error(EIO))
            }
            Some(Failure::Short(_)) | None => perform(self),
        }
    }

    /// How many of `wanted` bytes the transfer that comes next may move.
    pub(super) fn transfer_limit(&mut self, kind: Kind, wanted: usize) -> usize {
        match self.due(kind, false) {
            Some(Failure::Short(bytes)) => bytes.min(wanted),
            Some(Failure::Eio | Failure::Enospc | Failure::LateEio) | None => wanted,
        }
    }

    pub(super) fn bytes(&self, node: Node) -> io::Result<&[u8]> {
        match self.seen.get(&node) {
            Some(Inode::File(bytes) | Inode::Device(bytes)) => Ok(bytes),
            Some(Inode::Folder(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn folder(&self, node: Node) -> io::Result<&BTreeMap<String, Node>> {
        match self.seen.get(&node) {
            Some(Inode::Folder(entries)) => Ok(entries),
            Some(Inode::File(_) | Inode::Device(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn entry(&self, folder: Node, name: &str) -> io::Result<Node> {
        self.folder(folder)?
            .get(name)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn enter_new(&mut self, folder: Node, name: &str, node: Node) -> io::Result<()> {
        if self.folder(folder)?.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(folder, What::Entry(name.to_owned(), Some(node)));
        Ok(())
    }

    pub(super) fn write(&mut self, node: Node, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).expect("a test's offset");
        let end = start + data.len();
        let old = self.bytes(node)?;
        if end > old.len() {
            if matches!(self.seen.get(&node), Some(Inode::Device(_))) {
                return Err(io::Error::from_raw_os_error(ENOSPC));
            }
            self.change(node, What::Length(end));
        }
        let mut at = start;
        while at < end {
            let index = at / SECTOR_BYTES;
            let sector_end = ((index + 1) * SECTOR_BYTES).min(end);
            let mut sector = self.sector(node, index);
            let within = at - index * SECTOR_BYTES;
            sector[within..within + sector_end - at]
                .copy_from_slice(&data[at - start..sector_end - start]);
            self.change(node, What::Sector(index, sector));
            at = sector_end;
        }
        Ok(())
    }

    /// Makes a change seen, and pending.
    pub(super) fn change(&mut self, node: Node, what: What) {
        apply(&mut self.seen, node, &what);
        self.pending.push(Change {
            node,
            what,
            stranded: false,
        });
    }

    pub(super) fn settle(&mut self, node: Node) {
        let stable = &mut self.stable;
        // A stranded change keeps what came after it for the same node from being surely on top of it; the
        // later one is applied to the stable state all the same, and the stranded one dropped if the same place
        // was written anew.
        let pending = std::mem::take(&mut self.pending);
        let mut kept = Vec::new();
        for change in pending {
            if change.node != node || change.stranded {
                kept.push(change);
                continue;
            }
            kept.retain(|older: &Change| {
                !(older.node == node && older.stranded && same_place(&older.what, &change.what))
            });
            apply(stable, node, &change.what);
        }
        self.pending = kept;
    }

    pub(super) fn strand(&mut self, node: Node) {
        for change in self.pending.iter_mut().filter(|c| c.node == node) {
            change.stranded = true;
        }
    }

    pub(super) fn after(&self, cut: &Cut) -> Self {
        let mut stable = self.stable.clone();
        for (change, kept) in self.pending.iter().zip(cut.kept()) {
            if *kept {
                apply(&mut stable, change.node, &change.what);
            }
        }
        Self {
            seen: stable.clone(),
            stable,
            ..Self::default()
        }
    }

    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.seen, &self.stable, &self.pending).hash(&mut hasher);
        hasher.finish()
    }

    /// The failure that is due for an operation of `kind`. Counted down only if `consume`; a short transfer is looked
    /// at first and consumed when the operation is counted.
    fn due(&mut self, kind: Kind, consume: bool) -> Option<Failure> {
        let mut found = None;
        for fault in &mut self.faults {
            if fault.kind.is_some_and(|k| k != kind) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= u64::from(consume);
            } else if found.is_none() {
                found = Some(*fault);
            }
        }
        let fault = found?;
        if consume && !fault.sticky {
            let at = self.faults.iter().position(|f| *f == fault)?;
            self.faults.remove(at);
        }
        Some(fault.failure)
    }

    fn sector(&self, node: Node, index: usize) -> Vec<u8> {
        let bytes = self.bytes(node).unwrap_or_default();
        let start = (index * SECTOR_BYTES).min(bytes.len());
        let end = ((index + 1) * SECTOR_BYTES).min(bytes.len());
        let mut sector = bytes[start..end].to_vec();
        sector.resize(SECTOR_BYTES, 0);
        sector
    }
}

fn same_place(older: &What, newer: &What) -> bool {
    match (older, newer) {
        (What::Sector(a, _), What::Sector(b, _)) => a == b,
        (What::Length(_), What::Length(_)) => true,
        (What::Entry(a, _), What::Entry(b, _)) => a == b,
        // A rename touches two names; to be harsh it is never taken as overwritten.
        (What::Sector(..) | What::Length(_) | What::Entry(..) | What::Rename(..), _) => false,
    }
}

fn apply(nodes: &mut BTreeMap<Node, Inode>, node: Node, what: &What) {
    match nodes.get_mut(&node) {
        Some(Inode::File(bytes)) => match what {
            What::Length(len) => bytes.resize(*len, 0),
            What::Sector(index, data) => overlay(bytes, *index, data),
            What::Entry(..) | What::Rename(..) => {}
        },
        Some(Inode::Device(bytes)) => match what {
            What::Sector(index, data) => overlay(bytes, *index, data),
            What::Length(_) | What::Entry(..) | What::Rename(..) => {}
        },
        Some(Inode::Folder(entries)) => match what {
            What::Entry(name, Some(to)) => {
                entries.insert(name.clone(), *to);
            }
            What::Entry(name, None) => {
                entries.remove(name);
            }
            What::Rename(from, to, moved) => {
                entries.remove(from);
                entries.insert(to.clone(), *moved);
            }
            What::Sector(..) | What::Length(_) => {}
        },
        None => {}
    }
}

/// Puts a sector where the file reaches; what lies past its length is not there.
fn overlay(bytes: &mut [u8], index: usize, data: &[u8]) {
    let start = (index * SECTOR_BYTES).min(bytes.len());
    let end = ((index + 1) * SECTOR_BYTES).min(bytes.len());
    bytes[start..end].copy_from_slice(&data[..end - start]);
}
