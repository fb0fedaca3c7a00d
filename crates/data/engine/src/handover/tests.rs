//! The hand-over on a disk that loses power: every action, every subset of what was not synced, several lives in a row,
//! every operation failing; the rules left out in turn; and each file that may be found at attach.

mod consumers;
mod cuts;
mod folder;
mod found;
