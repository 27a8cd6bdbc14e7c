//! What `info` shows that only VHD has.

use std::ffi::OsString;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::{self, Footer};
use crate::formats::vhd::geometry::SizeRule;
use crate::formats::vhd::header::Header;
use crate::formats::vhd::locator::Code;
use crate::formats::vhd::open::End;
use crate::image::info::Detail;
use crate::util::text::replaced;

/// The facts in a footer.
pub(super) fn of_footer(footer: &Footer, end: &End, rule: SizeRule) -> Vec<Detail> {
    let geometry = footer.geometry();
    let by = match rule.goes_by_geometry(footer) {
        true => "chs",
        false => "current_size",
    };
    let version = footer.creator_version.get();
    let (used, state) = match end {
        End::Whole => ("end", "whole".to_owned()),
        End::Short => ("end", "511 bytes long".to_owned()),
        End::Killed => (
            "copy",
            "killed by tapdisk: in use, or not closed".to_owned(),
        ),
        End::Damaged(why) => ("copy", why.clone()),
    };
    vec![
        Detail::new("subformat", footer.kind().word()),
        Detail::new("size-rule", by),
        Detail::new("current-size", footer.current_size.get()),
        Detail::new("original-size", footer.original_size.get()),
        Detail::new("chs-size", geometry.bytes()),
        Detail::new(
            "geometry",
            format!(
                "{}/{}/{}",
                geometry.cylinders, geometry.heads, geometry.sectors
            ),
        ),
        Detail::new("creator-application", tag(footer.creator_app)),
        Detail::new(
            "creator-version",
            format!("{}.{}", version >> 16, version & 0xffff),
        ),
        Detail::new("creator-os", tag(footer.creator_os)),
        Detail::new("uuid", footer.uuid().to_string()),
        Detail::new("created", time(footer.timestamp.get())),
        Detail::new("saved-state", footer.saved_state != 0),
        Detail::new("hidden", footer.hidden),
        Detail::new("footer-used", used),
        Detail::new("footer-state", state),
    ]
}

/// The facts in a dynamic header.
pub(super) fn of_header(
    header: &Header,
    batmap: &batmap::Found,
    locators: &[(Code, OsString)],
) -> Vec<Detail> {
    let marker = match batmap {
        batmap::Found::Trusted(map) => Some(map.marker()),
        _ => None,
    };
    let batmap = match batmap {
        batmap::Found::None => "none".to_owned(),
        batmap::Found::Trusted(_) => "trusted".to_owned(),
        batmap::Found::Damaged(why) => format!("not used: {why}"),
    };
    let mut details = vec![
        Detail::new("block-size", header.block_size()),
        Detail::new("table-entries", header.max_entries()),
        Detail::new("table-offset", header.table_offset()),
        Detail::new("batmap", batmap),
    ];
    details.extend(marker.map(|marker| Detail::new("marker", marker)));
    let name = header.parent_name();
    if header.parent_uuid().is_nil() && name.as_deref() == Some("") && locators.is_empty() {
        return details;
    }
    let texts = locators
        .iter()
        .map(|(code, text)| json!({ "code": code.word(), "path": replaced(text) }));
    details.extend([
        Detail::new("parent-uuid", header.parent_uuid().to_string()),
        Detail::new("parent-name", name),
        Detail::new("parent-modified", time(header.parent_timestamp())),
        Detail::new("parent-locators", Value::Array(texts.collect())),
    ]);
    details
}

/// Four characters, without the padding.
fn tag(bytes: [u8; 4]) -> String {
    let text = bytes.escape_ascii().to_string();
    text.trim_end_matches("\\x00").trim_end().to_owned()
}

/// A timestamp as date and time.
fn time(timestamp: u32) -> String {
    let unix = footer::unix_seconds(timestamp).cast_signed();
    Timestamp::from_second(unix).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_dates() {
        assert_eq!(time(0), "2000-01-01T00:00:00Z");
        assert_eq!(time(59 * 86400 + 3661), "2000-02-29T01:01:01Z");
        assert_eq!(time(848_518_720), "2026-11-20T19:38:40Z");
        assert_eq!(time(u32::MAX), "2136-02-07T06:28:15Z");
    }

    #[test]
    fn padding_of_four_characters_is_not_shown() {
        assert_eq!(tag(*b"tap\0"), "tap");
        assert_eq!(tag(*b"win "), "win");
        assert_eq!(tag([0; 4]), "");
        assert_eq!(tag(*b"a\x1bb "), "a\\x1bb");
    }
}
