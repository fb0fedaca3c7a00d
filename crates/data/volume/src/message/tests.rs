//! The messages as they are on the wire, by hand; and what is no message.

use super::*;
use crate::transport::{self, Incoming};
use blktide_sys::socket::PacketSocket;

/// One of each kind: the text was written by hand, not by the encoder.
#[test]
fn requests_are_these_texts() {
    let id = "00112233445566778899aabbccddeeff";
    let generation = || Text(id.parse::<GenerationName>().unwrap());
    let cases = [
        (Request::Status, r#"{"verb":"status"}"#.to_owned()),
        (Request::Detach, r#"{"verb":"detach"}"#.to_owned()),
        (Request::Adopt, r#"{"verb":"adopt"}"#.to_owned()),
        (
            Request::ChangedSince {
                generations: vec![generation()],
            },
            format!(r#"{{"verb":"changed_since","generations":["{id}"]}}"#),
        ),
        (
            Request::Hints {
                hints: vec![Hint {
                    repository: Text(id.parse().unwrap()),
                    generation: generation(),
                }],
            },
            format!(r#"{{"verb":"hints","hints":[{{"repository":"{id}","generation":"{id}"}}]}}"#),
        ),
        (
            Request::SnapshotBegin(SnapshotRequest {
                base: Some(generation()),
                absent: Absent::Listed,
                save_area: SaveArea::Memory { limit_bytes: 7 },
                overflow: Overflow::GiveUp,
                wait_limit_ms: 5000,
                hold_deadline_ms: 500,
            }),
            format!(
                r#"{{"verb":"snapshot_begin","base":"{id}","absent":"listed",{}}}"#,
                r#""save_area":{"memory":{"limit_bytes":7}},"overflow":"give-up","wait_limit_ms":5000,"hold_deadline_ms":500"#
            ),
        ),
        (
            Request::Unreadable { first: 3, count: 2 },
            r#"{"verb":"unreadable","first":3,"count":2}"#.to_owned(),
        ),
    ];
    for (request, text) in cases {
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}

#[test]
fn replies_are_these_texts() {
    let refused = Reply::Error {
        kind: Refusal::SnapshotExists,
        message: "no".to_owned(),
    };
    let text = r#"{"reply":"error","kind":"snapshot-exists","message":"no"}"#;
    assert_eq!(serde_json::to_string(&refused).unwrap(), text);
    assert_eq!(serde_json::from_str::<Reply>(text).unwrap(), refused);
    assert_eq!(
        serde_json::to_string(&Reply::Done).unwrap(),
        r#"{"reply":"done"}"#
    );
}

#[test]
fn what_is_no_message_is_garbage() {
    for text in [
        "",
        "{}",
        "status",
        r#"{"verb":"format"}"#,
        r#"{"verb":"status"} x"#,
        r#"{"verb":"changed_since","generations":["xyz"]}"#,
        r#"{"verb":"unreadable","first":-1,"count":2}"#,
        r#"{"verb":"hints","hints":[],"more":1}"#,
    ] {
        assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
    }
}

#[test]
fn a_packet_of_anything_does_not_end_the_connection() {
    let (client, server) = PacketSocket::pair().unwrap();
    client.send(&vec![0xff; 40_000], &[]).unwrap();
    client.send(b"{\"verb\":\"status\"}", &[]).unwrap();
    let first = transport::receive::<Request>(&server).unwrap();
    assert!(matches!(first, Incoming::Garbage));
    let second = transport::receive::<Request>(&server).unwrap();
    assert!(matches!(second, Incoming::Message(Request::Status, none) if none.is_empty()));
    drop(client);
    let third = transport::receive::<Request>(&server).unwrap();
    assert!(matches!(third, Incoming::Closed));
}
