//! The files that `volume add` and `repo init` write.

use super::{RepositoryConfig, SaveArea, SavePlace, VolumeConfig};
use crate::unit::exact_size;
use std::path::Path;

/// A volume's file: what `volume add` decided, and nothing that the defaults already say.
pub fn volume_file(volume: &VolumeConfig, defaults: &super::Defaults) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!(
        "# {}: written by `blktidectl volume add`",
        volume.name
    ));
    line(format!("device = {}", quoted_path(&volume.device)));
    line(format!("mode = \"{}\"", volume.mode.word()));
    line(format!("attach = \"{}\"", volume.attach.word()));
    if volume.exclusive {
        line("exclusive = true".to_owned());
    }
    if volume.block_size != defaults.block_size {
        line(format!(
            "block_size = \"{}\"",
            exact_size(volume.block_size.bytes_u64())
        ));
    }
    let unsaid = defaults.grain_of(volume.mode, volume.block_size);
    if volume.grain != defaults.grain.unwrap_or(unsaid) {
        line(format!(
            "grain = \"{}\"",
            exact_size(volume.grain.bytes_u64())
        ));
    }
    if volume.repository != defaults.repository {
        line(format!("repository = \"{}\"", volume.repository));
    }
    if volume.save_area != defaults.save_area {
        line(save_area(&volume.save_area));
    }
    out
}

/// A repository's file.
pub fn repository_file(repository: &RepositoryConfig) -> String {
    let mut out = format!(
        "# {}: written by `blktidectl repo`\npath = {}\nmin_free = \"{}\"\n",
        repository.name,
        quoted_path(&repository.path),
        match repository.min_free {
            crate::unit::MinFree::Percent(percent) => format!("{percent} %"),
            crate::unit::MinFree::Bytes(bytes) => exact_size(bytes),
        }
    );
    if let Some(k) = repository.keep {
        let keep = [
            ("last", k.last),
            ("hourly", k.hourly),
            ("daily", k.daily),
            ("weekly", k.weekly),
            ("monthly", k.monthly),
            ("yearly", k.yearly),
        ]
        .map(|(word, count)| format!("{word} = {count}"))
        .join(", ");
        out = format!("{out}keep = {{ {keep} }}\n");
    }
    if repository.plaintext {
        out.push_str("plaintext = true\n");
    }
    out
}

fn save_area(area: &SaveArea) -> String {
    let place = match &area.place {
        SavePlace::Path(path) => format!("path = {}", quoted_path(path)),
        SavePlace::Memory(bytes) => format!("memory = \"{}\"", exact_size(*bytes)),
        SavePlace::Device(path) => format!("device = {}", quoted_path(path)),
    };
    let overflow = area.overflow.word();
    format!(
        "[save_area]\n{place}\nlimit = \"{}\"\nmin_free = \"{}\"\noverflow = \"{overflow}\"\nwait_limit = \"{} ms\"",
        exact_size(area.limit_bytes),
        exact_size(area.min_free_bytes),
        area.wait_limit.as_millis(),
    )
}

/// A path as a TOML string.
fn quoted_path(path: &Path) -> String {
    toml::Value::String(path.to_string_lossy().into_owned()).to_string()
}
