//! Cylinders, heads and sectors, and which of the two sizes in a footer is the real one.

use crate::formats::vhd::footer::{Footer, Kind};
use crate::util::align;

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// Largest disk we make: what Hyper-V, Azure and XenServer agree on, 2040 GiB.
pub(super) const MAX_SIZE: u64 = 2040 << 30;

/// A disk's geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Cylinders.
    pub(super) cylinders: u16,
    /// Heads.
    pub(super) heads: u8,
    /// Sectors per track.
    pub(super) sectors: u8,
}

impl Geometry {
    /// The largest: it says nothing about the size, so that every reader goes by the current size.
    pub(super) const MAX: Self = Self {
        cylinders: 65535,
        heads: 16,
        sectors: 255,
    };

    /// The geometry the specification's algorithm gives for `size` bytes; the disk it describes is
    /// never larger than `size`.
    pub(super) fn for_size(size: u64) -> Self {
        let total = (size / SECTOR).min(Self::MAX.bytes() / SECTOR);
        let (heads, sectors, tracks) = if total >= 65535 * 16 * 63 {
            (16, 255, total / 255)
        } else {
            Self::small(total)
        };
        let cylinders = tracks / heads;
        let byte = |n: u64| u8::try_from(n).unwrap_or(u8::MAX);
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads: byte(heads),
            sectors: byte(sectors),
        }
    }

    /// Heads, sectors per track and tracks of a disk below 31.5 GiB.
    fn small(total: u64) -> (u64, u64, u64) {
        let tracks = total / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if heads <= 16 && tracks < heads * 1024 {
            return (heads, 17, tracks);
        }
        let tracks = total / 31;
        if tracks < 16 * 1024 {
            return (16, 31, tracks);
        }
        (16, 63, total / 63)
    }

    /// The smallest size, at least `size`, that the algorithm's geometry describes to the byte;
    /// `size` itself where geometry has come to its end.
    pub(super) fn round_up(size: u64) -> u64 {
        let mut sectors = size.div_ceil(SECTOR);
        // A step of one cylinder is at most 16 * 255 sectors, so this ends soon.
        while sectors * SECTOR < Self::MAX.bytes() {
            let bytes = Self::for_size(sectors * SECTOR).bytes();
            if bytes >= size {
                return bytes;
            }
            sectors += 1;
        }
        size
    }

    /// Size in bytes of the disk it describes.
    pub(super) fn bytes(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR
    }
}

/// Which size in the footer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum SizeRule {
    /// As QEMU has it: the geometry for the creators "vpc " and "qemu", unless it is the largest;
    /// the current size for all others.
    #[default]
    Auto,
    /// The geometry.
    Chs,
    /// The current size.
    CurrentSize,
}

impl SizeRule {
    /// The values as users type them.
    pub(super) const WORDS: &'static [&'static str] = &["auto", "chs", "current_size"];

    /// From a word of `WORDS`.
    pub(super) fn from_word(word: &str) -> Self {
        match word {
            "chs" => Self::Chs,
            "current_size" => Self::CurrentSize,
            _ => Self::Auto,
        }
    }

    /// Whether readers go by the geometry of this footer.
    pub(super) fn goes_by_geometry(self, footer: &Footer) -> bool {
        match self {
            Self::Chs => true,
            Self::CurrentSize => false,
            Self::Auto => {
                let geometry = footer.geometry();
                [*b"vpc ", *b"qemu"].contains(&footer.creator_app)
                    && geometry != Geometry::MAX
                    && geometry.bytes() != 0
            }
        }
    }

    /// Virtual size in bytes, where the image has room for `room` bytes; `Auto` takes the current
    /// size where the geometry describes more than that.
    pub(super) fn size(self, footer: &Footer, room: u64) -> u64 {
        let current = match footer.kind() {
            Kind::Fixed => footer.current_size.get(),
            // The format counts in sectors.
            Kind::Dynamic | Kind::Differencing => align::down(footer.current_size.get(), SECTOR),
        };
        let chs = footer.geometry().bytes();
        match self.goes_by_geometry(footer) {
            true if self == Self::Auto && chs > room && current <= room => current,
            true => chs,
            false => current,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::formats::vhd::footer::{Creator, NewFooter};

    fn chs(size: u64) -> (u16, u8, u8) {
        let g = Geometry::for_size(size);
        (g.cylinders, g.heads, g.sectors)
    }

    #[test]
    fn the_algorithm_gives_what_other_writers_give() {
        assert_eq!(chs(10 << 20), (301, 4, 17));
        assert_eq!(chs(1 << 30), (2080, 16, 63));
        assert_eq!(chs(127 << 30), (65278, 16, 255));
        assert_eq!(chs(2040 << 30), (65535, 16, 255));
        assert_eq!(chs(4 << 20), (120, 4, 17));
        assert_eq!(chs(1_048_576_000), (2031, 16, 63));
        assert_eq!(chs(37_748_736), (867, 5, 17));
        assert_eq!(chs(0), (0, 4, 17));
    }

    #[test]
    fn a_geometry_is_never_larger_than_the_disk() {
        for size in (0..200u64).map(|i| i * 7_654_321 * 512 + i * 512) {
            assert!(Geometry::for_size(size).bytes() <= size, "{size}");
        }
    }

    #[test]
    fn a_rounded_size_is_described_to_the_byte() {
        for size in [1, 512, 34816, 1 << 20, 10 << 20, 1 << 30, 40 << 30] {
            let rounded = Geometry::round_up(size);
            assert!(rounded >= size && rounded - size < 16 * 255 * 512, "{size}");
            assert_eq!(Geometry::for_size(rounded).bytes(), rounded);
        }
        assert_eq!(Geometry::round_up(200 << 30), 200 << 30);
    }

    #[test]
    fn the_creator_decides_which_size_counts() {
        let size = 10 << 20;
        let new = |creator, geometry| {
            let new = NewFooter {
                kind: Kind::Fixed,
                size,
                geometry,
                creator,
                uuid: uuid::Uuid::new_v4(),
            };
            Footer::new(&new, SystemTime::now())
        };
        let by_chs = Geometry::for_size(size);
        let qemu = new(Creator::Qemu, by_chs);
        assert_eq!(SizeRule::Auto.size(&qemu, size), by_chs.bytes());
        assert_eq!(SizeRule::CurrentSize.size(&qemu, size), size);
        let saturated = new(Creator::Qemu, Geometry::MAX);
        assert_eq!(SizeRule::Auto.size(&saturated, size), size);
        let win = new(Creator::Win, by_chs);
        assert_eq!(SizeRule::Auto.size(&win, size), size);
        assert_eq!(SizeRule::Chs.size(&win, size), by_chs.bytes());
        let wrong = new(
            Creator::Qemu,
            Geometry {
                cylinders: 1000,
                ..by_chs
            },
        );
        assert_eq!(SizeRule::Auto.size(&wrong, size), size);
    }
}
