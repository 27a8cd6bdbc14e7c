//! What kind of file system a file lies on.

use std::os::fd::BorrowedFd;

/// Whether a file's pages belong to this kernel alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// They do.
    Local,
    /// Another machine or a process of the user has a say: NFS, SMB, FUSE and their like.  Mapped
    /// reads there may be stale or hang, but the server may copy by itself.
    Remote,
}

/// `f_type` of the file systems that are not local; from linux/magic.h and their own sources.
const REMOTE: &[u32] = &[
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x517b,      // SMB
    0x6573_5546, // FUSE, virtiofs
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x5346_414f, // AFS
    0x6b41_4653, // kAFS
    0x7375_7245, // Coda
    0x7461_636f, // OCFS2
    0x0116_1970, // GFS2
    0x0bd0_0bd0, // Lustre
    0x4750_4653, // GPFS
    0x1983_0326, // BeeGFS
    0x2003_0528, // OrangeFS
    0x786f_4256, // VirtualBox shared folders
    0xbacb_acbc, // VMware shared folders
];

impl FileSystem {
    /// That of an open file; `Remote` where the host cannot tell.
    pub fn of(file: BorrowedFd<'_>) -> Self {
        let Ok(stat) = rustix::fs::fstatfs(file) else {
            return Self::Remote;
        };
        // The field's width and sign differ by platform; the magic numbers have 32 bits.
        let magic = u32::try_from(stat.f_type as u64 & u64::from(u32::MAX));
        match magic.is_ok_and(|m| !REMOTE.contains(&m)) {
            true => Self::Local,
            false => Self::Remote,
        }
    }
}
