//! What stands before the data of a member.

/// Most bytes of a header.
pub(super) const MAX: usize = 256 << 10;
/// Most bytes of each of its texts.
const MAX_TEXT: usize = 64 << 10;

const CHECKED: u8 = 2;
const EXTRA: u8 = 4;
const NAME: u8 = 8;
const COMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

/// Bytes of the header that `bytes` begin with; `None` where they end before it does.
///
/// # Errors
/// What is wrong with it.
pub(super) fn len(bytes: &[u8]) -> Result<Option<usize>, &'static str> {
    const MAGIC: [u8; 2] = [0x1f, 0x8b];
    if bytes
        .iter()
        .zip(&MAGIC)
        .any(|(found, magic)| found != magic)
    {
        return Err("is not compressed by gzip");
    }
    let Some(fixed) = bytes.first_chunk::<10>() else {
        return Ok(None);
    };
    let [_, _, method, flags, ..] = *fixed;
    if method != 8 || flags & RESERVED != 0 {
        return Err("is gzip of an unknown method (allowed: deflate)");
    }
    let mut at = fixed.len();
    if flags & EXTRA != 0 {
        let Some(len) = bytes.get(at..).and_then(|rest| rest.first_chunk()) else {
            return Ok(None);
        };
        at += 2 + usize::from(u16::from_le_bytes(*len));
    }
    for flag in [NAME, COMMENT] {
        if flags & flag != 0 {
            let rest = bytes.get(at..).unwrap_or_default();
            match rest.iter().take(MAX_TEXT).position(|byte| *byte == 0) {
                Some(end) => at += end + 1,
                None if rest.len() < MAX_TEXT => return Ok(None),
                None => return Err("has a name or comment without an end"),
            }
        }
    }
    if flags & CHECKED != 0 {
        at += 2;
    }
    Ok((at <= bytes.len()).then_some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_end_behind_what_their_flags_say() {
        let with = |flags: u8, rest: &[u8]| {
            let mut bytes = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3];
            bytes.extend(rest);
            bytes
        };
        assert_eq!(len(&with(0, b"")), Ok(Some(10)));
        assert_eq!(len(&with(1, b"")), Ok(Some(10)));
        assert_eq!(len(&with(NAME, b"ab\0x")), Ok(Some(13)));
        assert_eq!(len(&with(NAME | COMMENT, b"ab\0c\0x")), Ok(Some(15)));
        assert_eq!(len(&with(EXTRA | CHECKED, b"\x03\0abcdef")), Ok(Some(17)));
        for cut in [
            with(NAME, b"ab"),
            with(EXTRA, b"\x03"),
            with(EXTRA, b"\x03\0a"),
        ] {
            assert_eq!(len(&cut), Ok(None));
        }
        assert_eq!(len(&with(0, b"")[..9]), Ok(None));
        len(&with(0x80, b"")).expect_err("is reserved");
        len(&with(NAME, &[1; MAX_TEXT])).expect_err("has no end");
        len(b"PK\x03\x04567890").expect_err("is none");
    }
}
