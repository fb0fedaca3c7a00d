//! A watched volume as administrators and scripts see it: asked before, refused, told, detached, removed.
//! needs: root, loop, ext4, bpf
//! limit: 120 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    FileSystem, Instance, LoopDevice, Mounted, Stopwatch, fill_file, folders_of, make_file,
    number_at, put, same_bytes, text_of,
};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// An instance, with ext4 on a loop device, mounted.
struct Place {
    // Unmounted before the loop device is cleared, and both before the instance's folder goes.
    mounted: Option<Mounted>,
    disk: LoopDevice,
    instance: Instance,
}

impl Place {
    fn new(name: &str) -> Result<Self> {
        let instance = Instance::started(name)?;
        instance.repo_init("main")?;
        let file = instance.join("disk");
        make_file(&file, 128 * MIB)?;
        let disk = LoopDevice::new(&file, 512)?;
        FileSystem::Ext4.make(disk.path())?;
        let mut place = Self {
            mounted: None,
            disk,
            instance,
        };
        place.mount()?;
        Ok(place)
    }

    fn at(&self) -> PathBuf {
        self.instance.join("mnt")
    }

    fn mount(&mut self) -> Result<()> {
        self.mounted = Some(Mounted::new(self.disk.path(), &self.at(), &[])?);
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        self.mounted.take().context("not mounted")?.unmount()
    }

    fn device(&self) -> String {
        self.disk.path().display().to_string()
    }

    fn add(&self) -> Result<()> {
        let at = self.at().display().to_string();
        self.instance.ctl_ok(&[
            "volume", "add", "data", "--device", &at, "--mode", "auto", "--yes",
        ])?;
        Ok(())
    }
}

/// What a plan for a mounted file system says.
const PLAN: [&str; 4] = [
    "mode    watch",
    "node    as before",
    "nothing changes in fstab",
    "100 ms at most",
];

/// req X9, X8: nothing is done to a device in use before somebody said yes; then it is watched where it stands.
#[test]
fn a_mounted_file_system_is_added_after_a_yes_and_told_as_it_is() -> Result<()> {
    let mut place = Place::new("x09add")?;
    let (at, device) = (place.at().display().to_string(), place.device());
    let dry = [
        "volume",
        "add",
        "data",
        "--device",
        &at,
        "--mode",
        "auto",
        "--dry-run",
    ];
    let plan = place.instance.ctl_ok(&dry)?;
    for words in PLAN {
        ensure!(
            plan.finished.stdout.contains(words),
            "{words}: {}",
            plan.finished.stdout
        );
    }
    let asked = place.instance.ctl(&[
        "volume", "add", "data", "--device", &at, "--mode", "auto", "--json",
    ])?;
    ensure!(
        asked.error_code()? == "confirmation_needed",
        "{:?}",
        asked.finished
    );
    asked.exits(13)?;
    let fuse = [
        "volume", "add", "data", "--device", &at, "--mode", "fuse", "--yes",
    ];
    place.instance.ctl(&fuse)?.exits(13)?;
    ensure!(
        folders_of(&place.instance.root().display().to_string()).is_empty(),
        "pins"
    );
    place.add()?;

    place
        .instance
        .backup_is("data", "full", Some("first-backup"))?;
    fill_file(&place.at().join("new"), 3 * MIB)?;
    let summary = place.instance.backup_is("data", "incremental", None)?;
    ensure!(text_of(&summary, "/consistency")? == "frozen", "{summary}");
    ensure!(number_at(&summary, "/read_bytes")? < 32 * MIB, "{summary}");

    place.instance.end_daemon("TERM")?;
    let watch = Stopwatch::start();
    let status = place.instance.status("data")?;
    ensure!(watch.seconds() < 1.0, "status took {} s", watch.seconds());
    for (pointer, wanted) in [
        ("/state", "attached"),
        ("/mode", "watch"),
        ("/tracking", "trusted"),
        ("/node", device.as_str()),
        ("/mountpoint", at.as_str()),
        ("/repositories/0/next_kind", "incremental"),
    ] {
        ensure!(text_of(&status, pointer)? == wanted, "{pointer}: {status}");
    }
    ensure!(
        status["pid"].is_null() && status["keeper_pid"].is_null(),
        "{status}"
    );
    place
        .instance
        .ctl_ok(&["volume", "remove", "data", "--yes"])?;
    place.unmount()
}

/// req A8, X9: the bitmap of what is closed is stored, with the daemon or without; of what is in use it is lost, and said so before.
#[test]
fn a_detach_stores_what_is_closed_and_asks_about_what_is_in_use() -> Result<()> {
    let mut place = Place::new("x09detach")?;
    place.add()?;
    place.instance.backup("data", &[])?;
    let asked = place.instance.ctl(&["detach", "data", "--json"])?;
    ensure!(
        asked.error_code()? == "confirmation_needed",
        "{:?}",
        asked.finished
    );
    ensure!(
        asked.finished.stdout.contains("reads everything"),
        "{:?}",
        asked.finished
    );
    ensure!(
        text_of(&place.instance.status("data")?, "/state")? == "attached",
        "it was asked only"
    );

    place.instance.end_daemon("TERM")?;
    let open = place
        .instance
        .ctl_ok(&["flush", "--all", "--json"])?
        .json()?;
    ensure!(open["open"] == serde_json::json!(["data"]), "{open}");
    place.unmount()?;
    let closed = place
        .instance
        .ctl_ok(&["flush", "--all", "--json"])?
        .json()?;
    ensure!(closed["stored"] == serde_json::json!(["data"]), "{closed}");
    ensure!(
        place.instance.state_of("data").join("bitmap").exists(),
        "no bitmap"
    );

    place.instance.start()?;
    // The daemon attaches it by itself; a second time is no harm.
    place.instance.ctl(&["attach", "data"])?;
    place.instance.backup_is("data", "incremental", None)?;
    place.mount()?;
    let detached = place.instance.ctl_ok(&["detach", "data", "--yes"])?;
    ensure!(
        detached.finished.stdout.contains("its bitmap is lost"),
        "{:?}",
        detached.finished
    );
    ensure!(
        folders_of(&place.instance.root().display().to_string()).is_empty(),
        "pins are left"
    );
    place.instance.ctl_ok(&["attach", "data"])?;
    let after = place.instance.backup("data", &[])?;
    ensure!(text_of(&after, "/kind")? == "full", "{after}");
    place
        .instance
        .ctl_ok(&["volume", "remove", "data", "--yes"])?;
    place.unmount()
}

/// req F4, X9: what a restore writes to a watched device is marked; into a mounted one nothing is restored.
#[test]
fn a_restore_onto_a_watched_device_is_seen() -> Result<()> {
    let mut place = Place::new("x09restore")?;
    put(&place.at().join("first"), "one")?;
    place.add()?;
    place.instance.backup("data", &[])?;
    let device = place.device();
    let restore = ["restore", "data@1", &device, "--overwrite", "--yes"];
    place.instance.ctl(&restore)?.exits(13)?;
    fill_file(&place.at().join("second"), 5 * MIB)?;
    place.unmount()?;
    place.instance.backup("data", &[])?;
    place.instance.ctl_ok(&restore)?;
    place.instance.backup_is("data", "incremental", None)?;
    let (one, three) = (place.instance.join("one"), place.instance.join("three"));
    place.instance.restore("data@1", &one, &[])?;
    place.instance.restore("data@3", &three, &[])?;
    same_bytes(&one, &three, 128 * MIB)?;
    place
        .instance
        .ctl_ok(&["volume", "remove", "data", "--yes"])?;
    Ok(())
}

/// req X9: `doctor` says what a device in use can have, and the line that it gives works.
#[test]
fn what_doctor_says_can_be_typed() -> Result<()> {
    let mut place = Place::new("x09doctor")?;
    let device = place.device();
    let told = place
        .instance
        .ctl_ok(&["doctor", &device, "--json"])?
        .json()?;
    ensure!(told["kernel"]["watch"] == true, "{told}");
    ensure!(text_of(&told, "/devices/0/auto")? == "watch", "{told}");
    ensure!(
        text_of(&told, "/devices/0/file_system")? == "ext4",
        "{told}"
    );
    ensure!(
        told["devices"][0]["modes"][2]["possible"] == false,
        "{told}"
    );
    let command = text_of(&told, "/commands/0")?;
    let mut words: Vec<&str> = command.split_whitespace().skip(1).collect();
    words.push("--yes");
    place.instance.ctl_ok(&words)?;
    ensure!(
        text_of(&place.instance.status("mnt")?, "/mode")? == "watch",
        "{command}"
    );
    let state = place.at().join("state").display().to_string();
    let other = [
        "volume",
        "add",
        "other",
        "--device",
        &device,
        "--mode",
        "auto",
        "--dry-run",
    ];
    let on_itself = place
        .instance
        .ctl_tool(&other)?
        .env("BLKTIDE_STATE_DIR", &state)
        .run()?;
    ensure!(on_itself.code != Some(0), "{on_itself:?}");
    let inside = place.at().join("repo").display().to_string();
    let repo = place
        .instance
        .ctl(&["repo", "init", "inside", &inside, "--json"])?;
    ensure!(
        repo.error_code()? == "repository_on_tracked_volume",
        "{:?}",
        repo.finished
    );
    place
        .instance
        .ctl_ok(&["volume", "remove", "mnt", "--yes"])?;
    let on_itself = place
        .instance
        .ctl_tool(&other)?
        .env("BLKTIDE_STATE_DIR", &state)
        .run()?;
    ensure!(
        on_itself.stderr.contains("lies on this volume"),
        "{on_itself:?}"
    );
    place.unmount()
}
