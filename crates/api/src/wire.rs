//! Varlink's wire form: JSON messages, each ended by a NUL byte.
//!
//! Invariant: no message longer than its bound is ever held in memory.

use crate::failure::ErrorDocument;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, BufRead, Write};

/// The interface file.
pub const INTERFACE: &str = include_str!("../io.blktide.varlink");

/// Longest request, bytes with its NUL.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// Longest reply.
pub const REPLY_BYTES_MAX: usize = 4 << 20;

/// The error that carries a failure.
pub const FAILURE: &str = "io.blktide.Failure";

/// A request.
#[expect(clippy::struct_excessive_bools, reason = "varlink's wire form")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// `io.blktide.Backup`.
    pub method: String,
    /// Its parameters: an object.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub parameters: Value,
    /// Several replies are wanted, the last without `continues`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// No reply is wanted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oneway: bool,
}

/// A reply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// What was asked for, or the error's facts.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub parameters: Value,
    /// More follow.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
    /// The error's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Answer {
    /// A reply with these parameters.
    pub fn with(parameters: Value, continues: bool) -> Self {
        Self {
            parameters,
            continues,
            error: None,
        }
    }

    /// A failure.
    pub fn failure(document: &ErrorDocument) -> Self {
        Self {
            parameters: serde_json::to_value(document).unwrap_or(Value::Null),
            continues: false,
            error: Some(FAILURE.to_owned()),
        }
    }

    /// One of varlink's own errors, such as `MethodNotFound`.
    pub fn service_error(name: &str, key: &str, value: &str) -> Self {
        Self {
            parameters: serde_json::json!({ key: value }),
            continues: false,
            error: Some(format!("org.varlink.service.{name}")),
        }
    }
}

/// Bytes of a message, its NUL included.
///
/// Errors: the value cannot be written as JSON (a map whose keys are no strings).
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    bytes.push(0);
    Ok(bytes)
}

/// Writes one message.
pub fn send<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    to.write_all(&encode(message)?)?;
    to.flush()
}

/// Reads one message of at most `limit` bytes; `None` at the end of the stream.
///
/// Errors: `InvalidData` for what is longer, cut off, or not such a message; the stream is then of no more use.
pub fn receive<T: for<'de> Deserialize<'de>>(
    from: &mut impl BufRead,
    limit: usize,
) -> io::Result<Option<T>> {
    let mut bytes = Vec::new();
    loop {
        let available = match from.fill_buf() {
            Ok(available) => available,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if available.is_empty() {
            return if bytes.is_empty() {
                Ok(None)
            } else {
                Err(invalid("the message is cut off"))
            };
        }
        let end = available.iter().position(|b| *b == 0);
        let part = available.get(..end.unwrap_or(available.len()));
        bytes.extend_from_slice(part.unwrap_or_default());
        let used = end.map_or(available.len(), |e| e.saturating_add(1));
        from.consume(used);
        if bytes.len() >= limit {
            return Err(invalid("the message is too long"));
        }
        if end.is_some() {
            return serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(io::Error::from);
        }
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    #[test]
    fn the_wire_is_varlinks() {
        let call = Call {
            method: "io.blktide.Cancel".to_owned(),
            parameters: serde_json::json!({"volume": "data"}),
            more: false,
            oneway: false,
        };
        let mut bytes = Vec::new();
        send(&mut bytes, &call).unwrap();
        assert_eq!(
            bytes,
            b"{\"method\":\"io.blktide.Cancel\",\"parameters\":{\"volume\":\"data\"}}\0"
        );
        let failure = crate::failure::Failure::new(crate::failure::FailureCode::Busy, "x");
        assert_eq!(
            encode(&Answer::failure(&failure.document())).unwrap(),
            b"{\"parameters\":{\"code\":\"busy\",\"exit\":1,\"hint\":\"\",\"message\":\"x\",\"message_type\":\"error\"},\"error\":\"io.blktide.Failure\"}\0"
        );
    }

    #[test]
    fn bounds_hold() {
        let long = vec![b' '; 1000];
        let read = receive::<Call>(&mut BufReader::new(&long[..]), 100);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let cut = receive::<Call>(&mut &b"{\"method\":"[..], 100);
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(receive::<Call>(&mut &b""[..], 100).unwrap().is_none());
    }

    proptest! {
        /// Garbage is an error or a message, never a panic.
        #[test]
        fn garbage_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(receive::<Call>(&mut &bytes[..], 128));
        }
    }
}
