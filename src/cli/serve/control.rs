//! The control socket: commands of `vdtool ctl` to a serving process.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use rustix::fs::Mode;
use serde_json::{Value, json};

use super::event::whole;
use super::order;
use super::run::Front;
use crate::cli::ctl::{Line, MAX_COMMAND, Order};
use crate::cli::io::words;
use crate::cli::removed::Removed;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::align::len64;
use crate::util::text::printable;

/// Most clients at a time.
const MAX_CLIENTS: usize = 64;

/// Longest that a client may take for a command, or for reading an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A socket that nobody can connect to yet but its owner.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    file: Removed,
}

/// Makes the socket, for its owner alone.  One that a dead process left is replaced.
///
/// # Errors
/// The host's; `Locked` where somebody listens; a file that is no socket.
pub(super) fn bind(path: &Path) -> Result<Socket> {
    remove_stale(path).at(path)?;
    // No moment passes in which others could connect.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.map_err(|e| Error::io("listen on the socket", e).at(path))?;
    let file = Removed::at(path).map_err(|e| Error::io("open its directory", e).at(path))?;
    Ok(Socket { listener, file })
}

fn remove_stale(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::invalid("is there already, and is not a socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(
            ErrorKind::Locked,
            "another process listens on this socket",
        )),
        Err(_) => std::fs::remove_file(path).map_err(|e| Error::io("remove the old socket", e)),
    }
}

/// Takes commands from now on, until the process ends; the socket's file goes with the answer.
///
/// # Errors
/// The host's.
pub(super) fn listen(socket: Socket, front: &Arc<Front>) -> Result<Removed> {
    let Socket { listener, file } = socket;
    let front = Arc::clone(front);
    let clients = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => take(stream, &front, &clients),
                // Too many files are open, for one: others may be closed soon.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(accept)
        .map_err(|e| Error::io("start a thread", e))?;
    Ok(file)
}

/// Gives a client a thread of its own: one that hangs is in nobody's way.
fn take(stream: UnixStream, front: &Arc<Front>, clients: &Arc<AtomicUsize>) {
    let mut stream = stream;
    // Without them a client could hold its place for ever.
    let set = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    if set.is_err() {
        return;
    }
    if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
        let text = format!("too many clients (allowed: {MAX_CLIENTS})");
        // Short enough never to block.
        let _ = writeln!(stream, "{}", failure("failed", &text));
        clients.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    let (front, counted) = (Arc::clone(front), Arc::clone(clients));
    let talk = move || {
        // Whatever ends a connection ends this connection alone.
        let _ = converse(&stream, &front);
        counted.fetch_sub(1, Ordering::SeqCst);
    };
    let thread = std::thread::Builder::new().name("control client".to_owned());
    if thread.spawn(talk).is_err() {
        clients.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers commands until the client leaves.
fn converse(stream: &UnixStream, front: &Front) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut bytes = Vec::new();
        let limit = len64(MAX_COMMAND);
        let read = (&mut reader).take(limit).read_until(b'\n', &mut bytes)?;
        if read == 0 {
            return Ok(());
        }
        if bytes.last() != Some(&b'\n') && read == MAX_COMMAND {
            let text = format!("the command is longer than {MAX_COMMAND} bytes");
            // What follows cannot be told from the next command.
            return writeln!(writer, "{}", failure("usage", &text));
        }
        let order = match parse(&bytes) {
            Ok(None) => continue,
            Ok(Some(order)) => order,
            Err(why) => {
                writeln!(writer, "{}", failure("usage", &why))?;
                continue;
            }
        };
        let written = writeln!(writer, "{}", answer(&order, front));
        match order {
            Order::Stop { force: true, .. } => front.abandon(),
            Order::Stop { force: false, .. } => front.ending.heard(),
            _ => {}
        }
        written?;
    }
}

/// What a line says; nothing where it is empty.
fn parse(line: &[u8]) -> Result<Option<Order>, String> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let words = words::split(line.strip_suffix(b"\r").unwrap_or(line))?;
    if words.is_empty() {
        return Ok(None);
    }
    match Line::try_parse_from(&words) {
        Ok(line) => Ok(Some(line.order)),
        Err(e) => Err(printable(&crate::cli::one_line(&e.to_string()))),
    }
}

/// Carries out a command.  A panic is an error of this command alone.
fn answer(order: &Order, front: &Front) -> Value {
    let done = catch_unwind(AssertUnwindSafe(|| order::carry_out(order, front)));
    match done {
        Ok(Ok(value)) => json!({ "return": value }),
        Ok(Err(error)) => match error.downcast_ref::<Error>() {
            Some(e) => failure(class(e.kind()), &whole(e)),
            None => failure("usage", &format!("{error:#}")),
        },
        Err(_) => failure("failed", "the command met a bug and was given up"),
    }
}

fn failure(class: &str, message: &str) -> Value {
    json!({ "error": { "class": class, "message": message } })
}

fn class(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound => "not-found",
        ErrorKind::Locked => "locked",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::ReadOnly => "read-only",
        ErrorKind::NoSpace => "no-space",
        _ => "failed",
    }
}
