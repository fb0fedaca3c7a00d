//! A repository: objects, packs, claims and the commit.
#![forbid(unsafe_code)]
