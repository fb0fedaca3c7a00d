//! `cancel`: ends a volume's backups. Nothing is lost: the next one covers it.

use blktide_api::failure::{Exit, Failure};
use blktide_api::name::Name;
use serde_json::{Value, json};

use crate::context::{Common, client};
use crate::output;

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// The volume
    pub(crate) volume: Name,
}

/// Returns when they have ended, or were left behind because the repository hangs.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let name = &args.volume;
    let reply = client(&config, None)?.call("Cancel", json!({"volume": name}))?;
    let line = match reply.get("cancelled").and_then(Value::as_u64).unwrap_or(0) {
        0 => format!("no backup of {name} was running"),
        1 => format!("the backup of {name} is cancelled; the next one covers everything"),
        n => format!("{n} backups of {name} are cancelled; the next one covers everything"),
    };
    output::done(common, "cancel", &[name.to_string()], &[line]);
    Ok(Exit::Done)
}
