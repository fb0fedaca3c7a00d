//! `verify`: that images are whole; with `--read-data`, every byte of them.

use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::name::ImageName;
use blktide_api::unit::size;
use blktide_image::{Damage, Depth, Proof};
use blktide_job::verify::{self, VerifyRequest};
use serde_json::{Value, json};

use crate::context::{Common, environment};
use crate::interrupt::Interrupts;
use crate::output;
use crate::repositories::{Place, RepositoryOption, find, open};

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// [HOST/]VOLUME@NUMBER, @latest or @TIME; without it, everything
    pub(crate) image: Option<ImageName>,
    /// Every stored byte, not the structure alone
    #[arg(long)]
    pub(crate) read_data: bool,
    /// Not built yet
    #[arg(long, value_name = "SECONDS")]
    pub(crate) time: Option<String>,
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
}

/// Verifies. Exit 5 if anything is damaged; all of it is listed.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    if args.time.is_some() {
        return Err(Failure::new(
            FailureCode::NotBuiltYet,
            "verify --time is not built yet",
        ));
    }
    let interrupts = Interrupts::new()?;
    let mut whole = Proof::default();
    let mut damage = Vec::new();
    let places = if let Some(name) = &args.image {
        let (place, _, entry) = find(name, &args.repository, common)?;
        vec![(place, Some((entry.head.volume, entry.head.sequence)))]
    } else {
        let all = args.repository.places(common)?;
        all.into_iter().map(|place| (place, None)).collect()
    };
    for (place, image) in places {
        let path = place.path.clone();
        let request = VerifyRequest {
            repository: Box::new(move || open(&path)),
            image: Box::new(move |_| Ok(image)),
            depth: if args.read_data {
                Depth::Data
            } else {
                Depth::Structure
            },
            workers: 0,
        };
        let environment = environment(output::progress(common, "verifying"));
        let running = verify::start(request, &environment).map_err(|e| place.failure(&e))?;
        let proof = interrupts.wait(running).map_err(|e| place.failure(&e))?;
        whole.images += proof.images;
        whole.checked_bytes += proof.checked_bytes;
        for found in proof.damage {
            damage.push((place.clone(), found));
        }
    }
    tell(&whole, &damage, common);
    Ok(if damage.is_empty() {
        Exit::Done
    } else {
        Exit::Damage
    })
}

fn tell(proof: &Proof, damage: &[(Place, Damage)], common: &Common) {
    if common.json {
        let list: Vec<Value> = damage
            .iter()
            .map(|(place, found)| damage_json(place, found))
            .collect();
        output::document(&json!({
            "message_type": "verify",
            "images": proof.images,
            "checked_bytes": proof.checked_bytes,
            "damage": list,
        }));
        return;
    }
    for (place, found) in damage {
        let image = found
            .sequence
            .map_or(String::new(), |n| format!(" image or claim {n},"));
        let blocks = found.range.map_or(String::new(), |r| {
            format!(
                " blocks {} to {},",
                r.start().0,
                r.end().0.saturating_sub(1)
            )
        });
        output::complain(&format!(
            "{}: {}:{image}{blocks} {}",
            place.name, found.object, found.what
        ));
    }
    let verdict = match damage.len() {
        0 => "no damage".to_owned(),
        1 => "1 piece of damage".to_owned(),
        n => format!("{n} pieces of damage"),
    };
    output::text(
        common,
        &format!(
            "{} images, {} checked: {verdict}",
            proof.images,
            size(proof.checked_bytes)
        ),
    );
}

fn damage_json(place: &Place, found: &Damage) -> Value {
    json!({
        "repository": place.name,
        "volume_id": found.volume.map(|id| id.to_string()),
        "number": found.sequence,
        "object": found.object,
        "what": found.what,
        "first_block": found.range.map(|r| r.start().0),
        "blocks": found.range.map(|r| r.count().0),
    })
}
