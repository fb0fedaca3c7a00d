//! The control protocol: requests, replies, errors, client.
#![forbid(unsafe_code)]
