//! `status` from facts: the interface's example, and what wants somebody.

use super::*;
use crate::config::{Overrides, ReadFiles};
use std::io;
use std::path::{Path, PathBuf};

struct Files;

impl ReadFiles for Files {
    fn read(&self, path: &Path) -> io::Result<String> {
        match path.to_str() {
            Some("/etc/blktide/volumes.d/data.toml") => {
                Ok("device = '/dev/vg0/data'\nmode = 'fuse'".to_owned())
            }
            Some("/etc/blktide/repositories.d/main.toml") => Ok("path = '/r'".to_owned()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(match folder.to_str() {
            Some("/etc/blktide/volumes.d") => vec![folder.join("data.toml")],
            Some("/etc/blktide/repositories.d") => vec![folder.join("main.toml")],
            _ => Vec::new(),
        })
    }
}

const HOUR: i64 = 3_600_000_000_000;

fn facts(config: &Config) -> VolumeFacts<'_> {
    let mut records = Records::default();
    records.repositories.insert(
        "main".to_owned(),
        Record {
            repository_id: "0".repeat(32),
            volume_id: "1".repeat(32),
            number: 3,
            image_id: "2".repeat(32),
            time: "1970-01-01T01:00:00Z".to_owned(),
            generation: "g".to_owned(),
            volume_bytes: 1 << 30,
            block_size_bytes: 65536,
        },
    );
    VolumeFacts {
        config: config.volumes.values().next().unwrap(),
        records,
        live: Some(LiveFacts {
            state: "attached".to_owned(),
            pid: 4711,
            keeper_pid: 4710,
            volume_bytes: 1 << 30,
            generation_number: 4,
            distrust: None,
            changed_bytes: vec![("g".to_owned(), Some(1_310_720))],
            warnings: Vec::new(),
            takeovers: 0,
            longest_pause_ns: 0,
        }),
        failed: None,
        closed: false,
        mountpoint: Some("/srv/data".to_owned()),
        configured: WallTime(0),
        job: None,
    }
}

fn config() -> Config {
    Config::load(&Overrides::default(), &Files).unwrap()
}

/// The interface's example, key by key (ours may have more).
#[test]
fn the_interfaces_example() {
    let config = config();
    let (document, exit) = assemble(&config, "web1", true, &[facts(&config)], WallTime(2 * HOUR));
    assert_eq!(exit, Exit::Done);
    let ours = serde_json::to_value(&document).unwrap();
    let theirs: serde_json::Value = serde_json::from_str(
        r#"{"message_type":"status","daemon":"running","host":"web1","volumes":[{"name":"data","state":"attached","pid":4711,"keeper_pid":4710,
 "device":"/dev/vg0/data","mountpoint":"/srv/data","node":"/dev/blktide/data","mode":"fuse","size_bytes":1073741824,"block_size_bytes":65536,
 "tracking":"trusted","distrust_reason":null,"distrust_time":null,"distrust_detail":null,"changed_bytes":1310720,"generation":4,"last_image":"data@3",
 "repositories":[{"repository":"main","last_image":"data@3","last_time":"1970-01-01T01:00:00Z","overdue":false,"changed_bytes":1310720,"discarded_bytes":0,
   "next_kind":"incremental","next_read_bytes":1310720}],"job":null,"warnings":[]}]}"#,
    )
    .unwrap();
    assert_contains(&ours, &theirs, "$");
}

fn assert_contains(ours: &serde_json::Value, theirs: &serde_json::Value, at: &str) {
    match theirs {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                assert_contains(&ours[key], value, &format!("{at}.{key}"));
            }
        }
        serde_json::Value::Array(list) => {
            for (i, value) in list.iter().enumerate() {
                assert_contains(&ours[i], value, &format!("{at}[{i}]"));
            }
        }
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::String(_) => assert_eq!(ours, theirs, "{at}"),
    }
}

#[test]
fn what_wants_somebody_exits_3() {
    let config = config();
    let exit = |change: &dyn Fn(&mut VolumeFacts<'_>), now| {
        let mut facts = facts(&config);
        change(&mut facts);
        let (document, exit) = assemble(&config, "h", true, &[facts], WallTime(now));
        (exit, document.volumes[0].clone())
    };
    let now = 2 * HOUR;
    assert_eq!(exit(&|_| (), now).0, Exit::Done);
    assert_eq!(exit(&|_| (), 27 * HOUR).0, Exit::Done, "26 h after 01:00");
    assert_eq!(exit(&|_| (), 27 * HOUR + 1).0, Exit::Warnings);
    assert_eq!(exit(&|f| f.live = None, now).0, Exit::Warnings);
    let (code, volume) = exit(&|f| f.live.as_mut().unwrap().keeper_pid = 0, now);
    assert_eq!((code, volume.keeper_pid), (Exit::Warnings, None));
    let through = |f: &mut VolumeFacts<'_>| {
        f.live.as_mut().unwrap().state = "passing-through".to_owned();
    };
    let (code, volume) = exit(&through, now);
    assert_eq!(code, Exit::Warnings);
    assert_eq!(volume.tracking, "off");
    assert_eq!(
        volume.distrust_reason.as_deref(),
        Some("tracking-interrupted")
    );
    // A warning of the processes alone is shown and does not make it exit 3.
    let warned = |f: &mut VolumeFacts<'_>| {
        f.live.as_mut().unwrap().warnings = vec!["no-io-flusher".to_owned()];
    };
    assert_eq!(exit(&warned, now).0, Exit::Done);
    let (_, away) = assemble(&config, "h", false, &[facts(&config)], WallTime(now));
    assert_eq!(away, Exit::Warnings);
}

/// req X9: a watched volume has no process, its node is the device, and nothing is wrong with that.
#[test]
fn what_is_watched_has_no_process_and_is_its_own_node() {
    let config = config();
    let mut watched = config.volumes.values().next().unwrap().clone();
    watched.mode = Mode::Watch;
    let mut facts = facts(&config);
    facts.config = &watched;
    let live = facts.live.as_mut().unwrap();
    (live.pid, live.keeper_pid) = (0, 0);
    let (document, exit) = assemble(&config, "web1", true, &[facts], WallTime(2 * HOUR));
    let volume = &document.volumes[0];
    assert_eq!(exit, Exit::Done, "{:?}", volume.advice);
    assert_eq!((volume.pid, volume.keeper_pid), (None, None));
    assert_eq!(volume.node, volume.device);
    assert_eq!(
        (volume.state.as_str(), volume.mode.as_str()),
        ("attached", "watch")
    );
}

#[test]
fn the_next_backup_is_told_with_its_reason() {
    let config = config();
    let next = |change: &dyn Fn(&mut VolumeFacts<'_>)| {
        let mut facts = facts(&config);
        change(&mut facts);
        let (document, _) = assemble(&config, "h", true, &[facts], WallTime(HOUR));
        let repository = document.volumes[0].repositories[0].clone();
        assert_eq!(
            repository.next_kind == "incremental",
            repository.next_reason.is_none()
        );
        repository.next_reason.unwrap_or_default()
    };
    assert_eq!(next(&|_| ()), "");
    assert_eq!(next(&|f| f.records = Records::default()), "first-backup");
    assert_eq!(
        next(&|f| f.live.as_mut().unwrap().volume_bytes += 512),
        "resized"
    );
    assert_eq!(
        next(&|f| f.live.as_mut().unwrap().changed_bytes[0].1 = None),
        "bitmap-stale"
    );
    let distrust = |f: &mut VolumeFacts<'_>| {
        f.live.as_mut().unwrap().distrust = Some(("unclean-shutdown".to_owned(), 5, String::new()));
    };
    assert_eq!(next(&distrust), "unclean-shutdown");
    assert_eq!(next(&|f| f.live = None), "tracking-interrupted");
    let detached = |f: &mut VolumeFacts<'_>| (f.live, f.closed) = (None, true);
    assert_eq!(next(&detached), "");
}
