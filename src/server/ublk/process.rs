//! What a process must be to serve the kernel it runs on.

#![allow(unsafe_code)]

use std::ffi::CString;
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
/// is kept busy.  Without the privilege it changes nothing, and says false.
///
/// # Errors
/// The host's.
pub(super) fn leave_mount_namespace() -> Result<bool> {
    let failed = |doing: &str| Error::io(doing, std::io::Error::last_os_error());
    // SAFETY: takes a number only; the namespace that is left goes on for everybody else.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return match errno {
            Some(libc::EPERM | libc::ENOSYS) => Ok(false),
            _ => Err(failed("get a mount namespace")),
        };
    }
    let (none, root) = (c"none".as_ptr(), c"/".as_ptr());
    let how = libc::MS_REC | libc::MS_SLAVE;
    // SAFETY: both strings end with a NUL and outlive the call; the other pointers may be null.
    let done = unsafe { libc::mount(none, root, std::ptr::null(), how, std::ptr::null()) };
    match done {
        0 => Ok(true),
        _ => Err(failed("detach the mount namespace")),
    }
}

/// Detaches, in this mount namespace alone, what is mounted from the block device `name`, whole or
/// a partition of it, by a call of [`leave_mount_namespace`] that copied it.
///
/// Where mounts are private, what others unmount stays mounted here: a server that takes its device
/// over would keep that busy, and the file system on it from ever being closed.
pub(super) fn let_go_of(name: &str) {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else {
        return;
    };
    for (device, path) in mounts.lines().filter_map(mount) {
        let from = std::fs::canonicalize(format!("/sys/dev/block/{device}"));
        if from.is_ok_and(|from| from.iter().any(|part| part == name)) {
            // SAFETY: the string ends with a NUL and outlives the call.
            unsafe {
                libc::umount2(path.as_ptr(), libc::MNT_DETACH);
            }
        }
    }
}

/// The numbers of the device, and the directory, of a line of the kernel's list of mounts.
fn mount(line: &str) -> Option<(&str, CString)> {
    let mut words = line.split(' ');
    let device = words.nth(2)?;
    let path = words.nth(1)?.as_bytes();
    let mut plain = Vec::with_capacity(path.len());
    let mut at = 0;
    while let Some(byte) = path.get(at) {
        // Blanks and such are a backslash and three octal digits.
        let coded = match byte {
            b'\\' => path.get(at + 1..at + 4),
            _ => None,
        };
        let coded =
            coded.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(coded.unwrap_or(*byte));
        at += if coded.is_some() { 4 } else { 1 };
    }
    Some((device, CString::new(plain).ok()?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_the_blanks_in_their_names() {
        let line = "36 25 259:3 / /mnt/a\\040b\\134c rw,relatime shared:1 - ext4 /dev/x rw";
        let (device, path) = mount(line).expect("is one");
        assert_eq!((device, path.as_c_str()), ("259:3", c"/mnt/a b\\c"));
        assert!(mount("36 25 259:3").is_none());
    }
}
