//! Bounds on attributes, before the parser sees them: it compares those of an element with each
//! other, and keeps them all.

use crate::error::{Error, ErrorKind, Result};

/// Most attributes of one element.
const MAX_OF_ONE: usize = 256;
/// Most attributes of a descriptor.
const MAX_OF_ALL: usize = 300_000;

/// Most namespaces that are declared: the parser goes through those in scope for each of them.
const MAX_NAMESPACES: usize = 300;

/// Refuses XML with too many attributes.  Whether it is well-formed is the parser's to say.
///
/// # Errors
/// `OutOfRange`.
pub(super) fn check(text: &str) -> Result<()> {
    if text.matches("xmlns").nth(MAX_NAMESPACES).is_some() {
        let text = format!("the descriptor declares more than {MAX_NAMESPACES} namespaces");
        return Err(Error::new(ErrorKind::OutOfRange, text));
    }
    let mut rest = text.as_bytes();
    let mut all = 0;
    while let Some(at) = rest.iter().position(|byte| *byte == b'<') {
        rest = &rest[at..];
        rest = match rest {
            [b'<', b'!', b'-', b'-', ..] => behind(&rest[4..], b"-->"),
            [b'<', b'!', b'[', ..] => behind(&rest[3..], b"]]>"),
            [b'<', b'?', ..] => behind(&rest[2..], b"?>"),
            _ => {
                let (values, after) = tag(&rest[1..]);
                all += values;
                if values > MAX_OF_ONE || all > MAX_OF_ALL {
                    return Err(Error::new(
                        ErrorKind::OutOfRange,
                        format!(
                            "the descriptor has more than {MAX_OF_ONE} attributes in an element, \
                             or {MAX_OF_ALL} in all"
                        ),
                    ));
                }
                after
            }
        };
    }
    Ok(())
}

/// Quoted values of a tag, and what follows it.
fn tag(bytes: &[u8]) -> (usize, &[u8]) {
    let (mut rest, mut values) = (bytes, 0);
    loop {
        let end = |byte: &u8| matches!(byte, b'>' | b'"' | b'\'');
        let Some(at) = rest.iter().position(end) else {
            return (values, &[]);
        };
        let (found, after) = (rest[at], &rest[at + 1..]);
        if found == b'>' {
            return (values, after);
        }
        values += 1;
        rest = behind(after, &[found]);
    }
}

/// What follows `end`; nothing where it is not there.
fn behind<'a>(bytes: &'a [u8], end: &[u8]) -> &'a [u8] {
    let at = bytes.windows(end.len()).position(|part| part == end);
    at.map_or(&[], |at| &bytes[at + end.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_counted_where_they_are_some() {
        let many = |count: usize| -> String { (0..count).map(|n| format!(" a{n}='>'")).collect() };
        for (text, is_fine) in [
            (format!("<a{}/>", many(256)), true),
            (format!("<a{}/>", many(257)), false),
            (format!("<!--<a{}>--><b/>", many(300)), true),
            (format!("<!--x--><a{}/>", many(300)), false),
            (format!("<![CDATA[<a{}>]]>", many(300)), true),
            (format!("<a>{}</a>", many(300)), true),
            (format!("<a{}/>", many(200)).repeat(1600), false),
            ("<a xmlns:b='c'>".repeat(300), true),
            ("<a xmlns:b='c'>".repeat(301), false),
            ("<a b='".to_owned(), true),
            ("<".to_owned(), true),
        ] {
            assert_eq!(
                check(&text).is_ok(),
                is_fine,
                "{}",
                &text[..text.len().min(40)]
            );
        }
    }
}
