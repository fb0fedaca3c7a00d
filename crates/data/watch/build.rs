//! The marker's object: from its source where clang is, else the one that is shipped.

#[path = "bpf/recipe.rs"]
mod recipe;

use recipe::{SHIPPED, SOURCE};
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-changed={SHIPPED}");
    println!("cargo:rerun-if-changed=bpf/recipe.rs");
    println!("cargo:rerun-if-env-changed=BLKTIDE_CLANG");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("watch.bpf.o");
    if recipe::compile(Path::new("."), &out) {
        return;
    }
    if let Err(error) = std::fs::copy(SHIPPED, &out) {
        println!("cargo::error={SHIPPED}: {error}");
    }
}
