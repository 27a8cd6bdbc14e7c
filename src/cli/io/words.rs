//! A command line cut into words: blanks separate, quotes and backslashes keep together, `#`
//! begins a comment.  Words are bytes, as names of files are.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// The words of `line`; none for a blank line or a comment.
///
/// Between `'…'` everything is itself; between `"…"` a backslash takes the meaning from `"` and
/// `\`; elsewhere it does so for any byte.  A comment begins with a word that begins with `#`.
///
/// # Errors
/// Says which quote is not closed, or that nothing follows the last backslash.
pub(in crate::cli) fn split(line: &[u8]) -> Result<Vec<OsString>, String> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'#' if word.is_none() => break,
            _ if byte.is_ascii_whitespace() => words.extend(word.take()),
            b'\'' | b'"' => quoted(&mut bytes, byte, word.get_or_insert_default())?,
            b'\\' => {
                let next = bytes.next().ok_or("nothing follows the last backslash")?;
                word.get_or_insert_default().push(next);
            }
            _ => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    Ok(words.into_iter().map(OsString::from_vec).collect())
}

/// Moves what stands up to the closing `quote` into `word`.
fn quoted(
    bytes: &mut impl Iterator<Item = u8>,
    quote: u8,
    word: &mut Vec<u8>,
) -> Result<(), String> {
    let open = || format!("the quote {} is not closed", char::from(quote));
    loop {
        match bytes.next().ok_or_else(open)? {
            byte if byte == quote => return Ok(()),
            b'\\' if quote == b'"' => {
                let next = bytes.next().ok_or_else(open)?;
                if !matches!(next, b'"' | b'\\') {
                    word.push(b'\\');
                }
                word.push(next);
            }
            byte => word.push(byte),
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
            assert_eq!(split(line.as_bytes()).expect(line), words, "{line}");
        }
    }

    #[test]
    fn words_are_bytes() {
        let words = split(b"open '\xff a' \xe9\\ \xc3").expect("is closed");
        let bytes: Vec<Vec<u8>> = words.into_iter().map(OsString::into_vec).collect();
        assert_eq!(bytes, [&b"open"[..], b"\xff a", b"\xe9 \xc3"]);
    }

    #[test]
    fn what_is_not_closed_is_refused() {
        for line in ["a 'b", "a \"b", "a \"b\\\"", "a\\"] {
            assert!(split(line.as_bytes()).is_err(), "{line}");
        }
    }
}
