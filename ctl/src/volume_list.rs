//! `volume list`: what is configured.

use blktide_api::failure::{Exit, Failure};
use blktide_api::message::{VOLUMES, VolumeEntryDocument, VolumesDocument};
use blktide_api::unit::size;

use crate::context::Common;
use crate::output;

/// Lists. Needs no daemon.
pub(crate) fn run(common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let volumes: Vec<VolumeEntryDocument> = config
        .volumes
        .values()
        .map(|volume| VolumeEntryDocument {
            name: volume.name.to_string(),
            device: volume.device.display().to_string(),
            node: config.node_of(volume).display().to_string(),
            mode: volume.mode.word().to_owned(),
            attach: volume.attach.word().to_owned(),
            repository: volume.repository.to_string(),
            block_size_bytes: volume.block_size.bytes(),
            exclusive: volume.exclusive,
        })
        .collect();
    if common.json {
        output::document(&VolumesDocument {
            message_type: VOLUMES.to_owned(),
            volumes,
        });
        return Ok(Exit::Done);
    }
    if volumes.is_empty() {
        output::text(
            common,
            "no volumes; blktidectl volume add NAME --device PATH adds one",
        );
    }
    for volume in volumes {
        let row = format!(
            "{:16} {:6} {:8} {:10} {}  on {}",
            volume.name,
            volume.mode,
            volume.attach,
            size(u64::from(volume.block_size_bytes)),
            volume.node,
            volume.device
        );
        output::text(common, &row);
    }
    Ok(Exit::Done)
}
