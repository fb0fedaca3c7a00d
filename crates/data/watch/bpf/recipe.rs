//! How the marker's object is made of its source: for the build of this crate, and for the check of what is shipped.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// The source and what is shipped beside it, from the crate's folder.
pub(crate) const SOURCE: &str = "bpf/watch.bpf.c";
/// See [`SOURCE`].
pub(crate) const SHIPPED: &str = "bpf/watch.bpf.o";

/// clang, or what stands in for it.
pub(crate) fn clang() -> OsString {
    std::env::var_os("BLKTIDE_CLANG").unwrap_or_else(|| "clang".into())
}

/// Whether clang and llvm-strip were there and made the object, in the crate's `folder`.
pub(crate) fn compile(folder: &Path, out: &Path) -> bool {
    let flags = [
        "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-target", "bpf", "-mcpu=v3", "-c",
    ];
    let compiled = Command::new(clang())
        .current_dir(folder)
        .args(flags)
        // The object does not know where it was made.
        .arg("-fdebug-compilation-dir=.")
        .arg(SOURCE)
        .arg("-o")
        .arg(out)
        .status();
    // Only what is for debuggers goes; the kernel's loader needs BTF.
    let stripped = || Command::new("llvm-strip").arg("-g").arg(out).status();
    matches!(compiled, Ok(status) if status.success())
        && matches!(stripped(), Ok(status) if status.success())
}
