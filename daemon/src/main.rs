//! blktided: jobs and control socket; and the keeper and server of one volume.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
