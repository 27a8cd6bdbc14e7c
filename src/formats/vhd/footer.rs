//! The footer: 512 bytes at the end of every VHD, copied to the start of those that have a table.

use std::ops::Deref;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::geometry::Geometry;
use crate::storage::Storage;

/// Length of a footer in bytes.
pub(super) const LEN: usize = 512;
/// The same, for offsets.
pub(super) const LEN64: u64 = 512;
/// What a footer begins with.
pub(super) const COOKIE: [u8; 8] = *b"conectix";
/// What XenServer's storage manager writes there to disable an image on purpose.
const POISON: [u8; 8] = *b"v_poison";
/// What tapdisk fills the footer with while it has an image open for writing.
const KILLED: u8 = 0xc7;
/// The only version of the format.
const VERSION: u32 = 0x0001_0000;
/// Feature bit that is always set.
const FEATURE_RESERVED: u32 = 2;
/// Feature bit of a disk that may be deleted on shutdown.
const FEATURE_TEMPORARY: u32 = 1;
/// `data_offset` of a disk that has no table.
const NO_HEADER: u64 = u64::MAX;
/// Seconds from the Unix epoch to 2000-01-01, where the format's time begins.
const EPOCH: u64 = 946_684_800;

/// The bytes, as the specification lays them out; big-endian.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub(super) struct RawFooter {
    /// "conectix".
    pub(super) cookie: [u8; 8],
    /// Bit 0: temporary; bit 1: always set; the others: 0.
    pub(super) features: U32,
    /// File format version, major and minor: 1.0.
    pub(super) version: U32,
    /// Offset of the dynamic header; all ones in a fixed disk.
    pub(super) data_offset: U64,
    /// Time of creation, seconds since 2000-01-01 UTC.
    pub(super) timestamp: U32,
    /// Which program made it.
    pub(super) creator_app: [u8; 4],
    /// Its version, major and minor.
    pub(super) creator_version: U32,
    /// Its host: "Wi2k" or "Mac ".
    pub(super) creator_os: [u8; 4],
    /// Size of the disk when it was made, in bytes.
    pub(super) original_size: U64,
    /// Size of the disk now, in bytes.
    pub(super) current_size: U64,
    /// Cylinders.
    pub(super) cylinders: U16,
    /// Heads.
    pub(super) heads: u8,
    /// Sectors per track.
    pub(super) sectors: u8,
    /// 2 fixed, 3 dynamic, 4 differencing.
    pub(super) disk_type: U32,
    /// Complement of the sum of all bytes, this field as 0.
    pub(super) checksum: U32,
    /// Identity; a child names its parent by it.
    pub(super) uuid: [u8; 16],
    /// 1 while the machine is suspended.
    pub(super) saved_state: u8,
    /// XenServer: 0 visible, 1 hidden from the user, 2 also not to be coalesced.
    pub(super) hidden: u8,
    /// Zero.
    pub(super) reserved: [u8; 426],
}

const _: () = {
    assert!(size_of::<RawFooter>() == LEN);
    assert!(std::mem::offset_of!(RawFooter, data_offset) == 16);
    assert!(std::mem::offset_of!(RawFooter, creator_app) == 28);
    assert!(std::mem::offset_of!(RawFooter, current_size) == 48);
    assert!(std::mem::offset_of!(RawFooter, disk_type) == 60);
    assert!(std::mem::offset_of!(RawFooter, uuid) == 68);
    assert!(std::mem::offset_of!(RawFooter, hidden) == 85);
};

/// What kind of disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// All bytes, then the footer.
    Fixed,
    /// A table of blocks; what has no block reads as zeroes.
    Dynamic,
    /// A table of blocks; what has none is in the parent.
    Differencing,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::Fixed, Self::Dynamic, Self::Differencing]
            .into_iter()
            .find(|k| k.code() == code)
    }

    /// The word for it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// Whether a wrong checksum or an unknown feature is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strictness {
    /// It is.
    Strict,
    /// It is let through; the checker reports it.
    Lax,
}

/// Complement of the sum of `bytes`, of which the four from `field` count as zero.
pub(super) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum: u32 = bytes
        .iter()
        .enumerate()
        .filter(|(i, _)| !(field..field + 4).contains(i))
        .fold(0, |sum, (_, b)| sum.wrapping_add(u32::from(*b)));
    !sum
}

const CHECKSUM_FIELD: usize = std::mem::offset_of!(RawFooter, checksum);

/// A footer whose cookie, version and type are right; bytes that it gives no meaning are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footer {
    raw: RawFooter,
    kind: Kind,
}

/// What a new footer says.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewFooter {
    /// What kind of disk.
    pub(super) kind: Kind,
    /// Its size in bytes.
    pub(super) size: u64,
    /// Its geometry.
    pub(super) geometry: Geometry,
    /// Which program is to be named.
    pub(super) creator: Creator,
    /// What identifies it.
    pub(super) uuid: Uuid,
}

/// Which program an image names as its creator; readers choose between the two sizes by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Creator {
    /// "win ": the current size counts, in every reader.
    Win,
    /// "qemu": QEMU goes by the geometry.
    Qemu,
}

impl Creator {
    fn app(self) -> [u8; 4] {
        match self {
            Self::Win => *b"win ",
            Self::Qemu => *b"qemu",
        }
    }

    fn version(self) -> u32 {
        match self {
            Self::Win => 0x0006_0003,
            Self::Qemu => 0x0005_0003,
        }
    }
}

impl Deref for Footer {
    type Target = RawFooter;

    fn deref(&self) -> &RawFooter {
        &self.raw
    }
}

impl Footer {
    /// A footer for a new image, with the present time.
    pub(super) fn new(new: &NewFooter, now: SystemTime) -> Self {
        let data_offset = match new.kind {
            Kind::Fixed => NO_HEADER,
            Kind::Dynamic | Kind::Differencing => LEN64,
        };
        let raw = RawFooter {
            cookie: COOKIE,
            features: FEATURE_RESERVED.into(),
            version: VERSION.into(),
            data_offset: data_offset.into(),
            timestamp: timestamp(now).into(),
            creator_app: new.creator.app(),
            creator_version: new.creator.version().into(),
            creator_os: *b"Wi2k",
            original_size: new.size.into(),
            current_size: new.size.into(),
            cylinders: new.geometry.cylinders.into(),
            heads: new.geometry.heads,
            sectors: new.geometry.sectors,
            disk_type: new.kind.code().into(),
            checksum: 0.into(),
            uuid: *new.uuid.as_bytes(),
            saved_state: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        let kind = new.kind;
        Self { raw, kind }.sealed()
    }

    /// Reads a footer.
    ///
    /// # Errors
    /// `WrongFormat` without the cookie; `Corrupt` for a wrong checksum; `Unsupported` for a
    /// version, type or feature that is not known, or an image that was disabled on purpose.
    pub(super) fn parse(bytes: &[u8; LEN], strictness: Strictness) -> Result<Self> {
        let raw = RawFooter::read_from_bytes(bytes)
            .map_err(|_| Error::corrupt("the footer is not 512 bytes long"))?;
        if raw.cookie == POISON {
            return Err(Error::unsupported(
                "the image was disabled on purpose: its footer says 'v_poison' (allowed: 'conectix')",
            ));
        }
        if raw.cookie != COOKIE {
            return Err(Error::new(
                ErrorKind::WrongFormat,
                format!(
                    "no VHD footer: it begins with '{}' (allowed: 'conectix')",
                    raw.cookie.escape_ascii()
                ),
            ));
        }
        let kind = Kind::from_code(raw.disk_type.get());
        let footer = Self {
            raw,
            kind: kind.unwrap_or(Kind::Fixed),
        };
        if strictness == Strictness::Strict && !footer.checksum_is_right() {
            return Err(Error::corrupt(format!(
                "the footer's checksum is {:#010x} (its bytes give {:#010x})",
                raw.checksum,
                footer.right_checksum()
            )));
        }
        if raw.version.get() != VERSION {
            return Err(Error::unsupported(format!(
                "VHD version {:#010x} (allowed: {VERSION:#010x})",
                raw.version
            )));
        }
        if kind.is_none() {
            return Err(Error::unsupported(format!(
                "VHD disk type {} (allowed: 2 fixed, 3 dynamic, 4 differencing)",
                raw.disk_type
            )));
        }
        let unknown = raw.features.get() & !(FEATURE_RESERVED | FEATURE_TEMPORARY);
        if strictness == Strictness::Strict && unknown != 0 {
            return Err(Error::unsupported(format!(
                "VHD feature bits {unknown:#x} are not known (allowed: 0x1 temporary, 0x2)"
            )));
        }
        Ok(footer)
    }

    /// Whether these bytes are what tapdisk leaves in place of a footer while it is writing.
    pub(super) fn is_killed(bytes: &[u8; LEN]) -> bool {
        bytes.iter().all(|b| *b == KILLED)
    }

    /// Whether these bytes disable the image on purpose.
    pub(super) fn is_poisoned(bytes: &[u8; LEN]) -> bool {
        bytes.starts_with(&POISON)
    }

    /// The bytes to be written.
    pub(super) fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(self.raw.as_bytes());
        bytes
    }

    /// Writes it with the checksum its bytes give.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn write(&self, storage: &dyn Storage, host: u64) -> Result<()> {
        storage.write_at(&self.sealed().to_bytes(), host)
    }

    /// The same footer with the checksum its bytes give.
    #[must_use]
    pub(super) fn sealed(mut self) -> Self {
        self.raw.checksum = self.right_checksum().into();
        self
    }

    /// The same footer for another size.
    #[must_use]
    pub(super) fn resized(mut self, size: u64, geometry: Geometry) -> Self {
        self.raw.current_size = size.into();
        self.raw.cylinders = geometry.cylinders.into();
        self.raw.heads = geometry.heads;
        self.raw.sectors = geometry.sectors;
        self.sealed()
    }

    /// The same footer for a dynamic header elsewhere, and perhaps without a parent.
    #[must_use]
    pub(super) fn with_header(mut self, offset: u64, kind: Kind) -> Self {
        self.raw.data_offset = offset.into();
        self.raw.disk_type = kind.code().into();
        self.kind = kind;
        self.sealed()
    }

    /// The same footer of a disk that XenServer shows or hides.
    #[must_use]
    pub(super) fn hidden_as(mut self, hidden: u8) -> Self {
        self.raw.hidden = hidden;
        self.sealed()
    }

    /// The same footer with another program named as its creator.
    #[must_use]
    pub(super) fn created_by(mut self, creator: Creator) -> Self {
        self.raw.creator_app = creator.app();
        self.raw.creator_version = creator.version().into();
        self.sealed()
    }

    /// Whether another footer is the same but for current size and geometry.
    pub(super) fn differs_in_size_only(&self, other: &Self) -> bool {
        let same = other.resized(self.current_size.get(), self.geometry());
        same == self.sealed()
    }

    /// Whether another footer is the same but for the dynamic header's place and the kind.
    pub(super) fn differs_in_header_only(&self, other: &Self) -> bool {
        other.with_header(self.header_offset(), self.kind) == self.sealed()
    }

    fn right_checksum(&self) -> u32 {
        checksum(self.raw.as_bytes(), CHECKSUM_FIELD)
    }

    /// Whether the checksum fits the bytes.
    pub(super) fn checksum_is_right(&self) -> bool {
        self.raw.checksum.get() == self.right_checksum()
    }

    /// What kind of disk it is.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Offset of the dynamic header; without meaning in a fixed disk.
    pub(super) fn header_offset(&self) -> u64 {
        self.raw.data_offset.get()
    }

    /// Its geometry.
    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            cylinders: self.raw.cylinders.get(),
            heads: self.raw.heads,
            sectors: self.raw.sectors,
        }
    }

    /// Identity.
    pub(super) fn uuid(&self) -> Uuid {
        Uuid::from_bytes(self.raw.uuid)
    }

    /// Feature bits that the format defines.
    pub(super) fn known_features() -> u32 {
        FEATURE_RESERVED | FEATURE_TEMPORARY
    }

    /// Whether all reserved bytes are zero.
    pub(super) fn reserved_is_zero(&self) -> bool {
        self.raw.reserved.iter().all(|b| *b == 0)
    }
}

/// Seconds since 2000-01-01 UTC, at most what 32 bits hold; 0 for times before.
pub(super) fn timestamp(time: SystemTime) -> u32 {
    let unix = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    u32::try_from(unix.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

/// The moment a timestamp stands for, in seconds of Unix time.
pub(super) fn unix_seconds(timestamp: u32) -> u64 {
    EPOCH + u64::from(timestamp)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sample() -> Footer {
        let new = NewFooter {
            kind: Kind::Dynamic,
            size: 10 << 20,
            geometry: Geometry::for_size(10 << 20),
            creator: Creator::Win,
            uuid: Uuid::new_v4(),
        };
        Footer::new(&new, SystemTime::now())
    }

    #[test]
    fn a_footer_survives_being_written_and_read() {
        let footer = sample();
        let read = Footer::parse(&footer.to_bytes(), Strictness::Strict).expect("is whole");
        assert_eq!(read, footer);
        assert_eq!(read.current_size.get(), 10 << 20);
        assert_eq!(&read.creator_app, b"win ");
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        for at in 0..LEN {
            let mut bytes = sample().to_bytes();
            bytes[at] ^= 0x40;
            Footer::parse(&bytes, Strictness::Strict).expect_err("a byte was changed");
        }
    }

    #[test]
    fn bytes_without_meaning_are_kept_when_the_size_changes() {
        let mut bytes = sample().to_bytes();
        (bytes[84], bytes[85], bytes[300]) = (1, 2, 7);
        let footer = Footer::parse(&bytes, Strictness::Lax)
            .expect("lax")
            .sealed();
        let bytes = footer
            .resized(20 << 20, Geometry::for_size(20 << 20))
            .to_bytes();
        let read = Footer::parse(&bytes, Strictness::Strict).expect("is sealed");
        assert_eq!((bytes[84], bytes[85], bytes[300]), (1, 2, 7));
        assert_eq!(read.original_size.get(), 10 << 20);
        assert_eq!(read.current_size.get(), 20 << 20);
    }

    #[test]
    fn disabled_and_foreign_footers_are_told_apart() {
        let mut bytes = sample().to_bytes();
        bytes[..8].copy_from_slice(b"v_poison");
        let error = Footer::parse(&bytes, Strictness::Lax).expect_err("disabled");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("v_poison"));
        let error = Footer::parse(&[0xc7; LEN], Strictness::Lax).expect_err("killed");
        assert_eq!(error.kind(), ErrorKind::WrongFormat);
        assert!(Footer::is_killed(&[0xc7; LEN]));
    }

    #[test]
    fn unknown_versions_types_and_features_are_refused_by_name() {
        for (at, text) in [(13, "version"), (63, "disk type"), (9, "feature bits")] {
            let mut bytes = sample().to_bytes();
            bytes[at] = 0x21;
            let footer = RawFooter::read_from_bytes(&bytes).expect("512 bytes");
            let sealed = Footer {
                raw: footer,
                kind: Kind::Dynamic,
            }
            .sealed();
            let error = Footer::parse(&sealed.to_bytes(), Strictness::Strict).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn times_before_and_after_what_fits_are_clamped() {
        assert_eq!(timestamp(UNIX_EPOCH), 0);
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(EPOCH + 5)), 5);
        assert_eq!(unix_seconds(5), EPOCH + 5);
        assert_eq!(
            timestamp(UNIX_EPOCH + Duration::from_secs(EPOCH + (1 << 40))),
            u32::MAX
        );
    }
}
