//! Why bytes were refused.

/// Why bytes were refused. None of these is a reason to stop a volume.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// Not a file of this type, or its first bytes are gone.
    #[error("magic is {found:02x?}")]
    Magic {
        /// The bytes that were there.
        found: [u8; 8],
    },
    /// Written by a version that this program does not know.
    #[error("format version {found} is newer than {supported}")]
    Version {
        /// Version in the file.
        found: u16,
        /// Newest version that this program reads.
        supported: u16,
    },
    /// A feature that this program does not know is needed to read it.
    #[error("needs features {bits:#x} that this program does not know")]
    Feature {
        /// The unknown `incompat` bits.
        bits: u32,
    },
    /// A section that must be understood is not known.
    #[error("needs section {id}, which this program does not know")]
    Section {
        /// Number of the section.
        id: u16,
    },
    /// Cut off, or longer than it says.
    #[error("{have} bytes where {need} are needed")]
    Length {
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        have: u64,
    },
    /// Damaged.
    #[error("checksum is {found:#018x}, computed {computed:#018x}")]
    Checksum {
        /// Checksum in the file.
        found: u64,
        /// Checksum of the bytes.
        computed: u64,
    },
    /// Whole, but not the object that was asked for: misplaced, swapped or of another volume.
    #[error("it belongs elsewhere: its {field} is another")]
    Identity {
        /// Which identity differs.
        field: &'static str,
    },
    /// A field holds what no writer puts there.
    #[error("field {field} holds {value}, which cannot be")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What it holds; `u64::MAX` if that is no number.
        value: u64,
    },
}
