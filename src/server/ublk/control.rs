//! Devices as `/dev/ublk-control` knows them: made, found, taken over, removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder, UblkQueueAffinity};
use libublk::{UblkError, UblkFlags, sys};
use rustix::process::{Pid, test_kill_process};

use super::Options;
use super::features::{self, Features};
use crate::error::{Error, ErrorKind, Result};

const CONTROL: &str = "/dev/ublk-control";
/// What devices are called in the driver's records.
const TARGET: &str = "vdtool";
/// How long the driver may take to notice that a server is gone, and the host to let a new device
/// be opened.
const NOTICE: Duration = Duration::from_secs(10);
/// Bits that may be asked for; the driver sets more by itself.
const ASKED: u32 = sys::UBLK_F_SUPPORT_ZERO_COPY
    | sys::UBLK_F_USER_RECOVERY
    | sys::UBLK_F_USER_RECOVERY_REISSUE
    | sys::UBLK_F_UNPRIVILEGED_DEV
    | sys::UBLK_F_USER_COPY
    | sys::UBLK_F_UPDATE_SIZE
    | sys::UBLK_F_AUTO_BUF_REG
    | sys::UBLK_F_QUIESCE;

/// Turns a failure of the library into one of ours; `doing` completes "cannot ...".
pub(super) fn error(doing: &str) -> impl Fn(UblkError) -> Error {
    move |e| {
        let errno = match e {
            UblkError::UringIOError(code) | UblkError::OtherError(code) => -code,
            UblkError::IOError(e) => return Error::io(doing, e),
            UblkError::InvalidVal => libc::EINVAL,
            UblkError::UringTimeout => libc::ETIME,
            UblkError::QueueIsDown => libc::ENODEV,
            _ => libc::EIO,
        };
        Error::io(doing, std::io::Error::from_raw_os_error(errno))
    }
}

/// Refuses, saying what to do, where this kernel or user cannot have ublk devices.
///
/// # Errors
/// `Unsupported`, `Permission`; the host's.
pub(super) fn check() -> Result<()> {
    let text = match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL)
    {
        Ok(_) => return Ok(()),
        Err(e) => match e.kind() {
            std::io::ErrorKind::NotFound => Error::unsupported(
                "this kernel has no ublk: load its module with 'modprobe ublk_drv' (Linux 6.6 or \
                 newer, with CONFIG_BLK_DEV_UBLK); --nbd works without",
            ),
            std::io::ErrorKind::PermissionDenied => Error::new(
                ErrorKind::Permission,
                "no right to use ublk: be root, or be given this file and use --unprivileged; \
                 --nbd works without",
            ),
            _ => Error::io("open it", e),
        },
    };
    Err(text.at(CONTROL))
}

/// What the driver of this kernel can do.
///
/// # Errors
/// As [`check`]; `Unsupported` where the driver cannot tell.
pub(super) fn features() -> Result<Features> {
    check()?;
    match UblkCtrl::get_features() {
        Some(bits) => Ok(Features::from_bits(bits)),
        None => Err(Error::unsupported(
            "the ublk driver does not answer: the kernel is older than Linux 6.6, or io_uring is \
             turned off (kernel.io_uring_disabled); --nbd works without",
        )
        .at(CONTROL)),
    }
}

/// Adds a device as `options` say.
///
/// # Errors
/// Those of [`features`] and [`features::choose`]; `Invalid` for a number that is taken.
pub(super) fn add(options: &Options) -> Result<UblkCtrl> {
    let flags = features::choose(options, features()?)?;
    let id = options.dev_id.map_or(Ok(-1), i32::try_from);
    let id = id.map_err(|_| Error::invalid("the device number is too large"))?;
    // The library removes a device that it failed to add, even one that was there before.
    if let Some(id) = options.dev_id.filter(|id| is_there(*id)) {
        return Err(taken(id));
    }
    let added = UblkCtrlBuilder::default()
        .name(TARGET)
        .id(id)
        .nr_queues(options.queues)
        .depth(options.depth)
        .io_buf_bytes(options.max_io)
        .ctrl_flags(flags.bits())
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build();
    added.map_err(|e| match &e {
        denied if is_denied(denied) => Error::new(
            ErrorKind::Permission,
            "no right to add a ublk device: be root, or use --unprivileged; --nbd works without",
        ),
        _ => error("add a ublk device")(e),
    })
}

fn taken(id: u32) -> Error {
    Error::invalid(format!(
        "there is a ublk device {id} already: name another with --dev-id, take it over with \
         --recover, or remove it with 'serve --delete {id}'"
    ))
}

/// Where clients find a device.
pub(super) fn block_device(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

/// Waits until the block device is there and can be opened.
///
/// # Errors
/// The host's; `Permission` where it was not given to a user without privileges.
pub(super) fn wait_until_open(id: u32) -> Result<()> {
    let path = block_device(id);
    let begun = Instant::now();
    loop {
        match std::fs::File::open(&path) {
            Ok(_) => return Ok(()),
            Err(e) if begun.elapsed() > NOTICE => {
                let failed = || Error::io("open the ublk device", e).at(&path);
                return Err(not_given(id).unwrap_or_else(failed));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn character_device(id: u32) -> String {
    format!("/dev/ublkc{id}")
}

fn is_denied(e: &UblkError) -> bool {
    matches!(e, UblkError::UringIOError(code) if [-libc::EPERM, -libc::EACCES].contains(code))
}

fn foreign(id: u32) -> Error {
    Error::new(
        ErrorKind::Permission,
        format!("ublk device {id} belongs to another user: be that user, or root"),
    )
}

/// Whether the permissions of a node let this user read and write it; one that is not there does.
/// To open it would tell more, but counts as a server that came and went.
fn may_use(path: &str) -> bool {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let wanted = Access::READ_OK | Access::WRITE_OK;
    let found = accessat(CWD, path, wanted, AtFlags::EACCESS);
    !matches!(found, Err(rustix::io::Errno::ACCESS))
}

/// Why a device of a user without privileges could not be started; `None` where its nodes were
/// given to that user.
pub(super) fn not_given(id: u32) -> Option<Error> {
    let nodes = [character_device(id), block_device(id)];
    let withheld = nodes.iter().position(|path| !may_use(path))?;
    let path = &nodes[withheld];
    // Without the first node the driver takes no command for the device.
    let rest = match withheld {
        0 => format!("; the device stays until root removes it with 'serve --delete {id}'"),
        _ => String::new(),
    };
    Some(Error::new(
        ErrorKind::Permission,
        format!("{path} was not given to this user: --unprivileged needs udev rules for it{rest}"),
    ))
}

/// Whether there is a device of this number, served or not.
fn is_there(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
}

/// A device whose server is gone, ready to be served again.
///
/// # Errors
/// `NotFound`, `Invalid` where it is served or cannot be taken over.
pub(super) fn recover(id: u32) -> Result<UblkCtrl> {
    check()?;
    let number = number(id)?;
    let begun = Instant::now();
    loop {
        let found = find(id)?;
        let wrong = |text: String| Err(Error::invalid(format!("ublk device {id} {text}")));
        match found.state {
            State::Quiesced | State::FailIo => break,
            State::Dead => {
                return wrong(format!(
                    "has no server and cannot be taken over; remove it with 'serve --delete {id}'"
                ));
            }
            State::Live if found.is_served() && begun.elapsed() > NOTICE => {
                return wrong(format!("is served by process {}", found.pid));
            }
            State::Live if begun.elapsed() > NOTICE => {
                return wrong("is not given up by its driver".to_owned());
            }
            State::Live => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    let doing = "take over the ublk device";
    let old = UblkCtrl::new_simple(number).map_err(error(doing))?;
    loop {
        match old.start_user_recover() {
            Ok(_) => break,
            // The process that had it is not quite gone.
            Err(UblkError::UringIOError(code))
                if code == -libc::EBUSY && begun.elapsed() < NOTICE =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(error(doing)(e)),
        }
    }
    let info = old.dev_info();
    let queues = info.nr_hw_queues;
    UblkCtrlBuilder::default()
        .name(TARGET)
        .id(number)
        .nr_queues(queues)
        .depth(info.queue_depth)
        .io_buf_bytes(info.max_io_buf_bytes)
        .ctrl_flags(info.flags & u64::from(ASKED))
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(error(doing))
}

fn number(id: u32) -> Result<i32> {
    i32::try_from(id).map_err(|_| Error::invalid(format!("there is no ublk device {id}")))
}

/// Whether a device has a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It had one, or has none yet, and cannot be taken over.
    Dead,
    /// It has one.
    Live,
    /// It waits for another; so do requests.
    Quiesced,
    /// It waits for another; requests fail.
    FailIo,
}

impl State {
    fn of(state: u16) -> Self {
        match u32::from(state) {
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => Self::FailIo,
            _ => Self::Dead,
        }
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Live => "live",
            Self::Quiesced => "quiesced",
            Self::FailIo => "fail-io",
        }
    }
}

/// A ublk device of this machine, whoever serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its number: N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether it has a server.
    pub state: State,
    /// The process that served it last; negative: none.
    pub pid: i32,
    /// Size in bytes.
    pub size: u64,
    /// Number of queues.
    pub queues: u16,
    /// Requests that a queue may have under way.
    pub depth: u16,
    /// Largest request in bytes.
    pub max_io: u32,
    /// What it uses.
    pub features: Features,
    /// The image, where it was added by vdtool.
    pub image: Option<PathBuf>,
}

impl Found {
    /// Whether the process that serves it lives.
    pub fn is_served(&self) -> bool {
        self.state == State::Live
            && Pid::from_raw(self.pid).is_some_and(|pid| {
                // A process of another user is one too.
                !matches!(test_kill_process(pid), Err(rustix::io::Errno::SRCH))
            })
    }
}

/// What the driver says of a device.
///
/// # Errors
/// `NotFound`; `Permission` for one of another user; the driver's.
pub(super) fn find(id: u32) -> Result<Found> {
    if !is_there(id) {
        let text = format!("there is no ublk device {id}");
        return Err(Error::new(ErrorKind::NotFound, text));
    }
    if !may_use(&character_device(id)) {
        return Err(foreign(id));
    }
    let control = UblkCtrl::new_simple(number(id)?).map_err(|e| match is_denied(&e) {
        true => foreign(id),
        false => error("ask for the ublk device")(e),
    })?;
    let info = control.dev_info();
    let mut params = sys::ublk_params::default();
    // One that was never started has none.
    let size = match control.get_params(&mut params) {
        Ok(_) => params.basic.dev_sectors.saturating_mul(512),
        Err(_) => 0,
    };
    Ok(Found {
        id,
        state: State::of(info.state),
        pid: info.ublksrv_pid,
        size,
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        max_io: info.max_io_buf_bytes,
        features: Features::from_bits(info.flags),
        image: image(&control),
    })
}

/// The image that a device was added for.
fn image(control: &UblkCtrl) -> Option<PathBuf> {
    let data = control.get_target_data_from_json()?;
    Some(PathBuf::from(data.get("image")?.as_str()?))
}

/// The ublk devices of this machine, by number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listed {
    /// Those that this user may ask about.
    pub found: Vec<Found>,
    /// The numbers of the others, which other users have.
    pub foreign: Vec<u32>,
}

/// The ublk devices of this machine.
///
/// # Errors
/// As [`check`].
pub(super) fn list() -> Result<Listed> {
    check()?;
    let entries = match std::fs::read_dir("/sys/class/ublk-char") {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Listed::default()),
        Err(e) => return Err(Error::io("list ublk devices", e)),
    };
    let names = entries.flatten().map(|e| e.file_name());
    let mut ids: Vec<u32> = names
        .filter_map(|n| n.to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    let mut all = Listed::default();
    for id in ids {
        match find(id) {
            Ok(found) => all.found.push(found),
            Err(e) if e.kind() == ErrorKind::Permission => all.foreign.push(id),
            // It went meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// Removes a device whose server is gone.  Clients that still have it open get errors.
///
/// # Errors
/// `NotFound`; `Invalid` where it is served.
pub(super) fn delete(id: u32) -> Result<()> {
    check()?;
    let found = find(id)?;
    if found.is_served() {
        return Err(Error::invalid(format!(
            "ublk device {id} is served by process {}: end that, or 'ctl .. stop' it",
            found.pid
        )));
    }
    let doing = "remove the ublk device";
    let control = UblkCtrl::new_simple(number(id)?).map_err(error(doing))?;
    control.kill_dev().map_err(error(doing))?;
    remove(&control).map_err(error(doing))
}

/// Removes a device that is stopped, at once where nobody has it open, else when the last has left.
pub(super) fn remove(control: &UblkCtrl) -> Result<(), UblkError> {
    let gone = |e: &UblkError| match e {
        UblkError::UringIOError(code) => [-libc::ENODEV, -libc::ENOENT].contains(code),
        _ => false,
    };
    let removed = match control.del_dev_async() {
        // Linux 6.9 is the first that need not wait, but with devices without privileges.
        Err(UblkError::UringIOError(code))
            if [-libc::EOPNOTSUPP, -libc::EINVAL].contains(&code) =>
        {
            control.del_dev()
        }
        other => other,
    };
    match removed {
        Err(e) if !gone(&e) => Err(e),
        _ => Ok(()),
    }
}

/// The processors that send requests to a queue.
pub(super) fn processors(control: &UblkCtrl, queue: u16) -> Vec<usize> {
    let mut set = UblkQueueAffinity::new();
    match control.get_queue_affinity(u32::from(queue), &mut set) {
        Ok(_) => set.to_bits_vec(),
        Err(_) => Vec::new(),
    }
}
