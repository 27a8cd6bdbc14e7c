//! Options and operands of one command, as getopt has them: single letters, clustered, anywhere
//! before `--`.

use crate::util::size;
use crate::util::text::printable;

/// What was typed after a command's name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    options: Vec<(char, String)>,
    /// What is not an option.
    pub(super) operands: Vec<String>,
}

impl Parsed {
    /// Sorts `words` by `letters`: option letters, each followed by `:` where it takes a value.
    ///
    /// A word such as `-1` is an operand, so that it is refused as the number it was meant to be.
    ///
    /// # Errors
    /// Names the option that is unknown or lacks its value.
    pub(super) fn parse(letters: &str, words: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.strip_prefix('-') {
                Some("-") => parsed.operands.extend(words.by_ref().cloned()),
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
        cluster: &str,
        words: &mut impl Iterator<Item = &'a String>,
    ) -> Result<(), String> {
        for (index, c) in cluster.char_indices() {
            let known = letters.find(c).filter(|_| c != ':');
            let Some(known) = known else {
                return Err(format!("no option -{}", printable(&c.to_string())));
            };
            if !letters[known..].starts_with(&format!("{c}:")) {
                self.options.push((c, String::new()));
                continue;
            }
            let rest = &cluster[index + c.len_utf8()..];
            let value = match rest.is_empty() {
                true => words.next().cloned(),
                false => Some(rest.to_owned()),
            };
            let value = value.ok_or_else(|| format!("option -{c} needs a value"))?;
            self.options.push((c, value));
            return Ok(());
        }
        Ok(())
    }

    /// Whether the option was given.
    pub(super) fn has(&self, option: char) -> bool {
        self.options.iter().any(|(c, _)| *c == option)
    }

    /// Its value; the last one where it was given more than once.
    pub(super) fn value(&self, option: char) -> Option<&str> {
        let found = self.options.iter().rev().find(|(c, _)| *c == option);
        found.map(|(_, value)| value.as_str())
    }

    /// All its values, in order.
    pub(super) fn values(&self, option: char) -> impl Iterator<Item = &str> {
        let found = self.options.iter().filter(move |(c, _)| *c == option);
        found.map(|(_, value)| value.as_str())
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

fn is_number(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
}

fn parse_size(text: &str) -> anyhow::Result<u64> {
    // getopt's users write `+4k` now and then.
    let number = text.strip_prefix('+').unwrap_or(text);
    size::parse(number).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(letters: &str, line: &str) -> Result<Parsed, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Parsed::parse(letters, &words)
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
            assert_eq!(parsed.value('P'), pattern, "{line}");
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
    fn numbers_that_make_no_sense_are_refused() {
        for word in ["-1", "x", "1.5", "9E", "--1"] {
            let words = vec!["--".to_owned(), word.to_owned()];
            let parsed = Parsed::parse("q", &words).expect("an operand");
            assert!(parsed.size_at(0).is_err(), "{word}");
        }
        let lens = vec!["7E".to_owned(); 3];
        assert!(
            Parsed::parse("", &lens)
                .expect("operands")
                .sizes_from(0)
                .is_err()
        );
    }
}
