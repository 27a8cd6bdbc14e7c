//! Exit codes, and how errors become them.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::error::ErrorKind;
use crate::util::text::printable;

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done; `compare`: the same; `check`: clean.
    Done,
    /// 1: failed; `compare`: different.
    Failed,
    /// 2: usage.
    Usage,
    /// 2: `check` found corruption.
    Corrupt,
    /// 2: `compare` could not open an image.
    NotOpened,
    /// 3: `check` found leaks only.
    Leaks,
    /// 3: `compare` could not read the extents.
    NoExtents,
    /// 4: `compare` could not read data.
    NotRead,
    /// 63: the format has no such operation.
    NoSuchOperation,
    /// 129: stopped by SIGHUP.
    HungUp,
    /// 130: stopped by SIGINT.
    Interrupted,
    /// 143: stopped by SIGTERM.
    Terminated,
}

impl Exit {
    /// The code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage | Self::Corrupt | Self::NotOpened => 2,
            Self::Leaks | Self::NoExtents => 3,
            Self::NotRead => 4,
            Self::NoSuchOperation => 63,
            Self::HungUp => 129,
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error with an exit code of its own, where the usual mapping would give another.
#[derive(Debug)]
pub struct Coded {
    exit: Exit,
    error: anyhow::Error,
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for Coded {}

/// Gives an error the exit code `exit`.
pub fn coded(exit: Exit, error: impl Into<anyhow::Error>) -> anyhow::Error {
    Coded {
        exit,
        error: error.into(),
    }
    .into()
}

/// A usage error found after parsing: exit code 2.
pub fn usage(message: impl fmt::Display) -> anyhow::Error {
    coded(Exit::Usage, anyhow::anyhow!("{message}"))
}

/// Prints the error, if there is one, as one line on stderr, and gives the exit code.
pub fn finish(result: anyhow::Result<Exit>) -> ExitCode {
    let error = match result {
        Ok(exit) => return exit.into(),
        Err(error) => error,
    };
    if is_broken_pipe(&error) {
        return Exit::Done.into();
    }
    complain(&format!("{error:#}"));
    code_of(&error).into()
}

/// Prints one line about a failure on stderr, safe for a terminal.
pub fn complain(text: &str) {
    // Nobody can be told that stderr is closed.
    let _ = writeln!(io::stderr(), "vdtool: {}", printable(text));
}

/// The exit code that stands for an error.
pub fn code_of(error: &anyhow::Error) -> Exit {
    if let Some(coded) = error.downcast_ref::<Coded>() {
        return coded.exit;
    }
    match error.downcast_ref::<crate::Error>().map(crate::Error::kind) {
        Some(ErrorKind::Unsupported) => Exit::NoSuchOperation,
        Some(ErrorKind::Cancelled) => super::signal::exit(),
        _ => Exit::Failed,
    }
}

/// Whether an error says that whoever read our output has left.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = match error.downcast_ref::<Coded>() {
        Some(coded) => &coded.error,
        None => error,
    };
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_closed_pipe_is_known_whatever_it_is_wrapped_in() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(
            &anyhow::Error::from(broken()).context("cannot write")
        ));
        assert!(is_broken_pipe(&coded(
            Exit::NotRead,
            Error::io("write", broken())
        )));
        assert!(!is_broken_pipe(&Error::corrupt("x").into()));
    }

    #[test]
    fn errors_map_to_the_documented_codes() {
        let cases = [
            (Error::unsupported("x"), 63),
            (Error::corrupt("x"), 1),
            (Error::invalid("x"), 1),
        ];
        for (error, code) in cases {
            assert_eq!(code_of(&error.into()).code(), code);
        }
        assert_eq!(
            code_of(&coded(Exit::NotRead, Error::corrupt("x"))).code(),
            4
        );
        assert_eq!(code_of(&usage("x")).code(), 2);
    }
}
