//! `images`: which images there are, from their heads alone.

use blktide_api::failure::{Exit, Failure};
use blktide_api::name::Name;
use blktide_api::time::{local, rfc3339};
use blktide_api::unit::size;
use blktide_format::manifest::{ImageHead, ImageKind};
use blktide_job::listing::{self, Filter};
use blktide_sys::host;
use blktide_types::reason::Reason;
use serde_json::{Value, json};

use crate::context::{Common, chain};
use crate::output;
use crate::repositories::{RepositoryOption, image_name};

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Only of this volume
    pub(crate) volume: Option<Name>,
    /// Of every machine, not of this one only
    #[arg(long)]
    pub(crate) all_hosts: bool,
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
}

/// The word of the interface for a kind.
pub(crate) const fn kind_word(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Full => "full",
        ImageKind::Incremental => "incremental",
        ImageKind::Digest => "digest",
    }
}

/// Lists. Exit 5 if something could not be listed because it is damaged.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    // With a path there may be no machine id, or another one's repository: then all are shown.
    let filter = Filter {
        volume_name: args.volume.as_ref().map(|name| name.as_str().to_owned()),
        host: if args.all_hosts {
            None
        } else {
            host::machine_id().ok()
        },
    };
    let mut rows = Vec::new();
    let mut damaged = false;
    for place in args.repository.places(common)? {
        let repository = place.open()?;
        let listing = listing::images(&repository, &filter).map_err(|e| place.failure(&e))?;
        for error in &listing.damage {
            damaged = true;
            output::complain(&format!("{}: {}", place.name, chain(error)));
        }
        rows.extend(
            listing
                .images
                .into_iter()
                .map(|entry| (place.name.clone(), entry.head)),
        );
    }
    if common.json {
        let images: Vec<Value> = rows
            .iter()
            .map(|(place, head)| row_json(place, head))
            .collect();
        output::document(&json!({"message_type": "images", "images": images}));
    } else {
        table(&rows, common);
    }
    Ok(if damaged { Exit::Damage } else { Exit::Done })
}

fn row_json(repository: &str, head: &ImageHead) -> Value {
    json!({
        "image": image_name(head),
        "image_id": head.image.to_string(),
        "host": head.host_name,
        "repository": repository,
        "volume": head.volume_name,
        "kind": kind_word(head.kind),
        "reason": head.reason.map(Reason::code),
        "time": rfc3339(head.instant),
        "stored_bytes": head.counters.stored_bytes,
        "volume_bytes": head.geometry.volume_bytes(),
    })
}

fn table(rows: &[(String, ImageHead)], common: &Common) {
    if rows.is_empty() {
        output::text(common, "no images; blktidectl backup VOLUME makes one");
        return;
    }
    output::text(
        common,
        &format!(
            "{:24} {:12} {:12} {:>10} {:>10}  time",
            "image", "repository", "kind", "stored", "volume"
        ),
    );
    for (repository, head) in rows {
        let row = format!(
            "{:24} {repository:12} {:12} {:>10} {:>10}  {}",
            image_name(head),
            kind_word(head.kind),
            size(head.counters.stored_bytes),
            size(head.geometry.volume_bytes()),
            local(head.instant),
        );
        output::text(common, &row);
    }
}
