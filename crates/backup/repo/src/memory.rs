//! A store in memory, for tests: objects as bytes that a test may look at, count, change and take away.

use crate::store::{Created, Store, StoreError, Upload};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What was asked of a [`MemoryStore`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Calls of `get`.
    pub gets: u64,
    /// Bytes that they returned.
    pub got_bytes: u64,
    /// Objects that they read.
    pub objects: BTreeSet<String>,
    /// Objects made.
    pub creates: u64,
    /// Listings.
    pub lists: u64,
    /// Look-ups of a size.
    pub sizes: u64,
}

/// A store in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Clone, Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Arc<Vec<u8>>>,
    asked: Asked,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// A store of its own with the same objects.
    #[must_use]
    pub fn fork(&self) -> Self {
        let inner = self.lock().clone();
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Names of all objects.
    pub fn names(&self) -> Vec<String> {
        self.lock().objects.keys().cloned().collect()
    }

    /// Bytes of an object; empty if there is none.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let inner = self.lock();
        inner
            .objects
            .get(name)
            .map_or_else(Vec::new, |b| b.to_vec())
    }

    /// Replaces an object behind everyone's back; `None` takes it away.
    pub fn put(&self, name: &str, bytes: Option<Vec<u8>>) {
        let mut inner = self.lock();
        match bytes {
            Some(bytes) => inner.objects.insert(name.to_owned(), Arc::new(bytes)),
            None => inner.objects.remove(name),
        };
    }

    /// What was asked since this was last called.
    pub fn asked(&self) -> Asked {
        std::mem::take(&mut self.lock().asked)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MemoryUpload {
    store: MemoryStore,
    name: String,
    bytes: Mutex<Vec<u8>>,
}

impl Upload for MemoryUpload {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let mut all = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
        let end = start.saturating_add(bytes.len());
        if all.len() < end {
            all.resize(end, 0);
        }
        if let Some(to) = all.get_mut(start..end) {
            to.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn publish(self: Box<Self>, len_bytes: u64) -> Result<Created, StoreError> {
        let mut bytes = self
            .bytes
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        bytes.truncate(usize::try_from(len_bytes).unwrap_or(usize::MAX));
        self.store.create(&self.name, &bytes)
    }
}

impl Store for MemoryStore {
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, StoreError> {
        let mut inner = self.lock();
        inner.asked.creates = inner.asked.creates.saturating_add(1);
        if inner.objects.contains_key(name) {
            return Ok(Created::Existed);
        }
        inner
            .objects
            .insert(name.to_owned(), Arc::new(bytes.to_vec()));
        Ok(Created::New)
    }

    fn upload(&self, name: &str) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(MemoryUpload {
            store: self.clone(),
            name: name.to_owned(),
            bytes: Mutex::default(),
        }))
    }

    fn get(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, StoreError> {
        let mut inner = self.lock();
        let Some(object) = inner.objects.get(name).cloned() else {
            return Err(StoreError::NotFound);
        };
        let start = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
        let there = object.get(start..).unwrap_or_default();
        let len = there.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..len), there.get(..len)) {
            to.copy_from_slice(from);
        }
        inner.asked.gets = inner.asked.gets.saturating_add(1);
        inner.asked.got_bytes = inner.asked.got_bytes.saturating_add(len as u64);
        inner.asked.objects.insert(name.to_owned());
        Ok(len)
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        let mut inner = self.lock();
        inner.asked.sizes = inner.asked.sizes.saturating_add(1);
        Ok(inner.objects.get(name).map(|b| b.len() as u64))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let mut inner = self.lock();
        inner.asked.lists = inner.asked.lists.saturating_add(1);
        let prefix = format!("{folder}/");
        let below = inner.objects.keys().filter_map(|n| n.strip_prefix(&prefix));
        let parts: BTreeSet<&str> = below.filter_map(|n| n.split('/').next()).collect();
        Ok(parts.into_iter().map(str::to_owned).collect())
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.lock().objects.remove(name);
        Ok(())
    }
}
