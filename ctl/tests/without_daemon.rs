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
        "mount", "ls", "extract", "forget", "prune", "audit", "heatmap",
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
    let (exit, code, message) =
        place.refused(&["volume", "add", "a", "--device", &disk, "--mode", "watch"]);
    assert_eq!((exit, code.as_str()), (13, "mode_refused"));
    assert!(message.contains("regular file"), "{message}");
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

/// req X9: what is watched is as it was for its users; without root, or without a daemon, nothing is said that is not known.
#[test]
fn a_watched_volume_is_its_own_node_and_has_no_process() {
    let place = Place::new("watch");
    place.put(
        "volumes.d/data.toml",
        "device = '/nonexistent'\nmode = 'watch'\nattach = 'boot'\n",
    );
    let list = place.run(&["volume", "list", "--json"]);
    let document: Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(document["volumes"][0]["node"], "/nonexistent");
    assert_eq!(document["volumes"][0]["mode"], "watch");
    let status = place.run(&["status", "--json"]);
    assert_eq!(status.status.code(), Some(3), "{status:?}");
    let document: Value = serde_json::from_slice(&status.stdout).unwrap();
    let volume = &document["volumes"][0];
    assert_eq!(volume["node"], "/nonexistent");
    assert_eq!(volume["pid"], Value::Null);
    assert_eq!(volume["keeper_pid"], Value::Null);
    assert_eq!(volume["tracking"], "off");
    let advice = volume["advice"].to_string();
    assert!(
        !advice.contains("mount"),
        "nothing is to be mounted: {advice}"
    );
}

/// `doctor` changes nothing and is content whatever it finds.
#[test]
fn doctor_tells_what_a_file_can_have_and_what_to_type() {
    let place = Place::new("doctor");
    let disk = place.0.join("my disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = disk.display().to_string();
    let plain = place.run(&["doctor", &disk]);
    assert_eq!(plain.status.code(), Some(0), "{plain:?}");
    let told = String::from_utf8_lossy(&plain.stdout).into_owned();
    for words in ["kernel ", "watch no: it is a regular file", "to type"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let json = place.run(&["doctor", &disk, "/nonexistent", "--json"]);
    assert_eq!(json.status.code(), Some(0), "{json:?}");
    let document: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(document["message_type"], "doctor");
    for key in [
        "release",
        "btf",
        "lockdown",
        "watch",
        "watch_why_not",
        "fuse",
        "loop",
    ] {
        assert!(document["kernel"].get(key).is_some(), "{key}: {document}");
    }
    let found = &document["devices"][0];
    assert_eq!(found["size_bytes"], 1 << 20);
    assert_eq!(found["modes"][0]["mode"], "watch");
    assert_eq!(found["modes"][0]["possible"], false);
    let away = &document["devices"][1];
    assert!(
        away["skipped"].is_string() && away["command"].is_null(),
        "{away}"
    );
    if found["modes"][2]["possible"] == true {
        assert_eq!(found["auto"], "fuse");
        let command = found["command"].as_str().unwrap();
        assert!(
            command.starts_with("blktidectl volume add my-disk-img --device "),
            "{command}"
        );
        assert_eq!(document["commands"][0], found["command"]);
    }
    assert_eq!(
        std::fs::read_dir(place.0.join("volumes.d"))
            .unwrap()
            .count(),
        0
    );
}
