//! The library's one error type: what kind, where, why.
//!
//! The kind decides exit codes and errno; the text is for people: what was found, what is allowed.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::util::text::printable;

/// Result of the library's fallible operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is.  Stable: callers and exit codes depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file is not there.
    NotFound,
    /// The host refuses access.
    Permission,
    /// Another process holds the image.
    Locked,
    /// An image names a file that the policy does not let us open.
    Denied,
    /// Not an image of the format asked for.
    WrongFormat,
    /// The right format, but its metadata contradicts itself or its limits.
    Corrupt,
    /// The format, or this implementation of it, has no such operation or feature.
    Unsupported,
    /// The object was not opened for writing.
    ReadOnly,
    /// Outside the disk, or outside what a format can hold.
    OutOfRange,
    /// An argument that makes no sense.
    Invalid,
    /// The host has no space left.
    NoSpace,
    /// Answering would need to wait, and the caller asked not to.
    WouldBlock,
    /// The user asked to stop.
    Cancelled,
    /// Any other failure of the host.
    Io,
}

/// An error: kind, the object it is about, what is wrong, and the cause.
///
/// `Display` prints `path: message`; the cause is printed by whoever walks `source()`.
#[derive(Debug)]
pub struct Error(Box<Inner>);

/// Behind a pointer: results are passed on for every request, and few are errors.
#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind` with a text that says what was found and what is allowed.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            path: None,
            message: message.into(),
            source: None,
        }))
    }

    /// Metadata that is wrong.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// An operation or feature that is not there.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// An argument that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// A change to something that was opened read-only.
    pub fn read_only() -> Self {
        Self::new(ErrorKind::ReadOnly, "is open read-only")
    }

    /// A failed call to the host; `doing` completes "cannot ...".
    pub fn io(doing: impl fmt::Display, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Permission,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        Self(Box::new(Inner {
            kind,
            path: None,
            message: format!("cannot {doing}"),
            source: Some(source),
        }))
    }

    /// The same error, about `path`; an error that already names its object keeps it.
    #[must_use]
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        if self.0.path.is_none() {
            self.0.path = Some(path.as_ref().to_owned());
        }
        self
    }

    /// The same error, about `path` if there is one.
    #[must_use]
    pub fn at_opt(self, path: Option<&Path>) -> Self {
        match path {
            Some(path) => self.at(path),
            None => self,
        }
    }

    /// The same error; where it is about `from`, it becomes one about `to`.
    #[must_use]
    pub fn renamed(mut self, from: &Path, to: &Path) -> Self {
        if self.0.path.as_deref() == Some(from) {
            self.0.path = Some(to.to_owned());
        }
        self
    }

    /// The same error, saying more about its object.
    #[must_use]
    pub fn noted(mut self, note: impl fmt::Display) -> Self {
        self.0.message = format!("{} ({note})", self.0.message);
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The object it is about, where known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// What is wrong, without the path.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What is wrong and why, without the path.
    pub fn with_cause(&self) -> String {
        match &self.0.source {
            Some(cause) => format!("{}: {cause}", self.0.message),
            None => self.0.message.clone(),
        }
    }

    /// The errno a client of a served disk gets.
    pub fn errno(&self) -> i32 {
        if let Some(code) = self.0.source.as_ref().and_then(io::Error::raw_os_error) {
            return code;
        }
        match self.0.kind {
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Permission | ErrorKind::Denied => libc::EACCES,
            ErrorKind::Locked => libc::EBUSY,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::OutOfRange | ErrorKind::Invalid => libc::EINVAL,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::WouldBlock => libc::EAGAIN,
            ErrorKind::Cancelled => libc::EINTR,
            ErrorKind::WrongFormat | ErrorKind::Corrupt | ErrorKind::Io => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", printable(path))?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// Adds the object an error is about.
pub trait Context<T> {
    /// Names the object, unless the error already names one.
    ///
    /// # Errors
    /// The error it was called on.
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| e.at(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_path_named_stays() {
        let error = Error::corrupt("bad").at("a").at("b");
        assert_eq!(error.to_string(), "a: bad");
    }

    #[test]
    fn a_host_errno_reaches_the_client_unchanged() {
        let error = Error::io("write at 0x0", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.errno(), libc::ENOSPC);
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}
