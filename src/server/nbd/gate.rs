//! Requests that have to wait, because the disk is paused or limited, until the server stops.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::backend::{Admission, Backend, QueueId, Request, Verdict};
use crate::error::{Error, Result};

/// Longest wait before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Where requests wait.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wakes: u64,
    stopping: bool,
}

impl Gate {
    /// Has all that wait look again.
    pub(super) fn wake(&self) {
        self.state.lock().wakes += 1;
        self.changed.notify_all();
    }

    /// From now on nobody waits.
    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Whether the server is to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.state.lock().stopping
    }

    /// Runs a request, however long it has to wait.
    ///
    /// # Errors
    /// As [`Backend::submit`]; with errno `ESHUTDOWN` where it had to wait and the server ends.
    pub(super) fn submit(
        &self,
        backend: &Backend,
        queue: QueueId,
        mut request: Request<'_>,
    ) -> Result<()> {
        let shape = request.shape();
        loop {
            let seen = self.state.lock().wakes;
            let until = match backend.admit(queue, &shape) {
                Admission::Admitted(ticket) => {
                    let result = backend.execute(&ticket, &mut request);
                    match backend.complete(ticket, result) {
                        Verdict::Answer(answer) => return answer,
                        Verdict::Hold => Instant::now() + LOOK_AGAIN,
                    }
                }
                Admission::NotBefore(at) => at.min(Instant::now() + LOOK_AGAIN),
                Admission::Held => Instant::now() + LOOK_AGAIN,
                Admission::Refused(error) => return Err(error),
            };
            let mut state = self.state.lock();
            while state.wakes == seen && !state.stopping {
                if self.changed.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            if state.stopping {
                let gone = std::io::Error::from_raw_os_error(libc::ESHUTDOWN);
                return Err(Error::io("wait for the disk", gone));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::{Base, Chain};
    use crate::formats::raw;
    use crate::image::open::OpenOptions;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_request_waits_for_a_paused_disk_until_that_goes_on_or_the_server_ends() {
        let storage = Arc::new(MemoryStorage::from_bytes(&[5; 512]));
        let image = (raw::DRIVER.open)(storage, &OpenOptions::default()).expect("opens");
        let chain = Chain::new(vec![image], Base::Zeroes, Arc::default()).expect("one layer");
        let backend = Arc::new(Backend::new(chain));
        let gate = Arc::new(Gate::default());
        let waking = Arc::clone(&gate);
        let _waker = backend.on_wake(move || waking.wake());
        let read = || {
            let (gate, backend) = (Arc::clone(&gate), Arc::clone(&backend));
            std::thread::spawn(move || {
                let mut buf = [0; 2];
                let request = Request::Read {
                    at: 0,
                    buf: &mut buf,
                };
                gate.submit(&backend, QueueId(0), request).map(|()| buf)
            })
        };
        backend.pause();
        let waiting = read();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        backend.resume();
        assert_eq!(waiting.join().expect("ends").expect("reads"), [5; 2]);
        backend.pause();
        let waiting = read();
        std::thread::sleep(Duration::from_millis(50));
        gate.stop();
        let error = waiting.join().expect("ends").expect_err("the server ends");
        assert_eq!(error.errno(), libc::ESHUTDOWN);
    }
}
