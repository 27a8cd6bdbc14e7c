//! Names as bytes, and terminal-safe printing of text that comes from images.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;

/// `text` with control and bidirectional-override characters escaped, so that a name taken from
/// an image cannot move the cursor or reorder what the user reads; bytes that are not UTF-8 as
/// `\xE9`, so that no two names look alike.
pub fn printable(text: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let bytes = text.as_ref().as_bytes();
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || is_bidi(c) {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            } else {
                out.push(c);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02X}");
        }
    }
    out
}

/// `text` for JSON, which is UTF-8: other bytes become U+FFFD, as QEMU has it.
pub fn replaced(text: &(impl AsRef<OsStr> + ?Sized)) -> String {
    text.as_ref().to_string_lossy().into_owned()
}

/// A word of a command as a shell reads it, safe for a terminal.
pub fn shell_word(word: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let shown = printable(word);
    let is_plain = |c: char| c.is_alphanumeric() || "_-./:=+,@%".contains(c);
    match !shown.is_empty() && shown.chars().all(is_plain) {
        true => shown,
        false => format!("'{}'", shown.replace('\'', "'\\''")),
    }
}

/// The key and the value of `KEY=VALUE`.
pub fn split_equals(pair: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = pair.as_bytes();
    let at = bytes.iter().position(|b| *b == b'=')?;
    Some((
        OsStr::from_bytes(&bytes[..at]),
        OsStr::from_bytes(&bytes[at + 1..]),
    ))
}

fn is_bidi(c: char) -> bool {
    matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_and_overrides_become_visible() {
        assert_eq!(printable("a\x1b[2Jb\u{202e}c"), "a\\u{1b}[2Jb\\u{202e}c");
        assert_eq!(printable("größe.vhd"), "größe.vhd");
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_told_apart() {
        let name = OsStr::from_bytes(b"caf\xe9\x1b.raw");
        assert_eq!(printable(name), "caf\\xE9\\u{1b}.raw");
        assert_ne!(printable(name), printable("caf\u{fffd}\u{1b}.raw"));
    }

    #[test]
    fn words_of_commands_are_quoted_where_a_shell_would_read_them_otherwise() {
        for (word, shown) in [
            ("a/b-1.vhd", "a/b-1.vhd"),
            ("my disk.vhd", "'my disk.vhd'"),
            ("it's;rm", "'it'\\''s;rm'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(word), shown);
        }
    }

    #[test]
    fn a_pair_is_split_at_its_first_equals_sign() {
        let split = |pair| split_equals(OsStr::new(pair));
        assert_eq!(split("a=b=c"), Some((OsStr::new("a"), OsStr::new("b=c"))));
        assert_eq!(split("a"), None);
    }
}
