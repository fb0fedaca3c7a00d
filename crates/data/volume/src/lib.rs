//! Frontend, engine and device joined: the server of one volume, and its keeper.
#![forbid(unsafe_code)]
