//! The table of commands, and how a line becomes a call.

use std::ffi::OsStr;
use std::fmt;

use clap::ValueEnum;

use crate::cli::io::args::Parsed;
use crate::cli::io::session::Session;
use crate::cli::io::{control, layout, open, read, words, write};
use crate::util::text::printable;

/// How a command ended that could be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Done.
    Done,
    /// Done, and what was read is not what was expected.
    Differs,
    /// The session is to end.
    Quit,
}

/// What a command needs before it can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// Nothing.
    Nothing,
    /// An open image.
    Disk,
}

/// One row of the table.
pub(super) struct Command {
    /// What it is called.
    pub(super) name: &'static str,
    /// Short names.
    pub(super) aliases: &'static [&'static str],
    /// What follows the name, for people.
    pub(super) usage: &'static str,
    /// Its option letters, as [`Parsed::parse`] takes them.
    pub(super) letters: &'static str,
    /// Its options that are words, each with a value.
    pub(super) words: &'static [&'static str],
    /// Fewest and most operands.
    pub(super) operands: std::ops::RangeInclusive<usize>,
    /// What it needs.
    pub(super) needs: Needs,
    /// What it does, in a few words.
    pub(super) about: &'static str,
    /// What its options are, a line each, and what else there is to know.
    pub(super) help: &'static str,
    /// Carries it out.
    pub(super) run: fn(&mut Session, &Parsed) -> anyhow::Result<Outcome>,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({})", self.name)
    }
}

/// Every command, by name.
pub(super) static COMMANDS: &[&Command] = &[
    &write::AIO_FLUSH,
    &read::AIO_READ,
    &write::AIO_WRITE,
    &layout::ALLOC,
    &open::CLOSE,
    &write::DISCARD,
    &write::FLUSH,
    &control::HELP,
    &control::INFO,
    &layout::LENGTH,
    &layout::MAP,
    &open::OPEN,
    &control::QUIT,
    &read::READ,
    &read::READV,
    &open::REOPEN,
    &control::SLEEP,
    &layout::TRUNCATE,
    &write::WRITE,
    &write::WRITEV,
    &write::ZERO,
];

/// The command called `name`, by its name or an alias.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .copied()
        .find(|c| c.name == name || c.aliases.contains(&name))
}

/// Carries out one line; a blank one does nothing.
///
/// # Errors
/// What is wrong with the line, or why the command failed.
pub(super) fn execute(session: &mut Session, line: &[u8]) -> anyhow::Result<Outcome> {
    let words = words::split(line).map_err(anyhow::Error::msg)?;
    let Some((name, rest)) = words.split_first() else {
        return Ok(Outcome::Done);
    };
    let Some(command) = name.to_str().and_then(find) else {
        let name = printable(name);
        anyhow::bail!("command '{name}' not found (try 'help')");
    };
    if command.needs == Needs::Disk {
        session.disk()?;
    }
    let parsed = Parsed::parse(command.letters, command.words, rest);
    let parsed = parsed.map_err(|e| command.misused(&e))?;
    command.check_operands(&parsed, &command.operands)?;
    (command.run)(session, &parsed)
}

impl Command {
    /// Refuses another number of operands.
    fn check_operands(
        &self,
        parsed: &Parsed,
        allowed: &std::ops::RangeInclusive<usize>,
    ) -> anyhow::Result<()> {
        let count = parsed.operands.len();
        if allowed.contains(&count) {
            return Ok(());
        }
        let (least, most) = (allowed.start(), allowed.end());
        let allowed = match *most {
            usize::MAX => format!("at least {least}"),
            _ if least == most => least.to_string(),
            _ => format!("{least} to {most}"),
        };
        Err(self.misused(&format!("bad argument count {count} (allowed: {allowed})")))
    }

    /// Refuses any number of operands but one.
    pub(super) fn check_count(&self, parsed: &Parsed, count: usize) -> anyhow::Result<()> {
        self.check_operands(parsed, &(count..=count))
    }

    /// An error about how the command was typed.
    pub(super) fn misused(&self, what: &str) -> anyhow::Error {
        let line = self.line();
        anyhow::anyhow!("{}: {what} (usage: {line})", self.name)
    }

    /// The mode called `text`.
    ///
    /// # Errors
    /// Names the modes there are.
    pub(super) fn mode<M: ValueEnum>(&self, text: &OsStr) -> anyhow::Result<M> {
        M::from_str(&text.to_string_lossy(), false).map_err(|_| {
            let names = M::value_variants().iter().filter_map(M::to_possible_value);
            let names: Vec<String> = names.map(|v| v.get_name().to_owned()).collect();
            let text = printable(text);
            self.misused(&format!("no mode '{text}' (allowed: {})", names.join(", ")))
        })
    }

    /// Its name and what follows it.
    pub(super) fn line(&self) -> String {
        format!("{} {}", self.name, self.usage)
            .trim_end()
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_no_name_means_two_commands() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        let mut names: Vec<&str> = COMMANDS
            .iter()
            .flat_map(|c| c.aliases.iter().chain([&c.name]))
            .copied()
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn every_option_is_explained_and_in_the_usage() {
        for command in COMMANDS {
            for letter in command.letters.chars().filter(|c| *c != ':') {
                let line = format!("-{letter} ");
                let explained = command.help.lines().any(|l| l.starts_with(&line));
                assert!(explained, "{} {letter}", command.name);
                assert!(command.usage.contains(letter), "{} {letter}", command.name);
            }
            for word in command.words {
                let word = format!("--{word} ");
                let explained = command.help.lines().any(|l| l.starts_with(&word));
                assert!(explained, "{} {word}", command.name);
            }
        }
    }
}
