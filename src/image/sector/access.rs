//! Reading and writing what a list of segments means.

use super::{Parts, Piece, Sectors, Segments, Whole, past_the_end};
use crate::error::{Error, Result};
use crate::util::align::len64;

/// Refuses segments of which a sector is past the end, before anything is done.
fn check(sectors: &dyn Sectors, segments: &Segments) -> Result<()> {
    let end = sectors.end();
    let whole = len64(sectors.whole_len());
    for index in 0..segments.count() {
        let Some(segment) = segments.get(index) else {
            continue;
        };
        let last = segment.start + segment.len;
        let last = match segments.unit() {
            super::Unit::Blocks => last,
            super::Unit::Bytes => last.div_ceil(whole),
        };
        if last > end {
            return Err(past_the_end(last - 1, end));
        }
    }
    Ok(())
}

/// Hands `take` what the segments mean, piece by piece, with the bytes of each, in order.  Returns
/// how many bytes that were.
///
/// # Errors
/// `OutOfRange` where a segment reaches past the end of the disc, before anything is read; those of
/// `take` and of [`Sectors::fetch`], after the pieces before were handed out.
pub fn read(
    sectors: &dyn Sectors,
    segments: &Segments,
    take: &mut dyn FnMut(&Piece, &[u8]) -> Result<()>,
) -> Result<u64> {
    check(sectors, segments)?;
    let mut buf = vec![0; sectors.whole_len()];
    let mut done = 0;
    for sector in segments.sectors(buf.len()) {
        let layout = sectors.fetch(sector.lba(), &mut buf)?;
        for piece in sector.of(&layout) {
            let bytes = &buf[piece.range.clone()];
            done += len64(bytes.len());
            take(&piece, bytes)?;
        }
    }
    Ok(done)
}

/// Has `give` fill what the segments mean, piece by piece in order, and stores it, sector by
/// sector. Codes that depend on what was changed are made anew unless they are among the parts.
/// Returns how many bytes were given.
///
/// # Errors
/// `OutOfRange` where a segment reaches past the end of the disc, and `Invalid` where a sector has
/// none of the parts, before that sector is changed; those of `give` and of [`Sectors::change`].
/// The sectors before are then changed, each as a whole.
pub fn write(
    sectors: &dyn Sectors,
    segments: &Segments,
    give: &mut dyn FnMut(&Piece, &mut [u8]) -> Result<()>,
) -> Result<u64> {
    check(sectors, segments)?;
    let mut done = 0;
    for sector in segments.sectors(sectors.whole_len()) {
        let lba = sector.lba();
        sectors.change(lba, sector.parts(), &mut |buf, layout| {
            let before = done;
            let mut whole = Whole::Yes;
            for piece in sector.of(layout) {
                let bytes = &mut buf[piece.range.clone()];
                give(&piece, bytes)?;
                done += len64(bytes.len());
                if !piece.is_whole && piece.part == Parts::DATA {
                    whole = Whole::No;
                }
            }
            match done == before {
                true => Err(Error::invalid(format!(
                    "sector {lba} has none of these parts (it has: {})",
                    layout.parts().names().join(", ")
                ))),
                false => Ok(whole),
            }
        })?;
    }
    Ok(done)
}
