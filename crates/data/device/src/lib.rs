//! The backing device: direct transfers, flush, identity, geometry, fence.
#![forbid(unsafe_code)]
