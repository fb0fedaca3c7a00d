//! The control socket of a real blktided: the interface file's methods, and clients that mean no good.
#![forbid(unsafe_code)]
#![cfg(test)]

use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A daemon with folders of its own; ended and cleaned away when dropped.
struct Daemon {
    child: Child,
    folder: PathBuf,
}

impl Daemon {
    fn start(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("blktide-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let place = |part: &str| folder.join(part).display().to_string();
        let text = format!(
            "runtime_dir = '{}'\nstate_dir = '{}'\ndevice_dir = '{}'\nvolumes_dir = '{}'\nrepositories_dir = '{}'\n",
            place("run"),
            place("state"),
            place("dev"),
            place("volumes.d"),
            place("repositories.d"),
        );
        let config = folder.join("blktide.toml");
        let mut file = std::fs::File::create(&config).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_blktided"))
            .arg("--config")
            .arg(&config)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("ready")),
            "blktided did not become ready"
        );
        // Its log is read to the end, so that it never waits for us.
        drop(std::thread::spawn(move || lines.count()));
        Self { child, folder }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.join("run/blktide.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    fn call(&self, method: &str, parameters: &Value) -> Value {
        let mut stream = self.connect();
        let request = json!({ "method": method, "parameters": parameters });
        send(&mut stream, request.to_string().as_bytes());
        receive(&mut stream).unwrap()
    }

    fn volumes_dir(&self) -> PathBuf {
        self.folder.join("volumes.d")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

fn send(stream: &mut UnixStream, message: &[u8]) {
    stream.write_all(message).unwrap();
    stream.write_all(&[0]).unwrap();
}

/// One message; `None` if the daemon closed the connection.
fn receive(stream: &mut UnixStream) -> Option<Value> {
    let mut message = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        if byte == [0] {
            return Some(serde_json::from_slice(&message).unwrap());
        }
        message.push(byte[0]);
    }
    None
}

fn code(answer: &Value) -> &str {
    answer["parameters"]["code"].as_str().unwrap_or_default()
}

/// Each method of the interface file is known, and nothing else is.
#[test]
fn the_interface_file_is_what_is_answered() {
    let daemon = Daemon::start("interface");
    let described = daemon.call("org.varlink.service.GetInterfaceDescription", &json!({}));
    let text = described["parameters"]["description"].as_str().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/api/io.blktide.varlink");
    assert_eq!(text, std::fs::read_to_string(path).unwrap());
    let methods: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("method "))
        .filter_map(|line| line.split('(').next())
        .collect();
    assert_eq!(methods.len(), 6);
    for method in methods {
        let answer = daemon.call(&format!("io.blktide.{method}"), &json!({"volume": "none"}));
        assert_ne!(
            answer["error"], "org.varlink.service.MethodNotFound",
            "{method}"
        );
    }
    let answer = daemon.call("io.blktide.Format", &json!({}));
    assert_eq!(answer["error"], "org.varlink.service.MethodNotFound");
    let jobs = daemon.call("io.blktide.Jobs", &json!({}));
    assert_eq!(jobs["parameters"]["pid"], daemon.child.id());
    assert_eq!(jobs["parameters"]["jobs"], json!([]));
}

#[test]
fn names_that_are_none_and_keys_that_are_unknown_are_refused() {
    let daemon = Daemon::start("names");
    for (parameters, wanted) in [
        (json!({"volume": "nosuch"}), "no_such_volume"),
        (json!({"volume": "../x"}), "usage"),
        (json!({"volume": "nosuch", "rate": 1}), "usage"),
        (json!({}), "usage"),
        (json!([1]), "usage"),
    ] {
        for method in ["Backup", "Cancel", "Attach", "Detach"] {
            let answer = daemon.call(&format!("io.blktide.{method}"), &parameters);
            assert_eq!(code(&answer), wanted, "{method} {parameters}: {answer}");
        }
    }
}

/// All or nothing: a broken file leaves what was in force, and the error names file and line.
#[test]
fn a_reload_is_all_or_nothing() {
    let daemon = Daemon::start("reload");
    let put = |text: &str| {
        std::fs::create_dir_all(daemon.volumes_dir()).unwrap();
        let mut file = std::fs::File::create(daemon.volumes_dir().join("data.toml")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    let reload = || daemon.call("io.blktide.Reload", &json!({}));
    let known = || code(&daemon.call("io.blktide.Cancel", &json!({"volume": "data"}))).to_owned();
    put("device = '/nonexistent'\nattach = 'manual'\n");
    assert_eq!(known(), "no_such_volume", "not before the reload");
    assert_eq!(reload()["error"], Value::Null);
    assert_eq!(known(), "");
    put("device = '/nonexistent'\nwhat = 1\n");
    let answer = reload();
    assert_eq!(code(&answer), "config_invalid");
    let message = answer["parameters"]["message"].as_str().unwrap();
    assert!(
        message.contains("data.toml:2: unknown field `what`"),
        "{message}"
    );
    assert_eq!(known(), "", "the old configuration stays");
    let attach = daemon.call("io.blktide.Attach", &json!({"volume": "data"}));
    assert_eq!(code(&attach), "attach_failed", "{attach}");
}

/// Huge, garbage, half and silent clients are answered or left, and never in another's way.
#[test]
fn hostile_clients_are_in_nobodys_way() {
    let daemon = Daemon::start("hostile");
    let silent: Vec<UnixStream> = (0..20).map(|_| daemon.connect()).collect();
    let mut half = daemon.connect();
    half.write_all(b"{\"method\":\"io.blk").unwrap();
    for garbage in [
        &b"\xff\xfe\x00"[..],
        b"null",
        b"[]",
        b"{\"method\":7}",
        b"{\"method\":\"io.blktide.Jobs\"",
        b"",
    ] {
        let mut stream = daemon.connect();
        send(&mut stream, garbage);
        let answer = receive(&mut stream).unwrap();
        assert_eq!(code(&answer), "usage", "{garbage:?}");
        assert!(
            receive(&mut stream).is_none(),
            "then the connection is closed"
        );
    }
    let mut huge = daemon.connect();
    let part = vec![b' '; 1 << 16];
    // It may be closed before all is written.
    while huge.write_all(&part).is_ok() {}
    let jobs = daemon.call("io.blktide.Jobs", &json!({}));
    assert_eq!(jobs["parameters"]["jobs"], json!([]));
    // Deep nesting must not exhaust a stack.
    let mut deep = daemon.connect();
    let nested = format!("{{\"method\":\"x\",\"parameters\":{}", "[".repeat(60_000));
    send(&mut deep, nested.as_bytes());
    assert_eq!(code(&receive(&mut deep).unwrap()), "usage");
    drop((silent, half));
}

/// Several requests on one connection; two daemons on one folder are one too many.
#[test]
fn one_connection_many_requests_and_one_daemon() {
    let daemon = Daemon::start("one");
    let mut stream = daemon.connect();
    for _ in 0..3 {
        send(&mut stream, b"{\"method\":\"io.blktide.Jobs\"}");
    }
    for _ in 0..3 {
        assert_eq!(receive(&mut stream).unwrap()["error"], Value::Null);
    }
    let second = Command::new(env!("CARGO_BIN_EXE_blktided"))
        .arg("--config")
        .arg(daemon.folder.join("blktide.toml"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another blktided runs"));
    assert_eq!(
        daemon.call("io.blktide.Jobs", &json!({}))["error"],
        Value::Null
    );
}
