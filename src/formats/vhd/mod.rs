//! VHD, the format of Virtual PC, Hyper-V, Azure and XenServer.  *VHD calls a cluster a block.*
//!
//! Every image ends with a 512-byte footer.  A fixed disk is its bytes and the footer.  A dynamic
//! or differencing disk begins with a copy of the footer, then a header and a table of sector
//! numbers, one per block; a block is a bitmap, one bit per sector, and its data.  In a dynamic
//! disk a sector whose bit is 0 reads as zeroes, in a differencing disk it is in the parent.

mod allocate;
mod amend;
mod batmap;
mod bitmap;
mod check;
mod check_blocks;
mod compact;
mod create;
mod details;
mod empty;
mod end;
mod fixed;
mod footer;
mod geometry;
mod header;
mod layout;
mod locator;
mod open;
mod relink;
mod resize;
mod space;
mod sparse;

use crate::image::Driver;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "vhd",
    aliases: &["vpc"],
    extensions: &["vhd", "vpc"],
    about: "Virtual PC, Hyper-V and XenServer disks: fixed, dynamic and differencing",
    is_plain: false,
    names_uris: false,
    probe,
    open: open::open,
    open_options: &[SIZE_RULE, CHECKSUM],
    creator: Some(create::CREATOR),
};

const SIZE_RULE: OptionSpec = OptionSpec {
    name: "size_rule",
    kind: OptionKind::Choice(geometry::SizeRule::WORDS),
    default: "auto",
    help: "which size counts: the geometry, the current size, or as the creator had it",
};

const CHECKSUM: OptionSpec = OptionSpec {
    name: "checksum",
    kind: OptionKind::Choice(&["require", "ignore"]),
    default: "require",
    help: "whether wrong checksums of footer and header are refused",
};

/// A footer at the end (or one byte short of it: old Virtual PC), or a copy at the start.
fn probe(input: &ProbeInput<'_>) -> u8 {
    let is = |bytes: Option<&[u8]>| {
        bytes.is_some_and(|b| b.starts_with(b"conectix") || b.starts_with(b"v_poison"))
    };
    let short = input.tail.len() == footer::LEN && input.len % 512 == 511;
    let tail = if short { input.tail.get(1..) } else { None };
    match is(Some(input.tail)) || is(tail) || is(Some(input.head)) {
        true => 100,
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(head: &[u8], tail: &[u8], len: u64) -> u8 {
        probe(&ProbeInput {
            head,
            tail,
            len,
            extension: None,
        })
    }

    #[test]
    fn footers_at_either_end_are_recognised() {
        let mut with = [0u8; 512];
        with[..8].copy_from_slice(b"conectix");
        let mut short = [0u8; 512];
        short[1..9].copy_from_slice(b"conectix");
        let without = [0u8; 512];
        assert_eq!(score(&without, &with, 1024), 100);
        assert_eq!(score(&with, &without, 1024), 100);
        assert_eq!(score(&without, &short, 1023), 100);
        assert_eq!(score(&without, &short, 1024), 0);
        assert_eq!(score(&without, &without, 1024), 0);
        assert_eq!(score(&[], &[], 0), 0);
    }
}
