//! What asker and guard say to each other: four words of 64 bits, little end first.
//!
//! ```text
//!   kind │ number of the freeze │ a time in ns, or bits │ by: 32 bits, errno: 32 bits
//! ```
//! Invariant: neither direction takes memory. What does not decode is not answered.

use blktide_sys::Errno;
use std::time::Duration;

/// Bytes of each message.
pub(super) const MESSAGE_BYTES: usize = 32;

/// What the asker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Freeze, and thaw after `limit` at the latest.
    Freeze {
        /// Of this freeze.
        number: u64,
        /// From the end of the call.
        limit: Duration,
    },
    /// Thaw that one; of another one it means nothing.
    Thaw {
        /// Of the freeze.
        number: u64,
    },
}

/// What the guard says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It waits for requests.
    Ready {
        /// A bit for each way of hardening that was refused.
        refused: u64,
    },
    /// It is frozen.
    Frozen {
        /// Which freeze.
        number: u64,
        /// How long the call took.
        call: Duration,
    },
    /// It is not frozen.
    Failed {
        /// Which freeze.
        number: u64,
        /// The kernel's word.
        errno: Errno,
    },
    /// The freeze is over.
    Thawed(Over),
}

/// How a freeze ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over {
    /// Which.
    pub(super) number: u64,
    /// How long it lasted.
    pub(super) frozen: Duration,
    /// What ended it.
    pub(super) by: By,
    /// The kernel's word, if thawing failed.
    pub(super) error: Option<Errno>,
}

/// What ended a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The asker.
    Asked,
    /// Its limit.
    Limit,
    /// The end of the asker.
    End,
    /// A fault of the guard, or a message that it does not understand.
    Fault,
}

impl By {
    const ALL: [Self; 4] = [Self::Asked, Self::Limit, Self::End, Self::Fault];

    const fn word(self) -> u32 {
        match self {
            Self::Asked => 1,
            Self::Limit => 2,
            Self::End => 3,
            Self::Fault => 4,
        }
    }
}

const FREEZE: u64 = 1;
const THAW: u64 = 2;
const READY: u64 = 16;
const FROZEN: u64 = 17;
const FAILED: u64 = 18;
const THAWED: u64 = 19;

impl Request {
    /// As bytes.
    pub(super) fn encode(self) -> [u8; MESSAGE_BYTES] {
        bytes(match self {
            Self::Freeze { number, limit } => [FREEZE, number, nanos(limit), 0],
            Self::Thaw { number } => [THAW, number, 0, 0],
        })
    }

    /// From bytes.
    pub(super) fn decode(bytes: Option<&[u8]>) -> Option<Self> {
        match words(bytes?)? {
            [FREEZE, number, limit, 0] => Some(Self::Freeze {
                number,
                limit: Duration::from_nanos(limit),
            }),
            [THAW, number, 0, 0] => Some(Self::Thaw { number }),
            _ => None,
        }
    }
}

impl Reply {
    /// As bytes.
    pub(super) fn encode(self) -> [u8; MESSAGE_BYTES] {
        bytes(match self {
            Self::Ready { refused } => [READY, 0, refused, 0],
            Self::Frozen { number, call } => [FROZEN, number, nanos(call), 0],
            Self::Failed { number, errno } => [FAILED, number, 0, pair(0, Some(errno))],
            Self::Thawed(over) => {
                let how = pair(over.by.word(), over.error);
                [THAWED, over.number, nanos(over.frozen), how]
            }
        })
    }

    /// From bytes.
    pub(super) fn decode(bytes: Option<&[u8]>) -> Option<Self> {
        match words(bytes?)? {
            [READY, 0, refused, 0] => Some(Self::Ready { refused }),
            [FROZEN, number, call, 0] => Some(Self::Frozen {
                number,
                call: Duration::from_nanos(call),
            }),
            [FAILED, number, 0, how] => Some(Self::Failed {
                number,
                errno: error_of(how)?,
            }),
            [THAWED, number, frozen, how] => Some(Self::Thawed(Over {
                number,
                frozen: Duration::from_nanos(frozen),
                by: By::ALL
                    .into_iter()
                    .find(|by| u64::from(by.word()) == how & u64::from(u32::MAX))?,
                error: error_of(how),
            })),
            _ => None,
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn pair(low: u32, errno: Option<Errno>) -> u64 {
    let number = errno.map_or(0, |e| u64::from(e.0.unsigned_abs()));
    u64::from(low) | number << 32
}

fn error_of(how: u64) -> Option<Errno> {
    let number = i32::try_from(how >> 32).ok()?;
    (number != 0).then_some(Errno(number))
}

fn bytes(words: [u64; 4]) -> [u8; MESSAGE_BYTES] {
    let mut out = [0; MESSAGE_BYTES];
    for (to, word) in out.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    out
}

fn words(bytes: &[u8]) -> Option<[u64; 4]> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    let all: [[u8; 8]; 4] = chunks.try_into().ok()?;
    rest.is_empty().then(|| all.map(u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let limit = Duration::from_millis(100);
        for said in [
            Request::Freeze { number: 7, limit },
            Request::Thaw { number: 8 },
        ] {
            assert_eq!(Request::decode(Some(&said.encode())), Some(said));
            assert_eq!(Reply::decode(Some(&said.encode())), None);
        }
        let over = |by, error| {
            Reply::Thawed(Over {
                number: 3,
                frozen: limit,
                by,
                error,
            })
        };
        for said in [
            Reply::Ready { refused: 5 },
            Reply::Frozen {
                number: 1,
                call: limit,
            },
            Reply::Failed {
                number: 2,
                errno: Errno::BUSY,
            },
            over(By::Asked, None),
            over(By::Limit, Some(Errno::INVAL)),
            over(By::End, None),
            over(By::Fault, Some(Errno::IO)),
        ] {
            assert_eq!(Reply::decode(Some(&said.encode())), Some(said));
            assert_eq!(Request::decode(Some(&said.encode())), None);
        }
    }

    #[test]
    fn what_is_cut_or_unknown_means_nothing() {
        let whole = Request::Thaw { number: 1 }.encode();
        assert_eq!(Request::decode(whole.get(..31)), None);
        assert_eq!(Request::decode(Some(&[])), None);
        assert_eq!(Request::decode(Some(&[0xff; MESSAGE_BYTES])), None);
        assert_eq!(Reply::decode(Some(&bytes([THAWED, 1, 1, 9]))), None);
        assert_eq!(Reply::decode(Some(&bytes([FAILED, 1, 0, 0]))), None);
    }
}
