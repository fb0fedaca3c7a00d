//! What a server inherits from its keeper, and a new keeper gets from a living server: one list of descriptors.
//!
//! ```text
//! keeper ── numbers 3, 4, … over exec ──▶ server
//! server ── beside `Adopted` ──▶ new keeper
//! ```
//! **Invariant**: the order of [`Inherited::descriptors`] is that of the numbers from [`FIRST_NUMBER`] on. It crosses
//! builds: append only. The fenced descriptor of the backing device is never among them (P6).

use blktide_sys::fuse::FuseDevice;
use blktide_sys::memfd::Memfd;
use blktide_sys::process::{PidFd, inherited_descriptor};
use blktide_sys::socket::PacketListener;
use blktide_sys::spawn::Program;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// Number of the first descriptor in a server.
pub(crate) const FIRST_NUMBER: RawFd = 3;
/// Descriptors in all.
pub(crate) const COUNT: usize = 9;
/// Bytes of the longest options.
const OPTIONS_BYTES_MAX: usize = 64 << 10;

/// The descriptors that keeper and server share.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The control memory.
    pub(crate) control: OwnedFd,
    /// The banks' memory.
    pub(crate) banks: OwnedFd,
    /// The slots' memory.
    pub(crate) slots: OwnedFd,
    /// The FUSE connection.
    pub(crate) fuse: FuseDevice,
    /// The volume socket.
    pub(crate) listener: PacketListener,
    /// The program that servers are started from.
    pub(crate) program: Program,
    /// What a server is told at its start, as JSON in memory: a server opens no configuration (P7).
    pub(crate) options: OwnedFd,
    /// The other process: the keeper, in a server; the server, in a keeper.
    pub(crate) other: PidFd,
    /// Where the backing device is (`O_PATH`): a successor finds the same one, whatever its path leads to by then.
    pub(crate) place: OwnedFd,
}

impl Inherited {
    /// Takes the descriptors that the keeper has put at their numbers. Once, first thing in `main`.
    pub(crate) fn take() -> io::Result<Self> {
        let numbers = (FIRST_NUMBER..).take(COUNT);
        let descriptors: io::Result<Vec<OwnedFd>> = numbers.map(inherited_descriptor).collect();
        Self::from_descriptors(descriptors?)
    }

    /// The list that came beside `Adopted`.
    pub(crate) fn from_descriptors(descriptors: Vec<OwnedFd>) -> io::Result<Self> {
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
                place,
            ],
        ) = list
        else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "another number of descriptors",
            ));
        };
        Ok(Self {
            control,
            banks,
            slots,
            fuse: FuseDevice::from_fd(fuse),
            listener: PacketListener::from_fd(listener),
            program: Program::from_fd(program).map_err(io::Error::other)?,
            options,
            other: PidFd::from_fd(other).map_err(io::Error::other)?,
            place,
        })
    }

    /// The list, in the order of the numbers; `other` is who hands it on.
    pub(crate) fn descriptors<'a>(&'a self, other: &'a PidFd) -> [BorrowedFd<'a>; COUNT] {
        [
            self.control.as_fd(),
            self.banks.as_fd(),
            self.slots.as_fd(),
            self.fuse.as_fd(),
            self.listener.as_fd(),
            self.program.as_descriptor(),
            self.options.as_fd(),
            other.as_fd(),
            self.place.as_fd(),
        ]
    }
}

/// What was stored by [`options_in_memory`].
pub(crate) fn read_options<T: DeserializeOwned>(memory: &OwnedFd) -> io::Result<T> {
    let memory = Memfd::from_fd(memory.try_clone()?).map_err(io::Error::other)?;
    let len = usize::try_from(memory.bytes()).unwrap_or(usize::MAX);
    if len > OPTIONS_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the options are too long",
        ));
    }
    let mut text = vec![0; len];
    let got = memory.read_at(0, &mut text)?;
    text.truncate(got);
    Ok(serde_json::from_slice(&text)?)
}

/// Options as memory, for [`Inherited::options`].
pub(crate) fn options_in_memory(options: &impl Serialize) -> io::Result<OwnedFd> {
    let text = serde_json::to_vec(options)?;
    let bytes = u64::try_from(text.len()).map_err(io::Error::other)?;
    let memory = Memfd::create("blktide-options", bytes).map_err(io::Error::other)?;
    memory.write_at(0, &text)?;
    Ok(memory.into_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::VolumeOptions;

    fn some() -> Inherited {
        let memory = || Memfd::create("blktide-test", 4096).unwrap().into_fd();
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
            place: std::fs::File::open("/dev/null").unwrap().into(),
        }
    }

    #[test]
    fn the_list_leads_back() {
        let list = some();
        Memfd::from_fd(list.banks.try_clone().unwrap())
            .unwrap()
            .write_at(0, b"banks")
            .unwrap();
        let own = PidFd::of_self().unwrap();
        let copies = list
            .descriptors(&own)
            .map(|fd| fd.try_clone_to_owned().unwrap());
        let back = Inherited::from_descriptors(copies.into()).unwrap();
        let mut out = [0; 5];
        Memfd::from_fd(back.banks)
            .unwrap()
            .read_at(0, &mut out)
            .unwrap();
        assert_eq!(&out, b"banks");
        assert!(back.program.is_in_memory());
        let options: VolumeOptions = read_options(&back.options).unwrap();
        assert_eq!(options, VolumeOptions::new("data", "/dev/null"));
    }

    #[test]
    fn another_number_of_descriptors_is_refused() {
        let one = std::fs::File::open("/dev/null").unwrap().into();
        Inherited::from_descriptors(vec![one]).unwrap_err();
    }
}
