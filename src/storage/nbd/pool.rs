//! Connections to one export: as many as are of use, made again when they are lost.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::socket::Socket;
use crate::nbd::tls;
use crate::nbd::uri::{Security, Uri};
use crate::nbd::wire::can;
use crate::storage::nbd::Options;
use crate::storage::nbd::connection::{Connection, Failure, Op};
use crate::storage::nbd::negotiate::{Facts, negotiate};

/// First wait before a connection is made again; doubles each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// The connections to one export.
#[derive(Debug)]
pub(super) struct Pool {
    uri: Uri,
    tls: Option<tls::Client>,
    options: Options,
    facts: Facts,
    places: Vec<Mutex<Option<Arc<Connection>>>>,
}

impl Pool {
    /// Makes the first connection.
    pub(super) fn connect(uri: Uri, options: Options) -> Result<Self> {
        let tls = match uri.security {
            Security::Plain => None,
            Security::Tls => Some(tls::Client::load(&uri.tls, &uri.address)?),
        };
        let first = connect(&uri, tls.as_ref(), &options)?;
        let facts = *first.facts();
        // Without the server's word a flush covers one connection only.
        let count = match facts.flags & can::MULTI_CONN {
            0 => 1,
            _ => options.connections.max(1),
        };
        let mut places: Vec<_> = (0..count).map(|_| Mutex::new(None)).collect();
        *places[0].get_mut() = Some(Arc::new(first));
        Ok(Self {
            uri,
            tls,
            options,
            facts,
            places,
        })
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Makes a request, again where its connection is lost.
    pub(super) fn call(&self, op: &mut Op<'_>) -> Result<()> {
        let mut give_up: Option<Instant> = None;
        let mut wait = FIRST_WAIT;
        loop {
            let error = match self.connection().and_then(|c| c.call(op)) {
                Ok(()) => return Ok(()),
                Err(Failure::Refused(error)) => return Err(error),
                // A server that speaks in tongues will do so again.
                Err(Failure::Lost(error)) if error.kind() == ErrorKind::Corrupt => {
                    return Err(error);
                }
                Err(Failure::Lost(error)) => error,
            };
            let now = Instant::now();
            match give_up {
                None => give_up = now.checked_add(self.options.retry),
                Some(until) if now >= until => {
                    let text = format!(
                        "{} (tried again for {} seconds)",
                        full_text(&error),
                        self.options.retry.as_secs()
                    );
                    return Err(Error::new(ErrorKind::Io, text));
                }
                Some(_) => {
                    std::thread::sleep(wait);
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
        }
    }

    /// The connection with the least to do; a new one where all have something.
    fn connection(&self) -> std::result::Result<Arc<Connection>, Failure> {
        let mut best: Option<Arc<Connection>> = None;
        let mut vacant = None;
        for place in &self.places {
            // Held by whoever connects there.
            let Some(held) = place.try_lock() else {
                continue;
            };
            match &*held {
                Some(connection) if !connection.is_lost() => {
                    let less = |b: &Arc<Connection>| connection.busy() < b.busy();
                    if best.as_ref().is_none_or(less) {
                        best = Some(Arc::clone(connection));
                    }
                }
                _ => vacant = vacant.or(Some(place)),
            }
        }
        match (best, vacant) {
            (Some(best), _) if best.busy() == 0 => Ok(best),
            (Some(best), None) => Ok(best),
            // A further connection is only for speed.
            (Some(best), Some(place)) => Ok(self.open(place).unwrap_or(best)),
            (None, Some(place)) => self.open(place),
            // Another thread is about to connect: with it.
            (None, None) => self.open(&self.places[0]),
        }
    }

    fn open(
        &self,
        place: &Mutex<Option<Arc<Connection>>>,
    ) -> std::result::Result<Arc<Connection>, Failure> {
        let mut held = place.lock();
        if let Some(connection) = held.as_ref().filter(|c| !c.is_lost()) {
            return Ok(Arc::clone(connection));
        }
        *held = None;
        let made = connect(&self.uri, self.tls.as_ref(), &self.options);
        let made = made.map_err(|e| match e.kind() {
            // What will not be better next time.
            ErrorKind::Corrupt | ErrorKind::Unsupported => Failure::Refused(e),
            _ => Failure::Lost(e),
        })?;
        let (now, before) = (made.facts(), &self.facts);
        let same = Facts {
            context: now.context.and(before.context),
            ..*now
        };
        if same != *before {
            let text = format!(
                "the export is another one than before the connection was lost ({} bytes, \
                 before: {})",
                now.size, before.size
            );
            return Err(Failure::Refused(Error::new(ErrorKind::Io, text)));
        }
        let made = Arc::new(made);
        *held = Some(Arc::clone(&made));
        Ok(made)
    }
}

fn connect(uri: &Uri, tls: Option<&tls::Client>, options: &Options) -> Result<Connection> {
    let until = Instant::now().checked_add(options.timeout);
    let socket = Socket::connect(&uri.address, options.timeout);
    let socket = socket.map_err(|e| Error::io("connect", e))?;
    let agreed = negotiate(socket, &uri.export, tls, until)?;
    Ok(Connection::new(agreed, options.timeout))
}

/// An error with its cause.
pub(super) fn full_text(error: &Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
