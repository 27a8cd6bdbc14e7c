//! How many requests of clients the kernel joined with others before the server saw them.

use crate::backend::Kind;

/// What the kernel has counted for a block device since that was made; `None` where it does not
/// tell, and for kinds that it joins unseen.
pub(super) fn requests(id: u32, kind: Kind) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/block/ublkb{id}/stat")).ok()?;
    of(&text, kind)
}

/// Reads the kernel's statistics of a block device: requests, merges, sectors and time for reads,
/// the same for writes, three numbers about the whole, and the four for discards.
fn of(stat: &str, kind: Kind) -> Option<u64> {
    let field = match kind {
        Kind::Read => 1,
        Kind::Write => 5,
        Kind::Discard => 12,
        _ => return None,
    };
    stat.split_ascii_whitespace().nth(field)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_found_among_the_numbers_of_the_kernel() {
        let stat = "  100   1  800  20  200  2  1600  40  0  60  70  300  3  2400  5  6  7\n";
        let of = |kind| of(stat, kind);
        assert_eq!(of(Kind::Read), Some(1));
        assert_eq!(of(Kind::Write), Some(2));
        assert_eq!(of(Kind::Discard), Some(3));
        assert_eq!(of(Kind::Flush), None);
        assert_eq!(super::of("1 x", Kind::Read), None);
        assert_eq!(super::of("1 2 3", Kind::Discard), None);
    }
}
