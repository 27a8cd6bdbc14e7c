//! Options and operands of one command, as getopt has them: single letters, clustered, anywhere
//! before `--`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::util::size;
use crate::util::text::printable;

/// What was typed after a command's name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    options: Vec<(char, OsString)>,
    words: Vec<(&'static str, OsString)>,
    /// What is not an option.
    pub(super) operands: Vec<OsString>,
}

impl Parsed {
    /// Sorts `words` by `letters`: option letters, each followed by `:` where it takes a value.
    ///
    /// `long` are options that are words, each with a value: `--word VALUE`, `--word=VALUE`.
    ///
    /// A word such as `-1` is an operand, so that it is refused as the number it was meant to be.
    ///
    /// # Errors
    /// Names the option that is unknown or lacks its value.
    pub(super) fn parse(
        letters: &str,
        long: &[&'static str],
        words: &[OsString],
    ) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_bytes().strip_prefix(b"-") {
                Some(b"-") => parsed.operands.extend(words.by_ref().cloned()),
                Some([b'-', option @ ..]) if !long.is_empty() => {
                    parsed.word(long, option, &mut words)?;
                }
                Some(cluster) if !cluster.is_empty() && !is_number(cluster) => {
                    parsed.cluster(letters, cluster, &mut words)?;
                }
                _ => parsed.operands.push(word.clone()),
            }
        }
        Ok(parsed)
    }

    fn cluster<'a>(
        &mut self,
        letters: &str,
        cluster: &[u8],
        words: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<(), String> {
        for (index, byte) in cluster.iter().enumerate() {
            let c = char::from(*byte);
            let known = letters.find(c).filter(|_| c != ':' && c.is_ascii());
            let Some(known) = known else {
                let rest = String::from_utf8_lossy(&cluster[index..]);
                let letter: String = rest.chars().take(1).collect();
                return Err(format!("no option -{}", printable(&letter)));
            };
            if !letters[known..].starts_with(&format!("{c}:")) {
                self.options.push((c, OsString::new()));
                continue;
            }
            let rest = &cluster[index + 1..];
            let value = match rest.is_empty() {
                true => words.next().cloned(),
                false => Some(OsStr::from_bytes(rest).to_owned()),
            };
            let value = value.ok_or_else(|| format!("option -{c} needs a value"))?;
            self.options.push((c, value));
            return Ok(());
        }
        Ok(())
    }

    fn word<'a>(
        &mut self,
        long: &[&'static str],
        option: &[u8],
        words: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<(), String> {
        let end = option.iter().position(|b| *b == b'=');
        let name = &option[..end.unwrap_or(option.len())];
        let Some(known) = long.iter().find(|known| known.as_bytes() == name) else {
            let name = printable(OsStr::from_bytes(name));
            return Err(format!(
                "no option --{name} (allowed: --{})",
                long.join(", --")
            ));
        };
        let value = match end {
            Some(end) => Some(OsStr::from_bytes(&option[end + 1..]).to_owned()),
            None => words.next().cloned(),
        };
        let value = value.ok_or_else(|| format!("option --{known} needs a value"))?;
        self.words.push((known, value));
        Ok(())
    }

    /// All values of an option that is a word, in order.
    pub(super) fn of_word(&self, word: &str) -> impl Iterator<Item = &OsStr> {
        let found = self.words.iter().filter(move |(name, _)| *name == word);
        found.map(|(_, value)| value.as_os_str())
    }

    /// Whether the option was given.
    pub(super) fn has(&self, option: char) -> bool {
        self.options.iter().any(|(c, _)| *c == option)
    }

    /// Its value; the last one where it was given more than once.
    pub(super) fn value(&self, option: char) -> Option<&OsStr> {
        let found = self.options.iter().rev().find(|(c, _)| *c == option);
        found.map(|(_, value)| value.as_os_str())
    }

    /// All its values, in order.
    pub(super) fn values(&self, option: char) -> impl Iterator<Item = &OsStr> {
        let found = self.options.iter().filter(move |(c, _)| *c == option);
        found.map(|(_, value)| value.as_os_str())
    }

    /// Its value as a size in bytes.
    ///
    /// # Errors
    /// Names what is not a size.
    pub(super) fn size_of(&self, option: char) -> anyhow::Result<Option<u64>> {
        self.value(option).map(parse_size).transpose()
    }

    /// The operand at `index` as a size in bytes; 0 where there is none, which the command's
    /// count of operands rules out.
    ///
    /// # Errors
    /// Names what is not a size.
    pub(super) fn size_at(&self, index: usize) -> anyhow::Result<u64> {
        self.operands.get(index).map_or(Ok(0), |w| parse_size(w))
    }

    /// The sum of the operands from `index` on, as sizes in bytes.
    ///
    /// # Errors
    /// Names what is not a size, and says where the sum is too large.
    pub(super) fn sizes_from(&self, index: usize) -> anyhow::Result<u64> {
        let mut sum = 0u64;
        for word in self.operands.iter().skip(index) {
            sum = sum
                .checked_add(parse_size(word)?)
                .ok_or_else(|| anyhow::anyhow!("the lengths add up to 2^64 or more"))?;
        }
        Ok(sum)
    }
}

fn is_number(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_digit)
}

pub(super) fn parse_size(text: &OsStr) -> anyhow::Result<u64> {
    // What is no text is no number either.
    let text = &*text.to_string_lossy();
    // getopt's users write `+4k` now and then.
    let number = text.strip_prefix('+').unwrap_or(text);
    size::parse(number).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(letters: &str, line: &str) -> Result<Parsed, String> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Parsed::parse(letters, &[], &words)
    }

    #[test]
    fn options_may_be_clustered_and_stand_anywhere() {
        let cases = [
            ("-q -v 0 4k", "qv", None, 2),
            ("-qv 0 4k", "qv", None, 2),
            ("0 4k -vq", "qv", None, 2),
            ("-P 5 0 4k", "P", Some("5"), 2),
            ("-P5 0 4k", "P", Some("5"), 2),
            ("-qP 0xff 0 4k", "qP", Some("0xff"), 2),
            ("-qP0xff 0", "qP", Some("0xff"), 1),
            ("-P 1 -P 2", "P", Some("2"), 0),
            ("-P -q 1", "P", Some("-q"), 1),
            ("-- -q", "", None, 1),
            ("- 1", "", None, 2),
            ("-1 -5", "", None, 2),
        ];
        for (line, given, pattern, operands) in cases {
            let parsed = parse("qvP:", line).expect(line);
            for letter in "qvP".chars() {
                assert_eq!(parsed.has(letter), given.contains(letter), "{line}");
            }
            assert_eq!(parsed.value('P'), pattern.map(OsStr::new), "{line}");
            assert_eq!(parsed.operands.len(), operands, "{line}");
        }
    }

    #[test]
    fn unknown_options_and_missing_values_are_named() {
        for (line, message) in [
            ("-x", "no option -x"),
            ("-qx", "no option -x"),
            ("-:", "no option -:"),
            ("-ä", "no option -ä"),
            ("0 -P", "option -P needs a value"),
        ] {
            assert_eq!(parse("qP:", line), Err(message.to_owned()), "{line}");
        }
    }

    #[test]
    fn options_that_are_words_have_values_and_may_come_again() {
        let parse = |line: &str| {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            Parsed::parse("q", &["lba", "parts"], &words)
        };
        let parsed = parse("-q --lba 16 5 --lba=-1 --parts edc -- --lba").expect("right");
        let values: Vec<&OsStr> = parsed.of_word("lba").collect();
        assert_eq!(values, ["16", "-1"]);
        assert_eq!(parsed.operands, ["5", "--lba"]);
        assert_eq!(parse("--lba"), Err("option --lba needs a value".to_owned()));
        let error = parse("--lbas 1").expect_err("is none");
        assert_eq!(error, "no option --lbas (allowed: --lba, --parts)");
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for word in ["-1", "x", "1.5", "9E", "--1"] {
            let words = vec!["--".into(), word.into()];
            let parsed = Parsed::parse("q", &[], &words).expect("an operand");
            assert!(parsed.size_at(0).is_err(), "{word}");
        }
        let lens = vec![OsString::from("7E"); 3];
        assert!(
            Parsed::parse("", &[], &lens)
                .expect("operands")
                .sizes_from(0)
                .is_err()
        );
    }
}
