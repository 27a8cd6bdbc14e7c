//! Advisory locks, compatible with those QEMU takes.
//!
//! QEMU keeps one byte for each permission: byte 100 + n is held, shared, by who uses permission n,
//! and byte 200 + n by who does not let others use it.  After taking its own, each side looks
//! whether somebody else holds the opposite of one of them.  The locks belong to the open file
//! description (`F_OFD_SETLK`) and end when it is closed, however the process ends.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::open::Access;

/// Byte of permission 0 among those held.
const HELD: i64 = 100;
/// Byte of permission 0 among those not shared.
const NOT_SHARED: i64 = 200;
/// Byte of who makes a file that has no name of its own yet.
const CLAIMED: i64 = 300;

/// What QEMU lets the user of an image do; the discriminant is the number of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permission {
    /// Reading, with the expectation that what is read hangs together.
    ConsistentRead = 0,
    /// Writing.  Number 2 is writing what is there already, which we neither do nor forbid.
    Write = 1,
    /// Changing the length.
    Resize = 3,
}

use Permission::{ConsistentRead, Resize, Write};

/// What neither readers nor writers let others do: metadata in memory would no longer be true.
const FORBIDDEN: &[Permission] = &[Write, Resize];

fn held(access: Access) -> &'static [Permission] {
    match access {
        Access::Read => &[ConsistentRead],
        Access::Write => &[ConsistentRead, Write, Resize],
    }
}

/// Takes the locks of a reader or of a writer; they last until `file` and all its duplicates are
/// closed.  Does nothing where the file system has no such locks.
///
/// # Errors
/// `Locked` where another open file holds what excludes ours, also one of this process; some of
/// our locks are then held until `file` is closed.  The host's.
pub(super) fn lock(file: BorrowedFd<'_>, access: Access) -> Result<()> {
    match hold(file, access)? {
        Host::HasLocks => look(file, access),
        Host::HasNone => Ok(()),
    }
}

/// As [`lock`], without a look at what others hold: this process has the same locks by another
/// descriptor, and keeps them until this call has ended.
///
/// # Errors
/// `Locked` where another process locked the file whole; the host's.
pub(super) fn hold_too(file: BorrowedFd<'_>, access: Access) -> Result<()> {
    hold(file, access).map(|_| ())
}

/// Has `writer` take the locks of a writer of the file that this process has open as `reader` too, with
/// those of a reader: nobody can take it in between.  `reader` lets others write from then on, which
/// `writer` does not.
///
/// # Errors
/// As [`lock`]; then `reader` has all its locks.
pub(super) fn promote(writer: BorrowedFd<'_>, reader: BorrowedFd<'_>) -> Result<()> {
    if hold(writer, Access::Write)? == Host::HasNone {
        return Ok(());
    }
    give_up(reader, not_shared());
    look(writer, Access::Write).inspect_err(|_| {
        // While `writer` holds the same.
        let _ = hold(reader, Access::Read);
    })
}

/// Whether a file system has locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    HasLocks,
    HasNone,
}

fn not_shared() -> impl Iterator<Item = i64> {
    FORBIDDEN.iter().map(|&p| byte(NOT_SHARED, p))
}

/// Takes the bytes of a reader or of a writer.
fn hold(file: BorrowedFd<'_>, access: Access) -> Result<Host> {
    let ours = held(access).iter().map(|&p| byte(HELD, p));
    for at in ours.chain(not_shared()) {
        match take(file, at) {
            Ok(()) => {}
            Err(e) if has_no_locks(&e) => return Ok(Host::HasNone),
            Err(e) if is_conflict(&e) => {
                return Err(locked(access, "another process locked it whole"));
            }
            Err(e) => return Err(Error::io("lock", e)),
        }
    }
    Ok(Host::HasLocks)
}

/// Looks whether another open file holds the opposite of what a reader or a writer holds.
fn look(file: BorrowedFd<'_>, access: Access) -> Result<()> {
    for &permission in FORBIDDEN {
        if is_held(file, byte(HELD, permission))? {
            return Err(locked(
                access,
                match permission {
                    Resize => "another process may change its length",
                    _ => "another process has it open for writing",
                },
            ));
        }
    }
    for &permission in held(access) {
        if is_held(file, byte(NOT_SHARED, permission))? {
            return Err(locked(
                access,
                match permission {
                    ConsistentRead => "another process lets nobody read it",
                    Write => "another process has it open and lets nobody write",
                    Resize => "another process has it open and lets nobody change its length",
                },
            ));
        }
    }
    Ok(())
}

/// Takes the file for the one user of its name: none of the bytes that QEMU or `lock` know, so
/// that it can be opened and locked besides.  Lasts until `file` and all its duplicates are closed.
///
/// # Errors
/// `Locked` where another open file has taken it; `Unsupported` where the file system has no such
/// locks; the host's.
pub fn claim(file: BorrowedFd<'_>) -> Result<()> {
    match fcntl(file, libc::F_OFD_SETLK, libc::F_WRLCK, CLAIMED) {
        Ok(_) => Ok(()),
        Err(e) if has_no_locks(&e) => Err(Error::unsupported("the file system has no locks")),
        Err(e) if is_conflict(&e) => Err(locked(Access::Write, "another process is making it")),
        Err(e) => Err(Error::io("lock", e)),
    }
}

/// Gives up what `lock` took, at once.
///
/// Closing the file is not enough: a process that is being started by another thread holds a
/// duplicate of it until it runs its own program.
pub(super) fn unlock(file: BorrowedFd<'_>) {
    let held = held(Access::Write).iter().map(|&p| byte(HELD, p));
    give_up(file, held.chain(not_shared()));
}

fn give_up(file: BorrowedFd<'_>, bytes: impl Iterator<Item = i64>) {
    for at in bytes {
        // A failure leaves the lock to the close.
        let _ = fcntl(file, libc::F_OFD_SETLK, libc::F_UNLCK, at);
    }
}

fn byte(base: i64, permission: Permission) -> i64 {
    base + permission as i64
}

fn locked(access: Access, what: &str) -> Error {
    let way_out = match access {
        Access::Read => " (-U reads it all the same)",
        Access::Write => "",
    };
    Error::new(ErrorKind::Locked, format!("is locked: {what}{way_out}"))
}

fn has_no_locks(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOLCK | libc::ENOSYS)
    )
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Holds one byte, shared.
fn take(file: BorrowedFd<'_>, at: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, at).map(|_| ())
}

/// Whether another open file holds the byte, shared or not.
fn is_held(file: BorrowedFd<'_>, at: i64) -> Result<bool> {
    match fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, at) {
        Ok(found) => Ok(i32::from(found.l_type) != libc::F_UNLCK),
        Err(e) if has_no_locks(&e) => Ok(false),
        Err(e) => Err(Error::io("look for locks", e)),
    }
}

fn fcntl(file: BorrowedFd<'_>, command: i32, kind: i32, at: i64) -> io::Result<libc::flock64> {
    // SAFETY: all zeroes is a valid flock64; OFD locks want `l_pid` to be 0.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or(0);
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0);
    lock.l_start = at;
    lock.l_len = 1;
    loop {
        // SAFETY: both commands take a pointer to a flock64, which they may fill.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
            return Ok(lock);
        }
        match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => {}
            e => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("opens")
    }

    #[test]
    fn readers_share_and_writers_are_alone() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let cases = [
            (Access::Read, Access::Read, true),
            (Access::Read, Access::Write, false),
            (Access::Write, Access::Read, false),
            (Access::Write, Access::Write, false),
        ];
        for (first, second, allowed) in cases {
            let holder = open(named.path());
            lock(holder.as_fd(), first).expect("nobody else is there");
            let other = open(named.path());
            let result = lock(other.as_fd(), second);
            assert_eq!(result.is_ok(), allowed, "{first:?}, then {second:?}");
            if let Err(e) = result {
                assert_eq!(e.kind(), ErrorKind::Locked);
                assert_eq!(e.message().contains("-U"), second == Access::Read, "{e}");
            }
        }
    }

    #[test]
    fn a_reader_becomes_the_writer_only_where_nobody_else_reads() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let [reader, writer, other] = [(); 3].map(|()| open(named.path()));
        lock(reader.as_fd(), Access::Read).expect("nobody else is there");
        lock(other.as_fd(), Access::Read).expect("readers share");
        promote(writer.as_fd(), reader.as_fd()).expect_err("another one reads it");
        unlock(writer.as_fd());
        unlock(other.as_fd());
        lock(other.as_fd(), Access::Write).expect_err("is read by the first one as before");
        unlock(other.as_fd());
        promote(writer.as_fd(), reader.as_fd()).expect("nobody else is there");
        for access in [Access::Read, Access::Write] {
            lock(other.as_fd(), access).expect_err("is written to");
            unlock(other.as_fd());
        }
        // A writer who goes on as a reader lets nobody else write in between.
        hold_too(other.as_fd(), Access::Read).expect("is ours");
        drop((reader, writer));
        let late = open(named.path());
        lock(late.as_fd(), Access::Write).expect_err("is read");
        unlock(late.as_fd());
        lock(late.as_fd(), Access::Read).expect("readers share");
    }

    #[test]
    fn a_file_is_claimed_once_and_can_be_locked_besides() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let holder = open(named.path());
        claim(holder.as_fd()).expect("nobody else is there");
        let other = open(named.path());
        let error = claim(other.as_fd()).expect_err("is taken");
        assert_eq!(error.kind(), ErrorKind::Locked);
        lock(other.as_fd(), Access::Write).expect("is something else");
        drop(holder);
        claim(other.as_fd()).expect("nobody is left");
    }

    #[test]
    fn closing_the_file_ends_its_locks() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        for _ in 0..2 {
            lock(open(named.path()).as_fd(), Access::Write).expect("nobody is left");
        }
    }
}
