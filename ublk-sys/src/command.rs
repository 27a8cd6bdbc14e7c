//! Commands to `/dev/ublk-control` and what they carry.

use serde::{Deserialize, Serialize};

/// Number of an ioctl that the kernel answers in the caller's buffer.
const fn ior(number: u32, size: usize) -> u32 {
    ioc(2, number, size)
}

/// Number of an ioctl that goes both ways.
pub(crate) const fn iowr(number: u32, size: usize) -> u32 {
    ioc(3, number, size)
}

const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14 && number < 1 << 8);
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

const CTRL: usize = size_of::<ublksrv_ctrl_cmd>();

/// Numbers from before they were encoded.
pub const UBLK_CMD_GET_QUEUE_AFFINITY: u32 = 0x01;
/// As above.
pub const UBLK_CMD_GET_DEV_INFO: u32 = 0x02;
/// As above.
pub const UBLK_CMD_ADD_DEV: u32 = 0x04;
/// As above.
pub const UBLK_CMD_DEL_DEV: u32 = 0x05;
/// As above.
pub const UBLK_CMD_START_DEV: u32 = 0x06;
/// As above.
pub const UBLK_CMD_STOP_DEV: u32 = 0x07;
/// As above.
pub const UBLK_CMD_SET_PARAMS: u32 = 0x08;
/// As above.
pub const UBLK_CMD_GET_PARAMS: u32 = 0x09;
/// As above.
pub const UBLK_CMD_START_USER_RECOVERY: u32 = 0x10;
/// As above.
pub const UBLK_CMD_END_USER_RECOVERY: u32 = 0x11;
/// As above.
pub const UBLK_CMD_GET_DEV_INFO2: u32 = 0x12;

/// The CPUs of one queue, as a set.
pub const UBLK_U_CMD_GET_QUEUE_AFFINITY: u32 = ior(UBLK_CMD_GET_QUEUE_AFFINITY, CTRL);
/// The device's [`ublksrv_ctrl_dev_info`].
pub const UBLK_U_CMD_GET_DEV_INFO: u32 = ior(UBLK_CMD_GET_DEV_INFO, CTRL);
/// Adds a device, with its character device.
pub const UBLK_U_CMD_ADD_DEV: u32 = iowr(UBLK_CMD_ADD_DEV, CTRL);
/// Removes a device and waits until its number is free.
pub const UBLK_U_CMD_DEL_DEV: u32 = iowr(UBLK_CMD_DEL_DEV, CTRL);
/// Shows the block device; waits until all tags have been fetched.
pub const UBLK_U_CMD_START_DEV: u32 = iowr(UBLK_CMD_START_DEV, CTRL);
/// Takes the block device away.
pub const UBLK_U_CMD_STOP_DEV: u32 = iowr(UBLK_CMD_STOP_DEV, CTRL);
/// Sets [`crate::ublk_params`], before the device starts.
pub const UBLK_U_CMD_SET_PARAMS: u32 = iowr(UBLK_CMD_SET_PARAMS, CTRL);
/// Reads [`crate::ublk_params`].
pub const UBLK_U_CMD_GET_PARAMS: u32 = ior(UBLK_CMD_GET_PARAMS, CTRL);
/// Begins to take over a device whose server is gone.
pub const UBLK_U_CMD_START_USER_RECOVERY: u32 = iowr(UBLK_CMD_START_USER_RECOVERY, CTRL);
/// Ends that; waits until all tags have been fetched.
pub const UBLK_U_CMD_END_USER_RECOVERY: u32 = iowr(UBLK_CMD_END_USER_RECOVERY, CTRL);
/// As `GET_DEV_INFO`, for devices of users without privileges too.
pub const UBLK_U_CMD_GET_DEV_INFO2: u32 = ior(UBLK_CMD_GET_DEV_INFO2, CTRL);
/// The bits of [`crate::feature`] that the driver has.
pub const UBLK_U_CMD_GET_FEATURES: u32 = ior(0x13, CTRL);
/// Removes a device without waiting.
pub const UBLK_U_CMD_DEL_DEV_ASYNC: u32 = ior(0x14, CTRL);
/// Changes the size of a live device; `data[0]` in sectors.
pub const UBLK_U_CMD_UPDATE_SIZE: u32 = iowr(0x15, CTRL);
/// Makes a live device wait for another server; `data[0]`: milliseconds to try.
pub const UBLK_U_CMD_QUIESCE_DEV: u32 = iowr(0x16, CTRL);
/// Takes the block device away unless somebody has it open.
pub const UBLK_U_CMD_TRY_STOP_DEV: u32 = iowr(0x17, CTRL);

/// Length of the answer to `GET_FEATURES` in bytes.
pub const UBLK_FEATURES_LEN: u32 = 8;

/// What rides in the submission of a command.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_ctrl_cmd {
    /// Number of the device.
    pub dev_id: u32,
    /// Number of the queue; all ones where the command is not about one.
    pub queue_id: u16,
    /// Length of the buffer at `addr` in bytes.
    pub len: u16,
    /// Address of a buffer for what the command takes or answers.
    pub addr: u64,
    /// What the command takes beside that.
    pub data: [u64; 1],
    /// Length of a path at the front of the buffer, its NUL included.
    pub dev_path_len: u16,
    /// 0.
    pub pad: u16,
    /// 0.
    pub reserved: u32,
}

/// A device as the driver knows it.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_ctrl_dev_info {
    /// Number of queues.
    pub nr_hw_queues: u16,
    /// Requests that a queue may have under way.
    pub queue_depth: u16,
    /// `UBLK_S_DEV_*`.
    pub state: u16,
    /// 0.
    pub pad0: u16,
    /// Largest request in bytes.
    pub max_io_buf_bytes: u32,
    /// Number of the device.
    pub dev_id: u32,
    /// Process that serves it, or -1.
    pub ublksrv_pid: i32,
    /// 0.
    pub pad1: u32,
    /// `UBLK_F_*`.
    pub flags: u64,
    /// The server's own, kept and not looked at.
    pub ublksrv_flags: u64,
    /// User who added it.
    pub owner_uid: u32,
    /// Group of that user.
    pub owner_gid: u32,
    /// 0.
    pub reserved1: u64,
    /// 0.
    pub reserved2: u64,
}

const _: () = {
    assert!(size_of::<ublksrv_ctrl_cmd>() == 32);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, queue_id) == 4);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, len) == 6);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, addr) == 8);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, data) == 16);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, dev_path_len) == 24);
    assert!(core::mem::offset_of!(ublksrv_ctrl_cmd, reserved) == 28);
    assert!(size_of::<ublksrv_ctrl_dev_info>() == 64);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, state) == 4);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, max_io_buf_bytes) == 8);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, dev_id) == 12);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, ublksrv_pid) == 16);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, flags) == 24);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, owner_uid) == 40);
    assert!(core::mem::offset_of!(ublksrv_ctrl_dev_info, reserved2) == 56);
    assert!(UBLK_U_CMD_GET_FEATURES == 0x8020_7513);
    assert!(UBLK_U_CMD_ADD_DEV == 0xc020_7504);
};
