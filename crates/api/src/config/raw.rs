//! The files as they are written, and how they become checked values.

use super::{
    Attach, Config, ConfigError, Defaults, Instant, Keep, Mode, OverBudget, Overflow, Overrides,
    ReadFiles, RepositoryConfig, SaveArea, SavePlace, VolumeConfig, of_word,
};
use crate::name::Name;
use crate::unit::{MinFree, parse_duration, parse_rate, parse_size};
use blktide_types::unit::BlockSize;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;

type Text = Option<Spanned<String>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    runtime_dir: Text,
    state_dir: Text,
    device_dir: Text,
    volumes_dir: Text,
    repositories_dir: Text,
    socket_group: Text,
    #[serde(default)]
    defaults: RawDefaults,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawDefaults {
    mode: Text,
    block_size: Text,
    grain: Text,
    repository: Text,
    max_read_rate: Text,
    max_age: Text,
    hold_deadline: Text,
    freeze_budget: Text,
    freeze_limit: Text,
    over_budget: Text,
    instant: Text,
    save_area: Option<RawSaveArea>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSaveArea {
    path: Text,
    memory: Text,
    device: Text,
    limit: Text,
    min_free: Text,
    overflow: Text,
    wait_limit: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    device: Spanned<String>,
    mode: Text,
    attach: Text,
    exclusive: Option<bool>,
    block_size: Text,
    grain: Text,
    repository: Text,
    max_read_rate: Text,
    max_age: Text,
    hold_deadline: Text,
    freeze_budget: Text,
    freeze_limit: Text,
    over_budget: Text,
    instant: Text,
    save_area: Option<RawSaveArea>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRepository {
    path: Spanned<String>,
    keep: Option<RawKeep>,
    min_free: Text,
    plaintext: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKeep {
    #[serde(default)]
    last: u32,
    #[serde(default)]
    hourly: u32,
    #[serde(default)]
    daily: u32,
    #[serde(default)]
    weekly: u32,
    #[serde(default)]
    monthly: u32,
    #[serde(default)]
    yearly: u32,
}

/// One file: where it lies and what it says.
struct Source {
    path: PathBuf,
    text: String,
}

pub(super) fn load(overrides: &Overrides, files: &dyn ReadFiles) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    let named = overrides.file.is_some();
    if let Some(file) = &overrides.file {
        config.file.clone_from(file);
    }
    let main = config.file.clone();
    match files.read(&main) {
        Ok(text) => apply(&mut config, &Source { path: main, text })?,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !named => {}
        Err(source) => return Err(ConfigError::Read { path: main, source }),
    }
    let mut folder = config.file.clone().into_os_string();
    folder.push(".d");
    for source in toml_files(files, Path::new(&folder))? {
        apply(&mut config, &source)?;
    }
    if let Some(dir) = &overrides.runtime_dir {
        config.runtime_dir.clone_from(dir);
    }
    if let Some(dir) = &overrides.state_dir {
        config.state_dir.clone_from(dir);
    }
    config.volumes = named_files(files, &config.volumes_dir, |source, name| {
        volume(source, name, &config.defaults)
    })?;
    config.repositories = named_files(files, &config.repositories_dir, repository)?;
    Ok(config)
}

/// The `*.toml` of a folder, by name; a folder that is not there is empty.
fn toml_files(files: &dyn ReadFiles, folder: &Path) -> Result<Vec<Source>, ConfigError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| ConfigError::Read { path, source }
    };
    let mut paths = match files.list(folder) {
        Ok(paths) => paths,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(folder)(e)),
    };
    paths.retain(|p| {
        let hidden = p
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        !hidden && p.extension().is_some_and(|e| e == "toml")
    });
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = files.read(&path).map_err(unreadable(&path))?;
            Ok(Source { path, text })
        })
        .collect()
}

/// One value for each `NAME.toml` of a folder.
fn named_files<T>(
    files: &dyn ReadFiles,
    folder: &Path,
    read: impl Fn(&Source, Name) -> Result<T, ConfigError>,
) -> Result<BTreeMap<Name, T>, ConfigError> {
    let mut out = BTreeMap::new();
    for source in toml_files(files, folder)? {
        let stem = source
            .path
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default();
        let name = Name::new(&stem).map_err(|e| ConfigError::FileName {
            path: source.path.clone(),
            source: e,
        })?;
        out.insert(name.clone(), read(&source, name)?);
    }
    Ok(out)
}

impl Source {
    fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|e| ConfigError::Syntax {
            path: self.path.clone(),
            line: e.span().map_or(1, |span| self.line(span.start)),
            message: e.message().to_owned(),
        })
    }

    fn line(&self, byte: usize) -> usize {
        self.text
            .as_bytes()
            .iter()
            .take(byte)
            .filter(|b| **b == b'\n')
            .count()
            .saturating_add(1)
    }

    fn wrong(&self, key: &'static str, at: &Spanned<String>, message: String) -> ConfigError {
        ConfigError::Value {
            path: self.path.clone(),
            line: self.line(at.span().start),
            key,
            message,
        }
    }

    /// Puts what `parse` makes of the text into `to`, if there is a text.
    fn set<T, E: std::fmt::Display>(
        &self,
        to: &mut T,
        key: &'static str,
        text: &Text,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<(), ConfigError> {
        if let Some(text) = text {
            *to = parse(text.get_ref()).map_err(|e| self.wrong(key, text, e.to_string()))?;
        }
        Ok(())
    }
}

fn apply(config: &mut Config, source: &Source) -> Result<(), ConfigError> {
    let raw: RawConfig = source.parse()?;
    source.set(
        &mut config.runtime_dir,
        "runtime_dir",
        &raw.runtime_dir,
        absolute,
    )?;
    source.set(&mut config.state_dir, "state_dir", &raw.state_dir, absolute)?;
    source.set(
        &mut config.device_dir,
        "device_dir",
        &raw.device_dir,
        absolute,
    )?;
    source.set(
        &mut config.volumes_dir,
        "volumes_dir",
        &raw.volumes_dir,
        absolute,
    )?;
    source.set(
        &mut config.repositories_dir,
        "repositories_dir",
        &raw.repositories_dir,
        absolute,
    )?;
    source.set(
        &mut config.socket_group,
        "socket_group",
        &raw.socket_group,
        |group| Ok::<_, String>((!group.is_empty()).then(|| group.to_owned())),
    )?;
    apply_defaults(&mut config.defaults, source, &raw.defaults)
}

fn apply_defaults(
    defaults: &mut Defaults,
    source: &Source,
    raw: &RawDefaults,
) -> Result<(), ConfigError> {
    source.set(&mut defaults.mode, "mode", &raw.mode, |w| {
        word(Mode::WORDS, w)
    })?;
    source.set(
        &mut defaults.block_size,
        "block_size",
        &raw.block_size,
        block_size,
    )?;
    source.set(&mut defaults.grain, "grain", &raw.grain, grain)?;
    fits(
        source,
        defaults.block_size,
        defaults.grain,
        &[&raw.grain, &raw.block_size],
    )?;
    source.set(
        &mut defaults.repository,
        "repository",
        &raw.repository,
        Name::new,
    )?;
    source.set(
        &mut defaults.max_read_rate,
        "max_read_rate",
        &raw.max_read_rate,
        parse_rate,
    )?;
    source.set(
        &mut defaults.max_age,
        "max_age",
        &raw.max_age,
        parse_duration,
    )?;
    source.set(
        &mut defaults.hold_deadline,
        "hold_deadline",
        &raw.hold_deadline,
        parse_duration,
    )?;
    let usual = (
        defaults.freeze_budget,
        defaults.freeze_limit,
        defaults.over_budget,
    );
    let said = (&raw.freeze_budget, &raw.freeze_limit, &raw.over_budget);
    (
        defaults.freeze_budget,
        defaults.freeze_limit,
        defaults.over_budget,
    ) = freeze(source, said, usual)?;
    source.set(&mut defaults.instant, "instant", &raw.instant, |w| {
        word(Instant::WORDS, w)
    })?;
    if let Some(area) = &raw.save_area {
        save_area(source, area, &mut defaults.save_area)?;
    }
    Ok(())
}

/// A volume of which only name and device are said.
fn unsaid(name: Name, device: PathBuf, defaults: &Defaults) -> VolumeConfig {
    VolumeConfig {
        name,
        device,
        mode: defaults.mode,
        attach: Attach::Boot,
        exclusive: false,
        block_size: defaults.block_size,
        grain: defaults.grain_of(defaults.mode, defaults.block_size),
        repository: defaults.repository.clone(),
        max_read_rate: defaults.max_read_rate,
        max_age: defaults.max_age,
        hold_deadline: defaults.hold_deadline,
        freeze_budget: defaults.freeze_budget,
        freeze_limit: defaults.freeze_limit,
        over_budget: defaults.over_budget,
        instant: defaults.instant,
        save_area: defaults.save_area.clone(),
    }
}

fn volume(source: &Source, name: Name, defaults: &Defaults) -> Result<VolumeConfig, ConfigError> {
    let raw: RawVolume = source.parse()?;
    let device =
        absolute(raw.device.get_ref()).map_err(|e| source.wrong("device", &raw.device, e))?;
    let mut volume = unsaid(name, device, defaults);
    volume.exclusive = raw.exclusive.unwrap_or(false);
    let mut bit = defaults.grain;
    source.set(&mut volume.mode, "mode", &raw.mode, |w| {
        word(Mode::WORDS, w)
    })?;
    source.set(&mut volume.attach, "attach", &raw.attach, |w| {
        word(Attach::WORDS, w)
    })?;
    source.set(
        &mut volume.block_size,
        "block_size",
        &raw.block_size,
        block_size,
    )?;
    source.set(&mut bit, "grain", &raw.grain, grain)?;
    source.set(
        &mut volume.repository,
        "repository",
        &raw.repository,
        Name::new,
    )?;
    source.set(
        &mut volume.max_read_rate,
        "max_read_rate",
        &raw.max_read_rate,
        parse_rate,
    )?;
    source.set(&mut volume.max_age, "max_age", &raw.max_age, parse_duration)?;
    source.set(
        &mut volume.hold_deadline,
        "hold_deadline",
        &raw.hold_deadline,
        parse_duration,
    )?;
    let usual = (
        volume.freeze_budget,
        volume.freeze_limit,
        volume.over_budget,
    );
    let said = (&raw.freeze_budget, &raw.freeze_limit, &raw.over_budget);
    (
        volume.freeze_budget,
        volume.freeze_limit,
        volume.over_budget,
    ) = freeze(source, said, usual)?;
    source.set(&mut volume.instant, "instant", &raw.instant, |w| {
        word(Instant::WORDS, w)
    })?;
    if let Some(area) = &raw.save_area {
        save_area(source, area, &mut volume.save_area)?;
    }
    fits(
        source,
        volume.block_size,
        bit,
        &[&raw.grain, &raw.block_size],
    )?;
    if volume.mode == Mode::Auto {
        // Decided once, by `volume add`; a file by hand that leaves it out gets the one that any device can have.
        volume.mode = Mode::Fuse;
    }
    volume.grain = bit.unwrap_or_else(|| defaults.grain_of(volume.mode, volume.block_size));
    Ok(volume)
}

fn repository(source: &Source, name: Name) -> Result<RepositoryConfig, ConfigError> {
    let raw: RawRepository = source.parse()?;
    let path = raw.path.get_ref();
    if path.contains("://") {
        let message = "only folders are built so far, no s3://, no sftp://".to_owned();
        return Err(source.wrong("path", &raw.path, message));
    }
    let mut min_free = MinFree::Percent(5);
    source.set(&mut min_free, "min_free", &raw.min_free, MinFree::parse)?;
    Ok(RepositoryConfig {
        name,
        path: absolute(path).map_err(|e| source.wrong("path", &raw.path, e))?,
        keep: raw.keep.map(|k| Keep {
            last: k.last,
            hourly: k.hourly,
            daily: k.daily,
            weekly: k.weekly,
            monthly: k.monthly,
            yearly: k.yearly,
        }),
        min_free,
        plaintext: raw.plaintext.unwrap_or(false),
    })
}

fn save_area(source: &Source, raw: &RawSaveArea, to: &mut SaveArea) -> Result<(), ConfigError> {
    let mut places = [
        ("path", &raw.path),
        ("memory", &raw.memory),
        ("device", &raw.device),
    ]
    .into_iter()
    .filter_map(|(key, text)| text.as_ref().map(|t| (key, t)));
    let first = places.next();
    if let Some((key, text)) = places.next() {
        let message = "path, memory and device exclude each other".to_owned();
        return Err(source.wrong(key, text, message));
    }
    if first.is_some() {
        source.set(&mut to.place, "path", &raw.path, |p| {
            absolute(p).map(SavePlace::Path)
        })?;
        source.set(&mut to.place, "memory", &raw.memory, |m| {
            parse_size(m).map(SavePlace::Memory)
        })?;
        source.set(&mut to.place, "device", &raw.device, |d| {
            absolute(d).map(SavePlace::Device)
        })?;
    }
    source.set(&mut to.limit_bytes, "limit", &raw.limit, parse_size)?;
    source.set(
        &mut to.min_free_bytes,
        "min_free",
        &raw.min_free,
        parse_size,
    )?;
    source.set(&mut to.overflow, "overflow", &raw.overflow, |w| {
        word(Overflow::WORDS, w)
    })?;
    source.set(
        &mut to.wait_limit,
        "wait_limit",
        &raw.wait_limit,
        parse_duration,
    )
}

/// What is said about freezes over what is usual: `freeze_budget`, `freeze_limit`, `over_budget`.
fn freeze(
    source: &Source,
    (budget, limit, over): (&Text, &Text, &Text),
    usual: (Duration, Duration, OverBudget),
) -> Result<(Duration, Duration, OverBudget), ConfigError> {
    let (mut longest, mut end, mut policy) = usual;
    source.set(&mut longest, "freeze_budget", budget, parse_duration)?;
    source.set(&mut end, "freeze_limit", limit, parse_duration)?;
    source.set(&mut policy, "over_budget", over, |w| {
        word(OverBudget::WORDS, w)
    })?;
    let said = [("freeze_budget", budget), ("freeze_limit", limit)];
    for (key, text) in said {
        if let Some(text) = text
            && longest > end
        {
            let (longest, end) = (longest.as_millis(), end.as_millis());
            let message = format!("a budget of {longest} ms is more than the limit of {end} ms");
            return Err(source.wrong(key, text, message));
        }
    }
    Ok((longest, end, policy))
}

fn fits(
    source: &Source,
    block: BlockSize,
    bit: Option<BlockSize>,
    at: &[&Text],
) -> Result<(), ConfigError> {
    let Some(text) = at.iter().find_map(|t| t.as_ref()) else {
        return Ok(());
    };
    match bit {
        Some(bit) if bit.shift() > block.shift() => {
            let message = format!("a grain of {bit} does not fit into a block of {block}");
            Err(source.wrong("grain", text, message))
        }
        Some(_) | None => Ok(()),
    }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(PathBuf::from(text))
    } else {
        Err(format!("'{text}' is not an absolute path"))
    }
}

fn word<T: Copy>(words: &[(T, &'static str)], text: &str) -> Result<T, String> {
    of_word(words, text).ok_or_else(|| {
        let all: Vec<&str> = words.iter().map(|(_, word)| *word).collect();
        format!("'{text}' is none of {}", all.join(", "))
    })
}

/// A block of an image, from a size.
pub(crate) fn block_size(text: &str) -> Result<BlockSize, String> {
    size_of_block(text)?
        .filter(|size| size.shift() >= BlockSize::IMAGE_MIN.shift())
        .ok_or_else(|| format!("'{text}' is not a power of two from 4 KiB to 1 MiB"))
}

fn grain(text: &str) -> Result<Option<BlockSize>, String> {
    if text == "block" {
        return Ok(None);
    }
    size_of_block(text)?
        .map(Some)
        .ok_or_else(|| format!("'{text}' is not a power of two from 512 B to 1 MiB"))
}

fn size_of_block(text: &str) -> Result<Option<BlockSize>, String> {
    let bytes = parse_size(text).map_err(|e| e.to_string())?;
    Ok(u32::try_from(bytes).ok().and_then(BlockSize::new))
}
