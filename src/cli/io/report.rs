//! What commands print: byte counts, rates, hexadecimal dumps.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Stdout, Write};
use std::time::Duration;

/// Standard output is gone: the one error that ends a session.
#[derive(Debug)]
pub(super) struct OutputLost(io::Error);

impl std::fmt::Display for OutputLost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cannot write to standard output")
    }
}

impl std::error::Error for OutputLost {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Standard output, buffered within a command.  Once whoever read it has left, nothing is printed
/// any more, and commands are carried out all the same: they change images, and the exit code
/// tells how they went.
#[derive(Debug)]
pub(super) struct Output {
    stdout: BufWriter<Stdout>,
    closed: bool,
}

impl Output {
    /// Standard output.
    pub(super) fn new() -> Self {
        Self {
            stdout: BufWriter::new(io::stdout()),
            closed: false,
        }
    }

    fn attempt(
        &mut self,
        write: impl FnOnce(&mut BufWriter<Stdout>) -> io::Result<()>,
    ) -> Result<(), OutputLost> {
        if self.closed {
            return Ok(());
        }
        match write(&mut self.stdout) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            done => done.map_err(OutputLost),
        }
    }

    /// Prints a line.
    ///
    /// # Errors
    /// `OutputLost`.
    pub(super) fn line(&mut self, text: &str) -> Result<(), OutputLost> {
        self.attempt(|out| writeln!(out, "{text}"))
    }

    /// Prints `buf`, whose first byte is at `at`, as hexadecimal numbers and characters.
    ///
    /// # Errors
    /// `OutputLost`.
    pub(super) fn dump(&mut self, buf: &[u8], at: u64) -> Result<(), OutputLost> {
        let mut text = String::new();
        let mut at = at;
        for chunk in buf.chunks(DUMP_WIDTH) {
            text.clear();
            dump_line(&mut text, chunk, at);
            self.line(&text)?;
            at = at.wrapping_add(crate::util::align::len64(chunk.len()));
        }
        Ok(())
    }

    /// Shows what was printed so far.
    ///
    /// # Errors
    /// `OutputLost`.
    pub(super) fn flush(&mut self) -> Result<(), OutputLost> {
        self.attempt(Write::flush)
    }
}

/// Bytes in a line of a dump.
pub(super) const DUMP_WIDTH: usize = 16;

fn dump_line(text: &mut String, chunk: &[u8], at: u64) {
    let _ = write!(text, "{at:08x}:  ");
    for byte in chunk {
        let _ = write!(text, "{byte:02x} ");
    }
    text.push(' ');
    text.extend(chunk.iter().map(|b| match b.is_ascii_alphanumeric() {
        true => char::from(*b),
        false => '.',
    }));
}

/// How a command says what it has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Two lines for people.
    Human,
    /// One line of numbers with commas between them.
    Machine,
    /// Not at all.
    Quiet,
}

/// What a command has done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Report {
    /// `read`, `wrote` or `discard`.
    pub(super) verb: &'static str,
    /// Guest offset in bytes.
    pub(super) at: u64,
    /// Bytes.
    pub(super) len: u64,
    /// How long the requests took.
    pub(super) time: Duration,
}

impl Report {
    /// Prints it.
    ///
    /// # Errors
    /// `OutputLost`.
    pub(super) fn print(&self, out: &mut Output, form: Form) -> Result<(), OutputLost> {
        let Self { verb, at, len, .. } = self;
        match form {
            Form::Quiet => Ok(()),
            Form::Machine => out.line(&self.machine()),
            Form::Human => {
                out.line(&format!("{verb} {len}/{len} bytes at offset {at}"))?;
                out.line(&self.human())
            }
        }
    }

    fn seconds(&self) -> f64 {
        self.time.max(Duration::from_nanos(1)).as_secs_f64()
    }

    fn human(&self) -> String {
        let seconds = self.seconds();
        format!(
            "{}, 1 ops; {} ({}/sec and {:.4} ops/sec)",
            amount(self.len as f64),
            if self.time < Duration::from_secs(1) {
                format!("00.{:02} sec", self.time.subsec_millis() / 10)
            } else {
                clock(self.time)
            },
            amount(self.len as f64 / seconds),
            1.0 / seconds
        )
    }

    fn machine(&self) -> String {
        let seconds = self.seconds();
        format!(
            "{},1,{},{:.3},{:.3}",
            self.len,
            clock(self.time),
            self.len as f64 / seconds,
            1.0 / seconds
        )
    }
}

fn clock(time: Duration) -> String {
    let total = time.as_secs();
    let (h, m, s) = (total / 3600, total / 60 % 60, total % 60);
    format!("{h}:{m:02}:{s:02}.{:02}", time.subsec_millis() / 10)
}

/// A number of bytes in the largest unit it reaches, with three decimals where it is not whole.
pub(super) fn amount(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    let mut size = (1u64 << 60) as f64;
    for unit in UNITS {
        if bytes >= size {
            return decimals(bytes / size, unit);
        }
        size /= 1024.0;
    }
    decimals(bytes, "bytes")
}

fn decimals(value: f64, unit: &str) -> String {
    let text = format!("{value:.3}");
    let number = text.strip_suffix(".000").unwrap_or(&text);
    format!("{number} {unit}")
}

/// The same for a whole number of bytes.
pub(super) fn whole(bytes: u64) -> String {
    amount(bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_decimals_or_none() {
        let cases = [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (1024, "1 KiB"),
            (1536, "1.500 KiB"),
            (4099, "4.003 KiB"),
            (0x3f0000, "3.938 MiB"),
            (0x63f0000, "99.938 MiB"),
            (3 << 40, "3 TiB"),
            (7 << 60, "7 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(whole(bytes), text);
        }
    }

    #[test]
    fn a_dump_shows_offsets_numbers_and_letters() {
        let mut text = String::new();
        dump_line(&mut text, b"aZ9 !\x00\xff", 0xffff_fffa);
        assert_eq!(text, "fffffffa:  61 5a 39 20 21 00 ff  aZ9....");
        text.clear();
        dump_line(&mut text, b"b", 0x1_0000_000a);
        assert_eq!(text, "10000000a:  62  b");
    }

    #[test]
    fn a_report_has_the_words_and_numbers_that_scripts_look_for() {
        let report = Report {
            verb: "read",
            at: 0,
            len: 4096,
            time: Duration::from_millis(125),
        };
        assert_eq!(
            report.human(),
            "4 KiB, 1 ops; 00.12 sec (32 KiB/sec and 8.0000 ops/sec)"
        );
        assert_eq!(report.machine(), "4096,1,0:00:00.12,32768.000,8.000");
        let long = Report {
            time: Duration::from_secs(3600 + 64),
            ..report
        };
        assert_eq!(
            long.human(),
            "4 KiB, 1 ops; 1:01:04.00 (1.118 bytes/sec and 0.0003 ops/sec)"
        );
    }
}
