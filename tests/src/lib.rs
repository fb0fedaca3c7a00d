//! What the end-to-end tests share: an instance of blktide, devices, file systems, writers that keep the truth.
//!
//! ```text
//!  tests/NAME.rs ──▶ Instance (own folder, blktided, blktidectl)      what is tested
//!       │        ──▶ LoopDevice, Mounted, fsck, Fio                   the kernel and other people's tools
//!       └───────────▶ Recorder, compare, DeviceCounters               the oracle: never a reader of ours
//! ```
//! **Invariant**: whatever a test does, and however it ends, nothing is left: each type undoes in `drop` what it
//! did, and `Instance` ends by pid each process that bears its folder in its command line.
//!
//! A test file opens with two lines that `cargo xtask test` reads:
//! ```text
//! //! needs: root, loop, fuse, fio          (see xtask's probes)
//! //! limit: 180 s                          (then its process group is killed, and it has failed)
//! ```
//! With `BLKTIDE_TEST_LONG=1` (`cargo xtask test --long`) the counts are those of a release: see [`count`].
#![forbid(unsafe_code)]

mod cgroup;
mod clock;
mod compare;
mod counters;
mod demo;
mod devices;
mod fio;
mod instance;
mod pins;
mod plain_image;
mod recorder;
mod run;
mod seed;
mod watch;

pub use cgroup::{Cgroup, Frozen};
pub use clock::{Stopwatch, pass, wait_until};
pub use compare::{blocks_that_differ, copy_sparse, same_bytes, same_trees};
pub use counters::{DeviceCounters, in_flight};
pub use demo::Demo;
pub use devices::{
    FileSystem, LoopDevice, Mounted, NodeHolder, ZramDevice, backing_file, fill_file, make_file,
};
pub use fio::{Fio, FioRun};
pub use instance::{Instance, Reply, binary, leave_nothing, number_at, put, remains, text_of};
pub use pins::folders_of;
pub use plain_image::PlainImage;
pub use recorder::{Record, Recorder, UNIT, open_direct, write_block};
pub use run::{Finished, Running, Tool, kill, pids_naming};
pub use seed::Seed;
pub use watch::{
    Figures, Tracked, Truth, doubt, figure, hide_completions, hide_foreign, hide_writes, no_doubt,
    shell,
};

/// `short` in CI, `long` under `cargo xtask test --long`.
pub fn count(short: u64, long: u64) -> u64 {
    if std::env::var_os("BLKTIDE_TEST_LONG").is_some() {
        long
    } else {
        short
    }
}
