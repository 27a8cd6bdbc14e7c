//! Events as lines on standard error.

use std::io::Write;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::backend::{Action, Event, Listener};
use crate::cli::common::OutputFormat;
use crate::util::text::printable;

/// Prints events as the user wants them.
#[derive(Debug, Clone)]
pub(super) struct Events {
    form: OutputFormat,
    quiet: bool,
}

impl Events {
    pub(super) fn new(form: OutputFormat, quiet: bool) -> Self {
        Self { form, quiet }
    }

    /// One that prints what one export's backend tells.
    pub(super) fn listener(&self, export: &str) -> Listener {
        let events = self.clone();
        let export: Arc<str> = export.into();
        Listener::new(move |event| {
            let (human, machine) = describe(&export, event);
            events.print(&human, &machine);
        })
    }

    /// Prints an event; `machine` is an object.
    pub(super) fn print(&self, human: &str, machine: &Value) {
        if self.quiet {
            return;
        }
        let line = match self.form {
            OutputFormat::Human => format!("vdtool: {}\n", printable(human)),
            OutputFormat::Json => format!("{machine}\n"),
        };
        // In one piece, so that lines of several threads do not mix; nobody can be told that
        // stderr is closed.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// What is printed about an event, for people and for programs.
fn describe(export: &str, event: &Event<'_>) -> (String, Value) {
    let of = match export {
        "" => String::new(),
        name => format!("export '{name}': "),
    };
    match event {
        Event::IoError {
            kind,
            error,
            action,
        } => {
            let (kind, action_name) = (kind.name(), action.name());
            let then = match action {
                Action::Report => "the client was told",
                Action::Ignore => "the client was not told",
                Action::Stop => "requests are held until 'ctl resume'",
            };
            let why = whole(error);
            let human = format!("{of}{kind} failed: {why}; {then}");
            let machine = json!({
                "event": "io-error",
                "export": export,
                "operation": kind,
                "error": why,
                "errno": error.errno(),
                "action": action_name,
            });
            (human, machine)
        }
        Event::Watermark { mark, end } => {
            let human = format!("{of}the image's file is written up to {end}, past {mark}");
            let machine = json!({
                "event": "watermark",
                "export": export,
                "watermark": mark,
                "highest-offset": end,
            });
            (human, machine)
        }
    }
}

/// An error with its cause.
pub(super) fn whole(error: &crate::Error) -> String {
    use std::error::Error as _;
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Kind;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn an_event_names_the_export_the_cause_and_what_follows() {
        let error = Error::new(ErrorKind::NoSpace, "cannot write").at("a.img");
        let event = Event::IoError {
            kind: Kind::Write,
            error: &error,
            action: Action::Stop,
        };
        let (human, machine) = describe("a", &event);
        let text = "export 'a': write failed: a.img: cannot write; requests are held";
        assert!(human.starts_with(text), "{human}");
        assert_eq!(machine["errno"], libc::ENOSPC);
        assert_eq!(machine["action"], "stop");
        let event = Event::Watermark { mark: 10, end: 12 };
        let (human, machine) = describe("", &event);
        assert_eq!(human, "the image's file is written up to 12, past 10");
        assert_eq!(machine["highest-offset"], 12);
    }
}
