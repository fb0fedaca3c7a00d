//! A store that fails, loses its reply, or hangs at the n-th operation.

use blktide_repo::{Created, Store, StoreError, Upload};
use std::io;
use std::sync::{Arc, Condvar, Mutex};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// EIO, and nothing was done.
    Io,
    /// No room, and nothing was done.
    Full,
    /// It was done, and EIO said.
    LostReply,
    /// It does not come back until released.
    Hang,
}

impl Fault {
    fn error(self) -> StoreError {
        match self {
            Self::Full => StoreError::Full,
            Self::Io | Self::LostReply | Self::Hang => {
                StoreError::Io(io::Error::other("a planted fault"))
            }
        }
    }
}

/// Told the number of each operation.
pub(super) type AtOperation = Arc<dyn Fn(u64) + Send + Sync>;

#[derive(Default)]
struct Plan {
    at_operation: Option<AtOperation>,
    operations: u64,
    /// Fails at this operation, and at all later ones if `for_ever`.
    at: Option<(u64, Fault, bool)>,
    hits: u64,
    released: bool,
}

/// The plan, shared by the store and its uploads.
#[derive(Default)]
pub(super) struct Faults {
    plan: Mutex<Plan>,
    woken: Condvar,
}

impl Faults {
    /// From here on: operation `n` (counted from 0) meets `fault`.
    pub(super) fn at(&self, n: u64, fault: Fault) {
        *self.plan.lock().unwrap() = Plan {
            at: Some((n, fault, false)),
            ..Plan::default()
        };
    }

    /// From here on: operation `n` and all after it meet `fault`.
    pub(super) fn from(&self, n: u64, fault: Fault) {
        *self.plan.lock().unwrap() = Plan {
            at: Some((n, fault, true)),
            ..Plan::default()
        };
    }

    /// From here on: `at_operation` is told of each, before it is done.
    pub(super) fn tell(&self, at_operation: AtOperation) {
        *self.plan.lock().unwrap() = Plan {
            at_operation: Some(at_operation),
            ..Plan::default()
        };
    }

    /// Counts from 0 again.
    pub(super) fn count(&self) {
        *self.plan.lock().unwrap() = Plan::default();
    }

    /// Waits until a fault has been met.
    pub(super) fn wait_for_hit(&self) {
        let plan = self.plan.lock().unwrap();
        drop(self.woken.wait_while(plan, |plan| plan.hits == 0).unwrap());
    }

    /// No more faults; the operations so far, and whether a fault was met.
    pub(super) fn end(&self) -> (u64, bool) {
        let mut plan = self.plan.lock().unwrap();
        let found = (plan.operations, plan.hits > 0);
        *plan = Plan {
            released: true,
            ..Plan::default()
        };
        self.woken.notify_all();
        found
    }

    fn fault(&self) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap();
        let now = plan.operations;
        plan.operations += 1;
        if let Some(at_operation) = plan.at_operation.clone() {
            drop(plan);
            at_operation(now);
            return None;
        }
        let (_, fault, _) = plan
            .at
            .filter(|(n, _, for_ever)| *n == now || (*for_ever && now > *n))?;
        plan.hits += 1;
        self.woken.notify_all();
        if fault == Fault::Hang {
            let _released = self.woken.wait_while(plan, |plan| !plan.released).unwrap();
        }
        Some(fault)
    }

    fn run<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        match self.fault() {
            None => work(),
            Some(fault @ Fault::LostReply) => {
                drop(work());
                Err(fault.error())
            }
            Some(fault) => Err(fault.error()),
        }
    }
}

/// The store.
pub(super) struct FaultyStore {
    pub(super) inner: Arc<dyn Store>,
    pub(super) faults: Arc<Faults>,
}

struct FaultyUpload {
    inner: Box<dyn Upload>,
    faults: Arc<Faults>,
}

impl Upload for FaultyUpload {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.faults.run(|| self.inner.write_at(offset_bytes, bytes))
    }

    fn publish(self: Box<Self>, len_bytes: u64) -> Result<Created, StoreError> {
        let Self { inner, faults } = *self;
        faults.run(|| inner.publish(len_bytes))
    }
}

impl Store for FaultyStore {
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, StoreError> {
        self.faults.run(|| self.inner.create(name, bytes))
    }

    fn upload(&self, name: &str) -> Result<Box<dyn Upload>, StoreError> {
        let inner = self.faults.run(|| self.inner.upload(name))?;
        Ok(Box::new(FaultyUpload {
            inner,
            faults: Arc::clone(&self.faults),
        }))
    }

    fn get(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, StoreError> {
        self.faults.run(|| self.inner.get(name, offset_bytes, buf))
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        self.faults.run(|| self.inner.size(name))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        self.faults.run(|| self.inner.list(folder))
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.faults.run(|| self.inner.delete(name))
    }
}
