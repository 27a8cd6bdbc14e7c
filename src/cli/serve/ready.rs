//! Telling whoever started us that clients may come: standard output, a descriptor, a file, the
//! service manager.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use crate::chain::HostFile;
use crate::cli::common::print;
use crate::cli::kept;
use crate::cli::removed::Removed;
use crate::cli::target::{Durable, Existing, Target, look};
use crate::error::{Context, Error, Result};
use crate::storage::HostId;

/// Longest text of a file with a process id: ten digits, and what may end the line.
const MAX_PID_TEXT: u64 = 12;

/// Refuses to put a process id in the place of one of `files`, or of anything else that is no
/// process id: a name that was mistyped costs nobody their data.
///
/// # Errors
/// `Invalid`; the host's.
pub(super) fn check_pid_file(path: &Path, files: &[HostFile]) -> Result<()> {
    kept::refuse(path, files)?;
    let look = |e| Error::io("look at what is there", e).at(path);
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(look(e)),
    };
    let is_pid = found.is_file() && found.len() <= MAX_PID_TEXT && {
        let text = std::fs::read(path).map_err(look)?;
        text.trim_ascii().iter().all(u8::is_ascii_digit)
    };
    match is_pid {
        true => Ok(()),
        false => {
            let text = "is there already, and does not hold a process id";
            Err(Error::invalid(text).at(path))
        }
    }
}

/// Writes the process id to a file, in one piece.
///
/// # Errors
/// The host's; those of [`Target::begin`]; `Invalid` for what is no file.
pub(super) fn pid_file(path: &Path) -> Result<Removed> {
    let (name, existing) = look(path)?;
    if !matches!(existing, Existing::Nothing | Existing::File(_)) {
        let text = "is no place for a process id (allowed: a file, by its name)";
        return Err(Error::invalid(text).at(path));
    }
    let target = Target::begin(path)?;
    let written =
        std::fs::write(target.path(), format!("{}\n", std::process::id())).and_then(|()| {
            match existing {
                Existing::Nothing => {
                    std::fs::set_permissions(target.path(), Permissions::from_mode(0o644))
                }
                _ => Ok(()),
            }
        });
    let fail = |e| Error::io("write the process id", e);
    written.map_err(fail).at(path)?;
    target.commit(Durable::WhenReplacing)?;
    Removed::at(&name).map_err(fail).at(path)
}

/// Refuses a descriptor of one of `files` to write the addresses to.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_descriptor(file: &File, files: &[HostFile]) -> Result<()> {
    kept::refuse_open(Path::new("--ready-fd"), HostId::of_fd(file), files)
}

/// The file behind a descriptor that we were started with, before anything else is opened.
///
/// # Errors
/// The host's; a descriptor that is not open, or is a socket.
pub(super) fn descriptor(number: u32) -> Result<File> {
    let path = PathBuf::from(format!("/proc/self/fd/{number}"));
    File::options()
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open the descriptor to write to", e).at(path))
}

/// Prints the addresses on standard output and on the descriptor, and tells the service manager.
///
/// # Errors
/// The host's.
pub(super) fn announce(addresses: &[String], descriptor: Option<File>) -> anyhow::Result<()> {
    let lines = addresses
        .iter()
        .fold(String::new(), |lines, address| lines + address + "\n");
    if let Some(mut file) = descriptor {
        let written = file.write_all(lines.as_bytes());
        written.map_err(|e| Error::io("write to the descriptor of --ready-fd", e))?;
    }
    notify("READY=1");
    print(|out| Ok(out.write_all(lines.as_bytes())?))
}

/// Tells the service manager, where there is one.
pub(super) fn notify(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    // A manager that does not listen is none.
    let _ = send(&name, state);
}

fn send(name: &OsStr, state: &str) -> std::io::Result<()> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(Path::new(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_holds_the_id_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = dir.path().join("pid");
        let file = pid_file(&path).expect("writes");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert_eq!(text.trim().parse(), Ok(std::process::id()));
        drop(file);
        assert!(!path.exists());
        pid_file(&dir.path().join("no/pid")).expect_err("no such directory");
    }

    #[test]
    fn a_service_manager_hears_of_it_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = dir.path().join("notify");
        let by_path = UnixDatagram::bind(&path).expect("binds");
        send(path.as_os_str(), "READY=1").expect("is heard");
        let mut buf = [0; 16];
        assert_eq!(by_path.recv(&mut buf).expect("hears"), 7);
        let name = format!("vdtool-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("is a name");
        let by_name = UnixDatagram::bind_addr(&address).expect("binds");
        send(OsStr::new(&format!("@{name}")), "STOPPING=1").expect("is heard");
        assert_eq!(by_name.recv(&mut buf).expect("hears"), 10);
        assert_eq!(&buf[..10], b"STOPPING=1");
        drop(by_name);
        assert!(send(OsStr::new(&format!("@{name}")), "x").is_err());
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let error = descriptor(100_000).expect_err("is not open");
        assert!(error.to_string().contains("100000"), "{error}");
    }
}
