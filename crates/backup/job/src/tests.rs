//! The jobs against a volume that cannot be wrong, and repositories that fail.

mod ahead;
mod ahead_volume;
mod cancel;
mod damage;
mod faults;
mod history;
mod restore;
mod store;
mod volume;
mod world;
