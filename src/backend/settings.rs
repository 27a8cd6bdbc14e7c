//! How a backend is set up.

use std::fmt;
use std::sync::Arc;

use crate::backend::{Action, Kind, Policy};
use crate::error::{Error, ErrorKind, Result};

/// Something that whoever runs the disk should know.
#[derive(Debug)]
pub enum Event<'a> {
    /// A request failed for a reason that lies with the host or the image.
    IoError {
        /// What it was to do.
        kind: Kind,
        /// Why it failed.
        error: &'a Error,
        /// What is done about it.
        action: Action,
    },
    /// Something was written past a mark of the image's file, for the first time.
    Watermark {
        /// The mark, a host offset in bytes.
        mark: u64,
        /// Where the highest write so far ended.
        end: u64,
    },
}

/// Who is told of events; called on the thread that met them, so it must not block for long.
#[derive(Clone)]
pub struct Listener(Arc<dyn Fn(&Event<'_>) + Send + Sync>);

impl Listener {
    /// Calls `f` for each event.
    pub fn new(f: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    pub(super) fn tell(&self, event: &Event<'_>) {
        (self.0)(event);
    }
}

impl Default for Listener {
    /// Tells nobody.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// How durable what is written is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When it is flushed, or written with FUA.
    #[default]
    OnFlush,
    /// As soon as it is written.
    EveryWrite,
    /// Not at all: a flush does nothing.
    Never,
}

/// What becomes of writes that hold nothing but zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// The range is zeroed, and keeps its space.
    KeepSpace,
    /// The range is zeroed, and may give its space back where discards do.
    MayUnmap,
}

/// What becomes of discards, and of zeroing that may give space back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// They give space back.
    #[default]
    Unmap,
    /// Discards do nothing; zeroing keeps the space.
    Ignore,
}

/// How a backend is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Queues that are counted apart; at least 1.
    pub queues: u32,
    /// Requests start and end at multiples of this, or at the end of the disk; a power of two, 1:
    /// anywhere.
    pub logical_block_size: u32,
    /// What clients should keep to for speed; a power of two, at least the logical block size.
    pub physical_block_size: u32,
    /// Longest transfer a client should ask for, in bytes; a longer one is done in pieces.
    pub max_transfer: u32,
    /// How durable writes are.
    pub durability: Durability,
    /// What becomes of discards.
    pub discard: Discard,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Whether the layers below the top one stay as they are until the disk is no longer in use; no one
    /// of them is written to, and no space in it is used for anything else.
    pub layers_stay: bool,
    /// What is done about errors.
    pub policy: Policy,
    /// Who is told of events.
    pub listener: Listener,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queues: 1,
            logical_block_size: 1,
            physical_block_size: 4096,
            max_transfer: 32 << 20,
            durability: Durability::default(),
            discard: Discard::default(),
            detect_zeroes: DetectZeroes::default(),
            layers_stay: true,
            policy: Policy::default(),
            listener: Listener::default(),
        }
    }
}

/// Most queues of one backend.
pub const MAX_QUEUES: u32 = 4096;

impl Settings {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// `Invalid`, saying what is allowed.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::new(ErrorKind::Invalid, text));
        let (logical, physical) = (self.logical_block_size, self.physical_block_size);
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return wrong(format!(
                "{} queues (allowed: 1 to {MAX_QUEUES})",
                self.queues
            ));
        }
        for (name, size) in [("logical", logical), ("physical", physical)] {
            if !size.is_power_of_two() {
                return wrong(format!(
                    "the {name} block size is {size} (allowed: powers of two)"
                ));
            }
        }
        if physical < logical {
            return wrong(format!(
                "the physical block size is {physical} (allowed: at least the logical one, \
                 {logical})"
            ));
        }
        if self.max_transfer < physical {
            return wrong(format!(
                "the longest transfer is {} bytes (allowed: at least the physical block size, \
                 {physical})",
                self.max_transfer
            ));
        }
        Ok(())
    }
}
