//! A command line cut into words: blanks separate, quotes and backslashes keep together, `#`
//! begins a comment.

/// The words of `line`; none for a blank line or a comment.
///
/// Between `'…'` everything is itself; between `"…"` a backslash takes the meaning from `"` and
/// `\`; elsewhere it does so for any character.  A comment begins with a word that begins with
/// `#`.
///
/// # Errors
/// Says which quote is not closed, or that nothing follows the last backslash.
pub(in crate::cli) fn split(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '#' if word.is_none() => break,
            _ if c.is_whitespace() => words.extend(word.take()),
            '\'' | '"' => quoted(&mut chars, c, word.get_or_insert_default())?,
            '\\' => {
                let next = chars.next().ok_or("nothing follows the last backslash")?;
                word.get_or_insert_default().push(next);
            }
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// Moves what stands up to the closing `quote` into `word`.
fn quoted(chars: &mut std::str::Chars<'_>, quote: char, word: &mut String) -> Result<(), String> {
    let open = || format!("the quote {quote} is not closed");
    loop {
        match chars.next().ok_or_else(open)? {
            c if c == quote => return Ok(()),
            '\\' if quote == '"' => {
                let next = chars.next().ok_or_else(open)?;
                if !matches!(next, '"' | '\\') {
                    word.push('\\');
                }
                word.push(next);
            }
            c => word.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_backslashes_keep_a_word_together() {
        let cases: [(&str, &[&str]); 9] = [
            ("read 0 4k", &["read", "0", "4k"]),
            ("  read\t0  ", &["read", "0"]),
            ("open 'a b' c", &["open", "a b", "c"]),
            (r#"open "a \"b\" \n""#, &["open", r#"a "b" \n"#]),
            (r"open a\ b\'", &["open", "a b'"]),
            (r"'a\'b", &[r"a\b"]),
            ("x '' \"\"", &["x", "", ""]),
            ("read 0#1 # rest 'open", &["read", "0#1"]),
            (" # nothing", &[]),
        ];
        for (line, words) in cases {
            assert_eq!(split(line).expect(line), words, "{line}");
        }
    }

    #[test]
    fn what_is_not_closed_is_refused() {
        for line in ["a 'b", "a \"b", "a \"b\\\"", "a\\"] {
            assert!(split(line).is_err(), "{line}");
        }
    }
}
