//! Logs in files and on devices.

use std::sync::Arc;

use uuid::Uuid;

use crate::dirty::layout::{Head, Kind, Usage};
use crate::dirty::regions::{Geometry, Regions};
use crate::dirty::{cbt, mirror, own};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, start_over};
use crate::util::align::{clamp_len, len64};

/// Bytes of a bitmap that are read, compared and written at a time.
const PIECE: usize = 64 << 10;

/// What the user knows of a log that does not say so itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Assumed {
    /// Whose format it is in.
    pub kind: Option<Kind>,
    /// Bytes of a region.
    pub granularity: Option<u64>,
    /// Bytes of the disk.
    pub size: Option<u64>,
}

/// What a log is made for.
#[derive(Debug, Clone, Copy)]
pub struct New {
    /// Whose format it is to be in.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a region; `None`: as the format has it.
    pub granularity: Option<u64>,
    /// The disk's identity, where the format records one.
    pub disk: Option<Uuid>,
}

/// A log, and the bits as they are in memory.
#[derive(Debug)]
pub struct DirtyLog {
    storage: Arc<dyn Storage>,
    head: Head,
    regions: Regions,
}

impl DirtyLog {
    /// Regions as large as they are where nobody says so.
    pub const GRANULARITY: u64 = 64 << 10;

    /// Makes a log with no region dirty; it is on stable media when this returns.
    ///
    /// # Errors
    /// `Invalid` for a granularity that the format has not, and for too many regions; the host's.
    pub fn create(storage: Arc<dyn Storage>, new: &New) -> Result<Self> {
        let granularity = new.granularity.unwrap_or(Self::GRANULARITY);
        let bitmap = match new.kind {
            Kind::Own => own::BITMAP,
            Kind::Mirror => mirror::BITMAP,
            Kind::Cbt if granularity != cbt::GRANULARITY => {
                return Err(Error::invalid(format!(
                    "a granularity of {granularity} bytes (allowed in cbt: {})",
                    cbt::GRANULARITY
                )));
            }
            Kind::Cbt => len64(cbt::LEN),
        };
        own::check_granularity(granularity)?;
        let geometry = Geometry::new(new.size, granularity)?;
        let head = Head {
            kind: new.kind,
            geometry,
            bitmap,
            inverted: new.kind == Kind::Mirror,
            usage: Usage::Closed,
            disk: new.disk.filter(|_| new.kind == Kind::Own),
            links: None,
        };
        let regions = Regions::new(geometry);
        start_over(&*storage, 0)?;
        let end = bitmap + bitmap_len(&head);
        if !storage.has_fixed_len() {
            storage.set_len(end)?;
        } else if storage.size() < end {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("the log takes {end} bytes (there are {})", storage.size()),
            ));
        }
        let this = Self {
            storage,
            head,
            regions,
        };
        this.write_bits(Bits::All)?;
        this.write_head()?;
        this.storage.sync()?;
        Ok(this)
    }

    /// Opens a log and reads all of it.
    ///
    /// # Errors
    /// `WrongFormat` for what is none; `Corrupt`, `Unsupported`, naming the field; `Invalid` where what
    /// the user knows contradicts what it says; the host's.
    pub fn open(storage: Arc<dyn Storage>, assumed: &Assumed) -> Result<Self> {
        let head = read_head(&*storage, assumed)?;
        for (what, said, found) in [
            (
                "granularity",
                assumed.granularity,
                head.geometry.granularity(),
            ),
            ("size", assumed.size, head.geometry.size()),
        ] {
            if let Some(said) = said.filter(|said| *said != found) {
                let text = format!("the log's {what} is {found} bytes, and {said} was asked for");
                return Err(Error::invalid(text));
            }
        }
        let end = head
            .bitmap
            .saturating_add(head.geometry.regions().div_ceil(8));
        if storage.size() < end {
            return Err(Error::corrupt(format!(
                "the log has {} bytes (allowed: {end} at least, for {} regions)",
                storage.size(),
                head.geometry.regions()
            )));
        }
        let this = Self {
            regions: Regions::new(head.geometry),
            storage,
            head,
        };
        let len = this.regions.bitmap_len();
        let mut bytes = vec![0; PIECE];
        for at in (0..len).step_by(PIECE) {
            let piece = &mut bytes[..clamp_len(len - at, PIECE)];
            this.storage.read_at(piece, this.head.bitmap + at)?;
            if this.head.inverted {
                piece.iter_mut().for_each(|byte| *byte = !*byte);
            }
            this.regions.decode(at, piece);
        }
        Ok(this)
    }

    /// Whose format it is in.
    pub fn kind(&self) -> Kind {
        self.head.kind
    }

    /// What it says of its last writer.
    pub fn usage(&self) -> Usage {
        self.head.usage
    }

    /// The identity of the disk that it is of, where it says so.
    pub fn disk(&self) -> Option<Uuid> {
        self.head.disk
    }

    /// Identities of the images that CBT has before it and behind it.
    pub fn links(&self) -> Option<[Uuid; 2]> {
        self.head.links
    }

    /// The bits; changes of them are in the file after [`DirtyLog::save`].
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// The bits alone.
    pub fn into_regions(self) -> Regions {
        self.regions
    }

    /// Writes the bits that changed; they are on stable media when this returns.
    ///
    /// # Errors
    /// The host's; then any of them may have been written.
    pub fn save(&self) -> Result<()> {
        self.write_bits(Bits::Changed)?;
        self.storage.sync()
    }

    fn write_bits(&self, which: Bits) -> Result<()> {
        let len = bitmap_len(&self.head);
        let mut bytes = vec![0; PIECE];
        let mut old = vec![0; PIECE];
        for at in (0..len).step_by(PIECE) {
            let count = clamp_len(len - at, PIECE);
            let (piece, old) = (&mut bytes[..count], &mut old[..count]);
            piece.fill(0);
            self.regions.encode(at, piece);
            if self.head.inverted {
                piece.iter_mut().for_each(|byte| *byte = !*byte);
                self.clear_behind(at, piece);
            }
            let host = self.head.bitmap + at;
            if which == Bits::Changed {
                self.storage.read_at(old, host)?;
                if old == piece {
                    continue;
                }
            }
            self.storage.write_at(piece, host)?;
        }
        Ok(())
    }

    /// Clears the bits behind the last region, of bytes from `at` of the bitmap on.
    fn clear_behind(&self, at: u64, bytes: &mut [u8]) {
        let regions = self.head.geometry.regions();
        for (number, byte) in (at..).zip(bytes) {
            match regions.saturating_sub(number * 8) {
                0 => *byte = 0,
                left @ 1..8 => *byte &= 0xff >> (8 - left),
                _ => {}
            }
        }
    }

    fn write_head(&self) -> Result<()> {
        match self.head.kind {
            Kind::Own => self.storage.write_at(&own::to_bytes(&self.head), 0),
            Kind::Mirror => self.storage.write_at(&mirror::to_bytes(&self.head), 0),
            Kind::Cbt => self.storage.write_at(&cbt::to_bytes(&self.head), 0),
        }
    }
}

/// Which bits are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bits {
    All,
    Changed,
}

/// Bytes of a bitmap as the formats round it.
fn bitmap_len(head: &Head) -> u64 {
    let regions = head.geometry.regions();
    match head.kind {
        Kind::Mirror => regions.div_ceil(32) * 4,
        Kind::Own | Kind::Cbt => regions.div_ceil(64) * 8,
    }
}

fn read_head(storage: &dyn Storage, assumed: &Assumed) -> Result<Head> {
    let mut bytes = [0; own::LEN];
    storage.read_at(&mut bytes, 0)?;
    let is_mirror = bytes.starts_with(&mirror::MAGIC.to_le_bytes());
    let found = match () {
        () if bytes.starts_with(own::MAGIC) => Some(Kind::Own),
        () if is_mirror => Some(Kind::Mirror),
        () if cbt::looks_like(&bytes, storage.size()) => Some(Kind::Cbt),
        () => None,
    };
    let kind = match (assumed.kind, found) {
        (Some(Kind::Cbt), None) => Kind::Cbt,
        (Some(said), Some(found)) if said != found => {
            return Err(wrong(format!(
                "looks like a log of format {} (asked for: {})",
                found.name(),
                said.name()
            )));
        }
        (_, Some(found)) => found,
        (Some(said), None) => return Err(wrong(format!("is no log of format {}", said.name()))),
        (None, None) => {
            let names = Kind::ALL.map(Kind::name).join(", ");
            return Err(wrong(format!("is no log of changes (allowed: {names})")));
        }
    };
    match kind {
        Kind::Own => own::parse(&bytes),
        Kind::Mirror => mirror::parse(&bytes, assumed.granularity, assumed.size),
        Kind::Cbt => cbt::parse(&bytes, storage.size()),
    }
}

fn wrong(text: String) -> Error {
    Error::new(ErrorKind::WrongFormat, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    const SIZE: u64 = (100 << 20) + 512;

    fn made(kind: Kind) -> (Arc<MemoryStorage>, DirtyLog) {
        let storage = Arc::new(MemoryStorage::new());
        let new = New {
            kind,
            size: SIZE,
            granularity: None,
            disk: Some(Uuid::from_u128(7)),
        };
        let log = DirtyLog::create(Arc::clone(&storage) as Arc<dyn Storage>, &new);
        (storage, log.expect("is made"))
    }

    fn again(storage: &Arc<MemoryStorage>, assumed: &Assumed) -> Result<DirtyLog> {
        DirtyLog::open(Arc::clone(storage) as Arc<dyn Storage>, assumed)
    }

    #[test]
    fn what_is_marked_is_there_again_in_each_format() {
        for kind in Kind::ALL {
            let (storage, log) = made(kind);
            log.regions().mark(&(70_000..3 << 20));
            log.regions().mark(&(SIZE - 1..SIZE));
            log.save().expect("has room");
            log.regions().clear(&(65_536..131_072));
            log.save().expect("has room");
            let assumed = Assumed {
                granularity: Some(64 << 10),
                size: Some(SIZE),
                ..Assumed::default()
            };
            let log = again(&storage, &assumed).expect("is a log");
            assert_eq!((log.kind(), log.usage()), (kind, Usage::Closed));
            let dirty: Vec<_> = log.regions().dirty(0).collect();
            assert_eq!(dirty, [131_072..3 << 20, 100 << 20..SIZE], "{kind:?}");
            assert_eq!(log.disk().is_some(), kind == Kind::Own);
        }
    }

    #[test]
    fn a_mirror_log_has_the_bytes_that_the_kernel_has() {
        let (storage, log) = made(Kind::Mirror);
        log.regions().mark(&(64 << 10..65 << 10));
        log.save().expect("has room");
        let bytes = storage.to_bytes();
        assert_eq!(bytes[..16], *b"rRiM\x02\0\0\0\x41\x06\0\0\0\0\0\0");
        assert_eq!(bytes[1024..1026], [0xfd, 0xff]);
        assert_eq!(bytes.len(), 1024 + 1601_usize.div_ceil(32) * 4);
        assert_eq!(bytes[1024 + 200..], [1, 0, 0, 0], "nothing behind the last");
        // Regions are as large as the user says; without that, their number is right.
        let log = again(&storage, &Assumed::default()).expect("is a log");
        assert_eq!(
            (log.regions().count(), log.regions().geometry().regions()),
            (1, 1601)
        );
        let wrong = Assumed {
            size: Some(SIZE + (1 << 20)),
            granularity: Some(64 << 10),
            ..Assumed::default()
        };
        assert!(again(&storage, &wrong).is_err());
    }

    #[test]
    fn each_byte_of_a_head_that_is_changed_is_found_or_changes_nothing() {
        let (storage, log) = made(Kind::Own);
        log.regions().mark(&(0..SIZE));
        log.save().expect("has room");
        let bytes = storage.to_bytes();
        for at in 0..own::LEN {
            let mut changed = bytes.clone();
            changed[at] ^= 0x5a;
            let storage = Arc::new(MemoryStorage::from_bytes(&changed));
            assert!(again(&storage, &Assumed::default()).is_err(), "{at}");
        }
        for len in [0, 7, 511, 4095, 4096, bytes.len() - 8] {
            let storage = Arc::new(MemoryStorage::from_bytes(&bytes[..len]));
            assert!(again(&storage, &Assumed::default()).is_err(), "{len}");
        }
        // The others have no checksum: any answer will do, and no memory is taken for it.
        for kind in [Kind::Mirror, Kind::Cbt] {
            let (storage, _) = made(kind);
            let bytes = storage.to_bytes();
            for at in 0..48 {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    let storage = Arc::new(MemoryStorage::from_bytes(&changed));
                    let _ = again(&storage, &Assumed::default());
                }
            }
        }
    }

    #[test]
    fn a_cbt_log_that_was_not_closed_is_not_to_be_relied_on() {
        let (storage, _) = made(Kind::Cbt);
        storage.write_at(&[0], 32).expect("has room");
        let log = again(&storage, &Assumed::default()).expect("is a log");
        assert_eq!(log.usage(), Usage::Lost);
        storage.write_at(&[2], 32).expect("has room");
        assert!(again(&storage, &Assumed::default()).is_err());
        let text = again(
            &Arc::new(MemoryStorage::from_bytes(&[0; 600])),
            &Assumed::default(),
        );
        assert!(text.expect_err("is none").to_string().contains("cbt"));
    }
}
