//! What the driver of this kernel can do, and what of that a device uses.

use std::fmt;

use libublk::sys;

use super::Options;
use crate::error::{Error, Result};

/// Names of the bits, from the first up.
const NAMES: [&str; 20] = [
    "zero copy",
    "completion in task",
    "get data",
    "user recovery",
    "user recovery with reissue",
    "unprivileged devices",
    "encoded commands",
    "user copy",
    "zoned",
    "user recovery with errors",
    "size update",
    "automatic buffer registration",
    "quiesce",
    "a thread per request",
    "registration by any thread",
    "batches",
    "integrity",
    "safe stop",
    "no partition scan",
    "shared memory",
];

/// A device with these outlives its server, and what that had not answered goes to the next one.
pub(super) const RECOVERY: u32 = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;

/// A set of the driver's features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// From the driver's bits.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The driver's bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether all bits of `flags` are in it.
    pub(super) fn has(self, flags: u32) -> bool {
        self.0 & u64::from(flags) == u64::from(flags)
    }

    fn with(self, flags: u32) -> Self {
        Self(self.0 | u64::from(flags))
    }

    /// The names of what is in it; a bit that has none is not listed.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let bits = self.0;
        NAMES
            .into_iter()
            .enumerate()
            .filter(move |(bit, _)| bits >> bit & 1 == 1)
            .map(|(_, name)| name)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.names().collect();
        f.write_str(&names.join(", "))
    }
}

/// How the bytes of requests get to where they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// The driver copies them to and from memory that it was told.
    Copied,
    /// The server reads and writes them through the character device.
    UserCopy,
    /// Requests are buffers of the ring: what is stored as it is moves without a copy; for the
    /// rest as `UserCopy`.
    ZeroCopy,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copied => "copy",
            Self::UserCopy => "user copy",
            Self::ZeroCopy => "zero copy",
        })
    }
}

impl Transfer {
    /// How a device with these features moves bytes.
    pub fn of(flags: Features) -> Self {
        if flags.has(sys::UBLK_F_AUTO_BUF_REG) {
            Self::ZeroCopy
        } else if flags.has(sys::UBLK_F_USER_COPY) {
            Self::UserCopy
        } else {
            Self::Copied
        }
    }
}

/// The features that a new device is to have, of those that the driver has.
///
/// A device with batches is never quiesced: to do that, Linux 7.2 marks its queues as those of a
/// disk that is to be removed, and fails every request until then instead of keeping it for the next
/// server.
///
/// # Errors
/// `Unsupported` for what was asked for and is not there.
pub(super) fn choose(options: &Options, available: Features) -> Result<Features> {
    let lacks = |what: &str, since: &str| {
        Err(Error::unsupported(format!(
            "the ublk driver of this kernel has no {what} (Linux {since} is the first that has)"
        )))
    };
    let sizes = match available.has(sys::UBLK_F_UPDATE_SIZE) {
        true => Features::default().with(sys::UBLK_F_UPDATE_SIZE),
        false => Features::default(),
    };
    if options.unprivileged {
        // The driver refuses user copy and zero copy for these, and does not let them be recovered.
        return match available.has(sys::UBLK_F_UNPRIVILEGED_DEV) {
            true => Ok(sizes.with(sys::UBLK_F_UNPRIVILEGED_DEV)),
            false => lacks("unprivileged devices", "6.5"),
        };
    }
    if !available.has(sys::UBLK_F_USER_COPY) {
        return lacks("user copy", "6.6");
    }
    let mut chosen = sizes.with(sys::UBLK_F_USER_COPY);
    let batches = options.batches && available.has(sys::UBLK_F_BATCH_IO);
    if batches {
        chosen = chosen.with(sys::UBLK_F_BATCH_IO);
    }
    if options.recoverable {
        if !available.has(RECOVERY) {
            return lacks("user recovery", "6.1");
        }
        chosen = chosen.with(RECOVERY);
        if available.has(sys::UBLK_F_QUIESCE) && !batches {
            chosen = chosen.with(sys::UBLK_F_QUIESCE);
        }
    }
    let registered = sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG;
    if options.zero_copy && available.has(registered) {
        chosen = chosen.with(registered);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.12 and 7.2 answer.
    const OLD: Features = Features(0x1fe);
    const NEW: Features = Features(0xf_ffff);

    #[test]
    fn an_older_kernel_gives_user_copy_and_recovery_and_nothing_newer() {
        let chosen = choose(&Options::default(), OLD).expect("works");
        assert_eq!(
            chosen.to_string(),
            "user recovery, user recovery with reissue, user copy"
        );
        assert_eq!(Transfer::of(chosen), Transfer::UserCopy);
    }

    #[test]
    fn a_newer_kernel_gives_zero_copy_and_batches_unless_they_are_turned_off() {
        let chosen = choose(&Options::default(), NEW).expect("works");
        assert_eq!(Transfer::of(chosen), Transfer::ZeroCopy);
        assert!(chosen.has(sys::UBLK_F_UPDATE_SIZE | sys::UBLK_F_BATCH_IO));
        assert!(!chosen.has(sys::UBLK_F_QUIESCE), "requests would fail");
        let options = Options {
            batches: false,
            ..Options::default()
        };
        let chosen = choose(&options, NEW).expect("works");
        assert_eq!(Transfer::of(chosen), Transfer::ZeroCopy);
        assert!(!chosen.has(sys::UBLK_F_BATCH_IO) && chosen.has(sys::UBLK_F_QUIESCE));
        let options = Options {
            zero_copy: false,
            ..Options::default()
        };
        let chosen = choose(&options, NEW).expect("works");
        assert_eq!(Transfer::of(chosen), Transfer::UserCopy);
        assert!(!chosen.has(sys::UBLK_F_SUPPORT_ZERO_COPY));
    }

    #[test]
    fn an_unprivileged_device_is_copied_to_and_cannot_be_recovered() {
        let options = Options {
            unprivileged: true,
            ..Options::default()
        };
        for (driver, names) in [
            (OLD, "unprivileged devices"),
            (NEW, "unprivileged devices, size update"),
        ] {
            let chosen = choose(&options, driver).expect("works");
            assert_eq!(chosen.to_string(), names);
            assert_eq!(Transfer::of(chosen), Transfer::Copied);
        }
        let error = choose(&options, Features(0)).expect_err("too old");
        assert!(error.to_string().contains("6.5"), "{error}");
    }
}
