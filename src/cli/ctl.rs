//! `vdtool ctl`: commands to a running `serve`.
//!
//! A command is a line of words, quoted where they need it; the answer is a line of JSON,
//! `{"return": ..}` or `{"error": {"class": .., "message": ..}}`.  Both ends read the words by the
//! one definition here.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use serde_json::Value;

use crate::cli::Globals;
use crate::cli::common::{OutputArgs, OutputFormat, parse_driver, parse_size, print};
use crate::cli::exit::{Exit, coded};
use crate::error::Error;
use crate::image::Driver;
use crate::output;

/// Longest command, in bytes.
pub const MAX_COMMAND: usize = 8192;

/// Longest answer that is read, in bytes: statistics of all the queues there can be.
const MAX_ANSWER: u64 = 64 << 20;

const HELP: &str = "\
EXAMPLES:
  vdtool ctl /run/disk.sock status
  vdtool ctl --output json /run/disk.sock stats
  vdtool ctl /run/disk.sock resize 40G
  vdtool ctl /run/disk.sock change other.qcow2
  vdtool ctl /run/disk.sock fork monday.qcow2
  vdtool ctl /run/disk.sock commit sunday.qcow2
  vdtool ctl /run/disk.sock limit bps=50M,iops=2000
  vdtool ctl /run/disk.sock stop
  vdtool ctl /run/disk.sock stop --hand-over
  echo status | socat - UNIX-CONNECT:/run/disk.sock

NOTES:
  Where several disks are served, --export names one. status, stats, pause, resume and flush are for
  all of them without it, the others must have it.
  fork makes the image the base NEW, to be left alone, and the disk goes on with an empty image that
  has its name. commit moves what the images between the top one and BASE have into BASE while clients
  use the disk, has the top one lie over BASE, and empties those between; status says how far it is.
  After an error, as on a full host, 'commit resume' goes on, and reopen gives it up. Where the server
  ends before, 'vdtool commit -b BASE --children TOP FILE' does it, or another 'ctl commit'.

EXIT STATUS:
  0   done
  1   failed, or nobody listens on the socket
  2   wrong usage
  63  the format, or the server, has no such operation";

/// Arguments of `ctl`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// How the answer is printed.
    #[command(flatten)]
    pub output: OutputArgs,
    /// The socket that was given to serve --control.
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub order: Order,
}

/// Which disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Which {
    /// The disk that clients call so.
    #[arg(long, value_name = "NAME")]
    pub export: Option<String>,
}

/// A command.
#[derive(Debug, Clone, Subcommand)]
pub enum Order {
    /// What is served, and how it does.
    Status {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// What was done so far: requests, bytes, failures, latencies.
    Stats {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// Hold requests, and return once none is under way.
    Pause {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// Go on after a pause or an error, with the I/O status reset.
    Resume {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// Make completed writes durable.
    Flush {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// Change the size of a disk.
    Resize {
        /// Which disk.
        #[command(flatten)]
        which: Which,
        /// Allow it to become smaller: what lies behind the new end is lost.
        #[arg(long)]
        shrink: bool,
        /// The new size.
        #[arg(value_name = "SIZE", value_parser = parse_size)]
        size: u64,
    },
    /// Go on with another image.
    Change {
        /// Which disk.
        #[command(flatten)]
        which: Which,
        /// Format of the image; without it its content decides.
        #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
        format: Option<&'static Driver>,
        /// The image.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Close the image and open it again, after something else has changed it.
    Reopen {
        /// Which disk.
        #[command(flatten)]
        which: Which,
    },
    /// Go on with an empty image that has the name of the image, which becomes its base.
    Fork {
        /// Which disk.
        #[command(flatten)]
        which: Which,
        /// The name that the image gets.
        #[arg(value_name = "NEW")]
        new: PathBuf,
    },
    /// Merge the images below the top one into BASE, while the disk is used; 'pause' and 'resume' hold
    /// that and let it go on, after an error too.
    Commit {
        /// Which disk.
        #[command(flatten)]
        which: Which,
        /// BASE as it was typed, where WHAT is its absolute path.
        #[arg(long, value_name = "NAME", hide = true, requires = "what")]
        called: Option<OsString>,
        /// The image below to merge into, by the name that the chain has for it, else by its path;
        /// without it, the one right below the parent of the top image.
        #[arg(value_name = "BASE|pause|resume")]
        what: Option<OsString>,
    },
    /// Set other limits.
    Limit {
        /// Which disk; those that share its group get the limits too.
        #[command(flatten)]
        which: Which,
        /// As --limit of serve has them, or 'none'.
        #[arg(value_name = "K=V,..")]
        limits: String,
    },
    /// End serving: requests under way end, the images are flushed and closed.
    Stop {
        /// End at once: the images are left as a kill leaves them.
        #[arg(long)]
        force: bool,
        /// Leave block devices waiting for the next server, serve --recover, which must come.
        #[arg(long, conflicts_with = "force")]
        hand_over: bool,
    },
}

/// A line of a client, read on the serving side.
#[derive(Debug, Parser)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    disable_help_subcommand = true
)]
pub struct Line {
    /// The command.
    #[command(subcommand)]
    pub order: Order,
}

impl Order {
    /// The words that say it; a file by its absolute path, as the server may be elsewhere.
    fn words(&self) -> anyhow::Result<Vec<OsString>> {
        let mut words = Vec::new();
        let (name, which, rest) = match self {
            Self::Status { which } => ("status", Some(which), vec![]),
            Self::Stats { which } => ("stats", Some(which), vec![]),
            Self::Pause { which } => ("pause", Some(which), vec![]),
            Self::Resume { which } => ("resume", Some(which), vec![]),
            Self::Flush { which } => ("flush", Some(which), vec![]),
            Self::Resize {
                which,
                shrink,
                size,
            } => {
                let shrink = shrink.then(|| "--shrink".into());
                let rest = shrink.into_iter().chain([size.to_string().into()]);
                ("resize", Some(which), rest.collect())
            }
            Self::Change {
                which,
                format,
                file,
            } => {
                let format = format.map(|f| format!("--format={}", f.name).into());
                let rest = format.into_iter().chain(["--".into(), absolute(file)?]);
                ("change", Some(which), rest.collect())
            }
            Self::Reopen { which } => ("reopen", Some(which), vec![]),
            Self::Fork { which, new } => ("fork", Some(which), vec!["--".into(), absolute(new)?]),
            Self::Commit {
                which,
                called,
                what,
            } => ("commit", Some(which), base(called.as_ref(), what.as_ref())?),
            Self::Limit { which, limits } => ("limit", Some(which), vec![limits.into()]),
            Self::Stop { force, hand_over } => {
                let how = [(*force, "--force"), (*hand_over, "--hand-over")];
                let said = how.into_iter().filter(|(is, _)| *is);
                ("stop", None, said.map(|(_, word)| word.into()).collect())
            }
        };
        words.push(name.into());
        let export = which.and_then(|w| w.export.as_ref());
        words.extend(export.map(|name| format!("--export={name}").into()));
        words.extend(rest);
        Ok(words)
    }
}

/// How the base of a merge is said: by its name in the chain, or its path, which may be another here.
fn base(called: Option<&OsString>, what: Option<&OsString>) -> anyhow::Result<Vec<OsString>> {
    let mut option = OsString::from("--called=");
    Ok(match (called, what) {
        (_, None) => vec![],
        (None, Some(what)) if what == "pause" || what == "resume" => vec![what.clone()],
        (called, Some(what)) => {
            option.push(called.unwrap_or(what));
            vec![option, "--".into(), absolute(Path::new(what))?]
        }
    })
}

fn absolute(file: &Path) -> anyhow::Result<OsString> {
    if file.to_str().is_some_and(|text| text.contains("://")) {
        return Ok(file.into());
    }
    let path = std::path::absolute(file).map_err(|e| Error::io("find", e).at(file))?;
    Ok(path.into())
}

/// The words as a line that `io`'s rules for quotes cut into the same words.
///
/// # Errors
/// A word with an end of line; a line that is too long.
fn line(words: &[OsString]) -> crate::Result<Vec<u8>> {
    let mut line = Vec::new();
    for word in words.iter().map(|word| word.as_bytes()) {
        match word.iter().all(|b| is_plain(*b)) && !word.is_empty() {
            true => line.extend(word),
            false => {
                line.push(b'\'');
                for byte in word {
                    match byte {
                        b'\'' => line.extend(br"'\''"),
                        byte => line.push(*byte),
                    }
                }
                line.push(b'\'');
            }
        }
        line.push(b' ');
    }
    line.pop();
    if line.iter().any(|b| matches!(b, b'\n' | b'\r')) {
        return Err(Error::invalid("a command has no ends of lines"));
    }
    line.push(b'\n');
    if line.len() > MAX_COMMAND {
        return Err(Error::invalid(format!(
            "the command has {} bytes (allowed: {MAX_COMMAND})",
            line.len()
        )));
    }
    Ok(line)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_=./,:+@%".contains(&byte)
}

/// Runs the command.
///
/// # Errors
/// Nobody listens; what the server answers.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let line = line(&args.order.words()?)?;
    let answer = exchange(&args.socket, &line).map_err(|e| e.at(&args.socket))?;
    if let Some(error) = answer.get("error") {
        let text = |key| error.get(key).and_then(Value::as_str);
        let message = anyhow::anyhow!("{}", text("message").unwrap_or("failed"));
        return Err(match text("class") {
            Some("unsupported") => coded(Exit::NoSuchOperation, message),
            Some("usage") => coded(Exit::Usage, message),
            _ => message,
        });
    }
    let value = answer.get("return").unwrap_or(&Value::Null);
    let reports = matches!(args.order, Order::Status { .. } | Order::Stats { .. });
    match args.output.output {
        OutputFormat::Json => print(|out| Ok(output::json::write(out, value)?))?,
        OutputFormat::Human if reports && !globals.quiet => {
            print(|out| Ok(output::serve::write(out, value)?))?;
        }
        OutputFormat::Human => {}
    }
    Ok(Exit::Done)
}

fn exchange(socket: &Path, line: &[u8]) -> crate::Result<Value> {
    let fail = |doing: &'static str| move |e| Error::io(doing, e);
    let mut stream = UnixStream::connect(socket).map_err(fail("connect to the socket"))?;
    stream.write_all(line).map_err(fail("send the command"))?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_ANSWER))
        .read_line(&mut answer)
        .map_err(fail("read the answer"))?;
    if answer.is_empty() {
        return Err(Error::invalid("the server ended without an answer"));
    }
    serde_json::from_str(&answer)
        .map_err(|e| Error::invalid(format!("the answer is not JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::cli::io::words;

    #[test]
    fn any_words_survive_the_way_to_the_server() {
        for words in [
            vec!["status"],
            vec!["change", "/a b/it's #1 \\ \"x\"", ""],
            vec!["--export=ä ö", "#"],
        ] {
            let mut words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
            words.push(OsString::from_vec(b"/caf\xe9 \xff'".to_vec()));
            let line = line(&words).expect("fits");
            assert_eq!(words::split(line.trim_ascii_end()), Ok(words));
        }
        assert!(line(&["a\nb".into()]).is_err());
        assert!(line(&["a".repeat(MAX_COMMAND).into()]).is_err());
    }

    #[test]
    fn each_order_says_itself_in_words_that_mean_it() {
        for order in [
            "status",
            "stats --export=a",
            "pause",
            "resume",
            "flush",
            "resize --export=a --shrink 4096",
            "change --format=qcow2 -- /a/b",
            "change -- nbd://host/a",
            "reopen",
            "fork --export=a -- /a/b",
            "commit",
            "commit --export=a pause",
            "commit resume",
            "commit --called=b.vhd -- /a/b.vhd",
            "limit iops=5",
            "stop --force",
            "stop --hand-over",
        ] {
            let words: Vec<&str> = order.split(' ').collect();
            let line = Line::try_parse_from(&words).expect(order);
            assert_eq!(line.order.words().expect(order), words);
        }
    }
}
