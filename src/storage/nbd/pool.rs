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
use crate::storage::nbd::losses::Losses;
use crate::storage::nbd::negotiate::{Facts, negotiate};

/// First wait before a connection is made again; doubles each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// How long a further connection is not tried again after the server would not have it.
const PAUSE: Duration = Duration::from_secs(10);

/// The connections to one export.
#[derive(Debug)]
pub(super) struct Pool {
    uri: Uri,
    /// The metadata context that tells of extents.
    context: String,
    tls: Option<tls::Client>,
    options: Options,
    facts: Facts,
    losses: Arc<Losses>,
    places: Vec<Place>,
}

/// Where one connection is, or may be.
#[derive(Debug, Default)]
struct Place {
    /// Held by whoever makes one; when and how that failed last.
    making: Mutex<Option<(Instant, String)>>,
    current: Mutex<Option<Arc<Connection>>>,
}

impl Place {
    /// The connection that is there and of use.
    fn live(&self) -> Option<Arc<Connection>> {
        self.current.lock().clone().filter(|c| !c.is_lost())
    }
}

impl Pool {
    /// Makes the first connection; extents are told of in `context`.
    pub(super) fn connect(uri: Uri, context: String, options: Options) -> Result<Self> {
        let tls = match uri.security {
            Security::Plain => None,
            Security::Tls => Some(tls::Client::load(&uri.tls, &uri.address)?),
        };
        let losses = Arc::default();
        let first = connect(&uri, &context, tls.as_ref(), &options, &losses)?;
        let facts = *first.facts();
        // Without the server's word a flush covers one connection only.
        let count = match facts.flags & can::MULTI_CONN {
            0 => 1,
            _ => options.connections.max(1),
        };
        let places: Vec<_> = (0..count).map(|_| Place::default()).collect();
        *places[0].current.lock() = Some(Arc::new(first));
        Ok(Self {
            uri,
            context,
            tls,
            options,
            facts,
            losses,
            places,
        })
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Makes all completed changes durable.
    ///
    /// # Errors
    /// The server's; that connections were lost with changes that were not flushed.
    pub(super) fn flush(&self) -> Result<()> {
        let mut sent = false;
        for place in &self.places {
            let current = place.current.lock().clone();
            let Some(connection) = current.filter(|c| c.is_pending()) else {
                continue;
            };
            // Each of them, though one would do: only a reply over the connection that had the
            // changes shows that the server is the one that has them.
            match connection.call(&mut Op::Flush) {
                Err(Failure::Refused(error)) => return Err(error),
                // Noted, unless another flush came first.
                Ok(()) | Err(Failure::Lost(_)) => sent = true,
            }
        }
        if !sent {
            // There may be what others wrote; and nothing of ours, so that any server will do.
            self.call(&mut Op::Flush)?;
        }
        self.losses.none()
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
            match place.live() {
                Some(found) if best.as_ref().is_none_or(|b| found.busy() < b.busy()) => {
                    best = Some(found);
                }
                Some(_) => {}
                None => vacant = vacant.or(Some(place)),
            }
        }
        match (best, vacant) {
            (Some(best), Some(place)) if best.busy() > 0 => Ok(self.further(place).unwrap_or(best)),
            (Some(best), _) => Ok(best),
            (None, vacant) => self.open(vacant.unwrap_or(&self.places[0])),
        }
    }

    /// A further connection, which is only for speed; `None`: go on with those there are.
    fn further(&self, place: &Place) -> Option<Arc<Connection>> {
        let mut making = place.making.try_lock()?;
        if let Some((failed, _)) = &*making
            && failed.elapsed() < PAUSE
        {
            return None;
        }
        self.make(place, &mut making).ok()
    }

    /// The connection at a place; made with whoever else needs it.
    fn open(&self, place: &Place) -> std::result::Result<Arc<Connection>, Failure> {
        let asked = Instant::now();
        let mut making = place.making.lock();
        if let Some(connection) = place.live() {
            return Ok(connection);
        }
        match &*making {
            // Tried in vain while this thread waited for its turn to.
            Some((failed, why)) if *failed >= asked => {
                Err(Failure::Lost(Error::new(ErrorKind::Io, why.clone())))
            }
            _ => self.make(place, &mut making),
        }
    }

    fn make(
        &self,
        place: &Place,
        failed: &mut Option<(Instant, String)>,
    ) -> std::result::Result<Arc<Connection>, Failure> {
        let made = connect(
            &self.uri,
            &self.context,
            self.tls.as_ref(),
            &self.options,
            &self.losses,
        );
        let made = made.map_err(|e| {
            *failed = Some((Instant::now(), full_text(&e)));
            match e.kind() {
                // What will not be better next time.
                ErrorKind::Corrupt | ErrorKind::Unsupported => Failure::Refused(e),
                _ => Failure::Lost(e),
            }
        })?;
        let (now, before) = (made.facts(), &self.facts);
        let same = Facts {
            context: now.context.and(before.context),
            ..*now
        };
        if same != *before {
            let text = format!(
                "the export is another one than before the connection was lost: {}",
                before.changes(&same).join(", ")
            );
            *failed = Some((Instant::now(), text.clone()));
            return Err(Failure::Refused(Error::new(ErrorKind::Io, text)));
        }
        *failed = None;
        let made = Arc::new(made);
        *place.current.lock() = Some(Arc::clone(&made));
        Ok(made)
    }
}

fn connect(
    uri: &Uri,
    context: &str,
    tls: Option<&tls::Client>,
    options: &Options,
    losses: &Arc<Losses>,
) -> Result<Connection> {
    let until = Instant::now().checked_add(options.timeout);
    let socket = Socket::connect(&uri.address, options.timeout);
    let socket = socket.map_err(|e| Error::io("connect", e))?;
    let agreed = negotiate(socket, &uri.export, context, tls, until)?;
    Ok(Connection::new(agreed, options.timeout, Arc::clone(losses)))
}

/// An error with its cause.
pub(super) fn full_text(error: &Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
