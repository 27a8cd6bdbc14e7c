//! Which requests the queue thread can have the kernel carry out by itself, and how.
//!
//! Nothing here waits for a disk: a table that is not in memory makes it a worker's request.

use std::os::fd::{AsRawFd, RawFd};

use crate::backend::{Kind, Shape};
use crate::chain::{Chain, Resolved};
use crate::image::{Source, Wait};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Most pieces a request is made of; one that is more broken up is a worker's.
const MAX_PIECES: usize = 16;

/// A part of a request's buffer, and where its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Offset in the buffer.
    pub(super) at: usize,
    /// Length in bytes; never 0.
    pub(super) len: usize,
    /// Where they are.
    pub(super) place: Place,
}

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In a file, at an offset; the descriptor is good for as long as the chain.
    File(RawFd, u64),
    /// Nowhere: they read as zeroes.
    Zero,
}

/// Adds the pieces of a read or an overwrite to `pieces`; `None` where more has to be done than to
/// move bytes.
///
/// Requests start and end at multiples of `block`.  The caller holds a ticket of [`Chain::enter`]
/// from before the call until the last piece is done.
pub(super) fn plan(
    chain: &Chain,
    shape: &Shape,
    block: u64,
    pieces: &mut Vec<Piece>,
) -> Option<()> {
    let mut at = shape.range.start;
    while at < shape.range.end {
        let left = shape.range.end - at;
        let found = chain.resolve(at, left, Wait::No).ok()?;
        let len = found.len.min(left);
        let place = match shape.kind {
            Kind::Read => readable(&found, len, block)?,
            Kind::Write => writable(&found, len, block)?,
            _ => return None,
        };
        let offset = clamp_len(at - shape.range.start, usize::MAX);
        add(pieces, offset, clamp_len(len, usize::MAX), place)?;
        at += len;
    }
    Some(())
}

/// Where in the file `fd` the last byte of the pieces is followed; 0 where none is there.
pub(super) fn end_in(pieces: &[Piece], fd: RawFd) -> u64 {
    let ends = pieces.iter().filter_map(|piece| match piece.place {
        Place::File(file, host) if file == fd => Some(host.saturating_add(len64(piece.len))),
        _ => None,
    });
    ends.max().unwrap_or(0)
}

/// Adds a piece, or makes the last one longer; `None` where there are too many.
fn add(pieces: &mut Vec<Piece>, at: usize, len: usize, place: Place) -> Option<()> {
    if let Some(last) = pieces.last_mut() {
        let continues = match (last.place, place) {
            (Place::Zero, Place::Zero) => true,
            (Place::File(a, host), Place::File(b, next)) => {
                a == b
                    && u64::try_from(last.len).is_ok_and(|len| host.checked_add(len) == Some(next))
            }
            _ => false,
        };
        if continues {
            last.len += len;
            return Some(());
        }
    }
    if pieces.len() == MAX_PIECES {
        return None;
    }
    pieces.push(Piece { at, len, place });
    Some(())
}

fn readable(found: &Resolved<'_>, len: u64, block: u64) -> Option<Place> {
    match found.source {
        Source::Stored { storage, host, .. } => stored(storage, host, len, block),
        Source::Zero | Source::Below => Some(Place::Zero),
        _ => None,
    }
}

fn writable(found: &Resolved<'_>, len: u64, block: u64) -> Option<Place> {
    match found.source {
        Source::Stored {
            storage,
            host,
            writable: true,
        } if found.depth == 0 => stored(storage, host, len, block),
        _ => None,
    }
}

/// A place inside an object that has a descriptor.  What reaches past its end, which is to be read
/// as zeroes or to make it grow, is a worker's.
fn stored(storage: &dyn Storage, host: u64, len: u64, block: u64) -> Option<Place> {
    let end = host.checked_add(len)?;
    let fd = storage.fd_for(&(host..end), block)?.as_raw_fd();
    (end <= storage.size()).then_some(Place::File(fd, host))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::ops::Range;
    use std::sync::Arc;

    use super::*;
    use crate::chain::Base;
    use crate::formats::raw;
    use crate::image::Image;
    use crate::image::open::OpenOptions;
    use crate::storage::file::FileStorage;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;

    fn pieces(chain: &Chain, shape: &Shape, block: u64) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        plan(chain, shape, block, &mut pieces).map(|()| pieces)
    }

    fn shape(kind: Kind, range: Range<u64>) -> Shape {
        Shape {
            kind,
            range,
            fua: false,
        }
    }

    fn open(storage: Arc<dyn Storage>) -> Box<dyn Image> {
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        (raw::DRIVER.open)(storage, &options).expect("raw opens")
    }

    /// A raw file of 64 KiB.
    fn file() -> (Arc<FileStorage>, RawFd) {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 64 << 10]).expect("writes");
        let storage = FileStorage::new(file, "a.raw".as_ref()).expect("wraps");
        let fd = storage.fd().expect("has one").as_raw_fd();
        (Arc::new(storage), fd)
    }

    #[test]
    fn what_a_file_stores_is_moved_by_the_kernel() {
        let (storage, fd) = file();
        let chain = Chain::new(vec![open(storage)], Base::Zeroes, Arc::default()).expect("a layer");
        for kind in [Kind::Read, Kind::Write] {
            let pieces = pieces(&chain, &shape(kind, 4096..12288), 512).expect("is stored");
            let place = Place::File(fd, 4096);
            assert_eq!(
                pieces,
                [Piece {
                    at: 0,
                    len: 8192,
                    place
                }]
            );
        }
        assert_eq!(
            pieces(&chain, &shape(Kind::Flush, 0..0), 512),
            Some(Vec::new())
        );
        assert_eq!(pieces(&chain, &shape(Kind::Discard, 0..512), 512), None);
    }

    #[test]
    fn what_an_overlay_does_not_have_is_read_below_and_written_by_a_worker() {
        let (storage, fd) = file();
        let chain = Chain::new(vec![open(storage)], Base::Zeroes, Arc::default()).expect("a layer");
        let chain = chain.with_overlay().expect("a temporary file");
        let place = Place::File(fd, 0);
        let found = pieces(&chain, &shape(Kind::Read, 0..4096), 512).expect("is stored");
        assert_eq!(
            found,
            [Piece {
                at: 0,
                len: 4096,
                place
            }]
        );
        assert_eq!(pieces(&chain, &shape(Kind::Write, 0..4096), 512), None);
        chain
            .zero(0..64 << 10, crate::storage::Zeroing::MayUnmap)
            .expect("zeroes");
        let found = pieces(&chain, &shape(Kind::Read, 0..4096), 512).expect("are zeroes");
        let place = Place::Zero;
        assert_eq!(
            found,
            [Piece {
                at: 0,
                len: 4096,
                place
            }]
        );
    }

    #[test]
    fn storage_without_a_descriptor_is_left_to_workers() {
        let storage = Arc::new(MemoryStorage::from_bytes(&[1; 4096]));
        let chain = Chain::new(vec![open(storage)], Base::Zeroes, Arc::default()).expect("a layer");
        assert_eq!(pieces(&chain, &shape(Kind::Read, 0..512), 512), None);
    }

    #[test]
    fn the_end_of_what_is_written_counts_in_one_file_alone() {
        let piece = |len, place| Piece { at: 0, len, place };
        let pieces = [
            piece(512, Place::File(3, 4096)),
            piece(1024, Place::File(3, 1024)),
            piece(512, Place::File(4, 1 << 20)),
            piece(512, Place::Zero),
        ];
        assert_eq!(end_in(&pieces, 3), 4608);
        assert_eq!(end_in(&pieces, 5), 0);
    }

    #[test]
    fn neighbours_are_joined_and_too_many_pieces_are_refused() {
        let mut pieces = Vec::new();
        add(&mut pieces, 0, 512, Place::File(3, 0)).expect("one");
        add(&mut pieces, 512, 512, Place::File(3, 512)).expect("joined");
        add(&mut pieces, 1024, 512, Place::Zero).expect("two");
        add(&mut pieces, 1536, 512, Place::Zero).expect("joined");
        assert_eq!(pieces.len(), 2);
        assert_eq!(
            pieces[1],
            Piece {
                at: 1024,
                len: 1024,
                place: Place::Zero
            }
        );
        for i in 2..MAX_PIECES {
            add(&mut pieces, i * 1024, 512, Place::File(3, (i as u64) << 20)).expect("fits");
        }
        assert_eq!(add(&mut pieces, 1 << 20, 512, Place::File(4, 0)), None);
    }
}
