//! One layer: what a format is.
//!
//! A driver is a map with an allocator.  It answers "where are these bytes" and "give these bytes
//! space"; it neither reads nor writes guest data, except to decode compressed runs.  Reading,
//! copy-on-write, zeroing and copying therefore exist once, above the drivers, and every format
//! gains them.

use std::ffi::OsString;
use std::fmt;
use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::storage::{Limits, Storage, Zeroing};
use crate::util::progress::Watcher;

pub mod amend;
pub mod assemble;
pub mod be64;
pub mod bitmap;
pub mod check;
pub mod codec;
pub mod compact;
pub mod compress;
pub mod contents;
pub mod create;
pub mod delta;
pub mod disc;
pub mod driver;
pub mod flat;
pub mod follow;
pub mod info;
pub mod merge;
pub mod open;
pub mod operations;
pub mod options;
pub mod overlay;
pub mod probe;
pub mod relink;
pub mod reserve;
pub mod sector;
mod shared;
pub mod snapshot;
pub mod store;
pub mod table;
pub mod units;
pub mod windows;
pub mod words;

pub use amend::Amend;
pub use bitmap::Bitmaps;
pub use check::Check;
pub use compact::Compact;
pub use compress::Compress;
pub use driver::Driver;
pub use relink::{Empty, Relink, Rename};
pub use snapshot::{Snapshot, Snapshots};
pub use store::Store;

/// Where one layer keeps a run of guest bytes.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Source<'a> {
    /// As they are, at `host` of `storage`; overwritten in place only when `writable`.
    Stored {
        /// The object that holds them.
        storage: &'a dyn Storage,
        /// Offset there of the first byte.
        host: u64,
        /// Whether a write may go straight there.
        writable: bool,
    },
    /// Compressed, or a difference: [`Image::read_encoded_over`] produces them.
    Encoded,
    /// They read as zeroes, whatever lies below.
    Zero,
    /// This layer does not have them.
    Below,
    /// The layers below have them, at this offset of their disk.
    Moved(u64),
}

/// A run of guest bytes with one source.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Bytes from the offset asked for; never 0.
    pub len: u64,
    /// Where they are.
    pub source: Source<'a>,
}

impl<'a> Run<'a> {
    /// `len` bytes that are in `storage` where they are on the disk.
    pub fn in_place(storage: &'a dyn Storage, at: u64, len: u64, writable: bool) -> Self {
        let source = Source::Stored {
            storage,
            host: at,
            writable,
        };
        Self { len, source }
    }
}

/// Whether a look-up may wait for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It may.
    Yes,
    /// It may not; where it would have to, the answer is `WouldBlock`.
    No,
}

/// New space, not yet visible to readers.
#[derive(Debug)]
pub struct Slot<'a> {
    /// Guest range that becomes visible once the slot is filled.
    pub guest: Range<u64>,
    /// Object to write its bytes to.
    pub storage: &'a dyn Storage,
    /// Offset of `guest.start` there.
    pub host: u64,
    /// What the range reads as until then.
    pub old: Old<'a>,
    /// The space reads as zeroes already, so zeroes need not be written to it.
    pub zeroed: bool,
}

/// What a unit held before it got space of its own.
#[derive(Debug, Clone, Copy)]
pub enum Old<'a> {
    /// This layer did not have it: read the layer below.
    Below,
    /// Zeroes.
    Zero,
    /// These bytes, of the length of the unit.
    Bytes(&'a [u8]),
    /// Nothing that is still wanted: the request covers the slot.
    Replaced,
}

/// Called by `allocate` once for each slot.
///
/// Must leave every byte of it as the guest is to read it, and must not call the image that
/// called it.
pub type Fill<'f> = dyn FnMut(Slot<'_>) -> Result<()> + 'f;

/// What a format can do, fixed for as long as an image is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// Writes are taken: the format can, and the image was opened for writing.
    pub write: bool,
    /// The image has something below it: `Below` runs are to be read there.  Otherwise they read
    /// as zeroes.
    pub backing: bool,
    /// Guest bytes are stored as they are, so that a run's host offset can be handed out.
    pub host_offsets: bool,
    /// What is stored stays where it is for as long as the image is open, and nothing else is ever
    /// stored there: what is sent to others by reference is never another guest offset's.
    pub offsets_stay: bool,
    /// The most bytes that are decoded together where some are encoded; `None`: none ever are.
    pub encoded: Option<u64>,
}

impl Caps {
    /// Of an image that is read, has nothing below it, and stores bytes as they are.
    pub const STORED: Self = Self {
        write: false,
        backing: false,
        host_offsets: true,
        offsets_stay: false,
        encoded: None,
    };
}

/// What an image's header says lies below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Names of the file, best first; there may be none.  They come from the image: untrusted.
    pub names: Vec<BackingName>,
    /// The format, where it is recorded.
    pub format: Option<String>,
    /// The identity the image below must have, where the format records one.
    pub identity: Option<Uuid>,
    /// The state that the image below was in when this one was made, where the format records it: in
    /// another one it holds other data.
    pub state: Option<Uuid>,
}

/// One name under which the image below may be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// A path, relative to the directory of the image that names it, or absolute: bytes.
    pub path: OsString,
    /// Where in the image it stands, such as `W2ru` or `header`.
    pub origin: String,
}

/// What a host object is to the image that is made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It holds the header, or a description of the image in words; of most formats all else too.
    Header,
    /// It holds guest bytes alone: a data file, an extent.
    Data,
}

/// One of the host objects that an image is made of.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// What it is to the image.
    pub role: Role,
    /// The object.
    pub storage: &'a dyn Storage,
}

/// Which of the host objects of open images one is: for comparing with others that are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectId(usize);

impl ObjectId {
    /// That of `storage`, for as long as it is open.
    pub fn of(storage: &dyn Storage) -> Self {
        Self(std::ptr::from_ref(storage).cast::<()>().addr())
    }
}

/// The layers below an image, as one disk.
pub trait Below {
    /// Fills all of `buf` with the bytes at `at`; past the end of the disk, zeroes.
    ///
    /// # Errors
    /// Those of the layers.
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()>;
}

/// One open image: one layer of a chain.
///
/// All methods may be called from any number of threads.
pub trait Image: fmt::Debug + Send + Sync {
    /// The registry row it was opened with.
    fn driver(&self) -> &'static Driver;
    /// Size of the disk it holds, in bytes.
    fn virtual_size(&self) -> u64;
    /// Unit of allocation in bytes, where the format has one.
    fn cluster_size(&self) -> Option<u64>;
    /// What requests should keep to; `zero_align` and `discard_align` are usually one cluster,
    /// and requests to [`Image::zero`] and [`Image::discard`] must keep to them.
    fn limits(&self) -> Limits;
    /// What it can do.
    fn caps(&self) -> Caps;
    /// The object that holds its header, for disk size, messages and relative names.
    fn storage(&self) -> &dyn Storage;
    /// Finds where the bytes from `at` are; looks no further than `len`, and does no I/O beyond
    /// the table that covers `at`.  `at` lies inside the disk and `len` is not 0.
    ///
    /// # Errors
    /// `Corrupt` where the table points outside what it may; `WouldBlock` as `wait` says.
    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>>;
    /// What changes of its data are left to; `None`: they are made here, or there are none.
    fn store(&self) -> Option<&dyn Store> {
        None
    }
    /// Fills `buf` with the bytes at `at`, which `map` called `Encoded`, as far as they still are.
    ///
    /// Returns how many bytes that is.  Where it is fewer than asked for, 0 even, another thread has
    /// changed what follows, so the caller maps again.
    ///
    /// # Errors
    /// `Corrupt` where they do not decode; the host's.
    fn read_encoded(&self, _buf: &mut [u8], _at: u64) -> Result<usize> {
        let name = self.driver().name;
        Err(Error::unsupported(format!(
            "format '{name}' has no compressed data"
        )))
    }
    /// As [`Image::read_encoded`], where the bytes may depend on those of the layers below.
    ///
    /// # Errors
    /// As there; those of `below`.
    fn read_encoded_over(&self, buf: &mut [u8], at: u64, below: &dyn Below) -> Result<usize> {
        let _ = below;
        self.read_encoded(buf, at)
    }
    /// Tells it that what lies below is a disk of so many bytes: called once, before the disk is used.
    /// A format that does not record how large its disk is takes that from it.
    fn lies_over(&self, size: u64) {
        let _ = size;
    }
    /// The error for changes of a disk that takes none as it is open: `ReadOnly`.
    fn read_only(&self) -> Error {
        Error::read_only()
    }
    /// Gives the bytes from `at` space of their own, has `fill` write it, then publishes it.
    ///
    /// Returns how many bytes from `at` are now `Stored` and writable; 0 when another thread was
    /// first, so the caller maps again.  Looks no further than `len`, though the last slot may
    /// reach past it, and the first may begin before `at`.  What `fill` wrote is on stable media
    /// before the word that publishes it, unless the image was opened `Unordered`.
    ///
    /// # Errors
    /// That of `fill`, and the host's; then the mapping is as it was.
    fn allocate(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        let store = self.store().ok_or_else(|| self.read_only())?;
        store.allocate(at..at + len, fill)
    }
    /// As [`Image::allocate`], for one of many requests of clients: `fill` may also be called for
    /// slots that the request does not touch, whose bytes it must leave as they were.  Clusters that
    /// are expected to be written next are copied so, by one sync.
    ///
    /// # Errors
    /// As [`Image::allocate`].
    fn allocate_ahead(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        match self.store() {
            Some(store) => store.allocate_ahead(at..at + len, fill),
            None => self.allocate(at, len, fill),
        }
    }
    /// Makes an aligned range read as zeroes by metadata alone.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, where that cannot be; the host's.
    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        let store = self.store().ok_or_else(|| self.read_only())?;
        store.zero(range, how)
    }
    /// Drops an aligned range, so that it reads as zeroes.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, where that cannot be; the host's.
    fn discard(&self, range: Range<u64>) -> Result<()> {
        let store = self.store().ok_or_else(|| self.read_only())?;
        store.discard(range)
    }
    /// Returns once every completed write, and the metadata it needs, is on stable media.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> Result<()> {
        match self.store() {
            Some(store) => store.flush(),
            None => self.storage().sync(),
        }
    }
    /// Leaves the file as a clean close leaves it: preallocated space given back, flags reset.
    /// Called once, by an owner who wrote, when no request is under way.  Where order matters it is
    /// a flush too, and a power cut undoes no more than that space is given back.
    ///
    /// # Errors
    /// The host's; the image is then as after a kill.
    fn close(&self) -> Result<()>;

    /// All host objects that it is made of, as far as they are open.
    fn parts(&self) -> Vec<Part<'_>> {
        vec![Part {
            role: Role::Header,
            storage: self.storage(),
        }]
    }
    /// The image below, as this one's header has it.
    fn backing(&self) -> Option<Backing> {
        None
    }
    /// Who it is: the identity by which a child recognises this image, where the format has one.  No
    /// change of its data changes it.
    fn identity(&self) -> Option<Uuid> {
        None
    }
    /// When it is: what is another after each session that changed its data, from before the first
    /// change on, where the format has such a thing.  A child holds the one it was made over.
    fn state(&self) -> Option<Uuid> {
        None
    }
    /// The state that the first change to come puts it in, where the format has such a thing: who records
    /// it may be told before.
    ///
    /// # Errors
    /// The host's, where it gives no random bytes.
    fn next_state(&self) -> Result<Option<Uuid>> {
        Ok(None)
    }
    /// Another state that the image below may be in, while it is changed on this one's behalf.
    fn other_state(&self) -> Option<Uuid> {
        None
    }
    /// Bytes of a sector of the disk, the smallest part that its users write, where the format says so:
    /// that of the image below is the same.
    fn sector_size(&self) -> Option<u64> {
        None
    }
    /// What its guest is told that hardware has as a sector, where the format says so.
    fn physical_sector_size(&self) -> Option<u64> {
        None
    }
    /// From here on what changes leaves the disk as it is: who recorded its state is told of no other.
    fn keep_state(&self) {}
    /// Whether what it maps as stored may for long stretches never have been written, so that the
    /// host has holes there: not where space is given as it is written.
    fn may_be_unwritten(&self) -> bool {
        self.cluster_size().is_none()
    }
    /// Whether its data is encrypted; it is not read then.
    fn is_encrypted(&self) -> bool {
        false
    }
    /// Whether the header says that the image was not closed cleanly.
    fn is_dirty(&self) -> bool {
        false
    }
    /// What `info` shows that only this format has, in order.
    fn details(&self) -> Vec<info::Detail> {
        Vec::new()
    }
    /// From now on changes of the image as a whole tell `watcher` of the metadata that they have
    /// dealt with, in bytes; formats whose changes take no time do not.
    fn watch(&mut self, _watcher: Watcher) {}
    /// Consistency check, for formats that have metadata to check.
    fn as_check(&self) -> Option<&dyn Check> {
        None
    }
    /// Giving back space that is held for nothing, where the format allocates.
    fn as_compact(&self) -> Option<&dyn Compact> {
        None
    }
    /// Change of virtual size, where the format allows it.
    fn as_resize(&self) -> Option<&dyn Resize> {
        None
    }
    /// Naming another backing image, where the format can.
    fn as_relink(&mut self) -> Option<&mut dyn Relink> {
        None
    }
    /// Naming its further files otherwise, where they are called after the image.
    fn as_rename(&mut self) -> Option<&mut dyn Rename> {
        None
    }
    /// Dropping all that the image has itself, where the format can.
    fn as_empty(&mut self) -> Option<&mut dyn Empty> {
        None
    }
    /// Change of format options, where the format has some that can change.
    fn as_amend(&mut self) -> Option<&mut dyn Amend> {
        None
    }
    /// Its dirty bitmaps, in formats that have them.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        None
    }
    /// Its dirty bitmaps, for changes of them.
    fn as_bitmaps(&mut self) -> Option<&mut dyn Bitmaps> {
        None
    }
    /// Its internal snapshots, in order.
    ///
    /// # Errors
    /// `Corrupt` where their table is damaged; the host's.
    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(Vec::new())
    }
    /// Making, applying and deleting internal snapshots, where the format has them.
    fn as_snapshots(&mut self) -> Option<&mut dyn Snapshots> {
        None
    }
    /// What was recorded of the bytes that it is kept in, where something was: whoever reads the
    /// whole disk compares them.
    fn sealed(&self) -> Option<&dyn contents::Sealed> {
        None
    }
    /// Storing clusters compressed.
    ///
    /// # Errors
    /// `Unsupported` where the format, or this image of it, cannot; `ReadOnly`.
    fn as_compress(&self) -> Result<&dyn Compress> {
        Err(crate::error::Error::unsupported(format!(
            "format '{}' has no compressed data",
            self.driver().name
        )))
    }
    /// Merging it into the disk below in place, where it says itself how far that is.
    fn as_merge(&self) -> Option<&dyn merge::Merge> {
        None
    }
    /// Its operations one by one, in formats that are lists of such.
    fn as_operations(&self) -> Option<&dyn operations::Operations> {
        None
    }
    /// Its sectors by part, where it has such.
    fn as_sectors(&self) -> Option<&dyn sector::Sectors> {
        None
    }
    /// The disc that it is, where it is one.
    fn as_disc(&self) -> Option<&dyn disc::Disc> {
        None
    }
    /// Assignment of space ahead of the writes, where the format allocates.
    fn as_layout(&self) -> Option<&dyn Layout> {
        None
    }
}

/// Change of virtual size.
pub trait Resize {
    /// Refuses what [`Resize::resize`] would refuse, before anything is changed; the unit that the end
    /// of the disk cuts may get space of its own until then.
    ///
    /// # Errors
    /// As [`Resize::resize`].
    fn may_resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        let _ = (virtual_size, below);
        Ok(())
    }
    /// Sets the virtual size in bytes; new bytes read as zeroes, and so they do where a backing
    /// image has data there.  Called when no request is under way.
    ///
    /// # Errors
    /// `OutOfRange` past what the format can hold; the host's; then the size is as it was.
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()>;
    /// Runs `give`, which gives space to zeroes that read as zeroes before: bitmaps take no note of
    /// it.  Called when no request is under way.
    ///
    /// # Errors
    /// Those of `give`; the host's.
    fn unrecorded(&self, give: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        give()
    }
}

/// What is known of the image below one that is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerBelow {
    /// There is none.
    Nothing,
    /// Its virtual size in bytes.
    Size(u64),
    /// There is one, which was not opened.
    NotOpened,
}

impl LayerBelow {
    /// Up to where there may be data that would show where the image above has none.
    ///
    /// # Errors
    /// `Unsupported` where nobody knows.
    pub fn end(self) -> Result<u64> {
        match self {
            Self::Nothing => Ok(0),
            Self::Size(size) => Ok(size),
            Self::NotOpened => Err(Error::unsupported(
                "a differencing disk does not grow while its parent is not open: data of the parent could show",
            )),
        }
    }
}

/// Assignment of host space in guest order, ahead of the writes.
///
/// `convert` writes from several threads; assigning space in guest order first makes the layout
/// the same whatever their number.
pub trait Layout {
    /// Assigns space to all clusters that `ranges` (ascending) touch and that have none.  A later
    /// `allocate` there uses it; until then it is unpublished.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them; then nothing more is assigned than before.
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()>;
}
