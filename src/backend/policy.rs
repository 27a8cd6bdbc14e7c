//! What is done about errors of the host, and what is remembered of them.

use crate::backend::Kind;
use crate::error::{Error, ErrorKind};

/// What to do when a request fails for a reason that lies with the host or the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The client is told.
    #[default]
    Report,
    /// The client is told that it was done.
    Ignore,
    /// The disk stops: the request and all others are held until [`super::Backend::resume`].  A
    /// flush is answered all the same.
    Stop,
    /// Stop when there is no space left, report anything else.
    Enospc,
}

/// What is done about one error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The client is told.
    Report,
    /// The client is told that it was done.
    Ignore,
    /// The disk stops.
    Stop,
}

impl Action {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// The first failure since the disk was opened or resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// None.
    #[default]
    Ok,
    /// Something failed.
    Failed,
    /// There was no space left.
    NoSpace,
}

impl IoStatus {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }

    /// The status that an error leads to.
    pub fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::NoSpace => Self::NoSpace,
            _ => Self::Failed,
        }
    }
}

/// The policies of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// For reads.
    pub on_read: OnError,
    /// For everything else.
    pub on_write: OnError,
}

impl Policy {
    /// What to do about `error` of a request of this kind; `None` where the request itself is
    /// wrong, which is no policy's business.
    pub(super) fn action(self, kind: Kind, error: &Error) -> Option<Action> {
        let policy = match kind {
            Kind::Read => self.on_read,
            _ => self.on_write,
        };
        let full = error.kind() == ErrorKind::NoSpace;
        match error.kind() {
            ErrorKind::Unsupported
            | ErrorKind::OutOfRange
            | ErrorKind::ReadOnly
            | ErrorKind::Invalid
            | ErrorKind::WouldBlock
            | ErrorKind::Cancelled => return None,
            _ => {}
        }
        Some(match policy {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if full => Action::Stop,
            OnError::Enospc => Action::Report,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_does_what_its_name_says() {
        let full = Error::new(ErrorKind::NoSpace, "full");
        let bad = Error::new(ErrorKind::Io, "bad");
        let cases = [
            (OnError::Report, Action::Report, Action::Report),
            (OnError::Ignore, Action::Ignore, Action::Ignore),
            (OnError::Stop, Action::Stop, Action::Stop),
            (OnError::Enospc, Action::Stop, Action::Report),
        ];
        for (on_write, at_full, at_bad) in cases {
            let policy = Policy {
                on_write,
                on_read: OnError::Report,
            };
            for kind in [Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush] {
                assert_eq!(policy.action(kind, &full), Some(at_full));
                assert_eq!(policy.action(kind, &bad), Some(at_bad));
            }
            assert_eq!(policy.action(Kind::Read, &full), Some(Action::Report));
        }
    }

    #[test]
    fn a_request_that_is_wrong_in_itself_never_stops_a_disk() {
        let policy = Policy {
            on_read: OnError::Stop,
            on_write: OnError::Stop,
        };
        for kind in [ErrorKind::Unsupported, ErrorKind::OutOfRange] {
            let error = Error::new(kind, "wrong");
            assert_eq!(policy.action(Kind::Zero, &error), None);
        }
    }
}
