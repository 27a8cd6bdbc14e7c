//! Disks into one file that holds them all.
//!
//! Where the target can seek, each disk is written once and what comes before them last; where it
//! cannot, each is made twice, and the bytes of the first time are only counted.  Both give the same
//! file.

use std::io::{self, BufWriter, Write};

use crate::error::{Error, Result};
use crate::image::assemble::{Assembly, Stored};
use crate::storage::append::Appended;
use crate::storage::{Storage, start_over, write_zeroes};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::zeroes;
use crate::util::digest::Hasher;

/// Bytes that are written at a time.
const BUFFER: usize = 1 << 20;

/// Writes the disk with this number, counted from 0, to a stream.
pub type WriteDisk<'f, E> = dyn FnMut(usize, &mut (dyn Write + Send)) -> Result<(), E> + 'f;

/// Makes `storage` hold a file with `count` disks.
///
/// # Errors
/// Those of `write`, of the plan and of the host.  Then any part of it may have been written.
pub fn into_storage<E: From<Error>>(
    assembly: &dyn Assembly,
    count: usize,
    storage: &dyn Storage,
    write: &mut WriteDisk<'_, E>,
) -> Result<(), E> {
    start_over(storage, 0)?;
    let mut at = assembly.head_len();
    let mut disks = Vec::with_capacity(count);
    for number in 0..count {
        let start = at + assembly.before_len();
        let mut out = BufWriter::with_capacity(BUFFER, Appended::new(storage, start));
        let disk = counted(assembly, &mut out, |out| write(number, out))?;
        out.flush().map_err(lost)?;
        drop(out);
        let end = start + disk.len;
        storage.write_at(&assembly.before(number, disk.len)?, at)?;
        at = end + assembly.after(disk.len);
        write_zeroes(storage, end..at)?;
        disks.push(disk);
    }
    write_zeroes(storage, at..at + assembly.end(at))?;
    storage.write_at(&assembly.head(&disks)?, 0)?;
    Ok(())
}

/// What `count` disks come to: the first of two times that they are made for a stream.
///
/// # Errors
/// Those of `write`.
pub fn measured<E: From<Error>>(
    assembly: &dyn Assembly,
    count: usize,
    write: &mut WriteDisk<'_, E>,
) -> Result<Vec<Stored>, E> {
    let one = |number| counted(assembly, &mut io::sink(), |out| write(number, out));
    (0..count).map(one).collect()
}

/// Writes a file with disks, which come to `disks`, to a stream.
///
/// # Errors
/// Those of `write`, of the plan and of the stream; `Corrupt` where a disk was another the second
/// time.  Then any number of bytes may have been written.
pub fn into_stream<E: From<Error>>(
    assembly: &dyn Assembly,
    disks: &[Stored],
    out: &mut (dyn Write + Send),
    write: &mut WriteDisk<'_, E>,
) -> Result<(), E> {
    let head = assembly.head(disks)?;
    let mut at = len64(head.len());
    out.write_all(&head).map_err(lost)?;
    for (number, disk) in disks.iter().enumerate() {
        let before = assembly.before(number, disk.len)?;
        out.write_all(&before).map_err(lost)?;
        let again = counted(assembly, out, |out| write(number, out))?;
        if again != *disk {
            let text = format!("source {} has changed while it was read", number + 1);
            return Err(Error::corrupt(text).into());
        }
        let after = assembly.after(disk.len);
        put_zeroes(out, after)?;
        at += len64(before.len()) + disk.len + after;
    }
    put_zeroes(out, assembly.end(at))?;
    out.flush().map_err(lost)?;
    Ok(())
}

/// What `write` writes to `out`.
fn counted<E: From<Error>>(
    assembly: &dyn Assembly,
    out: &mut (dyn Write + Send),
    write: impl FnOnce(&mut (dyn Write + Send)) -> Result<(), E>,
) -> Result<Stored, E> {
    let mut counted = Counted {
        out,
        len: 0,
        hasher: assembly.digest().map(Hasher::new),
    };
    write(&mut counted)?;
    Ok(Stored {
        len: counted.len,
        digest: counted.hasher.map(Hasher::finish),
    })
}

fn put_zeroes(out: &mut dyn Write, count: u64) -> Result<()> {
    let mut rest = count;
    while rest > 0 {
        let piece = &zeroes()[..clamp_len(rest, zeroes().len())];
        out.write_all(piece).map_err(lost)?;
        rest -= len64(piece.len());
    }
    Ok(())
}

fn lost(error: io::Error) -> Error {
    Error::io("write to the stream", error)
}

/// A stream of which the bytes are counted.
struct Counted<'a> {
    out: &'a mut (dyn Write + Send),
    len: u64,
    hasher: Option<Hasher>,
}

impl Write for Counted<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = self.out.write(buf)?;
        self.len += len64(len);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..len]);
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
