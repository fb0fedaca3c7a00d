//! Configuration against texts: defaults, overlays, errors with file and line.

use super::*;
use std::collections::BTreeMap;

struct Files(BTreeMap<PathBuf, String>);

impl Files {
    fn of(files: &[(&str, &str)]) -> Self {
        Self(
            files
                .iter()
                .map(|(p, t)| (PathBuf::from(p), (*t).to_owned()))
                .collect(),
        )
    }
}

impl ReadFiles for Files {
    fn read(&self, path: &Path) -> io::Result<String> {
        self.0
            .get(path)
            .cloned()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self
            .0
            .keys()
            .rev()
            .filter(|p| p.parent() == Some(folder))
            .cloned()
            .collect())
    }
}

fn load(files: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::load(&Overrides::default(), &Files::of(files))
}

fn error(files: &[(&str, &str)]) -> String {
    load(files).unwrap_err().to_string()
}

#[test]
fn nothing_configured_is_the_defaults() {
    assert_eq!(load(&[]).unwrap(), Config::default());
    assert_eq!(Config::default().defaults.repository.as_str(), "main");
}

/// The shipped example: as it is, and with every key put in.
#[test]
fn the_example_says_the_defaults() {
    assert_eq!(load(&[(DEFAULT_FILE, EXAMPLE)]).unwrap(), Config::default());
    let on: String = EXAMPLE
        .lines()
        .map(|l| match l.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') => format!("{key}\n"),
            _ => format!("{l}\n"),
        })
        .collect();
    assert!(on.contains("\nwait_limit = "), "the keys are put in");
    assert_eq!(load(&[(DEFAULT_FILE, &on)]).unwrap(), Config::default());
    let keys = on
        .lines()
        .filter(|l| l.contains(" = ") && !l.starts_with('#'))
        .count();
    assert_eq!(keys, 22);
}

#[test]
fn later_files_win_and_the_environment_over_all() {
    let files = [
        (
            DEFAULT_FILE,
            "runtime_dir = '/a'\nstate_dir = '/s'\n[defaults]\nblock_size = '4 KiB'",
        ),
        ("/etc/blktide/blktide.toml.d/20.toml", "runtime_dir = '/c'"),
        (
            "/etc/blktide/blktide.toml.d/10.toml",
            "runtime_dir = '/b'\n[defaults]\nmax_age = '2 d'",
        ),
        (
            "/etc/blktide/blktide.toml.d/30.conf",
            "runtime_dir = '/never'",
        ),
        (
            "/etc/blktide/blktide.toml.d/.40.toml",
            "runtime_dir = '/never'",
        ),
    ];
    let config = load(&files).unwrap();
    assert_eq!(config.runtime_dir, PathBuf::from("/c"));
    assert_eq!(config.defaults.block_size.bytes(), 4096);
    assert_eq!(config.defaults.max_age, Duration::from_secs(48 * 3600));
    let overrides = Overrides::new(None, |name| {
        (name == "BLKTIDE_STATE_DIR").then(|| PathBuf::from("/env"))
    });
    let config = Config::load(&overrides, &Files::of(&files)).unwrap();
    assert_eq!(config.state_dir, PathBuf::from("/env"));
}

#[test]
fn a_named_file_must_exist() {
    let overrides = Overrides::new(Some(PathBuf::from("/x.toml")), |_| None);
    let missing = Config::load(&overrides, &Files::of(&[])).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read /x.toml");
    let files = Files::of(&[("/x.toml", ""), ("/x.toml.d/1.toml", "runtime_dir = '/r'")]);
    let config = Config::load(&overrides, &files).unwrap();
    assert_eq!(config.runtime_dir, PathBuf::from("/r"));
}

#[test]
fn volumes_take_the_defaults_they_do_not_change() {
    let config = load(&[
        (DEFAULT_FILE, "[defaults]\nblock_size='4 KiB'\n[defaults.save_area]\nmemory='256 MiB'\noverflow='wait'"),
        ("/etc/blktide/volumes.d/data.toml", "device='/dev/vdb'\nmode='fuse'\nattach='manual'\nexclusive=true"),
        ("/etc/blktide/volumes.d/b.toml", "device='/dev/vdc'\nblock_size='1 MiB'\ngrain='64k'\n[save_area]\npath='/s'\nwait_limit='1 s'"),
        ("/etc/blktide/repositories.d/main.toml", "path='/r'\nkeep={last=3}\nmin_free='1 GiB'"),
    ])
    .unwrap();
    let data = &config.volumes[&Name::new("data").unwrap()];
    assert_eq!(
        (data.attach, data.exclusive, data.mode),
        (Attach::Manual, true, Mode::Fuse)
    );
    assert_eq!(data.block_size.bytes(), 4096);
    assert_eq!(data.grain.bytes(), 4096);
    assert_eq!(data.save_area.place, SavePlace::Memory(256 << 20));
    let b = &config.volumes[&Name::new("b").unwrap()];
    assert_eq!((b.block_size.bytes(), b.grain.bytes()), (1 << 20, 65536));
    assert_eq!(b.save_area.place, SavePlace::Path("/s".into()));
    assert_eq!(b.save_area.overflow, Overflow::Wait);
    assert_eq!(b.save_area.wait_limit, Duration::from_secs(1));
    let main = &config.repositories[&Name::new("main").unwrap()];
    assert_eq!(main.keep.unwrap().last, 3);
    assert_eq!(main.min_free, MinFree::Bytes(1 << 30));
}

#[test]
fn watch_has_a_finer_grain_and_its_freezes() {
    let grain = |defaults: &str, volume: &str| {
        let config = load(&[
            (DEFAULT_FILE, defaults),
            ("/etc/blktide/volumes.d/data.toml", volume),
        ])
        .unwrap();
        let data = config.volumes[&Name::new("data").unwrap()].clone();
        assert_eq!(
            volume_file(&data, &config.defaults).contains("grain"),
            volume.contains("grain"),
            "what the defaults say is not said again"
        );
        data.grain.bytes()
    };
    assert_eq!(grain("", "device='/a'\nmode='watch'"), 4096);
    assert_eq!(grain("", "device='/a'\nmode='fuse'"), 65536);
    let coarse = "[defaults]\ngrain='16k'";
    assert_eq!(grain(coarse, "device='/a'\nmode='watch'"), 16384);
    let own = "device='/a'\nmode='watch'\ngrain='64k'";
    assert_eq!(grain(coarse, own), 65536);

    let config = load(&[
        (DEFAULT_FILE, "[defaults]\nfreeze_budget='50 ms'"),
        ("/etc/blktide/volumes.d/data.toml", "device='/a'\nmode='watch'"),
        (
            "/etc/blktide/volumes.d/own.toml",
            "device='/b'\nmode='watch'\nfreeze_budget='1 s'\nfreeze_limit='2 s'\nover_budget='longer'",
        ),
    ])
    .unwrap();
    let of = |name| {
        let volume = &config.volumes[&Name::new(name).unwrap()];
        (
            volume.freeze_budget,
            volume.freeze_limit,
            volume.over_budget,
        )
    };
    let (ms, s) = (Duration::from_millis, Duration::from_secs);
    assert_eq!(of("data"), (ms(50), s(5), OverBudget::GiveUp));
    assert_eq!(of("own"), (s(1), s(2), OverBudget::Longer));
}

#[test]
fn errors_name_file_and_line() {
    let at = |text| error(&[(DEFAULT_FILE, text)]);
    assert!(
        at("\n\nfoo = 1").starts_with("/etc/blktide/blktide.toml:3: unknown field `foo`"),
        "{}",
        at("\n\nfoo = 1")
    );
    assert!(
        at("[defaults]\nmode = 3").starts_with("/etc/blktide/blktide.toml:2: "),
        "{}",
        at("[defaults]\nmode = 3")
    );
    assert_eq!(
        at("[defaults]\n\nblock_size = \"5 KiB\""),
        "/etc/blktide/blktide.toml:3: block_size: '5 KiB' is not a power of two from 4 KiB to 1 MiB"
    );
    assert_eq!(
        at("runtime_dir = 'run'"),
        "/etc/blktide/blktide.toml:1: runtime_dir: 'run' is not an absolute path"
    );
    assert_eq!(
        at("[defaults.save_area]\npath='/a'\nmemory='1 MiB'"),
        "/etc/blktide/blktide.toml:3: memory: path, memory and device exclude each other"
    );
    assert_eq!(
        at("[defaults]\nmode='fast'"),
        "/etc/blktide/blktide.toml:2: mode: 'fast' is none of auto, watch, ublk, fuse"
    );
    assert!(at("a = [").contains("/etc/blktide/blktide.toml:1: "));
    assert!(
        error(&[("/etc/blktide/volumes.d/x.toml", "mode='fuse'")])
            .contains("missing field `device`")
    );
    assert!(error(&[("/etc/blktide/volumes.d/a b.toml", "device='/x'")]).contains("a b.toml"));
    assert_eq!(
        error(&[(
            "/etc/blktide/volumes.d/x.toml",
            "device='/x'\nblock_size='4k'\ngrain='8k'"
        )]),
        "/etc/blktide/volumes.d/x.toml:3: grain: a grain of 8 KiB does not fit into a block of 4 KiB"
    );
    assert!(
        error(&[("/etc/blktide/repositories.d/x.toml", "path='s3://b'")]).contains("only folders")
    );
    assert_eq!(
        at("[defaults]\nfreeze_limit='10 ms'"),
        "/etc/blktide/blktide.toml:2: freeze_limit: a budget of 100 ms is more than the limit of 10 ms"
    );
    assert_eq!(
        at("[defaults]\nover_budget='wait'"),
        "/etc/blktide/blktide.toml:2: over_budget: 'wait' is none of give-up, longer"
    );
    assert_eq!(
        at("[defaults]\ninstant='now'"),
        "/etc/blktide/blktide.toml:2: instant: 'now' is none of auto, freeze, lvm"
    );
}

/// What the tools write reads back as what they meant.
#[test]
fn written_files_read_back() {
    let mut config = load(&[
        ("/etc/blktide/volumes.d/b.toml", "device='/dev/disk/by-id/x \"y\"'\nattach='manual'\n\
             exclusive=true\nblock_size='4 KiB'\nrepository='r2'\n[save_area]\nmemory='3 MiB'\noverflow='wait'\nwait_limit='1500 ms'"),
        ("/etc/blktide/volumes.d/a.toml", "device='/x'"),
        ("/etc/blktide/repositories.d/r2.toml", "path='/r'\nkeep={last=3, daily=2}\nmin_free='5 %'\nplaintext=true"),
    ])
    .unwrap();
    let mut texts: Vec<(String, String)> = Vec::new();
    for (name, volume) in &config.volumes {
        texts.push((
            config.volume_file(name).display().to_string(),
            volume_file(volume, &config.defaults),
        ));
    }
    for (name, repository) in &config.repositories {
        texts.push((
            config.repository_file(name).display().to_string(),
            repository_file(repository),
        ));
    }
    let files: Vec<(&str, &str)> = texts
        .iter()
        .map(|(p, t)| (p.as_str(), t.as_str()))
        .collect();
    let again = load(&files).unwrap();
    config.file.clone_from(&again.file);
    assert_eq!(again, config);
}
