//! Requests of a queue and the commands that take and answer them.

use crate::command::iowr;
use serde::{Deserialize, Serialize};

const IO: usize = size_of::<ublksrv_io_cmd>();
const BATCH: usize = size_of::<ublk_batch_io>();

/// Numbers from before they were encoded.
pub const UBLK_IO_FETCH_REQ: u32 = 0x20;
/// As above.
pub const UBLK_IO_COMMIT_AND_FETCH_REQ: u32 = 0x21;
/// As above.
pub const UBLK_IO_NEED_GET_DATA: u32 = 0x22;

/// Asks for the first request of a tag.
pub const UBLK_U_IO_FETCH_REQ: u32 = iowr(UBLK_IO_FETCH_REQ, IO);
/// Answers a request and asks for the tag's next one.
pub const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 = iowr(UBLK_IO_COMMIT_AND_FETCH_REQ, IO);
/// Asks for the bytes of a write.
pub const UBLK_U_IO_NEED_GET_DATA: u32 = iowr(UBLK_IO_NEED_GET_DATA, IO);
/// Registers a request's buffer with the ring.
pub const UBLK_U_IO_REGISTER_IO_BUF: u32 = iowr(0x23, IO);
/// Takes it out again.
pub const UBLK_U_IO_UNREGISTER_IO_BUF: u32 = iowr(0x24, IO);
/// Gives the driver the buffers of many tags.
pub const UBLK_U_IO_PREP_IO_CMDS: u32 = iowr(0x25, BATCH);
/// Answers many requests.
pub const UBLK_U_IO_COMMIT_IO_CMDS: u32 = iowr(0x26, BATCH);
/// Asks for requests, as their tags, into provided buffers, again and again.
pub const UBLK_U_IO_FETCH_IO_CMDS: u32 = iowr(0x27, BATCH);

/// A request has arrived.
pub const UBLK_IO_RES_OK: u32 = 0;
/// A write has arrived whose bytes must be asked for.
pub const UBLK_IO_RES_NEED_GET_DATA: u32 = 1;
/// The device goes away: nothing more will arrive for the tag.  Minus `ENODEV`.
pub const UBLK_IO_RES_ABORT: i32 = -19;

/// Where a queue's descriptors are in the character device.
pub const UBLKSRV_CMD_BUF_OFFSET: u32 = 0;
/// Where the bytes of requests are there.
pub const UBLKSRV_IO_BUF_OFFSET: u32 = 0x8000_0000;
/// Most requests that a queue may have under way.
pub const UBLK_MAX_QUEUE_DEPTH: u32 = 4096;
/// First bit of the offset inside a request's bytes.
pub const UBLK_IO_BUF_OFF: u32 = 0;
/// Bits of that offset: a request has at most 32 MiB.
pub const UBLK_IO_BUF_BITS: u32 = 25;
/// The same as a mask.
pub const UBLK_IO_BUF_BITS_MASK: u32 = (1 << UBLK_IO_BUF_BITS) - 1;
/// First bit of the tag.
pub const UBLK_TAG_OFF: u32 = UBLK_IO_BUF_BITS;
/// Bits of the tag.
pub const UBLK_TAG_BITS: u32 = 16;
/// The same as a mask.
pub const UBLK_TAG_BITS_MASK: u32 = (1 << UBLK_TAG_BITS) - 1;
/// First bit of the queue.
pub const UBLK_QID_OFF: u32 = UBLK_TAG_OFF + UBLK_TAG_BITS;
/// Bits of the queue.
pub const UBLK_QID_BITS: u32 = 12;
/// The same as a mask.
pub const UBLK_QID_BITS_MASK: u32 = (1 << UBLK_QID_BITS) - 1;
/// Most queues that a device may have.
pub const UBLK_MAX_NR_QUEUES: u32 = 1 << UBLK_QID_BITS;
/// Bits of an offset into the bytes of requests.
pub const UBLKSRV_IO_BUF_TOTAL_BITS: u32 = UBLK_QID_OFF + UBLK_QID_BITS;
/// First offset past them.
pub const UBLKSRV_IO_BUF_TOTAL_SIZE: u64 = 1 << UBLKSRV_IO_BUF_TOTAL_BITS;

/// Kinds of request.
pub const UBLK_IO_OP_READ: u32 = 0;
/// See the first.
pub const UBLK_IO_OP_WRITE: u32 = 1;
/// See the first; the start sector means nothing.
pub const UBLK_IO_OP_FLUSH: u32 = 2;
/// See the first.
pub const UBLK_IO_OP_DISCARD: u32 = 3;
/// See the first; no longer sent.
pub const UBLK_IO_OP_WRITE_SAME: u32 = 4;
/// See the first.
pub const UBLK_IO_OP_WRITE_ZEROES: u32 = 5;
/// See the first; zoned devices only, as those that follow.
pub const UBLK_IO_OP_ZONE_OPEN: u32 = 10;
/// See the first.
pub const UBLK_IO_OP_ZONE_CLOSE: u32 = 11;
/// See the first.
pub const UBLK_IO_OP_ZONE_FINISH: u32 = 12;
/// See the first.
pub const UBLK_IO_OP_ZONE_APPEND: u32 = 13;
/// See the first.
pub const UBLK_IO_OP_ZONE_RESET_ALL: u32 = 14;
/// See the first.
pub const UBLK_IO_OP_ZONE_RESET: u32 = 15;
/// See the first.
pub const UBLK_IO_OP_REPORT_ZONES: u32 = 18;

/// Do not retry in the device.
pub const UBLK_IO_F_FAILFAST_DEV: u32 = 1 << 8;
/// Do not retry on the way.
pub const UBLK_IO_F_FAILFAST_TRANSPORT: u32 = 1 << 9;
/// Do not retry in the driver.
pub const UBLK_IO_F_FAILFAST_DRIVER: u32 = 1 << 10;
/// Metadata of a file system.
pub const UBLK_IO_F_META: u32 = 1 << 11;
/// Durable before it is answered.
pub const UBLK_IO_F_FUA: u32 = 1 << 13;
/// Zeroes must keep their space.
pub const UBLK_IO_F_NOUNMAP: u32 = 1 << 15;
/// Swap.
pub const UBLK_IO_F_SWAP: u32 = 1 << 16;
/// The driver could not register the buffer; the server has to.
pub const UBLK_IO_F_NEED_REG_BUF: u32 = 1 << 17;

/// Hand the request out with [`UBLK_IO_F_NEED_REG_BUF`] where it cannot be registered.
pub const UBLK_AUTO_BUF_REG_FALLBACK: u32 = 1 << 0;
/// All flags of [`ublk_auto_buf_reg`].
pub const UBLK_AUTO_BUF_REG_F_MASK: u32 = UBLK_AUTO_BUF_REG_FALLBACK;

/// Elements of a batch carry the place of a zone append.
pub const UBLK_BATCH_F_HAS_ZONE_LBA: u32 = 1 << 0;
/// Elements of a batch carry the address of a buffer.
pub const UBLK_BATCH_F_HAS_BUF_ADDR: u32 = 1 << 1;
/// As [`UBLK_AUTO_BUF_REG_FALLBACK`], for a batch.
pub const UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK: u32 = 1 << 2;

/// One request, in memory that the driver shares with the server.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_io_desc {
    /// Kind in the low 8 bits, `UBLK_IO_F_*` above.
    pub op_flags: u32,
    /// Length in sectors of 512 bytes.
    pub nr_sectors: u32,
    /// First sector.
    pub start_sector: u64,
    /// Address of the server's buffer, where it gave one.
    pub addr: u64,
}

/// What rides in the submission of a queue's command.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_io_cmd {
    /// Number of the queue.
    pub q_id: u16,
    /// Which of its requests.
    pub tag: u16,
    /// Bytes done, or minus an errno.
    pub result: i32,
    /// Address of the server's buffer, or index of a registered one.
    pub addr: u64,
}

/// How the driver is to register a request's buffer; travels packed in a word.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ublk_auto_buf_reg {
    /// Place in the ring's table of buffers.
    pub index: u16,
    /// `UBLK_AUTO_BUF_REG_*`.
    pub flags: u8,
    /// 0.
    pub reserved0: u8,
    /// 0.
    pub reserved1: u32,
}

/// One request of a batch; an address and the place of a zone append may follow, 8 bytes each.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_elem_header {
    /// Which request.
    pub tag: u16,
    /// Place in the ring's table of buffers for the tag's next request.
    pub buf_index: u16,
    /// Bytes done, or minus an errno.
    pub result: i32,
}

/// What rides in the submission of a batch.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_batch_io {
    /// Number of the queue.
    pub q_id: u16,
    /// `UBLK_BATCH_F_*`.
    pub flags: u16,
    /// Elements in the buffer.
    pub nr_elem: u16,
    /// Length of each in bytes.
    pub elem_bytes: u8,
    /// 0.
    pub reserved: u8,
    /// 0.
    pub reserved2: u64,
}

impl ublksrv_io_cmd {
    /// It as it rides in a submission.
    pub fn to_bytes(&self) -> [u8; IO] {
        let mut bytes = [0; IO];
        bytes[0..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

impl ublk_batch_io {
    /// It as it rides in a submission.
    pub fn to_bytes(&self) -> [u8; BATCH] {
        let mut bytes = [0; BATCH];
        bytes[0..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.nr_elem.to_ne_bytes());
        bytes[6] = self.elem_bytes;
        bytes[7] = self.reserved;
        bytes[8..].copy_from_slice(&self.reserved2.to_ne_bytes());
        bytes
    }
}

/// The packed form of `buf`: from the low bits up, index, flags, the two reserved fields.
pub fn ublk_auto_buf_reg_to_sqe_addr(buf: &ublk_auto_buf_reg) -> u64 {
    u64::from(buf.index)
        | u64::from(buf.flags) << 16
        | u64::from(buf.reserved0) << 24
        | u64::from(buf.reserved1) << 32
}

/// What [`ublk_auto_buf_reg_to_sqe_addr`] packed.
pub fn ublk_sqe_addr_to_auto_buf_reg(addr: u64) -> ublk_auto_buf_reg {
    ublk_auto_buf_reg {
        index: (addr & 0xffff) as u16,
        flags: (addr >> 16 & 0xff) as u8,
        reserved0: (addr >> 24 & 0xff) as u8,
        reserved1: (addr >> 32) as u32,
    }
}

const _: () = {
    assert!(size_of::<ublksrv_io_desc>() == 24);
    assert!(core::mem::offset_of!(ublksrv_io_desc, nr_sectors) == 4);
    assert!(core::mem::offset_of!(ublksrv_io_desc, start_sector) == 8);
    assert!(core::mem::offset_of!(ublksrv_io_desc, addr) == 16);
    assert!(size_of::<ublksrv_io_cmd>() == 16);
    assert!(core::mem::offset_of!(ublksrv_io_cmd, tag) == 2);
    assert!(core::mem::offset_of!(ublksrv_io_cmd, result) == 4);
    assert!(core::mem::offset_of!(ublksrv_io_cmd, addr) == 8);
    assert!(size_of::<ublk_auto_buf_reg>() == 8);
    assert!(core::mem::offset_of!(ublk_auto_buf_reg, reserved1) == 4);
    assert!(size_of::<ublk_elem_header>() == 8);
    assert!(core::mem::offset_of!(ublk_elem_header, buf_index) == 2);
    assert!(core::mem::offset_of!(ublk_elem_header, result) == 4);
    assert!(size_of::<ublk_batch_io>() == 16);
    assert!(core::mem::offset_of!(ublk_batch_io, elem_bytes) == 6);
    assert!(core::mem::offset_of!(ublk_batch_io, reserved2) == 8);
    assert!(UBLKSRV_IO_BUF_TOTAL_BITS == 53);
    assert!(UBLK_U_IO_FETCH_REQ == 0xc010_7520);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_travel_with_every_field_in_its_place() {
        let single = ublksrv_io_cmd {
            q_id: 0x0201,
            tag: 0x0403,
            result: 0x0807_0605,
            addr: 0x100f_0e0d_0c0b_0a09,
        };
        let batch = ublk_batch_io {
            q_id: 0x0201,
            flags: 0x0403,
            nr_elem: 0x0605,
            elem_bytes: 7,
            reserved: 8,
            reserved2: 0x100f_0e0d_0c0b_0a09,
        };
        let bytes: [u8; 16] = core::array::from_fn(|i| i as u8 + 1);
        if cfg!(target_endian = "little") {
            assert_eq!(single.to_bytes(), bytes);
            assert_eq!(batch.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_buffer_registration_survives_packing() {
        let buf = ublk_auto_buf_reg {
            index: 0x1234,
            flags: 1,
            reserved0: 0x56,
            reserved1: 0x89ab_cdef,
        };
        let packed = ublk_auto_buf_reg_to_sqe_addr(&buf);
        assert_eq!(packed, 0x89ab_cdef_5601_1234);
        assert_eq!(ublk_sqe_addr_to_auto_buf_reg(packed), buf);
    }
}
