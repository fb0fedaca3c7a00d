//! The marker's object: from its source where clang is, else the one that is shipped.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let source = Path::new("bpf/watch.bpf.c");
    let shipped = Path::new("bpf/watch.bpf.o");
    println!("cargo:rerun-if-changed={}", source.display());
    println!("cargo:rerun-if-changed={}", shipped.display());
    println!("cargo:rerun-if-env-changed=BLKTIDE_CLANG");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("watch.bpf.o");
    if compile(source, &out) {
        return;
    }
    if let Err(error) = std::fs::copy(shipped, &out) {
        println!("cargo::error={}: {error}", shipped.display());
    }
}

/// Whether clang and llvm-strip were there and made the object.
fn compile(source: &Path, out: &Path) -> bool {
    let clang = std::env::var_os("BLKTIDE_CLANG").unwrap_or_else(|| "clang".into());
    let flags = [
        "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-target", "bpf", "-mcpu=v3", "-c",
    ];
    let compiled = Command::new(clang)
        .args(flags)
        // The object does not know where it was made.
        .arg("-ffile-prefix-map=bpf/=")
        .arg(source)
        .arg("-o")
        .arg(out)
        .status();
    // Only what is for debuggers goes; the kernel's loader needs BTF.
    let stripped = || Command::new("llvm-strip").arg("-g").arg(out).status();
    matches!(compiled, Ok(status) if status.success())
        && matches!(stripped(), Ok(status) if status.success())
}
