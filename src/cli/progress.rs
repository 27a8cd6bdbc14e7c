//! How a command shows its progress: what was typed, and what the terminal is.

use std::io::IsTerminal;
use std::sync::Arc;

use crate::cli::common::{ProgressArgs, ProgressForm};
use crate::cli::{Globals, signal};
use crate::output::bar::{Bar, Form, Signals};
use crate::util::progress::Watcher;

/// Shows a job of `total` bytes (0: nobody knows) as the user asked; it stops on SIGINT and
/// SIGTERM once [`signal::catch`] was called.
pub fn start(job: &'static str, total: u64, args: &ProgressArgs, globals: &Globals) -> Bar {
    let form = if args.bar {
        ProgressForm::Bar
    } else {
        args.progress
    };
    let shown = match form {
        ProgressForm::Json => Form::Json,
        ProgressForm::Bar if !globals.quiet => Form::Bar,
        ProgressForm::Auto if !globals.quiet && std::io::stderr().is_terminal() => Form::Bar,
        ProgressForm::Auto | ProgressForm::Bar | ProgressForm::None => Form::None,
    };
    Bar::new(job, total, shown, CALLS)
}

/// Tells of a change of an image, of which nobody knows how long it is, when SIGUSR1 asks for it.
pub fn watcher(job: &'static str) -> Watcher {
    Watcher::new(Arc::new(hidden(job, 0)))
}

/// Shows a job of `total` bytes only when SIGUSR1 asks for it.
pub fn hidden(job: &'static str, total: u64) -> Bar {
    Bar::new(job, total, Form::None, CALLS)
}

const CALLS: Signals = Signals {
    cancelled: signal::caught,
    asked: signal::asked,
};
