//! Small worlds of P1, P3 and P14, explored by loom on the engine's own atomics.
//!
//! Run by `RUSTFLAGS="--cfg loom" cargo test -p blktide-engine --lib --release worlds`. Each world holds in every order that is
//! explored (all of them, or all with a stated number of preemptions), and each rule that is left out is found.
//!
//! What loom cannot say: a `SeqCst` *access* is `AcqRel` to it, so a full barrier is always a fence in the engine; it
//! does not switch threads between an access and the fence after it; it does not reorder a load behind a later store of
//! its own thread; of the accesses to a word it remembers the last, so that an access of one's own in between hides another
//! thread's (who only looks is therefore a thread of its own). The device is an atomic read and written `Relaxed`: the
//! weakest there is, all order comes from the protocol.

mod p1;
mod p14;
mod p3;
mod whole;

use crate::broken::{Break, leave_out};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Explores `world` with `rule` left out; `bound` limits preemptions (`None`: every order). How many executions, or
/// the violation.
fn explore(
    rule: Option<Break>,
    bound: Option<usize>,
    world: impl Fn() + Sync + Send + 'static,
) -> Result<usize, String> {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = bound;
    model.max_branches = 5_000; // a longer execution is a hang
    leave_out(rule);
    let end = catch_unwind(AssertUnwindSafe(|| {
        model.check(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            world();
        });
    }));
    leave_out(None);
    let runs = runs.load(Ordering::Relaxed);
    let text = end.err().map(|e| {
        let owned = e.downcast_ref::<String>().cloned();
        owned
            .or_else(|| e.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_default()
    });
    println!(
        "{rule:?}: {runs} executions: {}",
        text.as_deref().unwrap_or("holds")
    );
    text.map_or(Ok(runs), Err)
}
