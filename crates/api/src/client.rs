//! The blocking client of the control socket.

use crate::failure::{ErrorDocument, Failure, FailureCode};
use crate::wire::{self, Answer, Call, REPLY_BYTES_MAX};
use serde_json::Value;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for a connection or an ordinary reply.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A connection to blktided.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects. `limit`: the longest wait for one reply; `None`: as long as it takes.
    ///
    /// Errors: `daemon_unreachable`.
    pub fn connect(socket: &Path, limit: Option<Duration>) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket).map_err(|e| unreachable_at(socket, &e))?;
        stream
            .set_read_timeout(limit)
            .and_then(|()| stream.set_write_timeout(Some(LIMIT)))
            .map_err(|e| unreachable_at(socket, &e))?;
        Ok(Self {
            path: socket.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// Calls a method and returns its parameters.
    ///
    /// Errors: the daemon's failure, or `daemon_unreachable`, `timed_out`.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value, Failure> {
        self.call_more(method, parameters, false, &mut |_| ())
    }

    /// Calls a method that answers several times: `each` sees all replies but the last, which is returned.
    pub fn call_more(
        &mut self,
        method: &str,
        parameters: Value,
        more: bool,
        each: &mut dyn FnMut(Value),
    ) -> Result<Value, Failure> {
        let call = Call {
            method: format!("io.blktide.{method}"),
            parameters,
            more,
            oneway: false,
        };
        wire::send(self.stream.get_mut(), &call).map_err(|e| self.failed(&e))?;
        loop {
            let answer: Answer = wire::receive(&mut self.stream, REPLY_BYTES_MAX)
                .and_then(|a| a.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
                .map_err(|e| self.failed(&e))?;
            if let Some(name) = answer.error {
                return Err(failure_of(&name, answer.parameters));
            }
            if !answer.continues {
                return Ok(answer.parameters);
            }
            each(answer.parameters);
        }
    }

    fn failed(&self, error: &io::Error) -> Failure {
        if matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        ) {
            return Failure::new(FailureCode::TimedOut, "blktided did not answer in time")
                .hint("What was asked may still happen; see `blktidectl status`.");
        }
        unreachable_at(&self.path, error)
    }
}

fn unreachable_at(socket: &Path, error: &io::Error) -> Failure {
    let message = format!("blktided does not answer at {}: {error}", socket.display());
    let kind = error.kind();
    let hint = if kind == io::ErrorKind::PermissionDenied {
        "Run it as root."
    } else if kind == io::ErrorKind::NotFound || kind == io::ErrorKind::ConnectionRefused {
        "Start it: `systemctl start blktided`, or run `blktided` as root."
    } else {
        "See its log: `journalctl -u blktided`."
    };
    Failure::new(FailureCode::DaemonUnreachable, message).hint(hint)
}

fn failure_of(name: &str, parameters: Value) -> Failure {
    match serde_json::from_value::<ErrorDocument>(parameters) {
        Ok(document) if name == wire::FAILURE => document.into(),
        Ok(_) | Err(_) => Failure::new(
            FailureCode::Failed,
            format!("blktided refused the request: {name}"),
        )
        .hint("Are blktidectl and blktided of the same version?"),
    }
}
