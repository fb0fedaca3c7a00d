//! `attach`: puts the tracker under a volume.

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

/// Returns when the node can be mounted.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let reply = client(&config, None)?.call("Attach", json!({"volume": args.volume}))?;
    output::done(common, "attach", &[args.volume.to_string()], &lines(&reply));
    Ok(Exit::Done)
}

/// The `lines` of a reply.
pub(crate) fn lines(reply: &Value) -> Vec<String> {
    let list = reply.get("lines").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|line| line.as_str().map(str::to_owned))
        .collect()
}
