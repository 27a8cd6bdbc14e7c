//! `vdtool completions`.

use clap::{CommandFactory, ValueEnum};
use clap_complete::shells;

use crate::cli::common::print;
use crate::cli::exit::Exit;
use crate::cli::{Cli, Globals};

const HELP: &str = "\
EXAMPLES:
  vdtool completions bash > /etc/bash_completion.d/vdtool
  vdtool completions zsh > \"${fpath[1]}/_vdtool\"
  vdtool completions fish > ~/.config/fish/completions/vdtool.fish

EXIT STATUS:
  0   done
  2   wrong usage";

/// The shells that completions are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// bash.
    Bash,
    /// zsh.
    Zsh,
    /// fish.
    Fish,
}

impl Shell {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bash, Self::Zsh, Self::Fish];

    /// The name under which the shell looks for the file.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Bash => "vdtool.bash",
            Self::Zsh => "_vdtool",
            Self::Fish => "vdtool.fish",
        }
    }

    /// The script.
    pub fn script(self) -> Vec<u8> {
        let mut script = Vec::new();
        let mut command = Cli::command();
        let (command, name) = (&mut command, "vdtool");
        match self {
            Self::Bash => clap_complete::generate(shells::Bash, command, name, &mut script),
            Self::Zsh => clap_complete::generate(shells::Zsh, command, name, &mut script),
            Self::Fish => clap_complete::generate(shells::Fish, command, name, &mut script),
        }
        script
    }
}

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// The shell.
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    // Made in memory first: the generator would panic on a closed pipe.
    let script = args.shell.script();
    print(|out| Ok(out.write_all(&script)?))?;
    Ok(Exit::Done)
}
