//! Where requests come from: FUSE under a loop device.
#![forbid(unsafe_code)]
