//! How formats that are not supported are known by their bytes.

use crate::image::probe::ProbeInput;

/// Bytes of a header of tar.
const TAR_HEADER: usize = 512;

pub(super) fn starts(input: &ProbeInput<'_>, magic: &[u8]) -> bool {
    input.head.starts_with(magic)
}

pub(super) fn has(input: &ProbeInput<'_>, at: usize, magic: &[u8]) -> bool {
    let rest = input.head.get(at..);
    rest.is_some_and(|rest| rest.starts_with(magic))
}

/// A magic too short to be trusted where a partition table says that this is a disk.
pub(super) fn short(input: &ProbeInput<'_>, magic: &[u8]) -> bool {
    starts(input, magic) && !is_partitioned(input)
}

pub(super) fn ends(input: &ProbeInput<'_>, magic: &[u8]) -> bool {
    input.tail.ends_with(magic)
}

pub(super) fn word_be(input: &ProbeInput<'_>, at: usize) -> Option<u32> {
    let bytes = input.head.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}

fn word_le(input: &ProbeInput<'_>, at: usize) -> Option<u32> {
    word_be(input, at).map(u32::swap_bytes)
}

/// The little-endian word so many bytes before the end.
pub(super) fn tail_word(input: &ProbeInput<'_>, before_end: usize) -> Option<u32> {
    let at = input.tail.len().checked_sub(before_end)?;
    Some(u32::from_le_bytes(*input.tail.get(at..)?.first_chunk()?))
}

/// Whether this is a disk with partitions: a GPT, or an MBR whose entries make sense.
fn is_partitioned(input: &ProbeInput<'_>) -> bool {
    if has(input, 512, b"EFI PART") {
        return true;
    }
    let entries = input.head.get(446..510).unwrap_or_default();
    let states = entries.chunks_exact(16).all(|e| matches!(e[0], 0 | 0x80));
    let used = entries.chunks_exact(16).any(|e| e[4] != 0);
    has(input, 510, &[0x55, 0xaa]) && states && used
}

/// The beginning as lines of text, where it is text.
fn lines<'a>(input: &ProbeInput<'a>) -> impl Iterator<Item = &'a str> {
    let head = input.head;
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The head may end within a character; sheets may be in another encoding.
        Err(e) => std::str::from_utf8(&head[..e.valid_up_to()]).unwrap_or_default(),
    };
    text.lines().map(str::trim)
}

/// Whether the beginning has these words.
pub(super) fn mentions(input: &ProbeInput<'_>, words: &str) -> bool {
    let words = words.as_bytes();
    input.head.windows(words.len()).any(|part| part == words)
}

pub(super) fn is_xml(input: &ProbeInput<'_>) -> bool {
    let first = lines(input).find(|line| !line.is_empty());
    first.is_some_and(|line| line.starts_with("<?xml"))
}

pub(super) fn is_parallels_descriptor(input: &ProbeInput<'_>) -> bool {
    is_xml(input) && mentions(input, "<Parallels_disk_image")
}

/// Deflate is the only method, and three flags are reserved.
pub(super) fn is_gzip(input: &ProbeInput<'_>) -> bool {
    short(input, &[0x1f, 0x8b, 8]) && input.head.get(3).is_some_and(|flags| flags & 0xe0 == 0)
}

/// All ten bytes: the first three are letters and a digit.
pub(super) fn is_bzip2(input: &ProbeInput<'_>) -> bool {
    let level = input.head.get(3).is_some_and(|l| matches!(l, b'1'..=b'9'));
    let block = [0x31, 0x41, 0x59, 0x26, 0x53, 0x59];
    let empty = [0x17, 0x72, 0x45, 0x38, 0x50, 0x90];
    starts(input, b"BZh") && level && (has(input, 4, &block) || has(input, 4, &empty))
}

/// A frame, or one that decoders skip.
pub(super) fn is_zstd(input: &ProbeInput<'_>) -> bool {
    let skippable = word_le(input, 0).is_some_and(|w| w & 0xffff_fff0 == 0x184d_2a50);
    (short(input, &[0x28, 0xb5, 0x2f, 0xfd]) || skippable) && !is_partitioned(input)
}

/// A header whose checksum is right: the sum of its bytes, those of the sum itself as blanks.
pub(super) fn is_tar(input: &ProbeInput<'_>) -> bool {
    let Some(header) = input.head.get(..TAR_HEADER) else {
        return false;
    };
    let field = std::str::from_utf8(&header[148..156]).unwrap_or_default();
    let digits = field.trim_matches([' ', '\0']);
    let bytes = header.iter().enumerate();
    let sum: u32 = bytes
        .map(|(at, b)| match at {
            148..156 => u32::from(b' '),
            _ => u32::from(*b),
        })
        .sum();
    header[0] != 0 && u32::from_str_radix(digits, 8) == Ok(sum)
}

/// The name of the first member of a tar file.
pub(super) fn tar_name<'a>(input: &ProbeInput<'a>) -> &'a [u8] {
    let name = input.head.get(..100).unwrap_or_default();
    name.split(|b| *b == 0).next().unwrap_or_default()
}

/// A web page, a JSON or XML answer about an error.
pub(super) fn is_error_page(input: &ProbeInput<'_>) -> bool {
    let first = lines(input).find(|line| !line.is_empty());
    let first = first.unwrap_or_default().to_ascii_lowercase();
    let page = ["<!doctype html", "<html", "{\"error\""];
    page.iter().any(|start| first.starts_with(start))
        || (is_xml(input) && mentions(input, "<Error>"))
}
