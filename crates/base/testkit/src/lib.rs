//! For tests only: a disk that loses power, and a volume that cannot be wrong.
#![forbid(unsafe_code)]
