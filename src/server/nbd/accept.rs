//! Clients come, and the server ends.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::error::Error;
use crate::nbd::Link;
use crate::nbd::socket::Socket;
use crate::server::nbd::guests::Presence;
use crate::server::nbd::handshake::Handshake;
use crate::server::nbd::listen::Listener;
use crate::server::nbd::server::Shared;
use crate::server::nbd::session::Session;

/// How long a client beyond the limit may take to hear that it is.
const TURN_AWAY: Duration = Duration::from_secs(2);
/// How long requests under way have to end, and clients to take their replies, at the end.
const GRACE: Duration = Duration::from_secs(5);
/// Wait where the process has no descriptors or memory left.
const PATIENCE: Duration = Duration::from_millis(100);
/// Stacks are small: nothing here recurses.
const STACK: usize = 256 << 10;

/// Starts the thread that accepts clients.
pub(super) fn start(listener: Listener, shared: Arc<Shared>) -> io::Result<JoinHandle<()>> {
    thread("nbd-accept", move || {
        let failure = accept(&listener, &shared).err();
        shared.gate.stop();
        drop(listener);
        // What was asked is still answered.
        let guests = Arc::clone(&shared.guests);
        drop(shared);
        guests.shutdown(Shutdown::Read);
        guests.wait_empty(GRACE);
        guests.shutdown(Shutdown::Both);
        // Only requests that the storage keeps are left, and they end when it lets go.
        guests.wait_empty(Duration::from_secs(u32::MAX.into()));
        guests.ended(failure.map(|e| Error::io("accept clients", e)));
    })
}

pub(super) fn thread(
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    builder(name).spawn(run)
}

pub(super) fn builder(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK)
}

fn accept(listener: &Listener, shared: &Arc<Shared>) -> io::Result<()> {
    loop {
        let mut fds: Vec<PollFd<'_>> = listener
            .sockets()
            .map(|s| PollFd::from_borrowed_fd(s, PollFlags::IN))
            .collect();
        fds.push(PollFd::from_borrowed_fd(
            shared.guests.wake.as_fd(),
            PollFlags::IN,
        ));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        if fds.last().is_some_and(|f| !f.revents().is_empty()) {
            // Before looking why, so that no later reason is taken for this one.
            let _ = rustix::io::read(&shared.guests.wake, &mut [0; 8]);
        }
        if shared.gate.is_stopping() {
            return Ok(());
        }
        let ready: Vec<usize> = (0..fds.len() - 1)
            .filter(|&i| !fds[i].revents().is_empty())
            .collect();
        for index in ready {
            match listener.accept(index) {
                Ok(Some(socket)) => welcome(socket, shared),
                Ok(None) => {}
                Err(e) if is_passing(&e) => std::thread::sleep(PATIENCE),
                Err(e) => return Err(e),
            }
        }
        // Not sooner: where another came just as the last one left, it is not the last.
        if shared.guests.is_over() {
            return Ok(());
        }
    }
}

/// Whether the host may take clients again later.
fn is_passing(error: &io::Error) -> bool {
    let passing = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::EPERM,
    ];
    error.raw_os_error().is_some_and(|e| passing.contains(&e))
}

fn welcome(socket: OwnedFd, shared: &Arc<Shared>) {
    let socket = Arc::new(Socket::new(socket));
    let Some(mut presence) = shared.guests.enter(&socket) else {
        return;
    };
    let shared = Arc::clone(shared);
    let started = thread("nbd-client", move || {
        meet(socket, shared, &mut presence);
        // Last: whoever waits for it may rely on the rest being gone.
        drop(presence);
    });
    // Without a thread the client is closed, which is all that can be done.
    drop(started);
}

/// One client, from its first word to its last.
fn meet(socket: Arc<Socket>, shared: Arc<Shared>, presence: &mut Presence) {
    let limit = match presence.has_place() {
        true => shared.options.handshake,
        false => TURN_AWAY,
    };
    let until = Instant::now().checked_add(limit);
    let mut link = Link::plain(socket);
    let agreed = Handshake::new(&shared, &mut link, until, presence).run();
    // Whatever went wrong, the client is the only one to tell, and it is gone or out of step.
    if let Ok(Some(agreed)) = agreed {
        shared.guests.used();
        Session::new(shared, link, agreed, presence.number).run();
    }
}
