//! `volume add | remove | list`: which volumes there are.

mod device;

use blktide_api::client::Client;
use blktide_api::config::{Attach, Config, Mode, SavePlace, VolumeConfig, volume_file};
use blktide_api::failure::{Exit, Failure, FailureCode};
use blktide_api::message::{DONE, DoneDocument};
use blktide_api::name::Name;
use blktide_api::unit::size;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::fs;
use blktide_types::unit::BlockSize;
use blktide_volume::{VolumeClient, VolumeError};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

use crate::context::{Common, chain};
use crate::output;
use device::Found;

const LIMIT: Duration = Duration::from_secs(10);

/// The verb's arguments.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum What {
    /// Register a volume and put the tracker under it
    Add(Add),
    /// Detach volumes and forget them; images stay
    Remove(Remove),
    /// Which volumes there are
    List,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the interface"
)]
struct Add {
    /// Its name
    name: Name,
    /// A device, a file, or a mount point
    #[arg(long, value_name = "PATH")]
    device: PathBuf,
    /// auto, watch, ublk or fuse
    #[arg(long, value_name = "M")]
    mode: Option<String>,
    /// 4 KiB to 1 MiB, a power of two
    #[arg(long, value_name = "S")]
    block_size: Option<String>,
    /// The repository of its backups
    #[arg(short, long, value_name = "R")]
    repository: Option<Name>,
    /// Register only
    #[arg(long)]
    no_attach: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Show the plan only
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the interface"
)]
struct Remove {
    /// The volumes
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<Name>,
    /// All that are configured
    #[arg(long)]
    all: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Say what would be done only
    #[arg(long)]
    dry_run: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args, common: &Common) -> Result<Exit, Failure> {
    match &args.what {
        What::Add(add) => run_add(add, common),
        What::Remove(remove) => run_remove(remove, common),
        What::List => crate::volume_list::run(common),
    }
}

fn run_add(add: &Add, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let mode = mode_of(add, &config)?;
    let found = device::look(&add.device)?;
    refuse_twice(&config, add, &found)?;
    refuse_use(&found, mode)?;
    let volume = plan(add, &config, &found)?;
    refuse_places(&config, &volume)?;
    let mut lines = describe(&config, &volume, &found);
    if add.dry_run {
        finish(common, "volume add", &add.name, lines);
        return Ok(Exit::Done);
    }
    // Nothing is written that could not be attached.
    let client = (!add.no_attach)
        .then(|| Client::connect(&config.socket(), None))
        .transpose()?;
    for line in lines.drain(..) {
        output::text(common, &line);
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
            finish(common, "volume add", &add.name, strings(&answer));
            Ok(Exit::Done)
        }
        Err(failure) => {
            drop(fs::remove_durably(&config.volume_file(&volume.name)));
            reload(&config);
            Err(failure)
        }
    }
}

fn strings(answer: &serde_json::Value) -> Vec<String> {
    let lines = answer.get("lines").and_then(serde_json::Value::as_array);
    lines
        .into_iter()
        .flatten()
        .filter_map(|line| line.as_str().map(str::to_owned))
        .collect()
}

fn finish(common: &Common, verb: &str, name: &Name, lines: Vec<String>) {
    for line in &lines {
        output::text(common, line);
    }
    if common.json {
        output::document(&DoneDocument {
            message_type: DONE.to_owned(),
            verb: verb.to_owned(),
            names: vec![name.to_string()],
            lines,
            warnings: Vec::new(),
        });
    }
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
        Mode::Auto | Mode::Fuse => Ok(mode),
        Mode::Watch | Mode::Ublk => Err(Failure::new(
            FailureCode::NotBuiltYet,
            format!("mode {} is not built yet", mode.word()),
        )
        .hint("--mode fuse, on a device that is not in use")),
    }
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

fn refuse_use(found: &Found, mode: Mode) -> Result<(), Failure> {
    let Some(user) = &found.used_by else {
        return Ok(());
    };
    let message = format!("{} is in use: {user}", found.real.display());
    let hint = match mode {
        Mode::Auto => {
            "Mode watch, for devices in use, is not built yet. Unmount it, then add it: it gets mode fuse."
        }
        Mode::Fuse | Mode::Watch | Mode::Ublk => {
            "Mode fuse can only be put under a device that is not in use. Unmount it first."
        }
    };
    Err(Failure::new(FailureCode::DeviceInUse, message).hint(hint))
}

fn plan(add: &Add, config: &Config, found: &Found) -> Result<VolumeConfig, Failure> {
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
    let flusher_refused = std::thread::spawn(|| blktide_sys::process::set_io_flusher().is_err())
        .join()
        .unwrap_or(true);
    Ok(VolumeConfig {
        name: add.name.clone(),
        device: found.stable.clone(),
        mode: Mode::Fuse,
        attach: if flusher_refused {
            Attach::Manual
        } else {
            Attach::Boot
        },
        exclusive: false,
        block_size,
        grain: defaults.grain_of(Mode::Fuse, block_size),
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

fn block_size(text: &str) -> Option<BlockSize> {
    let bytes = blktide_api::unit::parse_size(text).ok()?;
    BlockSize::new(u32::try_from(bytes).ok()?)
        .filter(|size| size.shift() >= BlockSize::IMAGE_MIN.shift())
}

/// The bitmap file must be writable after the volume is unmounted, and readable before it is mounted.
fn refuse_places(config: &Config, volume: &VolumeConfig) -> Result<(), Failure> {
    let tracked: Vec<BlockDevice> = config
        .volumes
        .keys()
        .filter_map(|name| BlockDevice::at(&config.node(name)).ok())
        .collect();
    let mut folder = config.volume_state_dir(&volume.name);
    while !folder.exists() && folder.pop() {}
    let under = BlockDevice::under(&folder).ok().flatten();
    if let Some(under) = under
        && tracked.iter().any(|t| t.number() == under.number())
    {
        let message = format!(
            "state_dir {} lies on a tracked volume: its bitmap could not be stored after it is unmounted",
            config.state_dir.display()
        );
        return Err(Failure::new(FailureCode::DeviceRefused, message)
            .hint("Put `state_dir` on a file system that is not tracked."));
    }
    Ok(())
}

fn describe(config: &Config, volume: &VolumeConfig, found: &Found) -> Vec<String> {
    let node = config.node(&volume.name);
    let mut lines = vec![
        format!(
            "volume {}: {} ({}, {})",
            volume.name,
            volume.device.display(),
            found.what,
            size(found.bytes)
        ),
        "  mode    fuse: not in use, and neither watch nor ublk is built yet".to_owned(),
        format!(
            "  node    {}: mount this, in fstab, too; never the device below it",
            node.display()
        ),
        format!(
            "  bitmap  {}, written at a clean stop; a block is {}",
            config.volume_state_dir(&volume.name).display(),
            volume.block_size
        ),
        format!("  backups go to repository {}", volume.repository),
        "  reboot  after a clean stop the next backup is incremental; after a crash it reads everything".to_owned(),
    ];
    if let SavePlace::Path(path) = &volume.save_area.place {
        lines.push(format!(
            "  save    originals during a backup: {}, at most {}",
            path.display(),
            size(volume.save_area.limit_bytes)
        ));
    }
    if volume.attach == Attach::Manual {
        lines.push(
            "  attach  manual: this machine refuses PR_SET_IO_FLUSHER, so memory pressure could stop a volume attached at boot".to_owned(),
        );
    }
    if let Some(note) = &found.note {
        lines.push(format!("  note    {note}"));
    }
    lines
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

/// Tells the daemon, if it is there.
fn reload(config: &Config) {
    let told = Client::connect(&config.socket(), Some(LIMIT))
        .and_then(|mut client| client.call("Reload", json!({})));
    // Without a daemon there is nobody to tell; one that starts reads the files.
    drop(told);
}

fn run_remove(remove: &Remove, common: &Common) -> Result<Exit, Failure> {
    let config = common.load()?;
    let names: Vec<Name> = if remove.all {
        config.volumes.keys().cloned().collect()
    } else {
        remove.names.clone()
    };
    for name in &names {
        if !config.volumes.contains_key(name) {
            return Err(Failure::new(
                FailureCode::NoSuchVolume,
                format!("no volume {name} is configured"),
            ));
        }
    }
    let list: Vec<String> = names.iter().map(ToString::to_string).collect();
    let list = list.join(", ");
    if remove.dry_run {
        let line = format!("would detach {list} and delete configuration and bitmap; no image");
        output::text(common, &line);
        return Ok(Exit::Done);
    }
    let question = format!("Detach {list} and delete configuration and bitmap (images stay)?");
    if !remove.yes && !names.is_empty() {
        confirmed(&question)?;
    }
    let mut lines = Vec::new();
    for name in &names {
        detach(&config, name)?;
        forget(&config, name)?;
        lines.push(format!("{name} is removed; its images stay"));
    }
    reload(&config);
    for line in &lines {
        output::text(common, line);
    }
    if common.json {
        output::document(&DoneDocument {
            message_type: DONE.to_owned(),
            verb: "volume remove".to_owned(),
            names: names.iter().map(ToString::to_string).collect(),
            lines,
            warnings: Vec::new(),
        });
    }
    Ok(Exit::Done)
}

fn confirmed(question: &str) -> Result<(), Failure> {
    use std::io::IsTerminal as _;
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(
            FailureCode::ConfirmationNeeded,
            "this asks first, and there is no terminal to ask at",
        )
        .hint("--yes answers; --dry-run shows what would be done."));
    }
    if output::asked(question) {
        return Ok(());
    }
    Err(Failure::new(FailureCode::NotConfirmed, "nothing was done"))
}

/// By the daemon, which then knows; without one, directly.
fn detach(config: &Config, name: &Name) -> Result<(), Failure> {
    let asked = Client::connect(&config.socket(), None)
        .and_then(|mut client| client.call("Detach", json!({ "volume": name })));
    match asked {
        Ok(_) => Ok(()),
        Err(failure) if failure.code == FailureCode::NotAttached => Ok(()),
        Err(failure) if failure.code == FailureCode::DaemonUnreachable => {
            let direct = VolumeClient::connect(&config.runtime_dir, name.as_str(), LIMIT)
                .and_then(VolumeClient::detach);
            match direct {
                Ok(()) | Err(VolumeError::NotAttached { .. }) => Ok(()),
                Err(error) => Err(Failure::new(FailureCode::VolumeOpen, chain(&error))),
            }
        }
        Err(failure) => Err(failure),
    }
}

fn forget(config: &Config, name: &Name) -> Result<(), Failure> {
    let failed = |what: String| {
        move |error: &dyn std::error::Error| {
            Failure::new(FailureCode::Failed, format!("{what}: {}", chain(error)))
        }
    };
    let file = config.volume_file(name);
    let says = failed(format!("{} could not be removed", file.display()));
    fs::remove_durably(&file).map_err(|e| says(&e))?;
    let state = config.volume_state_dir(name);
    let says = failed(format!("{} could not be removed", state.display()));
    match std::fs::remove_dir_all(&state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(says(&error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
