//! Where clients come in.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketFlags, accept_with, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::resolve::resolve;
use crate::nbd::uri::{self, Address};

/// The descriptor of the first socket that a service manager hands over.
const FIRST_INHERITED: i32 = 3;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket or a TCP port; port 0 is any free one.
    Address(Address),
    /// The socket that a service manager opened for this process (`LISTEN_FDS`).
    Inherited,
}

impl Listen {
    /// `unix:PATH`, `HOST:PORT`, or `inherited`.
    ///
    /// # Errors
    /// `Invalid`, saying what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let allowed = "allowed: unix:PATH, HOST:PORT, inherited";
            Error::invalid(format!(
                "'{text}' is no address to serve at: {why} ({allowed})"
            ))
        };
        if text == "inherited" {
            return Ok(Self::Inherited);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(wrong("its path is empty")),
                path => Ok(Self::Address(Address::Unix(path.into()))),
            };
        }
        if text.contains('/') {
            return Err(wrong("it has a slash"));
        }
        let address = uri::tcp(text).map_err(|why| wrong(&why))?;
        Ok(Self::Address(address))
    }
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct Listener {
    sockets: Vec<OwnedFd>,
    address: Address,
    /// The socket file to remove in the end, and which file it was.
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    pub(super) fn open(listen: &Listen) -> Result<Self> {
        match listen {
            Listen::Inherited => inherited(),
            Listen::Address(Address::Unix(path)) => unix(path),
            Listen::Address(Address::Tcp { host, port }) => tcp(host, *port),
        }
    }

    /// Where clients find it, with the port it really has.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The sockets, to wait for clients on.
    pub(super) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(AsFd::as_fd)
    }

    /// A client that is there; `None`: there is none, or it left again.
    pub(super) fn accept(&self, index: usize) -> io::Result<Option<OwnedFd>> {
        use rustix::io::Errno;
        match accept_with(&self.sockets[index], SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, device, inode)) = self.file.take() {
            let same = |m: fs::Metadata| (m.dev(), m.ino()) == (device, inode);
            if fs::symlink_metadata(&path).is_ok_and(same) {
                // Nothing more can be done about one that stays.
                let _ = fs::remove_file(&path);
            }
        }
    }
}

fn unix(path: &Path) -> Result<Listener> {
    let fail = |e| Error::io("listen", e).at(path);
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path).map_err(fail)?
        }
        bound => bound.map_err(fail)?,
    };
    listener.set_nonblocking(true).map_err(fail)?;
    let file = fs::symlink_metadata(path).map_err(fail)?;
    Ok(Listener {
        sockets: vec![listener.into()],
        address: Address::Unix(path.to_owned()),
        file: Some((path.to_owned(), file.dev(), file.ino())),
    })
}

/// Removes a socket on which nobody listens any more.
fn remove_stale(path: &Path) -> Result<()> {
    let used = |why: &str| Err(Error::new(ErrorKind::Locked, why).at(path));
    let found = fs::symlink_metadata(path).map_err(|e| Error::io("listen", e).at(path))?;
    if !found.file_type().is_socket() {
        return used("is there already, and is no socket");
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| Error::io("remove the stale socket", e).at(path))
        }
        Ok(_) => used("is a socket on which another process listens"),
        Err(e) => Err(Error::io("look who listens there", e).at(path)),
    }
}

fn tcp(host: &str, port: u16) -> Result<Listener> {
    use std::net::TcpListener;
    let fail = |e| Error::io(format!("listen at {host}:{port}"), e);
    let mut sockets = Vec::new();
    let mut bound = port;
    let mut last = None;
    for mut address in resolve(host, port).map_err(fail)? {
        // All of a name's addresses get the same port.
        address.set_port(bound);
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(fail)?;
                bound = listener.local_addr().map_err(fail)?.port();
                sockets.push(listener.into());
            }
            Err(e) => last = Some(e),
        }
    }
    match (sockets.is_empty(), last) {
        (true, last) => Err(fail(last.unwrap_or_else(|| io::ErrorKind::NotFound.into()))),
        (false, _) => Ok(Listener {
            sockets,
            address: Address::Tcp {
                host: host.to_owned(),
                port: bound,
            },
            file: None,
        }),
    }
}

fn inherited() -> Result<Listener> {
    let variable = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    let me = u32::try_from(getpid().as_raw_nonzero().get()).unwrap_or_default();
    if variable("LISTEN_PID") != Some(me) {
        return Err(Error::invalid(
            "no socket was handed over to this process (LISTEN_PID does not name it)",
        ));
    }
    if variable("LISTEN_FDS") != Some(1) {
        return Err(Error::invalid("LISTEN_FDS must be 1: one socket is served"));
    }
    let socket = take(getpid()).map_err(|e| Error::io("take the socket handed over", e))?;
    if sockopt::socket_acceptconn(&socket) != Ok(true) {
        return Err(Error::invalid(
            "the descriptor handed over is no listening socket",
        ));
    }
    let fail = |e: rustix::io::Errno| Error::io("set up the socket handed over", e.into());
    rustix::io::ioctl_fionbio(&socket, true).map_err(fail)?;
    let address = own_address(&socket).map_err(fail)?;
    Ok(Listener {
        sockets: vec![socket],
        address,
        file: None,
    })
}

/// The descriptor as one that is owned; the number it had stays taken.
fn take(me: Pid) -> io::Result<OwnedFd> {
    let own = pidfd_open(me, PidfdFlags::empty())?;
    Ok(pidfd_getfd(
        &own,
        FIRST_INHERITED,
        PidfdGetfdFlags::empty(),
    )?)
}

fn own_address(socket: &OwnedFd) -> rustix::io::Result<Address> {
    use std::net::SocketAddr;
    use std::os::unix::ffi::OsStrExt;
    let name = rustix::net::getsockname(socket)?;
    if name.address_family() == AddressFamily::UNIX {
        let name = rustix::net::SocketAddrUnix::try_from(name)?;
        let path = name.path_bytes().unwrap_or_default();
        let path = Path::new(std::ffi::OsStr::from_bytes(path)).to_owned();
        return Ok(Address::Unix(path));
    }
    let name = SocketAddr::try_from(name)?;
    Ok(Address::Tcp {
        host: name.ip().to_string(),
        port: name.port(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_unix_paths_or_hosts_with_ports() {
        let tcp = |host: &str, port| {
            Listen::Address(Address::Tcp {
                host: host.to_owned(),
                port,
            })
        };
        for (text, expected) in [
            (
                "unix:/tmp/s",
                Listen::Address(Address::Unix("/tmp/s".into())),
            ),
            ("localhost:10", tcp("localhost", 10)),
            ("[::1]:0", tcp("::1", 0)),
            ("localhost", tcp("localhost", 10809)),
            ("inherited", Listen::Inherited),
        ] {
            assert_eq!(Listen::parse(text).expect(text), expected);
        }
        for text in ["", "unix:", "/tmp/s", ":10", "a:b"] {
            Listen::parse(text).expect_err(text);
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = dir.path().join("socket");
        let listen = Listen::Address(Address::Unix(path.clone()));
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists(), "left behind");
        let live = Listener::open(&listen).expect("replaces it");
        let error = Listener::open(&listen).expect_err("somebody listens");
        assert_eq!(error.kind(), ErrorKind::Locked);
        drop(live);
        assert!(!path.exists(), "removed");
        fs::write(&path, b"").expect("writes");
        Listener::open(&listen).expect_err("a file");
        assert!(path.exists(), "untouched");
    }
}
