//! Changing what requests go to: another image, another size; and the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::backend::gate::{ABSENT, BUSY, CLOSED};
use crate::backend::lane::Lane;
use crate::backend::{Backend, closed};
use crate::chain::{Base, Chain};
use crate::error::{Error, ErrorKind, Result};
use crate::image::overlay::Overlay;
use crate::storage::highwater::HighWater;
use crate::storage::memory::MemoryStorage;

/// An open image, and who is told how far it is written.
#[derive(Debug)]
pub struct Medium {
    /// The image and what lies below it.
    pub chain: Chain,
    /// What it was opened with as [`crate::chain::open::ChainOptions::high_water`].
    pub high_water: Option<Arc<HighWater>>,
}

impl From<Chain> for Medium {
    fn from(chain: Chain) -> Self {
        Self {
            chain,
            high_water: None,
        }
    }
}

impl Medium {
    pub(super) fn parts(self) -> (Arc<Chain>, Option<Arc<HighWater>>) {
        (Arc::new(self.chain), self.high_water)
    }
}

/// Longest wait for others to let go of an image that is closed.
const LET_GO: Duration = Duration::from_secs(2);

/// Clears flags when dropped, so that a panic holds nobody for ever.
struct Clear<'a>(&'a Backend, u8);

impl Drop for Clear<'_> {
    fn drop(&mut self) {
        self.0.gate.clear(self.1);
    }
}

impl Backend {
    /// Sets the virtual size in bytes with no request under way; new bytes read as zeroes.  Tell
    /// the server afterwards.
    ///
    /// # Errors
    /// Those of [`Chain::resize`].
    pub fn resize(&self, virtual_size: u64) -> Result<()> {
        self.exclusive(|| {
            self.present()?;
            self.chain().resize(virtual_size)
        })?
    }

    /// Makes completed writes durable, paused or not, whatever the cache mode.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> Result<()> {
        let _turn = self.changing.lock();
        self.present()?;
        self.chain().flush()
    }

    /// Goes on with another image: with no request under way the old one is flushed and closed,
    /// and requests go to the new one from then on.  Tell the server where the size differs.
    ///
    /// # Errors
    /// Those of flushing and closing the old image, which then stays in use; one that has failed to
    /// sync before is given up as it is, and the next flush tells of that.
    pub fn change(&self, next: Medium) -> Result<()> {
        self.exclusive(|| {
            if self.gate.flags() & ABSENT == 0 {
                self.give_up()?;
            }
            self.install(next);
            self.gate.clear(ABSENT);
            Ok(())
        })?
    }

    /// Closes the image, then goes on with what `open` opens: the same file, or one that needs the
    /// old one's locks.
    ///
    /// # Errors
    /// As [`Backend::change`] for the old image; `Locked` where somebody
    /// does not let go of it, and those of `open`: then there is no image, and requests are held
    /// until a change to one succeeds.
    pub fn reopen(&self, open: impl FnOnce() -> Result<Medium>) -> Result<()> {
        self.exclusive(|| {
            if self.gate.flags() & ABSENT == 0 {
                self.give_up()?;
                self.gate.set(ABSENT);
                let old = self.chain();
                self.install(nothing(&old)?.into());
                let_go(old)?;
            }
            self.install(open()?);
            self.gate.clear(ABSENT);
            Ok(())
        })?
    }

    /// As [`Backend::change`] to what `next` makes of the old image, which is closed then and has its
    /// locks.  Where that fails, goes on with what `back` opens: the old image again.
    ///
    /// # Errors
    /// Those of closing the old image, which then stays in use, as does one that has failed to sync
    /// before; those of `next`; where `back` fails too there is no image, and the text says so.
    pub fn replace(
        &self,
        next: impl FnOnce(&Chain) -> Result<Medium>,
        back: impl FnOnce() -> Result<Medium>,
    ) -> Result<()> {
        let (old, failed) = self.exclusive(|| -> Result<_> {
            self.present()?;
            let old = self.chain();
            old.sound()?;
            old.close()?;
            // Nobody writes to what is closed, whatever becomes of `next`.
            self.gate.set(ABSENT);
            let failed = self.go_on(&old, next, back)?;
            self.gate.clear(ABSENT);
            Ok((old, failed))
        })??;
        // Who still looks at the old one lets go of it soon.
        let _ = let_go(old);
        failed.map_or(Ok(()), Err)
    }

    /// Puts what `next` gives in the place of `old`, else what `back` opens; why `next` failed.
    fn go_on(
        &self,
        old: &Chain,
        next: impl FnOnce(&Chain) -> Result<Medium>,
        back: impl FnOnce() -> Result<Medium>,
    ) -> Result<Option<Error>> {
        let failed = match next(old) {
            Ok(medium) => {
                self.install(medium);
                return Ok(None);
            }
            Err(failed) => failed,
        };
        match back() {
            Ok(medium) => {
                self.install(medium);
                Ok(Some(failed))
            }
            Err(worse) => {
                self.install(nothing(old)?.into());
                let text = "and the image could not be opened again, so that requests wait";
                Err(failed.noted(format_args!("{text}: {}", worse.with_cause())))
            }
        }
    }

    /// Closes the image before it goes.
    fn give_up(&self) -> Result<()> {
        let chain = self.chain();
        match chain.sound() {
            Ok(()) => chain.close(),
            Err(_) => {
                self.lost.store(true, Ordering::SeqCst);
                Ok(())
            }
        }
    }

    /// Ends the use of the disk: further requests are refused, those under way end, the image is
    /// flushed and closed as a clean close leaves it.  A second call does nothing.
    ///
    /// # Errors
    /// The host's; the image may then be as after a kill.
    pub fn finish(&self) -> Result<()> {
        let _turn = self.changing.lock();
        let before = self.gate.set(CLOSED | BUSY);
        self.gate.wake();
        self.drain();
        // `BUSY` together with `CLOSED` says that this was done.
        match before & BUSY != 0 || before & ABSENT != 0 {
            true => Ok(()),
            false => {
                let old = self.chain();
                let closed = old.close();
                // Its locks go now, whoever still has the backend.
                self.install(nothing(&old)?.into());
                closed
            }
        }
    }

    /// Runs `f` with no request under way.
    fn exclusive<T>(&self, f: impl FnOnce() -> T) -> Result<T> {
        let _turn = self.changing.lock();
        if self.gate.flags() & CLOSED != 0 {
            return Err(closed());
        }
        self.gate.set(BUSY);
        let _clear = Clear(self, BUSY);
        self.drain();
        Ok(f())
    }

    fn present(&self) -> Result<()> {
        match self.gate.flags() & ABSENT {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::NotFound, "no image is open")),
        }
    }

    fn install(&self, next: Medium) {
        let (chain, high) = next.parts();
        for place in &self.lanes {
            let (chain, high) = (Arc::clone(&chain), high.clone());
            place.change(|lane| Lane {
                chain,
                high,
                ..lane
            });
        }
    }
}

/// What stands where an image was: a disk of its size, which no request gets to.
fn nothing(old: &Chain) -> Result<Chain> {
    let overlay = Overlay::new(Arc::new(MemoryStorage::new()), old.virtual_size());
    Chain::new(vec![Box::new(overlay)], Base::Zeroes, Arc::default())
}

/// Waits until nobody uses an image any more, so that its locks are free.
fn let_go(old: Arc<Chain>) -> Result<()> {
    let until = Instant::now() + LET_GO;
    let mut old = old;
    loop {
        match Arc::try_unwrap(old) {
            Ok(_) => return Ok(()),
            Err(shared) if Instant::now() > until => {
                let path = shared.top().storage().path().map(ToOwned::to_owned);
                let text = "is closed, but still in use by a client's request";
                return Err(Error::new(ErrorKind::Locked, text).at_opt(path.as_deref()));
            }
            Err(shared) => old = shared,
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
