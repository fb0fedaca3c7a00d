//! Identities: 128 random bits, one type for each kind of thing, never mixed.

use core::fmt;
use core::str::FromStr;

/// Text that is not 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAnId;

impl fmt::Display for NotAnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an id is 32 hexadecimal digits")
    }
}

impl std::error::Error for NotAnId {}

macro_rules! ids {
    ($($(#[doc = $doc:literal])+ $name:ident;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The id of nothing: all zero. Never drawn.
            pub const NONE: Self = Self([0; 16]);

            /// Whether this is [`Self::NONE`].
            pub fn is_none(&self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;
            fn from_str(text: &str) -> Result<Self, NotAnId> {
                parse(text).map(Self)
            }
        }
    )+};
}

ids! {
    /// A volume, for as long as its data are the same volume.
    VolumeId;
    /// A machine.
    HostId;
    /// A repository.
    RepositoryId;
    /// An image.
    ImageId;
    /// One run of a backup: what its claim and its packs bear.
    SessionId;
    /// An object of a repository; a pack is its session's first 12 bytes and a counter.
    ObjectId;
    /// A generation of the tracker (P2): drawn when it opens, never reused.
    GenerationName;
    /// A snapshot of a volume.
    SnapshotId;
    /// One life of a bitmap: from attach to clean stop (P4).
    LifeId;
    /// The kernel's id of this boot.
    BootId;
    /// Which key digests are taken with (P11).
    DigestDomainId;
}

/// A BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// All zero: the digest of nothing.
    pub const NONE: Self = Self([0; 32]);
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

fn parse(text: &str) -> Result<[u8; 16], NotAnId> {
    let mut out = [0; 16];
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return Err(NotAnId);
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                b'A'..=b'F' => digit - b'A' + 10,
                _ => return Err(NotAnId),
            };
            *byte = (*byte << 4) | value;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let id = VolumeId(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233343536373839616263646566");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("3031".parse::<VolumeId>(), Err(NotAnId));
        assert_eq!("g".repeat(32).parse::<VolumeId>(), Err(NotAnId));
    }
}
