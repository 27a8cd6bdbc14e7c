//! The prompt on a terminal: editing, history, completion.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::config::CompletionType;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Context, Editor, Helper};

use crate::chain::HostFile;
use crate::cli::io::command::COMMANDS;
use crate::cli::kept;

/// Lines of history that are kept.
const HISTORY: usize = 1000;

/// A line editor with the history of earlier sessions.
#[derive(Debug)]
pub(super) struct Prompt {
    editor: Editor<Words, FileHistory>,
    history: Option<PathBuf>,
}

impl Prompt {
    /// A prompt on the terminal.  A history that cannot be read is empty.
    ///
    /// # Errors
    /// The terminal's.
    pub(super) fn new() -> anyhow::Result<Self> {
        let config = Config::builder()
            .max_history_size(HISTORY)?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Words {
            files: FilenameCompleter::new(),
        }));
        let history = history_path();
        if let Some(path) = &history {
            // Only a convenience: a session without it is a session.
            let _ = editor.load_history(path);
        }
        Ok(Self { editor, history })
    }

    /// The next line; `None` at the end of input.  Ctrl-C gives the line up and begins another.
    ///
    /// # Errors
    /// The terminal's.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            match self.editor.readline("vdtool> ") {
                Ok(line) => {
                    let _ = self.editor.add_history_entry(&line);
                    return Ok(Some(line));
                }
                Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => {}
                Err(ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Keeps the lines of this session for the next one, where that is possible: not in one of
    /// `files`, nor in anything else that is no history.
    pub(super) fn save(&mut self, files: &[HostFile]) {
        let Some(path) = &self.history else {
            return;
        };
        if kept::refuse(path, files).is_err() || !may_hold_history(path) {
            return;
        }
        if let Some(directory) = path.parent() {
            let _ = std::fs::create_dir_all(directory);
        }
        let _ = self.editor.append_history(path);
    }
}

/// What a file of history begins with.
const HISTORY_MARK: &[u8] = b"#V2\n";

/// Whether there is nothing at `path`, or a history.
fn may_hold_history(path: &Path) -> bool {
    let Ok(found) = std::fs::metadata(path) else {
        return true;
    };
    let mut mark = [0; HISTORY_MARK.len()];
    let mut begins = |mut file: File| file.read_exact(&mut mark).is_ok() && mark == HISTORY_MARK;
    found.is_file() && (found.len() == 0 || File::open(path).is_ok_and(&mut begins))
}

/// Where the history is kept: the XDG state directory; nowhere without a home.
fn history_path() -> Option<PathBuf> {
    let absolute = |name| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    Some(state?.join("vdtool").join("io-history"))
}

/// Completes names of commands, and of files where a command takes one.
struct Words {
    files: FilenameCompleter,
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Words")
    }
}

impl Helper for Words {}
impl Highlighter for Words {}
impl Validator for Words {}

impl Hinter for Words {
    type Hint = String;
}

impl Completer for Words {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _context: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        match place(line.get(..pos).unwrap_or_default()) {
            Place::Command { start, typed } => Ok((start, commands(typed))),
            Place::File => self.files.complete_path(line, pos),
            Place::Other => Ok((pos, Vec::new())),
        }
    }
}

/// What is being typed.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Command { start: usize, typed: &'a str },
    File,
    Other,
}

/// What is being typed at the end of `text`.
fn place(text: &str) -> Place<'_> {
    let start = text.rfind(char::is_whitespace).map_or(0, |i| i + 1);
    let typed = &text[start..];
    let mut before = text[..start].split_whitespace();
    let first = before.next();
    let last = before.last();
    match (first, last) {
        (None | Some("help" | "?"), None) => Place::Command { start, typed },
        (Some("open" | "o"), _) if !typed.starts_with('-') => Place::File,
        (Some("write" | "w"), Some("-s")) => Place::File,
        _ => Place::Other,
    }
}

fn commands(typed: &str) -> Vec<Pair> {
    COMMANDS
        .iter()
        .filter(|c| c.name.starts_with(typed))
        .map(|c| Pair {
            display: c.name.to_owned(),
            replacement: format!("{} ", c.name),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_files_are_completed_where_they_belong() {
        let command = |start, typed| Place::Command { start, typed };
        let cases = [
            ("", command(0, "")),
            ("re", command(0, "re")),
            ("  re", command(2, "re")),
            ("help wr", command(5, "wr")),
            ("help write x", Place::Other),
            ("open di", Place::File),
            ("open -r di", Place::File),
            ("open -", Place::Other),
            ("write -s pa", Place::File),
            ("write -s", Place::Other),
            ("read 0 ", Place::Other),
        ];
        for (text, expected) in cases {
            assert_eq!(place(text), expected, "{text}");
        }
        let names: Vec<String> = commands("re").into_iter().map(|p| p.display).collect();
        assert_eq!(names, ["read", "readv", "reopen"]);
    }
}
