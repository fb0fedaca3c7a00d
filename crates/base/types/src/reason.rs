//! Why a backup is not incremental: the closed list of the interface.

use core::fmt;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $code:literal;)+) => {
        /// Why a backup is not incremental, or a bitmap not believed. The numbers are stored: never reuse one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The word of the interface: `bitmap-stale`.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// The number that is stored; 0 stands for 'no reason'.
            pub const fn number(self) -> u8 {
                match self { $(Self::$name => $number,)+ }
            }

            /// The reason of a stored number; `None` for 0 and for numbers of a later version.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }

            /// The reason of a word.
            pub fn from_code(code: &str) -> Option<Self> {
                match code { $($code => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// No image of this volume in this repository yet.
    FirstBackup = 1, "first-backup";
    /// `--full`.
    Asked = 2, "asked";
    /// No bitmap file, or no marker, where a clean stop would have left one.
    BitmapMissing = 3, "bitmap-missing";
    /// The bitmap file or the marker fails its checks.
    BitmapDamaged = 4, "bitmap-damaged";
    /// The bitmap file is another volume's.
    BitmapOtherVolume = 5, "bitmap-other-volume";
    /// The bitmap file counts other blocks: size, grain or block size differ.
    BitmapOtherSize = 6, "bitmap-other-size";
    /// The bitmap is of another life, or does not know the base image's generation.
    BitmapStale = 7, "bitmap-stale";
    /// The machine went down without a clean stop.
    UncleanShutdown = 8, "unclean-shutdown";
    /// Written while the tracker was away.
    ForeignWrite = 9, "foreign-write";
    /// Nothing on this volume could show a write while the tracker was away.
    ForeignWriteUnknown = 10, "foreign-write-unknown";
    /// Another machine backs up the same volume into this repository.
    CloneDetected = 11, "clone-detected";
    /// Another device than at the last image.
    DeviceChanged = 12, "device-changed";
    /// Another size than at the last image.
    Resized = 13, "resized";
    /// Tracking had a gap: attach failed, passed through, processes died.
    TrackingInterrupted = 14, "tracking-interrupted";
    /// A canary or an audit found a missed change.
    TrackerSuspect = 15, "tracker-suspect";
    /// The last image, or something it needs, is gone from the repository.
    BaseImageGone = 16, "base-image-gone";
    /// The image's block size was changed.
    BlockSizeChanged = 17, "block-size-changed";
    /// The last writes before the boot could not be seen.
    BootNotCovered = 18, "boot-not-covered";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_codes_lead_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_number(reason.number()), Some(*reason));
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
        }
        assert_eq!(Reason::from_number(0), None);
        assert_eq!(Reason::ALL.len(), 18);
    }
}
