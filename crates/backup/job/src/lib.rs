//! The jobs: backup, restore, verify, and why a backup is not incremental.
#![forbid(unsafe_code)]
