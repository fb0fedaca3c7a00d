//! An image: the tree of what the blocks are and where they lie.
#![forbid(unsafe_code)]
