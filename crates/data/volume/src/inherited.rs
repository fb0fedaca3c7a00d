//! What a server inherits from its keeper, and a new keeper gets from a living server: one list of descriptors.
//!
//! ```text
//! keeper ── numbers 3, 4, … over exec ──▶ server
//! server ── one message of the volume socket (`Adopted`) ──▶ new keeper
//! ```
//! **Invariant**: the order of [`Inherited::descriptors`] is that of the numbers from [`FIRST_NUMBER`] on. It crosses
//! builds: append only. The fenced descriptor of the backing device is never among them (P6).

use crate::error::VolumeError;
use crate::options::VolumeOptions;
use blktide_sys::fuse::FuseDevice;
use blktide_sys::memfd::Memfd;
use blktide_sys::process::{PidFd, inherited_descriptor};
use blktide_sys::socket::PacketListener;
use blktide_sys::spawn::Program;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// Number of the first descriptor in a server.
pub const FIRST_NUMBER: RawFd = 3;
/// Descriptors in all.
pub const COUNT: usize = 8;
/// Bytes of the longest options.
const OPTIONS_BYTES_MAX: usize = 64 << 10;

/// What a server is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first of an attach: it takes the bitmap file over (P4).
    First,
    /// The next one after a death: it finishes what stands in the slots.
    Successor,
    /// The same with tracking off: servers keep dying.
    PassThrough,
}

impl Role {
    /// The word in the server's arguments.
    pub const fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Successor => "successor",
            Self::PassThrough => "pass-through",
        }
    }

    /// The role of a word.
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::First, Self::Successor, Self::PassThrough]
            .into_iter()
            .find(|r| r.word() == word)
    }
}

/// The descriptors that keeper and server share.
#[derive(Debug)]
pub struct Inherited {
    /// The control memory.
    pub control: Memfd,
    /// The banks' memory.
    pub banks: Memfd,
    /// The slots' memory.
    pub slots: Memfd,
    /// The FUSE connection.
    pub fuse: FuseDevice,
    /// The volume socket.
    pub listener: PacketListener,
    /// The program that servers are started from.
    pub program: Program,
    /// The volume's options, as JSON in memory.
    pub options: Memfd,
    /// The other process: the keeper, in a server; the server, in a keeper.
    pub other: PidFd,
}

impl Inherited {
    /// Takes the descriptors that the keeper has put at their numbers. Once, first thing in `main`.
    pub fn take() -> Result<Self, VolumeError> {
        let numbers = (FIRST_NUMBER..).take(COUNT);
        let descriptors: io::Result<Vec<OwnedFd>> = numbers.map(inherited_descriptor).collect();
        Self::from_descriptors(descriptors.map_err(|e| failed("inherit", e))?)
    }

    /// The list that came beside `Adopted`.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Result<Self, VolumeError> {
        let count = descriptors.len();
        let list: Result<[OwnedFd; COUNT], _> = descriptors.try_into();
        let Ok(
            [
                control,
                banks,
                slots,
                fuse,
                listener,
                program,
                options,
                other,
            ],
        ) = list
        else {
            return Err(VolumeError::Layout {
                why: format!("{count} descriptors instead of {COUNT}"),
            });
        };
        let sys = |e| failed("inherit", io::Error::other(e));
        Ok(Self {
            control: Memfd::from_fd(control).map_err(sys)?,
            banks: Memfd::from_fd(banks).map_err(sys)?,
            slots: Memfd::from_fd(slots).map_err(sys)?,
            fuse: FuseDevice::from_fd(fuse),
            listener: PacketListener::from_fd(listener),
            program: Program::from_fd(program).map_err(sys)?,
            options: Memfd::from_fd(options).map_err(sys)?,
            other: PidFd::from_fd(other).map_err(sys)?,
        })
    }

    /// The list, in the order of the numbers; `other` in the last place.
    pub fn descriptors<'a>(&'a self, other: &'a PidFd) -> [BorrowedFd<'a>; COUNT] {
        [
            self.control.as_fd(),
            self.banks.as_fd(),
            self.slots.as_fd(),
            self.fuse.as_fd(),
            self.listener.as_fd(),
            self.program.as_descriptor(),
            self.options.as_fd(),
            other.as_fd(),
        ]
    }

    /// The volume's options.
    pub fn read_options(&self) -> Result<VolumeOptions, VolumeError> {
        let len = usize::try_from(self.options.bytes()).unwrap_or(usize::MAX);
        if len > OPTIONS_BYTES_MAX {
            return Err(VolumeError::Layout {
                why: "the options are too long".to_owned(),
            });
        }
        let mut text = vec![0; len];
        let got = self
            .options
            .read_at(0, &mut text)
            .map_err(|e| failed("read the options of", e))?;
        text.truncate(got);
        serde_json::from_slice(&text).map_err(|e| VolumeError::Layout { why: e.to_string() })
    }
}

/// Options as memory, for [`Inherited::options`].
pub fn options_in_memory(options: &VolumeOptions) -> Result<Memfd, VolumeError> {
    let fail = |e| failed("store the options of", e);
    let text = serde_json::to_vec(options).map_err(|e| fail(io::Error::other(e)))?;
    let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let memory = Memfd::create("blktide-options", bytes).map_err(|e| fail(io::Error::other(e)))?;
    memory.write_at(0, &text).map_err(fail)?;
    Ok(memory)
}

fn failed(what: &'static str, source: io::Error) -> VolumeError {
    VolumeError::Io {
        what,
        path: std::path::PathBuf::from("the volume's descriptors"),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Inherited {
        let memory = || Memfd::create("blktide-test", 4096).unwrap();
        let path = std::env::temp_dir().join(format!("blktide-inherited-{}", std::process::id()));
        let listener = PacketListener::bind(&path, 0o600).unwrap();
        std::fs::remove_file(&path).unwrap();
        Inherited {
            control: memory(),
            banks: memory(),
            slots: memory(),
            fuse: FuseDevice::from_fd(std::fs::File::open("/dev/null").unwrap().into()),
            listener,
            program: Program::this().unwrap(),
            options: options_in_memory(&VolumeOptions::new("data", "/dev/null")).unwrap(),
            other: PidFd::of_self().unwrap(),
        }
    }

    #[test]
    fn the_list_leads_back() {
        let list = some();
        list.banks.write_at(0, b"banks").unwrap();
        let own = PidFd::of_self().unwrap();
        let copies = list
            .descriptors(&own)
            .map(|fd| fd.try_clone_to_owned().unwrap());
        let back = Inherited::from_descriptors(copies.into()).unwrap();
        let mut out = [0; 5];
        back.banks.read_at(0, &mut out).unwrap();
        assert_eq!(&out, b"banks");
        assert!(back.program.is_in_memory());
        assert_eq!(back.other.pid(), own.pid());
        assert_eq!(
            back.read_options().unwrap(),
            VolumeOptions::new("data", "/dev/null")
        );
    }

    #[test]
    fn another_number_of_descriptors_is_refused() {
        let one = std::fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(
            Inherited::from_descriptors(vec![one]),
            Err(VolumeError::Layout { .. })
        ));
    }

    #[test]
    fn roles_lead_back() {
        for role in [Role::First, Role::Successor, Role::PassThrough] {
            assert_eq!(Role::of_word(role.word()), Some(role));
        }
        assert_eq!(Role::of_word(""), None);
    }
}
