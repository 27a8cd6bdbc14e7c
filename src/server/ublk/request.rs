//! Requests as the driver describes them, turned into those of a backend.

use std::ops::Range;

use libublk::sys;

use crate::backend::{Kind, Shape};
use crate::storage::Zeroing;

/// The driver counts in sectors of this many bytes, whatever the block size.
pub(super) const SECTOR: u64 = 512;

/// One request of a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    /// What a backend has to know to admit it.
    pub(super) shape: Shape,
    /// What zeroing may do with the space.
    pub(super) how: Zeroing,
    /// Whether the driver could not register the request's buffer with the ring.
    pub(super) unregistered: bool,
}

impl Command {
    /// Reads a descriptor; an errno for what no request of ours can be.
    pub(super) fn parse(found: &sys::ublksrv_io_desc) -> Result<Self, i32> {
        let flags = found.op_flags;
        let kind = match flags & 0xff {
            sys::UBLK_IO_OP_READ => Kind::Read,
            sys::UBLK_IO_OP_WRITE => Kind::Write,
            sys::UBLK_IO_OP_FLUSH => Kind::Flush,
            sys::UBLK_IO_OP_DISCARD => Kind::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => Kind::Zero,
            _ => return Err(libc::EOPNOTSUPP),
        };
        let range = match kind {
            // Its first sector is all ones.
            Kind::Flush => 0..0,
            _ => bytes(found.start_sector, found.nr_sectors).ok_or(libc::EINVAL)?,
        };
        let keep = flags & sys::UBLK_IO_F_NOUNMAP != 0;
        let fua = flags & sys::UBLK_IO_F_FUA != 0 && matches!(kind, Kind::Write | Kind::Zero);
        Ok(Self {
            shape: Shape { kind, range, fua },
            how: match keep {
                true => Zeroing::KeepSpace,
                false => Zeroing::MayUnmap,
            },
            unregistered: flags & sys::UBLK_IO_F_NEED_REG_BUF != 0,
        })
    }

    /// Bytes of the request's buffer; 0 for those that have none.
    pub(super) fn buffer_len(&self) -> usize {
        match self.shape.kind {
            Kind::Read | Kind::Write => usize::try_from(self.shape.len()).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    /// What the driver is answered when the request is done: the bytes it covers.
    pub(super) fn done(&self) -> i32 {
        match self.shape.kind {
            Kind::Flush => 0,
            _ => i32::try_from(self.shape.len()).unwrap_or(i32::MAX),
        }
    }
}

fn bytes(start: u64, sectors: u32) -> Option<Range<u64>> {
    let start = start.checked_mul(SECTOR)?;
    Some(start..start.checked_add(u64::from(sectors) * SECTOR)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc {
            op_flags,
            nr_sectors,
            start_sector,
            addr: 0,
        }
    }

    #[test]
    fn a_flush_has_no_range_whatever_its_sector_says() {
        let flush = Command::parse(&desc(sys::UBLK_IO_OP_FLUSH, u64::MAX, 0)).expect("a flush");
        assert_eq!(flush.shape.range, 0..0);
        assert_eq!((flush.done(), flush.buffer_len()), (0, 0));
    }

    #[test]
    fn flags_say_how_durable_and_how_zeroed() {
        let op = sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA | sys::UBLK_IO_F_META;
        let write = Command::parse(&desc(op, 8, 16)).expect("a write");
        assert_eq!(write.shape.range, 4096..12288);
        assert!(write.shape.fua);
        assert_eq!((write.done(), write.buffer_len()), (8192, 8192));
        let zero = sys::UBLK_IO_OP_WRITE_ZEROES;
        let keep = Command::parse(&desc(zero | sys::UBLK_IO_F_NOUNMAP, 0, 1)).expect("zeroes");
        assert_eq!(keep.how, Zeroing::KeepSpace);
        let may = Command::parse(&desc(zero, 0, 1)).expect("zeroes");
        assert_eq!((may.how, may.buffer_len()), (Zeroing::MayUnmap, 0));
        let read = Command::parse(&desc(sys::UBLK_IO_F_FUA, 0, 1)).expect("a read");
        assert!(!read.shape.fua, "a read is never to be made durable");
    }

    #[test]
    fn what_no_request_can_be_is_refused() {
        let zones = desc(sys::UBLK_IO_OP_REPORT_ZONES, 0, 1);
        assert_eq!(Command::parse(&zones), Err(libc::EOPNOTSUPP));
        assert_eq!(Command::parse(&desc(0, u64::MAX / 2, 1)), Err(libc::EINVAL));
        assert_eq!(
            Command::parse(&desc(0, u64::MAX / 512, 2)),
            Err(libc::EINVAL)
        );
    }
}
