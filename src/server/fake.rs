//! A server without a kernel or a network: tests are its clients.

use parking_lot::{Condvar, Mutex};

use crate::backend::{Kind, QueueId, Request};
use crate::error::{Error, Result};
use crate::server::{Export, Server};

#[derive(Debug, Default)]
struct State {
    stopped: Option<Result<(), String>>,
    resized: Vec<(String, u64)>,
    /// Clients cannot be told of another size.
    fixed: bool,
    handed_over: bool,
}

/// Hands requests of tests to the exports.
#[derive(Debug)]
pub(crate) struct FakeServer {
    exports: Vec<Export>,
    state: Mutex<State>,
    changed: Condvar,
}

impl FakeServer {
    pub(crate) fn start(exports: Vec<Export>) -> Self {
        Self {
            exports,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// A request of a client.
    pub(crate) fn request(&self, export: usize, request: Request<'_>) -> Result<()> {
        self.exports[export].backend.submit(QueueId(0), request)
    }

    /// The server can no longer go on.
    pub(crate) fn fail(&self, why: &str) {
        self.state.lock().stopped = Some(Err(why.to_owned()));
        self.changed.notify_all();
    }

    /// From now on clients cannot be told of another size.
    pub(crate) fn fix_size(&self) {
        self.state.lock().fixed = true;
    }

    /// Whether clients were left to the next server.
    pub(crate) fn was_handed_over(&self) -> bool {
        self.state.lock().handed_over
    }

    /// What clients were told of sizes.
    pub(crate) fn resized_to(&self) -> Vec<(String, u64)> {
        self.state.lock().resized.clone()
    }
}

impl Server for FakeServer {
    fn addresses(&self) -> Vec<String> {
        self.exports
            .iter()
            .map(|e| format!("fake:{}", e.name))
            .collect()
    }

    fn wait(&self) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            match &state.stopped {
                Some(Ok(())) => return Ok(()),
                Some(Err(why)) => return Err(Error::invalid(why.clone())),
                None => self.changed.wait(&mut state),
            }
        }
    }

    fn stop(&self) {
        self.state.lock().stopped.get_or_insert(Ok(()));
        self.changed.notify_all();
    }

    fn hand_over(&self) -> Result<()> {
        self.exports.iter().for_each(|e| e.backend.pause());
        self.state.lock().handed_over = true;
        self.stop();
        Ok(())
    }

    fn may_resize(&self, _: &Export) -> Result<()> {
        match self.state.lock().fixed {
            true => Err(Error::unsupported("clients keep the size")),
            false => Ok(()),
        }
    }

    fn merged(&self, export: usize, kind: Kind) -> Option<u64> {
        (kind == Kind::Read).then_some(export as u64 + 3)
    }

    fn resized(&self, export: &Export) -> Result<()> {
        let size = export.backend.geometry().virtual_size;
        self.state.lock().resized.push((export.name.clone(), size));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::Backend;
    use crate::chain::{Base, Chain};
    use crate::formats::raw;
    use crate::image::open::OpenOptions;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_server_ends_when_it_is_stopped_or_fails_and_tells_of_sizes() {
        let storage = Arc::new(MemoryStorage::from_bytes(&[5; 512]));
        let image = (raw::DRIVER.open)(storage, &OpenOptions::default()).expect("opens");
        let chain = Chain::new(vec![image], Base::Zeroes, Arc::default()).expect("one layer");
        let export = Export {
            name: "a".to_owned(),
            description: String::new(),
            backend: Arc::new(Backend::new(chain)),
        };
        let server = FakeServer::start(vec![export.clone()]);
        let mut buf = [0; 2];
        let read = Request::Read {
            at: 0,
            buf: &mut buf,
        };
        server.request(0, read).expect("reads");
        assert_eq!(buf, [5; 2]);
        server.resized(&export).expect("tells");
        assert_eq!(server.resized_to(), [("a".to_owned(), 512)]);
        server.stop();
        server.wait().expect("was stopped");
        let server = FakeServer::start(vec![export]);
        server.fail("lost");
        assert_eq!(server.wait().expect_err("failed").message(), "lost");
        assert_eq!(server.addresses(), ["fake:a"]);
    }
}
