//! The loss of a mapped file's bytes, as a flag instead of the death of the process.
//!
//! A load from a mapping whose file was truncated, or whose disk fails, raises SIGBUS.  Every live
//! window is registered in a table that the signal handler can read; a fault inside one puts zero
//! pages under the rest of the window and marks it as lost, so that the load goes on and its
//! caller finds the mark.  Any other SIGBUS goes to the handler that was there before.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};

/// Most windows in the whole process; beyond that files are read without them.  Enough
/// for two in each layer of the longest chain; at 16 MiB each, their page tables take 32 MiB at
/// most.
const PLACES: usize = 1024;
/// Bits of a table word that hold the window's length in pages of 4 KiB; the start is above them.
const LEN_BITS: u32 = 19;
const PAGE_BITS: u32 = 12;
/// Longest window that a table word can describe, in bytes.
pub(super) const MAX_LEN: usize = ((1 << LEN_BITS) - 1) << PAGE_BITS;

/// One place in the table.  A window's address and length are one word, so that the handler never
/// sees half of a change; 0 is free.
struct Place {
    window: AtomicU64,
    lost: AtomicBool,
}

const FREE: u64 = 0;

static TABLE: [Place; PLACES] = [const {
    Place {
        window: AtomicU64::new(FREE),
        lost: AtomicBool::new(false),
    }
}; PLACES];
/// Where the search for a free place begins.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// The disposition before ours; set before ours is installed.
static PREVIOUS: OnceLock<Disposition> = OnceLock::new();
static INSTALLED: OnceLock<bool> = OnceLock::new();

struct Disposition(libc::sigaction);

/// A window in the table.  Must be dropped before the memory it describes is unmapped.
#[derive(Debug)]
pub(super) struct Registration {
    index: usize,
}

impl Registration {
    /// Registers `len` bytes of mapped memory at `start`, a multiple of 4 KiB; `None` where the
    /// table is full, the length is above [`MAX_LEN`], or no handler could be installed.
    pub(super) fn new(start: usize, len: usize) -> Option<Self> {
        if len == 0 || len > MAX_LEN || !*INSTALLED.get_or_init(|| install().is_ok()) {
            return None;
        }
        let word = pack(start, len)?;
        let first = NEXT.fetch_add(1, Ordering::Relaxed);
        (0..PLACES).find_map(|i| {
            let index = first.wrapping_add(i) % PLACES;
            let place = &TABLE[index];
            place
                .window
                .compare_exchange(FREE, word, Ordering::SeqCst, Ordering::Relaxed)
                .ok()?;
            Some(Self { index })
        })
    }

    /// Whether any byte of the window was found missing.
    pub(super) fn lost(&self) -> bool {
        // Loads of the window that come before this call must not be done after the flag is read:
        // zeroes that the handler put there would then pass for data.
        std::sync::atomic::fence(Ordering::Acquire);
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        TABLE[self.index].lost.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let place = &TABLE[self.index];
        place.lost.store(false, Ordering::SeqCst);
        place.window.store(FREE, Ordering::SeqCst);
    }
}

fn pack(start: usize, len: usize) -> Option<u64> {
    let pages = (len as u64).div_ceil(1 << PAGE_BITS);
    let start = start as u64 >> PAGE_BITS;
    (start != 0 && start < 1 << (u64::BITS - LEN_BITS)).then_some(start << LEN_BITS | pages)
}

/// First address and the one after the last.
fn unpack(word: u64) -> (usize, usize) {
    let pages = word & ((1 << LEN_BITS) - 1);
    let start = (word >> LEN_BITS) << PAGE_BITS;
    let address = |word: u64| usize::try_from(word).unwrap_or(usize::MAX);
    (address(start), address(start + (pages << PAGE_BITS)))
}

fn install() -> io::Result<()> {
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only asks; `previous` is room for the answer.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded and filled it; all zeroes is a valid value besides.
    let previous = unsafe { previous.assume_init() };
    let _ = PREVIOUS.set(Disposition(previous));
    // SAFETY: all zeroes is a valid sigaction: an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as usize;
    // On the alternate stack where the thread has one, as the handler that Rust installs for stack
    // overflows.  Not SA_NODEFER: the handler touches no mapping, so it raises no SIGBUS itself.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `handler` has the signature that SA_SIGINFO asks for and lives for ever.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls only what is safe in a signal handler: atomics, mmap, sigaction, raise.
extern "C" fn handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: `__errno_location` is this thread's errno, which the interrupted code may yet read.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo; for a fault (code above 0) it holds the address.
    let fault = unsafe { ((*info).si_code > 0).then(|| (*info).si_addr() as usize) };
    if !fault.is_some_and(absorb) {
        chain(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zero pages under the rest of the window that `address` lies in and marks it lost.
fn absorb(address: usize) -> bool {
    for place in &TABLE {
        let (start, end) = unpack(place.window.load(Ordering::SeqCst));
        if !(start..end).contains(&address) {
            continue;
        }
        // Before the pages: who reads them finds the mark.
        place.lost.store(true, Ordering::SeqCst);
        let page = address & !(page_size() - 1);
        // SAFETY: the range lies inside a window that is mapped now: its owner is the thread that
        // faulted, or shares it with that thread, and unregisters it before it unmaps it.  Nothing
        // else can lie there, and the memory is read-only, so only readers of the window see it.
        let mapped = unsafe {
            libc::mmap(
                page as *mut c_void,
                end - page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return mapped != libc::MAP_FAILED;
    }
    false
}

fn page_size() -> usize {
    // SAFETY: sysconf of a constant; it reads what the kernel told at start.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(1 << PAGE_BITS)
}

/// Does what would have been done without us.
fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.get().map(|d| (d.0.sa_sigaction, d.0.sa_flags));
    match previous {
        Some((libc::SIG_IGN, _)) => {}
        None | Some((libc::SIG_DFL, _)) => {
            // SAFETY: resets a disposition and sends this thread the signal, which is delivered
            // when the handler returns and ends the process as it would have been ended.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
        Some((function, flags)) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the kernel would have called this address with these arguments.
            let function: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(function) };
            function(signal, info, context);
        }
        Some((function, _)) => {
            // SAFETY: as above, without SA_SIGINFO.
            let function: extern "C" fn(c_int) = unsafe { std::mem::transmute(function) };
            function(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_word_holds_the_highest_addresses_and_the_longest_window() {
        let top = (1usize << 56) - (MAX_LEN.next_power_of_two());
        let word = pack(top, MAX_LEN).expect("fits");
        assert_eq!(unpack(word), (top, top + MAX_LEN));
        assert_eq!(unpack(FREE), (0, 0));
    }

    #[test]
    fn a_fault_outside_all_windows_is_not_absorbed() {
        assert!(!absorb(0));
        assert!(!absorb(usize::MAX));
    }
}
