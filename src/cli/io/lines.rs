//! Lines of a script, from a file or a pipe, given up when a signal comes.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cli::signal;

/// Longest line taken, in bytes: no path or list of lengths is longer.
const MAX_LINE: usize = 1 << 20;

/// Reads at once.
const BLOCK: usize = 64 << 10;

/// A script as it is read; each item is a line without its end.
#[derive(Debug)]
pub(super) struct Lines<F: AsFd> {
    file: F,
    buf: Vec<u8>,
    /// Where in `buf` the next line begins.
    start: usize,
    ended: bool,
}

impl<F: AsFd> Lines<F> {
    /// The lines of `file` from where it is.
    pub(super) fn new(file: F) -> Self {
        Self {
            file,
            buf: Vec::new(),
            start: 0,
            ended: false,
        }
    }

    /// The next line; `None` at the end, or once SIGINT or SIGTERM came.
    ///
    /// # Errors
    /// The host's; a line that is too long, after which there are no more.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let mut searched = 0;
        loop {
            let rest = &self.buf[self.start..];
            if let Some(len) = rest[searched..].iter().position(|b| *b == b'\n') {
                let len = searched + len;
                return Ok(Some(self.take(len, len + 1)));
            }
            searched = rest.len();
            if self.ended {
                return match searched {
                    0 => Ok(None),
                    len => Ok(Some(self.take(len, len))),
                };
            }
            if searched > MAX_LINE {
                self.end();
                anyhow::bail!("a line is longer than {MAX_LINE} bytes");
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn take(&mut self, len: usize, used: usize) -> Vec<u8> {
        let line = &self.buf[self.start..self.start + len];
        let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
        self.start += used;
        line
    }

    fn end(&mut self) {
        self.buf.clear();
        self.start = 0;
        self.ended = true;
    }

    /// Reads more; false once a signal came.
    fn fill(&mut self) -> anyhow::Result<bool> {
        self.buf.drain(..self.start);
        self.start = 0;
        if !self.wait()? {
            return Ok(false);
        }
        let old = self.buf.len();
        self.buf.resize(old + BLOCK, 0);
        let read = match rustix::io::read(&self.file, &mut self.buf[old..]) {
            Ok(0) => {
                self.ended = true;
                0
            }
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(std::io::Error::from(e).into()),
        };
        self.buf.truncate(old + read);
        Ok(true)
    }

    /// Waits until there is something to read, waking up now and then to look for signals: one
    /// that comes just before the wait does not interrupt it.
    fn wait(&self) -> anyhow::Result<bool> {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        loop {
            if signal::caught() {
                return Ok(false);
            }
            let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    fn lines(bytes: &[u8]) -> Lines<File> {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("writes");
        Lines::new(file.reopen().expect("opens"))
    }

    #[test]
    fn lines_end_with_a_newline_or_the_file() {
        let mut lines = lines(b"a\n\nb\r\nc");
        for line in ["a", "", "b", "c"] {
            assert_eq!(
                lines.next().expect("reads").as_deref(),
                Some(line.as_bytes())
            );
        }
        assert_eq!(lines.next().expect("reads"), None);
        assert_eq!(lines.next().expect("reads"), None);
    }

    #[test]
    fn lines_across_reads_are_whole() {
        let long = "x".repeat(BLOCK * 3 + 5);
        let mut lines = lines(format!("1\n{long}\n2\n").as_bytes());
        for line in ["1", &long, "2"] {
            assert_eq!(
                lines.next().expect("reads").as_deref(),
                Some(line.as_bytes())
            );
        }
    }

    #[test]
    fn a_line_is_bytes_and_one_without_an_end_is_refused() {
        let line = lines(b"\xff\n").next().expect("reads");
        assert_eq!(line.as_deref(), Some(&b"\xff"[..]));
        let mut endless = lines(&vec![b'x'; MAX_LINE * 2]);
        assert!(endless.next().is_err());
        assert_eq!(endless.next().expect("ended"), None);
    }
}
