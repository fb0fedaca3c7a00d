//! blktidectl: one file a verb.
#![forbid(unsafe_code)]

mod demo;

use std::process::ExitCode;

fn main() -> ExitCode {
    match demo::run() {
        Ok(code) => code,
        Err(_error) => ExitCode::FAILURE,
    }
}
