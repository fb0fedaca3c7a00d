//! Making and unmaking what a volume needs outside its processes: memories, mount, socket, loop device, names.
//!
//! Invariant: whatever fails before the loop device exists is undone; nobody has used the volume yet.

use crate::error::VolumeError;
use crate::inherited::{Inherited, options_in_memory};
use crate::options::VolumeOptions;
use crate::start::Start;
use blktide_device::{Backing, DeviceError, Limits};
use blktide_format::shared::Shape;
use blktide_sys::clock::SystemClock;
use blktide_sys::event::{EventFd, Readiness, Watched, poll};
use blktide_sys::fuse::{self, Connection, FuseDevice};
use blktide_sys::loopdev::{LoopDevice, LoopOptions};
use blktide_sys::memfd::Memfd;
use blktide_sys::process::PidFd;
use blktide_sys::socket::PacketListener;
use blktide_sys::spawn::Program;
use blktide_sys::{Errno, SysError, fs, mounts};
use blktide_types::clock::Clock;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Requests that the loop device may have under way (P8).
const LOOP_REQUESTS: u32 = 64;
/// Bytes of a thread's stack: small, because it is locked.
const STACK_BYTES: usize = 256 << 10;

pub(super) fn io(what: &'static str, path: &Path, source: io::Error) -> VolumeError {
    VolumeError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Takes the volume's lock; it ends with this process.
pub(super) fn lock(options: &VolumeOptions) -> Result<std::fs::File, VolumeError> {
    let path = options.lock();
    let fail = |e| io("lock", &path, e);
    fs::create_folders(&options.volumes_dir(), 0o755).map_err(|e| fail(io::Error::other(e)))?;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(VolumeError::AlreadyAttached {
            name: options.name.clone(),
        }),
        Err(std::fs::TryLockError::Error(e)) => Err(fail(e)),
    }
}

/// Whether connecting failed because no process has the volume socket. Whatever else fails, a server may live.
pub(super) fn nobody_listens(error: &VolumeError) -> bool {
    let VolumeError::NotAttached { source, .. } = error else {
        return false;
    };
    let inner = source.get_ref().and_then(|e| e.downcast_ref::<SysError>());
    matches!(
        inner.and_then(SysError::errno),
        Some(Errno::NOENT | Errno::CONNREFUSED)
    )
}

/// Refuses while somebody has the backing device: a server lives whose socket's name was removed, and what looks stale is in use.
///
/// Waits up to `limit`, as a first server would: a dead one's last writes may be under way. Has nothing open when it returns.
pub(super) fn refuse_if_served(
    options: &VolumeOptions,
    limit: Duration,
) -> Result<(), VolumeError> {
    let deadline = SystemClock.now().after(limit);
    let taken = Backing::open(&options.device, &SystemClock, Some(deadline));
    let Err(source) = taken else {
        return Ok(());
    };
    let mounted = matches!(mounts::at(&options.mount_point()), Ok(Some(_)));
    if matches!(source, DeviceError::InUse { .. }) && (mounted || own_loop(options).is_some()) {
        return Err(VolumeError::AlreadyAttached {
            name: options.name.clone(),
        });
    }
    Err(VolumeError::Device { source })
}

/// What servers of a volume are told, from its options and its device.
pub(super) fn start(options: &VolumeOptions) -> Result<Start, VolumeError> {
    let limits = Limits::of(&options.device);
    let limits = limits.map_err(|e| io("open", &options.device, io::Error::other(e)))?;
    Ok(Start::new(options, &limits))
}

/// Everything that the first server inherits. `other` is this process until there is a server.
pub(super) fn fresh(start: &Start, shape: &Shape) -> Result<Inherited, VolumeError> {
    let options = &start.options;
    clear_stale(options);
    let path = options.socket();
    let sys =
        |what: &'static str| move |e: SysError| io(what, &options.socket(), io::Error::other(e));
    let words = |words: usize| u64::try_from(words).unwrap_or(u64::MAX).saturating_mul(8);
    let control = Memfd::create("blktide-control", words(shape.control_words()))
        .map_err(sys("make the memory of"))?;
    let banks = Memfd::create("blktide-banks", words(shape.banks_words()))
        .map_err(sys("make the memory of"))?;
    let slots_bytes = u64::try_from(shape.slots_bytes()).unwrap_or(u64::MAX);
    let slots = Memfd::create("blktide-slots", slots_bytes).map_err(sys("make the memory of"))?;
    for memory in [&control, &slots] {
        memory
            .allocate(0, memory.bytes())
            .map_err(|e| io("allocate the memory of", &path, e))?;
    }
    let program = Program::this().map_err(sys("copy the program for"))?;
    let told = options_in_memory(start).map_err(|e| io("store the options of", &path, e))?;
    let other = PidFd::of_self().map_err(sys("watch"))?;
    let place = fs::open_place(&options.device).map_err(sys("find the device of"))?;
    let mount_point = options.mount_point();
    fs::create_folders(&mount_point, 0o700).map_err(sys("make the mount point of"))?;
    let max_write = u32::try_from(shape.slot_payload_bytes).unwrap_or(u32::MAX);
    let device = FuseDevice::open().map_err(sys("open FUSE for"))?;
    fuse::mount(
        &device,
        &mount_point,
        &format!("blktide:{}", options.name),
        max_write,
    )
    .map_err(sys("mount"))?;
    let listener = PacketListener::bind(&path, 0o600)
        .map_err(sys("listen at"))
        .inspect_err(|_| take_down(options))?;
    Ok(Inherited {
        control: control.into_fd(),
        banks: banks.into_fd(),
        slots: slots.into_fd(),
        fuse: device,
        listener,
        program,
        options: told,
        other,
        place,
    })
}

/// Takes away what keeper and server that died together have left: their connection is dead.
fn clear_stale(options: &VolumeOptions) {
    if let Some(device) = own_loop(options) {
        // If it is still mounted it goes when that ends; its I/O fails meanwhile, as after a crash.
        drop(device.clear());
    }
    while matches!(mounts::at(&options.mount_point()), Ok(Some(_))) {
        if fuse::unmount(&options.mount_point(), true).is_err() {
            return;
        }
    }
}

/// The loop device that serves the volume's file, by sysfs: opens nothing, so a dead server is not waited for.
fn own_loop(options: &VolumeOptions) -> Option<LoopDevice> {
    let at = options.mount_point();
    // Sysfs has real paths. Never the mount point itself: its server may be dead.
    let real = at.parent().and_then(|p| std::fs::canonicalize(p).ok());
    let at = match (real, at.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => at,
    };
    loop_below(Path::new("/sys/block"), &at)
}

/// The loop device whose file lies below `folder`.
fn loop_below(sys_block: &Path, folder: &Path) -> Option<LoopDevice> {
    let entries = std::fs::read_dir(sys_block).ok()?;
    entries.flatten().find_map(|entry| {
        let name = entry.file_name();
        let number = name.to_str()?.strip_prefix("loop")?.parse().ok()?;
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let ours = Path::new(file.trim_end()).starts_with(folder);
        ours.then(|| LoopDevice::of_number(number))
    })
}

/// Gives an attach up: the connection is ended for good, and everything made is taken away.
pub(super) fn take_down(options: &VolumeOptions) {
    if let Ok(connection) = Connection::of_mount(&options.mount_point()) {
        drop(connection.abort());
    }
    clear_stale(options);
    remove_names(options);
}

/// Whether the connection has been ended for good (aborted, unmounted by force): no server can serve it any more.
pub(super) fn is_over(device: &FuseDevice) -> bool {
    let mut watched = [Watched::readable(device)];
    poll(&mut watched, Some(Duration::ZERO))
        .is_ok_and(|_| watched.iter().any(|w| w.readiness == Readiness::HungUp))
}

/// Removes symlink, socket and mount point.
pub(super) fn remove_names(options: &VolumeOptions) {
    for path in [options.node(), options.socket()] {
        // What is not there need not be removed.
        drop(std::fs::remove_file(path));
    }
    drop(std::fs::remove_dir(options.mount_point()));
}

/// What servers see of our environment.
pub(super) fn environment() -> Vec<OsString> {
    std::env::vars_os()
        .filter(|(name, _)| name.to_string_lossy().starts_with("BLKTIDE_"))
        .map(|(name, value)| {
            let mut both = name;
            both.push("=");
            both.push(value);
            both
        })
        .collect()
}

/// What the set-up has made.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) device: LoopDevice,
    /// The kernel's number of the FUSE connection.
    pub(super) connection: u64,
}

/// The set-up of the loop device, in a thread of its own: it waits for the server, and the keeper must not.
#[derive(Debug)]
pub(super) struct Attaching {
    bell: EventFd,
    results: Receiver<Result<Attached, VolumeError>>,
}

impl Attaching {
    pub(super) fn start(options: &VolumeOptions, shape: &Shape) -> Result<Self, VolumeError> {
        let fail = |e| io("set up", &options.node(), e);
        let bell = EventFd::new().map_err(fail)?;
        let rings = bell.try_clone().map_err(fail)?;
        let (tells, results): (Sender<_>, _) = channel();
        let (options, shape) = (options.clone(), *shape);
        let work = move || {
            let done = set_up(&options, &shape);
            // The keeper may have given up meanwhile.
            drop(tells.send(done));
            rings.ring();
        };
        std::thread::Builder::new()
            .name("set-up".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map_err(fail)?;
        Ok(Self { bell, results })
    }

    /// Rings when there is a result.
    pub(super) const fn bell(&self) -> &EventFd {
        &self.bell
    }

    pub(super) fn take_result(&mut self) -> Option<Result<Attached, VolumeError>> {
        self.results.try_recv().ok()
    }
}

/// Opens the volume's file, which waits for the server, and makes it a block device: without a name yet.
fn set_up(options: &VolumeOptions, shape: &Shape) -> Result<Attached, VolumeError> {
    let mount_point = options.mount_point();
    let path = mount_point.join(fuse::VOLUME_FILE);
    let found =
        mounts::at(&mount_point).map_err(|e| io("find", &mount_point, io::Error::other(e)))?;
    let connection = found.as_ref().map_or(0, |m| u64::from(m.device.minor));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| io("open", &path, e))?;
    // A keeper may have made it and died before it could say so.
    if let Some(device) = own_loop(options)
        && let Ok(Some(bound)) = device.binding()
        && found.is_some_and(|m| m.device == bound.file_system())
        && bound.direct
    {
        return Ok(Attached { device, connection });
    }
    let name = format!("blktide:{}", options.name);
    let how = LoopOptions {
        sector_bytes: shape.geometry.logical_sector_bytes(),
        name: &name,
        queue_requests: LOOP_REQUESTS,
        max_request_bytes: u32::try_from(shape.slot_payload_bytes).unwrap_or(u32::MAX),
    };
    let device = LoopDevice::create(&file, &how)
        .map_err(|e| io("make a loop device of", &path, io::Error::other(e)))?;
    Ok(Attached { device, connection })
}

/// Gives the device its name, from when on it is used.
pub(super) fn link(options: &VolumeOptions, device: LoopDevice) -> Result<(), VolumeError> {
    let node = options.node();
    if std::fs::read_link(&node).is_ok_and(|to| to == device.node()) {
        return Ok(());
    }
    let fail = |e| io("link", &node, e);
    fs::create_folders(&options.device_dir, 0o755).map_err(|e| fail(io::Error::other(e)))?;
    match std::fs::remove_file(&node) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    std::os::unix::fs::symlink(device.node(), &node).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::VolumeClient;
    use blktide_sys::fence::Fenced;

    fn scratch(name: &str) -> std::path::PathBuf {
        let id = std::process::id();
        let folder = std::env::temp_dir().join(format!("blktide-setup-{name}-{id}"));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn options(folder: &Path) -> VolumeOptions {
        let mut options = VolumeOptions::new("data", "/dev/null");
        options.runtime_dir = folder.to_owned();
        options
    }

    /// An attach takes away what looks stale: only where no process can be behind the socket.
    #[test]
    fn an_error_that_leaves_a_server_possible_is_no_reason_to_attach() {
        let folder = scratch("connect");
        let options = options(&folder);
        let connect = || {
            VolumeClient::connect(&folder, "data", Duration::from_secs(1))
                .map(drop)
                .unwrap_err()
        };
        assert!(nobody_listens(&connect()), "no socket");
        std::fs::create_dir_all(options.socket().parent().unwrap()).unwrap();
        drop(PacketListener::bind(&options.socket(), 0o600).unwrap());
        assert!(nobody_listens(&connect()), "a dead one's socket");
        std::fs::remove_file(options.socket()).unwrap();
        std::os::unix::fs::symlink(options.socket(), options.socket()).unwrap();
        let other = connect();
        assert!(!nobody_listens(&other), "ELOOP: {other:?}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_loop_device_of_the_volumes_file_is_found() {
        let folder = scratch("loops");
        let at = Path::new("/run/blktide/volumes/data.mnt");
        let files = [
            ("loop0", "/run/blktide/volumes/data.mnt2/volume\n"),
            ("loop7", "/run/blktide/volumes/data.mnt/volume\n"),
            ("sda", "/run/blktide/volumes/data.mnt/volume\n"),
        ];
        for (name, file) in files {
            let below = folder.join(name).join("loop");
            std::fs::create_dir_all(&below).unwrap();
            let mut entry = std::fs::File::create(below.join("backing_file")).unwrap();
            io::Write::write_all(&mut entry, file.as_bytes()).unwrap();
        }
        std::fs::create_dir_all(folder.join("loop1")).unwrap();
        assert_eq!(loop_below(&folder, at), Some(LoopDevice::of_number(7)));
        std::fs::remove_dir_all(folder.join("loop7")).unwrap();
        assert_eq!(loop_below(&folder, at), None);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// With its socket's name removed a living server still has the device.
    #[test]
    fn a_device_that_somebody_has_is_not_attached() {
        let folder =
            Path::new("/var/tmp").join(format!("blktide-setup-held-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut options = options(&folder);
        options.device = folder.join("backing");
        let file = std::fs::File::create(&options.device).unwrap();
        file.set_len(1 << 20).unwrap();
        let held = Fenced::try_take(&options.device).unwrap().unwrap();
        let refused = refuse_if_served(&options, Duration::ZERO).unwrap_err();
        let in_use = DeviceError::InUse {
            path: options.device.clone(),
        };
        assert!(
            matches!(&refused, VolumeError::Device { source } if source.to_string() == in_use.to_string())
        );
        drop(held);
        refuse_if_served(&options, Duration::ZERO).unwrap();
        let again = Fenced::try_take(&options.device).unwrap();
        assert!(again.is_some(), "and nothing is kept");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
