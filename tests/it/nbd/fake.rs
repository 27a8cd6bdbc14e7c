//! A server with a volatile cache, that a test can have crash.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;
use vdtool::nbd::wire::{
    Fields, GREETING, Headers, OPTION, OPTION_REPLY, Request, SIMPLE_REPLY, answer, can, command,
    info, option,
};

use super::uri;
use crate::util::scratch;

/// What the server says it can do besides reading, writing, trimming and zeroing.
pub(super) const CHANGES: u16 = can::HAS_FLAGS | can::TRIM | can::WRITE_ZEROES;

/// What becomes of connections when the server crashes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    /// They end, as where the process dies.
    Told,
    /// Nothing more comes, as where the machine dies.
    Silent,
}

/// How the server behaves.
#[derive(Clone, Copy)]
pub(super) struct Manners {
    /// Transmission flags.
    pub(super) flags: u16,
    /// How long it thinks about each request.
    pub(super) delay: Duration,
    /// Most connections at once.
    pub(super) most: usize,
    /// Crashes once, instead of answering this write or the next one that comes while something
    /// would be lost.
    pub(super) crash_at_write: Option<usize>,
    /// A flush is answered after the next write is.
    pub(super) late_flush: bool,
}

impl Manners {
    pub(super) fn flags(flags: u16) -> Self {
        Self {
            flags,
            delay: Duration::ZERO,
            most: usize::MAX,
            crash_at_write: None,
            late_flush: false,
        }
    }
}

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) connection: usize,
    pub(super) command: u16,
    pub(super) flags: u16,
}

#[derive(Default)]
struct Disk {
    /// What a crash leaves.
    stable: Vec<u8>,
    volatile: Vec<u8>,
    /// Rises with each crash.
    life: usize,
    ends: Option<Ends>,
    streams: Vec<UnixStream>,
    connections: usize,
    open: usize,
    seen: Vec<Seen>,
    writes: usize,
    /// The next flush fails.
    fail_flush: bool,
    /// Something changed that a crash would lose.
    pending: bool,
}

impl Disk {
    fn crash(&mut self, ends: Ends) {
        self.volatile = self.stable.clone();
        self.pending = false;
        self.life += 1;
        self.ends = Some(ends);
        self.open = 0;
        for stream in self.streams.drain(..) {
            if ends == Ends::Told {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

/// The server, on a socket of its own.
pub(super) struct Fake {
    disk: Arc<Mutex<Disk>>,
    socket: PathBuf,
    pub(super) dir: TempDir,
}

impl Fake {
    pub(super) fn start(size: usize, manners: Manners) -> Self {
        let dir = scratch();
        let socket = dir.path().join("fake.sock");
        let listener = UnixListener::bind(&socket).expect("binds");
        let disk = Arc::new(Mutex::new(Disk {
            stable: vec![0; size],
            volatile: vec![0; size],
            ..Disk::default()
        }));
        let shared = Arc::clone(&disk);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let mut disk = shared.lock();
                disk.connections += 1;
                if disk.open >= manners.most {
                    continue;
                }
                disk.open += 1;
                disk.streams.push(stream.try_clone().expect("clones"));
                let client = Client {
                    stream,
                    manners,
                    number: disk.connections,
                    life: disk.life,
                    disk: Arc::clone(&shared),
                    owed: None,
                };
                drop(disk);
                // A client that leaves ends its thread.
                thread::spawn(move || client.serve());
            }
        });
        Self { disk, socket, dir }
    }

    pub(super) fn uri(&self) -> String {
        uri(&self.socket, "")
    }

    /// Forgets what was not flushed, and goes on.
    pub(super) fn crash(&self, ends: Ends) {
        self.disk.lock().crash(ends);
    }

    /// Has the next flush fail.
    pub(super) fn fail_flush(&self) {
        self.disk.lock().fail_flush = true;
    }

    /// Whether it crashed.
    pub(super) fn crashed(&self) -> bool {
        self.disk.lock().life > 0
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.disk.lock().seen.clone()
    }

    /// How many came, those who were not let in among them.
    pub(super) fn connections(&self) -> usize {
        self.disk.lock().connections
    }

    /// Connections that brought requests of a kind.
    pub(super) fn connections_with(&self, command: u16) -> usize {
        let seen = self.seen().into_iter();
        let mut numbers: Vec<_> = seen
            .filter(|s| s.command == command)
            .map(|s| s.connection)
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.len()
    }
}

struct Client {
    stream: UnixStream,
    manners: Manners,
    number: usize,
    life: usize,
    disk: Arc<Mutex<Disk>>,
    /// The cookie of a flush that is answered later.
    owed: Option<u64>,
}

impl Client {
    fn serve(mut self) -> Option<()> {
        self.agree()?;
        loop {
            let header = self.bytes(Headers::Simple.request_len())?;
            let request = Request::decode(Headers::Simple, &header)?;
            let payload = match request.command {
                command::WRITE => self.bytes(crate::util::len(request.len))?,
                command::DISCONNECT => {
                    let mut disk = self.disk.lock();
                    disk.open -= usize::from(disk.life == self.life);
                    return Some(());
                }
                _ => Vec::new(),
            };
            thread::sleep(self.manners.delay);
            self.carry_out(&request, &payload)?;
        }
    }

    fn agree(&mut self) -> Option<()> {
        self.send(&GREETING.to_be_bytes())?;
        self.send(&OPTION.to_be_bytes())?;
        self.send(&3u16.to_be_bytes())?;
        self.bytes(4)?;
        loop {
            let header = self.bytes(16)?;
            let mut fields = Fields::new(&header[8..]);
            let number = fields.u32()?;
            let len = fields.u32()?;
            self.bytes(usize::try_from(len).ok()?)?;
            if number != option::GO {
                self.answer(number, answer::UNSUPPORTED, &[])?;
                continue;
            }
            let size = self.disk.lock().stable.len() as u64;
            let mut main = info::EXPORT.to_be_bytes().to_vec();
            main.extend(size.to_be_bytes());
            main.extend(self.manners.flags.to_be_bytes());
            self.answer(number, answer::INFO, &main)?;
            return self.answer(number, answer::ACK, &[]);
        }
    }

    fn answer(&mut self, number: u32, kind: u32, data: &[u8]) -> Option<()> {
        let mut message = OPTION_REPLY.to_be_bytes().to_vec();
        message.extend(number.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(u32::try_from(data.len()).ok()?.to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    fn carry_out(&mut self, request: &Request, payload: &[u8]) -> Option<()> {
        let shared = Arc::clone(&self.disk);
        let mut disk = shared.lock();
        if disk.life != self.life {
            // The server that this was a connection to is no more.
            return (disk.ends == Some(Ends::Silent)).then_some(());
        }
        disk.seen.push(Seen {
            connection: self.number,
            command: request.command,
            flags: request.flags,
        });
        let start = crate::util::len(request.offset);
        let range = start..start + crate::util::len(request.len);
        let mut errno = 0;
        let mut data = Vec::new();
        match request.command {
            command::READ => data.extend(&disk.volatile[range.clone()]),
            command::WRITE => {
                disk.writes += 1;
                let is_time = |at| disk.writes >= at && disk.pending && disk.life == 0;
                if self.manners.crash_at_write.is_some_and(is_time) {
                    disk.crash(Ends::Told);
                    return None;
                }
                disk.volatile[range.clone()].copy_from_slice(payload);
            }
            command::TRIM | command::WRITE_ZEROES => disk.volatile[range.clone()].fill(0),
            command::FLUSH if std::mem::take(&mut disk.fail_flush) => errno = 5,
            command::FLUSH => {
                disk.stable = disk.volatile.clone();
                disk.pending = false;
            }
            _ => errno = 22,
        }
        disk.pending |= !matches!(request.command, command::READ | command::FLUSH);
        if request.flags & vdtool::nbd::wire::flag::FUA != 0 {
            let Disk {
                stable, volatile, ..
            } = &mut *disk;
            stable[range.clone()].copy_from_slice(&volatile[range]);
        }
        drop(disk);
        if request.command == command::FLUSH && self.manners.late_flush && self.owed.is_none() {
            self.owed = Some(request.cookie);
            return Some(());
        }
        self.reply(request.cookie, errno, &data)?;
        match self.owed.take() {
            Some(cookie) => self.reply(cookie, 0, &[]),
            None => Some(()),
        }
    }

    fn reply(&mut self, cookie: u64, errno: u32, data: &[u8]) -> Option<()> {
        let mut message = SIMPLE_REPLY.to_be_bytes().to_vec();
        message.extend(errno.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    fn bytes(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    fn send(&mut self, bytes: &[u8]) -> Option<()> {
        self.stream.write_all(bytes).ok()
    }
}
