//! Planted faults: rules of the protocols, each left out on purpose by a test that shows it is needed.
//!
//! In release code [`broken`] is a constant `false` and every switch is gone.

/// One rule left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    // P3
    /// Epoch and gate are looked at, then the request enters.
    LookBeforeEntering,
    /// No fence between entering and looking.
    NoEnterFence,
    /// No fence between setting the gate and looking at the counters.
    NoHoldFence,
    /// A request loads the gate without acquire.
    GateRelaxed,
    /// A request leaves without release.
    LeaveRelaxed,
    /// The hold loads the counters without acquire.
    CountRelaxed,
    /// A hold commits without having seen the queues empty.
    NoWait,
    /// A hold waits for the first queue only.
    OneQueue,
    /// A request that was parked does not mark again.
    ParkedUnmarked,
    /// A request leaves before its write is complete.
    LeaveBeforeWritten,
    /// The gate opens before the epoch is swapped.
    GateOpensFirst,
    /// A commit does not look whether its hold still lives.
    ExpiredCommits,
    /// The deadline opens the gate without looking who holds it.
    ExpiryIsAStore,
    /// A commit takes any hold for its own.
    NoHoldId,
    // P1
    /// Reader: takes first, reads the device afterwards.
    #[cfg(loom)]
    TakeBeforeReading,
    /// Reader: stores `DONE`; nobody wins.
    TakeByStore,
    /// Reader: takes a preserved block first and copies its slot afterwards.
    #[cfg(loom)]
    TakeBeforeCopy,
    /// Reader: keeps its data although it lost.
    LoserKeeps,
    /// Reader: looks without acquire.
    LookRelaxed,
    /// Reader: no fence between device and look.
    NoReaderFence,
    /// Reader: does not look at `revoked` after taking.
    NoRevokedLoad,
    /// Server: stores `revoked` after the write.
    #[cfg(loom)]
    RevokeAfterWrite,
    /// Server: no fence after storing `revoked`.
    NoRevokeFence,
    /// Server: a queue that only sees `revoked` set does not fence.
    SeenRevokeNoFence,
    /// Writer: writes although another request is preserving.
    NoWaitForPreserving,
    /// Writer: `PRESERVED` before the copy is safe.
    PreservedBeforeCopy,
    /// Writer: stores `PRESERVED`.
    PreservedByStore,
    /// Writer: names the owner of a slot before its CAS.
    OwnerBeforePreserved,
    /// Writer: believes `DONE` of a slot's owner without acquire.
    ReclaimRelaxed,
    /// Shrink drops wanted blocks only.
    ShrinkOnlyWanted,
    // P14
    /// A program does not look at the generation again.
    NoSecondLook,
    /// A program looks again before it has set the bits.
    LookBeforeBits,
    /// No full barrier between the bits and the second look.
    NoMarkFence,
    /// A program gives a mark up and does not say so.
    LostUnsaid,
    /// No full barrier between the swap and the drain.
    NoSwapFence,
    /// A word is cleared, then absorbed.
    ClearBeforeAbsorb,
    /// A word is cleared by storing zero.
    ClearByStore,
    /// What was absorbed may be seen after the word is seen cleared.
    NoAbsorbFence,
    /// A write is not marked again when it completes.
    #[cfg(loom)]
    NoCompletionMark,
    /// Copies count although completions went unseen since they were begun.
    #[cfg(loom)]
    UnseenUnchecked,
    /// A moment is called quiet without a look at whether something was marked in it.
    #[cfg(loom)]
    MomentUnwatched,
    /// Generations change outside of a freeze where no completion is seen.
    #[cfg(loom)]
    SwapUnfrozen,
    /// A successor does not drain what its predecessor left.
    #[cfg(loom)]
    LeftUndrained,
    // Found by the model test
    /// The bit is set when the write is complete.
    MarkAfterWrite,
    /// The write is performed together with the copy of its block.
    OverwriteBeforeCopy,
    /// A new generation is named by a number that begins anew with each life.
    NameReused,
    /// A successor does not mark what its predecessor had marked.
    NoteTrusted,
    /// A part of a block is not taken for a change.
    PartialUnmarked,
    /// The short last block is not counted.
    LastBlockMissed,
    /// A discard does not preserve.
    DiscardUnpreserved,
    /// A discard is not marked.
    DiscardUnmarked,
    /// A merged run resolves to its younger bank only.
    MergeForgets,
    /// A successor does not revoke its predecessor's snapshot.
    TakeoverKeepsSnapshot,
    /// The bank of a new generation is not zeroed (harmless: a superset) and that of the closed one is.
    WrongBankCleared,
    /// A distrusted tracker keeps its names.
    DistrustKeepsNames,
    /// A believed bitmap file is neither consumed nor contradicted by the marker.
    #[cfg(all(test, not(loom)))]
    FileKept,
    /// Tracking off, and nothing says so.
    SilentPassThrough,
}

#[cfg(any(test, loom))]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Break>> = const { std::cell::Cell::new(None) };
}

/// Leaves `rule` out from now on, in this thread; `None` keeps them all.
#[cfg(any(test, loom))]
pub(crate) fn leave_out(rule: Option<Break>) {
    BROKEN.set(rule);
}

/// Whether `rule` is left out.
#[cfg(any(test, loom))]
pub(crate) fn broken(rule: Break) -> bool {
    BROKEN.get() == Some(rule)
}

/// Whether `rule` is left out: never.
#[cfg(not(any(test, loom)))]
pub(crate) const fn broken(_rule: Break) -> bool {
    false
}

#[cfg(all(test, not(loom)))]
thread_local! {
    static STORES_LEFT: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// What unwinds where [`cut_after`] ends a life.
#[cfg(all(test, not(loom)))]
#[derive(Debug)]
pub(crate) struct Cut;

/// Runs `life` and ends it, as a SIGKILL would, before its store number `stores`; whether it came to its end.
#[cfg(all(test, not(loom)))]
pub(crate) fn cut_after(stores: u64, life: impl FnOnce()) -> bool {
    STORES_LEFT.set(Some(stores));
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
    STORES_LEFT.set(None);
    match end {
        Ok(()) => true,
        Err(cut) if cut.is::<Cut>() => false,
        Err(other) => std::panic::resume_unwind(other),
    }
}

/// A word of shared memory is about to be stored: a test may end the process here.
#[cfg(all(test, not(loom)))]
pub(crate) fn step() {
    if let Some(left) = STORES_LEFT.get() {
        if left == 0 {
            STORES_LEFT.set(None);
            std::panic::resume_unwind(Box::new(Cut));
        }
        STORES_LEFT.set(Some(left - 1));
    }
}

/// A word of shared memory is about to be stored: nothing to do.
#[cfg(not(all(test, not(loom))))]
pub(crate) const fn step() {}
