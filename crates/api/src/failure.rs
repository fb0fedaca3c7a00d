//! What went wrong, for people and for scripts: a closed list of codes, each with its exit code.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Exit codes of `blktidectl`: the interface's closed list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Wrong usage, wrong configuration, or not built yet.
    Usage = 2,
    /// Done, with warnings; `status`: something wants you.
    Warnings = 3,
    /// Damage, or a missed change, was found.
    Damage = 5,
    /// No such repository or image.
    NotFound = 10,
    /// Another session's claim is in the way.
    Claimed = 11,
    /// Wrong key.
    WrongKey = 12,
    /// Refused for safety.
    Refused = 13,
    /// The daemon cannot be reached.
    DaemonUnreachable = 14,
    /// No space.
    NoSpace = 15,
    /// Interrupted.
    Interrupted = 130,
}

impl Exit {
    /// The number that the process returns.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The exit code of a number from a message; [`Exit::Failed`] for what is not in the list.
    pub fn from_number(number: u8) -> Self {
        [
            Self::Done,
            Self::Usage,
            Self::Warnings,
            Self::Damage,
            Self::NotFound,
            Self::Claimed,
            Self::WrongKey,
            Self::Refused,
            Self::DaemonUnreachable,
            Self::NoSpace,
            Self::Interrupted,
        ]
        .into_iter()
        .find(|e| e.number() == number)
        .unwrap_or(Self::Failed)
    }
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $exit:ident;)+) => {
        /// What went wrong: the closed list of `code` in error messages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum FailureCode { $($(#[doc = $doc])+ $name,)+ }

        impl FailureCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The word of the interface.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// The exit code that goes with it.
            pub const fn exit(self) -> Exit {
                match self { $(Self::$name => Exit::$exit,)+ }
            }
        }
    };
}

codes! {
    /// Something that has no code of its own.
    Failed = "failed", Failed;
    /// The command line, or a request, is wrong.
    Usage = "usage", Usage;
    /// In the interface, and not built yet.
    NotBuiltYet = "not_built_yet", Usage;
    /// The configuration is wrong; the message names file and line.
    ConfigInvalid = "config_invalid", Usage;
    /// No volume of that name is configured.
    NoSuchVolume = "no_such_volume", Usage;
    /// The caller may not do that.
    NotPermitted = "not_permitted", Failed;
    /// The volume is not attached.
    NotAttached = "not_attached", Failed;
    /// The volume is attached already, or the name is taken.
    AlreadyThere = "already_there", Failed;
    /// The volume could not be attached.
    AttachFailed = "attach_failed", Failed;
    /// The snapshot ended before the backup had read all it wanted.
    SnapshotRevoked = "snapshot-revoked", Failed;
    /// Writers did not let go within the hold's deadline, several times.
    Busy = "busy", Failed;
    /// The repository has no space left.
    RepositoryFull = "repository-full", NoSpace;
    /// The repository does not answer, or answers with an error.
    RepositoryUnreachable = "repository-unreachable", Failed;
    /// It was cancelled.
    Cancelled = "cancelled", Interrupted;
    /// No space for something that is not the repository.
    NoSpace = "no_space", NoSpace;
    /// Damage was found.
    DamageFound = "damage_found", Damage;
    /// No repository there, or none of that name.
    NoSuchRepository = "no_such_repository", NotFound;
    /// No such image.
    NoSuchImage = "no_such_image", NotFound;
    /// Another session's claim is in the way.
    ClaimInTheWay = "claim_in_the_way", Claimed;
    /// Wrong key.
    WrongKey = "wrong_key", WrongKey;
    /// It asks first, and there is neither a terminal nor `--yes`.
    ConfirmationNeeded = "confirmation_needed", Refused;
    /// The person said no.
    NotConfirmed = "not_confirmed", Refused;
    /// The target is mounted.
    TargetMounted = "target_mounted", Refused;
    /// The target is in use by something else.
    TargetInUse = "target_in_use", Refused;
    /// The target is smaller than the image.
    TargetTooSmall = "target_too_small", Refused;
    /// The target holds something.
    TargetNotEmpty = "target_not_empty", Refused;
    /// The target's sectors are larger than the image's.
    TargetSectorSize = "target_sector_size", Refused;
    /// The target is something that is never restored to.
    TargetRefused = "target_refused", Refused;
    /// The volume's node is open.
    VolumeOpen = "volume_open", Refused;
    /// The device is in use.
    DeviceInUse = "device_in_use", Refused;
    /// The device is of a kind that is not tracked.
    DeviceRefused = "device_refused", Refused;
    /// The mode cannot be had for this device.
    ModeRefused = "mode_refused", Refused;
    /// The repository would lie on a tracked volume.
    RepositoryOnTrackedVolume = "repository_on_tracked_volume", Refused;
    /// The repository's path is a mount point of fstab with nothing mounted.
    RepositoryNotMounted = "repository_not_mounted", Refused;
    /// The name fits images in two repositories.
    ImageAmbiguous = "image_ambiguous", Refused;
    /// The backup would leave less than `min_free` in the repository.
    BelowMinFree = "below_min_free", NoSpace;
    /// The daemon cannot be reached.
    DaemonUnreachable = "daemon_unreachable", DaemonUnreachable;
    /// The daemon, or a volume, did not answer in time.
    TimedOut = "timed_out", Failed;
    /// Ctrl-C, SIGTERM.
    Interrupted = "interrupted", Interrupted;
}

impl FailureCode {
    /// The code of a word; `None` for words of a later version.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.code() == code)
    }
}

impl fmt::Display for FailureCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A failure as it is told: on the socket, as JSON, and on standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which one.
    pub code: FailureCode,
    /// What happened, one sentence, no full stop needed.
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: String::new(),
        }
    }

    /// The same, with what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The exit code.
    pub const fn exit(&self) -> Exit {
        self.code.exit()
    }

    /// As the interface's error document.
    pub fn document(&self) -> ErrorDocument {
        ErrorDocument {
            message_type: "error".to_owned(),
            code: self.code.code().to_owned(),
            message: self.message.clone(),
            hint: self.hint.clone(),
            exit: self.exit().number(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<ErrorDocument> for Failure {
    fn from(document: ErrorDocument) -> Self {
        Self {
            code: FailureCode::from_code(&document.code).unwrap_or(FailureCode::Failed),
            message: document.message,
            hint: document.hint,
        }
    }
}

/// `{"message_type":"error",…}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDocument {
    /// `error`.
    pub message_type: String,
    /// See [`FailureCode`].
    pub code: String,
    /// What happened.
    pub message: String,
    /// What to do next.
    #[serde(default)]
    pub hint: String,
    /// The exit code.
    pub exit: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_lead_back_and_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        for code in FailureCode::ALL {
            assert_eq!(FailureCode::from_code(code.code()), Some(*code));
            assert!(seen.insert(code.code()));
            assert_eq!(Exit::from_number(code.exit().number()), code.exit());
        }
    }

    /// The interface's example, word for word.
    #[test]
    fn the_error_document_is_the_interfaces() {
        let failure = Failure::new(FailureCode::TargetMounted, "…").hint("…");
        assert_eq!(
            serde_json::to_string(&failure.document()).unwrap(),
            r#"{"message_type":"error","code":"target_mounted","message":"…","hint":"…","exit":13}"#
        );
    }
}
