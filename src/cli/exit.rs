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
    /// 128 and the number of the signal that stopped it: 129 SIGHUP, 130 SIGINT, 143 SIGTERM.
    Stopped(u8),
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
            Self::Stopped(signal) => 128 | signal,
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

/// Whoever read our standard output has left: a clean end, but not an answer.
///
/// Nothing else is: a pipe or socket to somebody else that broke is a failure.
#[derive(Debug)]
pub struct NobodyReads;

impl fmt::Display for NobodyReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads standard output")
    }
}

impl std::error::Error for NobodyReads {}

/// The error for a failed write to standard output.
pub fn output_failed(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => NobodyReads.into(),
        _ => anyhow::Error::new(error).context("cannot write to standard output"),
    }
}

/// The exit code that is the answer, once it was shown: nobody need read it for it to be true.
///
/// # Errors
/// Those of `shown` but [`NobodyReads`].
pub fn answer(shown: anyhow::Result<()>, exit: Exit) -> anyhow::Result<Exit> {
    match shown {
        Err(e) if nobody_reads(&e) => Ok(exit),
        shown => shown.map(|()| exit),
    }
}

/// Prints the error, if there is one, as one line on stderr, and gives the exit code.
pub fn finish(result: anyhow::Result<Exit>) -> ExitCode {
    let error = match result {
        Ok(exit) => return exit.into(),
        Err(error) => error,
    };
    if nobody_reads(&error) {
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
pub fn nobody_reads(error: &anyhow::Error) -> bool {
    error.is::<NobodyReads>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn only_standard_output_may_be_closed() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(nobody_reads(&output_failed(broken())));
        assert!(nobody_reads(
            &output_failed(broken()).context("while it was shown")
        ));
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(!nobody_reads(&output_failed(full)));
        for other in [
            Error::io("write to the server", broken()),
            Error::corrupt("x"),
        ] {
            assert!(!nobody_reads(&other.into()));
        }
    }

    #[test]
    fn the_answer_is_the_same_whether_anybody_reads_it_or_not() {
        let closed = output_failed(io::ErrorKind::BrokenPipe.into());
        let exits = [Exit::Done, Exit::Corrupt];
        for (shown, exit) in [Ok(()), Err(closed)].into_iter().zip(exits) {
            assert_eq!(answer(shown, exit).expect("is an answer"), exit);
        }
        let full = output_failed(io::ErrorKind::StorageFull.into());
        answer(Err(full), Exit::Done).expect_err("was not shown, and somebody waits for it");
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
