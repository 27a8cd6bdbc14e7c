//! What all connections of a server share, and the server as its owner sees it.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use crate::backend::WakeHandle;
use crate::error::{Error, Result};
use crate::nbd::tls;
use crate::nbd::uri::{Security, Uri};
use crate::nbd::wire::{Headers, MAX_PAYLOAD, MAX_STRING, can};
use crate::server::nbd::budget::Budget;
use crate::server::nbd::gate::Gate;
use crate::server::nbd::guests::Guests;
use crate::server::nbd::listen::{Listen, Listener};
use crate::server::nbd::{Options, accept, bitmap};
use crate::server::{Export, Server};

/// Smallest block size that is called the best.
const PREFERRED: u32 = 4096;

/// An export with what is told of it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) export: Export,
    /// Names of the dirty bitmaps that clients may look at.
    pub(super) bitmaps: Vec<String>,
}

/// Lengths of requests, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockSizes {
    pub(super) min: u32,
    pub(super) preferred: u32,
    pub(super) max: u32,
}

impl Served {
    pub(super) fn size(&self) -> u64 {
        self.export.backend.geometry().virtual_size
    }

    pub(super) fn block_sizes(&self) -> BlockSizes {
        let geometry = self.export.backend.geometry();
        // The protocol allows no more than these.
        let min = geometry.logical_block_size.clamp(1, 64 << 10);
        let preferred = geometry.physical_block_size.max(PREFERRED);
        let preferred = preferred.clamp(min, MAX_PAYLOAD);
        BlockSizes {
            min,
            preferred,
            max: MAX_PAYLOAD,
        }
    }

    /// Transmission flags.
    pub(super) fn flags(&self, headers: Headers) -> u16 {
        let always = can::HAS_FLAGS | can::FLUSH | can::MULTI_CONN | can::CACHE;
        let chunks = match headers {
            Headers::Simple => 0,
            Headers::Structured | Headers::Extended => can::DF,
        };
        let access = match self.export.backend.geometry().writable {
            true => can::FUA | can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO,
            false => can::READ_ONLY,
        };
        always | chunks | access
    }
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) exports: Vec<Arc<Served>>,
    pub(super) tls: Option<tls::Server>,
    pub(super) options: Options,
    pub(super) budget: Arc<Budget>,
    pub(super) gate: Arc<Gate>,
    pub(super) guests: Arc<Guests>,
}

impl Shared {
    /// The export of a name.
    pub(super) fn find(&self, name: &str) -> Option<Arc<Served>> {
        let exact = self.exports.iter().find(|e| e.export.name == name);
        let first = || self.exports.first().filter(|_| name.is_empty());
        exact.or_else(first).cloned()
    }

    pub(super) fn stop(&self) {
        self.gate.stop();
        self.guests.rouse();
    }
}

/// A running server.
#[derive(Debug)]
pub(super) struct NbdServer {
    shared: Arc<Shared>,
    addresses: Vec<String>,
    accepting: Mutex<Option<JoinHandle<()>>>,
    _wakers: Vec<WakeHandle>,
}

impl NbdServer {
    pub(super) fn start(listen: &Listen, exports: Vec<Export>, options: Options) -> Result<Self> {
        check_names(&exports)?;
        let mut served = Vec::with_capacity(exports.len());
        for export in exports {
            for name in &options.bitmaps {
                bitmap::check(&export.backend, name)?;
            }
            let bitmaps = options.bitmaps.clone();
            served.push(Arc::new(Served { export, bitmaps }));
        }
        let listener = Listener::open(listen)?;
        let security = match options.tls {
            Some(_) => Security::Tls,
            None => Security::Plain,
        };
        let uri = |e: &Arc<Served>| Uri::of(listener.address(), security, &e.export.name);
        let addresses = served.iter().map(uri).collect();
        let gate = Arc::new(Gate::default());
        let wakers = served.iter().map(|e| {
            let gate = Arc::clone(&gate);
            e.export.backend.on_wake(move || gate.wake())
        });
        let wakers = wakers.collect();
        let shared = Arc::new(Shared {
            exports: served,
            tls: options.tls.clone(),
            budget: Arc::new(Budget::new(options.memory)),
            gate,
            guests: Arc::new(Guests::new(options.connections, options.persistence)?),
            options,
        });
        let accepting = accept::start(listener, Arc::clone(&shared))
            .map_err(|e| Error::io("start a thread", e))?;
        Ok(Self {
            shared,
            addresses,
            accepting: Mutex::new(Some(accepting)),
            _wakers: wakers,
        })
    }
}

fn check_names(exports: &[Export]) -> Result<()> {
    if exports.is_empty() {
        return Err(Error::invalid("there is nothing to serve"));
    }
    for (index, export) in exports.iter().enumerate() {
        for (what, text) in [("name", &export.name), ("description", &export.description)] {
            if text.len() > MAX_STRING || text.contains('\0') {
                return Err(Error::invalid(format!(
                    "the {what} of an export has {} bytes (allowed: {MAX_STRING}, none of them \
                     zero)",
                    text.len()
                )));
            }
        }
        if exports[..index].iter().any(|e| e.name == export.name) {
            return Err(Error::invalid(format!(
                "two exports are called '{}'",
                crate::util::text::printable(&export.name)
            )));
        }
    }
    Ok(())
}

impl Server for NbdServer {
    fn addresses(&self) -> Vec<String> {
        self.addresses.clone()
    }

    fn wait(&self) -> Result<()> {
        self.shared.guests.wait_ended()
    }

    fn stop(&self) {
        self.shared.stop();
    }

    /// Connected clients cannot be told, but may use the new size at once; those that connect
    /// from now on are told.
    fn resized(&self, _export: &Export) -> Result<()> {
        Ok(())
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(accepting) = self.accepting.lock().take() {
            // A panic there was reported where it happened.
            let _ = accepting.join();
        }
    }
}
