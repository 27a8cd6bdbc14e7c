//! NBD: our server with other clients, our client with other servers, and both with peers that
//! mean no good.

mod client;
mod crowd;
mod dirty;
mod fake;
mod filters;
mod flushes;
mod fuzz;
mod handshake;
mod hostile;
mod peers;
mod requests;
mod serve;
mod tls;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vdtool::backend::Backend;
use vdtool::chain::open::{ChainOptions, open};
use vdtool::nbd::uri::Address;
use vdtool::server::nbd::{Listen, Options, Persistence, start};
use vdtool::server::{Export, Server};

use crate::util::scratch;

/// How long a test waits for what is to happen at once.
const SOON: Duration = Duration::from_secs(20);

/// A server in this process, with a directory for its socket and its images.
pub(super) struct Serving {
    pub(super) server: Arc<dyn Server>,
    pub(super) socket: PathBuf,
    pub(super) dir: TempDir,
}

/// Options under which a server goes on until it is dropped.
pub(super) fn lasting() -> Options {
    Options {
        persistence: Persistence::Stopped,
        ..Options::default()
    }
}

/// One export of an image.
pub(super) fn export(name: &str, image: &Path, options: &ChainOptions) -> Export {
    let chain = open(image, options).expect("the image opens");
    Export {
        name: name.to_owned(),
        description: format!("the disk {name}"),
        backend: Arc::new(Backend::new(chain)),
    }
}

impl Serving {
    /// Serves exports on a Unix socket.
    pub(super) fn new(dir: TempDir, exports: Vec<Export>, options: Options) -> Self {
        let socket = dir.path().join("server.sock");
        let listen = Listen::Address(Address::Unix(socket.clone()));
        let server = start(&listen, exports, options).expect("the server starts");
        Self {
            server,
            socket,
            dir,
        }
    }

    /// Serves a raw image of these bytes, for writing, under the empty name.
    pub(super) fn raw(bytes: &[u8], options: Options) -> Self {
        let dir = scratch();
        let image = dir.path().join("disk.raw");
        std::fs::write(&image, bytes).expect("writes the image");
        let exports = vec![export("", &image, &ChainOptions::write())];
        Self::new(dir, exports, options)
    }

    pub(super) fn uri(&self, export: &str) -> String {
        uri(&self.socket, export)
    }

    pub(super) fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }
}

/// The URI of an export on a Unix socket.
pub(super) fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// A peer that serves, ended when it is dropped.
pub(super) struct Peer(Child);

impl Peer {
    /// Starts it and waits until its socket is there.
    pub(super) fn start(tool: &str, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(tool)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("the peer starts");
        let peer = Self(child);
        until("the peer listens", || {
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        });
        peer
    }
}

impl Peer {
    /// Ends it as a crash does.
    pub(super) fn kill(&mut self) {
        // Ended by itself is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a further client gets what it wants.
pub(super) fn is_served(socket: &Path) -> bool {
    let options = vdtool::storage::nbd::Options::new(vdtool::storage::open::Access::Read);
    vdtool::storage::nbd::open(&uri(socket, ""), &options).is_ok()
}

/// Waits until something holds; panics where it does not for long.
pub(super) fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
