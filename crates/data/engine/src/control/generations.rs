//! Banks and generations (P2): what changed since a name, how runs are merged, what the bitmap file keeps.
//!
//! **Invariant**: a bank that a table names only ever gains bits.

use super::Control;
use crate::atomic::{AtomicU64, Ordering, Words};
use crate::broken::{Break, broken, step};
use crate::engine::Inner;
use crate::error::EngineError;
use crate::tracker::{Epoch, Generation, StoredGeneration, marked_blocks, store_table};
use blktide_types::clock::WallTime;
use blktide_types::id::GenerationName;
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use std::sync::Arc;

/// A generation that is asked for.
#[derive(Clone, Copy)]
pub(super) struct Wish {
    /// Its name: random, never used before.
    pub(super) opens: GenerationName,
    /// When it opens, for people.
    pub(super) at: WallTime,
    /// The generation that the base image's instant opened.
    pub(super) base: Option<GenerationName>,
    /// The name to go on with if the table is found broken.
    pub(super) fresh: GenerationName,
}

/// A generation that lacks nothing but the store of the epoch that opens it.
pub(super) struct Next {
    /// Its name.
    pub(super) name: GenerationName,
    /// Its number, for people.
    pub(super) counter: u64,
    /// Its bank, of zeroes.
    bank: usize,
    /// The copy of the table that names it.
    table: usize,
    /// The generations before it.
    pub(super) before: Vec<Generation>,
    /// Where the base's run begins in them, if the base is known.
    pub(super) base: Option<usize>,
    /// The control side's version from which on this is out of date.
    pub(super) version: u64,
}

impl Next {
    /// The epoch that opens it.
    pub(super) fn epoch(&self, snapshot: bool, sequence: u64) -> Epoch {
        Epoch::new(self.bank, self.table, snapshot, sequence)
    }
}

impl Control {
    /// The blocks written since `name` opened, up to now. Waits: in proportion to the volume's bitmap.
    pub fn changed_since(&self, name: GenerationName) -> Result<BlockSet, EngineError> {
        let unknown = EngineError::UnknownGeneration { name };
        if self.engine.inner.passes_through() {
            return Err(EngineError::PassingThrough);
        }
        let list = self.table().unwrap_or_default();
        let from = position(&list, name).ok_or(unknown)?;
        self.union(list.get(from..).unwrap_or_default())
    }

    /// Marks blocks in the open generation: what the next incremental must read again (an unreadable block, P10).
    pub fn mark(&self, range: BlockRange) {
        let inner = &self.engine.inner;
        let (start, len) = inner.shape.geometry.bytes_of(range);
        inner.marks.mark(inner.marks.epoch(), start, len);
    }

    /// All generations, as the bitmap file keeps them. Right only while the volume is provably closed (P4).
    pub fn export(&self) -> Vec<StoredGeneration> {
        let list = self.table().unwrap_or_default();
        let bits = |bank| self.engine.inner.marks.bank(bank).map(load_all);
        let youngest = |i: usize| {
            let next = list.get(i + 1);
            let this = list.get(i);
            next.map(|g| g.bank) != this.map(|g| g.bank)
        };
        list.iter()
            .enumerate()
            .map(|(i, g)| StoredGeneration {
                name: g.name,
                counter: g.counter,
                opened: g.opened,
                words: if youngest(i) {
                    bits(g.bank).unwrap_or_default()
                } else {
                    Vec::new()
                },
            })
            .collect()
    }

    /// Makes the next generation ready: all that takes time, and nothing that anybody sees. What was made ready before and
    /// not opened is out of date from here on: its place in the table is taken.
    pub(super) fn make_next(&mut self, wish: Wish) -> Result<Next, EngineError> {
        let inner = Arc::clone(&self.engine.inner);
        if inner.passes_through() {
            return Err(EngineError::PassingThrough);
        }
        if self.living.is_some() {
            return Err(EngineError::SnapshotUnderWay);
        }
        if self.table().is_none() {
            // A broken invariant costs a full backup, not a panic.
            self.distrust(
                (Reason::TrackingInterrupted, wish.at),
                "the table of generations did not check",
                wish.fresh,
            );
        }
        self.asked_base = wish.base;
        self.drop_names()?;
        let bank = self.free_bank()?;
        if !broken(Break::WrongBankCleared) {
            prepare_bank(&inner, bank)?;
        }
        let mut list = self.table().ok_or(EngineError::NoBank)?;
        let base = wish.base.and_then(|name| position(&list, name));
        let before = list.clone();
        let counter = self.next_counter();
        let [low, ..] = counter.to_le_bytes();
        let reused = broken(Break::NameReused).then_some(GenerationName([low; 16]));
        let name = reused.unwrap_or(wish.opens);
        list.push(Generation {
            name,
            counter,
            opened: wish.at,
            bank,
        });
        self.version = self.version.wrapping_add(1);
        let table = 1 - inner.marks.epoch().table();
        if let Some(words) = inner.tables.get(table) {
            store_table(words, &list);
        }
        Ok(Next {
            name,
            counter,
            bank,
            table,
            before,
            base,
            version: self.version,
        })
    }

    /// After a swap, when nobody waits for it: what closed need not be locked any more, and a name and a bank are kept free. So
    /// what a stop stores fits the next life as it is, which knows no hints yet.
    ///
    /// Waits: in proportion to the volume's bitmap.
    pub fn settle(&mut self) {
        let inner = Arc::clone(&self.engine.inner);
        let epoch = inner.marks.epoch();
        if let Some(closed) = self.table().and_then(|t| t.iter().rev().nth(1).copied())
            && closed.bank != epoch.bank()
            && let Some(bank) = inner.marks.bank(closed.bank)
        {
            bank.settle();
        }
        // If there is no room, the next generation will say so.
        let _room = self.drop_names();
        let _free = self.free_bank();
    }

    /// A bank that no table names, after merging neighbours if need be.
    pub(super) fn free_bank(&mut self) -> Result<usize, EngineError> {
        let banks = self.engine.inner.marks.banks();
        loop {
            let list = self.table().ok_or(EngineError::NoBank)?;
            let used = |bank| list.iter().any(|g| g.bank == bank);
            if let Some(bank) = (0..banks).find(|b| !used(*b)) {
                return Ok(bank);
            }
            self.merge(&list)?;
        }
    }

    /// Makes room for one more name: the oldest that no hint names goes. What it alone held goes to the run before it.
    pub(super) fn drop_names(&mut self) -> Result<(), EngineError> {
        let kept: Vec<_> = self.hinted().into_iter().chain(self.asked_base).collect();
        loop {
            let mut list = self.table().ok_or(EngineError::NoBank)?;
            if list.len() < self.engine.inner.shape.generations {
                return Ok(());
            }
            // The open generation has to stay; with fewer hints than names there is another.
            let closed = list.len().saturating_sub(1);
            let unhinted = list
                .iter()
                .take(closed)
                .position(|g| !kept.contains(&g.name));
            let dropped = list.remove(unhinted.unwrap_or(0));
            let alone = !list.iter().any(|g| g.bank == dropped.bank);
            let before = unhinted.unwrap_or(0).checked_sub(1);
            if let Some(older) = before.and_then(|i| list.get(i)).filter(|_| alone) {
                let inner = &self.engine.inner;
                let bits = inner.marks.bank(dropped.bank).map(load_all);
                or_into(inner, older.bank, &bits.unwrap_or_default())?;
            }
            self.set_table(&list);
        }
    }

    /// Merges one pair of closed neighbours whose boundary no hint names (and no base that was just asked for, if there is
    /// another): the younger's bits into the older's bank.
    pub(super) fn merge(&mut self, list: &[Generation]) -> Result<(), EngineError> {
        let hints = self.hinted();
        let live = self.engine.inner.marks.epoch().bank();
        let find = |kept: Option<GenerationName>| {
            list.windows(2).find_map(|pair| match pair {
                [older, younger]
                    if older.bank != younger.bank
                        && younger.bank != live
                        && !hints.contains(&younger.name)
                        && kept != Some(younger.name) =>
                {
                    Some((older.bank, younger.bank))
                }
                _ => None,
            })
        };
        let boundary = find(self.asked_base).or_else(|| find(None));
        let (older, younger) = boundary.ok_or(EngineError::NoBank)?;
        let inner = &self.engine.inner;
        let bits = inner.marks.bank(younger).map(load_all).unwrap_or_default();
        if !broken(Break::MergeForgets) {
            or_into(inner, older, &bits)?;
        }
        let merged: Vec<_> = list
            .iter()
            .map(|g| Generation {
                bank: if g.bank == younger { older } else { g.bank },
                ..*g
            })
            .collect();
        self.set_table(&merged);
        Ok(())
    }

    /// The blocks marked in any bank of `list`, each bank once.
    pub(super) fn union(&self, list: &[Generation]) -> Result<BlockSet, EngineError> {
        let inner = &self.engine.inner;
        let geometry = &inner.shape.geometry;
        let mut set = BlockSet::new(geometry.block_count());
        let mut done = None;
        for generation in list {
            if done != Some(generation.bank) {
                let bank = inner.marks.bank(generation.bank);
                let bank = bank.ok_or(EngineError::NoBank)?;
                set.union_with(&marked_blocks(geometry, bank.all()));
                done = Some(generation.bank);
            }
        }
        Ok(set)
    }
}

/// Where a name stands: the start of its run.
pub(super) fn position(list: &[Generation], name: GenerationName) -> Option<usize> {
    let at = list.iter().position(|g| g.name == name)?;
    let bank = list.get(at)?.bank;
    list.iter().position(|g| g.bank == bank)
}

pub(super) fn prepare_bank(inner: &Inner, bank: usize) -> Result<(), EngineError> {
    inner
        .marks
        .bank(bank)
        .ok_or(EngineError::NoBank)?
        .prepare()
        .map_err(|source| EngineError::BankNotReady { source })
}

pub(super) fn or_into(inner: &Inner, bank: usize, words: &[u64]) -> Result<(), EngineError> {
    let bank = inner.marks.bank(bank).ok_or(EngineError::NoBank)?.all();
    if words.len() > bank.len() {
        return Err(EngineError::OtherSize {
            needed: bank.len(),
            found: words.len(),
        });
    }
    for (to, from) in bank.iter().zip(words) {
        if *from != 0 {
            step();
            to.fetch_or(*from, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn load_all(words: &Words) -> Vec<u64> {
    let load = |w: &AtomicU64| w.load(Ordering::Relaxed);
    words.all().iter().map(load).collect()
}
