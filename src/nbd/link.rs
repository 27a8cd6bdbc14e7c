//! A connection: a socket, plain or under TLS.
//!
//! One thread at a time reads and one writes; both may do so at once.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::Connection;

use crate::nbd::socket::{Socket, Until};

/// Bytes of one record's worth of ciphertext read at a time.
const RAW: usize = 64 << 10;
/// Plain bytes encrypted at a time.
const STEP: usize = 64 << 10;

/// A connection to a peer.
#[derive(Debug)]
pub struct Link {
    socket: Arc<Socket>,
    tls: Option<Tls>,
}

/// Never lock `inbound` or `outbound` while `session` is held.
struct Tls {
    session: Mutex<Connection>,
    inbound: Mutex<Inbound>,
    outbound: Mutex<Vec<u8>>,
}

/// Ciphertext that has come.
struct Inbound {
    raw: Vec<u8>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Link {
    /// A plain connection.
    pub fn plain(socket: Arc<Socket>) -> Self {
        Self { socket, tls: None }
    }

    /// Sets up TLS on a plain connection on which nothing else is under way.
    ///
    /// # Errors
    /// The host's; those of TLS, as `InvalidData`; `TimedOut`.
    pub fn secure(&mut self, session: Connection, until: Until) -> io::Result<()> {
        let tls = Tls {
            session: Mutex::new(session),
            inbound: Mutex::new(Inbound {
                raw: vec![0; RAW],
                start: 0,
                end: 0,
            }),
            outbound: Mutex::default(),
        };
        while tls.session.lock().is_handshaking() {
            tls.send_pending(&self.socket, until)?;
            if tls.session.lock().is_handshaking() && !tls.receive(&self.socket, until)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        tls.send_pending(&self.socket, until)?;
        self.tls = Some(tls);
        Ok(())
    }

    /// Whether it is encrypted.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// The socket itself, for what needs no bytes in between.
    pub fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// The descriptor, where bytes may go straight to it.
    pub fn plain_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tls.is_none().then(|| self.socket.as_fd())
    }

    /// Reads what is there, at least one byte; 0: the peer has ended.
    ///
    /// # Errors
    /// The host's; `TimedOut`; `InvalidData` where TLS is violated.
    pub fn read(&self, buf: &mut [u8], until: Until) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return self.socket.read(buf, until);
        };
        loop {
            match tls.session.lock().reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if !tls.receive(&self.socket, until)? {
                return Ok(0);
            }
        }
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// As [`Link::read`]; `UnexpectedEof` where the peer ends before.
    pub fn read_exact(&self, buf: &mut [u8], until: Until) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.read(&mut buf[done..], until)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                len => done += len,
            }
        }
        Ok(())
    }

    /// Writes all of `parts`.
    ///
    /// # Errors
    /// The host's; `TimedOut`; then any part may have been sent.
    pub fn write_all(&self, parts: &mut [IoSlice<'_>], until: Until) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            return self.socket.write_all(parts, until);
        };
        for part in parts {
            for piece in part.chunks(STEP) {
                tls.session.lock().writer().write_all(piece)?;
                tls.send_pending(&self.socket, until)?;
            }
        }
        Ok(())
    }
}

impl Tls {
    /// Sends what the session has to send.
    fn send_pending(&self, socket: &Socket, until: Until) -> io::Result<()> {
        let mut out = self.outbound.lock();
        out.clear();
        let mut session = self.session.lock();
        while session.wants_write() {
            session.write_tls(&mut *out)?;
        }
        drop(session);
        match out.is_empty() {
            true => Ok(()),
            false => socket.write_all(&mut [IoSlice::new(&out)], until),
        }
    }

    /// Takes in some ciphertext; false: the peer has ended.
    fn receive(&self, socket: &Socket, until: Until) -> io::Result<bool> {
        let mut inbound = self.inbound.lock();
        let Inbound { raw, start, end } = &mut *inbound;
        if start == end {
            (*start, *end) = (0, socket.read(raw, until)?);
            if *end == 0 {
                return Ok(false);
            }
        }
        let mut session = self.session.lock();
        *start += session.read_tls(&mut &raw[*start..*end])?;
        let processed = session.process_new_packets();
        drop(session);
        processed.map(|_| true).map_err(|e| {
            // The peer may learn why from the alert.
            let _ = self.send_pending(socket, until);
            io::Error::new(io::ErrorKind::InvalidData, e)
        })
    }
}
