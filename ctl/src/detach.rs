//! `detach`: takes the tracker out, and stores the bitmap. Works without the daemon as well.

use blktide_api::config::Config;
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::Name;
use blktide_volume::VolumeClient;
use blktide_volume::error::{Refusal, VolumeError};
use serde_json::json;
use std::time::Duration;

use crate::attach::lines;
use crate::context::{Common, chain, client};
use crate::output;

/// Longest wait for an answer of a volume's server; a detach itself takes what it takes.
const LIMIT: Duration = Duration::from_secs(10);

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// The volume
    pub(crate) volume: Name,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
}

/// Refused (13) while the node is open, saying by whom. Nothing is lost by it, so nothing is asked.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let name = &args.volume;
    let told =
        client(&config, None).and_then(|mut daemon| daemon.call("Detach", json!({"volume": name})));
    let said = match told {
        Ok(reply) => lines(&reply),
        Err(failure) if failure.code == FailureCode::DaemonUnreachable => {
            directly(&config, name).map_err(|error| volume_failure(name, &error))?;
            vec![format!("{name} is detached; its bitmap is stored")]
        }
        Err(failure) => return Err(failure),
    };
    output::done(common, "detach", &[name.to_string()], &said);
    Ok(Exit::Done)
}

/// Asks the volume's own server.
pub(crate) fn directly(config: &Config, name: &Name) -> Result<(), VolumeError> {
    VolumeClient::connect(&config.runtime_dir, name.as_str(), LIMIT)?.detach()
}

/// A volume's error in the interface's words.
pub(crate) fn volume_failure(name: &Name, error: &VolumeError) -> Failure {
    let message = chain(error);
    if let VolumeError::Refused {
        kind: Refusal::InUse,
        ..
    } = error
    {
        return Failure::new(FailureCode::VolumeOpen, message).hint(format!(
            "unmount it, end what has it open; then: blktidectl detach {name}"
        ));
    }
    if let VolumeError::NotAttached { .. } = error {
        return Failure::new(FailureCode::NotAttached, message);
    }
    if let VolumeError::NoAnswer { .. } = error {
        return Failure::new(FailureCode::TimedOut, message);
    }
    Failure::new(FailureCode::Failed, message)
}
