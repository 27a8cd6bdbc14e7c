//! Who is connected, and who of them may use an export.
//!
//! There are only so many places.  A client that has hung up keeps its place until its last request
//! has ended, and the server may not even have come to see that it hung up; so whoever finds no
//! place while others leave waits for one, for a bounded time and in bounded company.  That a client
//! hung up is seen late too (its socket is a forked child's as well for a moment, or the network is
//! slower with its last packet than with another's first), so who finds nobody leaving waits a
//! little as well.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result};
use crate::nbd::socket::Socket;
use crate::server::nbd::Persistence;

/// Clients without a place that are talked to at the same time, besides one for each place that is
/// about to be free; the others are just closed.
const TURNED_AWAY: usize = 16;
/// How long a client without a place waits for one that is about to be free.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long it waits for somebody to be seen leaving.
const BRIEFLY: Duration = Duration::from_millis(300);

/// Who is there, and whether the server goes on.  Knows no exports: once the last client is gone
/// from here, nothing of the server holds a disk any more but its owner.
#[derive(Debug)]
pub(super) struct Guests {
    /// How many places there are.
    most: usize,
    persistence: Persistence,
    clients: Mutex<Clients>,
    changed: Condvar,
    /// Readable once the server is to end, or may.
    pub(super) wake: OwnedFd,
}

/// The clients that are there.
#[derive(Debug, Default)]
struct Clients {
    here: HashMap<u64, Guest>,
    next: u64,
    /// How many of them have a place.
    placed: usize,
    /// Whether one got as far as that.
    used: bool,
    ended: bool,
    failure: Option<Error>,
}

#[derive(Debug)]
struct Guest {
    socket: Arc<Socket>,
    /// Whether it may go on to use an export.
    has_place: bool,
}

/// A client that is there, until this is dropped.
#[derive(Debug)]
pub(super) struct Presence {
    guests: Arc<Guests>,
    pub(super) number: u64,
    has_place: bool,
}

impl Guests {
    /// Nobody is there yet.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(most: usize, persistence: Persistence) -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            most: most.max(1),
            persistence,
            clients: Mutex::default(),
            changed: Condvar::new(),
            wake: eventfd(0, flags).map_err(|e| Error::io("make an eventfd", e.into()))?,
        })
    }

    /// Takes note of a client, with a place where one is free; `None`: there are so many without
    /// that it cannot even be told.  Never waits.
    pub(super) fn enter(self: &Arc<Self>, socket: &Arc<Socket>) -> Option<Presence> {
        let mut clients = self.clients.lock();
        let has_place = clients.placed < self.most;
        if !has_place {
            let others = clients.here.len() - clients.placed;
            if others >= TURNED_AWAY && others - TURNED_AWAY >= clients.leaving() {
                return None;
            }
        }
        clients.placed += usize::from(has_place);
        let number = clients.next;
        clients.next += 1;
        let guest = Guest {
            socket: Arc::clone(socket),
            has_place,
        };
        clients.here.insert(number, guest);
        Some(Presence {
            guests: Arc::clone(self),
            number,
            has_place,
        })
    }

    /// A client uses an export.
    pub(super) fn used(&self) {
        self.clients.lock().used = true;
    }

    /// Whether the last client has left a server that was to serve no longer.  One without a place
    /// may yet get that of another.
    pub(super) fn is_over(&self) -> bool {
        let clients = self.clients.lock();
        self.persistence == Persistence::LastClient && clients.used && clients.here.is_empty()
    }

    /// Ends the connections, or one direction of them.
    pub(super) fn shutdown(&self, how: Shutdown) {
        for guest in self.clients.lock().here.values() {
            guest.socket.shutdown(how);
        }
    }

    /// Waits until no client is there, no longer than `limit`.
    pub(super) fn wait_empty(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut clients = self.clients.lock();
        while !clients.here.is_empty() {
            if self.changed.wait_until(&mut clients, until).timed_out() {
                return;
            }
        }
    }

    /// The server has ended.
    pub(super) fn ended(&self, failure: Option<Error>) {
        let mut clients = self.clients.lock();
        clients.ended = true;
        clients.failure = failure;
        self.changed.notify_all();
    }

    /// Waits until the server has ended.
    ///
    /// # Errors
    /// Why it ended by itself; told once.
    pub(super) fn wait_ended(&self) -> Result<()> {
        let mut clients = self.clients.lock();
        while !clients.ended {
            self.changed.wait(&mut clients);
        }
        clients.failure.take().map_or(Ok(()), Err)
    }

    /// Has the accepting thread look whether it is to end.
    pub(super) fn rouse(&self) {
        // Fails only where it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Clients {
    /// How many places are about to be free, because who has them is gone.
    fn leaving(&self) -> usize {
        let placed = self.here.values().filter(|guest| guest.has_place);
        Socket::hung_up(placed.map(|guest| &*guest.socket))
    }
}

impl Presence {
    /// Whether the client may use an export.
    pub(super) fn has_place(&self) -> bool {
        self.has_place
    }

    /// Gets a place for a client that has none: waits for one, briefly, and for longer where others
    /// are leaving.  False: there is none to be had.
    pub(super) fn await_place(&mut self) -> bool {
        let start = Instant::now();
        let mut patience = BRIEFLY;
        let guests = Arc::clone(&self.guests);
        let mut clients = guests.clients.lock();
        let is_full = |clients: &Clients| clients.placed >= guests.most;
        while is_full(&clients) {
            let waited = guests.changed.wait_until(&mut clients, start + patience);
            if waited.timed_out() && is_full(&clients) {
                if patience == PATIENCE || clients.leaving() == 0 {
                    return false;
                }
                patience = PATIENCE;
            }
        }
        clients.placed += 1;
        if let Some(guest) = clients.here.get_mut(&self.number) {
            guest.has_place = true;
        }
        self.has_place = true;
        true
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut clients = self.guests.clients.lock();
        clients.here.remove(&self.number);
        clients.placed -= usize::from(self.has_place);
        self.guests.changed.notify_all();
        drop(clients);
        if self.guests.is_over() {
            self.guests.rouse();
        }
    }
}
