//! `flush`: the hook before a shutdown: volumes that are closed to writers are taken out and their bitmaps stored.
//!
//! A bitmap can only be stored when nobody can write any more, so what is open is left alone, and said. Speaks to the
//! volumes themselves: at a shutdown the daemon may be gone already.

use blktide_api::config::{Config, VolumeConfig};
use blktide_api::failure::{Exit, Failure};
use blktide_volume::error::{Refusal, VolumeError};
use blktide_watch::{Detached, InUse};
use serde_json::json;

use crate::context::{Common, chain};
use crate::output;
use crate::tracker;

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// All volumes (also without it)
    #[arg(long)]
    pub(crate) all: bool,
}

/// Exit 0 as well if a volume is open; 1 if one could not be stored.
pub(crate) fn run(_args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let (mut stored, mut open, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for (name, volume) in &config.volumes {
        match flush(&config, volume) {
            Outcome::Stored => stored.push(name.to_string()),
            Outcome::Open(why) => {
                output::complain(&format!("{name} is open and left alone: {why}"));
                open.push(name.to_string());
            }
            Outcome::Away => {}
            Outcome::Failed(why) => {
                output::complain(&format!("{name}: {why}"));
                failed.push(name.to_string());
            }
        }
    }
    for name in &stored {
        output::text(common, &format!("{name} is closed; its bitmap is stored"));
    }
    if common.json {
        output::document(
            &json!({"message_type": "flush", "stored": stored, "open": open, "failed": failed}),
        );
    }
    Ok(if failed.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    })
}

enum Outcome {
    Stored,
    Open(String),
    Away,
    Failed(String),
}

fn flush(config: &Config, volume: &VolumeConfig) -> Outcome {
    let error = match tracker::detach(config, volume, InUse::Refuse) {
        Ok(Detached::Stored) => return Outcome::Stored,
        Ok(Detached::Live) => {
            let why =
                "what the kernel had of it was not whole; it is detached, and no bitmap is stored";
            return Outcome::Failed(why.to_owned());
        }
        Err(error) => error,
    };
    if let VolumeError::NotAttached { .. } = &error {
        return Outcome::Away;
    }
    if let VolumeError::Refused {
        kind: Refusal::InUse,
        message,
    } = &error
    {
        return Outcome::Open(message.clone());
    }
    Outcome::Failed(chain(&error))
}
