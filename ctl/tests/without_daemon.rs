//! blktidectl where no daemon runs: exit codes, errors for people and for scripts, and nothing done.
#![forbid(unsafe_code)]
#![cfg(test)]

use serde_json::Value;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A configuration of its own; removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("blktidectl-{name}-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("volumes.d")).unwrap();
        let place = Self(folder);
        let dir = |part: &str| place.0.join(part).display().to_string();
        place.put(
            "blktide.toml",
            &format!(
                "runtime_dir = '{}'\nstate_dir = '{}'\ndevice_dir = '{}'\nvolumes_dir = '{}'\nrepositories_dir = '{}'\n",
                dir("run"),
                dir("state"),
                dir("dev"),
                dir("volumes.d"),
                dir("repositories.d")
            ),
        );
        place
    }

    fn put(&self, name: &str, text: &str) {
        let mut file = std::fs::File::create(self.0.join(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_blktidectl"))
            .args(words)
            .env("BLKTIDE_CONFIG", self.0.join("blktide.toml"))
            .env_remove("BLKTIDE_REPOSITORY")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    }

    /// Exit code, and the error document of `--json`; both forms say the same.
    fn refused(&self, words: &[&str]) -> (i32, String, String) {
        let plain = self.run(words);
        let mut with: Vec<&str> = words.to_vec();
        with.push("--json");
        let json = self.run(&with);
        assert_eq!(plain.status.code(), json.status.code(), "{words:?}");
        let document: Value = serde_json::from_slice(&json.stdout)
            .unwrap_or_else(|e| panic!("{words:?}: {e}: {json:?}"));
        assert_eq!(document["message_type"], "error");
        let message = document["message"].as_str().unwrap().to_owned();
        assert!(
            String::from_utf8_lossy(&plain.stderr).contains(&message),
            "{words:?}: the text is on standard error"
        );
        assert!(plain.stdout.is_empty(), "{words:?}: {plain:?}");
        let exit = plain.status.code().unwrap();
        assert_eq!(document["exit"], exit);
        (exit, document["code"].as_str().unwrap().to_owned(), message)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
fn what_needs_the_daemon_says_so_with_14() {
    let place = Place::new("away");
    place.put(
        "volumes.d/data.toml",
        "device = '/nonexistent'\nattach = 'manual'\n",
    );
    for words in [
        &["backup", "data"][..],
        &["attach", "data"],
        &["cancel", "data"],
    ] {
        let (exit, code, _) = place.refused(words);
        assert_eq!(
            (exit, code.as_str()),
            (14, "daemon_unreachable"),
            "{words:?}"
        );
    }
}

#[test]
fn wrong_usage_and_wrong_configuration_exit_2() {
    let place = Place::new("usage");
    for words in [
        &["backup"][..],
        &["frobnicate"],
        &["volume", "add", "a b", "--device", "/x"],
    ] {
        assert_eq!(place.run(words).status.code(), Some(2), "{words:?}");
    }
    for verb in [
        "mount", "ls", "extract", "forget", "prune", "audit", "heatmap", "doctor",
    ] {
        let (exit, code, message) = place.refused(&[verb]);
        assert_eq!((exit, code.as_str()), (2, "not_built_yet"), "{verb}");
        assert!(message.contains("not built yet"), "{verb}: {message}");
    }
    let (exit, code, _) = place.refused(&[
        "volume",
        "add",
        "x",
        "--device",
        "/dev/null",
        "--mode",
        "ublk",
    ]);
    assert_eq!((exit, code.as_str()), (2, "not_built_yet"));
    place.put("volumes.d/bad.toml", "device = '/x'\n\nsize = 3\n");
    let (exit, code, message) = place.refused(&["volume", "list"]);
    assert_eq!((exit, code.as_str()), (2, "config_invalid"));
    assert!(
        message.contains("bad.toml:3: unknown field `size`"),
        "{message}"
    );
}

/// `status` answers without a daemon, and says that this wants somebody.
#[test]
fn status_answers_without_a_daemon() {
    let place = Place::new("status");
    place.put(
        "volumes.d/data.toml",
        "device = '/nonexistent'\nattach = 'manual'\n",
    );
    let output = place.run(&["status", "--json"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["daemon"], "unreachable");
    let volume = &document["volumes"][0];
    assert_eq!(volume["state"], "detached");
    assert_eq!(volume["tracking"], "off");
    assert_eq!(volume["pid"], Value::Null);
    assert_eq!(volume["repositories"][0]["next_reason"], "first-backup");
}

/// What is refused leaves nothing behind; a plan shows and does nothing.
#[test]
fn volume_add_refuses_and_plans_without_a_trace() {
    let place = Place::new("add");
    let disk = place.0.join("disk");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = disk.display().to_string();
    let files = || {
        std::fs::read_dir(place.0.join("volumes.d"))
            .unwrap()
            .count()
    };
    let (exit, code, _) = place.refused(&["volume", "add", "a", "--device", "/"]);
    assert_eq!(exit, 13, "{code}: in use, or no device at all");
    let (exit, code, _) = place.refused(&["volume", "add", "a", "--device", "/proc/version"]);
    assert_eq!((exit, code.as_str()), (13, "device_refused"));
    let (exit, code, _) = place.refused(&["volume", "add", "a", "--device", &disk]);
    assert_eq!((exit, code.as_str()), (14, "daemon_unreachable"));
    let plan = place.run(&["volume", "add", "a", "--device", &disk, "--dry-run"]);
    assert_eq!(plan.status.code(), Some(0), "{plan:?}");
    assert!(String::from_utf8_lossy(&plan.stdout).contains("mode    fuse"));
    assert_eq!(files(), 0);
    let added = place.run(&["volume", "add", "a", "--device", &disk, "--no-attach"]);
    assert_eq!(added.status.code(), Some(0), "{added:?}");
    assert_eq!(files(), 1);
    let (exit, code, _) = place.refused(&["volume", "add", "b", "--device", &disk, "--no-attach"]);
    assert_eq!((exit, code.as_str()), (1, "already_there"));
    let (exit, code, _) = place.refused(&["volume", "remove", "a"]);
    assert_eq!((exit, code.as_str()), (13, "confirmation_needed"));
    assert_eq!(files(), 1);
    assert_eq!(
        place.run(&["volume", "remove", "a", "--yes"]).status.code(),
        Some(0)
    );
    assert_eq!(files(), 0);
}
