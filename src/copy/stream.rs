//! Disks as streams of bytes: to a pipe, and from one.

use std::io::{Read, Write};

use parking_lot::Mutex;

use crate::copy::engine::Engine;
use crate::copy::joined::Joined;
use crate::copy::progress::Progress;
use crate::copy::salvage::{Lost, Reader};
use crate::copy::scan::{IO_STEP, Scratch};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::nonzero;

/// Writes the bytes of `sources` to `out`, in order; `workers` threads read ahead.
///
/// # Errors
/// `Cancelled`; those of the chains; those of `out`, with the host's error as the cause.  Then any
/// number of bytes may have been written.
pub fn send(
    sources: &Joined,
    out: &mut (dyn Write + Send),
    workers: usize,
    salvage: Option<&Lost<'_>>,
    progress: &dyn Progress,
) -> Result<()> {
    let out = Mutex::new(out);
    let reader = Reader { sources, salvage };
    let engine = Engine::new(sources.len(), len64(IO_STEP), &|_, _| Ok(0), progress);
    let workers = workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Scratch::default, |scratch, job| -> Result<()> {
        let buf = &mut scratch.io()[..clamp_len(job.range.end - job.range.start, IO_STEP)];
        reader.read_at(buf, job.range.start)?;
        if engine.wait_turn(job) {
            out.lock()
                .write_all(buf)
                .map_err(|e| Error::io("write to the stream", e))?;
            engine.turn_over(job);
        }
        Ok(())
    })?;
    let flushed = out.into_inner().flush();
    flushed.map_err(|e| Error::io("write to the stream", e))
}

/// Writes the bytes of `input` to an empty object; zero runs of at least 4 KiB become holes.  The
/// object is then as long as the stream was, and that is returned.
///
/// # Errors
/// `Cancelled`; `OutOfRange` for a stream of more than 2^63 - 1 bytes; those of the object and of
/// `input`.
pub fn receive(
    input: &mut dyn Read,
    storage: &dyn Storage,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut buf = vec![0; IO_STEP];
    let mut at = 0u64;
    loop {
        progress.check()?;
        let len = fill(input, &mut buf, progress)?;
        let end = at
            .checked_add(len64(len))
            .filter(|&e| i64::try_from(e).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange, "the stream does not end"))?;
        for part in nonzero(&buf[..len], 4096) {
            storage.write_at(&buf[part.clone()], at + len64(part.start))?;
        }
        progress.advance(len64(len));
        at = end;
        if len < buf.len() {
            storage.set_len(at)?;
            return Ok(at);
        }
    }
}

/// Reads until `buf` is full or the stream ends.
fn fill(input: &mut dyn Read, buf: &mut [u8], progress: &dyn Progress) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match input.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => progress.check()?,
            Err(e) => return Err(Error::io("read from the stream", e)),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::joined::tests::joined;
    use crate::copy::progress::Silent;
    use crate::storage::memory::MemoryStorage;

    fn pattern(len: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut bytes = vec![0; len];
        for chunk in bytes.chunks_mut(10_000) {
            if rng.bool() {
                rng.fill(chunk);
            }
        }
        bytes
    }

    #[test]
    fn a_disk_sent_and_received_is_the_same() {
        let bytes = pattern((3 << 20) + 777);
        let (a, b) = bytes.split_at(1_500_000);
        let mut sent = Vec::new();
        send(&joined(&[a, b]), &mut sent, 3, None, &Silent).expect("memory takes all");
        assert!(sent == bytes);
        let storage = MemoryStorage::new();
        let len = receive(&mut &*sent, &storage, &Silent).expect("memory takes all");
        assert_eq!(len, len64(bytes.len()));
        assert!(storage.to_bytes() == bytes);
    }

    #[test]
    fn zeroes_at_the_end_of_a_stream_count() {
        let storage = MemoryStorage::new();
        let len = receive(&mut &[0u8; 5000][..], &storage, &Silent).expect("reads");
        assert_eq!((len, storage.to_bytes().len()), (5000, 5000));
    }
}
