//! The commit against what can happen to it: power cuts, failing operations, another backup at the same time (P13).
//!
//! The code under test is the real one, from `ImageWriter` down to `FolderStore`; below it lies a simulated disk, or a store
//! that decides whose turn it is. The faults that are planted are planted there, so that they are faults of the real code.

mod cut;
mod disk;
mod two;
