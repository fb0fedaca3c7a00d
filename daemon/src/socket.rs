//! The control socket: connections, bounded in number, size and time.

use crate::daemon::Shared;
use crate::methods;
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::wire::{self, Answer, Call, REQUEST_BYTES_MAX};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// The longest that a connection may be silent, or take to send one request.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// The longest that a client may take to accept one reply.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Accepts for ever; returns when accepting fails for good.
pub(crate) async fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut failures = 0;
    while failures < 100 {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        failures = 0;
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            // Closed at once: who waits for a place would wait for a stranger.
            tracing::warn!("too many connections; one is turned away");
            continue;
        };
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let ended = Connection::new(stream).serve(&shared).await;
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection has ended");
            }
            drop(place);
        });
    }
}

/// One client.
pub(crate) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            received: Vec::new(),
        }
    }

    async fn serve(&mut self, shared: &Arc<Shared>) -> io::Result<()> {
        let peer = self.stream.peer_cred()?;
        loop {
            let call = match timeout(REQUEST_LIMIT, self.receive()).await {
                Ok(Ok(Some(call))) => call,
                Ok(Ok(None)) | Err(_) => return Ok(()),
                Ok(Err(error)) => {
                    let failure =
                        Failure::new(FailureCode::Usage, format!("the request is wrong: {error}"));
                    return self.send(&Answer::failure(&failure.document())).await;
                }
            };
            methods::answer(shared, self, (peer.uid(), peer.gid()), call).await?;
        }
    }

    /// One request; `None` at the end of the stream.
    async fn receive(&mut self) -> io::Result<Option<Call>> {
        loop {
            if let Some(end) = self.received.iter().position(|b| *b == 0) {
                let rest = self.received.split_off(end.saturating_add(1));
                let mut message = std::mem::replace(&mut self.received, rest);
                message.pop();
                return serde_json::from_slice(&message)
                    .map(Some)
                    .map_err(io::Error::from);
            }
            if self.received.len() >= REQUEST_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
            }
            let mut part = [0; 4096];
            let got = self.stream.read(&mut part).await?;
            if got == 0 {
                return if self.received.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
            self.received
                .extend_from_slice(part.get(..got).unwrap_or_default());
        }
    }

    /// Sends one reply. A client that does not take it in time is left.
    pub(crate) async fn send(&mut self, answer: &Answer) -> io::Result<()> {
        let bytes = wire::encode(answer)?;
        match timeout(REPLY_LIMIT, self.stream.write_all(&bytes)).await {
            Ok(sent) => sent,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
