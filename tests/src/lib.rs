//! End to end, by real processes: one file a requirement.
#![forbid(unsafe_code)]
