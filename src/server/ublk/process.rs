//! What a process must be to serve the kernel it runs on.

#![allow(unsafe_code)]

use std::fs::File;

use rustix::ioctl::{self, NoArg, Opcode};

use crate::error::{Error, Result};

/// From the kernel's interface; the libc crate does not have it for every target.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Has the kernel's memory allocations for this thread never wait for a device, which might be
/// the one that is served here.  Threads that it starts are marked too.
///
/// Without the privilege it changes nothing.
pub(super) fn mark_io_flusher() {
    // SAFETY: takes numbers only, and changes nothing but a flag of the calling thread.
    unsafe {
        libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    }
}

/// Gives the calling thread, and the threads it will start, a mount namespace of their own.
///
/// A server that ends as the last user of a namespace would unmount what is in it, and wait for
/// the disk that it no longer serves.  What others unmount is unmounted here too, so that nothing
/// is kept busy.  Without the privilege it changes nothing.
///
/// # Errors
/// The host's.
pub(super) fn leave_mount_namespace() -> Result<()> {
    let failed = |doing: &str| Error::io(doing, std::io::Error::last_os_error());
    // SAFETY: takes a number only; the namespace that is left goes on for everybody else.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return match errno {
            Some(libc::EPERM | libc::ENOSYS) => Ok(()),
            _ => Err(failed("get a mount namespace")),
        };
    }
    let (none, root) = (c"none".as_ptr(), c"/".as_ptr());
    let how = libc::MS_REC | libc::MS_SLAVE;
    // SAFETY: both strings end with a NUL and outlive the call; the other pointers may be null.
    let done = unsafe { libc::mount(none, root, std::ptr::null(), how, std::ptr::null()) };
    match done {
        0 => Ok(()),
        _ => Err(failed("detach the mount namespace")),
    }
}

/// Keeps signals from the calling thread and the threads it will start, so that no system call of
/// theirs is cut short.  They go to the other threads of the process.
pub(super) fn block_signals() {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the first call makes the set that the second one reads; both take valid pointers or
    // null, and only the calling thread's mask changes.  A fault is told of whatever the mask.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
            libc::sigdelset(all.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// Writes what the kernel has cached of a block device, a mounted file system's own included.
///
/// # Errors
/// The host's.
pub(super) fn write_back(device: &File) -> Result<()> {
    const BLKFLSBUF: Opcode = ioctl::opcode::none(0x12, 97);
    // SAFETY: the request takes no argument.
    let done = unsafe { ioctl::ioctl(device, NoArg::<BLKFLSBUF>::new()) };
    done.map_err(|e| Error::io("write back what is cached", e.into()))
}
