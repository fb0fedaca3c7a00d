//! What happens to a write. State machines only: no I/O, no clock, no thread.
#![forbid(unsafe_code)]
