//! Progress of long jobs, on stderr: a bar, or one JSON object a line.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::copy::progress::Progress;

/// Shortest time between two lines of JSON.
const JSON_INTERVAL: Duration = Duration::from_millis(200);
/// Shortest time between two lines for people, who read them in a log.
const TEXT_INTERVAL: Duration = Duration::from_secs(1);
/// Bars drawn in a second.
const DRAWS: u8 = 10;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A bar with rate and remaining time; lines of text where stderr is not a terminal.
    Bar,
    /// One JSON object a line.
    Json,
    /// Nothing.
    None,
}

/// Counts the bytes of one job and shows them.
#[derive(Debug)]
pub struct Bar {
    job: &'static str,
    total: u64,
    done: AtomicU64,
    start: Instant,
    signals: Signals,
    shown: Shown,
}

/// What the user says to a job while it runs.
#[derive(Debug, Clone, Copy)]
pub struct Signals {
    /// Whether it is to stop.
    pub cancelled: fn() -> bool,
    /// Whether it is to say how far it is, since this was called last.
    pub asked: fn() -> bool,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines(Lines),
    Nothing,
}

/// Lines on stderr, not too many of them.
#[derive(Debug)]
struct Lines {
    line: fn(&str, u64, u64, Duration) -> String,
    interval: Duration,
    /// When the last one was written.  Innermost.
    last: Mutex<Option<Instant>>,
}

impl Bar {
    /// Shows a job of `total` bytes; `signals` tell what the user says meanwhile.
    pub fn new(job: &'static str, total: u64, form: Form, signals: Signals) -> Self {
        let shown = match form {
            Form::Bar if std::io::stderr().is_terminal() => Shown::Bar(bar(job, total)),
            Form::Bar => Shown::Lines(Lines {
                line: text,
                interval: TEXT_INTERVAL,
                last: Mutex::default(),
            }),
            Form::Json => Shown::Lines(Lines {
                line: |job, done, total, elapsed| line(job, done, total, elapsed).to_string(),
                interval: JSON_INTERVAL,
                last: Mutex::default(),
            }),
            Form::None => Shown::Nothing,
        };
        Self {
            job,
            total,
            done: AtomicU64::new(0),
            start: Instant::now(),
            signals,
            shown,
        }
    }

    /// Shows that the job is done: the last thing that is shown of it.
    pub fn finish(self) {
        match &self.shown {
            Shown::Bar(bar) => bar.finish(),
            Shown::Lines(lines) => self.print(lines),
            Shown::Nothing => {}
        }
    }

    fn print(&self, lines: &Lines) {
        let done = self.done.load(Ordering::Relaxed);
        say(&(lines.line)(
            self.job,
            done,
            self.total,
            self.start.elapsed(),
        ));
    }

    /// Says how far the job is, whatever is shown of it otherwise.
    fn answer(&self) {
        let done = self.done.load(Ordering::Relaxed);
        match (&self.shown, self.total) {
            (Shown::Lines(lines), _) => self.print(lines),
            (Shown::Bar(bar), _) if !bar.is_hidden() => {
                bar.suspend(|| say(&share(done, self.total)));
            }
            (_, 0) => say(&text(self.job, done, 0, self.start.elapsed())),
            _ => say(&share(done, self.total)),
        }
    }
}

impl Drop for Bar {
    /// A job that failed leaves no half bar in front of the error.
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if (self.signals.asked)() {
            self.answer();
        }
        match &self.shown {
            Shown::Bar(bar) => bar.inc(bytes),
            Shown::Lines(lines) => {
                let mut last = lines.last.lock();
                if last.is_none_or(|at| at.elapsed() >= lines.interval) {
                    *last = Some(Instant::now());
                    self.print(lines);
                }
            }
            Shown::Nothing => {}
        }
    }

    fn cancelled(&self) -> bool {
        if (self.signals.asked)() {
            self.answer();
        }
        (self.signals.cancelled)()
    }
}

fn bar(job: &'static str, total: u64) -> ProgressBar {
    let target = ProgressDrawTarget::stderr_with_hz(DRAWS);
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = if total == 0 {
        "{msg} {bytes} {binary_bytes_per_sec}"
    } else {
        "{msg} {wide_bar} {percent:>3} % {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
    };
    // The templates are constants; a test shows that they are right.
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(job)
}

fn say(line: &str) {
    // In one piece, so that lines of several threads do not mix; nobody can be told that stderr is
    // closed.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// How much is done, as `qemu-img` answers SIGUSR1.
fn share(done: u64, total: u64) -> String {
    let hundredths = u128::from(done.min(total)) * 10_000 / u128::from(total.max(1));
    let (percent, hundredth) = (hundredths / 100, hundredths % 100);
    format!("    ({percent}.{hundredth:02}/100%)")
}

/// A line for people.
fn text(job: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let (rate, of) = (BinaryBytes(rate(done, elapsed)), BinaryBytes(done));
    match total {
        0 => format!("{job} {of} {rate}/s"),
        _ => {
            let thousandths = u128::from(done.min(total)) * 1000 / u128::from(total);
            let (percent, tenth) = (thousandths / 10, thousandths % 10);
            let total = BinaryBytes(total);
            format!("{job} {percent}.{tenth} % {of}/{total} {rate}/s")
        }
    }
}

/// Bytes a second.
fn rate(done: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(done) * 1_000_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// One JSON object; a rate or a remaining time that is not known is null.
fn line(job: &str, done: u64, total: u64, elapsed: Duration) -> Value {
    let rate = rate(done, elapsed);
    let rest = total.saturating_sub(done);
    let known = total > 0 && rate > 0;
    let eta = known.then(|| rest.div_ceil(rate));
    json!({
        "job": job,
        "done": done,
        "total": (total > 0).then_some(total),
        "bytes-per-second": rate,
        "eta-seconds": eta,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_and_the_remaining_time_come_from_what_is_done() {
        let text = line("convert", 100, 350, Duration::from_secs(2)).to_string();
        assert_eq!(
            text,
            r#"{"job":"convert","done":100,"total":350,"bytes-per-second":50,"eta-seconds":5}"#
        );
    }

    #[test]
    fn a_line_for_people_says_how_much_is_done() {
        let second = Duration::from_secs(1);
        let line = text("convert", 512 << 10, 2 << 20, second);
        assert_eq!(line, "convert 25.0 % 512.00 KiB/2.00 MiB 512.00 KiB/s");
        assert_eq!(text("read", 1024, 0, second), "read 1.00 KiB 1.00 KiB/s");
    }

    #[test]
    fn a_job_of_unknown_length_has_no_remaining_time() {
        let value = line("convert", 7, 0, Duration::from_secs(1));
        assert!(value["total"].is_null() && value["eta-seconds"].is_null());
        assert_eq!(value["done"], 7);
    }

    #[test]
    fn bars_are_drawn_by_templates_that_are_right() {
        for total in [0, 10] {
            let bar = bar("convert", total);
            assert_eq!(bar.message(), "convert");
        }
        for template in ["{msg} {bytes} {binary_bytes_per_sec}", "{wide_bar} {eta}"] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
