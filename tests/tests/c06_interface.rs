//! Exit codes, JSON and the rescue system: what scripts rely on.
//! needs: root, loop, fuse
//! limit: 120 s
#![forbid(unsafe_code)]
#![cfg(test)]

use anyhow::{Context, Result, ensure};
use blktide_tests::{
    Instance, Stopwatch, Tool, binary, fill_file, number_at, put, same_bytes, text_of,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn keys(json: &Value, wanted: &str) -> Result<()> {
    let object = json.as_object().context("an object")?;
    for key in wanted.split_whitespace() {
        ensure!(object.contains_key(key), "no key {key}: {json}");
    }
    Ok(())
}

/// req X8, A17: documents have the keys that scripts read; facts are right.
#[test]
fn json_of_status_summary_images_and_show() -> Result<()> {
    let instance = Instance::started("c06json")?;
    let backing = instance.join("backing");
    fill_file(&backing, 8 * MIB)?;
    instance.repo_init("main")?;
    instance.volume_add("data", &backing, &[])?;
    let plan = instance
        .ctl_ok(&["backup", "data", "--dry-run", "--json"])?
        .json()?;
    ensure!(plan.to_string().contains("first-backup"), "{plan}");
    let summary = instance.backup("data", &[])?;
    keys(
        &summary,
        "message_type host repository volume image image_id kind reason consistency time \
         volume_bytes read_bytes changed_bytes stored_bytes longest_freeze_seconds \
         longest_wait_seconds seconds warnings",
    )?;
    ensure!(
        text_of(&summary, "/image")? == "data@1"
            && number_at(&summary, "/volume_bytes")? == 8 * MIB,
        "{summary}"
    );
    let whole = instance.ctl(&["status", "--json"])?.json()?;
    keys(&whole, "message_type daemon host volumes")?;
    let status = instance.status("data")?;
    keys(
        &status,
        "name state pid keeper_pid device mountpoint node mode size_bytes block_size_bytes tracking \
         distrust_reason distrust_time distrust_detail changed_bytes generation last_image \
         repositories job warnings",
    )?;
    ensure!(
        text_of(&status, "/tracking")? == "trusted" && text_of(&status, "/state")? == "attached",
        "{status}"
    );
    ensure!(text_of(&status, "/last_image")? == "data@1", "{status}");
    ensure!(
        text_of(&status, "/repositories/0/next_kind")? == "incremental",
        "{status}"
    );
    let images = instance.ctl_ok(&["images", "--json"])?.json()?;
    keys(
        images.pointer("/images/0").context("an image")?,
        "image image_id host repository volume kind reason time stored_bytes volume_bytes",
    )?;
    let show = instance
        .ctl_ok(&["show", "data@latest", "--json"])?
        .json()?;
    ensure!(show.to_string().contains("first-backup"), "{show}");
    let verify = instance
        .ctl_ok(&["verify", "data@1", "--read-data", "--json"])?
        .json()?;
    ensure!(
        verify["damage"] == serde_json::json!([]) && number_at(&verify, "/checked_bytes")? > 0,
        "{verify}"
    );
    Ok(())
}

/// req X8: each exit code that can be had here.
#[test]
fn exit_codes() -> Result<()> {
    let mut instance = Instance::started("c06exit")?;
    let backing = instance.join("backing");
    fill_file(&backing, 4 * MIB)?;
    instance.repo_init("main")?;
    instance.volume_add("data", &backing, &[])?;
    for words in [
        &["no-such-verb"][..],
        &["backup"],
        &["restore", "data@latest"],
        &["mount", "data@1", "/mnt"],
    ] {
        instance.ctl(words)?.exits(2)?;
    }
    for words in [
        &["show", "data@latest"][..],
        &["images", "-r", "/nonexistent"],
        &["show", "data@7"],
    ] {
        instance.ctl(words)?.exits(10)?;
    }
    let again = instance.repository("main").display().to_string();
    ensure!(
        instance
            .ctl(&["repo", "init", "other", &again])?
            .finished
            .code
            != Some(0),
        "made twice"
    );
    let target = instance.join("target");
    put(&target, "something")?;
    instance.backup("data", &[])?;
    instance
        .ctl(&["restore", "data@1", &target.display().to_string()])?
        .exits(13)?;
    instance.ctl(&["volume", "remove", "data"])?.exits(13)?;
    instance.end_daemon("TERM")?;
    instance.ctl(&["backup", "data"])?.exits(14)?;
    let watch = Stopwatch::start();
    let reply = instance.ctl(&["status", "--json"])?;
    ensure!(
        matches!(reply.finished.code, Some(3 | 14)),
        "{:?}",
        reply.finished
    );
    ensure!(
        watch.seconds() < 1.0,
        "status took {} s without a daemon",
        watch.seconds()
    );
    // Neither tracking nor I/O stopped with the daemon.
    ensure!(instance.node("data").exists(), "the node is gone");
    instance.start()?;
    instance.backup_is("data", "incremental", None)?;
    Ok(())
}

/// req A17: a rescue system has the repository and the program, nothing else.
#[test]
fn reading_needs_neither_daemon_nor_configuration() -> Result<()> {
    let instance = Instance::started("c06rescue")?;
    let backing = instance.join("backing");
    fill_file(&backing, 4 * MIB)?;
    let repository = instance.repo_init("main")?.display().to_string();
    instance.volume_add("data", &backing, &[])?;
    instance.backup("data", &[])?;
    let rescued = |words: &[&str]| -> Result<_> {
        Tool::new(binary("blktidectl")?)
            .args(words)
            .args(["-r", &repository])
            .env("BLKTIDE_CONFIG", "/nonexistent/blktide.toml")
            .env("BLKTIDE_RUNTIME_DIR", "/nonexistent/run")
            .run()?
            .ok()
    };
    let target = instance.join("rescued");
    ensure!(rescued(&["images"])?.stdout.contains("data@1"), "images");
    rescued(&["show", "data@1"])?;
    rescued(&["verify", "--read-data"])?;
    rescued(&["restore", "data@1", &target.display().to_string()])?;
    same_bytes(&backing, &target, 4 * MIB)
}

/// req A8: `flush` stores the bitmap of what is closed, and leaves what is open alone.
#[test]
fn flush_is_the_hook_before_a_shutdown() -> Result<()> {
    let mut instance = Instance::started("c06flush")?;
    let backing = instance.join("backing");
    fill_file(&backing, 4 * MIB)?;
    instance.volume_add("data", &backing, &[])?;
    instance.end_daemon("TERM")?;
    instance.ctl_ok(&["flush", "--all"])?;
    ensure!(
        instance.state_of("data").join("bitmap").exists(),
        "no bitmap file after flush"
    );
    Ok(())
}
