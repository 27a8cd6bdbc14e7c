//! What does not touch the disk: `info`, `sleep`, `help`, `quit`.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::io::args::Parsed;
use crate::cli::io::command::{self, COMMANDS, Command, Needs, Outcome};
use crate::cli::io::disk::uninterrupted;
use crate::cli::io::report::whole;
use crate::cli::io::session::Session;
use crate::util::text::printable;

pub(super) static INFO: Command = Command {
    name: "info",
    aliases: &["i"],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "print what the image is",
    help: "",
    run: info,
};

pub(super) static SLEEP: Command = Command {
    name: "sleep",
    aliases: &[],
    usage: "MILLISECONDS",
    letters: "",
    words: &[],
    operands: 1..=1,
    needs: Needs::Nothing,
    about: "wait",
    help: "",
    run: sleep,
};

pub(super) static HELP: Command = Command {
    name: "help",
    aliases: &["?"],
    usage: "[COMMAND]",
    letters: "",
    words: &[],
    operands: 0..=1,
    needs: Needs::Nothing,
    about: "list the commands, or explain one",
    help: "",
    run: help,
};

pub(super) static QUIT: Command = Command {
    name: "quit",
    aliases: &["q"],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Nothing,
    about: "close the image and end",
    help: "",
    run: |_, _| Ok(Outcome::Quit),
};

fn info(session: &mut Session, _parsed: &Parsed) -> anyhow::Result<Outcome> {
    let (disk, out) = session.parts()?;
    let chain = disk.backend.chain();
    let top = chain.top();
    out.line(&format!("format name: {}", top.driver().name))?;
    let cluster = whole(top.cluster_size().unwrap_or(0));
    out.line(&format!("cluster size: {cluster}"))?;
    // VM state is not supported; the line is there for scripts that count lines.
    out.line("vm state offset: 0 bytes")?;
    let details = top.details();
    if !details.is_empty() {
        out.line("Format specific information:")?;
    }
    for detail in details {
        let value = match &detail.value {
            Value::String(text) => printable(text),
            other => other.to_string(),
        };
        let key = detail.key.replace('-', " ");
        out.line(&format!("    {key}: {value}"))?;
    }
    Ok(Outcome::Done)
}

fn sleep(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    /// How long a signal may go unnoticed.
    const NAP: Duration = Duration::from_millis(50);
    let text = parsed.operands.first().map(|t| t.to_string_lossy());
    let text = text.as_deref().unwrap_or_default();
    let millis: u32 = text.parse().map_err(|_| {
        let text = printable(text);
        SLEEP.misused(&format!("{text} is not a valid number of milliseconds"))
    })?;
    session.out.flush()?;
    let start = Instant::now();
    let whole = Duration::from_millis(u64::from(millis));
    while let Some(rest) = whole.checked_sub(start.elapsed()) {
        uninterrupted("sleep")?;
        std::thread::sleep(rest.min(NAP));
    }
    Ok(Outcome::Done)
}

fn help(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let out = &mut session.out;
    if let Some(name) = parsed.operands.first() {
        let Some(command) = name.to_str().and_then(command::find) else {
            anyhow::bail!("command {} not found", printable(name));
        };
        out.line(&summary(command))?;
        if !command.aliases.is_empty() {
            out.line(&format!("also: {}", command.aliases.join(", ")))?;
        }
        if !command.help.is_empty() {
            out.line(&format!("\n{}", command.help))?;
        }
        return Ok(Outcome::Done);
    }
    for command in COMMANDS {
        out.line(&summary(command))?;
    }
    out.line(HELP_FOOTER)?;
    Ok(Outcome::Done)
}

const HELP_FOOTER: &str = "
Offsets and lengths are sizes: 512, 4k, 1.5G, 10MiB.  Words with blanks go into quotes; a word
that begins with # begins a comment.  'help COMMAND' explains a command's options.";

fn summary(command: &Command) -> String {
    format!("{} -- {}", command.line(), command.about)
}
