//! Stream sockets with time limits.

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, shutdown, socket_with,
};
use rustix::time::Timespec;

use crate::nbd::resolve::resolve;
use crate::nbd::uri::Address;

/// What is asked of the kernel for each direction; it gives less where its limits say so.
const BUFFER: usize = 4 << 20;

/// A connected stream socket, Unix or TCP.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

/// When to give up waiting; `None`: never.
pub type Until = Option<Instant>;

impl Socket {
    /// Takes a connected socket, makes its buffers large, and has TCP send at once.
    pub fn new(fd: OwnedFd) -> Self {
        // Hints: a socket works without them.
        if sockopt::socket_domain(&fd) != Ok(AddressFamily::UNIX) {
            let _ = sockopt::set_tcp_nodelay(&fd, true);
            let _ = sockopt::set_socket_keepalive(&fd, true);
        } else if sockopt::set_socket_send_buffer_size_force(&fd, BUFFER).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(&fd, BUFFER);
        }
        Self { fd }
    }

    /// Connects.
    ///
    /// # Errors
    /// The host's; `TimedOut`.
    pub fn connect(address: &Address, limit: Duration) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let to = SocketAddrUnix::new(path)?;
                let flags = SocketFlags::CLOEXEC;
                let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                // A full backlog makes this wait, and there is no other limit to that.
                let _ = sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(limit));
                connect(&fd, &to).map_err(|e| match e {
                    Errno::AGAIN => io::ErrorKind::TimedOut.into(),
                    e => io::Error::from(e),
                })?;
                let _ = sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, None);
                Ok(Self::new(fd))
            }
            Address::Tcp { host, port } => {
                let mut last = None;
                for to in resolve(host, *port)? {
                    match TcpStream::connect_timeout(&to, limit) {
                        Ok(stream) => return Ok(Self::new(stream.into())),
                        Err(e) => last = Some(e),
                    }
                }
                Err(last.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
            }
        }
    }

    /// Reads what is there, at least one byte; 0: the peer has ended.
    ///
    /// # Errors
    /// The host's; `TimedOut`.
    pub fn read(&self, buf: &mut [u8], until: Until) -> io::Result<usize> {
        loop {
            let flags = match until {
                None => RecvFlags::empty(),
                Some(_) => RecvFlags::DONTWAIT,
            };
            match recv(&self.fd, &mut *buf, flags) {
                Ok((len, _)) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, until)?,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether something can be read at once, the end included.
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// How many of these have peers that closed the connection or ended their side of it, so that
    /// nothing more will come than is here; also after a [`Socket::shutdown`].
    pub fn hung_up<'a>(sockets: impl Iterator<Item = &'a Self>) -> usize {
        let wanted = |socket: &'a Self| PollFd::new(&socket.fd, PollFlags::RDHUP);
        let mut fds: Vec<_> = sockets.map(wanted).collect();
        // Where the host cannot tell, none is known to have.
        poll(&mut fds, Some(&Timespec::default())).unwrap_or(0)
    }

    /// Writes all of `parts`.  One thread at a time.
    ///
    /// # Errors
    /// The host's; `TimedOut`; then any part may have been sent.
    pub fn write_all(&self, mut parts: &mut [IoSlice<'_>], until: Until) -> io::Result<()> {
        let flags = match until {
            None => SendFlags::NOSIGNAL,
            Some(_) => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        };
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let mut ancillary = SendAncillaryBuffer::default();
            match sendmsg(&self.fd, parts, &mut ancillary, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => IoSlice::advance_slices(&mut parts, len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, until)?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn wait(&self, what: PollFlags, until: Until) -> io::Result<()> {
        let left = match until {
            None => None,
            Some(until) => match until.checked_duration_since(Instant::now()) {
                None => return Err(io::ErrorKind::TimedOut.into()),
                Some(left) => Some(left),
            },
        };
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(&self.fd, what)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends the connection, or one direction of it; threads that wait in it return.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        // Nothing to end where the peer was first.
        let _ = shutdown(&self.fd, how);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
