//! A disk as a block device of this machine, `/dev/ublkbN`, by the kernel's ublk driver.
//!
//! The driver hands requests to a thread for each queue.  That thread never waits for a disk: it
//! has the kernel move bytes that are stored as they are, and gives everything else to workers.
//! What the driver of this kernel can do is asked of it, never assumed.
//!
//! A device outlives a server that is killed: the driver keeps it, and the requests that were not
//! answered, for a server that takes it over.

use crate::error::{Error, Result};
use crate::server::Export;

mod buffers;
mod control;
mod device;
mod devices;
mod driver;
mod features;
mod kept;
mod merged;
mod params;
mod plan;
mod pool;
mod process;
mod queue;
mod request;
mod ring;
mod shared;
mod transfer;

pub use control::{Found, Listed, State};
pub use device::InUse;
pub use devices::Devices;
pub use features::{Features, Transfer};

/// Most queues of a device.
pub const MAX_QUEUES: u16 = 64;
/// Most requests that a queue may have under way.
pub const MAX_DEPTH: u16 = 4096;
/// Longest request in bytes that the driver takes.
pub const MAX_IO: u32 = 32 << 20;
/// Lengths of requests are multiples of this.
const PAGE: u32 = 4096;

/// How a disk is to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Number of queues, 1 to [`MAX_QUEUES`]; each has a thread.
    pub queues: u16,
    /// Requests that a queue may have under way, 1 to [`MAX_DEPTH`].
    pub depth: u16,
    /// Longest request in bytes: a multiple of 4096, up to [`MAX_IO`].
    pub max_io: u32,
    /// N of `/dev/ublkbN`; `None`: the first that is free.
    pub dev_id: Option<u32>,
    /// Take over the device `dev_id`, whose server is gone; it keeps its queues, depth and length
    /// of requests.
    pub recover: bool,
    /// Whether the device outlives a server that is killed.
    pub recoverable: bool,
    /// Whether bytes that are stored as they are move without a copy, where the driver can.
    pub zero_copy: bool,
    /// Whether requests are taken and answered by many at once, where the driver can.
    pub batches: bool,
    /// A device of a user without privileges; it is copied to and cannot be recovered.
    pub unprivileged: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            depth: 128,
            max_io: 512 << 10,
            dev_id: None,
            recover: false,
            recoverable: true,
            zero_copy: true,
            batches: true,
            unprivileged: false,
        }
    }
}

impl Options {
    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::invalid(text));
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return wrong(format!(
                "{} queues (allowed: 1 to {MAX_QUEUES})",
                self.queues
            ));
        }
        if !(1..=MAX_DEPTH).contains(&self.depth) {
            return wrong(format!(
                "a queue depth of {} (allowed: 1 to {MAX_DEPTH})",
                self.depth
            ));
        }
        if !(PAGE..=MAX_IO).contains(&self.max_io) || !self.max_io.is_multiple_of(PAGE) {
            return wrong(format!(
                "requests of at most {} bytes (allowed: multiples of {PAGE} up to {MAX_IO})",
                self.max_io
            ));
        }
        match self.recover && self.dev_id.is_none() {
            true => wrong("taking a device over needs its number".to_owned()),
            false => Ok(()),
        }
    }
}

/// Serves each export as a block device; returns once all can be opened.
///
/// The calling thread, and those it starts later, get a mount namespace of their own where the
/// process has the privilege, so call it before other threads are started.
///
/// # Errors
/// `Unsupported` and `Permission`, saying what to do, where this kernel or user has no ublk, and
/// for what was asked for and the driver lacks; `Invalid` for options that make no sense, a number
/// that is taken, or a device that cannot be taken over; the host's.  Then there is no device.
pub fn start(exports: &[Export], options: &Options) -> Result<Devices> {
    options.check()?;
    Devices::start(exports, options)
}

/// The ublk devices of this machine, whoever serves them.
///
/// # Errors
/// `Unsupported` and `Permission` where this kernel or user has no ublk; the driver's.
pub fn list() -> Result<Listed> {
    control::list()
}

/// Removes a device whose server is gone.  Clients that still have it open get errors.
///
/// # Errors
/// As [`list`]; `NotFound`; `Invalid` where it is served.
pub fn delete(id: u32) -> Result<()> {
    control::delete(id)
}

/// What the driver of this kernel can do.
///
/// # Errors
/// As [`list`].
pub fn features() -> Result<Features> {
    control::features()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_range_are_refused_with_what_is_allowed() {
        Options::default()
            .check()
            .expect("the defaults are allowed");
        let wrong = |change: fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            options.check().expect_err("is not allowed").to_string()
        };
        assert!(wrong(|o| o.queues = 0).contains("1 to 64"));
        assert!(wrong(|o| o.depth = 4097).contains("1 to 4096"));
        assert!(wrong(|o| o.max_io = 1000).contains("multiples of 4096"));
        assert!(wrong(|o| o.max_io = MAX_IO + PAGE).contains("33554432"));
        assert!(wrong(|o| o.recover = true).contains("number"));
    }
}
