//! `volume add`: looked at, decided, shown, asked, done; in this order.
//!
//! **Invariant**: nothing is done to a device in use, and no file is written, before its plan was shown and somebody said yes.

use blktide_api::client::Client;
use blktide_api::config::{Attach, Config, Mode, VolumeConfig, volume_file};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_sys::fs;
use blktide_types::unit::BlockSize;
use serde_json::json;

use super::plan::{Plan, refuse_places};
use super::{Add, confirmed, reload};
use crate::attach::lines;
use crate::context::{Common, chain};
use crate::device::{self, Found};
use crate::modes::Facts;
use crate::output;

/// Runs it.
pub(super) fn run(add: &Add, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let wanted = mode_of(add, &config)?;
    let found = device::look(&add.device)?;
    refuse_twice(&config, add, &found)?;
    let facts = found.facts(kernel(&found, wanted).as_ref().err());
    let (mode, why) = decide(wanted, &found, &facts)?;
    let volume = configured(add, &config, &found, mode)?;
    let notes = refuse_places(&config, &volume, &found)?;
    let plan = Plan {
        config: &config,
        volume: &volume,
        found: &found,
        facts: &facts,
        why,
        notes,
    };
    let told = plan.lines();
    if add.dry_run {
        finish(common, add, &told);
        return Ok(Exit::Done);
    }
    let asked = found.used_by.is_some() && !add.yes;
    if asked {
        ask(&found, &told)?;
    }
    // Nothing is written that could not be attached.
    let client = (!add.no_attach)
        .then(|| Client::connect(&config.socket(), None))
        .transpose()?;
    for line in told.iter().filter(|_| !asked) {
        output::text(common, line);
    }
    write_file(&config, &volume)?;
    let attached = if let Some(mut client) = client {
        client
            .call("Reload", json!({}))
            .and_then(|_| client.call("Attach", json!({ "volume": volume.name })))
    } else {
        reload(&config);
        Ok(json!({ "lines": [format!("{} is registered, not attached", volume.name)] }))
    };
    match attached {
        Ok(answer) => {
            finish(common, add, &lines(&answer));
            Ok(Exit::Done)
        }
        Err(failure) => {
            drop(fs::remove_durably(&config.volume_file(&volume.name)));
            reload(&config);
            Err(failure)
        }
    }
}

/// Shows the plan and asks: somebody is at work on that device.
fn ask(found: &Found, plan: &[String]) -> Result<(), Failure> {
    for line in plan {
        output::complain(line);
    }
    let device = found.real.display();
    confirmed(&format!("{device} is in use. Go on?"))
}

fn finish(common: &Common, add: &Add, told: &[String]) {
    output::done(common, "volume add", &[add.name.to_string()], told);
}

/// The mode that is wanted; what is not built is refused by name, and passed over by `auto`.
fn mode_of(add: &Add, config: &Config) -> Result<Mode, Failure> {
    let mode = match &add.mode {
        None => config.defaults.mode,
        Some(word) => Mode::from_word(word).ok_or_else(|| {
            Failure::new(
                FailureCode::Usage,
                format!("'{word}' is none of auto, watch, ublk, fuse"),
            )
        })?,
    };
    match mode {
        Mode::Auto | Mode::Watch | Mode::Fuse => Ok(mode),
        Mode::Ublk => Err(Failure::new(
            FailureCode::NotBuiltYet,
            format!("mode {} is not built yet", mode.word()),
        )
        .hint("--mode watch, on a device in use; --mode fuse, on one that is not")),
    }
}

/// Whether the kernel takes the marker; not asked if it does not matter.
fn kernel(found: &Found, wanted: Mode) -> Result<(), blktide_watch::Missing> {
    if found.number.is_none() || wanted == Mode::Fuse {
        return Ok(());
    }
    blktide_watch::probe()
}

fn refuse_twice(config: &Config, add: &Add, found: &Found) -> Result<(), Failure> {
    if config.volumes.contains_key(&add.name) {
        return Err(Failure::new(
            FailureCode::AlreadyThere,
            format!("there is a volume {} already", add.name),
        )
        .hint("Take another name, or `blktidectl volume remove` that one first."));
    }
    let same = config.volumes.values().find(|other| {
        std::fs::canonicalize(&other.device).is_ok_and(|device| device == found.real)
    });
    match same {
        Some(other) => Err(Failure::new(
            FailureCode::AlreadyThere,
            format!("{} is volume {} already", found.real.display(), other.name),
        )),
        None => Ok(()),
    }
}

/// The mode, and why that; or why none.
fn decide(wanted: Mode, found: &Found, facts: &Facts) -> Result<(Mode, String), Failure> {
    let device = found.real.display();
    let refused = |code, why: &str, hint: &str| {
        Err(Failure::new(code, format!("{device}: {why}")).hint(hint))
    };
    if wanted == Mode::Auto {
        return match facts.auto() {
            Ok(decided) => Ok(decided),
            Err(why) if facts.used_by.is_some() => refused(
                FailureCode::DeviceInUse,
                &why,
                "Unmount it, then add it: it gets mode fuse. `blktidectl doctor` says more.",
            ),
            Err(why) => refused(
                FailureCode::ModeRefused,
                &why,
                "`blktidectl doctor` says more.",
            ),
        };
    }
    match facts.refusal(wanted) {
        None => Ok((wanted, "asked for".to_owned())),
        Some(why) if wanted == Mode::Fuse && facts.used_by.is_some() => refused(
            FailureCode::DeviceInUse,
            &format!("mode fuse: {why}"),
            "Unmount it first; or --mode watch, for a device in use.",
        ),
        Some(why) => refused(
            FailureCode::ModeRefused,
            &format!("mode {} cannot be had: {why}", wanted.word()),
            "`blktidectl doctor` says which modes each device can have.",
        ),
    }
}

fn configured(
    add: &Add,
    config: &Config,
    found: &Found,
    mode: Mode,
) -> Result<VolumeConfig, Failure> {
    let defaults = &config.defaults;
    let usage = |text: String| Failure::new(FailureCode::Usage, text);
    let block_size = match &add.block_size {
        None => defaults.block_size,
        Some(text) => block_size(text).ok_or_else(|| {
            usage(format!(
                "'{text}' is not a power of two from 4 KiB to 1 MiB"
            ))
        })?,
    };
    Ok(VolumeConfig {
        name: add.name.clone(),
        device: found.stable.clone(),
        mode,
        attach: attach(mode),
        exclusive: false,
        block_size,
        grain: defaults.grain_of(mode, block_size),
        repository: add
            .repository
            .clone()
            .unwrap_or_else(|| defaults.repository.clone()),
        max_read_rate: defaults.max_read_rate,
        max_age: defaults.max_age,
        hold_deadline: defaults.hold_deadline,
        freeze_budget: defaults.freeze_budget,
        freeze_limit: defaults.freeze_limit,
        over_budget: defaults.over_budget,
        instant: defaults.instant,
        save_area: defaults.save_area.clone(),
    })
}

/// A volume that is watched has no process that memory pressure could stop.
fn attach(mode: Mode) -> Attach {
    let refused = || {
        std::thread::spawn(|| blktide_sys::process::set_io_flusher().is_err())
            .join()
            .unwrap_or(true)
    };
    if mode != Mode::Watch && refused() {
        Attach::Manual
    } else {
        Attach::Boot
    }
}

fn block_size(text: &str) -> Option<BlockSize> {
    let bytes = blktide_api::unit::parse_size(text).ok()?;
    BlockSize::new(u32::try_from(bytes).ok()?)
        .filter(|size| size.shift() >= BlockSize::IMAGE_MIN.shift())
}

fn write_file(config: &Config, volume: &VolumeConfig) -> Result<(), Failure> {
    let path = config.volume_file(&volume.name);
    let text = volume_file(volume, &config.defaults);
    let failed = |error: &dyn std::error::Error| {
        Failure::new(
            FailureCode::Failed,
            format!("{} could not be written: {}", path.display(), chain(error)),
        )
        .hint("Run it as root.")
    };
    fs::create_folders(&config.volumes_dir, 0o755).map_err(|e| failed(&e))?;
    match fs::create_if_absent(&path, text.as_bytes(), 0o644) {
        Ok(fs::Created::Made) => Ok(()),
        Ok(fs::Created::Existed) => Err(Failure::new(
            FailureCode::AlreadyThere,
            format!("{} is there already", path.display()),
        )),
        Err(error) => Err(failed(&error)),
    }
}
