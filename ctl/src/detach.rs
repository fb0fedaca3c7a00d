//! `detach`: takes the tracker out, and stores the bitmap. Works without the daemon as well.
//!
//! What has a server is refused while its node is open. What is watched can be let go of at any time; while it is in use that
//! costs its bitmap, so it is asked before.

use blktide_api::config::{Config, Mode, VolumeConfig};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::Name;
use blktide_volume::error::{Refusal, VolumeError};
use blktide_watch::{Detached, InUse};
use serde_json::json;

use crate::attach::lines;
use crate::context::{Common, chain, client};
use crate::output;
use crate::tracker;
use crate::volume::confirmed;

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// The volume
    pub(crate) volume: Name,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
}

/// Refused (13) while the node of a volume with a server is open, saying by whom; or if somebody says no.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let name = &args.volume;
    let volume = config.volumes.get(name).ok_or_else(|| {
        let message = format!("no volume '{name}' is configured");
        Failure::new(FailureCode::NoSuchVolume, message).hint("blktidectl volume list")
    })?;
    let in_use = if args.yes {
        InUse::LetGo
    } else {
        InUse::Refuse
    };
    let said = match detach(&config, volume, in_use) {
        Err(failure) if asks(volume, &failure, in_use) => {
            confirmed(&format!(
                "{}. Detached now, its bitmap is lost: the next backup reads everything. Go on?",
                failure.message
            ))?;
            detach(&config, volume, InUse::LetGo)?
        }
        other => other?,
    };
    output::done(common, "detach", &[name.to_string()], &said);
    Ok(Exit::Done)
}

/// Whether it could be had with a yes.
fn asks(volume: &VolumeConfig, failure: &Failure, in_use: InUse) -> bool {
    let open = failure.code == FailureCode::VolumeOpen;
    volume.mode == Mode::Watch && in_use == InUse::Refuse && open
}

/// By the daemon, which then knows; without one, directly. Says what was done.
pub(crate) fn detach(
    config: &Config,
    volume: &VolumeConfig,
    in_use: InUse,
) -> Result<Vec<String>, Failure> {
    let name = &volume.name;
    let live = volume.mode == Mode::Watch && in_use == InUse::LetGo;
    let mut asked = json!({ "volume": name });
    if live {
        asked = json!({ "volume": name, "live": true });
    }
    let told = client(config, None).and_then(|mut daemon| daemon.call("Detach", asked));
    match told {
        Ok(reply) => Ok(lines(&reply)),
        Err(failure) if failure.code == FailureCode::DaemonUnreachable => {
            let detached = tracker::detach(config, volume, in_use)
                .map_err(|error| volume_failure(name, &error))?;
            Ok(vec![match detached {
                Detached::Stored => format!("{name} is detached; its bitmap is stored"),
                Detached::Live => format!(
                    "{name} is detached while it was in use: its bitmap is lost, and the next backup reads everything"
                ),
            }])
        }
        Err(failure) => Err(failure),
    }
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
    if let VolumeError::Refused {
        kind: Refusal::Busy,
        ..
    } = error
    {
        return Failure::new(FailureCode::Busy, message)
            .hint(format!("blktidectl cancel {name} ends its backup"));
    }
    if let VolumeError::NoAnswer { .. } = error {
        return Failure::new(FailureCode::TimedOut, message);
    }
    Failure::new(FailureCode::Failed, message)
}
