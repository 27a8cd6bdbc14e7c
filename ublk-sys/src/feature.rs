//! What a device may be asked to do, as bits, and the states it has.

/// Requests may be registered as buffers of the server's ring.
pub const UBLK_F_SUPPORT_ZERO_COPY: u32 = 1 << 0;
/// Commands complete in task work, always.
pub const UBLK_F_URING_CMD_COMP_IN_TASK: u32 = 1 << 1;
/// Writes are announced first and copied on a second command.
pub const UBLK_F_NEED_GET_DATA: u32 = 1 << 2;
/// The device outlives its server; requests wait for the next one.
pub const UBLK_F_USER_RECOVERY: u32 = 1 << 3;
/// What the dead server had taken is given to the next one.
pub const UBLK_F_USER_RECOVERY_REISSUE: u32 = 1 << 4;
/// The device belongs to a user without privileges.
pub const UBLK_F_UNPRIVILEGED_DEV: u32 = 1 << 5;
/// Commands are numbered as ioctls are.
pub const UBLK_F_CMD_IOCTL_ENCODE: u32 = 1 << 6;
/// The server moves the bytes by reading and writing the character device.
pub const UBLK_F_USER_COPY: u32 = 1 << 7;
/// The device is zoned.
pub const UBLK_F_ZONED: u32 = 1 << 8;
/// Without a server requests fail, and the device can still be taken over.
pub const UBLK_F_USER_RECOVERY_FAIL_IO: u32 = 1 << 9;
/// The size may change while the device is live.
pub const UBLK_F_UPDATE_SIZE: u32 = 1 << 10;
/// Each request's buffer is registered by the driver before the server sees the request.
pub const UBLK_F_AUTO_BUF_REG: u32 = 1 << 11;
/// The device can be made to wait for another server while this one lives.
pub const UBLK_F_QUIESCE: u32 = 1 << 12;
/// Each tag may be served by a thread of its own.
pub const UBLK_F_PER_IO_DAEMON: u32 = 1 << 13;
/// Buffers may be registered by any thread.
pub const UBLK_F_BUF_REG_OFF_DAEMON: u32 = 1 << 14;
/// Requests are taken and answered many at a time.
pub const UBLK_F_BATCH_IO: u32 = 1 << 15;
/// Requests may carry integrity data.
pub const UBLK_F_INTEGRITY: u32 = 1 << 16;
/// The device can be stopped on condition that nobody has it open.
pub const UBLK_F_SAFE_STOP_DEV: u32 = 1 << 17;
/// Partitions are not looked for when the device starts.
pub const UBLK_F_NO_AUTO_PART_SCAN: u32 = 1 << 18;
/// Memory shared with the clients may be registered.
pub const UBLK_F_SHMEM_ZC: u32 = 1 << 19;

/// The server is gone, and the device with it.
pub const UBLK_S_DEV_DEAD: u32 = 0;
/// Served.
pub const UBLK_S_DEV_LIVE: u32 = 1;
/// Waiting for a server; requests wait too.
pub const UBLK_S_DEV_QUIESCED: u32 = 2;
/// Waiting for a server; requests fail.
pub const UBLK_S_DEV_FAIL_IO: u32 = 3;
